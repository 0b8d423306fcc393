//! The ops port: health checks, metrics, status, the status page and the OpenAPI document.

mod format;
mod openapi;
mod page;
pub mod status;
pub mod traffic;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get};
use axum::{Json, Router};
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use parking_lot::Mutex;

use crate::http::HttpMetrics;
use crate::http::error::ApiError;
use crate::http::health::{check_writable, readyz};
use crate::http::listener::ConnectionMetrics;
use crate::http::ops::openapi::OpenApi;
use crate::http::ops::page::StatusPage;
use crate::http::ops::status::NodeStatus;
use crate::http::ops::traffic::RecentTraffic;
use crate::log::{Log, RandomId, Seq, now_ns};
use crate::replication::memory::MemoryGuard;
use crate::replication::state::{NodeState, Readiness, Unready};
use crate::replication::{AppliedIndex, LastSnapshot, Peers, RestoreTracker, Writer};
use crate::store::Store;
use crate::sys::exec::Blocking;
use crate::sys::host::{DiskSpace, disk_space, memory_limit};
use crate::telemetry::Telemetry;

/// How long the file system of the data directory may take to report its space.
const DISK_SPACE_WAIT_MAX: Duration = Duration::from_secs(1);

/// The state of the ops port.
#[derive(Clone)]
pub struct OpsState {
    /// The id of this process.
    pub node: Arc<str>,
    /// The id of the replica.
    pub replica: RandomId,
    /// The records.
    pub store: Store,
    /// The position of the records.
    pub applied: AppliedIndex,
    /// The log that the replica applies.
    pub log: Arc<dyn Log>,
    /// The write queue.
    pub writer: Writer,
    /// Whether the replica serves requests.
    pub readiness: Readiness,
    /// The metrics of the node.
    pub telemetry: Arc<Telemetry>,
    /// The metrics of requests.
    pub http_metrics: Arc<HttpMetrics>,
    /// The recent requests of the read and write port.
    pub traffic: RecentTraffic,
    /// The current or last restore.
    pub restore: RestoreTracker,
    /// Whether writes may create records.
    pub memory: MemoryGuard,
    /// The data directory, absolute; `None` for an ephemeral node.
    pub data_dir: Option<Arc<Path>>,
    /// The ports.
    pub ports: Arc<[Port]>,
    /// The last snapshot.
    pub last_snapshot: LastSnapshot,
    /// The other replicas.
    pub peers: Peers,
    /// Threads for blocking system calls.
    pub blocking: Blocking,
}

/// One of the ports.
pub struct Port {
    /// `write`, `read` or `ops`.
    pub name: &'static str,
    /// The address that it listens on.
    pub address: SocketAddr,
    /// The limit of open connections.
    pub connections_max: usize,
    /// Its connections.
    pub metrics: ConnectionMetrics,
}

impl OpsState {
    /// The age of the last applied batch in seconds, or 0 if it is the last one of the log.
    pub(super) fn lag_s(&self, log_end: Seq) -> f64 {
        let position = self.applied.position();
        let lag_ns = match log_end > position.seq {
            true => now_ns().saturating_sub(position.time_ns),
            false => 0,
        };
        lag_ns as f64 / 1e9
    }
}

/// The port's routes.
pub fn routes(state: OpsState) -> Router {
    let get_only = |handler: MethodRouter<OpsState>| {
        handler.fallback(|| async { ApiError::MethodNotAllowed("GET, HEAD") })
    };
    let openapi = OpenApi::new();
    let (readiness, for_writes) = (state.readiness.clone(), state.readiness.clone());
    let log = Arc::clone(&state.log);
    Router::new()
        .route("/", get_only(get(status_page)))
        .route("/livez", get_only(get(livez)))
        .route("/readyz", readyz(move || readiness.check()))
        .route(
            "/readyz/write",
            readyz(move || check_writable(&for_writes, &*log)),
        )
        .route("/metrics", get_only(get(metrics)))
        .route("/status", get_only(get(status)))
        .route(
            "/openapi.json",
            get_only(get(move || async { openapi.into_response() })),
        )
        .fallback(|| async {
            ApiError::RouteUnknown(
                "/, /livez, /readyz, /readyz/write, /metrics, /status, /openapi.json",
            )
        })
        .with_state(state)
}

/// Why a node that opens its log is not ready yet. Clones share the reason.
#[derive(Clone)]
pub struct StartupProgress(Arc<Mutex<Arc<str>>>);

impl Default for StartupProgress {
    fn default() -> Self {
        Self(Arc::new(Mutex::new("opening the log".into())))
    }
}

impl StartupProgress {
    /// Sets the reason.
    pub fn set(&self, reason: &str) {
        *self.0.lock() = reason.into();
    }

    /// The state [`NodeState::Starting`] and the reason.
    pub(crate) fn unready(&self) -> Unready {
        Unready {
            state: NodeState::Starting,
            reason: Arc::clone(&self.0.lock()),
        }
    }
}

/// The port's routes while the log is being opened: `/livez`, and the page with the reason.
pub fn routes_while_opening(progress: StartupProgress) -> Router {
    let opening = move || progress.unready();
    let opening_page = opening.clone();
    Router::new()
        .route("/livez", get(livez))
        .route(
            "/",
            get(move || async move { StatusPage::opening(&opening_page()).into_response() }),
        )
        .fallback(move || async move { ApiError::NotReady(opening()) })
}

async fn livez() -> &'static str {
    "alive\n"
}

async fn metrics(State(state): State<OpsState>) -> Response {
    let telemetry = &state.telemetry;
    let flag = |set| f64::from(u8::from(set));
    let position = state.applied.position();
    let log_end = state.log.end();

    let node = &telemetry.node;
    let peers = state.peers.known();
    let peers_ready = peers.iter().filter(|peer| peer.ready()).count();
    node.records.set(state.store.len() as f64);
    node.ready.set(flag(state.readiness.check().is_ok()));
    node.queue_patches.set(state.writer.queue_requests() as f64);
    node.peers.set(peers.len() as f64);
    node.peers_ready.set(peers_ready as f64);

    let log = &telemetry.log;
    let lag_batches = log_end.saturating_sub(position.seq);
    log.position.set(position.seq as f64);
    log.end.set(log_end as f64);
    log.first.set(state.log.first() as f64);
    log.writable.set(flag(state.log.unwritable().is_none()));
    log.lag_batches.set(lag_batches as f64);
    log.lag_s.set(state.lag_s(log_end));
    log.set_counts(state.log.counts());

    if let Some(restore) = state.restore.current() {
        let metrics = &telemetry.restore;
        metrics.running.set(flag(restore.took.is_none()));
        metrics.rows.set(restore.progress.rows() as f64);
        metrics.bytes.set(restore.progress.bytes() as f64);
        metrics.duration_s.set(restore.duration().as_secs_f64());
        metrics
            .buffered_batches
            .set(restore.buffer.batches() as f64);
        metrics.buffered_bytes.set(restore.buffer.bytes() as f64);
    }

    let (snapshot, last_snapshot) = (&telemetry.snapshot, &state.last_snapshot);
    snapshot.failures.absolute(last_snapshot.failures());
    snapshot.set(last_snapshot.written().as_ref());

    if let Some(wal) = state.log.wal_status() {
        telemetry.wal.set(&wal);
    }

    let memory = state.memory.measure(&state.store);
    telemetry.host.set_memory(memory_limit().bytes, memory);
    telemetry.host.set_disk(data_dir_space(&state).await);

    let text_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    let mut text = telemetry.render();
    state.http_metrics.render(&mut text);
    ([(CONTENT_TYPE, text_type)], text).into_response()
}

/// The space of the data directory; `None` without one, or if its file system does not report it or
/// does not answer in time.
async fn data_dir_space(state: &OpsState) -> Option<DiskSpace> {
    let dir = state.data_dir.clone()?;
    let space = state.blocking.run(move || disk_space(&dir));
    let space = tokio::time::timeout(DISK_SPACE_WAIT_MAX, space).await;
    space.ok()?.ok()?.ok()?
}

async fn status(State(state): State<OpsState>) -> Json<NodeStatus> {
    Json(node_status(&state).await)
}

async fn status_page(State(state): State<OpsState>) -> Response {
    StatusPage::of(&node_status(&state).await).into_response()
}

async fn node_status(state: &OpsState) -> NodeStatus {
    let disk = data_dir_space(state).await;
    NodeStatus::of(state, disk)
}
