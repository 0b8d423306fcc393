//! Accepts the connections of one port and bounds their cost.
//!
//! hyper speaks HTTP/1.1, and [`fast`] a part of it. This module bounds the number of connections, the
//! time until the first request's header, the idle time, and the time to read the end of the last
//! response. It checks all connections once per second: a timer for each request would cost more than
//! the rest of this file.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use axum::Router;
use futures_util::future::BoxFuture;
use futures_util::task::AtomicWaker;
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::answer::Answer;
use super::fast::{self, Ours, Plain, Rewound};
use super::instrument::{HttpMetrics, Observed};

/// The most header bytes of a request; more is answered with 431. So are more than 100 lines, which
/// is hyper's own bound: with another it would allocate for each request.
const HEADER_BYTES_MAX: usize = 32 * 1024;
/// How often deadlines are looked at.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// Of how many places one is freed when all are taken, those idle longest first: to look for the
/// idlest means to look at all of them.
const PLACES_A_CUT: usize = 128;
/// After an answer that ends the connection early, what the client still sends is read and thrown
/// away for this long and this far. Closing at once would reset the connection, and the client
/// would lose the answer that says what it did wrong.
const LINGER_MAX: Duration = Duration::from_secs(2);
const LINGER_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The bounds of one port.
#[derive(Debug, Clone, Copy)]
pub struct ListenerLimits {
    /// Connections open at once. One more takes the place of the one that has been idle longest;
    /// while all are at work it waits to be accepted.
    pub connections_max: usize,
    /// From connecting to the end of the first request's header.
    pub header_wait_max: Duration,
    /// From one answer to the next request's header.
    pub idle_max: Duration,
}

/// A way past the router for a port's one hot route.
pub type Direct = Arc<dyn Fn(Request<Incoming>) -> Directly + Send + Sync>;

/// What becomes of a request on that way.
pub enum Directly {
    /// The answer.
    Now(Answer),
    /// The answer, once something has happened.
    Later(BoxFuture<'static, Answer>),
    /// It is the router's.
    Router(Request<Incoming>),
}

/// One port: where it listens, what it answers and how it is bounded.
pub struct Listener {
    /// `read`, `write` or `ops`, in logs and metrics.
    pub name: &'static str,
    /// Listens already.
    pub socket: TcpListener,
    /// Answers.
    pub router: Router,
    /// Answers at once what needs no waiting, past the router; `None` leaves it to that.
    pub direct: Option<Direct>,
    /// What is answered past hyper as well; `None` leaves all to that.
    pub plain: Option<Plain>,
    /// Bounds.
    pub limits: ListenerLimits,
    /// Handles for what is measured about requests.
    pub metrics: Arc<HttpMetrics>,
    /// Handles for what is measured about connections.
    pub connection_metrics: ConnectionMetrics,
}

/// Handles of what is measured about one port's connections, made once.
#[derive(Clone)]
pub struct ConnectionMetrics {
    open: Gauge,
    accepted: Counter,
    cut: Counter,
}

impl ConnectionMetrics {
    /// Registers the handles of the port `name` with the current recorder.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        describe_gauge!("gradestore_http_connections", "Open connections, by port.");
        describe_counter!(
            "gradestore_http_connections_accepted_total",
            "Connections accepted, by port."
        );
        describe_counter!(
            "gradestore_http_connections_cut_total",
            "Connections closed for a deadline or to make room, by port."
        );
        Self {
            open: gauge!("gradestore_http_connections", "port" => name),
            accepted: counter!("gradestore_http_connections_accepted_total", "port" => name),
            cut: counter!("gradestore_http_connections_cut_total", "port" => name),
        }
    }
}

impl Listener {
    /// Serves until `drain` is cancelled, then finishes what runs and returns.
    pub async fn serve(self, drain: CancellationToken) {
        let connections = Connections::new(self.limits, self.connection_metrics.clone());
        let ours = self.plain.clone().map(|plain| {
            let metrics = Arc::clone(&self.metrics);
            Arc::new(Ours { plain, metrics })
        });
        let tasks = TaskTracker::new();
        let mut sweep = tokio::time::interval(SWEEP_EVERY);
        {
            // Kept from turn to turn: it may hold a connection that waits for a place.
            let mut accepting = pin!(self.accept(&connections));
            loop {
                let accepted = tokio::select! {
                    accepted = &mut accepting => accepted,
                    _ = sweep.tick() => {
                        connections.sweep();
                        continue;
                    }
                    () = drain.cancelled() => break,
                };
                accepting.set(self.accept(&connections));
                match accepted {
                    Ok((stream, _peer)) => {
                        // Answers are written whole: waiting to send more at once only delays them.
                        let _ = stream.set_nodelay(true);
                        let connection = connections.add();
                        let service = Observed {
                            router: self.router.clone(),
                            direct: self.direct.clone(),
                            metrics: Arc::clone(&self.metrics),
                            connection: Arc::clone(&connection),
                            failed: Cell::new(None),
                        };
                        let ours = ours.clone();
                        let connections = Arc::clone(&connections);
                        tasks.spawn(async move {
                            // Removes it on every way out, a panic too.
                            let _place = Place(&connections, &connection);
                            serve_connection(stream, ours.as_deref(), service, &connection).await;
                        });
                    }
                    Err(error) => {
                        // Out of file descriptors, most likely: making room may end it, trying again
                        // at once won't.
                        tracing::warn!(port = self.name, %error, "accept failed");
                        connections.make_room();
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                }
            }
        }
        drop(self.socket);
        connections.drain();
        tasks.close();
        let mut ended = pin!(tasks.wait());
        loop {
            tokio::select! {
                () = &mut ended => break,
                _ = sweep.tick() => connections.sweep(),
            }
        }
    }

    /// The next connection that has a place. Room is made when there is someone to take it and not
    /// before, or the newest one, which has not sent its request yet, would be cut for it.
    async fn accept(&self, connections: &Connections) -> io::Result<(TcpStream, SocketAddr)> {
        let accepted = self.socket.accept().await?;
        while connections.full() {
            if connections.make_room() {
                // Lets those that were cut go.
                tokio::task::yield_now().await;
            } else {
                // All are at work; each has a deadline.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        Ok(accepted)
    }
}

/// Serves plain requests first, and leaves the rest to hyper.
async fn serve_connection(
    mut stream: TcpStream,
    ours: Option<&Ours>,
    service: Observed,
    connection: &Connection,
) {
    let mut orders = Orders::new(connection);
    let mut read = Vec::new();
    if let Some(ours) = ours {
        let left = {
            let mut plain = pin!(fast::serve(&mut stream, ours, connection));
            let left = poll_fn(|cx| match orders.poll(cx) {
                Poll::Ready(Order::Cut) => Poll::Ready(None),
                // It looks for itself whether it is to drain.
                _ => plain.as_mut().poll(cx).map(Some),
            });
            left.await
        };
        match left {
            None => return,
            Some(Ok(Some(handover))) => {
                read = handover.bytes;
                service.failed.set(handover.failed);
            }
            Some(Ok(None) | Err(_)) => {
                linger(&mut stream, connection).await;
                return;
            }
        }
    }
    serve_hyper(read, stream, service, orders).await;
}

/// Serves with hyper, to which `read` comes before what `stream` gives.
async fn serve_hyper(read: Vec<u8>, stream: TcpStream, service: Observed, mut orders: Orders<'_>) {
    let mut to_be_read = !read.is_empty();
    let mut http = http1::Builder::new()
        .max_buf_size(2 * HEADER_BYTES_MAX)
        .max_header_size(HEADER_BYTES_MAX)
        // A client that has said all it has to may still want the answer.
        .half_close(true)
        // Most answers are short: to copy one behind its header costs less than to send it in parts.
        .writev(false)
        .serve_connection(Rewound::new(read, stream), service);
    let (mut to_drain, mut draining) = (false, false);
    let served = poll_fn(|cx| {
        match orders.poll(cx) {
            Poll::Ready(Order::Cut) => return Poll::Ready(false),
            Poll::Ready(Order::Drain) => to_drain = true,
            Poll::Pending => {}
        }
        // What hyper says here is about one client: it hung up, or broke the protocol and was
        // answered.
        loop {
            // hyper would end a connection of which it has read nothing.
            if to_drain && !draining && !to_be_read {
                draining = true;
                Pin::new(&mut http).graceful_shutdown();
            }
            let ended = http.poll_without_shutdown(cx).map(|_| true);
            let again = to_drain && to_be_read;
            to_be_read = false;
            if ended.is_ready() || !again {
                return ended;
            }
        }
    });
    if served.await {
        let connection = orders.connection;
        connection.end();
        let mut stream = http.into_parts().io.into_inner();
        linger(&mut stream, connection).await;
    }
}

async fn linger(stream: &mut TcpStream, connection: &Connection) {
    let discard = async {
        if stream.shutdown().await.is_err() {
            return;
        }
        let mut room = [0; 4096];
        let mut discarded = 0;
        while discarded < LINGER_BYTES_MAX {
            match stream.read(&mut room).await {
                Ok(0) | Err(_) => return,
                Ok(bytes) => discarded += bytes,
            }
        }
    };
    let cut = poll_fn(|cx| match connection.poll_order(cx) {
        Poll::Ready(Order::Cut) => Poll::Ready(()),
        _ => Poll::Pending,
    });
    tokio::select! {
        () = discard => {}
        () = cut => {}
        () = tokio::time::sleep(LINGER_MAX) => {}
    }
}

/// What the port tells a connection's task to do.
enum Order {
    /// Finish the request, then close.
    Drain,
    /// Close now.
    Cut,
}

/// What a connection's task is told.
struct Orders<'a> {
    connection: &'a Connection,
    /// Who is woken by the next one.
    registered: Waker,
}

impl<'a> Orders<'a> {
    fn new(connection: &'a Connection) -> Self {
        let registered = Waker::noop().clone();
        Self {
            connection,
            registered,
        }
    }

    /// What it was told last.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Order> {
        // Registering writes to what others read, and is rarely needed: only an order takes the waker out.
        if !self.connection.has_order() && self.registered.will_wake(cx.waker()) {
            return Poll::Pending;
        }
        self.registered.clone_from(cx.waker());
        self.connection.poll_order(cx)
    }
}

/// One open connection, as its task and the port both see it.
pub(super) struct Connection {
    id: u64,
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
}

const BUSY: u64 = u64::MAX;

impl Connection {
    fn new(id: u64) -> Self {
        Self {
            id,
            opened: Instant::now(),
            idle_since_ms: AtomicU64::new(0),
            greeted: AtomicBool::new(false),
            streaming: AtomicBool::new(false),
            drain: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            task: AtomicWaker::new(),
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

    /// Whether it is told to end once what runs has been answered.
    pub(super) fn drains(&self) -> bool {
        self.drain.load(Ordering::Acquire)
    }

    /// For how long nothing has run; `None` while something does.
    fn idle(&self) -> Option<Duration> {
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

    fn poll_order(&self, cx: &mut Context<'_>) -> Poll<Order> {
        self.task.register(cx.waker());
        if self.cut.load(Ordering::Acquire) {
            return Poll::Ready(Order::Cut);
        }
        match self.drain.load(Ordering::Acquire) {
            true => Poll::Ready(Order::Drain),
            false => Poll::Pending,
        }
    }

    fn order(&self, flag: &AtomicBool) {
        flag.store(true, Ordering::Release);
        self.task.wake();
    }
}

/// The open connections of one port.
struct Connections {
    limits: ListenerLimits,
    metrics: ConnectionMetrics,
    /// By id, so oldest first.
    open: Mutex<BTreeMap<u64, Arc<Connection>>>,
    /// How many of them have been told to close and did not yet.
    leaving: AtomicUsize,
    next_id: AtomicU64,
}

/// A connection's place among the open ones.
struct Place<'a>(&'a Connections, &'a Connection);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.open.lock().remove(&self.1.id);
        // From here on nobody can cut it any more.
        if self.1.cut.load(Ordering::Acquire) {
            self.0.leaving.fetch_sub(1, Ordering::Relaxed);
        }
        self.0.metrics.open.decrement(1.0);
    }
}

impl Connections {
    fn new(limits: ListenerLimits, metrics: ConnectionMetrics) -> Arc<Self> {
        Arc::new(Self {
            limits,
            metrics,
            open: Mutex::default(),
            leaving: AtomicUsize::new(0),
            next_id: AtomicU64::new(0),
        })
    }

    fn add(&self) -> Arc<Connection> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection::new(id));
        self.open.lock().insert(id, Arc::clone(&connection));
        self.metrics.open.increment(1.0);
        self.metrics.accepted.increment(1);
        connection
    }

    /// Whether all places are taken. One that is being given up is free: else a burst of new
    /// connections, quicker than the old ones' tasks, would cut many times what it needs.
    fn full(&self) -> bool {
        let open = self.open.lock().len();
        let leaving = self.leaving.load(Ordering::Relaxed);
        open.saturating_sub(leaving) >= self.limits.connections_max
    }

    /// Cuts the connections that are idle longest; says whether there was one. Their places are
    /// free once their tasks have run.
    fn make_room(&self) -> bool {
        let open = self.open.lock();
        let mut idle: Vec<_> = open
            .values()
            .filter(|connection| !connection.cut.load(Ordering::Relaxed))
            .filter(|connection| !connection.streaming.load(Ordering::Relaxed))
            .filter_map(|connection| Some((connection.idle()?, connection)))
            .collect();
        idle.sort_unstable_by_key(|(idle, _)| std::cmp::Reverse(*idle));
        idle.truncate((self.limits.connections_max / PLACES_A_CUT).max(1));
        for (_, connection) in &idle {
            self.cut(connection);
        }
        !idle.is_empty()
    }

    /// Cuts the connections whose deadline has passed.
    fn sweep(&self) {
        for connection in self.open.lock().values() {
            let wait_max = match connection.greeted.load(Ordering::Relaxed) {
                true => self.limits.idle_max,
                false => self.limits.header_wait_max,
            };
            if connection.idle().is_some_and(|idle| idle > wait_max) {
                self.cut(connection);
            }
        }
    }

    fn drain(&self) {
        for connection in self.open.lock().values() {
            connection.order(&connection.drain);
        }
    }

    /// Only while `open` is locked and has `connection`.
    fn cut(&self, connection: &Connection) {
        if !connection.cut.load(Ordering::Relaxed) {
            self.leaving.fetch_add(1, Ordering::Relaxed);
            self.metrics.cut.increment(1);
            connection.order(&connection.cut);
        }
    }
}
