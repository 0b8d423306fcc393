//! Snapshots: backups that a node keeps in its own data directory.
//!
//! A snapshot is written under a temporary name, synced, renamed, and its directory synced: what
//! goes by a snapshot's name is whole, whenever the machine stopped. Two are kept, so that a
//! damaged newest one falls back to the one before.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use super::{BackupError, BackupWriter, ChunkSource, Head, Progress, Summary, read, threads_for};
use crate::log::{Position, Seq};
use crate::store::{RecordBatch, Store};

/// How many snapshots are kept.
const KEPT: usize = 2;
/// A backup is believed to have so many rows before they are there: room for them costs 73 MiB.
const RESERVED_ROWS_MAX: u64 = 16 << 20;
const PREFIX: &str = "grades-";
const SUFFIX: &str = ".csv.gz";
const PARTIAL: &str = ".partial";

/// The snapshots of one data directory.
#[derive(Debug, Clone)]
pub struct Snapshots {
    dir: PathBuf,
}

/// A snapshot that was written.
#[derive(Debug, Clone)]
pub struct Written {
    /// What it holds and from where on to replay.
    pub head: Head,
    /// Rows.
    pub rows: u64,
    /// Its size.
    pub bytes: u64,
    /// How long writing took; 0 for one that an earlier process wrote.
    pub took: Duration,
    /// When it was finished.
    pub at: SystemTime,
}

impl Snapshots {
    /// The snapshots in `dir`, which is made if need be. What a stopped process left unfinished is
    /// removed.
    ///
    /// # Errors
    /// The directory can't be made or read.
    pub fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|end| end == "partial") {
                fs::remove_file(path)?;
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
        })
    }

    /// Where they are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Positions and files, newest first.
    ///
    /// # Errors
    /// The directory can't be read.
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

    /// The newest one, if there is one and the directory can be read.
    #[must_use]
    pub fn newest(&self) -> Option<PathBuf> {
        let mut found = self.list().ok()?.into_iter();
        found.next().map(|(_, path)| path)
    }

    /// Writes a snapshot of `store`; `end` tells the position once the last record has been read,
    /// or that what was read is not to be kept.
    /// Blocks for as long as that takes, on all cores.
    ///
    /// # Errors
    /// The disk refused. The snapshots that were there are untouched.
    pub fn write(
        &self,
        store: &Store,
        head: Head,
        end: impl FnOnce() -> io::Result<Position>,
    ) -> io::Result<Written> {
        let begun = Instant::now();
        let name = format!("{PREFIX}{:020}{SUFFIX}", head.position);
        let partial = self.dir.join(format!("{name}{PARTIAL}"));
        let written = write_file(&partial, store, &head, end).inspect_err(|_| {
            // What it took is needed back; if that fails too, the next start removes it.
            let _ = fs::remove_file(&partial);
        });
        let (rows, bytes) = written?;
        fs::rename(&partial, self.dir.join(name))?;
        File::open(&self.dir)?.sync_all()?;
        Ok(Written {
            head,
            rows,
            bytes,
            took: begun.elapsed(),
            at: SystemTime::now(),
        })
    }

    /// Quarantines all of them.
    pub fn quarantine_all(&self, why: &str) {
        match self.list() {
            Ok(found) => found.iter().for_each(|(_, path)| quarantine(path, why)),
            Err(error) => tracing::warn!(%error, "snapshots not quarantined"),
        }
    }

    /// Removes all but the newest two. The position of the older one: the log is needed from there
    /// on. `None` while there are fewer than two.
    ///
    /// # Errors
    /// The directory can't be read, or a file not removed.
    pub fn prune(&self) -> io::Result<Option<Seq>> {
        let found = self.list()?;
        for (_, path) in found.iter().skip(KEPT) {
            fs::remove_file(path)?;
        }
        Ok(found.get(KEPT - 1).map(|(position, _)| *position))
    }
}

/// Renames the snapshot at `path` so that no start uses it; the file stays as it is.
pub fn quarantine(path: &Path, why: &str) {
    let mut quarantined = path.as_os_str().to_owned();
    quarantined.push(format!(".{why}"));
    match fs::rename(path, &quarantined) {
        Ok(()) => tracing::warn!(path = %path.display(), why, "snapshot quarantined"),
        Err(error) => tracing::warn!(path = %path.display(), %error, "snapshot not quarantined"),
    }
}

fn write_file(
    path: &Path,
    store: &Store,
    head: &Head,
    end: impl FnOnce() -> io::Result<Position>,
) -> io::Result<(u64, u64)> {
    let mut file = BufWriter::new(File::create(path)?);
    let (mut writer, first) = BackupWriter::begin(head);
    file.write_all(&first)?;
    let mut bytes = first.len() as u64;
    let source = ChunkSource::new(store);
    let threads = threads_for(head.rows_expected);
    let written: io::Result<()> = thread::scope(|scope| {
        let (chunks, made) = sync_channel(threads);
        for _ in 0..threads {
            let (source, chunks) = (&source, chunks.clone());
            scope.spawn(move || {
                while let Some(chunk) = source.next() {
                    // Nobody takes it: writing has failed.
                    if chunks.send(chunk).is_err() {
                        break;
                    }
                }
            });
        }
        drop(chunks);
        for chunk in made {
            writer.add(&chunk);
            file.write_all(&chunk.bytes)?;
            bytes += chunk.bytes.len() as u64;
        }
        Ok(())
    });
    written?;
    let rows = writer.rows();
    let last = writer.end(&end()?);
    file.write_all(&last)?;
    bytes += last.len() as u64;
    let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.sync_all()?;
    Ok((rows, bytes))
}

/// Reads the backup in `source` into `store`, which must be empty and is empty again after an
/// error. Blocks.
///
/// # Errors
/// The file is not a whole, unchanged backup; see [`BackupError`].
pub fn restore(
    source: impl io::Read + Unpin + Send,
    store: &Store,
    progress: &Progress,
) -> Result<Summary, BackupError> {
    let sized = Once::new();
    let sink = |rows: &RecordBatch| {
        sized.call_once(|| store.reserve(progress.rows_expected().min(RESERVED_ROWS_MAX) as usize));
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

/// The same from a file.
///
/// # Errors
/// The file can't be opened, or see [`restore`].
pub fn restore_file(
    path: &Path,
    store: &Store,
    progress: &Progress,
) -> Result<Summary, BackupError> {
    let file = File::open(path).map_err(|error| BackupError::Io { at: 0, error })?;
    restore(file, store, progress)
}
