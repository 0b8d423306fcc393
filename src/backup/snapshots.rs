//! Snapshots: backups that a node keeps in its own data directory.
//!
//! A snapshot is written under a temporary name, synced and renamed, and its directory is synced.
//! So a file with a snapshot's name is complete, even after a power loss. Two are kept, in case the
//! newest is damaged.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::{Duration, Instant, SystemTime};

use super::error::BackupError;
use super::format::HeadRecord;
use super::parallelism::threads_for;
use super::pipeline::ChunkPipeline;
use super::progress::{ReadProgress, Summary};
use super::reader::read;
use super::writer::{BackupWriter, ChunkSource};
use crate::log::{Position, Seq};
use crate::store::{RecordBatch, Store};
use crate::sys::exec::Blocking;

const SNAPSHOTS_KEPT: usize = 2;
/// The most rows for which a restore reserves memory before it has read them: 73 MiB.
const RESERVED_ROWS_MAX: u64 = 16 << 20;
const PREFIX: &str = "grades-";
const SUFFIX: &str = ".csv.gz";
const PARTIAL: &str = "partial";

/// The snapshots of one data directory.
#[derive(Debug, Clone)]
pub struct Snapshots {
    dir: PathBuf,
}

/// A complete snapshot.
#[derive(Debug, Clone)]
pub struct SnapshotInfo {
    /// Its head record.
    pub head: HeadRecord,
    /// The number of rows.
    pub rows: u64,
    /// The size of the file.
    pub bytes: u64,
    /// How long writing it took; 0 if an earlier process wrote it.
    pub took: Duration,
    /// When it was complete.
    pub at: SystemTime,
}

impl Snapshots {
    /// The snapshots in `dir`. Accesses no files yet.
    #[must_use]
    pub fn in_dir(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    /// Creates `dir` if it does not exist, and removes the partial snapshot of an earlier process.
    ///
    /// # Errors
    /// The directory cannot be created, read or written.
    pub fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == PARTIAL)
            {
                fs::remove_file(path)?;
            }
        }
        Ok(Self::in_dir(dir))
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Positions and files, newest first.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> io::Result<Vec<(Seq, PathBuf)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let position = name
                .and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX))
                .and_then(|position| position.parse().ok());
            // Without permission to read its metadata, assume that it is a file.
            let is_file = |path: &Path| match fs::metadata(path) {
                Ok(metadata) => metadata.is_file(),
                Err(error) => error.kind() != io::ErrorKind::NotFound,
            };
            if let Some(position) = position
                && is_file(&path)
            {
                found.push((position, path));
            }
        }
        found.sort_unstable_by(|one, other| other.cmp(one));
        Ok(found)
    }

    /// The newest snapshot, if there is one.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn newest(&self) -> io::Result<Option<PathBuf>> {
        let mut found = self.list()?.into_iter();
        Ok(found.next().map(|(_, path)| path))
    }

    /// Writes a snapshot of `store` on the threads of `pool`, on all cores. Calls `end` for the
    /// position after the scan; if that fails, the snapshot is discarded.
    ///
    /// # Errors
    /// The file cannot be written, or `end` failed. Earlier snapshots are unchanged.
    pub async fn write(
        &self,
        store: &Store,
        head: HeadRecord,
        end: impl FnOnce() -> io::Result<Position>,
        pool: &Blocking,
    ) -> io::Result<SnapshotInfo> {
        let started = Instant::now();
        let path = self
            .dir
            .join(format!("{PREFIX}{:020}{SUFFIX}", head.position));
        let partial = path.with_added_extension(PARTIAL);
        let written = write_file(&partial, store, &head, end, pool).await;
        let dir = self.dir.clone();
        let renamed = pool.run(move || match written {
            Ok(written) => {
                fs::rename(&partial, path)?;
                File::open(&dir)?.sync_all()?;
                Ok(written)
            }
            Err(error) => {
                // Frees the space. If that fails too, the next start removes the file.
                let _ = fs::remove_file(&partial);
                Err(error)
            }
        });
        let (rows, bytes) = renamed.await.flatten()?;
        Ok(SnapshotInfo {
            head,
            rows,
            bytes,
            took: started.elapsed(),
            at: SystemTime::now(),
        })
    }

    /// Quarantines all snapshots.
    pub fn quarantine_all(&self, why: &str) {
        match self.list() {
            Ok(found) => found.iter().for_each(|(_, path)| quarantine(path, why)),
            Err(error) => tracing::warn!(%error, "snapshots not quarantined"),
        }
    }

    /// Removes all snapshots except the newest two. Returns the position of the older one, because
    /// the log is needed from there on; `None` while there are fewer than two.
    ///
    /// # Errors
    /// The directory cannot be read, or a file cannot be removed.
    pub fn prune(&self) -> io::Result<Option<Seq>> {
        let found = self.list()?;
        for (_, path) in found.iter().skip(SNAPSHOTS_KEPT) {
            fs::remove_file(path)?;
        }
        Ok(found.get(SNAPSHOTS_KEPT - 1).map(|(position, _)| *position))
    }
}

/// Renames the snapshot at `path`, so that no start uses it. The file itself is unchanged.
pub fn quarantine(path: &Path, why: &str) {
    let quarantined = path.with_added_extension(why);
    match fs::rename(path, &quarantined) {
        Ok(()) => tracing::warn!(path = %path.display(), why, "snapshot quarantined"),
        Err(error) => tracing::warn!(path = %path.display(), %error, "snapshot not quarantined"),
    }
}

/// Writes and syncs the file. Returns the number of rows and bytes.
async fn write_file(
    path: &Path,
    store: &Store,
    head: &HeadRecord,
    end: impl FnOnce() -> io::Result<Position>,
    pool: &Blocking,
) -> io::Result<(u64, u64)> {
    let (mut writer, first) = BackupWriter::start(head);
    let mut bytes = first.len() as u64;
    let path = path.to_owned();
    let created = pool.run(move || {
        let mut options = File::options();
        let options = options.write(true).create(true).truncate(true);
        let mut file = options.mode(0o600).open(path)?;
        file.write_all(&first)?;
        Ok(file)
    });
    let mut file: File = created.await.flatten()?;
    let mut chunks = ChunkPipeline::new(ChunkSource::new(store), pool.clone());
    // One more than are made at once, so that all cores are busy while one is written.
    let in_flight_max = threads_for(head.rows_expected) + 1;
    while let Some(chunk) = chunks.next(in_flight_max).await? {
        writer.add(&chunk);
        bytes += chunk.bytes.len() as u64;
        let appended = pool.run(move || file.write_all(&chunk.bytes).map(|()| file));
        file = appended.await.flatten()?;
    }
    let rows = writer.rows();
    let last = writer.end(&end()?);
    bytes += last.len() as u64;
    let synced = pool.run(move || file.write_all(&last).and_then(|()| file.sync_all()));
    synced.await.flatten()?;
    Ok((rows, bytes))
}

/// Reads the backup in `source` into `store`, which must be empty. Clears it after an error.
/// Blocks.
///
/// # Errors
/// The file is not a complete, unchanged backup; see [`BackupError`].
pub fn restore(
    source: impl io::Read + Unpin + Send,
    store: &Store,
    progress: &ReadProgress,
) -> Result<Summary, BackupError> {
    let reserve = Once::new();
    let sink = |rows: &RecordBatch| {
        let rows_expected = progress.rows_expected().min(RESERVED_ROWS_MAX);
        reserve.call_once(|| {
            if let Some(seed) = progress.shard_seed() {
                store.set_shard_seed(seed);
            }
            store.reserve(rows_expected as usize);
        });
        store.put(rows)
    };
    let restored = read(source, &sink, progress).and_then(|summary| {
        let (rows, users) = (summary.rows, store.len() as u64);
        match rows == users {
            true => Ok(summary),
            false => Err(BackupError::Repeated { rows, users }),
        }
    });
    if restored.is_err() {
        store.clear();
    }
    restored
}

/// Reads the backup at `path` into `store`, like [`restore`].
///
/// # Errors
/// The file cannot be opened, or see [`restore`].
pub fn restore_file(
    path: &Path,
    store: &Store,
    progress: &ReadProgress,
) -> Result<Summary, BackupError> {
    let file = File::open(path).map_err(BackupError::Open)?;
    restore(file, store, progress)
}
