//! Accepts the connections of one port and bounds their cost.
//!
//! hyper speaks HTTP/1.1, and [`fast`](super::fast) a part of it. This module bounds the number of
//! connections, the time until the first request's header, the idle time, and the time to read the end
//! of the last response. It checks all connections once per second: a timer for each request would
//! cost more than the rest of this file.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connection::{Connection, Order, Orders};
use super::fast::{FastPath, FastRoute, Prefixed};
use super::instrument::{HttpMetrics, Instrumented};

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

/// One port: where it listens, what it answers and how it is bounded.
pub struct Listener {
    /// `read`, `write` or `ops`, in logs and metrics.
    pub name: &'static str,
    /// Listens already.
    pub socket: TcpListener,
    /// Answers.
    pub router: Router,
    /// Answers the requests of one route before hyper reads them.
    pub fast_route: Option<FastRoute>,
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
        let path = self.fast_route.clone().map(|route| {
            let metrics = Arc::clone(&self.metrics);
            Arc::new(FastPath { route, metrics })
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
                        let service = Instrumented {
                            router: self.router.clone(),
                            metrics: Arc::clone(&self.metrics),
                            connection: Arc::clone(&connection),
                            failed: Cell::new(None),
                        };
                        let path = path.clone();
                        let connections = Arc::clone(&connections);
                        tasks.spawn(async move {
                            // Removes it on every way out, a panic too.
                            let _place = Place(&connections, &connection);
                            serve_connection(stream, path, service, &connection).await;
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

/// Serves a connection: the fast path and hyper take turns.
async fn serve_connection(
    mut stream: TcpStream,
    path: Option<Arc<FastPath>>,
    mut service: Instrumented,
    connection: &Connection,
) {
    let mut orders = Orders::new(connection);
    let mut read = Vec::new();
    loop {
        if let Some(path) = &path {
            let handoff = {
                let mut fast = pin!(path.serve(read, &mut stream, connection));
                let handoff = poll_fn(|cx| match orders.poll(cx) {
                    Poll::Ready(Order::Cut) => Poll::Ready(None),
                    // It checks itself whether it has to drain.
                    _ => fast.as_mut().poll(cx).map(Some),
                });
                handoff.await
            };
            match handoff {
                None => return,
                Some(Ok(Some(handoff))) => {
                    read = handoff.bytes;
                    service.failed.set(handoff.failed);
                }
                Some(Ok(None) | Err(_)) => return linger(&mut stream, connection).await,
            }
        }
        match serve_hyper(read, stream, path.clone(), service, &mut orders).await {
            Some(returned) => (read, stream, service) = returned,
            None => return,
        }
    }
}

/// The end of hyper's turn.
enum Turn {
    /// The connection ended.
    Ended,
    /// It was cut.
    Cut,
    /// The fast path answers the next request.
    Returns,
}

/// Serves with hyper, which reads `read` before the bytes of `stream`, until the connection ends or the
/// fast path answers its next request: then with the bytes that were read.
async fn serve_hyper(
    read: Vec<u8>,
    stream: TcpStream,
    path: Option<Arc<FastPath>>,
    service: Instrumented,
    orders: &mut Orders<'_>,
) -> Option<(Vec<u8>, TcpStream, Instrumented)> {
    let connection = Arc::clone(&service.connection);
    let mut to_be_read = !read.is_empty();
    let stream = Prefixed::new(read, stream, Arc::clone(&connection), path);
    let mut http = http1::Builder::new()
        .max_buf_size(2 * HEADER_BYTES_MAX)
        .max_header_size(HEADER_BYTES_MAX)
        // A client that has sent everything may still want the response.
        .half_close(true)
        // Most responses are short: to copy one behind its header costs less than to send it in parts.
        .writev(false)
        .serve_connection(stream, service);
    let (mut to_drain, mut draining) = (false, false);
    let turn = poll_fn(|cx| {
        match orders.poll(cx) {
            Poll::Ready(Order::Cut) => return Poll::Ready(Turn::Cut),
            Poll::Ready(Order::Drain) => to_drain = true,
            Poll::Pending => {}
        }
        // An error of hyper's is about one client: it hung up, or broke the protocol and was answered.
        loop {
            // hyper would end a connection of which it has read nothing.
            if to_drain && !draining && !to_be_read {
                draining = true;
                Pin::new(&mut http).graceful_shutdown();
            }
            let ended = http.poll_without_shutdown(cx).map(|_| Turn::Ended);
            if ended.is_pending() && connection.takes_return() {
                return Poll::Ready(Turn::Returns);
            }
            let again = to_drain && to_be_read;
            to_be_read = false;
            if ended.is_ready() || !again {
                return ended;
            }
        }
    });
    let turn = turn.await;
    let parts = match turn {
        Turn::Cut => return None,
        Turn::Ended | Turn::Returns => http.into_parts(),
    };
    let (rest, mut stream) = parts.io.into_parts();
    if let Turn::Ended = turn {
        connection.end();
        linger(&mut stream, &connection).await;
        return None;
    }
    let mut read = parts.read_buf.to_vec();
    read.extend_from_slice(&rest);
    Some((read, stream, parts.service))
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
        if self.1.is_cut() {
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
            .filter(|connection| !connection.is_cut() && !connection.is_streaming())
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
            let wait_max = match connection.is_greeted() {
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
            connection.order_drain();
        }
    }

    /// Only while `open` is locked and has `connection`.
    fn cut(&self, connection: &Connection) {
        if !connection.is_cut() {
            self.leaving.fetch_add(1, Ordering::Relaxed);
            self.metrics.cut.increment(1);
            connection.order_cut();
        }
    }
}
