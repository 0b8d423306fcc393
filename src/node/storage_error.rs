//! The errors of a data directory.

use std::io;
use std::path::{Path, PathBuf};

use crate::backup::BackupError;
use crate::log::{OpenError, SetupError};

/// Why the data directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// Another process uses it.
    #[error("another gradestore uses --data-dir {dir}; stop it, or choose another directory")]
    InUse {
        /// The directory.
        dir: PathBuf,
    },
    /// The directory can't be read or written.
    #[error("cannot use --data-dir {dir}: {error}; choose a directory that this user may write to")]
    Io {
        /// The directory.
        dir: PathBuf,
        /// The system's error.
        error: io::Error,
    },
    /// The file does not contain a replica id.
    #[error("{path} does not contain a replica id; remove it, and the replica gets a new one")]
    ReplicaId {
        /// The file.
        path: PathBuf,
    },
    /// The system returned no random bytes for a replica id.
    #[error("cannot get random bytes from the system: {0}")]
    Random(#[from] getrandom::Error),
    /// The log can't be opened.
    #[error(transparent)]
    Log(#[from] OpenError),
    /// The stream can't be used.
    #[error(transparent)]
    Stream(#[from] SetupError),
    /// `--restore-from` is a pipe, a device or a directory. A node reads the backup twice.
    #[error(
        "cannot restore from {path}: it is not a regular file; save the backup to a file first"
    )]
    RestoreFromNoFile {
        /// The path.
        path: PathBuf,
    },
    /// The `--restore-from` backup can't be read.
    #[error("cannot restore from {path}: {error}")]
    RestoreFrom {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: BackupError,
    },
}

impl StorageError {
    /// Whether a base was given for a log that is not new.
    pub(super) fn is_not_empty(&self) -> bool {
        matches!(
            self,
            Self::Log(OpenError::NotEmpty { .. }) | Self::Stream(SetupError::NotEmpty { .. })
        )
    }
}

pub(super) fn restore_error(path: &Path, error: io::Error) -> StorageError {
    StorageError::RestoreFrom {
        path: path.to_owned(),
        error: BackupError::Open(error),
    }
}

pub(super) fn io_error(dir: &Path, error: io::Error) -> StorageError {
    StorageError::Io {
        dir: dir.to_owned(),
        error,
    }
}
