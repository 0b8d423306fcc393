//! Writes snapshots while the node runs, and trims the batches from the log that they make
//! redundant.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::{AppliedIndex, CompleteState};
use crate::backup::{FORMAT, HeadRecord, SnapshotInfo, Snapshots};
use crate::log::{Log, Seq, now_ns};
use crate::replication::state::Readiness;
use crate::store::Store;
use crate::sys::exec::Blocking;

/// Writes snapshots of one store. Clones share the state.
#[derive(Clone)]
pub struct Snapshotter {
    /// The records.
    pub store: Store,
    /// The position of the records.
    pub applied: AppliedIndex,
    /// The log they come from.
    pub log: Arc<dyn Log>,
    /// The snapshots on disk.
    pub snapshots: Snapshots,
    /// The last snapshot.
    pub last: LastSnapshot,
    /// Held while a snapshot is written: two at one position would write the same file.
    pub writing: Arc<tokio::sync::Mutex<()>>,
    /// The threads that write them.
    pub blocking: Blocking,
}

/// The last snapshot that this process wrote or started from. Clones share it.
#[derive(Clone, Default)]
pub struct LastSnapshot(Arc<Mutex<LastSnapshotState>>);

#[derive(Clone, Default)]
struct LastSnapshotState {
    written: Option<SnapshotInfo>,
    failures: u64,
}

/// The head of a backup of `state` that begins now. Its position is taken before the scan:
/// replaying the log from there overwrites the later effects that the scan sees.
#[must_use]
pub fn backup_head(state: &CompleteState, applied: &AppliedIndex, log: &dyn Log) -> HeadRecord {
    let position = applied.position();
    HeadRecord {
        format: FORMAT,
        created_ns: now_ns(),
        log_id: log.id().0,
        position: position.seq,
        time_ns: position.time_ns,
        chain: position.chain,
        previous_chain: position.previous,
        rows_expected: state.store().len() as u64,
        shard_seed: Some(state.store().shard_seed()),
    }
}

impl LastSnapshot {
    /// The last snapshot and its age.
    #[must_use]
    pub fn written(&self) -> Option<(SnapshotInfo, Duration)> {
        let written = self.0.lock().written.clone()?;
        let age = written.at.elapsed().unwrap_or_default();
        Some((written, age))
    }

    /// Sets the last snapshot.
    pub fn set(&self, written: SnapshotInfo) {
        self.0.lock().written = Some(written);
    }

    /// How many snapshots have failed since the start.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.0.lock().failures
    }
}

impl Snapshotter {
    /// Writes a snapshot every `interval` until `stop`, if the replica is ready.
    pub async fn run(self, interval: Duration, readiness: Readiness, stop: CancellationToken) {
        let mut every = tokio::time::interval(interval);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // The first tick completes at once.
        every.tick().await;
        while stop.run_until_cancelled(every.tick()).await.is_some() {
            if let Ok(state) = CompleteState::of(&self.store, &readiness) {
                self.write_if_changed(state).await;
            }
        }
    }

    /// Writes a snapshot of `state`, unless nothing has been applied since the last one.
    pub async fn write_if_changed(&self, state: CompleteState) {
        let _alone = self.writing.lock().await;
        let position = self.applied.position();
        let snapshots = self.snapshots.clone();
        let found = self.blocking.run(move || snapshots.list()).await.flatten();
        let newest = found.ok().and_then(|found| found.first().cloned());
        if newest.map_or(0, |(seq, _)| seq) >= position.seq {
            return;
        }
        // Logged and counted; the log still holds everything.
        let _ = self.write_alone(state).await;
    }

    /// Writes a snapshot of `state` now and trims the log up to the older one that is kept. A
    /// failure is also logged and counted.
    ///
    /// # Errors
    /// The snapshot could not be written.
    pub async fn write(&self, state: CompleteState) -> io::Result<()> {
        let _alone = self.writing.lock().await;
        self.write_alone(state).await
    }

    /// Quarantines all snapshots, including one that is being written now.
    pub(super) async fn quarantine_all(&self, why: &str) {
        let _alone = self.writing.lock().await;
        self.snapshots.quarantine_all(why);
        self.last.0.lock().written = None;
    }

    /// Fails if `state` is replaced before the end of the scan.
    async fn write_alone(&self, state: CompleteState) -> io::Result<()> {
        match self.write_and_prune(&state).await {
            Ok((written, trim_through)) => {
                let took_ms = written.took.as_millis() as u64;
                let (position, rows, bytes) = (written.head.position, written.rows, written.bytes);
                tracing::info!(position, rows, bytes, took_ms, "snapshot written");
                self.last.set(written);
                if let Some(through) = trim_through
                    && let Err(error) = self.log.trim(through).await
                {
                    tracing::warn!(through, %error, "cannot trim the log");
                }
                Ok(())
            }
            Err(error) => {
                self.last.0.lock().failures += 1;
                tracing::error!(%error, "cannot write a snapshot");
                Err(error)
            }
        }
    }

    async fn write_and_prune(
        &self,
        state: &CompleteState,
    ) -> io::Result<(SnapshotInfo, Option<Seq>)> {
        // A copy that ends before the snapshot could not be continued from it.
        self.log.sync_wal().await;
        let head = backup_head(state, &self.applied, &*self.log);
        let end = || {
            state.check().map_err(io::Error::other)?;
            Ok(self.applied.position())
        };
        let pool = &self.blocking;
        let written = self.snapshots.write(state.store(), head, end, pool).await?;
        let snapshots = self.snapshots.clone();
        let trim_through = pool.run(move || snapshots.prune()).await.flatten()?;
        Ok((written, trim_through))
    }
}
