//! Opens a node's log and its snapshots.
//!
//! A data directory holds `lock`, `replica-id`, `snapshots/` and `log/`, or `wal/` for a replica of a
//! cluster. Some also hold `password`, a generated one, and `restored-from`, the fingerprint of a backup.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;

use super::restored_from::Fingerprint;
use super::seed::{Seed, has_snapshots, snapshots_in};
pub use super::storage_error::StorageError;
use super::storage_error::{io_error, restore_error};
use crate::backup::{BackupError, Snapshots, quarantine, read_head};
use crate::log::{
    AskNode, ClusterKey, DiskLog, ExistingData, InFlight, JetStreamConfig, JetStreamLog, Log,
    LogId, MemoryLog, RandomId, ReplicaIdentity, ReportWait, Seq, WalConfig, WalSync, log_of_wal,
};
use crate::sys::exec::Blocking;
use crate::sys::files;

/// The directory of a replica's WALs, one for each log, in its data directory.
const WAL_DIR: &str = "wal";

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
        stream: Box<JetStreamConfig>,
        /// Where snapshots are kept; `None` for an ephemeral node.
        data_dir: Option<DataDir>,
        /// A log whose snapshots are quarantined if the stream holds another one.
        abandon_log: Option<String>,
    },
}

impl StorageConfig {
    fn data_dir(&self) -> Option<&DataDir> {
        match self {
            Self::Ephemeral => None,
            Self::Disk(data_dir) => Some(data_dir),
            Self::JetStream { data_dir, .. } => data_dir.as_ref(),
        }
    }
}

/// A data directory and its settings.
#[derive(Debug, Clone)]
pub struct DataDir {
    /// The directory.
    pub dir: PathBuf,
    /// How often a snapshot is written.
    pub snapshot_interval: Duration,
    /// The settings of a cluster's WAL; `None` to measure a node without it.
    pub wal: Option<WalSettings>,
}

/// The settings of a replica's WAL.
#[derive(Debug, Clone, Copy)]
pub struct WalSettings {
    /// When it is synced.
    pub sync: WalSync,
    /// Up to how many bytes are kept beyond those that a start needs.
    pub keep_bytes: u64,
}

impl DataDir {
    /// The WAL of a cluster's log in this directory.
    fn wal(&self) -> Option<WalConfig> {
        let settings = self.wal?;
        Some(WalConfig {
            dir: self.dir.join(WAL_DIR),
            sync: settings.sync,
            keep_bytes: settings.keep_bytes,
            pool: Blocking::threads(),
        })
    }
}

/// An opened log, with its snapshots and the lock of its directory.
pub struct Storage {
    /// The log.
    pub log: Arc<dyn Log>,
    /// The batches that this process has appended and not yet applied.
    pub in_flight: InFlight,
    /// The replica's id; stored in the data directory, if there is one.
    pub replica: RandomId,
    /// Snapshots and how often to write one; none for an ephemeral node.
    pub snapshots: Option<(Snapshots, Duration)>,
    /// Whether the data directory was restored from the `--restore-from` backup by an earlier start.
    pub was_restored: bool,
    /// The data directory, absolute; `None` for an ephemeral node.
    pub dir: Option<PathBuf>,
    /// Locks the directory while it is in use; the system releases it when the process ends.
    _lock: Option<File>,
}

/// The parameters for opening a log.
pub struct StorageOptions {
    /// This process.
    pub node: RandomId,
    /// The URL of its write port.
    pub url: String,
    /// Asks a `--peer` for its node id.
    pub ask_node: Arc<dyn AskNode>,
    /// The key of the cluster.
    pub key: ClusterKey,
    /// A backup to start from; the log then begins after its end.
    pub restore_from: Option<PathBuf>,
    /// Called with the reason why opening the log waits.
    pub progress: ReportWait,
}

impl Storage {
    /// Opens the log and the snapshots of `config`. Blocks, so it must run on a thread of a tokio
    /// runtime that may block.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub fn open(config: &StorageConfig, opening: StorageOptions) -> Result<Self, StorageError> {
        let node = opening.node;
        let dir = config.data_dir().map(|data_dir| &*data_dir.dir);
        let read = |path| Seed::read(path, dir);
        let seed = opening.restore_from.map(read).transpose()?;
        match config {
            StorageConfig::Ephemeral => {
                let base = match seed {
                    Some(Seed::File { base, .. }) => base,
                    _ => 0,
                };
                Ok(Self::of(Arc::new(MemoryLog::new(node, base)), node))
            }
            StorageConfig::Disk(data_dir) => {
                let dir = data_dir.dir.join("log");
                Self::in_dir(data_dir)?.with_log(Some(data_dir), seed, |base| {
                    Ok(Arc::new(DiskLog::open(&dir, base)?))
                })
            }
            StorageConfig::JetStream {
                stream,
                data_dir,
                abandon_log,
            } => {
                let storage = match data_dir {
                    Some(data_dir) => Self::in_dir(data_dir)?,
                    None => Self::of(Arc::new(MemoryLog::new(node, 0)), node),
                };
                let abandoned = abandon_log.clone().map(|log| LogId(log.into()));
                let identity = ReplicaIdentity {
                    node,
                    replica: storage.replica,
                    existing_data: storage.existing_data(abandoned.as_ref()),
                    keeps_data: data_dir.is_some(),
                    url: opening.url,
                    ask_node: opening.ask_node,
                    key: opening.key,
                };
                let in_flight = storage.in_flight.clone();
                let stream = JetStreamConfig {
                    wal: data_dir.as_ref().and_then(DataDir::wal),
                    ..(**stream).clone()
                };
                let storage = storage.with_log(data_dir.as_ref(), seed, |base| {
                    let log = JetStreamLog::open(
                        stream.clone(),
                        identity.clone(),
                        in_flight.clone(),
                        base,
                        Arc::clone(&opening.progress),
                    );
                    Ok(Arc::new(Handle::current().block_on(log)?))
                })?;
                if let Some(abandoned) = abandoned {
                    storage.abandon(&abandoned)?;
                }
                Ok(storage)
            }
        }
    }

    /// Sets the log that `open` opens: at its end, or a new one whose first batch follows a base.
    /// The latter needs a `seed` that was not restored to `data_dir` before.
    fn with_log(
        mut self,
        data_dir: Option<&DataDir>,
        seed: Option<Seed>,
        open: impl Fn(Option<Seq>) -> Result<Arc<dyn Log>, StorageError>,
    ) -> Result<Self, StorageError> {
        let (path, base) = match seed {
            None => {
                self.log = open(None)?;
                return Ok(self);
            }
            Some(Seed::Gone { path }) => return self.already_restored(&path, open),
            Some(Seed::File { path, base }) => (path, base),
        };
        let fingerprint = match data_dir {
            Some(DataDir { dir, .. }) => {
                let of_file = Fingerprint::of(&path);
                let of_file = of_file.map_err(|error| restore_error(&path, error))?;
                Some((dir, of_file))
            }
            None => None,
        };
        let was_restored = match &fingerprint {
            Some((dir, of_file)) => of_file
                .is_kept_in(dir)
                .map_err(|error| io_error(dir, error))?,
            None => false,
        };
        let has_snapshots = match &self.snapshots {
            Some((snapshots, _)) => has_snapshots(snapshots)?,
            None => false,
        };
        let opened = match was_restored && has_snapshots {
            true => None,
            false => match open(Some(base)) {
                // The snapshots were quarantined.
                Err(error) if was_restored && error.is_not_empty() => None,
                opened => Some(opened?),
            },
        };
        let Some(log) = opened else {
            return self.already_restored(&path, open);
        };
        self.log = log;
        // With snapshots, which are of other data, the restore will be refused.
        if let Some((dir, of_file)) = fingerprint.filter(|_| !has_snapshots) {
            let kept = of_file.keep_in(dir, &path);
            kept.map_err(|error| io_error(dir, error))?;
        }
        Ok(self)
    }

    /// Sets the log that `open` opens at its end.
    fn already_restored(
        mut self,
        path: &Path,
        open: impl Fn(Option<Seq>) -> Result<Arc<dyn Log>, StorageError>,
    ) -> Result<Self, StorageError> {
        tracing::info!(
            file = %path.display(),
            "starting normally: the data directory was already restored from this file"
        );
        self.log = open(None)?;
        self.was_restored = true;
        Ok(self)
    }

    /// Locks the directory and opens everything but the log, which the caller sets.
    fn in_dir(data_dir: &DataDir) -> Result<Self, StorageError> {
        let dir = &data_dir.dir;
        let lock = lock(dir)?;
        let snapshots = Snapshots::open(snapshots_in(dir).dir());
        let snapshots = snapshots.map_err(|error| io_error(dir, error))?;
        let replica = replica_id(dir)?;
        let absolute = std::path::absolute(dir).map_err(|error| io_error(dir, error))?;
        Ok(Self {
            dir: Some(absolute),
            snapshots: Some((snapshots, data_dir.snapshot_interval)),
            _lock: Some(lock),
            ..Self::of(Arc::new(MemoryLog::new(replica, 0)), replica)
        })
    }

    /// A log without a data directory.
    #[must_use]
    pub fn of(log: Arc<dyn Log>, replica: RandomId) -> Self {
        Self {
            log,
            in_flight: InFlight::default(),
            replica,
            snapshots: None,
            was_restored: false,
            dir: None,
            _lock: None,
        }
    }

    /// The log of the newest readable snapshot, or of the WAL, that does not belong to log
    /// `abandoned`. If there is none, an unreadable snapshot counts, because it may be the only copy of the data.
    fn existing_data(&self, abandoned: Option<&LogId>) -> ExistingData {
        let Some((snapshots, _)) = &self.snapshots else {
            return ExistingData::None;
        };
        let unreadable = |path: &Path, error: BackupError| ExistingData::Unreadable {
            path: path.to_owned(),
            why: error.to_string(),
        };
        let found = match snapshots.list() {
            Ok(found) => found,
            Err(error) => return unreadable(snapshots.dir(), BackupError::Open(error)),
        };
        let mut held = ExistingData::None;
        for (_, path) in found {
            match log_of(&path) {
                Ok(log) if Some(&log) == abandoned => {}
                Ok(log) => return ExistingData::Of(log),
                Err(error) if held == ExistingData::None => held = unreadable(&path, error),
                Err(_) => {}
            }
        }
        let Some(dir) = self.dir.as_ref().filter(|_| held == ExistingData::None) else {
            return held;
        };
        let dir = dir.join(WAL_DIR);
        match log_of_wal(&dir, abandoned) {
            Ok(log) => log.map_or(held, ExistingData::Of),
            Err(error) => ExistingData::Unreadable {
                path: dir,
                why: error.to_string(),
            },
        }
    }

    /// Quarantines the snapshots of `log`, unless the stream holds that log.
    fn abandon(&self, log: &LogId) -> Result<(), StorageError> {
        if self.log.id() == *log {
            tracing::warn!(%log, "ignored --abandon-log: the stream holds this log");
            return Ok(());
        }
        let Some((snapshots, _)) = &self.snapshots else {
            return Ok(());
        };
        let found = snapshots.list();
        for (_, path) in found.map_err(|error| io_error(snapshots.dir(), error))? {
            if log_of(&path).is_ok_and(|of| of == *log) {
                quarantine(&path, "abandoned");
            }
        }
        Ok(())
    }
}

/// The log that the snapshot at `path` belongs to.
fn log_of(path: &Path) -> Result<LogId, BackupError> {
    let file = File::open(path).map_err(BackupError::Open)?;
    match read_head(file)? {
        Some(head) => Ok(LogId(head.log_id)),
        None => Err(BackupError::Damaged {
            at: 0,
            what: "it names no log",
        }),
    }
}

/// The replica id in the directory, or a new one.
fn replica_id(dir: &Path) -> Result<RandomId, StorageError> {
    let path = dir.join("replica-id");
    match fs::read_to_string(&path) {
        Ok(text) => RandomId::parse(text.trim()).ok_or(StorageError::ReplicaId { path }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let replica = RandomId::random()?;
            let written = files::write(&path, &format!("{replica}\n"));
            written.map_err(|error| io_error(dir, error))?;
            Ok(replica)
        }
        Err(error) => Err(io_error(dir, error)),
    }
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

/// Creates `dir` if it does not exist, and syncs its parent, so that it survives a power loss.
fn make_dir(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(dir)?;
    match File::open(dir.join("..")).and_then(|parent| parent.sync_all()) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let dir = dir.display();
            tracing::warn!(%dir, "cannot sync the parent directory: permission denied");
            Ok(())
        }
        synced => synced,
    }
}
