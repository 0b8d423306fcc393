//! Writes snapshots while the node runs, and lets the log forget what they make superfluous.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::Applied;
use crate::backup::{FORMAT, Head, Snapshots, Written};
use crate::blocking::Blocking;
use crate::log::{Log, Seq};
use crate::readiness::Readiness;
use crate::store::Store;

/// Writes snapshots of one store. Clones are the same.
#[derive(Clone)]
pub struct Snapshotter {
    /// The records.
    pub store: Store,
    /// How far they have come.
    pub applied: Applied,
    /// The log they come from.
    pub log: Arc<dyn Log>,
    /// Where snapshots go.
    pub snapshots: Snapshots,
    /// What was written last.
    pub last: LastSnapshot,
    /// Held while one is written: two at one position would write the same file.
    pub writing: Arc<tokio::sync::Mutex<()>>,
    /// Where they are written.
    pub blocking: Blocking,
}

/// The last snapshot that this process wrote or started from. Clones are the same.
#[derive(Clone, Default)]
pub struct LastSnapshot(Arc<Mutex<State>>);

#[derive(Clone, Default)]
struct State {
    written: Option<Written>,
    failures: u64,
}

/// What a backup that begins now says first. The position is taken before the scan: what that sees
/// beyond it, replay repairs.
#[must_use]
pub fn backup_head(store: &Store, applied: &Applied, log: &dyn Log) -> Head {
    let position = applied.position();
    Head {
        format: FORMAT,
        log_id: log.id().0,
        position: position.seq,
        time_ns: position.time_ns,
        chain: position.chain,
        previous_chain: position.previous,
        rows_expected: store.len() as u64,
    }
}

impl LastSnapshot {
    /// What was written and how long ago.
    #[must_use]
    pub fn written(&self) -> Option<(Written, Duration)> {
        let written = self.0.lock().written.clone()?;
        let age = written.at.elapsed().unwrap_or_default();
        Some((written, age))
    }

    /// This one is the last.
    pub fn set(&self, written: Written) {
        self.0.lock().written = Some(written);
    }

    /// How many could not be written since the start.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.0.lock().failures
    }
}

impl Snapshotter {
    /// Writes one every `interval` until `stop`, while reads are whole.
    pub async fn run(self, interval: Duration, readiness: Readiness, stop: CancellationToken) {
        let mut every = tokio::time::interval(interval);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // The first tick is at once.
        every.tick().await;
        while stop.run_until_cancelled(every.tick()).await.is_some() {
            // In this order: a store that is cleared after it was ready has another epoch.
            let epoch = self.store.epoch();
            if readiness.check().is_ok() {
                self.write_if_changed(epoch).await;
            }
        }
    }

    /// Writes one, unless nothing has been applied since the last, or the store is no longer that of
    /// `epoch` when it has been read.
    pub async fn write_if_changed(&self, epoch: u64) {
        let _alone = self.writing.lock().await;
        let position = self.applied.position();
        let snapshots = self.snapshots.clone();
        let found = self.blocking.run(move || snapshots.list()).await.flatten();
        let newest = found.ok().and_then(|found| found.first().cloned());
        if newest.map_or(0, |(seq, _)| seq) >= position.seq {
            return;
        }
        // Logged and counted; the log still holds everything.
        let _ = self.write_alone(epoch).await;
    }

    /// Writes one now and trims the log behind the one before it. A failure is logged and counted,
    /// too.
    ///
    /// # Errors
    /// The disk refused.
    pub async fn write(&self) -> io::Result<()> {
        let _alone = self.writing.lock().await;
        self.write_alone(self.store.epoch()).await
    }

    /// Quarantines all of them; one that is being written now is not kept either.
    pub(super) async fn quarantine_all(&self, why: &str) {
        let _alone = self.writing.lock().await;
        self.snapshots.quarantine_all(why);
        self.last.0.lock().written = None;
    }

    async fn write_alone(&self, epoch: u64) -> io::Result<()> {
        let this = self.clone();
        let written = self.blocking.run(move || this.write_blocking(epoch));
        match written.await.flatten() {
            Ok((written, trim_through)) => {
                let took_ms = written.took.as_millis() as u64;
                let (position, rows, bytes) = (written.head.position, written.rows, written.bytes);
                tracing::info!(position, rows, bytes, took_ms, "snapshot written");
                self.last.set(written);
                if let Some(through) = trim_through
                    && let Err(error) = self.log.trim(through).await
                {
                    tracing::warn!(through, %error, "log not trimmed");
                }
                Ok(())
            }
            Err(error) => {
                self.last.0.lock().failures += 1;
                tracing::error!(%error, "snapshot not written");
                Err(error)
            }
        }
    }

    fn write_blocking(&self, epoch: u64) -> io::Result<(Written, Option<Seq>)> {
        let head = backup_head(&self.store, &self.applied, &*self.log);
        let end = || match self.store.epoch() == epoch {
            true => Ok(self.applied.position()),
            false => Err(io::Error::other("the state was replaced meanwhile")),
        };
        let written = self.snapshots.write(&self.store, head, end)?;
        Ok((written, self.snapshots.prune()?))
    }
}
