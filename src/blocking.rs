//! Work that keeps a thread busy, or waits for a disk: beside the tasks, not among them.

use std::fmt;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::thread;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Either};
use rustix::process::setpriority_process;
use rustix::thread::gettid;
use tokio::sync::oneshot;

/// As `nice -n 10`: where a core is wanted by both, a thread of this priority gets a tenth of what
/// one that answers requests gets. Less, and other programs could keep a backup from ever ending.
const BACKGROUND_NICE: i32 = 10;

/// A piece of such work.
pub type Work = Box<dyn FnOnce() + Send>;

/// What runs a piece of work; the future ends when it is done.
pub type Run = dyn Fn(Work) -> BoxFuture<'static, ()> + Send + Sync;

/// Where such work is done. Clones are the same.
#[derive(Clone)]
pub struct Blocking(Option<Arc<Run>>);

impl fmt::Debug for Blocking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = if self.0.is_some() { "other" } else { "threads" };
        write!(f, "Blocking({by})")
    }
}

impl Blocking {
    /// On the runtime's threads for such work.
    #[must_use]
    pub fn threads() -> Self {
        Self(None)
    }

    /// On threads of low priority, one for each piece of work and those that it starts: for
    /// what must not stand in the way of requests.
    #[must_use]
    pub fn background() -> Self {
        Self::by(Arc::new(|work| {
            let (end, ended) = oneshot::channel::<()>();
            let spawned = thread::Builder::new()
                .name("background".into())
                .spawn(move || {
                    // Where it is not allowed it is as quick as all else.
                    let _ = setpriority_process(Some(gettid()), BACKGROUND_NICE);
                    work();
                    drop(end);
                });
            if let Err(error) = spawned {
                // The work is gone with its closure, which is what its sender hears.
                tracing::error!(%error, "no thread for work in the background");
            }
            // Its end is told by dropping the sender.
            ended.map(|_dropped| ()).boxed()
        }))
    }

    /// By `run`: for who wants to say when what happens, such as a simulation.
    #[must_use]
    pub fn by(run: Arc<Run>) -> Self {
        Self(Some(run))
    }

    /// Begins `work`; the future brings what it returns. Dropping the future stops nothing on a
    /// thread.
    ///
    /// # Errors
    /// The work panicked, or the runtime is stopping.
    pub fn run<T, W>(&self, work: W) -> impl Future<Output = io::Result<T>> + Send + use<T, W>
    where
        T: Send + 'static,
        W: FnOnce() -> T + Send + 'static,
    {
        let Some(run) = &self.0 else {
            let done = tokio::task::spawn_blocking(work);
            return Either::Left(done.map(|done| done.map_err(io::Error::other)));
        };
        let (sender, result) = oneshot::channel();
        let running = run(Box::new(move || {
            // Who does not wait for it does not want it.
            let _ = sender.send(work());
        }));
        Either::Right(async {
            running.await;
            result.await.map_err(io::Error::other)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// The calling thread's nice value: field 19 of proc_pid_stat(5).
    fn nice() -> i32 {
        let stat = fs::read_to_string("/proc/thread-self/stat").unwrap();
        let (_, rest) = stat.rsplit_once(')').unwrap();
        let nice = rest.split_whitespace().nth(16).unwrap();
        nice.parse().unwrap()
    }

    #[tokio::test]
    async fn background_work_gives_way_to_requests() {
        let own = nice();
        assert_eq!(Blocking::threads().run(nice).await.unwrap(), own);
        let background = Blocking::background().run(nice).await.unwrap();
        assert_eq!(background, own.max(BACKGROUND_NICE));
    }
}
