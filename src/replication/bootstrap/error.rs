//! The errors of a recovery.

use std::io;
use std::path::PathBuf;

use crate::backup::BackupError;
use crate::log::{Bounds, ReadError, Seq};
use crate::replication::memory::DoesNotFit;
use crate::replication::peer_client::RemoteError;

/// Why a node could not recover a state.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// The data directory can't be read.
    #[error("cannot read the snapshots: {0}")]
    Snapshots(#[from] io::Error),
    /// The log can't be read.
    #[error(transparent)]
    Log(#[from] ReadError),
    /// No snapshot is usable, no peer sent a backup, and the log lacks its first batches.
    #[error(
        "no source for a complete state: no usable snapshot, {peers}, and the log begins at batch \
         {first}; start a replica that has the data, put back a good snapshot, or restore a backup \
         with --restore-from (empty data directory; with NATS, delete the stream first)"
    )]
    NoSource {
        /// The oldest batch that the log holds.
        first: Seq,
        /// The peers that were asked.
        peers: Attempts,
    },
    /// The snapshots belong to another log.
    #[error("snapshot {path} belongs to log {found} and the log here is {here}: {fix}")]
    OtherLog {
        /// The newest of them.
        path: PathBuf,
        /// The log of the snapshots.
        found: Box<str>,
        /// The log of this node.
        here: Box<str>,
        /// The fix.
        fix: String,
    },
    /// A snapshot includes batches that the log does not have, although a batch is in the log
    /// before it is applied. Starting without them would lose acknowledged writes silently.
    #[error(
        "the log has lost batches: it ends at batch {end} and snapshot {path} is at batch \
         {position}; {fix}"
    )]
    LogBehind {
        /// The snapshot.
        path: PathBuf,
        /// Its position.
        position: Seq,
        /// The log's last batch.
        end: Seq,
        /// The fix.
        fix: String,
    },
    /// `--restore-from` was given, and the log is not empty.
    #[error(
        "refusing to restore: the log already contains data; remove --restore-from to start \
         normally, or use an empty --data-dir"
    )]
    NotEmpty,
    /// The `--restore-from` backup cannot be restored.
    #[error("cannot restore from {path}: {error}")]
    Seed {
        /// The file.
        path: PathBuf,
        /// Why it cannot be restored.
        error: BackupError,
    },
}

/// The peers that were asked for a backup, and why each request failed.
#[derive(Debug, Default)]
pub struct Attempts(pub(super) Vec<(Box<str>, String)>);

impl std::fmt::Display for Attempts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no known peer");
        }
        f.write_str("no backup from a peer (")?;
        for (index, (url, why)) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{url}: {why}")?;
        }
        f.write_str(")")
    }
}

/// Why a snapshot or a peer's backup was not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum SourceError {
    #[error(transparent)]
    Backup(#[from] BackupError),
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error(transparent)]
    Log(#[from] ReadError),
    #[error(transparent)]
    DoesNotFit(#[from] DoesNotFit),
    #[error("it belongs to another log, {0}")]
    OtherLog(Box<str>),
    #[error("it has no log position")]
    NoPosition,
    #[error(
        "it is at batch {position}, and the log holds batches {} to {}",
        .bounds.first,
        .bounds.end
    )]
    NotCovered { position: Seq, bounds: Bounds },
    #[error("it has not applied batch {0}, and the log is trimmed up to there")]
    Behind(Seq),
    #[error("its end position {position} is not between its start and the log's end at {log_end}")]
    EndUnknown { position: Seq, log_end: Seq },
    #[error("it is not ready: {0}")]
    NotReady(Box<str>),
    #[error("it is this replica")]
    Itself,
}
