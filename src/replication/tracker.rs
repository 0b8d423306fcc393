//! Tracks the progress of a restore.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::buffered::BufferCounts;
use crate::backup::{ReadProgress, Summary};

/// The current or last restore, for `/status` and metrics. Clones share it.
#[derive(Clone, Default)]
pub struct RestoreTracker(Arc<Mutex<Option<Restore>>>);

/// One restore.
#[derive(Clone)]
pub struct Restore {
    /// The file or the peer's URL.
    pub source: Arc<str>,
    /// Its size in bytes; 0 while that is not known.
    pub bytes_total: u64,
    /// Its progress.
    pub progress: Arc<ReadProgress>,
    /// The part of the log that was read ahead.
    pub buffer: Arc<BufferCounts>,
    /// When it started.
    pub started: Instant,
    /// How long it took, once it has ended.
    pub took: Option<Duration>,
    /// Its stage.
    pub stage: Stage,
}

/// The stage of a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Rows are being read.
    Restoring,
    /// The rows are restored, and the log is being applied up to its end.
    CatchingUp,
    /// The log's end is applied.
    Done,
    /// It failed.
    Failed,
}

impl Stage {
    /// The stage in one word.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Restoring => "restoring",
            Self::CatchingUp => "catching-up",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }
}

impl Restore {
    /// How long it has run, or took.
    #[must_use]
    pub fn duration(&self) -> Duration {
        self.took.unwrap_or_else(|| self.started.elapsed())
    }

    /// Rows per second.
    #[must_use]
    pub fn rows_per_s(&self) -> f64 {
        self.progress.rows() as f64 / self.duration().as_secs_f64().max(0.001)
    }

    /// The estimated time that is left; `None` while it is unknown. A peer may send any number of
    /// expected rows.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        let (rows, expected) = (self.progress.rows(), self.progress.rows_expected());
        if self.took.is_some() {
            return Some(Duration::ZERO);
        }
        let left = expected.saturating_sub(rows) as f64 / self.rows_per_s();
        match rows > 0 && expected > 0 {
            true => Duration::try_from_secs_f64(left).ok(),
            false => None,
        }
    }
}

impl RestoreTracker {
    /// The current restore, or the last one.
    #[must_use]
    pub fn current(&self) -> Option<Restore> {
        self.0.lock().clone()
    }

    pub(super) fn begin(&self, source: &str, bytes_total: u64) -> Restore {
        let restore = Restore {
            source: source.into(),
            bytes_total,
            progress: Arc::default(),
            buffer: Arc::default(),
            started: Instant::now(),
            took: None,
            stage: Stage::Restoring,
        };
        *self.0.lock() = Some(restore.clone());
        tracing::info!(source, bytes_total, "restore started");
        restore
    }

    pub(super) fn end(&self, summary: Option<&Summary>) {
        let mut current = self.0.lock();
        let Some(restore) = current.as_mut() else {
            return;
        };
        let took = restore.started.elapsed();
        restore.took = Some(took);
        restore.stage = Stage::Failed;
        if let Some(summary) = summary {
            restore.stage = Stage::CatchingUp;
            let (rows, bytes) = (summary.rows, summary.bytes);
            let took_ms = took.as_millis() as u64;
            let buffered_batches = restore.buffer.batches();
            tracing::info!(rows, bytes, took_ms, buffered_batches, "restore finished");
        }
    }

    /// Called when the log's end is applied.
    pub(super) fn done(&self) {
        if let Some(restore) = self.0.lock().as_mut()
            && restore.stage == Stage::CatchingUp
        {
            restore.stage = Stage::Done;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::{self, BackupWriter, ChunkSource, FORMAT, HeadRecord};
    use crate::grade::{Changes, Patch};
    use crate::log::Chain;
    use crate::store::Store;

    #[test]
    fn the_remaining_time_is_unknown_if_a_file_claims_too_many_rows() {
        let store = Store::new();
        store.apply(&Patch {
            user_id: "a",
            changes: Changes::default(),
        });
        let remaining = |rows_expected| {
            let head = HeadRecord {
                format: FORMAT,
                log_id: "x".into(),
                position: 1,
                time_ns: 0,
                created_ns: 0,
                chain: Chain::default(),
                previous_chain: Chain::default(),
                rows_expected,
                shard_seed: None,
            };
            let (mut writer, mut file) = BackupWriter::start(&head);
            let source = ChunkSource::new(&store);
            while let Some(chunk) = source.next() {
                writer.add(&chunk);
                file.extend_from_slice(&chunk.bytes);
            }
            file.extend_from_slice(&writer.end(&head.position()));
            let tracker = RestoreTracker::default();
            let mut restore = tracker.begin("x", 0);
            backup::restore(&*file, &Store::new(), &restore.progress).unwrap();
            restore.started -= Duration::from_secs(10);
            restore.remaining()
        };
        let of_eleven = remaining(11).unwrap().as_secs_f64();
        assert!((100.0..101.0).contains(&of_eleven), "{of_eleven}");
        assert_eq!(remaining(u64::MAX), None);
    }
}
