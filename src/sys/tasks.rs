//! Critical tasks: if one of them fails, the process ends.
//!
//! After a panic in a task, a process could look healthy and do only part of its work. Here a panic in
//! a critical task ends the process with the reason, and a service manager restarts it.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A critical task has ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("task {task} ended: {why}")]
pub struct TaskEnded {
    /// The task.
    pub task: &'static str,
    /// Why it ended.
    pub why: Arc<str>,
}

/// Starts critical tasks and records the first failure. Clones share the record.
#[derive(Clone)]
pub struct CriticalTasks(Arc<watch::Sender<Option<TaskEnded>>>);

impl Default for CriticalTasks {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }
}

impl CriticalTasks {
    /// Starts a task. It may return, but must not panic.
    pub fn spawn<T: Send + 'static>(
        &self,
        task: &'static str,
        run: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<Option<T>> {
        tokio::spawn(self.guard(task, run))
    }

    /// Guards `run`, which may return, but must not panic.
    pub fn guard<T, F: Future<Output = T>>(
        &self,
        task: &'static str,
        run: F,
    ) -> impl Future<Output = Option<T>> + use<T, F> {
        let this = self.clone();
        async move {
            let ended = AssertUnwindSafe(run).catch_unwind().await;
            ended
                .map_err(|panic| this.fail(task, &message(&*panic)))
                .ok()
        }
    }

    /// Records that `task` has ended, which ends the process.
    pub fn fail(&self, task: &'static str, why: &str) {
        let ended = TaskEnded {
            task,
            why: why.into(),
        };
        tracing::error!(task, why, "critical task ended");
        self.0.send_if_modified(|first| {
            let is_first = first.is_none();
            if is_first {
                *first = Some(ended);
            }
            is_first
        });
    }

    /// Resolves when a critical task has failed.
    pub async fn failed(&self) -> TaskEnded {
        let mut failed = self.0.subscribe();
        loop {
            if let Some(ended) = &*failed.borrow_and_update() {
                return ended.clone();
            }
            // The sender is in `self`.
            let _ = failed.changed().await;
        }
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    match text {
        Some(text) => format!("it panicked: {text}"),
        None => "it panicked".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_a_failure_and_a_return_is_not() {
        let tasks = CriticalTasks::default();
        assert_eq!(tasks.spawn("quick", async { 1 }).await.unwrap(), Some(1));
        assert_eq!(tasks.failed().now_or_never(), None);
        tasks.spawn("applier", async { panic!("batch {} is wrong", 7) });
        let ended = tasks.failed().await;
        assert_eq!(
            ended.to_string(),
            "task applier ended: it panicked: batch 7 is wrong"
        );
        tasks.fail("another", "later");
        assert_eq!(tasks.failed().await, ended);
    }
}
