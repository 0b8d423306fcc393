//! Work that keeps a thread busy, or waits for a disk: beside the tasks, not among them.

use std::fmt;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Either};
use rustix::process::setpriority_process;
use rustix::thread::gettid;
use thread_priority::ThreadPriority;
use thread_priority::unix::{
    NormalThreadSchedulePolicy, ThreadSchedulePolicy, set_thread_priority_and_policy,
    thread_native_id,
};
use tokio::sync::oneshot;

/// As `nice -n 10`: where a core is wanted by both, a thread of this priority gets a tenth of what
/// one that answers requests gets. Less, and other programs could keep a snapshot from ever ending.
const BACKGROUND_NICE: i32 = 10;
/// A short piece of work that took so long was kept from its core by others.
const SHORT_WORK_MAX: Duration = Duration::from_millis(100);
/// So many pieces after that are not left to idle cores.
const HURRIED_PIECES: usize = 64;

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
        Self::on_threads(|work| {
            low_priority();
            work();
        })
    }

    /// The same for short pieces of work, some milliseconds each: they are left to cores that nobody
    /// else wants, and give them back at once when a request comes, where a thread that is only of
    /// low priority may keep one for some milliseconds. If that makes them wait too long, those that
    /// follow are of low priority.
    #[must_use]
    pub fn idle() -> Self {
        let hurried = AtomicUsize::new(0);
        Self::on_threads(move |work| {
            let less = |left: usize| left.checked_sub(1);
            let hurry = hurried.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
            match hurry {
                Ok(_) => low_priority(),
                Err(_) => idle_priority(),
            }
            let begun = Instant::now();
            work();
            if begun.elapsed() > SHORT_WORK_MAX {
                hurried.store(HURRIED_PIECES, Ordering::Relaxed);
            }
        })
    }

    fn on_threads(run: impl Fn(Work) + Send + Sync + 'static) -> Self {
        let run = Arc::new(run);
        Self::by(Arc::new(move |work| {
            let run = Arc::clone(&run);
            let (end, ended) = oneshot::channel::<()>();
            let spawned = thread::Builder::new()
                .name("background".into())
                .spawn(move || {
                    run(work);
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

// Where it is not allowed, the thread is as quick as all else.

fn low_priority() {
    let _ = setpriority_process(Some(gettid()), BACKGROUND_NICE);
}

fn idle_priority() {
    let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
    let _ = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, idle);
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// The calling thread's nice value and scheduling policy: fields 19 and 41 of proc_pid_stat(5).
    fn scheduled() -> (i32, u32) {
        let stat = fs::read_to_string("/proc/thread-self/stat").unwrap();
        let (_, rest) = stat.rsplit_once(')').unwrap();
        let fields: Vec<&str> = rest.split_whitespace().collect();
        (fields[16].parse().unwrap(), fields[38].parse().unwrap())
    }

    const IDLE: u32 = 5;

    #[tokio::test]
    async fn background_work_gives_way_to_requests() {
        let (_, policy) = Blocking::threads().run(scheduled).await.unwrap();
        assert_eq!(policy, 0);
        let (nice, _) = Blocking::background().run(scheduled).await.unwrap();
        assert_eq!(nice, BACKGROUND_NICE);
    }

    #[tokio::test]
    async fn idle_work_is_hurried_once_it_had_to_wait() {
        let idle = Blocking::idle();
        let (_, policy) = idle.run(scheduled).await.unwrap();
        assert_eq!(policy, IDLE);
        let wait = || thread::sleep(SHORT_WORK_MAX + Duration::from_millis(1));
        idle.run(wait).await.unwrap();
        for _ in 0..HURRIED_PIECES {
            let (nice, policy) = idle.run(scheduled).await.unwrap();
            assert_eq!((nice, policy), (BACKGROUND_NICE, 0));
        }
        let (_, policy) = idle.run(scheduled).await.unwrap();
        assert_eq!(policy, IDLE);
    }
}
