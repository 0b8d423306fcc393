//! The state of a node, for `GET /status` and the status page.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Serialize, Serializer};

use crate::backup::rfc3339;
use crate::http::health::check_writable;
use crate::http::ops::traffic::Traffic;
use crate::http::ops::{OpsState, Port};
use crate::log::{Chain, Seq, WalStatus};
use crate::replication::state::NodeState;
use crate::replication::{LastSnapshot, Peer, Restore};
use crate::sys::host::{DiskSpace, host_name, process_memory};

/// The response of `GET /status`.
#[derive(Debug, Serialize)]
pub struct NodeStatus {
    /// The id of this process.
    pub node: Arc<str>,
    /// The name of the machine.
    pub host: String,
    /// The data directory; `null` without one.
    pub data_dir: Option<String>,
    /// The space of the data directory's file system; `null` without a data directory, and if the
    /// file system does not answer within a second.
    pub disk: Option<DiskStatus>,
    /// The ports.
    pub ports: Vec<PortStatus>,
    /// The version of the program.
    pub version: &'static str,
    /// The state of the node.
    pub state: NodeState,
    /// Why the node is not ready; `null` if it is.
    pub reason: Option<Arc<str>>,
    /// Whether the node serves reads.
    pub reads: bool,
    /// Whether the node accepts writes.
    pub writes: bool,
    /// `memory`, `disk` or `jetstream`.
    pub log_kind: &'static str,
    /// The id of the log that `position` belongs to.
    pub log_id: Box<str>,
    /// The id of the replica, stored in its data directory.
    pub replica: String,
    /// The last applied batch.
    pub position: Seq,
    /// The hash of the log's history up to `position`.
    pub chain: Chain,
    /// Whether `chain` was compared with the log or another replica, and was equal.
    pub verified: bool,
    /// The last batch of the log.
    pub log_end: Seq,
    /// Batches between `position` and `log_end`.
    pub lag: u64,
    /// Age of the last applied batch while the log has newer ones, otherwise 0.
    pub lag_s: f64,
    /// Records at `position`.
    pub records: u64,
    /// The digest of the records.
    pub digest: String,
    /// Requests that wait for a batch.
    pub queue: u64,
    /// Seconds since the process started.
    pub uptime_s: u64,
    /// Resident memory of the process; `null` if the system does not report it.
    pub memory_bytes: Option<u64>,
    /// Memory that counts against `memory_max_bytes`: without what deleted records left for new ones.
    pub memory_used_bytes: u64,
    /// The limit of `memory_used_bytes` above which this replica is full.
    pub memory_max_bytes: u64,
    /// Whether this replica is full.
    pub full: bool,
    /// Whether writes for new users are accepted: neither this replica nor a ready peer is full.
    pub creates: bool,
    /// Recent requests; `null` in the first second, and if metrics are disabled.
    pub traffic: Option<Traffic>,
    /// The current or last restore; `null` if there was none.
    pub restore: Option<RestoreStatus>,
    /// The last snapshot that this process wrote or started from; `null` before the first.
    pub snapshot: Option<SnapshotStatus>,
    /// The local copy of a cluster's log; `null` on a node without one.
    pub wal: Option<WalStatus>,
    /// The other replicas as of the last query, highest position first.
    pub peers: Vec<Peer>,
}

impl Serialize for NodeState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// The space of a file system.
#[derive(Debug, Serialize)]
pub struct DiskStatus {
    /// Free space for unprivileged processes.
    pub free_bytes: u64,
    /// The size of the file system.
    pub size_bytes: u64,
}

/// One port and its connections.
#[derive(Debug, Serialize)]
pub struct PortStatus {
    /// `write`, `read` or `ops`.
    pub name: &'static str,
    /// The address that it listens on.
    pub address: SocketAddr,
    /// Open connections.
    pub connections: u64,
    /// The limit of open connections.
    pub connections_max: usize,
    /// Connections that the node has closed at a deadline or at the limit.
    pub connections_cut: u64,
}

/// The progress of a restore.
#[derive(Debug, Serialize)]
pub struct RestoreStatus {
    /// The path of the file, or the URL of the peer.
    pub source: Arc<str>,
    /// `restoring` while rows are loaded, `catching-up` while the log is applied, `done`, or
    /// `failed`.
    pub stage: &'static str,
    /// Whether all rows are loaded.
    pub done: bool,
    /// Rows loaded.
    pub rows: u64,
    /// Approximate number of all rows; 0 while unknown.
    pub rows_expected: u64,
    /// Bytes read.
    pub bytes: u64,
    /// The size of the backup; 0 while unknown.
    pub bytes_total: u64,
    /// Duration so far.
    pub duration_s: f64,
    /// Rows per second.
    pub rows_per_s: f64,
    /// Estimated remaining time; `null` while unknown.
    pub remaining_s: Option<f64>,
    /// Batches of the log that are buffered until all rows are loaded.
    pub buffered_batches: u64,
    /// Approximate memory of these batches.
    pub buffered_bytes: u64,
}

/// The last snapshot.
#[derive(Debug, Serialize)]
pub struct SnapshotStatus {
    /// The position after which the log is needed in addition.
    pub position: Seq,
    /// The log's time of that position.
    pub time: String,
    /// Time since the snapshot was completed.
    pub age_s: f64,
    /// Rows of the snapshot.
    pub rows: u64,
    /// Size of the snapshot.
    pub bytes: u64,
    /// Time that writing it took; 0 if an earlier process wrote it.
    pub duration_s: f64,
}

impl NodeStatus {
    /// The current state of the node, whose data directory has `disk`.
    #[must_use]
    pub fn of(state: &OpsState, disk: Option<DiskSpace>) -> Self {
        let at = state.applied.snapshot(&state.store);
        let log_end = state.log.end();
        let memory = state.memory.measure(&state.store);
        let unready = check_writable(&state.readiness, &*state.log).err();
        Self {
            node: Arc::clone(&state.node),
            host: host_name(),
            data_dir: state.data_dir.as_ref().map(|dir| dir.display().to_string()),
            disk: disk.map(|space| DiskStatus {
                free_bytes: space.free,
                size_bytes: space.size,
            }),
            ports: state.ports.iter().map(PortStatus::of).collect(),
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
            memory_bytes: process_memory().map(|memory| memory.resident),
            memory_used_bytes: memory.used_bytes,
            memory_max_bytes: memory.max_bytes,
            full: memory.full,
            creates: memory.creates,
            traffic: state.traffic.now(),
            restore: state.restore.current().as_ref().map(RestoreStatus::of),
            snapshot: SnapshotStatus::of(&state.last_snapshot),
            wal: state.log.wal_status(),
            peers: state.peers.known(),
        }
    }
}

impl PortStatus {
    fn of(port: &Port) -> Self {
        let counts = port.metrics.counts();
        Self {
            name: port.name,
            address: port.address,
            connections: counts.open.load(Ordering::Relaxed),
            connections_max: port.connections_max,
            connections_cut: counts.cut.load(Ordering::Relaxed),
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;

    /// The state after `state`. The match is exhaustive, so that every new state gets tested.
    fn next(state: &NodeState) -> Option<NodeState> {
        use NodeState as S;
        Some(match state {
            S::Starting => S::Restoring,
            S::Restoring => S::CatchingUp,
            S::CatchingUp => S::Ready,
            S::Ready => S::ReadOnly,
            S::ReadOnly => S::NoSource,
            S::NoSource => S::Gap,
            S::Gap => S::OtherLog,
            S::OtherLog => S::Diverged,
            S::Diverged => S::Stopping,
            S::Stopping => return None,
        })
    }

    fn names() -> BTreeSet<&'static str> {
        let states = std::iter::successors(Some(NodeState::Starting), next);
        states.map(NodeState::name).collect()
    }

    #[test]
    fn the_openapi_document_has_every_state_and_no_other() {
        let document: Value = serde_json::from_str(include_str!("openapi.json")).unwrap();
        let states = &document["components"]["schemas"]["Status"]["properties"]["state"]["enum"];
        let states = states.as_array().unwrap();
        assert_eq!(states.len(), names().len());
        let documented: BTreeSet<&str> = states.iter().filter_map(Value::as_str).collect();
        assert_eq!(documented, names());
    }

    #[test]
    fn the_troubleshooting_page_lists_every_state_and_no_other() {
        let page = include_str!("../../../docs/operations/troubleshooting.md");
        let (_, section) = page.split_once("## States").unwrap();
        let (section, _) = section.split_once("\n## ").unwrap();
        let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
        let listed: BTreeSet<&str> = rows
            .filter_map(|row| row.split_once('`').map(|(name, _)| name))
            .collect();
        assert_eq!(listed, names());
    }
}
