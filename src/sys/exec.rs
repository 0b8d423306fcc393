//! Thread pools for jobs that use much CPU time or wait for a disk, and so must not run in tasks.

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

/// As `nice -n 10`: on a busy core, a thread of this priority gets a tenth of the CPU time of a thread
/// that answers requests. With less, other programs could keep a snapshot from ever completing.
const BACKGROUND_NICE: i32 = 10;
/// A job of idle priority that takes longer than this did not get a core.
const IDLE_JOB_MAX: Duration = Duration::from_millis(50);
/// After that, this many jobs run at background priority. With eight times as many, a short moment
/// without idle cores, such as the start of a client, slowed requests for a second (ADR 0007).
const PROMOTED_JOBS: usize = 32;

/// A job.
pub type Job = Box<dyn FnOnce() + Send>;

/// Runs a job. The future completes when the job is done.
pub type RunJob = dyn Fn(Job) -> BoxFuture<'static, ()> + Send + Sync;

/// A thread pool for blocking jobs. Clones share it.
#[derive(Clone)]
pub struct Blocking(Option<Arc<RunJob>>);

impl fmt::Debug for Blocking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pool = if self.0.is_some() { "own" } else { "tokio" };
        write!(f, "Blocking({pool})")
    }
}

impl Blocking {
    /// The blocking threads of the tokio runtime, at normal priority.
    #[must_use]
    pub fn threads() -> Self {
        Self(None)
    }

    /// A few threads of low priority, for jobs that must not delay requests. Threads that they start
    /// have the same priority.
    ///
    /// # Errors
    /// The runtime of the threads can't be created.
    pub fn background() -> io::Result<Self> {
        let threads = ThreadPool::new(low_priority)?;
        Ok(Self::with_executor(Arc::new(move |job| threads.run(job))))
    }

    /// A few threads of idle priority, for jobs of a few milliseconds. They run only on idle cores, and
    /// a request preempts them at once, while a thread of low priority may keep its core for some
    /// milliseconds. If a job waits too long for a core, the next ones run on `promoted`.
    ///
    /// # Errors
    /// The runtime of the threads can't be created.
    pub fn idle(promoted: Self) -> io::Result<Self> {
        let threads = ThreadPool::new(idle_priority)?;
        let left = Arc::new(AtomicUsize::new(0));
        Ok(Self::with_executor(Arc::new(move |job| {
            let less = |left: usize| left.checked_sub(1);
            let promote = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
            if let (Ok(_), Some(run)) = (promote, &promoted.0) {
                return run(job);
            }
            let left = Arc::clone(&left);
            threads.run(Box::new(move || {
                let started = Instant::now();
                job();
                if started.elapsed() > IDLE_JOB_MAX {
                    left.store(PROMOTED_JOBS, Ordering::Relaxed);
                }
            }))
        })))
    }

    /// A custom executor, such as that of the simulator.
    #[must_use]
    pub fn with_executor(run: Arc<RunJob>) -> Self {
        Self(Some(run))
    }

    /// Starts `job`. The future resolves to its result; dropping the future does not stop the job.
    ///
    /// # Errors
    /// The job panicked, or the runtime is stopping.
    pub fn run<T, J>(&self, job: J) -> impl Future<Output = io::Result<T>> + Send + use<T, J>
    where
        T: Send + 'static,
        J: FnOnce() -> T + Send + 'static,
    {
        let Some(run) = &self.0 else {
            let done = tokio::task::spawn_blocking(job);
            return Either::Left(done.map(|done| done.map_err(io::Error::other)));
        };
        let (sender, result) = oneshot::channel();
        let running = run(Box::new(move || {
            // The receiver may have been dropped.
            let _ = sender.send(job());
        }));
        Either::Right(async {
            running.await;
            result.await.map_err(io::Error::other)
        })
    }
}

/// A pool of threads: a tokio runtime of which only the blocking threads are used. Threads are reused,
/// because a new one competes with requests until it has lowered its priority. That raised their p99
/// when each chunk of a backup had a new thread (ADR 0007).
struct ThreadPool(Option<Runtime>);

impl ThreadPool {
    /// A pool whose threads call `set_priority` first.
    fn new(set_priority: fn()) -> io::Result<Self> {
        let cores = thread::available_parallelism().map_or(2, usize::from);
        let runtime = runtime::Builder::new_current_thread()
            .thread_name("background")
            // One thread per core, and one for a snapshot that waits for its disk.
            .max_blocking_threads(cores + 1)
            .on_thread_start(set_priority)
            .build()?;
        Ok(Self(Some(runtime)))
    }

    fn run(&self, job: Job) -> BoxFuture<'static, ()> {
        let done = self.0.as_ref().map(|runtime| runtime.spawn_blocking(job));
        async {
            if let Some(done) = done {
                // A panic drops the sender of the result, which the caller notices.
                let _ = done.await;
            }
        }
        .boxed()
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        // Dropping a runtime would wait for its threads, which panics in an asynchronous task.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

// If the system does not allow this, the thread keeps its normal priority.

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
    async fn background_jobs_have_a_low_priority() {
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
    async fn promotes_idle_jobs_after_one_had_to_wait() {
        let (own, _) = scheduled();
        let idle = Blocking::idle(Blocking::background().unwrap()).unwrap();
        let (_, policy) = idle.run(scheduled).await.unwrap();
        assert_eq!(policy, IDLE);
        let wait = || thread::sleep(IDLE_JOB_MAX + Duration::from_millis(1));
        idle.run(wait).await.unwrap();
        let lowered = (own.max(BACKGROUND_NICE), OTHER);
        // The jobs are counted after the result of the slow one was sent.
        while idle.run(scheduled).await.unwrap() != lowered {}
        for _ in 1..PROMOTED_JOBS {
            assert_eq!(idle.run(scheduled).await.unwrap(), lowered);
        }
        let (_, policy) = idle.run(scheduled).await.unwrap();
        assert_eq!(policy, IDLE);
    }

    #[tokio::test]
    async fn a_job_that_panics_is_an_error_and_the_next_one_runs() {
        let background = Blocking::background().unwrap();
        let panicking = background.run(|| -> () { panic!("on purpose") });
        panicking.await.unwrap_err();
        assert_eq!(background.run(|| 7).await.unwrap(), 7);
    }
}
