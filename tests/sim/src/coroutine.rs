//! Runs blocking work deterministically: its thread runs only while the simulation waits for it,
//! and yields where it would block. So a run with the same seed has the same order of events.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use gradestore::sys::exec::Job;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Notify;

thread_local! {
    /// Idle workers of the simulation on this thread.
    static IDLE: RefCell<Vec<Worker>> = const { RefCell::new(Vec::new()) };
    /// On a worker thread: its channels to the simulation.
    static CHANNELS: RefCell<Option<WorkerChannels>> = const { RefCell::new(None) };
}

/// A thread for blocking work.
struct Worker {
    work: Sender<Job>,
    resume: Sender<Resume>,
    yielded: Receiver<Yielded>,
}

/// Resumes a waiting worker.
#[derive(Clone, Copy)]
enum Resume {
    Continue,
    /// The work is cancelled.
    Cancel,
}

/// Why a worker yields.
enum Yielded {
    Waits(Arc<Mutex<WakeFlag>>),
    Done,
}

struct WorkerChannels {
    resume: Receiver<Resume>,
    yielded: Sender<Yielded>,
}

/// Whether a worker may continue, and the task to wake then.
#[derive(Default)]
pub struct WakeFlag {
    ready: bool,
    waker: Option<Waker>,
}

impl WakeFlag {
    fn wake(this: &Mutex<Self>) {
        let mut this = this.lock();
        this.ready = true;
        if let Some(waker) = this.waker.take() {
            waker.wake();
        }
    }
}

impl Worker {
    fn new() -> Self {
        let (work, works) = channel::<Job>();
        let (resume, resumed) = channel();
        let (yields, yielded) = channel();
        thread::spawn(move || {
            CHANNELS.set(Some(WorkerChannels {
                resume: resumed,
                yielded: yields,
            }));
            for work in works {
                // The receiver of the result notices a panic: the sender is dropped.
                let _ = catch_unwind(AssertUnwindSafe(work));
                CHANNELS.with_borrow(|channels| {
                    let _ = channels
                        .as_ref()
                        .map(|channels| channels.yielded.send(Yielded::Done));
                });
            }
        });
        Self {
            work,
            resume,
            yielded,
        }
    }
}

/// Yields until `wake` is ready. Fails if the work is cancelled. Does nothing on a thread that is
/// not a worker.
fn wait(wake: &Arc<Mutex<WakeFlag>>) -> io::Result<()> {
    CHANNELS.with_borrow(|channels| {
        let Some(channels) = channels else {
            return Ok(());
        };
        let _ = channels.yielded.send(Yielded::Waits(Arc::clone(wake)));
        match channels.resume.recv() {
            Ok(Resume::Continue) => Ok(()),
            _ => Err(io::Error::other("the process has ended")),
        }
    })
}

/// On a worker: yields for `time` on the clock of `runtime`.
pub fn pause(runtime: &Handle, time: Duration) {
    if CHANNELS.with_borrow(Option::is_none) {
        return;
    }
    let wake = Arc::<Mutex<WakeFlag>>::default();
    let woken = Arc::clone(&wake);
    runtime.spawn(async move {
        tokio::time::sleep(time).await;
        WakeFlag::wake(&woken);
    });
    // A cancellation is noticed at the next wait.
    let _ = wait(&wake);
}

/// Blocking work on a worker.
pub struct Coroutine {
    work: Option<Job>,
    worker: Option<Worker>,
    waits_for: Option<Arc<Mutex<WakeFlag>>>,
}

impl Coroutine {
    /// Starts when it is first polled.
    pub fn new(work: Job) -> Self {
        Self {
            work: Some(work),
            worker: None,
            waits_for: None,
        }
    }

    /// Lets the worker run until it yields. Returns whether its work is done.
    fn run_worker(&mut self, resume: Resume) -> bool {
        let Some(worker) = &self.worker else {
            return true;
        };
        match self.work.take() {
            Some(work) => drop(worker.work.send(work)),
            None => drop(worker.resume.send(resume)),
        }
        match worker.yielded.recv() {
            Ok(Yielded::Waits(wake)) => {
                self.waits_for = Some(wake);
                false
            }
            _ => {
                IDLE.with_borrow_mut(|idle| idle.extend(self.worker.take()));
                true
            }
        }
    }
}

impl Future for Coroutine {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.work.is_some() {
            let idle = IDLE.with_borrow_mut(Vec::pop);
            self.worker = Some(idle.unwrap_or_else(Worker::new));
        }
        loop {
            if let Some(wake) = &self.waits_for {
                let mut wake = wake.lock();
                if !wake.ready {
                    wake.waker = Some(cx.waker().clone());
                    return Poll::Pending;
                }
            }
            self.waits_for = None;
            if self.run_worker(Resume::Continue) {
                return Poll::Ready(());
            }
        }
    }
}

impl Drop for Coroutine {
    fn drop(&mut self) {
        if self.work.is_none() {
            while !self.run_worker(Resume::Cancel) {}
        }
    }
}

/// The writing end of a pipe to blocking work.
pub struct PipeSender(Arc<Pipe>);

/// The reading end.
pub struct PipeReader(Arc<Pipe>);

/// The maximum number of chunks in a pipe.
const CHUNKS_MAX: usize = 2;

#[derive(Default)]
struct Pipe {
    state: Mutex<PipeState>,
    space: Notify,
}

#[derive(Default)]
struct PipeState {
    chunks: VecDeque<Bytes>,
    closed: bool,
    reader_dropped: bool,
    reader: Option<Arc<Mutex<WakeFlag>>>,
}

pub fn pipe() -> (PipeSender, PipeReader) {
    let pipe = Arc::new(Pipe::default());
    (PipeSender(Arc::clone(&pipe)), PipeReader(pipe))
}

impl Pipe {
    fn wake(&self) {
        if let Some(wake) = self.state.lock().reader.take() {
            WakeFlag::wake(&wake);
        }
    }
}

impl PipeSender {
    /// Sends `chunk`; returns `false` if the reader was dropped.
    pub async fn send(&self, chunk: Bytes) -> bool {
        loop {
            {
                let mut state = self.0.state.lock();
                if state.reader_dropped {
                    return false;
                }
                if state.chunks.len() < CHUNKS_MAX {
                    state.chunks.push_back(chunk);
                    break;
                }
            }
            self.0.space.notified().await;
        }
        self.0.wake();
        true
    }
}

impl Drop for PipeSender {
    fn drop(&mut self) {
        self.0.state.lock().closed = true;
        self.0.wake();
    }
}

impl Read for PipeReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let wake = {
                let mut state = self.0.state.lock();
                if let Some(chunk) = state.chunks.front_mut() {
                    let taken = chunk.split_to(buffer.len().min(chunk.len()));
                    if chunk.is_empty() {
                        state.chunks.pop_front();
                        self.0.space.notify_one();
                    }
                    buffer[..taken.len()].copy_from_slice(&taken);
                    return Ok(taken.len());
                }
                if state.closed {
                    return Ok(0);
                }
                let wake = Arc::<Mutex<WakeFlag>>::default();
                state.reader = Some(Arc::clone(&wake));
                wake
            };
            wait(&wake)?;
        }
    }
}

impl Drop for PipeReader {
    fn drop(&mut self) {
        self.0.state.lock().reader_dropped = true;
        self.0.space.notify_one();
    }
}
