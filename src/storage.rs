//! What a node keeps its log and snapshots in.
//!
//! A data directory holds `lock`, `snapshots/` and, where the node is alone, `log/`.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;

use crate::backup::{BackupError, Snapshots, end_position};
use crate::log::{
    DiskLog, JetStreamConfig, JetStreamLog, Log, MemoryLog, OpenError, Origin, Seq, SetupError,
};

/// Where the log is kept.
#[derive(Debug, Clone)]
pub enum StorageConfig {
    /// In memory; nothing survives the process.
    Ephemeral,
    /// On disk, with snapshots beside it.
    Disk(DataDir),
    /// In a stream that several nodes share.
    JetStream {
        /// The stream.
        stream: JetStreamConfig,
        /// Where snapshots are kept, if any are.
        data_dir: Option<DataDir>,
    },
}

/// A data directory and how it is used.
#[derive(Debug, Clone)]
pub struct DataDir {
    /// The directory.
    pub dir: PathBuf,
    /// How often a snapshot is written.
    pub snapshot_interval: Duration,
}

/// Why the data directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// Another process has it.
    #[error("another gradestore uses --data-dir {dir}; stop it, or choose another directory")]
    InUse {
        /// The directory.
        dir: PathBuf,
    },
    /// The system refused.
    #[error("cannot use --data-dir {dir}: {error}; choose a directory that this user may write to")]
    Io {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The log can't be opened.
    #[error(transparent)]
    Log(#[from] OpenError),
    /// The stream can't be used.
    #[error(transparent)]
    Stream(#[from] SetupError),
    /// The backup to begin from can't be.
    #[error("cannot restore from {path}: {error}")]
    RestoreFrom {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: BackupError,
    },
}

/// An opened log and what stands beside it.
pub struct Storage {
    /// The log.
    pub log: Arc<dyn Log>,
    /// Snapshots and how often to write one; none for an ephemeral node.
    pub snapshots: Option<(Snapshots, Duration)>,
    /// Held for as long as the directory is used; the system lets go of it when the process ends.
    _lock: Option<File>,
}

impl Storage {
    /// Opens what `config` names. With a backup to begin from, the log begins where that ends.
    /// Blocks; the thread must be one of a runtime's that may.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub fn open(
        config: &StorageConfig,
        origin: Origin,
        restore_from: Option<&Path>,
    ) -> Result<Self, StorageError> {
        let base = restore_from.map(base_of).transpose()?;
        match config {
            StorageConfig::Ephemeral => {
                let log = MemoryLog::new(origin, base.unwrap_or(0));
                Ok(Self::of(Arc::new(log)))
            }
            StorageConfig::Disk(data_dir) => Self::in_dir(data_dir, || {
                Ok(Arc::new(DiskLog::open(&data_dir.dir.join("log"), base)?))
            }),
            StorageConfig::JetStream { stream, data_dir } => {
                let open = || {
                    let log = JetStreamLog::open(stream.clone(), origin, base);
                    Ok(Arc::new(Handle::current().block_on(log)?) as Arc<dyn Log>)
                };
                match data_dir {
                    Some(data_dir) => Self::in_dir(data_dir, open),
                    None => open().map(Self::of),
                }
            }
        }
    }

    /// Locks the directory, then opens the log.
    fn in_dir(
        data_dir: &DataDir,
        log: impl FnOnce() -> Result<Arc<dyn Log>, StorageError>,
    ) -> Result<Self, StorageError> {
        let dir = &data_dir.dir;
        let lock = lock(dir)?;
        let snapshots = Snapshots::open(&dir.join("snapshots"));
        let snapshots = snapshots.map_err(|error| io_error(dir, error))?;
        Ok(Self {
            log: log()?,
            snapshots: Some((snapshots, data_dir.snapshot_interval)),
            _lock: Some(lock),
        })
    }

    /// A log and nothing beside it.
    #[must_use]
    pub fn of(log: Arc<dyn Log>) -> Self {
        Self {
            log,
            snapshots: None,
            _lock: None,
        }
    }
}

/// The position that a log seeded from `path` begins after. Never 0: a log that begins at its first
/// batch passes for all there is, and this one lacks the rows of the file.
fn base_of(path: &Path) -> Result<Seq, StorageError> {
    let file = File::open(path).map_err(|error| BackupError::Io { at: 0, error });
    file.and_then(end_position)
        .map(|position| position.max(1))
        .map_err(|error| StorageError::RestoreFrom {
            path: path.to_owned(),
            error,
        })
}

fn lock(dir: &Path) -> Result<File, StorageError> {
    make_dir(dir).map_err(|error| io_error(dir, error))?;
    let file = File::create(dir.join("lock")).map_err(|error| io_error(dir, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StorageError::InUse {
            dir: dir.to_owned(),
        }),
        Err(TryLockError::Error(error)) => Err(io_error(dir, error)),
    }
}

/// Makes `dir`, if it is not there, such that a power loss does not take it away again.
fn make_dir(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(dir)?;
    match File::open(dir.join("..")).and_then(|parent| parent.sync_all()) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let dir = dir.display();
            tracing::warn!(%dir, "the directory above may not be read, so not synced");
            Ok(())
        }
        synced => synced,
    }
}

fn io_error(dir: &Path, error: io::Error) -> StorageError {
    StorageError::Io {
        dir: dir.to_owned(),
        error,
    }
}
