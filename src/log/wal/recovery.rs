//! From files to a log: making one, checking that its segments follow each other, and finding its end.
//! All calls block.
//!
//! Each batch is synced before the next one is written, so of all that is in the files only the last
//! batch can be torn by a power loss, and then it was never answered. It is cut off. Whatever else is
//! not as it was written is damage: the log is refused and its files are left as they are.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::segment::{HEADER_BYTES, Header, Heads, create, list, path, read_at, sync_dir};
use super::{OpenError, Sizes, format, record, segment};
use crate::log::{LogId, Position, RandomId, Seq};

/// The opened log.
pub(super) struct Opened {
    /// Which log it is.
    pub(super) log: RandomId,
    /// What numbering began after.
    pub(super) base: Seq,
    /// The first batch of each segment, in order; never empty.
    pub(super) segments: Vec<Seq>,
    /// The last batch's position, or where numbering began.
    pub(super) last: Position,
    pub(super) pen: Pen,
}

/// Where the next batch goes.
pub(super) struct Pen {
    pub(super) file: File,
    /// Where the next record begins.
    pub(super) at: u64,
    /// Up to where there are zeros: the file's end.
    pub(super) room_end: u64,
}

/// What was found in the last segment.
pub(super) struct Found {
    /// The last batch's position.
    pub(super) position: Position,
    /// Where the last record begins, if there is one, and where it ends.
    last: Option<usize>,
    at: usize,
    /// Whether zeros are all that comes after it.
    clean: bool,
}

impl Opened {
    /// Makes an empty log at `dir`, which must not exist. Its first batch will be `base` + 1.
    ///
    /// It is built beside and moved: a crash leaves either no log or a whole one.
    pub(super) fn create(dir: &Path, base: Seq, sizes: Sizes) -> Result<(), OpenError> {
        let log = RandomId::random()?;
        let header = Header {
            log,
            base,
            start: Position::base(&log_id(log), base, 0),
        };
        let new = dir.with_extension("new");
        remove(&new)
            .and_then(|()| fs::create_dir(&new))
            .and_then(|()| create(&new, &header, sizes.step_bytes))
            .and_then(|_file| fs::rename(&new, dir))
            .and_then(|()| sync_parent(dir))
            .map_err(|error| OpenError::io(dir, error))
    }

    /// Whether no batch was ever appended.
    pub(super) fn unused(&self) -> bool {
        self.last.seq == self.base
    }

    /// Removes a log that holds nothing.
    pub(super) fn discard(self, dir: &Path) -> Result<(), OpenError> {
        drop(self);
        // Out of the way in one step first, so that no half of it is ever opened.
        let old = dir.with_extension("old");
        remove(&old)
            .and_then(|()| fs::rename(dir, &old))
            .and_then(|()| sync_parent(dir))
            .and_then(|()| remove(&old))
            .map_err(|error| OpenError::io(dir, error))
    }

    /// Opens the log at `dir`. Nothing in it is changed before all of it is checked.
    pub(super) fn open(dir: &Path) -> Result<Self, OpenError> {
        let io = |error| OpenError::io(dir, error);
        let damaged = |why: String| OpenError::Damaged {
            dir: dir.into(),
            why: why.into(),
        };
        let listing = list(dir).map_err(io)?;
        let Some((&last, earlier)) = listing.segments.split_last() else {
            let (dir, why) = (dir.into(), "it has no segment file".into());
            return Err(OpenError::Foreign { dir, why });
        };
        let mut options = File::options();
        let file = options.read(true).write(true).open(path(dir, last));
        let file = file.map_err(io)?;
        let bytes = whole(&file).map_err(io)?;
        let header = headers(dir, &listing.segments, &bytes)?;
        for (first, next) in earlier.iter().zip(listing.segments.iter().skip(1)) {
            let file = File::open(path(dir, *first)).map_err(io)?;
            follow(&file, *first, *next).map_err(io)?.map_err(damaged)?;
        }
        let found = Found::in_segment(&header, &bytes).map_err(damaged)?;
        // Now the log is known to be whole, and things may be changed.
        let pen = found.settle(file, &bytes).map_err(io)?;
        for left in [dir.with_extension("new"), dir.with_extension("old")] {
            remove(&left).map_err(io)?;
        }
        for unfinished in &listing.unfinished {
            fs::remove_file(unfinished).map_err(io)?;
        }
        // A process before may have failed to do so.
        sync_dir(dir).map_err(io)?;
        Ok(Self {
            log: header.log,
            base: header.base,
            segments: listing.segments,
            last: found.position,
            pen,
        })
    }
}

/// The header of the last segment, which `bytes` are, if all segments' headers are of the same log
/// and each is in its own file.
#[expect(clippy::expect_used, reason = "a precondition")]
fn headers(dir: &Path, segments: &[Seq], bytes: &[u8]) -> Result<Header, OpenError> {
    let check = |bytes: &[u8], first: Seq| {
        let file = path(dir, first);
        let damaged = |why: String| OpenError::Damaged {
            dir: dir.into(),
            why: format!("{}: {why}", file.display()).into(),
        };
        let header = Header::read(bytes).map_err(damaged)?;
        match header.first() == first && header.base < first {
            true => Ok(header),
            false => Err(damaged(format!("it begins with batch {}", header.first()))),
        }
    };
    let (last, earlier) = segments
        .split_last()
        .expect("the caller has read the last one");
    let of_last = check(bytes, *last)?;
    let mut bytes = Vec::new();
    for first in earlier {
        let read = File::open(path(dir, *first))
            .and_then(|file| read_at(&file, 0, HEADER_BYTES as usize, &mut bytes));
        read.map_err(|error| OpenError::io(dir, error))?;
        let header = check(&bytes, *first)?;
        if (header.log, header.base) != (of_last.log, of_last.base) {
            let (dir, file) = (dir.into(), path(dir, *first));
            let why = format!("{} is of another log", file.display()).into();
            return Err(OpenError::Damaged { dir, why });
        }
    }
    Ok(of_last)
}

/// Goes from record to record of a segment, from `first` to the batch before `next`; says what is
/// wrong if that is not reached. Values are checked when they are read.
fn follow(file: &File, first: Seq, next: Seq) -> io::Result<Result<(), String>> {
    let file_bytes = file.metadata()?.len();
    let (mut heads, mut at) = (Heads::of(file), HEADER_BYTES);
    for seq in first..next {
        let missing = || format!("batches {seq} to {} are missing", next - 1);
        let Some(head) = heads.at(at)?.filter(|head| !head.is_zero()) else {
            return Ok(Err(missing()));
        };
        if head.seq != seq {
            return Ok(Err(format!("batch {seq} is not where it should be")));
        }
        if at + head.bytes() as u64 > file_bytes {
            return Ok(Err(missing()));
        }
        at += head.bytes_padded() as u64;
    }
    Ok(Ok(()))
}

impl Found {
    /// Looks through the last segment.
    pub(super) fn in_segment(header: &Header, bytes: &[u8]) -> Result<Self, String> {
        let mut found = Self {
            position: header.start,
            last: None,
            at: HEADER_BYTES as usize,
            clean: true,
        };
        let after = |at: usize| bytes.get(at..).unwrap_or_default();
        while let Some(record) = record::read(after(found.at)) {
            if record.seq != found.position.seq + 1 {
                break;
            }
            let position = format::position(&found.position, record.value);
            found.position = position.map_err(|error| error.to_string())?;
            found.last = Some(found.at);
            found.at += record.bytes;
        }
        let rest = after(found.at);
        found.clean = rest.iter().all(|byte| *byte == 0);
        let seq = found.position.seq + 1;
        if !found.clean {
            let steps = (0..rest.len()).step_by(record::ALIGNMENT);
            let mut behind = steps.filter_map(|at| record::read(rest.get(at..)?));
            if let Some(record) = behind.next() {
                return Err(format!(
                    "batch {seq} is not what was written, and batch {} comes after it",
                    record.seq
                ));
            }
            if !record::is_torn(rest, seq) {
                return Err(format!("batch {seq} is not what was written"));
            }
        }
        Ok(found)
    }

    /// Makes the last segment, which `bytes` are, durable as it was found, without what is torn.
    fn settle(&self, file: File, bytes: &[u8]) -> io::Result<Pen> {
        let (at, room_end) = (self.at as u64, bytes.len() as u64);
        if !self.clean {
            let seq = self.position.seq + 1;
            tracing::warn!(
                seq,
                "truncated a torn record at the tail (never acknowledged)"
            );
            segment::write_zeros(&file, at, room_end)?;
        }
        // A process before may have written the last batch and gone when the sync failed. Then the
        // system shows what the disk does not have, and syncs it only if it is written again. The
        // batches before it were synced before it was written.
        if let Some(last) = self.last
            && let Some(record) = bytes.get(last..self.at.min(bytes.len()))
        {
            file.write_all_at(record, last as u64)?;
        }
        file.sync_all()?;
        Ok(Pen { file, at, room_end })
    }
}

/// How a log on disk is known.
pub(super) fn log_id(log: RandomId) -> LogId {
    LogId(format!("disk-{log}").into())
}

fn whole(file: &File) -> io::Result<Vec<u8>> {
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::new();
    read_at(file, 0, length, &mut bytes)?;
    Ok(bytes)
}

pub(super) fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

pub(super) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => sync_dir(Path::new(".")),
        Some(parent) => sync_dir(parent),
        None => Ok(()),
    }
}
