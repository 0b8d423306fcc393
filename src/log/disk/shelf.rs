//! The database under the log: opening, segments, reading in pieces. All calls block.
//!
//! A log is a row of segments, each a keyspace named for its first batch. Batches go to the last
//! one; when that is large enough the next is begun. Forgetting drops whole keyspaces from the
//! front, oldest first, each drop atomic in the library, so wherever a crash falls the segments
//! that are left follow each other without a gap. The last segment is never dropped, which also
//! keeps the library from giving a number of a dropped keyspace to a new one.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fjall::compaction::Leveled;
use fjall::config::FilterPolicy;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode, UserValue};

use super::torn::Cut;
use super::{OpenError, format};
use crate::log::{LogId, Origin, ReadError, Seq};

/// Bytes of blocks kept in memory. The log is read from front to back, once.
const CACHE_BYTES: u64 = 1024 * 1024;
/// Files held open, nearly the least that the library allows: connections need the rest, and what
/// is held open of a dropped segment takes room.
const FILES_OPEN_MAX: usize = 16;
/// Tables that a segment may have before they are merged. A whole segment has fewer, so nothing is
/// written twice; only a node that is restarted again and again, each leaving a small table, comes
/// here.
const TABLES_BEFORE_MERGE: u8 = 12;
/// Batches that are read at once.
const PIECE_BATCHES_MAX: usize = 256;
/// Bytes that are read at once; the batch that goes over it is still in.
const PIECE_BYTES_MAX: usize = 1024 * 1024;

const ABOUT: &str = "about";
const ABOUT_ID: &str = "id";
const ABOUT_BASE: &str = "base";
const SEGMENT: &str = "seg-";

/// The opened log.
pub(super) struct Shelf {
    pub(super) db: Database,
    /// In order; never empty.
    pub(super) segments: Vec<Segment>,
    pub(super) id: LogId,
    /// The last batch, or what numbering began after.
    pub(super) end: Seq,
    /// The last batch's time; 0 when there is none.
    pub(super) time_ns: u64,
    /// Whether no batch was ever appended.
    pub(super) unused: bool,
    /// What numbering began after.
    pub(super) base: Seq,
}

/// A run of batches.
#[derive(Clone)]
pub(super) struct Segment {
    pub(super) first: Seq,
    pub(super) keyspace: Keyspace,
}

/// A stored batch: number and value.
pub(super) type Stored = (Seq, UserValue);

impl Shelf {
    /// Makes an empty log at `dir`, which must not exist. Its first batch will be `base` + 1.
    ///
    /// It is built beside and moved: a crash leaves either no log or a whole one.
    pub(super) fn create(dir: &Path, base: Seq) -> Result<(), OpenError> {
        let new = beside(dir, "new");
        remove(&new).map_err(|error| OpenError::io(dir, error))?;
        let id = format!("disk-{}", Origin::random()?);
        let build = || -> fjall::Result<()> {
            let db = open_database(&new)?;
            let about = db.keyspace(ABOUT, options)?;
            about.insert(ABOUT_ID, id.as_str())?;
            about.insert(ABOUT_BASE, base.to_le_bytes())?;
            new_segment(&db, base + 1)?;
            db.persist(PersistMode::SyncAll)
        };
        build().map_err(|error| OpenError::storage(dir, &error))?;
        fs::rename(&new, dir)
            .and_then(|()| sync_parent(dir))
            .map_err(|error| OpenError::io(dir, error))
    }

    /// Removes a log that holds nothing.
    pub(super) fn discard(self, dir: &Path) -> Result<(), OpenError> {
        drop(self);
        // Out of the way in one step first, so that no half of it is ever opened.
        let old = beside(dir, "old");
        remove(&old)
            .and_then(|()| fs::rename(dir, &old))
            .and_then(|()| sync_parent(dir))
            .and_then(|()| remove(&old))
            .map_err(|error| OpenError::io(dir, error))
    }

    /// Opens the log at `dir` and checks that its segments follow each other.
    pub(super) fn open(dir: &Path) -> Result<Self, OpenError> {
        for name in ["new", "old"] {
            remove(&beside(dir, name)).map_err(|error| OpenError::io(dir, error))?;
        }
        let storage = |error: fjall::Error| OpenError::storage(dir, &error);
        let damaged = |why: String| OpenError::Damaged {
            dir: dir.into(),
            why: why.into(),
        };
        let db = match open_database(dir) {
            Err(fjall::Error::JournalRecovery(error)) => open_torn(dir, error)?,
            opened => opened.map_err(storage)?,
        };
        let (id, base) = about(&db)
            .map_err(storage)?
            .ok_or_else(|| damaged("it does not say which log it is".to_owned()))?;
        let mut segments = Vec::new();
        for name in db.list_keyspace_names() {
            if let Some(first) = name.strip_prefix(SEGMENT).and_then(|n| n.parse().ok()) {
                let keyspace = db.keyspace(&name, options).map_err(storage)?;
                segments.push(Segment { first, keyspace });
            }
        }
        segments.sort_unstable_by_key(|segment| segment.first);
        let Some(begin) = segments.first().map(|segment| segment.first) else {
            return Err(damaged("it has no segment".to_owned()));
        };
        let (mut end, mut time_ns) = (begin.saturating_sub(1), 0);
        for segment in &segments {
            if segment.first != end + 1 {
                let (from, to) = (end + 1, segment.first.saturating_sub(1));
                return Err(damaged(format!("batches {from} to {to} are missing")));
            }
            let Some((first, last, value)) = segment.ends().map_err(storage)? else {
                continue;
            };
            if first != segment.first {
                let to = first.saturating_sub(1);
                let from = segment.first;
                return Err(damaged(format!("batches {from} to {to} are missing")));
            }
            let (header, _) =
                format::header(last, &value).map_err(|error| damaged(error.to_string()))?;
            (end, time_ns) = (last, header.time_ns);
        }
        let about = db.keyspace(ABOUT, options).map_err(storage)?;
        for keyspace in segments
            .iter()
            .map(|segment| &segment.keyspace)
            .chain([&about])
        {
            // What came back from the journal goes to tables now, so that appending begins with
            // an empty memory table and the journal is free to go.
            keyspace.rotate_memtable().map_err(storage)?;
        }
        Ok(Self {
            db,
            unused: end == base,
            segments,
            id,
            end,
            time_ns,
            base,
        })
    }

    /// The oldest batch held, or the next one if none is.
    pub(super) fn first(&self) -> Seq {
        self.segments
            .first()
            .map_or(self.end + 1, |segment| segment.first)
    }

    /// The oldest segment, if it lies wholly at or below `through`, and where the next one begins.
    /// Never the last segment.
    pub(super) fn covered(&self, through: Seq) -> Option<(Segment, Seq)> {
        let (segment, next) = (self.segments.first()?, self.segments.get(1)?);
        let covered = next.first <= through.saturating_add(1);
        covered.then(|| (segment.clone(), next.first))
    }

    /// Reads some batches from `from` on, `to` at most; at least one, if there is one.
    pub(super) fn read(&self, from: Seq, to: Seq) -> Result<Vec<Stored>, ReadError> {
        let after = self
            .segments
            .partition_point(|segment| segment.first <= from);
        let Some(segment) = after.checked_sub(1).and_then(|at| self.segments.get(at)) else {
            return Err(ReadError::NotHeld { wanted: from });
        };
        let mut piece = Vec::new();
        let (mut wanted, mut bytes) = (from, 0);
        for stored in segment
            .keyspace
            .range(format::key(from)..=format::key(to))
            .take(PIECE_BATCHES_MAX)
        {
            let (key, value) = stored
                .into_inner()
                .map_err(|error| ReadError::Failed(plain(&error).into()))?;
            if format::seq(&key) != Some(wanted) {
                break;
            }
            bytes += value.len();
            piece.push((wanted, value));
            wanted += 1;
            if bytes > PIECE_BYTES_MAX {
                break;
            }
        }
        // The next segment begins where this one ends, so the first one wanted is here or nowhere.
        match piece.is_empty() {
            true => Err(ReadError::Damaged {
                seq: from,
                why: "it is missing".into(),
            }),
            false => Ok(piece),
        }
    }
}

impl Segment {
    /// The first and the last batch, and the last one's value.
    fn ends(&self) -> fjall::Result<Option<(Seq, Seq, UserValue)>> {
        let (Some(first), Some(last)) = (
            self.keyspace.first_key_value(),
            self.keyspace.last_key_value(),
        ) else {
            return Ok(None);
        };
        let first = first.key()?;
        let (last, value) = last.into_inner()?;
        Ok(format::seq(&first)
            .zip(format::seq(&last))
            .map(|(first, last)| (first, last, value)))
    }
}

/// Begins a segment at batch `first`.
pub(super) fn new_segment(db: &Database, first: Seq) -> fjall::Result<Segment> {
    let keyspace = db.keyspace(&format!("{SEGMENT}{first}"), options)?;
    // The library syncs the keyspace's folder and not the entry that names it; without that a
    // power loss would take the folder and all its batches.
    sync_parent(keyspace.path())?;
    Ok(Segment { first, keyspace })
}

/// What went wrong, in words.
pub(super) fn plain(error: &fjall::Error) -> String {
    match error {
        fjall::Error::Io(error) => error.to_string(),
        fjall::Error::Storage(fjall::LsmError::Io(error)) => error.to_string(),
        fjall::Error::Storage(fjall::LsmError::ChecksumMismatch { .. }) => {
            "a table's checksum is wrong, so the disk has changed it; restore from a backup"
                .to_owned()
        }
        fjall::Error::Poisoned => "an earlier write or sync failed".to_owned(),
        fjall::Error::Locked => "it is open already".to_owned(),
        fjall::Error::JournalRecovery(error) => format!("its journal can't be read: {error}"),
        other => other.to_string(),
    }
}

fn open_database(dir: &Path) -> fjall::Result<Database> {
    Database::builder(dir)
        .cache_size(CACHE_BYTES)
        .max_cached_files(Some(FILES_OPEN_MAX))
        // The least that the library allows.
        .max_journaling_size(64 * 1024 * 1024)
        // Writes tables behind the one thread that appends.
        .worker_threads(1)
        // The log says itself when to sync.
        .manual_journal_persist(true)
        .open()
}

/// Opens a database whose journal the library found damaged, if only its last entry is torn.
fn open_torn(dir: &Path, error: fjall::JournalRecoveryError) -> Result<Database, OpenError> {
    let io = |error| OpenError::io(dir, error);
    if let Some(cut) = Cut::make(dir).map_err(io)? {
        if let Ok(db) = open_database(dir) {
            tracing::warn!("log's torn last write cut off; it was never answered");
            return Ok(db);
        }
        cut.undo().map_err(io)?;
    }
    Err(OpenError::storage(
        dir,
        &fjall::Error::JournalRecovery(error),
    ))
}

fn options() -> KeyspaceCreateOptions {
    KeyspaceCreateOptions::default()
        .manual_journal_persist(true)
        // The thread that appends says when, so that it never waits in the library: there a worker
        // that died would make it wait for ever.
        .max_memtable_size(u64::MAX)
        .compaction_strategy(Arc::new(
            Leveled::default().with_l0_threshold(TABLES_BEFORE_MERGE),
        ))
        // Filters are for asking for one key.
        .filter_policy(FilterPolicy::disabled())
}

/// The log's identity, and what its numbering began after.
fn about(db: &Database) -> fjall::Result<Option<(LogId, Seq)>> {
    let about = db.keyspace(ABOUT, options)?;
    let (id, base) = (about.get(ABOUT_ID)?, about.get(ABOUT_BASE)?);
    Ok((|| {
        let id = std::str::from_utf8(id.as_deref()?).ok()?;
        let base = base.as_deref()?.try_into().ok()?;
        Some((LogId(id.into()), Seq::from_le_bytes(base)))
    })())
}

fn beside(dir: &Path, extension: &str) -> PathBuf {
    dir.with_extension(extension)
}

fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => File::open(".")?.sync_all(),
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}
