//! What a node says of itself: `GET /status`, and the page for people.

use std::sync::Arc;

use serde::{Serialize, Serializer};

use crate::backup::rfc3339;
use crate::http::ops::OpsState;
use crate::http::ops::traffic::Traffic;
use crate::log::{Chain, Seq};
use crate::replication::state::NodeState;
use crate::replication::{LastSnapshot, Peer, Restore};

/// The answer of `GET /status`.
#[derive(Debug, Serialize)]
pub struct Status {
    /// This process start.
    pub node: Arc<str>,
    /// The program's version.
    pub version: &'static str,
    /// `ready`, or why not in one word.
    pub state: NodeState,
    /// Why not in a sentence.
    pub reason: Option<Arc<str>>,
    /// Whether reads are answered.
    pub reads: bool,
    /// Whether writes are answered.
    pub writes: bool,
    /// `memory`, …
    pub log_kind: &'static str,
    /// Which log `position` counts in.
    pub log_id: Box<str>,
    /// The replica; it keeps this id in its data directory.
    pub replica: String,
    /// The last batch applied.
    pub position: Seq,
    /// The hash of the log's history up to there.
    pub chain: Chain,
    /// Whether the log, or another replica, was seen to have the same history.
    pub verified: bool,
    /// The log's last batch.
    pub log_end: Seq,
    /// How many batches lie between.
    pub lag: u64,
    /// How old the last batch applied is while the log has newer ones, else 0.
    pub lag_s: f64,
    /// Records at `position`.
    pub records: u64,
    /// Their digest.
    pub digest: String,
    /// Patches that wait for a batch.
    pub queue: u64,
    /// Seconds since the process started.
    pub uptime_s: u64,
    /// How much memory the process takes; `null` where the system does not tell.
    pub memory_bytes: Option<u64>,
    /// How much of it counts against `memory_max_bytes`: without what deleted records left to new
    /// ones.
    pub memory_used_bytes: u64,
    /// Above so much in use this replica is full.
    pub memory_max_bytes: u64,
    /// Whether it is.
    pub full: bool,
    /// Whether writes for new users are accepted: neither this replica nor a ready peer is full.
    pub creates: bool,
    /// What was answered lately; `null` in the first second, and where nothing is counted.
    pub traffic: Option<Traffic>,
    /// The restore that runs or ran at the start; `null` if there was none.
    pub restore: Option<RestoreStatus>,
    /// The last snapshot that this process wrote or started from; `null` before the first.
    pub snapshot: Option<SnapshotStatus>,
    /// The other replicas, as they were some seconds ago; the one that is furthest comes first.
    pub peers: Vec<Peer>,
}

impl Serialize for NodeState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
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

impl Status {
    /// How the node is now.
    #[must_use]
    pub fn of(state: &OpsState) -> Self {
        let at = state.applied.snapshot(&state.store);
        let log_end = state.log.end();
        let memory = state.memory.measure(&state.store);
        let unready = state.not_ready_for_writes().err();
        Self {
            node: Arc::clone(&state.node),
            version: env!("CARGO_PKG_VERSION"),
            state: unready
                .as_ref()
                .map_or(NodeState::Ready, |unready| unready.state),
            reads: state.readiness.check().is_ok(),
            writes: unready.is_none(),
            reason: unready.map(|unready| unready.reason),
            log_kind: state.log.kind(),
            log_id: state.log.id().0,
            replica: state.replica.to_string(),
            chain: at.chain,
            verified: state.log.is_verified(),
            position: at.seq,
            log_end,
            lag: log_end.saturating_sub(at.seq),
            lag_s: state.lag_s(log_end),
            records: at.records as u64,
            digest: at.digest.to_string(),
            queue: state.writer.queue_requests() as u64,
            uptime_s: state.telemetry.uptime().as_secs(),
            memory_bytes: metrics_process::collector::collect().resident_memory_bytes,
            memory_used_bytes: memory.used_bytes,
            memory_max_bytes: memory.max_bytes,
            full: memory.full,
            creates: memory.creates,
            traffic: state.traffic.now(),
            restore: state.restore.current().as_ref().map(RestoreStatus::of),
            snapshot: SnapshotStatus::of(&state.last_snapshot),
            peers: state.peers.known(),
        }
    }
}

impl RestoreStatus {
    fn of(restore: &Restore) -> Self {
        Self {
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
        }
    }
}

impl SnapshotStatus {
    fn of(last: &LastSnapshot) -> Option<Self> {
        last.written().map(|(written, age)| Self {
            position: written.head.position,
            time: rfc3339(written.head.time_ns),
            age_s: age.as_secs_f64(),
            rows: written.rows,
            bytes: written.bytes,
            duration_s: written.took.as_secs_f64(),
        })
    }
}
