//! The backup of `--restore-from`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::restored_from;
use super::storage_error::{StorageError, io_error, restore_error};
use crate::backup::{BackupError, Snapshots, end_position};
use crate::log::Seq;

/// A backup to start from.
pub(super) enum Seed {
    File {
        path: PathBuf,
        /// The position after which the log begins. Never 0: a log that begins at batch 1 counts as
        /// complete, and this one lacks the rows of the file.
        base: Seq,
    },
    /// The file no longer exists. The data directory was restored from it and has a snapshot since.
    Gone { path: PathBuf },
}

impl Seed {
    /// The backup at `path` for a node with data directory `dir`.
    pub(super) fn read(path: PathBuf, dir: Option<&Path>) -> Result<Self, StorageError> {
        // Before it is opened, because opening a pipe waits for its writer.
        let metadata = match fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) => {
                let gone = error.kind() == io::ErrorKind::NotFound;
                return match dir.filter(|_| gone) {
                    Some(dir) if was_restored(dir, &path)? => Ok(Self::Gone { path }),
                    _ => Err(restore_error(&path, error)),
                };
            }
        };
        if !metadata.is_file() {
            return Err(StorageError::RestoreFromNoFile { path });
        }
        let file = File::open(&path).map_err(BackupError::Open);
        match file.and_then(end_position) {
            Ok(position) => Ok(Self::File {
                path,
                base: position.max(1),
            }),
            Err(error) => Err(StorageError::RestoreFrom { path, error }),
        }
    }
}

/// Whether data directory `dir` was completely restored from a file that was at `path`.
fn was_restored(dir: &Path, path: &Path) -> Result<bool, StorageError> {
    let kept = restored_from::is_path_kept_in(dir, path);
    let kept = kept.map_err(|error| io_error(dir, error))?;
    let snapshots = snapshots_in(dir);
    Ok(kept && snapshots.dir().exists() && has_snapshots(&snapshots)?)
}

/// The snapshots of data directory `dir`.
pub(super) fn snapshots_in(dir: &Path) -> Snapshots {
    Snapshots::in_dir(&dir.join("snapshots"))
}

/// Whether there is a snapshot.
pub(super) fn has_snapshots(snapshots: &Snapshots) -> Result<bool, StorageError> {
    let found = snapshots.list();
    let found = found.map_err(|error| io_error(snapshots.dir(), error))?;
    Ok(!found.is_empty())
}
