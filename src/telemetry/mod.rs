//! Logs and metrics. Metric handles are made once, here or by the room they belong to, and kept.

mod describe;

use std::str::FromStr;
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::backup::SnapshotInfo;
use crate::log::LogCounts;
use crate::replication::CheckpointMetrics;
use crate::replication::memory::MemoryUse;
use crate::sys::host::Room;

/// How often samples are folded into the recorder's histograms. Between two folds each is kept, so this and
/// the rate of batches bound that memory, scraped or not.
pub const UPKEEP_EVERY: Duration = Duration::from_secs(1);

/// Writes a batch: 1 is a lone writer, 1,024 the largest batch.
const BATCH_BUCKETS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0,
];
const BATCH_METRIC: &str = "gradestore_batch_patches";

/// From a log in memory, tens of microseconds, over a disk's or a broker's milliseconds to the 5 s
/// after which a write is given up.
const BATCH_BUCKETS_S: &[f64] = &[
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0,
];
const BATCH_DURATION_METRIC: &str = "gradestore_batch_duration_seconds";

/// The histograms that are made here.
const OWN_BUCKETS: [(&str, &[f64]); 2] = [
    (BATCH_METRIC, BATCH_BUCKETS),
    (BATCH_DURATION_METRIC, BATCH_BUCKETS_S),
];

/// One node's metrics: a recorder of its own, so that several nodes fit in one process.
pub struct Telemetry {
    started: Instant,
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    process: metrics_process::Collector,
    /// Set at a scrape.
    pub gauges: Gauges,
    /// Set at a scrape.
    pub recovery: Recovery,
    /// Set at a scrape.
    pub machine: Machine,
    /// Set at a scrape.
    pub log: LogMetrics,
    /// Counted as it happens.
    pub replication: Replication,
}

/// What becomes of batches, and of the state.
pub struct Replication {
    /// Writes a batch that this process sent.
    pub batch_patches: Histogram,
    /// Time from a batch's being sent until it has come back and is applied.
    pub batch_duration: Histogram,
    /// Patches applied, own and others'.
    pub patches_applied: Counter,
    /// Deletions applied, own and others'.
    pub deletions_applied: Counter,
    /// Times that the log lacked the batch after the last one applied.
    pub gaps: Counter,
    /// States made anew because the log went on without them.
    pub resyncs: Counter,
    /// What was heard of the peers' states.
    pub checkpoints: CheckpointMetrics,
}

impl Replication {
    fn new() -> Self {
        Self {
            batch_patches: histogram!(BATCH_METRIC),
            batch_duration: histogram!(BATCH_DURATION_METRIC),
            patches_applied: counter!("gradestore_patches_applied_total"),
            deletions_applied: counter!("gradestore_deletions_applied_total"),
            gaps: counter!("gradestore_log_gaps_total"),
            resyncs: counter!("gradestore_resyncs_total"),
            checkpoints: CheckpointMetrics {
                compared: counter!("gradestore_checkpoints_compared_total"),
                divergences: counter!("gradestore_divergences_total"),
                rejected: counter!("gradestore_votes_rejected_total"),
            },
        }
    }
}

/// Gauges whose value is asked for at a scrape.
pub struct Gauges {
    /// Records in the store.
    pub records: Gauge,
    /// The last batch applied.
    pub position: Gauge,
    /// The log's last batch.
    pub log_end: Gauge,
    /// Requests that wait for a batch.
    pub queue_patches: Gauge,
    /// 1 while reads are answered.
    pub ready: Gauge,
    /// Other replicas that answered when they were last asked.
    pub peers: Gauge,
    /// Those among them that are ready.
    pub peers_ready: Gauge,
}

/// What happened to the log, for those of its kinds to which anything can.
pub struct LogMetrics {
    /// Batches that the log has and this replica has not applied.
    pub lag_batches: Gauge,
    /// Age of the last batch applied while the log has newer ones.
    pub lag_s: Gauge,
    /// Connections made anew.
    pub reconnects: Counter,
    /// Times that reading was taken up again.
    pub resumes: Counter,
    /// Batches sent again.
    pub resends: Counter,
    /// Messages that came again.
    pub redeliveries: Counter,
    /// Messages that are no batch.
    pub poisoned: Counter,
    /// Announcements that were not signed with the cluster's key.
    pub forged_announcements: Counter,
}

impl LogMetrics {
    fn new() -> Self {
        Self {
            lag_batches: gauge!("gradestore_log_lag_batches"),
            lag_s: gauge!("gradestore_log_lag_seconds"),
            reconnects: counter!("gradestore_log_reconnects_total"),
            resumes: counter!("gradestore_log_resumes_total"),
            resends: counter!("gradestore_log_resends_total"),
            redeliveries: counter!("gradestore_log_redeliveries_total"),
            poisoned: counter!("gradestore_log_poisoned_total"),
            forged_announcements: counter!("gradestore_announcements_rejected_total"),
        }
    }

    /// Takes over what the log has counted.
    pub fn count(&self, counts: LogCounts) {
        self.reconnects.absolute(counts.reconnects);
        self.resumes.absolute(counts.resumes);
        self.resends.absolute(counts.resends);
        self.redeliveries.absolute(counts.redeliveries);
        self.poisoned.absolute(counts.poisoned);
        self.forged_announcements
            .absolute(counts.forged_announcements);
    }
}

impl Gauges {
    fn new() -> Self {
        Self {
            records: gauge!("gradestore_records"),
            position: gauge!("gradestore_log_position"),
            log_end: gauge!("gradestore_log_end"),
            queue_patches: gauge!("gradestore_write_queue_patches"),
            ready: gauge!("gradestore_ready"),
            peers: gauge!("gradestore_peers"),
            peers_ready: gauge!("gradestore_peers_ready"),
        }
    }
}

/// Log, restore and snapshots.
pub struct Recovery {
    /// The oldest batch that the log holds.
    pub log_first: Gauge,
    /// 1 while the log takes batches.
    pub writable: Gauge,
    /// 1 while a restore runs.
    pub restoring: Gauge,
    /// Rows restored.
    pub restore_rows: Gauge,
    /// Bytes of the backup read.
    pub restore_bytes: Gauge,
    /// Seconds that it took so far.
    pub restore_duration_s: Gauge,
    /// Batches read ahead meanwhile.
    pub buffered_batches: Gauge,
    /// About what they take.
    pub buffered_bytes: Gauge,
    /// Snapshots that could not be written.
    pub snapshot_failures: Counter,
    /// Seconds since the last one was finished.
    pub snapshot_age_s: Gauge,
    /// Its position.
    pub snapshot_position: Gauge,
    /// Its rows.
    pub snapshot_rows: Gauge,
    /// Its size.
    pub snapshot_bytes: Gauge,
    /// Seconds that it took.
    pub snapshot_duration_s: Gauge,
}

impl Recovery {
    fn new() -> Self {
        Self {
            log_first: gauge!("gradestore_log_first"),
            writable: gauge!("gradestore_log_writable"),
            restoring: gauge!("gradestore_restore_running"),
            restore_rows: gauge!("gradestore_restore_rows"),
            restore_bytes: gauge!("gradestore_restore_bytes"),
            restore_duration_s: gauge!("gradestore_restore_duration_seconds"),
            buffered_batches: gauge!("gradestore_restore_buffered_batches"),
            buffered_bytes: gauge!("gradestore_restore_buffered_bytes"),
            snapshot_failures: counter!("gradestore_snapshot_failures_total"),
            snapshot_age_s: gauge!("gradestore_snapshot_age_seconds"),
            snapshot_position: gauge!("gradestore_snapshot_position"),
            snapshot_rows: gauge!("gradestore_snapshot_rows"),
            snapshot_bytes: gauge!("gradestore_snapshot_bytes"),
            snapshot_duration_s: gauge!("gradestore_snapshot_duration_seconds"),
        }
    }

    /// Takes over what is known of the last snapshot and how long ago it was finished.
    pub fn set_snapshot(&self, last: Option<&(SnapshotInfo, Duration)>) {
        let number = |of: fn(&SnapshotInfo) -> f64| last.map_or(0.0, |(written, _)| of(written));
        // An age of 0 would look like one that was just written.
        let age_s = last.map_or(f64::NAN, |(_, age)| age.as_secs_f64());
        self.snapshot_age_s.set(age_s);
        self.snapshot_position
            .set(number(|written| written.head.position as f64));
        self.snapshot_rows
            .set(number(|written| written.rows as f64));
        self.snapshot_bytes
            .set(number(|written| written.bytes as f64));
        self.snapshot_duration_s
            .set(number(|written| written.took.as_secs_f64()));
    }
}

/// What the machine gives the process.
pub struct Machine {
    memory_limit: Gauge,
    memory_max: Gauge,
    memory_used: Gauge,
    full: Gauge,
    free: Gauge,
    size: Gauge,
}

impl Machine {
    fn new() -> Self {
        Self {
            memory_limit: gauge!("gradestore_memory_limit_bytes"),
            memory_max: gauge!("gradestore_memory_max_bytes"),
            memory_used: gauge!("gradestore_memory_used_bytes"),
            full: gauge!("gradestore_store_full"),
            free: gauge!("gradestore_data_dir_free_bytes"),
            size: gauge!("gradestore_data_dir_size_bytes"),
        }
    }

    /// Takes over what is in use.
    pub fn set_use(&self, memory: MemoryUse) {
        self.memory_max.set(memory.max_bytes as f64);
        self.memory_used.set(memory.used_bytes as f64);
        self.full.set(f64::from(u8::from(memory.full)));
    }

    /// Takes over what was found; no room where there is no data directory, or none that answers.
    pub fn set(&self, memory_limit: u64, room: Option<Room>) {
        self.memory_limit.set(memory_limit as f64);
        // 0 would look like a disk that is full.
        let bytes = |of: fn(Room) -> u64| room.map_or(f64::NAN, |room| of(room) as f64);
        self.free.set(bytes(|room| room.free));
        self.size.set(bytes(|room| room.size));
    }
}

impl Telemetry {
    /// A recorder. `buckets` are the upper bounds of histograms by name, beside those that are made
    /// here; a histogram without bounds would be a summary.
    ///
    /// # Errors
    /// A list of bounds is empty.
    pub fn new(buckets: &[(&str, &[f64])]) -> Result<Self, BuildError> {
        let mut builder = PrometheusBuilder::new();
        for (name, bounds) in buckets.iter().chain(&OWN_BUCKETS) {
            let name = Matcher::Full((*name).to_owned());
            builder = builder.set_buckets_for_metric(name, bounds)?;
        }
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        let process = metrics_process::Collector::default();
        let (gauges, recovery, machine, log) = metrics::with_local_recorder(&recorder, || {
            describe::describe();
            process.describe();
            gauge!("gradestore_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
            (
                Gauges::new(),
                Recovery::new(),
                Machine::new(),
                LogMetrics::new(),
            )
        });
        let replication = metrics::with_local_recorder(&recorder, Replication::new);
        Ok(Self {
            started: Instant::now(),
            recorder,
            handle,
            process,
            gauges,
            recovery,
            machine,
            log,
            replication,
        })
    }

    /// Runs `make`, whose metric handles belong to this node then.
    pub fn register<T>(&self, make: impl FnOnce() -> T) -> T {
        metrics::with_local_recorder(&self.recorder, make)
    }

    /// Everything measured, in Prometheus' text format.
    #[must_use]
    pub fn render(&self) -> String {
        self.register(|| self.process.collect());
        self.handle.render()
    }

    /// Folds samples into the histograms, for ever; call it in a task of its own.
    pub async fn upkeep(&self) {
        let mut every = tokio::time::interval(UPKEEP_EVERY);
        loop {
            every.tick().await;
            self.handle.run_upkeep();
        }
    }

    /// For how long this has been there.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }
}

/// The NATS client tells of each connection what the log tells as well.
fn by_default() -> Targets {
    use tracing::Level;
    let targets = Targets::new().with_default(Level::INFO);
    targets.with_target("async_nats", Level::WARN)
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line, for programs
    Json,
}

/// Sends log lines to standard error, from `info` up or as `RUST_LOG` says
/// (`RUST_LOG=gradestore=debug`).
pub fn init_logs(format: LogFormat) {
    let wanted = std::env::var("RUST_LOG").unwrap_or_default();
    let targets = match wanted.is_empty() {
        true => Ok(by_default()),
        false => Targets::from_str(&wanted),
    };
    let (targets, wrong) = match targets {
        Ok(targets) => (targets, None),
        Err(error) => (by_default(), Some(error)),
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Text => lines
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .boxed(),
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .boxed(),
    };
    tracing_subscriber::registry()
        .with(lines)
        .with(targets)
        .init();
    if let Some(error) = wrong {
        tracing::warn!(value = wanted, %error, "RUST_LOG not understood, logging from info up");
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
    fn a_snapshot_that_is_set_aside_is_told_of_no_more() {
        let telemetry = Telemetry::new(&[]).unwrap();
        let head = HeadRecord {
            format: FORMAT,
            log_id: "x".into(),
            position: 7,
            time_ns: 0,
            chain: Chain::default(),
            previous_chain: Chain::default(),
            rows_expected: 5,
        };
        let written = SnapshotInfo {
            head,
            rows: 5,
            bytes: 99,
            took: Duration::from_secs(2),
            at: SystemTime::UNIX_EPOCH,
        };
        let named = [
            ("position", 7.0),
            ("rows", 5.0),
            ("bytes", 99.0),
            ("duration_seconds", 2.0),
            ("age_seconds", 3.0),
        ];
        let recovery = &telemetry.recovery;
        recovery.set_snapshot(Some(&(written, Duration::from_secs(3))));
        for (name, wanted) in named {
            let found = value(&telemetry, &format!("gradestore_snapshot_{name}"));
            assert_eq!(found, wanted, "{name}");
        }
        recovery.set_snapshot(None);
        for (name, _) in named {
            let found = value(&telemetry, &format!("gradestore_snapshot_{name}"));
            assert!(found == 0.0 || name == "age_seconds" && found.is_nan());
        }
    }

    #[test]
    fn cpu_time_is_told_in_parts_of_a_second() {
        let telemetry = Telemetry::new(&[]).unwrap();
        let begun = Instant::now();
        // The kernel counts hundredths.
        let in_between = || value(&telemetry, "process_cpu_seconds_total").fract() != 0.0;
        while !in_between() {
            assert!(begun.elapsed() < Duration::from_secs(60));
        }
    }

    #[test]
    fn no_data_directory_is_not_a_full_one() {
        let telemetry = Telemetry::new(&[]).unwrap();
        let free = || value(&telemetry, "gradestore_data_dir_free_bytes");
        telemetry.machine.set(1, None);
        assert!(free().is_nan());
        telemetry.machine.set(1, Some(Room { free: 0, size: 9 }));
        assert_eq!(free(), 0.0);
    }
}
