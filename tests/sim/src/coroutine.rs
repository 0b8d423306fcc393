//! Blocking work, in step with the simulation: its thread runs only while the simulation waits for
//! it, and stops where it would have to wait itself. So everything happens in one order, the same
//! in every run from one seed.

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
    /// Threads that have nothing to do, of the simulation that runs on this one.
    static IDLE: RefCell<Vec<Worker>> = const { RefCell::new(Vec::new()) };
    /// On such a thread: how it hands the turn back.
    static TURNS: RefCell<Option<Turns>> = const { RefCell::new(None) };
}

/// A thread for blocking work.
struct Worker {
    work: Sender<Job>,
    go: Sender<Go>,
    said: Receiver<Said>,
}

/// What a waiting thread is told.
#[derive(Clone, Copy)]
enum Go {
    On,
    /// Nobody wants its work any more.
    End,
}

/// What a thread says when it hands the turn back.
enum Said {
    Waits(Arc<Mutex<Wake>>),
    Done,
}

struct Turns {
    go: Receiver<Go>,
    said: Sender<Said>,
}

/// Whether a thread may go on, and who is to be woken then.
#[derive(Default)]
pub struct Wake {
    ready: bool,
    waker: Option<Waker>,
}

impl Wake {
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
        let (go, goes) = channel();
        let (say, said) = channel();
        thread::spawn(move || {
            let turns = Turns {
                go: goes,
                said: say,
            };
            TURNS.set(Some(turns));
            for work in works {
                // A panic shows by the result's not being there.
                let _ = catch_unwind(AssertUnwindSafe(work));
                TURNS.with_borrow(|turns| {
                    let _ = turns.as_ref().map(|turns| turns.said.send(Said::Done));
                });
            }
        });
        Self { work, go, said }
    }
}

/// Gives the turn back until `wake` is ready. An error if the work is to end. Does nothing on a
/// thread that is no worker.
fn wait(wake: &Arc<Mutex<Wake>>) -> io::Result<()> {
    TURNS.with_borrow(|turns| {
        let Some(turns) = turns else {
            return Ok(());
        };
        let _ = turns.said.send(Said::Waits(Arc::clone(wake)));
        match turns.go.recv() {
            Ok(Go::On) => Ok(()),
            _ => Err(io::Error::other("the process is gone")),
        }
    })
}

/// On a worker: lets the simulation go on for `time`, which passes on the clock of `runtime`.
pub fn pause(runtime: &Handle, time: Duration) {
    if TURNS.with_borrow(Option::is_none) {
        return;
    }
    let wake = Arc::<Mutex<Wake>>::default();
    let woken = Arc::clone(&wake);
    runtime.spawn(async move {
        tokio::time::sleep(time).await;
        Wake::wake(&woken);
    });
    // Whether it is to end is told when it waits for something next.
    let _ = wait(&wake);
}

/// Blocking work under way.
pub struct Coroutine {
    work: Option<Job>,
    worker: Option<Worker>,
    waits_for: Option<Arc<Mutex<Wake>>>,
}

impl Coroutine {
    /// Begins when it is first polled.
    pub fn new(work: Job) -> Self {
        Self {
            work: Some(work),
            worker: None,
            waits_for: None,
        }
    }

    /// Gives the thread the turn; whether its work is done.
    fn turn(&mut self, go: Go) -> bool {
        let Some(worker) = &self.worker else {
            return true;
        };
        match self.work.take() {
            Some(work) => drop(worker.work.send(work)),
            None => drop(worker.go.send(go)),
        }
        match worker.said.recv() {
            Ok(Said::Waits(wake)) => {
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
            if self.turn(Go::On) {
                return Poll::Ready(());
            }
        }
    }
}

impl Drop for Coroutine {
    fn drop(&mut self) {
        if self.work.is_none() {
            while !self.turn(Go::End) {}
        }
    }
}

/// Bytes on their way to blocking work.
pub struct PipeSender(Arc<Pipe>);

/// Their other end.
pub struct PipeReader(Arc<Pipe>);

/// Parts that may wait in a pipe.
const PARTS_MAX: usize = 2;

#[derive(Default)]
struct Pipe {
    state: Mutex<PipeState>,
    taken: Notify,
}

#[derive(Default)]
struct PipeState {
    parts: VecDeque<Bytes>,
    closed: bool,
    abandoned: bool,
    reader: Option<Arc<Mutex<Wake>>>,
}

/// A pipe.
pub fn pipe() -> (PipeSender, PipeReader) {
    let pipe = Arc::new(Pipe::default());
    (PipeSender(Arc::clone(&pipe)), PipeReader(pipe))
}

impl Pipe {
    fn wake(&self) {
        if let Some(wake) = self.state.lock().reader.take() {
            Wake::wake(&wake);
        }
    }
}

impl PipeSender {
    /// Hands `part` over; `false` if nobody reads any more.
    pub async fn send(&self, part: Bytes) -> bool {
        loop {
            {
                let mut state = self.0.state.lock();
                if state.abandoned {
                    return false;
                }
                if state.parts.len() < PARTS_MAX {
                    state.parts.push_back(part);
                    break;
                }
            }
            self.0.taken.notified().await;
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
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        loop {
            let wake = {
                let mut state = self.0.state.lock();
                if let Some(part) = state.parts.front_mut() {
                    let taken = part.split_to(room.len().min(part.len()));
                    if part.is_empty() {
                        state.parts.pop_front();
                        self.0.taken.notify_one();
                    }
                    room[..taken.len()].copy_from_slice(&taken);
                    return Ok(taken.len());
                }
                if state.closed {
                    return Ok(0);
                }
                let wake = Arc::<Mutex<Wake>>::default();
                state.reader = Some(Arc::clone(&wake));
                wake
            };
            wait(&wake)?;
        }
    }
}

impl Drop for PipeReader {
    fn drop(&mut self) {
        self.0.state.lock().abandoned = true;
        self.0.taken.notify_one();
    }
}
