//! The ops port: is it alive, is it ready, what does it hold, what does it measure.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get};
use axum::{Json, Router};
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use serde::Serialize;

use super::error::ApiError;
use crate::backup::{Snapshots, rfc3339};
use crate::blocking::Blocking;
use crate::log::{Log, Seq, now_ns};
use crate::machine::{Room, memory_limit, room_in};
use crate::readiness::{Readiness, Unready};
use crate::replication::{Applied, LastSnapshot, Peer, Peers, RestoreTracker, Writer};
use crate::store::Store;
use crate::telemetry::Telemetry;

/// How long a file system may take to say how much room it has.
const ROOM_WAIT_MAX: Duration = Duration::from_secs(1);

/// What the ops port tells of.
#[derive(Clone)]
pub struct OpsState {
    /// This process start's name.
    pub node: Arc<str>,
    /// The records.
    pub store: Store,
    /// How far they have come.
    pub applied: Applied,
    /// The log they come from.
    pub log: Arc<dyn Log>,
    /// The write queue.
    pub writer: Writer,
    /// Whether the replica may answer.
    pub readiness: Readiness,
    /// What is measured.
    pub telemetry: Arc<Telemetry>,
    /// What is being restored, or was.
    pub restore: RestoreTracker,
    /// Where snapshots go, if any do.
    pub snapshots: Option<Snapshots>,
    /// What was written last.
    pub last_snapshot: LastSnapshot,
    /// The other replicas.
    pub peers: Peers,
    /// Where the machine is asked.
    pub blocking: Blocking,
}

/// The answer of `GET /status`.
#[derive(Debug, Serialize)]
pub struct Status {
    /// This process start.
    pub node: Arc<str>,
    /// The program's version.
    pub version: &'static str,
    /// `ready`, or why not in one word.
    pub state: &'static str,
    /// Why not in a sentence.
    pub reason: Option<Arc<str>>,
    /// `memory`, …
    pub log_kind: &'static str,
    /// Which log `position` counts in.
    pub log_id: Box<str>,
    /// The last batch applied.
    pub position: Seq,
    /// The log's last batch.
    pub log_end: Seq,
    /// How many batches lie between.
    pub lag: u64,
    /// Records at `position`.
    pub records: usize,
    /// Their digest.
    pub digest: String,
    /// Patches that wait for a batch.
    pub queue: usize,
    /// Seconds since the process started.
    pub uptime_s: u64,
    /// The restore that runs or ran at the start; `null` if there was none.
    pub restore: Option<RestoreStatus>,
    /// The last snapshot that this process wrote or started from; `null` before the first.
    pub snapshot: Option<SnapshotStatus>,
    /// The other replicas, as they were some seconds ago; the one that is furthest comes first.
    pub peers: Vec<Peer>,
}

/// How a restore stands.
#[derive(Debug, Serialize)]
pub struct RestoreStatus {
    /// The file or the peer's URL.
    pub source: Arc<str>,
    /// `restoring` while rows come in, `catching-up` while the log is read to its end, `done`, or
    /// `failed`.
    pub stage: &'static str,
    /// Whether all rows are in.
    pub done: bool,
    /// Rows restored.
    pub rows: u64,
    /// About how many there are; 0 while that is not known.
    pub rows_expected: u64,
    /// Bytes read.
    pub bytes: u64,
    /// How many there are; 0 while that is not known.
    pub bytes_total: u64,
    /// How long it has taken.
    pub duration_s: f64,
    /// Rows a second.
    pub rows_per_s: f64,
    /// About how long the rest will take; `null` while that is not known.
    pub remaining_s: Option<f64>,
    /// Batches of the log that are read already and wait for the rows.
    pub buffered_batches: u64,
    /// About how many bytes of memory they take.
    pub buffered_bytes: u64,
}

/// The last snapshot.
#[derive(Debug, Serialize)]
pub struct SnapshotStatus {
    /// From where on the log is needed with it.
    pub position: Seq,
    /// The log's time of that position.
    pub time: String,
    /// How long ago it was finished.
    pub age_s: f64,
    /// Its rows.
    pub rows: u64,
    /// Its size.
    pub bytes: u64,
    /// How long writing it took; 0 for one that an earlier process wrote.
    pub duration_s: f64,
}

/// The port's routes.
pub fn routes(state: OpsState) -> Router {
    let getting = |handler: MethodRouter<OpsState>| {
        handler.fallback(|| async { ApiError::MethodNotAllowed("GET, HEAD") })
    };
    Router::new()
        .route("/livez", getting(get(alive)))
        .route("/readyz", getting(get(ready)))
        .route("/readyz/write", getting(get(ready_for_writes)))
        .route("/metrics", getting(get(metrics)))
        .route("/status", getting(get(status)))
        .fallback(|| async {
            ApiError::RouteUnknown("/livez, /readyz, /readyz/write, /metrics, /status")
        })
        .with_state(state)
}

/// The port's routes while the log is being opened: the process is alive and no more.
pub fn routes_while_opening() -> Router {
    let opening = || async {
        ApiError::NotReady(Unready {
            state: "starting",
            reason: "the log is being opened; what keeps it is told in this node's log".into(),
        })
    };
    Router::new().route("/livez", get(alive)).fallback(opening)
}

async fn alive() -> &'static str {
    "alive\n"
}

async fn ready(State(state): State<OpsState>) -> Result<&'static str, ApiError> {
    state.readiness.reads()?;
    Ok("ready\n")
}

async fn ready_for_writes(State(state): State<OpsState>) -> Result<&'static str, ApiError> {
    not_ready_for_writes(&state)?;
    Ok("ready\n")
}

fn not_ready_for_writes(state: &OpsState) -> Result<(), Unready> {
    state.readiness.writes()?;
    match state.log.refusal() {
        Some(reason) => Err(Unready {
            state: "read-only",
            reason,
        }),
        None => Ok(()),
    }
}

async fn metrics(State(state): State<OpsState>) -> Response {
    let gauges = &state.telemetry.gauges;
    gauges.records.set(state.store.len() as f64);
    let position = state.applied.position();
    let log_end = state.log.end();
    gauges.position.set(position.seq as f64);
    gauges.log_end.set(log_end as f64);
    let lag_ns = match log_end > position.seq {
        true => now_ns().saturating_sub(position.time_ns),
        false => 0,
    };
    let log = &state.telemetry.log;
    log.lag_batches
        .set(log_end.saturating_sub(position.seq) as f64);
    log.lag_s.set(lag_ns as f64 / 1e9);
    log.count(state.log.counts());
    let peers = state.peers.known();
    gauges.peers.set(peers.len() as f64);
    gauges
        .peers_ready
        .set(peers.iter().filter(|peer| peer.ready()).count() as f64);
    gauges
        .queue_patches
        .set(state.writer.queue_patches() as f64);
    gauges
        .ready
        .set(f64::from(u8::from(state.readiness.reads().is_ok())));
    let recovery = &state.telemetry.recovery;
    recovery.log_first.set(state.log.first() as f64);
    recovery
        .writable
        .set(f64::from(u8::from(state.log.refusal().is_none())));
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
    machine.set(memory_limit(), room(&state).await);
    let text_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(CONTENT_TYPE, text_type)], state.telemetry.render()).into_response()
}

/// How much room the data directory has, if there is one and its file system answers.
async fn room(state: &OpsState) -> Option<Room> {
    let snapshots = state.snapshots.clone()?;
    let asked = state.blocking.run(move || room_in(snapshots.dir()));
    let room = tokio::time::timeout(ROOM_WAIT_MAX, asked).await;
    room.ok()?.ok()?.ok()
}

async fn status(State(state): State<OpsState>) -> Json<Status> {
    let at = state.applied.snapshot(&state.store);
    let log_end = state.log.end();
    let unready = not_ready_for_writes(&state).err();
    Json(Status {
        node: state.node,
        version: env!("CARGO_PKG_VERSION"),
        state: unready.as_ref().map_or("ready", |unready| unready.state),
        reason: unready.map(|unready| unready.reason),
        log_kind: state.log.kind(),
        log_id: state.log.id().0,
        position: at.seq,
        log_end,
        lag: log_end.saturating_sub(at.seq),
        records: at.records,
        digest: at.digest.to_string(),
        queue: state.writer.queue_patches(),
        uptime_s: state.telemetry.uptime().as_secs(),
        restore: state.restore.current().map(|restore| RestoreStatus {
            source: Arc::clone(&restore.source),
            stage: restore.stage.name(),
            done: restore.took.is_some(),
            rows: restore.progress.rows(),
            rows_expected: restore.progress.rows_expected(),
            bytes: restore.progress.bytes(),
            bytes_total: restore.bytes_total,
            duration_s: restore.duration().as_secs_f64(),
            rows_per_s: restore.rows_per_s(),
            remaining_s: restore.remaining().map(|left| left.as_secs_f64()),
            buffered_batches: restore.buffer.batches(),
            buffered_bytes: restore.buffer.bytes(),
        }),
        peers: state.peers.known(),
        snapshot: state
            .last_snapshot
            .written()
            .map(|(written, age)| SnapshotStatus {
                position: written.head.position,
                time: rfc3339(written.head.time_ns),
                age_s: age.as_secs_f64(),
                rows: written.rows,
                bytes: written.bytes,
                duration_s: written.took.as_secs_f64(),
            }),
    })
}
