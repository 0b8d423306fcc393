//! One open connection, as its task and its port see it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;

/// What the port tells a connection's task to do.
pub(super) enum Order {
    /// Finish the request, then close.
    Drain,
    /// Close now.
    Cut,
}

/// The orders of a connection, for its task.
pub(super) struct Orders<'a> {
    connection: &'a Connection,
    /// The waker for the next one.
    registered: Waker,
}

impl<'a> Orders<'a> {
    pub(super) fn new(connection: &'a Connection) -> Self {
        let registered = Waker::noop().clone();
        Self {
            connection,
            registered,
        }
    }

    /// The last order.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Order> {
        // Registering writes to memory that others read. It is rarely needed: only an order takes the
        // waker out.
        if !self.connection.has_order() && self.registered.will_wake(cx.waker()) {
            return Poll::Pending;
        }
        self.registered.clone_from(cx.waker());
        self.connection.poll_order(cx)
    }
}

/// One open connection.
pub(super) struct Connection {
    pub(super) id: u64,
    opened: Instant,
    /// Milliseconds since `opened` at which it last became idle; [`BUSY`] while a request runs.
    idle_since_ms: AtomicU64,
    /// Whether a request's header has come whole, ever.
    greeted: AtomicBool,
    /// Whether it is being sent a long answer: then it is not cut to make room.
    streaming: AtomicBool,
    drain: AtomicBool,
    cut: AtomicBool,
    task: AtomicWaker,
    exchange: Exchange,
}

/// The current or last exchange with hyper: it has ended once all is `true`. Used by the connection's
/// task alone.
#[derive(Default)]
struct Exchange {
    /// The whole request was read.
    request_read: AtomicBool,
    /// hyper has taken the whole response.
    response_taken: AtomicBool,
    /// hyper has written all that it took.
    flushed: AtomicBool,
    /// The fast path answers the next request.
    returns: AtomicBool,
}

const BUSY: u64 = u64::MAX;

impl Connection {
    pub(super) fn new(id: u64) -> Self {
        Self {
            id,
            opened: Instant::now(),
            idle_since_ms: AtomicU64::new(0),
            greeted: AtomicBool::new(false),
            streaming: AtomicBool::new(false),
            drain: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            task: AtomicWaker::new(),
            exchange: Exchange::default(),
        }
    }

    /// A request begins.
    pub(super) fn begin(&self) {
        self.greeted.store(true, Ordering::Relaxed);
        self.idle_since_ms.store(BUSY, Ordering::Relaxed);
    }

    /// A request has been answered, or another part of a long answer has been taken.
    pub(super) fn end(&self) {
        self.end_at(Instant::now());
    }

    /// The same, for who knows what time it is.
    pub(super) fn end_at(&self, now: Instant) {
        let since_ms = now.saturating_duration_since(self.opened).as_millis() as u64;
        self.idle_since_ms.store(since_ms, Ordering::Relaxed);
    }

    /// A long answer begins or ends; between its parts the connection counts as idle, for the
    /// deadline alone.
    pub(super) fn stream(&self, streaming: bool) {
        self.streaming.store(streaming, Ordering::Relaxed);
    }

    /// Whether the connection closes after the current response.
    pub(super) fn drains(&self) -> bool {
        self.drain.load(Ordering::Acquire)
    }

    /// For how long nothing has run; `None` while something does.
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

    /// Whether it was ever told to do something.
    fn has_order(&self) -> bool {
        self.drain.load(Ordering::Acquire) || self.cut.load(Ordering::Acquire)
    }

    pub(super) fn poll_order(&self, cx: &mut Context<'_>) -> Poll<Order> {
        self.task.register(cx.waker());
        if self.cut.load(Ordering::Acquire) {
            return Poll::Ready(Order::Cut);
        }
        match self.drain.load(Ordering::Acquire) {
            true => Poll::Ready(Order::Drain),
            false => Poll::Pending,
        }
    }

    /// Orders the task to finish the request and then to close.
    pub(super) fn order_drain(&self) {
        self.drain.store(true, Ordering::Release);
        self.task.wake();
    }

    /// Orders the task to close now.
    pub(super) fn order_cut(&self) {
        self.cut.store(true, Ordering::Release);
        self.task.wake();
    }

    /// Whether it was ordered to close now.
    pub(super) fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    /// Whether it is being sent a long response.
    pub(super) fn is_streaming(&self) -> bool {
        self.streaming.load(Ordering::Relaxed)
    }

    /// Whether a request's header was ever complete.
    pub(super) fn is_greeted(&self) -> bool {
        self.greeted.load(Ordering::Relaxed)
    }

    /// An exchange with hyper begins; `request_read` says whether the request has no body.
    pub(super) fn exchange_begins(&self, request_read: bool) {
        self.exchange
            .request_read
            .store(request_read, Ordering::Relaxed);
        self.exchange.response_taken.store(false, Ordering::Relaxed);
    }

    /// The request's body was read to its end.
    pub(super) fn request_read(&self) {
        self.exchange.request_read.store(true, Ordering::Relaxed);
    }

    /// hyper has taken the whole response.
    pub(super) fn response_taken(&self) {
        self.exchange.flushed.store(false, Ordering::Relaxed);
        self.exchange.response_taken.store(true, Ordering::Relaxed);
    }

    /// hyper has written all that it took.
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
        ended.iter().all(|done| done.load(Ordering::Relaxed)) && !self.drains()
    }

    /// The fast path answers the next request.
    pub(super) fn return_to_fast_path(&self) {
        self.exchange.returns.store(true, Ordering::Relaxed);
    }

    /// Whether that was said since the last call.
    pub(super) fn takes_return(&self) -> bool {
        let returns = self.exchange.returns.swap(false, Ordering::Relaxed);
        if returns {
            self.exchange.response_taken.store(false, Ordering::Relaxed);
        }
        returns
    }
}
