//! Metrics of the local copy of a cluster's log.

use metrics::{Counter, Gauge};

use super::register::{counter, gauge};
use crate::log::WalStatus;

/// Set at each scrape, on a node that keeps a copy.
pub(crate) struct WalMetrics {
    first: Gauge,
    last: Gauge,
    bytes: Gauge,
    failures: Counter,
    failing: Gauge,
}

impl WalMetrics {
    pub(super) fn new() -> Self {
        Self {
            first: gauge(
                "gradestore_wal_first",
                "Oldest batch of the WAL without a hole up to the newest one.",
            ),
            last: gauge("gradestore_wal_last", "Newest batch of the WAL."),
            bytes: gauge("gradestore_wal_bytes", "Size of the WAL."),
            failures: counter(
                "gradestore_wal_failures_total",
                "Failed writes of batches to the WAL.",
            ),
            failing: gauge(
                "gradestore_wal_failing",
                "1 if batches cannot be written to the WAL now, otherwise 0.",
            ),
        }
    }

    pub(crate) fn set(&self, wal: &WalStatus) {
        self.first.set(wal.first as f64);
        self.last.set(wal.last as f64);
        self.bytes.set(wal.bytes as f64);
        self.failures.absolute(wal.failures);
        self.failing.set(f64::from(u8::from(wal.failure.is_some())));
    }
}
