//! The ops port: is it alive, is it ready, what does it hold, what does it measure.

mod format;
mod openapi;
mod page;
pub mod status;
pub mod traffic;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get};
use axum::{Json, Router};
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use parking_lot::Mutex;

use crate::backup::Snapshots;
use crate::http::HttpMetrics;
use crate::http::error::ApiError;
use crate::http::ops::openapi::OpenApi;
use crate::http::ops::page::View;
use crate::http::ops::status::Status;
use crate::http::ops::traffic::RecentTraffic;
use crate::log::{Log, RandomId, Seq, now_ns};
use crate::replication::memory::MemoryGuard;
use crate::replication::state::{NodeState, Readiness, Unready};
use crate::replication::{AppliedIndex, LastSnapshot, Peers, RestoreTracker, Writer};
use crate::store::Store;
use crate::sys::exec::Blocking;
use crate::sys::host::{Room, memory_limit, room_in};
use crate::telemetry::Telemetry;

/// How long a file system may take to say how much room it has.
const ROOM_WAIT_MAX: Duration = Duration::from_secs(1);

/// What the ops port tells of.
#[derive(Clone)]
pub struct OpsState {
    /// This process start's name.
    pub node: Arc<str>,
    /// The replica.
    pub replica: RandomId,
    /// The records.
    pub store: Store,
    /// How far they have come.
    pub applied: AppliedIndex,
    /// The log they come from.
    pub log: Arc<dyn Log>,
    /// The write queue.
    pub writer: Writer,
    /// Whether the replica may answer.
    pub readiness: Readiness,
    /// What is measured.
    pub telemetry: Arc<Telemetry>,
    /// What is measured about requests.
    pub http_metrics: Arc<HttpMetrics>,
    /// What the data ports answered lately.
    pub traffic: RecentTraffic,
    /// What is being restored, or was.
    pub restore: RestoreTracker,
    /// Whether writes may create records.
    pub memory: MemoryGuard,
    /// Where snapshots go, if any do.
    pub snapshots: Option<Snapshots>,
    /// What was written last.
    pub last_snapshot: LastSnapshot,
    /// The other replicas.
    pub peers: Peers,
    /// Where the machine is asked.
    pub blocking: Blocking,
}

impl OpsState {
    /// Whether writes are answered.
    ///
    /// # Errors
    /// Why not; the log may refuse them while reads go on.
    pub(super) fn not_ready_for_writes(&self) -> Result<(), Unready> {
        self.readiness.check()?;
        match self.log.unwritable() {
            Some(reason) => Err(Unready {
                state: NodeState::ReadOnly,
                reason,
            }),
            None => Ok(()),
        }
    }

    /// How old the last batch applied is while the log goes on to `log_end`, in seconds, else 0.
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
    let getting = |handler: MethodRouter<OpsState>| {
        handler.fallback(|| async { ApiError::MethodNotAllowed("GET, HEAD") })
    };
    let openapi = OpenApi::new();
    Router::new()
        .route("/", getting(get(status_page)))
        .route("/livez", getting(get(alive)))
        .route("/readyz", getting(get(ready)))
        .route("/readyz/write", getting(get(ready_for_writes)))
        .route("/metrics", getting(get(metrics)))
        .route("/status", getting(get(status)))
        .route(
            "/openapi.json",
            getting(get(move || async { openapi.answer() })),
        )
        .fallback(|| async {
            ApiError::RouteUnknown(
                "/, /livez, /readyz, /readyz/write, /metrics, /status, /openapi.json",
            )
        })
        .with_state(state)
}

/// What an opening log waits for. Clones share it.
#[derive(Clone)]
pub struct OpeningProgress(Arc<Mutex<Arc<str>>>);

impl Default for OpeningProgress {
    fn default() -> Self {
        Self(Arc::new(Mutex::new("opening the log".into())))
    }
}

impl OpeningProgress {
    /// It waits for this now.
    pub fn set(&self, what: &str) {
        *self.0.lock() = what.into();
    }

    /// Why the node is not ready.
    pub(super) fn unready(&self) -> Unready {
        Unready {
            state: NodeState::Starting,
            reason: Arc::clone(&self.0.lock()),
        }
    }
}

/// The port's routes while the log is being opened: the process is alive and no more.
pub fn routes_while_opening(progress: OpeningProgress) -> Router {
    let opening = move || progress.unready();
    let opening_page = opening.clone();
    Router::new()
        .route("/livez", get(alive))
        .route(
            "/",
            get(move || async move { View::opening(&opening_page()).answer() }),
        )
        .fallback(move || async move { ApiError::NotReady(opening()) })
}

async fn alive() -> &'static str {
    "alive\n"
}

async fn ready(State(state): State<OpsState>) -> Result<&'static str, ApiError> {
    state.readiness.check()?;
    Ok("ready\n")
}

async fn ready_for_writes(State(state): State<OpsState>) -> Result<&'static str, ApiError> {
    state.not_ready_for_writes()?;
    Ok("ready\n")
}

async fn metrics(State(state): State<OpsState>) -> Response {
    let gauges = &state.telemetry.gauges;
    gauges.records.set(state.store.len() as f64);
    let position = state.applied.position();
    let log_end = state.log.end();
    gauges.position.set(position.seq as f64);
    gauges.log_end.set(log_end as f64);
    let log = &state.telemetry.log;
    log.lag_batches
        .set(log_end.saturating_sub(position.seq) as f64);
    log.lag_s.set(state.lag_s(log_end));
    log.count(state.log.counts());
    let peers = state.peers.known();
    gauges.peers.set(peers.len() as f64);
    gauges
        .peers_ready
        .set(peers.iter().filter(|peer| peer.ready()).count() as f64);
    gauges
        .queue_patches
        .set(state.writer.queue_requests() as f64);
    gauges
        .ready
        .set(f64::from(u8::from(state.readiness.check().is_ok())));
    let recovery = &state.telemetry.recovery;
    recovery.log_first.set(state.log.first() as f64);
    recovery
        .writable
        .set(f64::from(u8::from(state.log.unwritable().is_none())));
    if let Some(restore) = state.restore.current() {
        recovery.restore_rows.set(restore.progress.rows() as f64);
        recovery.restore_bytes.set(restore.progress.bytes() as f64);
        recovery
            .restore_duration_s
            .set(restore.duration().as_secs_f64());
        recovery
            .buffered_batches
            .set(restore.buffer.batches() as f64);
        recovery.buffered_bytes.set(restore.buffer.bytes() as f64);
        recovery
            .restoring
            .set(f64::from(u8::from(restore.took.is_none())));
    }
    recovery
        .snapshot_failures
        .absolute(state.last_snapshot.failures());
    recovery.set_snapshot(state.last_snapshot.written().as_ref());
    let machine = &state.telemetry.machine;
    machine.set_use(state.memory.measure(&state.store));
    machine.set(memory_limit().bytes, room(&state).await);
    let text_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    let mut text = state.telemetry.render();
    state.http_metrics.render(&mut text);
    ([(CONTENT_TYPE, text_type)], text).into_response()
}

/// How much room the data directory has, if there is one and its file system answers.
async fn room(state: &OpsState) -> Option<Room> {
    let snapshots = state.snapshots.clone()?;
    let asked = state.blocking.run(move || room_in(snapshots.dir()));
    let room = tokio::time::timeout(ROOM_WAIT_MAX, asked).await;
    room.ok()?.ok()?.ok()
}

async fn status(State(state): State<OpsState>) -> Json<Status> {
    Json(Status::of(&state))
}

async fn status_page(State(state): State<OpsState>) -> Response {
    View::of(&Status::of(&state)).answer()
}
