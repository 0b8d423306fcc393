//! What a node keeps its log and snapshots in.
//!
//! A data directory holds `lock`, `snapshots/` and, where the node is alone, `log/`.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;

use crate::backup::{BackupError, Snapshots, end_position, head, quarantine};
use crate::log::{
    ClusterKey, DiskLog, HeldData, Identity, InFlight, JetStreamConfig, JetStreamLog, Log, LogId,
    MemoryLog, OpenError, Progress, RandomId, Seq, SetupError,
};
use crate::remote::Reach;

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
        /// A log whose snapshots are discarded, where the stream holds another one.
        abandon_log: Option<String>,
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
    /// The replica's id is no id.
    #[error("{path} holds no replica id; remove it, and the replica gets a new one")]
    ReplicaId {
        /// The file.
        path: PathBuf,
    },
    /// The system has no random bytes for a replica id.
    #[error("the system gave no random bytes: {0}")]
    Random(#[from] getrandom::Error),
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
    /// What this process has appended to it.
    pub in_flight: InFlight,
    /// The replica: kept in the data directory, where there is one.
    pub replica: RandomId,
    /// Snapshots and how often to write one; none for an ephemeral node.
    pub snapshots: Option<(Snapshots, Duration)>,
    /// Held for as long as the directory is used; the system lets go of it when the process ends.
    _lock: Option<File>,
}

/// What opening a log is told from outside.
pub struct Opening {
    /// This process.
    pub node: RandomId,
    /// Where its write port is reached.
    pub url: String,
    /// How a `--peer` is asked which process it is.
    pub reach: Arc<dyn Reach>,
    /// What the cluster's replicas sign with.
    pub key: ClusterKey,
    /// A backup to start from; the log then begins where that ends.
    pub restore_from: Option<PathBuf>,
    /// Is told what the log waits for.
    pub progress: Progress,
}

impl Storage {
    /// Opens what `config` names. Blocks; the thread must be one of a runtime's that may.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub fn open(config: &StorageConfig, opening: Opening) -> Result<Self, StorageError> {
        let base = opening.restore_from.as_deref().map(base_of).transpose()?;
        let node = opening.node;
        match config {
            StorageConfig::Ephemeral => {
                let log = MemoryLog::new(node, base.unwrap_or(0));
                Ok(Self::of(Arc::new(log), node))
            }
            StorageConfig::Disk(data_dir) => {
                let mut storage = Self::in_dir(data_dir)?;
                let log = DiskLog::open(&data_dir.dir.join("log"), base)?;
                storage.log = Arc::new(log);
                Ok(storage)
            }
            StorageConfig::JetStream {
                stream,
                data_dir,
                abandon_log,
            } => {
                let mut storage = match data_dir {
                    Some(data_dir) => Self::in_dir(data_dir)?,
                    None => Self::of(Arc::new(MemoryLog::new(node, 0)), node),
                };
                let abandoned = abandon_log.clone().map(|log| LogId(log.into()));
                let identity = Identity {
                    node,
                    replica: storage.replica,
                    holds: storage.held_data(abandoned.as_ref()),
                    keeps_data: data_dir.is_some(),
                    url: opening.url,
                    reach: opening.reach,
                    key: opening.key,
                };
                let in_flight = storage.in_flight.clone();
                let log =
                    JetStreamLog::open(stream.clone(), identity, in_flight, base, opening.progress);
                storage.log = Arc::new(Handle::current().block_on(log)?);
                if let Some(abandoned) = abandoned {
                    storage.abandon(&abandoned);
                }
                Ok(storage)
            }
        }
    }

    /// Locks the directory and opens what is beside the log, which is to follow.
    fn in_dir(data_dir: &DataDir) -> Result<Self, StorageError> {
        let dir = &data_dir.dir;
        let lock = lock(dir)?;
        let snapshots = Snapshots::open(&dir.join("snapshots"));
        let snapshots = snapshots.map_err(|error| io_error(dir, error))?;
        let replica = replica_id(dir)?;
        Ok(Self {
            snapshots: Some((snapshots, data_dir.snapshot_interval)),
            _lock: Some(lock),
            ..Self::of(Arc::new(MemoryLog::new(replica, 0)), replica)
        })
    }

    /// A log and nothing beside it.
    #[must_use]
    pub fn of(log: Arc<dyn Log>, replica: RandomId) -> Self {
        Self {
            log,
            in_flight: InFlight::default(),
            replica,
            snapshots: None,
            _lock: None,
        }
    }

    /// The log of the newest snapshot that can be read and is of another log than `abandoned`. If
    /// there is none, a snapshot that cannot be read counts: it may hold all the data there is.
    fn held_data(&self, abandoned: Option<&LogId>) -> HeldData {
        let Some((snapshots, _)) = &self.snapshots else {
            return HeldData::Nothing;
        };
        let unreadable = |path: &Path, error: BackupError| HeldData::Unreadable {
            path: path.to_owned(),
            why: error.to_string(),
        };
        let found = match snapshots.list() {
            Ok(found) => found,
            Err(error) => return unreadable(snapshots.dir(), BackupError::Io { at: 0, error }),
        };
        let mut held = HeldData::Nothing;
        for (_, path) in found {
            match log_of(&path) {
                Ok(log) if Some(&log) == abandoned => {}
                Ok(log) => return HeldData::Of(log),
                Err(error) if held == HeldData::Nothing => held = unreadable(&path, error),
                Err(_) => {}
            }
        }
        held
    }

    /// Quarantines the snapshots of `log`, unless that is the log that is followed.
    fn abandon(&self, log: &LogId) {
        if self.log.id() == *log {
            tracing::warn!(%log, "--abandon-log names the log that the stream holds: ignored");
            return;
        }
        let snapshots = self.snapshots.as_ref().map(|(snapshots, _)| snapshots);
        let found = snapshots.and_then(|snapshots| snapshots.list().ok());
        for (_, path) in found.unwrap_or_default() {
            if log_of(&path).is_ok_and(|of| of == *log) {
                quarantine(&path, "abandoned");
            }
        }
    }
}

/// The log that the snapshot at `path` is of.
fn log_of(path: &Path) -> Result<LogId, BackupError> {
    let file = File::open(path).map_err(|error| BackupError::Io { at: 0, error })?;
    match head(file)? {
        Some(head) => Ok(LogId(head.log_id)),
        None => Err(BackupError::Damaged {
            at: 0,
            what: "it names no log",
        }),
    }
}

/// This replica's id: what the directory says, or a new one.
fn replica_id(dir: &Path) -> Result<RandomId, StorageError> {
    let path = dir.join("replica-id");
    match fs::read_to_string(&path) {
        Ok(text) => RandomId::parse(text.trim()).ok_or(StorageError::ReplicaId { path }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let replica = RandomId::random()?;
            // Beside it first, so that a crash leaves no half of one.
            let new = dir.join("replica-id.new");
            let written = fs::write(&new, format!("{replica}\n"))
                .and_then(|()| File::open(&new)?.sync_all())
                .and_then(|()| fs::rename(&new, &path))
                .and_then(|()| File::open(dir)?.sync_all());
            written.map_err(|error| io_error(dir, error))?;
            Ok(replica)
        }
        Err(error) => Err(io_error(dir, error)),
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
