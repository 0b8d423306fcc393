//! The metrics of a node. Those of HTTP requests, connections and backups are registered in
//! [`http`](crate::http).

use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram};
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use super::process;
use super::register::{counter, gauge, histogram};
use super::wal_metrics::WalMetrics;
use crate::backup::SnapshotInfo;
use crate::log::LogCounts;
use crate::replication::CheckpointMetrics;
use crate::replication::memory::MemoryUse;
use crate::sys::host::DiskSpace;

/// How often the recorder sorts samples into its histograms. It stores all samples until then, so this
/// and the rate of batches bound its memory, even if nothing scrapes it.
const UPKEEP_EVERY: Duration = Duration::from_secs(1);

/// Writes per batch: from a single writer to the largest batch.
const BATCH_BUCKETS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0,
];
const BATCH_METRIC: &str = "gradestore_batch_writes";

/// From tens of microseconds for a log in memory, over milliseconds for a disk or NATS, to about the
/// time after which a write fails.
const BATCH_BUCKETS_S: &[f64] = &[
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0,
];
const BATCH_DURATION_METRIC: &str = "gradestore_batch_duration_seconds";

/// The upper bounds of the histograms of this module.
const BUCKETS: [(&str, &[f64]); 2] = [
    (BATCH_METRIC, BATCH_BUCKETS),
    (BATCH_DURATION_METRIC, BATCH_BUCKETS_S),
];

/// The metrics of one node. Each node has a recorder, so that several nodes can run in one process.
///
/// Values that other modules already keep are copied into the metrics at each scrape.
pub struct Telemetry {
    started: Instant,
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    /// Set at each scrape.
    pub(crate) node: NodeMetrics,
    /// Set at each scrape.
    pub(crate) log: LogMetrics,
    /// Set at each scrape.
    pub(crate) restore: RestoreMetrics,
    /// Set at each scrape.
    pub(crate) snapshot: SnapshotMetrics,
    /// Set at each scrape.
    pub(crate) wal: WalMetrics,
    /// Set at each scrape.
    pub(crate) host: HostMetrics,
    /// Recorded as the events happen.
    pub replication: ReplicationMetrics,
}

/// Metrics of batches and of the replicated state.
pub struct ReplicationMetrics {
    /// Writes per batch that this process sent.
    pub batch_writes: Histogram,
    /// Seconds from sending a batch until it is applied.
    pub batch_duration: Histogram,
    /// Patches applied, of all nodes.
    pub patches_applied: Counter,
    /// Deletions applied, of all nodes.
    pub deletions_applied: Counter,
    /// Times that the log lacked the batch after the last applied one.
    pub gaps: Counter,
    /// States that were discarded.
    pub resyncs: Counter,
    /// Comparisons with other nodes.
    pub checkpoints: CheckpointMetrics,
}

impl ReplicationMetrics {
    fn new() -> Self {
        Self {
            batch_writes: histogram(
                BATCH_METRIC,
                "Writes (patches and deletions) per batch that this process sent.",
            ),
            batch_duration: histogram(
                BATCH_DURATION_METRIC,
                "Time from sending a batch until the log has delivered it and it is applied.",
            ),
            patches_applied: counter(
                "gradestore_patches_applied_total",
                "Patches applied to the store, of all nodes.",
            ),
            deletions_applied: counter(
                "gradestore_deletions_applied_total",
                "Deletions applied to the store, of all nodes, including those of unknown users.",
            ),
            gaps: counter(
                "gradestore_log_gaps_total",
                "Times that reading ended because the log lacked the batch after the last applied one.",
            ),
            resyncs: counter(
                "gradestore_resyncs_total",
                "Times that this node discarded its state and bootstrapped again, because the log lacked batches or the state had diverged.",
            ),
            checkpoints: CheckpointMetrics {
                compared: counter(
                    "gradestore_checkpoints_compared_total",
                    "Digests of other nodes compared with that of this node at the same position.",
                ),
                divergences: counter(
                    "gradestore_divergences_total",
                    "Digests of other nodes that differed from that of this node at the same position.",
                ),
                rejected: counter(
                    "gradestore_votes_rejected_total",
                    "Checkpoints ignored because they are not signed with the cluster's password.",
                ),
            },
        }
    }
}

/// Metrics of the store, the write queue and the other nodes.
pub(crate) struct NodeMetrics {
    pub(crate) records: Gauge,
    pub(crate) ready: Gauge,
    pub(crate) queue_patches: Gauge,
    pub(crate) peers: Gauge,
    pub(crate) peers_ready: Gauge,
}

impl NodeMetrics {
    fn new() -> Self {
        metrics::describe_gauge!(
            "gradestore_build_info",
            "Always 1; the label has the version."
        );
        metrics::gauge!("gradestore_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
        Self {
            records: gauge("gradestore_records", "Records in the store."),
            ready: gauge(
                "gradestore_ready",
                "1 while the node serves reads, otherwise 0.",
            ),
            queue_patches: gauge(
                "gradestore_write_queue_requests",
                "Requests that wait for a batch: single writes, and groups of lines.",
            ),
            peers: gauge(
                "gradestore_peers",
                "Other nodes on the log that answered the last query.",
            ),
            peers_ready: gauge(
                "gradestore_peers_ready",
                "Other nodes on the log that were ready at the last query.",
            ),
        }
    }
}

/// Metrics of the log, as this node sees it.
pub(crate) struct LogMetrics {
    pub(crate) position: Gauge,
    pub(crate) end: Gauge,
    pub(crate) first: Gauge,
    pub(crate) writable: Gauge,
    pub(crate) lag_batches: Gauge,
    pub(crate) lag_s: Gauge,
    reconnects: Counter,
    resumes: Counter,
    resends: Counter,
    redeliveries: Counter,
    poisoned: Counter,
    forged_announcements: Counter,
}

impl LogMetrics {
    fn new() -> Self {
        Self {
            position: gauge(
                "gradestore_log_position",
                "Sequence number of the last applied batch.",
            ),
            end: gauge(
                "gradestore_log_end",
                "Sequence number of the last batch in the log.",
            ),
            first: gauge(
                "gradestore_log_first",
                "Sequence number of the oldest batch in the log.",
            ),
            writable: gauge(
                "gradestore_log_writable",
                "1 while the log accepts batches, otherwise 0.",
            ),
            lag_batches: gauge(
                "gradestore_log_lag_batches",
                "Batches in the log that this node has not applied.",
            ),
            lag_s: gauge(
                "gradestore_log_lag_seconds",
                "Age of the last applied batch while the log has newer ones, otherwise 0.",
            ),
            reconnects: counter("gradestore_log_reconnects_total", "Reconnects to NATS."),
            resumes: counter(
                "gradestore_log_resumes_total",
                "Consumers recreated to continue reading the log after an interruption.",
            ),
            resends: counter(
                "gradestore_log_resends_total",
                "Batches sent again because they were not acknowledged.",
            ),
            redeliveries: counter(
                "gradestore_log_redeliveries_total",
                "Messages of the log that were delivered again after they had been read.",
            ),
            poisoned: counter(
                "gradestore_log_poisoned_total",
                "Messages of the log that are not a batch and were skipped.",
            ),
            forged_announcements: counter(
                "gradestore_announcements_rejected_total",
                "Announcements ignored because they are not signed with the cluster's password.",
            ),
        }
    }

    pub(crate) fn set_counts(&self, counts: LogCounts) {
        self.reconnects.absolute(counts.reconnects);
        self.resumes.absolute(counts.resumes);
        self.resends.absolute(counts.resends);
        self.redeliveries.absolute(counts.redeliveries);
        self.poisoned.absolute(counts.poisoned);
        self.forged_announcements
            .absolute(counts.forged_announcements);
    }
}

/// Metrics of the current or last restore.
pub(crate) struct RestoreMetrics {
    pub(crate) running: Gauge,
    pub(crate) rows: Gauge,
    pub(crate) bytes: Gauge,
    pub(crate) duration_s: Gauge,
    pub(crate) buffered_batches: Gauge,
    pub(crate) buffered_bytes: Gauge,
}

impl RestoreMetrics {
    fn new() -> Self {
        Self {
            running: gauge(
                "gradestore_restore_running",
                "1 while a backup is being restored, otherwise 0.",
            ),
            rows: gauge(
                "gradestore_restore_rows",
                "Rows read by the current or last restore.",
            ),
            bytes: gauge(
                "gradestore_restore_bytes",
                "Bytes read by the current or last restore.",
            ),
            duration_s: gauge(
                "gradestore_restore_duration_seconds",
                "Duration of the current or last restore.",
            ),
            buffered_batches: gauge(
                "gradestore_restore_buffered_batches",
                "Batches of the log that are buffered while a backup is being restored.",
            ),
            buffered_bytes: gauge(
                "gradestore_restore_buffered_bytes",
                "Approximate memory of the buffered batches.",
            ),
        }
    }
}

/// Metrics of snapshots.
pub(crate) struct SnapshotMetrics {
    pub(crate) failures: Counter,
    age_s: Gauge,
    position: Gauge,
    rows: Gauge,
    bytes: Gauge,
    duration_s: Gauge,
}

impl SnapshotMetrics {
    fn new() -> Self {
        Self {
            failures: counter(
                "gradestore_snapshot_failures_total",
                "Snapshots that could not be written.",
            ),
            age_s: gauge(
                "gradestore_snapshot_age_seconds",
                "Time since the last snapshot was completed; NaN without a snapshot.",
            ),
            position: gauge(
                "gradestore_snapshot_position",
                "Position of the last snapshot.",
            ),
            rows: gauge("gradestore_snapshot_rows", "Rows of the last snapshot."),
            bytes: gauge("gradestore_snapshot_bytes", "Size of the last snapshot."),
            duration_s: gauge(
                "gradestore_snapshot_duration_seconds",
                "Time that writing the last snapshot took.",
            ),
        }
    }

    /// Sets the last snapshot and its age.
    pub(crate) fn set(&self, last: Option<&(SnapshotInfo, Duration)>) {
        let number = |of: fn(&SnapshotInfo) -> f64| last.map_or(0.0, |(written, _)| of(written));
        // An age of 0 would look like a new snapshot.
        let age_s = last.map_or(f64::NAN, |(_, age)| age.as_secs_f64());
        self.age_s.set(age_s);
        self.position
            .set(number(|written| written.head.position as f64));
        self.rows.set(number(|written| written.rows as f64));
        self.bytes.set(number(|written| written.bytes as f64));
        self.duration_s
            .set(number(|written| written.took.as_secs_f64()));
    }
}

/// Metrics of memory and disk.
pub(crate) struct HostMetrics {
    memory_limit: Gauge,
    memory_max: Gauge,
    memory_used: Gauge,
    full: Gauge,
    free: Gauge,
    size: Gauge,
}

impl HostMetrics {
    fn new() -> Self {
        Self {
            memory_limit: gauge(
                "gradestore_memory_limit_bytes",
                "Memory limit of this process: the lowest of the limits of its control groups and its address space, and the memory of the machine.",
            ),
            memory_max: gauge(
                "gradestore_memory_max_bytes",
                "Memory in use above which writes for new users are rejected.",
            ),
            memory_used: gauge(
                "gradestore_memory_used_bytes",
                "Memory in use: resident memory without what deleted records left for new ones.",
            ),
            full: gauge(
                "gradestore_store_full",
                "1 while memory in use is above its limit and writes for new users are rejected, otherwise 0.",
            ),
            free: gauge(
                "gradestore_data_dir_free_bytes",
                "Free space of the data directory's file system; NaN if it is unknown, or without a data directory.",
            ),
            size: gauge(
                "gradestore_data_dir_size_bytes",
                "Size of the data directory's file system; NaN if it is unknown, or without a data directory.",
            ),
        }
    }

    pub(crate) fn set_memory(&self, limit_bytes: u64, memory: MemoryUse) {
        self.memory_limit.set(limit_bytes as f64);
        self.memory_max.set(memory.max_bytes as f64);
        self.memory_used.set(memory.used_bytes as f64);
        self.full.set(f64::from(u8::from(memory.full)));
    }

    /// Sets the space of the data directory; `None` if there is no data directory, or its file system
    /// does not report it.
    pub(crate) fn set_disk(&self, space: Option<DiskSpace>) {
        // 0 would look like a full disk.
        let bytes = |of: fn(DiskSpace) -> u64| space.map_or(f64::NAN, |space| of(space) as f64);
        self.free.set(bytes(|space| space.free));
        self.size.set(bytes(|space| space.size));
    }
}

impl Telemetry {
    /// Registers the metrics of this module with a new recorder. `buckets` are the upper bounds of
    /// other histograms by name; a histogram without bounds would be a summary.
    ///
    /// # Errors
    /// A list of bounds is empty.
    pub fn new(buckets: &[(&str, &[f64])]) -> Result<Self, BuildError> {
        let mut builder = PrometheusBuilder::new();
        for (name, bounds) in buckets.iter().chain(&BUCKETS) {
            let name = Matcher::Full((*name).to_owned());
            builder = builder.set_buckets_for_metric(name, bounds)?;
        }
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, process::describe);
        Ok(Self {
            started: Instant::now(),
            node: metrics::with_local_recorder(&recorder, NodeMetrics::new),
            log: metrics::with_local_recorder(&recorder, LogMetrics::new),
            restore: metrics::with_local_recorder(&recorder, RestoreMetrics::new),
            snapshot: metrics::with_local_recorder(&recorder, SnapshotMetrics::new),
            wal: metrics::with_local_recorder(&recorder, WalMetrics::new),
            host: metrics::with_local_recorder(&recorder, HostMetrics::new),
            replication: metrics::with_local_recorder(&recorder, ReplicationMetrics::new),
            recorder,
            handle,
        })
    }

    /// Runs `register`, whose metrics are then those of this node.
    pub fn register<T>(&self, register: impl FnOnce() -> T) -> T {
        metrics::with_local_recorder(&self.recorder, register)
    }

    /// All metrics, in Prometheus' text format.
    #[must_use]
    pub fn render(&self) -> String {
        self.register(process::collect);
        self.handle.render()
    }

    /// Sorts samples into the histograms, every `UPKEEP_EVERY`; never returns.
    pub async fn upkeep(&self) {
        let mut every = tokio::time::interval(UPKEEP_EVERY);
        loop {
            every.tick().await;
            self.handle.run_upkeep();
        }
    }

    /// Time since the node started.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::backup::{FORMAT, HeadRecord};
    use crate::log::Chain;

    fn value(telemetry: &Telemetry, name: &str) -> f64 {
        let text = telemetry.render();
        let mut lines = text.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap().parse().unwrap()
    }

    #[test]
    fn a_quarantined_snapshot_leaves_the_metrics() {
        let telemetry = Telemetry::new(&[]).unwrap();
        let head = HeadRecord {
            format: FORMAT,
            created_ns: 1_700_000_000_000_000_000,
            log_id: "x".into(),
            position: 7,
            time_ns: 0,
            chain: Chain::default(),
            previous_chain: Chain::default(),
            rows_expected: 5,
            shard_seed: None,
        };
        let written = SnapshotInfo {
            head,
            rows: 5,
            bytes: 99,
            took: Duration::from_secs(2),
            at: SystemTime::UNIX_EPOCH,
        };
        let metrics = [
            ("position", 7.0),
            ("rows", 5.0),
            ("bytes", 99.0),
            ("duration_seconds", 2.0),
            ("age_seconds", 3.0),
        ];
        telemetry
            .snapshot
            .set(Some(&(written, Duration::from_secs(3))));
        for (name, wanted) in metrics {
            let found = value(&telemetry, &format!("gradestore_snapshot_{name}"));
            assert_eq!(found, wanted, "{name}");
        }
        telemetry.snapshot.set(None);
        for (name, _) in metrics {
            let found = value(&telemetry, &format!("gradestore_snapshot_{name}"));
            assert!(found == 0.0 || name == "age_seconds" && found.is_nan());
        }
    }

    #[test]
    fn cpu_time_has_fractions_of_a_second() {
        let telemetry = Telemetry::new(&[]).unwrap();
        let start = Instant::now();
        // The kernel counts hundredths.
        while value(&telemetry, "process_cpu_seconds_total").fract() == 0.0 {
            assert!(start.elapsed() < Duration::from_secs(60));
        }
    }

    #[test]
    fn a_missing_data_directory_does_not_look_like_a_full_disk() {
        let telemetry = Telemetry::new(&[]).unwrap();
        let free = || value(&telemetry, "gradestore_data_dir_free_bytes");
        telemetry.host.set_disk(None);
        assert!(free().is_nan());
        telemetry
            .host
            .set_disk(Some(DiskSpace { free: 0, size: 9 }));
        assert_eq!(free(), 0.0);
    }
}
