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
use std::task::{Context, Poll};
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

use super::connection::{CloseListener, CloseMode, ConnectionState};
use super::fast::{FastPath, FastRoute, PrefixedStream};
use super::host::Hosts;
use super::instrument::{HttpMetrics, Instrumented};

/// The largest request header in bytes; a larger one gets 431. So do more than 100 lines: that is
/// hyper's default, and with another limit hyper allocates for each request.
const HEADER_BYTES_MAX: usize = 32 * 1024;
/// How often deadlines are checked.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// At the limit, one of this many connections is evicted, the longest idle first. Finding those means
/// checking all connections, so more than one is evicted at once.
const EVICTED_SHARE: usize = 128;
/// After a response that closes the connection early, the listener reads and discards what the client
/// still sends, for so long in all and without a byte. Closing at once would reset the connection, and
/// the client could lose the response with the error.
const LINGER_MAX: Duration = Duration::from_secs(30);
const LINGER_SILENCE_MAX: Duration = Duration::from_secs(5);
/// The same while the node stops.
const LINGER_STOPPING_MAX: Duration = Duration::from_secs(2);
/// Bytes of a read of what is discarded.
const LINGER_READ_BYTES: usize = 16 * 1024;

/// The limits of one port.
#[derive(Debug, Clone, Copy)]
pub struct ListenerLimits {
    /// Open connections. At the limit, a new one evicts the longest idle ones; while none is idle, it
    /// waits to be accepted.
    pub connections_max: usize,
    /// The time from connecting to the end of the first request's header.
    pub header_wait_max: Duration,
    /// The time from one response to the next request's header.
    pub idle_max: Duration,
}

/// One port.
pub struct Listener {
    /// `read`, `write` or `ops`, in logs and metrics.
    pub name: &'static str,
    /// The listening socket.
    pub socket: TcpListener,
    /// The routes of the port.
    pub router: Router,
    /// The route whose requests the fast path answers.
    pub fast_route: Option<FastRoute>,
    /// The limits of the port.
    pub limits: ListenerLimits,
    /// The hosts that the port answers for.
    pub hosts: Hosts,
    /// The metrics of requests.
    pub metrics: Arc<HttpMetrics>,
    /// The metrics of connections.
    pub connection_metrics: ConnectionMetrics,
}

/// The metrics of one port's connections. Clones share them.
#[derive(Clone)]
pub struct ConnectionMetrics {
    open: Gauge,
    accepted: Counter,
    cut: Counter,
    counts: Arc<ConnectionCounts>,
}

/// The connections of one port, for the status of the node: a metric can't be read.
#[derive(Default)]
pub(super) struct ConnectionCounts {
    /// Open connections.
    pub(super) open: AtomicU64,
    /// Connections that the node has closed at a deadline or at the limit of connections.
    pub(super) cut: AtomicU64,
}

impl ConnectionMetrics {
    /// Registers the metrics of the port `name` with the current recorder.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        describe_gauge!("gradestore_http_connections", "Open connections, by port.");
        describe_counter!(
            "gradestore_http_connections_accepted_total",
            "Accepted connections, by port."
        );
        describe_counter!(
            "gradestore_http_connections_cut_total",
            "Connections closed by the node at a deadline or at the limit of connections, by port."
        );
        Self {
            open: gauge!("gradestore_http_connections", "port" => name),
            accepted: counter!("gradestore_http_connections_accepted_total", "port" => name),
            cut: counter!("gradestore_http_connections_cut_total", "port" => name),
            counts: Arc::default(),
        }
    }

    /// The counts of the port.
    pub(super) fn counts(&self) -> &ConnectionCounts {
        &self.counts
    }

    fn record_open(&self) {
        self.open.increment(1.0);
        self.accepted.increment(1);
        self.counts.open.fetch_add(1, Ordering::Relaxed);
    }

    fn record_closed(&self) {
        self.open.decrement(1.0);
        self.counts.open.fetch_sub(1, Ordering::Relaxed);
    }

    fn record_cut(&self) {
        self.cut.increment(1);
        self.counts.cut.fetch_add(1, Ordering::Relaxed);
    }
}

impl Listener {
    /// Serves until `drain` is cancelled, then finishes the running requests and returns.
    pub async fn serve(self, drain: CancellationToken) {
        let connections = Connections::new(self.limits, self.connection_metrics.clone());
        let path = self.fast_route.clone().map(|route| {
            Arc::new(FastPath {
                route,
                hosts: self.hosts.clone(),
                metrics: Arc::clone(&self.metrics),
            })
        });
        let tasks = TaskTracker::new();
        let mut sweep = tokio::time::interval(SWEEP_EVERY);
        {
            // Kept across iterations: it may hold a connection that waits for an eviction.
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
                        // Responses are written whole, so Nagle's algorithm would only delay them.
                        let _ = stream.set_nodelay(true);
                        let connection = connections.add();
                        let service = Instrumented {
                            router: self.router.clone(),
                            metrics: Arc::clone(&self.metrics),
                            connection: Arc::clone(&connection),
                            hosts: self.hosts.clone(),
                            failed: Cell::new(None),
                        };
                        let path = path.clone();
                        let connections = Arc::clone(&connections);
                        tasks.spawn(async move {
                            // Removes the connection at the end, also after a panic.
                            let _guard = ConnectionGuard(&connections, &connection);
                            serve_connection(stream, path, service, &connection).await;
                        });
                    }
                    Err(error) => {
                        // Most likely the process is out of file descriptors. Evicting connections
                        // helps; trying again at once does not.
                        tracing::warn!(port = self.name, %error, "cannot accept a connection");
                        connections.evict_idle();
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

    /// Accepts a connection. At the limit it evicts idle ones first. It does not evict in advance,
    /// because that would close the newest connection, which has not sent its request yet.
    async fn accept(&self, connections: &Connections) -> io::Result<(TcpStream, SocketAddr)> {
        let accepted = self.socket.accept().await?;
        while connections.full() {
            if connections.evict_idle() {
                // Lets the tasks of the evicted connections end.
                tokio::task::yield_now().await;
            } else {
                // None is idle; each request has a deadline.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        Ok(accepted)
    }
}

/// Serves a connection with the fast path and hyper, alternately.
async fn serve_connection(
    mut stream: TcpStream,
    path: Option<Arc<FastPath>>,
    mut service: Instrumented,
    connection: &ConnectionState,
) {
    let mut close = CloseListener::new(connection);
    let mut read = Vec::new();
    loop {
        if let Some(path) = &path {
            let handoff = {
                let mut fast = pin!(path.serve(read, &mut stream, connection));
                let handoff = poll_fn(|cx| match close.poll(cx) {
                    Poll::Ready(CloseMode::Abort) => Poll::Ready(None),
                    // The fast path checks itself whether to drain.
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
        match serve_hyper(read, stream, path.clone(), service, &mut close).await {
            Some(returned) => (read, stream, service) = returned,
            None => return,
        }
    }
}

/// Why hyper stopped serving a connection.
enum HyperOutcome {
    /// The connection ended.
    Closed,
    /// The listener closed it.
    Aborted,
    /// The fast path answers the next request.
    FastPath,
}

/// Serves with hyper, which reads `read` before the bytes of `stream`. Returns `None` once the
/// connection has ended, or the bytes already read if the fast path answers the next request.
async fn serve_hyper(
    read: Vec<u8>,
    stream: TcpStream,
    path: Option<Arc<FastPath>>,
    service: Instrumented,
    close: &mut CloseListener<'_>,
) -> Option<(Vec<u8>, TcpStream, Instrumented)> {
    let connection = Arc::clone(&service.connection);
    let mut to_be_read = !read.is_empty();
    let stream = PrefixedStream::new(read, stream, Arc::clone(&connection), path);
    let mut http = http1::Builder::new()
        .max_buf_size(2 * HEADER_BYTES_MAX)
        .max_header_size(HEADER_BYTES_MAX)
        // A client that has sent everything may still want the response.
        .half_close(true)
        // Most responses are short: copying the body behind the header costs less than `writev`.
        .writev(false)
        .serve_connection(stream, service);
    let (mut to_drain, mut draining) = (false, false);
    let outcome = poll_fn(|cx| {
        match close.poll(cx) {
            Poll::Ready(CloseMode::Abort) => return Poll::Ready(HyperOutcome::Aborted),
            Poll::Ready(CloseMode::Drain) => to_drain = true,
            Poll::Pending => {}
        }
        // An error of hyper concerns one client: it closed the connection, or violated the protocol and
        // got a response.
        loop {
            // hyper would close a connection from which it has read nothing.
            if to_drain && !draining && !to_be_read {
                draining = true;
                Pin::new(&mut http).graceful_shutdown();
            }
            let ended = http.poll_without_shutdown(cx).map(|_| HyperOutcome::Closed);
            if ended.is_pending() && connection.take_return() {
                return Poll::Ready(HyperOutcome::FastPath);
            }
            let again = to_drain && to_be_read;
            to_be_read = false;
            if ended.is_ready() || !again {
                return ended;
            }
        }
    });
    let outcome = outcome.await;
    let parts = match outcome {
        HyperOutcome::Aborted => return None,
        HyperOutcome::Closed | HyperOutcome::FastPath => http.into_parts(),
    };
    let (rest, mut stream) = parts.io.into_parts();
    if let HyperOutcome::Closed = outcome {
        connection.end();
        linger(&mut stream, &connection).await;
        return None;
    }
    let mut read = parts.read_buf.to_vec();
    read.extend_from_slice(&rest);
    Some((read, stream, parts.service))
}

/// Discards what the client still sends, within [`LINGER_MAX`] and [`LINGER_SILENCE_MAX`].
async fn linger(stream: &mut TcpStream, connection: &ConnectionState) {
    let discard = async {
        if stream.shutdown().await.is_err() {
            return;
        }
        let mut buffer = vec![0; LINGER_READ_BYTES];
        loop {
            let read = tokio::time::timeout(LINGER_SILENCE_MAX, stream.read(&mut buffer)).await;
            if matches!(read, Err(_) | Ok(Ok(0) | Err(_))) {
                return;
            }
        }
    };
    let closing = |cx: &mut Context<'_>| connection.poll_close(cx);
    let stopped = async {
        if let CloseMode::Drain = poll_fn(closing).await {
            let aborted = poll_fn(|cx| match closing(cx) {
                Poll::Ready(CloseMode::Abort) => Poll::Ready(()),
                _ => Poll::Pending,
            });
            let _ = tokio::time::timeout(LINGER_STOPPING_MAX, aborted).await;
        }
    };
    tokio::select! {
        () = discard => {}
        () = stopped => {}
        () = tokio::time::sleep(LINGER_MAX) => {}
    }
}

/// The open connections of one port.
struct Connections {
    limits: ListenerLimits,
    metrics: ConnectionMetrics,
    /// By id, so the oldest is first.
    open: Mutex<BTreeMap<u64, Arc<ConnectionState>>>,
    /// Connections in `open` that are aborted and have not ended yet.
    aborting: AtomicUsize,
    next_id: AtomicU64,
}

/// Removes a connection from the open ones when it is dropped.
struct ConnectionGuard<'a>(&'a Connections, &'a ConnectionState);

impl Drop for ConnectionGuard<'_> {
    fn drop(&mut self) {
        self.0.open.lock().remove(&self.1.id);
        // Once it is removed, nothing can abort it any more.
        if self.1.is_aborted() {
            self.0.aborting.fetch_sub(1, Ordering::Relaxed);
        }
        self.0.metrics.record_closed();
    }
}

impl Connections {
    fn new(limits: ListenerLimits, metrics: ConnectionMetrics) -> Arc<Self> {
        Arc::new(Self {
            limits,
            metrics,
            open: Mutex::default(),
            aborting: AtomicUsize::new(0),
            next_id: AtomicU64::new(0),
        })
    }

    fn add(&self) -> Arc<ConnectionState> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(ConnectionState::new(id));
        self.open.lock().insert(id, Arc::clone(&connection));
        self.metrics.record_open();
        connection
    }

    /// Whether the limit of connections is reached. Aborted ones do not count. Otherwise a burst of
    /// new connections would evict many more than necessary before the tasks of the old ones end.
    fn full(&self) -> bool {
        let open = self.open.lock().len();
        let aborting = self.aborting.load(Ordering::Relaxed);
        open.saturating_sub(aborting) >= self.limits.connections_max
    }

    /// Aborts the longest idle connections. Returns false if none is idle.
    fn evict_idle(&self) -> bool {
        let open = self.open.lock();
        let mut idle: Vec<_> = open
            .values()
            .filter(|connection| !connection.is_aborted() && !connection.is_streaming())
            .filter_map(|connection| Some((connection.idle()?, connection)))
            .collect();
        idle.sort_unstable_by_key(|(idle, _)| std::cmp::Reverse(*idle));
        idle.truncate((self.limits.connections_max / EVICTED_SHARE).max(1));
        for (_, connection) in &idle {
            self.abort(connection);
        }
        !idle.is_empty()
    }

    /// Aborts the connections whose deadline has passed.
    fn sweep(&self) {
        for connection in self.open.lock().values() {
            let wait_max = match connection.has_sent_request() {
                true => self.limits.idle_max,
                false => self.limits.header_wait_max,
            };
            if connection.idle().is_some_and(|idle| idle > wait_max) {
                self.abort(connection);
            }
        }
    }

    fn drain(&self) {
        for connection in self.open.lock().values() {
            connection.drain();
        }
    }

    /// Call this only while `open` is locked and contains `connection`.
    fn abort(&self, connection: &ConnectionState) {
        if !connection.is_aborted() {
            self.aborting.fetch_add(1, Ordering::Relaxed);
            self.metrics.record_cut();
            connection.abort();
        }
    }
}
