//! A log as it was kept before it had segments of its own, in *fjall*: read once, and written anew.
//! All calls block.
//!
//! There a log is a database: a keyspace `about` says which log it is, and keyspaces `seg-1`, `seg-700`
//! and so on hold the batches from that one up to the next keyspace's, each under its sequence number,
//! big-endian, with the [value](super::format) that records have too.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use fjall::{Database, Keyspace, KeyspaceCreateOptions};

use super::opening::{remove, sync_parent};
use super::segment::{self, HEADER_BYTES, Header};
use super::{OpenError, Sizes, format, record};
use crate::log::{Origin, Seq};

/// Bytes of blocks kept in memory. All is read from front to back, once.
const CACHE_BYTES: u64 = 1024 * 1024;

/// Whether the log at `dir` is such a one.
pub(super) fn is_at(dir: &Path) -> bool {
    dir.join("version").is_file() && dir.join("keyspaces").is_dir()
}

/// Puts back what a conversion that was broken off had moved away.
pub(super) fn put_back(dir: &Path) -> io::Result<()> {
    let moved = moved(dir);
    match !dir.try_exists()? && moved.try_exists()? {
        true => fs::rename(moved, dir).and_then(|()| sync_parent(dir)),
        false => Ok(()),
    }
}

/// Makes the log at `dir` one of segments: the same log, with the same batches.
///
/// They are written beside and moved there once they are durable; until then what was there stays. It
/// takes as much room again as the batches do.
pub(super) fn convert(dir: &Path, sizes: Sizes) -> Result<(), OpenError> {
    let io = |error| OpenError::io(dir, error);
    let new = dir.with_extension("new");
    remove(&new)
        .and_then(|()| fs::create_dir(&new))
        .map_err(io)?;
    let converted = Former::open(dir).and_then(|former| former.write(dir, &new, sizes));
    let batches = converted.inspect_err(|_| {
        // It may hold room that others need. The next start removes it too.
        let _ = remove(&new);
    })?;
    let moved = moved(dir);
    remove(&moved)
        .and_then(|()| fs::rename(dir, &moved))
        .and_then(|()| fs::rename(&new, dir))
        .and_then(|()| sync_parent(dir))
        .and_then(|()| remove(&moved))
        .map_err(io)?;
    tracing::info!(batches, "log of an earlier version converted");
    Ok(())
}

/// Where the log is while what it was made into takes its place.
pub(super) fn moved(dir: &Path) -> PathBuf {
    dir.with_extension("former")
}

/// The opened database.
struct Former {
    /// In order.
    segments: Vec<(Seq, Keyspace)>,
    log: Origin,
    base: Seq,
    /// It stays open as long as it is read.
    _database: Database,
}

impl Former {
    fn open(dir: &Path) -> Result<Self, OpenError> {
        let storage = |error| storage(dir, &error);
        let damaged = |why| damaged(dir, why);
        let database = Database::builder(dir)
            .cache_size(CACHE_BYTES)
            .worker_threads(1)
            .open()
            .map_err(storage)?;
        let options = KeyspaceCreateOptions::default;
        let about = database.keyspace("about", options).map_err(storage)?;
        let (id, base) = about
            .get("id")
            .and_then(|id| Ok((id, about.get("base")?)))
            .map_err(storage)?;
        let identity = (|| {
            let id = std::str::from_utf8(id.as_deref()?).ok()?;
            let base = base.as_deref()?.try_into().ok()?;
            let log = Origin::parse(id.strip_prefix("disk-")?)?;
            Some((log, Seq::from_le_bytes(base)))
        })();
        let identity = identity.ok_or_else(|| "it does not say which log it is".to_owned());
        let (log, base) = identity.map_err(damaged)?;
        let mut segments = Vec::new();
        for name in database.list_keyspace_names() {
            if let Some(first) = name.strip_prefix("seg-").and_then(|n| n.parse().ok()) {
                segments.push((first, database.keyspace(&name, options).map_err(storage)?));
            }
        }
        segments.sort_unstable_by_key(|(first, _)| *first);
        Ok(Self {
            segments,
            log,
            base,
            _database: database,
        })
    }

    /// Writes segments to `new`, durable when this returns; how many batches.
    fn write(&self, dir: &Path, new: &Path, sizes: Sizes) -> Result<u64, OpenError> {
        let storage = |error| storage(dir, &error);
        let damaged = |why| damaged(dir, why);
        let Some((first, _)) = self.segments.first() else {
            return Err(damaged("it has no segment".to_owned()));
        };
        let mut segment = Segment {
            header: Header {
                log: self.log,
                base: self.base,
                first: *first,
                time_ns: 0,
            },
            records: Vec::new(),
        };
        let (mut next, mut time_ns, mut record) = (*first, 0, Vec::new());
        for (begin, keyspace) in &self.segments {
            follows(next, *begin).map_err(damaged)?;
            for stored in keyspace.iter() {
                let (key, value) = stored.into_inner().map_err(storage)?;
                let key = <[u8; 8]>::try_from(&*key).map(Seq::from_be_bytes);
                follows(next, key.unwrap_or(Seq::MAX)).map_err(damaged)?;
                // All of it, so that what is damaged is found while it is still there.
                let entry = format::read(next, &value).map_err(|e| damaged(e.to_string()))?;
                record::write(&entry, &mut record).map_err(|error| OpenError::io(dir, error))?;
                let bytes = (segment.records.len() + record.len()) as u64;
                if bytes > sizes.segment_bytes && !segment.records.is_empty() {
                    segment
                        .write(new, sizes)
                        .map_err(|error| OpenError::io(dir, error))?;
                    (segment.header.first, segment.header.time_ns) = (next, time_ns);
                }
                segment.records.append(&mut record);
                (next, time_ns) = (next + 1, entry.time_ns);
            }
        }
        segment
            .write(new, sizes)
            .map_err(|error| OpenError::io(dir, error))?;
        Ok(next - first)
    }
}

/// A segment that is filled in memory.
struct Segment {
    header: Header,
    records: Vec<u8>,
}

impl Segment {
    fn write(&mut self, dir: &Path, sizes: Sizes) -> io::Result<()> {
        let bytes = (self.records.len() as u64).max(1);
        let room_bytes = bytes.next_multiple_of(sizes.step_bytes);
        let file = segment::create(dir, &self.header, room_bytes)?;
        file.write_all_at(&self.records, HEADER_BYTES)?;
        file.sync_all()?;
        self.records.clear();
        Ok(())
    }
}

/// Whether `found` is the batch that should come next.
fn follows(next: Seq, found: Seq) -> Result<(), String> {
    match next == found {
        true => Ok(()),
        false => Err(format!(
            "batches {next} to {} are missing",
            found.saturating_sub(1)
        )),
    }
}

fn damaged(dir: &Path, why: String) -> OpenError {
    let (dir, why) = (dir.into(), why.into());
    OpenError::Damaged { dir, why }
}

fn storage(dir: &Path, error: &fjall::Error) -> OpenError {
    let why = match error {
        fjall::Error::Io(error) | fjall::Error::Storage(fjall::LsmError::Io(error)) => {
            error.to_string()
        }
        fjall::Error::JournalRecovery(error) => format!(
            "{error}; it is of an earlier version, which can cut off a last write that power loss has \
             torn: start that version once, then this one"
        ),
        other => other.to_string(),
    };
    let (dir, why) = (dir.into(), why.into());
    OpenError::Storage { dir, why }
}
