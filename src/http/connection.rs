//! The state of one open connection, shared by its task and the listener.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use super::unread_body::UnreadBody;

/// How the listener asks a connection's task to close.
pub(super) enum CloseMode {
    /// Finish the request, then close.
    Drain,
    /// Close now.
    Abort,
}

/// Waits for the listener to close a connection. One per connection task.
pub(super) struct CloseListener<'a> {
    connection: &'a ConnectionState,
    /// The waker that `connection` has.
    registered: Waker,
}

impl<'a> CloseListener<'a> {
    pub(super) fn new(connection: &'a ConnectionState) -> Self {
        let registered = Waker::noop().clone();
        Self {
            connection,
            registered,
        }
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<CloseMode> {
        // Registering writes to memory that other threads read. It is rarely necessary: only closing
        // takes the waker out.
        if !self.connection.is_closing() && self.registered.will_wake(cx.waker()) {
            return Poll::Pending;
        }
        self.registered.clone_from(cx.waker());
        self.connection.poll_close(cx)
    }
}

/// The state of one open connection.
pub(super) struct ConnectionState {
    pub(super) id: u64,
    opened: Instant,
    /// Milliseconds since `opened` at which it last became idle; [`BUSY`] while a request runs.
    idle_since_ms: AtomicU64,
    /// Whether the header of a first request is complete.
    has_sent_request: AtomicBool,
    /// Whether it receives a streamed response. Then it is not evicted.
    streaming: AtomicBool,
    drain: AtomicBool,
    abort: AtomicBool,
    task: AtomicWaker,
    exchange: Exchange,
}

/// The current or last request and response handled by hyper; it has ended once all are `true`. Only
/// the connection's task uses it.
#[derive(Default)]
struct Exchange {
    /// The request's body was read to its end.
    request_read: AtomicBool,
    /// hyper has taken the whole response.
    response_taken: AtomicBool,
    /// hyper has written all that it took.
    flushed: AtomicBool,
    /// The fast path answers the next request.
    returns: AtomicBool,
    /// The rest of the request's body, if its handler did not read it.
    unread: Mutex<Option<UnreadBody>>,
}

const BUSY: u64 = u64::MAX;

impl ConnectionState {
    pub(super) fn new(id: u64) -> Self {
        Self {
            id,
            opened: Instant::now(),
            idle_since_ms: AtomicU64::new(0),
            has_sent_request: AtomicBool::new(false),
            streaming: AtomicBool::new(false),
            drain: AtomicBool::new(false),
            abort: AtomicBool::new(false),
            task: AtomicWaker::new(),
            exchange: Exchange::default(),
        }
    }

    /// Marks the connection as busy with a request.
    pub(super) fn begin(&self) {
        self.has_sent_request.store(true, Ordering::Relaxed);
        self.idle_since_ms.store(BUSY, Ordering::Relaxed);
    }

    /// Marks the connection as idle from now on: after a response, or after a chunk of a streamed one.
    pub(super) fn end(&self) {
        self.end_at(Instant::now());
    }

    /// [`end`](Self::end) for a caller that has read the clock.
    pub(super) fn end_at(&self, now: Instant) {
        let since_ms = now.saturating_duration_since(self.opened).as_millis() as u64;
        self.idle_since_ms.store(since_ms, Ordering::Relaxed);
    }

    /// Marks the beginning or end of a streamed response. Between its chunks the connection is idle
    /// for its deadline only.
    pub(super) fn stream(&self, streaming: bool) {
        self.streaming.store(streaming, Ordering::Relaxed);
    }

    /// Whether the connection closes after the current response.
    pub(super) fn is_draining(&self) -> bool {
        self.drain.load(Ordering::Acquire)
    }

    /// How long the connection has been idle; `None` while a request runs.
    pub(super) fn idle(&self) -> Option<Duration> {
        match self.idle_since_ms.load(Ordering::Relaxed) {
            BUSY => None,
            since_ms => Some(
                self.opened
                    .elapsed()
                    .saturating_sub(Duration::from_millis(since_ms)),
            ),
        }
    }

    fn is_closing(&self) -> bool {
        self.drain.load(Ordering::Acquire) || self.abort.load(Ordering::Acquire)
    }

    pub(super) fn poll_close(&self, cx: &mut Context<'_>) -> Poll<CloseMode> {
        self.task.register(cx.waker());
        if self.abort.load(Ordering::Acquire) {
            return Poll::Ready(CloseMode::Abort);
        }
        match self.drain.load(Ordering::Acquire) {
            true => Poll::Ready(CloseMode::Drain),
            false => Poll::Pending,
        }
    }

    /// Asks the task to finish the request and then to close.
    pub(super) fn drain(&self) {
        self.drain.store(true, Ordering::Release);
        self.task.wake();
    }

    /// Asks the task to close now.
    pub(super) fn abort(&self) {
        self.abort.store(true, Ordering::Release);
        self.task.wake();
    }

    pub(super) fn is_aborted(&self) -> bool {
        self.abort.load(Ordering::Acquire)
    }

    pub(super) fn is_streaming(&self) -> bool {
        self.streaming.load(Ordering::Relaxed)
    }

    /// Whether the header of a first request is complete.
    pub(super) fn has_sent_request(&self) -> bool {
        self.has_sent_request.load(Ordering::Relaxed)
    }

    /// Marks the beginning of an exchange with hyper. `request_read` is true if the request has no
    /// body.
    pub(super) fn exchange_begins(&self, request_read: bool) {
        self.exchange
            .request_read
            .store(request_read, Ordering::Relaxed);
        self.exchange.response_taken.store(false, Ordering::Relaxed);
    }

    /// Marks the request's body as read to its end.
    pub(super) fn request_read(&self) {
        self.exchange.request_read.store(true, Ordering::Relaxed);
    }

    /// Keeps the rest of the request's body, which its handler did not read.
    pub(super) fn leave_unread(&self, rest: UnreadBody) {
        *self.exchange.unread.lock() = Some(rest);
    }

    /// The rest of the request's body, if its handler did not read it.
    pub(super) fn take_unread(&self) -> Option<UnreadBody> {
        self.exchange.unread.lock().take()
    }

    /// Marks the whole response as taken by hyper.
    pub(super) fn response_taken(&self) {
        self.exchange.flushed.store(false, Ordering::Relaxed);
        self.exchange.response_taken.store(true, Ordering::Relaxed);
    }

    /// Marks all that hyper took as written.
    pub(super) fn flushed(&self) {
        self.exchange.flushed.store(true, Ordering::Relaxed);
    }

    /// Whether hyper has finished an exchange and has not started another one.
    pub(super) fn is_between_exchanges(&self) -> bool {
        let Exchange {
            request_read,
            response_taken,
            flushed,
            ..
        } = &self.exchange;
        let ended = [request_read, response_taken, flushed];
        ended.iter().all(|done| done.load(Ordering::Relaxed)) && !self.is_draining()
    }

    /// Leaves the next request to the fast path.
    pub(super) fn return_to_fast_path(&self) {
        self.exchange.returns.store(true, Ordering::Relaxed);
    }

    /// Whether [`return_to_fast_path`](Self::return_to_fast_path) was called since the last call.
    pub(super) fn take_return(&self) -> bool {
        let returns = self.exchange.returns.swap(false, Ordering::Relaxed);
        if returns {
            self.exchange.response_taken.store(false, Ordering::Relaxed);
        }
        returns
    }
}
