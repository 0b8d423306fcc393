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
use tokio::runtime::{self, Runtime};
use tokio::sync::oneshot;

/// As `nice -n 10`: where a core is wanted by both, a thread of this priority gets a tenth of what
/// one that answers requests gets. Less, and other programs could keep a snapshot from ever ending.
const BACKGROUND_NICE: i32 = 10;
/// A short piece of work that took so long was kept from its core by others.
const SHORT_WORK_MAX: Duration = Duration::from_millis(50);
/// So many pieces after that are not left to idle cores. With eight times as many a moment in which others took
/// all cores, as a client's start, was felt by requests for a second (ADR 0007).
const HURRIED_PIECES: usize = 32;

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

    /// On a few threads of low priority, and those that they start: for what must not stand in the
    /// way of requests.
    ///
    /// # Errors
    /// The system refused.
    pub fn background() -> io::Result<Self> {
        let threads = Pool::new(low_priority)?;
        Ok(Self::by(Arc::new(move |work| threads.run(work))))
    }

    /// The same for short pieces of work, some milliseconds each: they are left to cores that nobody
    /// else wants, and give them back at once when a request comes, where a thread that is only of
    /// low priority may keep one for some milliseconds. If that makes one wait too long, those that
    /// follow are done by `hurried`.
    ///
    /// # Errors
    /// The system refused.
    pub fn idle(hurried: Self) -> io::Result<Self> {
        let threads = Pool::new(idle_priority)?;
        let left = Arc::new(AtomicUsize::new(0));
        Ok(Self::by(Arc::new(move |work| {
            let less = |left: usize| left.checked_sub(1);
            let hurry = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
            if let (Ok(_), Some(run)) = (hurry, &hurried.0) {
                return run(work);
            }
            let left = Arc::clone(&left);
            threads.run(Box::new(move || {
                let begun = Instant::now();
                work();
                if begun.elapsed() > SHORT_WORK_MAX {
                    left.store(HURRIED_PIECES, Ordering::Relaxed);
                }
            }))
        })))
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

/// Threads that are kept for the next piece of work: a runtime of which nothing else is used. A new
/// thread competes with requests until it has lowered its priority, which showed in their p99 when
/// each chunk of a backup had one (ADR 0007).
struct Pool(Option<Runtime>);

impl Pool {
    /// Each of its threads begins with `lower`.
    fn new(lower: fn()) -> io::Result<Self> {
        let cores = thread::available_parallelism().map_or(2, usize::from);
        let runtime = runtime::Builder::new_current_thread()
            .thread_name("background")
            // One more than are at work, for a snapshot that waits for its disk.
            .max_blocking_threads(cores + 1)
            .on_thread_start(lower)
            .build()?;
        Ok(Self(Some(runtime)))
    }

    fn run(&self, work: Work) -> BoxFuture<'static, ()> {
        let done = self.0.as_ref().map(|runtime| runtime.spawn_blocking(work));
        async {
            if let Some(done) = done {
                // That the work panicked its sender hears from the channel that is gone with it.
                let _ = done.await;
            }
        }
        .boxed()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // Waits for nothing, which an asynchronous task may not.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
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

    const OTHER: u32 = 0;
    const IDLE: u32 = 5;

    #[tokio::test]
    async fn background_work_gives_way_to_requests() {
        let (own, policy) = scheduled();
        let threads = Blocking::threads();
        assert_eq!(threads.run(scheduled).await.unwrap(), (own, policy));
        let background = Blocking::background().unwrap();
        for _ in 0..100 {
            let lowered = (own.max(BACKGROUND_NICE), OTHER);
            assert_eq!(background.run(scheduled).await.unwrap(), lowered);
        }
    }

    #[tokio::test]
    async fn idle_work_is_hurried_once_it_had_to_wait() {
        let (own, _) = scheduled();
        let idle = Blocking::idle(Blocking::background().unwrap()).unwrap();
        let (_, policy) = idle.run(scheduled).await.unwrap();
        assert_eq!(policy, IDLE);
        let wait = || thread::sleep(SHORT_WORK_MAX + Duration::from_millis(1));
        idle.run(wait).await.unwrap();
        for _ in 0..HURRIED_PIECES {
            let lowered = (own.max(BACKGROUND_NICE), OTHER);
            assert_eq!(idle.run(scheduled).await.unwrap(), lowered);
        }
        let (_, policy) = idle.run(scheduled).await.unwrap();
        assert_eq!(policy, IDLE);
    }

    #[tokio::test]
    async fn work_that_panics_is_an_error_and_the_next_is_done() {
        let background = Blocking::background().unwrap();
        let panicking = background.run(|| -> () { panic!("on purpose") });
        panicking.await.unwrap_err();
        assert_eq!(background.run(|| 7).await.unwrap(), 7);
    }
}
