//! Seeds a new log from a backup.

use std::fs;
use std::path::Path;

use super::AppliedIndex;
use super::bootstrap::BootstrapError;
use super::tracker::RestoreTracker;
use crate::backup::{self, Snapshots};
use crate::log::{Log, Position};
use crate::store::Store;

/// Restores `store` from the backup at `path`. `log` is new and begins after the backup's end, so
/// that clients never see a `Grade-Position` go back. Blocks.
///
/// # Errors
/// The log holds batches, there are snapshots, or the file cannot be restored. The store is empty
/// then.
pub fn restore_seed(
    path: &Path,
    store: &Store,
    applied: &AppliedIndex,
    log: &dyn Log,
    snapshots: Option<&Snapshots>,
    tracker: &RestoreTracker,
) -> Result<(), BootstrapError> {
    let snapshots = snapshots.map_or(Ok(Vec::new()), Snapshots::list)?;
    if log.first() <= log.end() || !snapshots.is_empty() {
        return Err(BootstrapError::NotEmpty);
    }
    let bytes_total = fs::metadata(path).map_or(0, |metadata| metadata.len());
    let tracked = tracker.begin(&path.display().to_string(), bytes_total);
    let restored = backup::restore_file(path, store, &tracked.progress);
    tracker.end(restored.as_ref().ok());
    let summary = restored.map_err(|error| BootstrapError::Seed {
        path: path.to_owned(),
        error,
    })?;
    let head = summary.records.map(|(head, _)| head);
    let time_ns = head.map_or(applied.base().time_ns, |head| head.time_ns);
    applied.restored(Position::base(&log.id(), log.end(), time_ns));
    Ok(())
}
