//! From nothing to a position: what a node does before it reads its log.
//!
//! 1. the newest snapshot that is whole and whose position the log still covers; else
//! 2. the whole log, if it still begins at its first batch; else
//! 3. nothing: the node stays unready and says why.
//!
//! Nobody sees the store meanwhile: the node is unready until the log has been read to the end that
//! it had when it was asked.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;

use super::{Applied, Position};
use crate::backup::{BackupError, Progress, Snapshots, Summary, Written, restore_file};
use crate::log::{Log, Seq};
use crate::store::Store;

/// Why a node can't get to a position by itself.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// The data directory can't be read.
    #[error("cannot read the snapshots: {0}")]
    Snapshots(#[from] std::io::Error),
    /// No snapshot fits and the log is not whole.
    #[error(
        "no snapshot can be used and the log begins at batch {first}, not at its first one; \
         put a good snapshot back, or start with an empty data directory and --restore-from"
    )]
    NoSource {
        /// The oldest batch that the log holds.
        first: Seq,
    },
    /// The snapshots were made from another log.
    #[error(
        "the snapshots belong to log {found}, the log here is {here}; put the right log back, or \
         start with an empty data directory and --restore-from"
    )]
    OtherLog {
        /// Whose they are.
        found: Box<str>,
        /// What is there.
        here: Box<str>,
    },
    /// A snapshot holds batches that the log does not have, though every batch is in the log before
    /// it is applied. Beginning without them would lose answered writes in silence.
    #[error(
        "snapshot {path} is at batch {position} and the log ends at batch {end}: it has lost \
         batches, or is another log; put the right log back, or start with an empty data directory \
         and --restore-from {path}"
    )]
    LogBehind {
        /// The snapshot.
        path: PathBuf,
        /// Its position.
        position: Seq,
        /// The log's last batch.
        end: Seq,
    },
    /// A backup was to seed a log that is not empty.
    #[error(
        "--restore-from seeds an empty log only, and this one has been written to; use an empty \
         --data-dir, or leave --restore-from out"
    )]
    NotEmpty,
    /// The backup to seed from is no good.
    #[error("cannot restore from {path}: {error}")]
    Seed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: BackupError,
    },
}

/// What is being restored, or was; for `/status` and metrics. Clones are the same.
#[derive(Clone, Default)]
pub struct RestoreTracker(Arc<Mutex<Option<Restore>>>);

/// One restore.
#[derive(Clone)]
pub struct Restore {
    /// The file.
    pub source: PathBuf,
    /// Its size in bytes.
    pub bytes_total: u64,
    /// How far it has come.
    pub progress: Arc<Progress>,
    /// When it began.
    pub begun: Instant,
    /// How long it took, once it has ended.
    pub took: Option<Duration>,
}

impl RestoreTracker {
    /// The restore that runs, or the last one.
    #[must_use]
    pub fn current(&self) -> Option<Restore> {
        self.0.lock().clone()
    }

    fn run(&self, path: &Path, store: &Store) -> Result<Summary, BackupError> {
        let progress = Arc::new(Progress::default());
        *self.0.lock() = Some(Restore {
            source: path.to_owned(),
            bytes_total: fs::metadata(path).map_or(0, |metadata| metadata.len()),
            progress: Arc::clone(&progress),
            begun: Instant::now(),
            took: None,
        });
        tracing::info!(path = %path.display(), "restoring");
        let restored = restore_file(path, store, &progress);
        if let Some(restore) = self.0.lock().as_mut() {
            let took = restore.begun.elapsed();
            restore.took = Some(took);
            if let Ok(summary) = &restored {
                let took_ms = took.as_millis() as u64;
                tracing::info!(
                    rows = summary.rows,
                    bytes = summary.bytes,
                    took_ms,
                    "restored"
                );
            }
        }
        restored
    }
}

/// Fills `store` from the newest snapshot that fits `log`, or leaves it empty for the whole log to
/// be read. Returns the snapshot that was used. Blocks.
///
/// # Errors
/// Neither is possible.
pub fn restore_local(
    store: &Store,
    applied: &Applied,
    log: &dyn Log,
    snapshots: Option<&Snapshots>,
    tracker: &RestoreTracker,
) -> Result<Option<Written>, BootstrapError> {
    let mut other_log = None;
    for (position, path) in snapshots.map_or(Ok(Vec::new()), Snapshots::list)? {
        let (first, end) = (log.first(), log.end());
        if position > end {
            return Err(BootstrapError::LogBehind {
                path,
                position,
                end,
            });
        }
        if position + 1 < first {
            tracing::warn!(path = %path.display(), first, "snapshot not covered by the log");
            continue;
        }
        match tracker.run(&path, store) {
            Ok(summary) => {
                let (rows, bytes) = (summary.rows, summary.bytes);
                let head = summary.records.map(|(head, _)| head);
                if let Some(head) = head.as_ref().filter(|head| head.log_id == log.id().0) {
                    applied.restored(Position {
                        seq: head.position,
                        time_ns: head.time_ns,
                    });
                    return Ok(Some(Written {
                        head: head.clone(),
                        rows,
                        bytes,
                        took: Duration::ZERO,
                        at: modified(&path),
                    }));
                }
                store.clear();
                tracing::warn!(path = %path.display(), "snapshot of another log");
                other_log = Some(head.map(|head| head.log_id).unwrap_or_default());
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "snapshot refused");
                set_aside(&path, &error);
            }
        }
    }
    match (other_log, log.first()) {
        (Some(found), _) => Err(BootstrapError::OtherLog {
            found,
            here: log.id().0,
        }),
        (None, 1) => Ok(None),
        (None, first) => Err(BootstrapError::NoSource { first }),
    }
}

/// Fills `store` from the backup at `path`; `log` is new and begins where the backup ends, so that a
/// client's `Grade-Position` never goes back. Blocks.
///
/// # Errors
/// The log or the snapshots are not new, or the file is no whole backup. The store is empty then.
pub fn restore_seed(
    path: &Path,
    store: &Store,
    applied: &Applied,
    log: &dyn Log,
    snapshots: Option<&Snapshots>,
    tracker: &RestoreTracker,
) -> Result<(), BootstrapError> {
    let snapshots = snapshots.map_or(Ok(Vec::new()), Snapshots::list)?;
    if log.first() <= log.end() || !snapshots.is_empty() {
        return Err(BootstrapError::NotEmpty);
    }
    let summary = tracker.run(path, store);
    let summary = summary.map_err(|error| BootstrapError::Seed {
        path: path.to_owned(),
        error,
    })?;
    let head = summary.records.map(|(head, _)| head);
    applied.restored(Position {
        seq: log.end(),
        time_ns: head.map_or(applied.position().time_ns, |head| head.time_ns),
    });
    Ok(())
}

/// Renames a snapshot that is damaged, for people to look at. Under its own name it would go on
/// counting as one of the two that are kept, and the log would be cut behind it.
fn set_aside(path: &Path, error: &BackupError) {
    if matches!(error, BackupError::Io { .. } | BackupError::Newer { .. }) {
        return;
    }
    let mut aside = path.as_os_str().to_owned();
    aside.push(".damaged");
    if let Err(error) = fs::rename(path, aside) {
        tracing::warn!(path = %path.display(), %error, "damaged snapshot not set aside");
    }
}

fn modified(path: &Path) -> SystemTime {
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
    modified.unwrap_or_else(|_| SystemTime::now())
}
