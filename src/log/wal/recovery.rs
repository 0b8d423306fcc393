//! Creates a log, or opens one: checks that its segments are contiguous, and finds its end. All
//! calls block.
//!
//! Each batch is synced before the next one is written. So a power loss can only tear the last
//! batch, and that was never acknowledged: recovery truncates it. Anything else that does not match
//! its checksum is damage: opening fails and leaves the files unchanged.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::segment::{
    ActiveSegment, HEADER_BYTES, RecordHeaders, SegmentHeader, create, list, path, read_at,
    sync_dir,
};
use super::{OpenError, WalSizes, format, record, segment};
use crate::log::{LogId, Position, RandomId, ReadError, Seq};

/// A log that was opened and checked.
pub(super) struct RecoveredLog {
    /// The log's id.
    pub(super) log: RandomId,
    /// Its first batch is base + 1.
    pub(super) base: Seq,
    /// The first batch of each segment, in order; never empty.
    pub(super) segments: Vec<Seq>,
    /// The last batch's position, or the base position.
    pub(super) last: Position,
    pub(super) active: ActiveSegment,
}

/// The content of the last segment.
pub(super) struct SegmentScan {
    /// The last batch's position.
    pub(super) position: Position,
    /// The offset of the last record, if there is one.
    last: Option<usize>,
    /// The end of the last record.
    end: usize,
    /// Whether only zeros follow.
    is_clean: bool,
}

impl RecoveredLog {
    /// Creates an empty log in `dir`, which must not exist. Its first batch will be `base` + 1.
    ///
    /// Creates it under another name and renames it, so that a crash leaves no partial log.
    pub(super) fn create(dir: &Path, base: Seq, sizes: WalSizes) -> Result<(), OpenError> {
        let log = RandomId::random()?;
        let header = SegmentHeader {
            log,
            base,
            start: Position::base(&log_id(log), base, 0),
            continues: false,
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
    pub(super) fn is_unused(&self) -> bool {
        self.last.seq == self.base
    }

    /// Removes an empty log.
    pub(super) fn discard(self, dir: &Path) -> Result<(), OpenError> {
        drop(self);
        // Renames it first, so that a partly removed log is never opened.
        let old = dir.with_extension("old");
        remove(&old)
            .and_then(|()| fs::rename(dir, &old))
            .and_then(|()| sync_parent(dir))
            .and_then(|()| remove(&old))
            .map_err(|error| OpenError::io(dir, error))
    }

    /// Opens the log in `dir`. Changes nothing before it has checked everything.
    pub(super) fn open(dir: &Path) -> Result<Self, OpenError> {
        let io = |error| OpenError::io(dir, error);
        let damaged = |why: String| OpenError::Damaged {
            dir: dir.into(),
            why: why.into(),
        };
        let files = list(dir).map_err(io)?;
        let Some((&last, earlier)) = files.segments.split_last() else {
            let (dir, why) = (dir.into(), "it has no segment file".into());
            return Err(OpenError::Unrecognized { dir, why });
        };
        let mut options = File::options();
        let file = options.read(true).write(true).open(path(dir, last));
        let file = file.map_err(io)?;
        let bytes = read_all(&file).map_err(io)?;
        let header = check_headers(dir, &files.segments, &bytes)?;
        for (first, next) in earlier.iter().zip(files.segments.iter().skip(1)) {
            let file = File::open(path(dir, *first)).map_err(io)?;
            check_contiguous(&file, *first, *next)
                .map_err(io)?
                .map_err(damaged)?;
        }
        let scan = SegmentScan::new(&header, &bytes).map_err(|error| match error {
            ReadError::NewerFormat { seq, format } => OpenError::Newer {
                dir: dir.into(),
                seq,
                format,
            },
            ReadError::Damaged { seq, why } => damaged(format!("batch {seq}: {why}")),
            other => damaged(other.to_string()),
        })?;
        // The log is complete, so its files may be changed.
        let active = scan.activate(file, &bytes).map_err(io)?;
        for leftover in [dir.with_extension("new"), dir.with_extension("old")] {
            remove(&leftover).map_err(io)?;
        }
        for unfinished in &files.unfinished {
            fs::remove_file(unfinished).map_err(io)?;
        }
        // An earlier process may have failed to do so.
        sync_dir(dir).map_err(io)?;
        Ok(Self {
            log: header.log,
            base: header.base,
            segments: files.segments,
            last: scan.position,
            active,
        })
    }
}

/// Checks that all segments have headers of the same log and are in the right files. Returns the
/// header of the last segment, whose content is `bytes`.
#[expect(clippy::expect_used, reason = "a precondition")]
fn check_headers(dir: &Path, segments: &[Seq], bytes: &[u8]) -> Result<SegmentHeader, OpenError> {
    let check = |bytes: &[u8], first: Seq| {
        let file = path(dir, first);
        let damaged = |why: String| OpenError::Damaged {
            dir: dir.into(),
            why: format!("{}: {why}", file.display()).into(),
        };
        let header = SegmentHeader::read(bytes).map_err(damaged)?;
        match header.first() == first && header.base < first {
            true => Ok(header),
            false => Err(damaged(format!("it begins with batch {}", header.first()))),
        }
    };
    let (last, earlier) = segments
        .split_last()
        .expect("there is at least one segment");
    let last_header = check(bytes, *last)?;
    let mut bytes = Vec::new();
    for first in earlier {
        let read = File::open(path(dir, *first))
            .and_then(|file| read_at(&file, 0, HEADER_BYTES as usize, &mut bytes));
        read.map_err(|error| OpenError::io(dir, error))?;
        let header = check(&bytes, *first)?;
        if (header.log, header.base) != (last_header.log, last_header.base) {
            let (dir, file) = (dir.into(), path(dir, *first));
            let why = format!("{} belongs to another log", file.display()).into();
            return Err(OpenError::Damaged { dir, why });
        }
    }
    Ok(last_header)
}

/// Checks that a segment has the records from `first` up to `next` - 1. The inner error is the
/// reason why not. Checks only the headers; readers check the values.
fn check_contiguous(file: &File, first: Seq, next: Seq) -> io::Result<Result<(), String>> {
    let file_bytes = file.metadata()?.len();
    let (mut headers, mut at) = (RecordHeaders::of(file), HEADER_BYTES);
    for seq in first..next {
        let missing = || format!("batches {seq} to {} are missing", next - 1);
        let Some(header) = headers.at(at)?.filter(|header| !header.is_zero()) else {
            return Ok(Err(missing()));
        };
        if header.seq != seq {
            return Ok(Err(format!(
                "batch {} is in the place of batch {seq}",
                header.seq
            )));
        }
        if at + header.bytes() as u64 > file_bytes {
            return Ok(Err(missing()));
        }
        at += header.bytes_padded() as u64;
    }
    Ok(Ok(()))
}

impl SegmentScan {
    /// Scans the last segment.
    pub(super) fn new(header: &SegmentHeader, bytes: &[u8]) -> Result<Self, ReadError> {
        let mut scan = Self {
            position: header.start,
            last: None,
            end: HEADER_BYTES as usize,
            is_clean: true,
        };
        let after = |at: usize| bytes.get(at..).unwrap_or_default();
        while let Some(record) = record::read(after(scan.end)) {
            if record.seq != scan.position.seq + 1 {
                break;
            }
            scan.position = format::position(&scan.position, record.value)?;
            scan.last = Some(scan.end);
            scan.end += record.bytes;
        }
        let rest = after(scan.end);
        scan.is_clean = rest.iter().all(|byte| *byte == 0);
        let seq = scan.position.seq + 1;
        if !scan.is_clean {
            let steps = (0..rest.len()).step_by(record::ALIGNMENT);
            let mut later_records = steps.filter_map(|at| record::read(rest.get(at..)?));
            if let Some(record) = later_records.next() {
                let follows = record.seq;
                let why = format!("its checksum does not match, and batch {follows} follows it");
                return Err(ReadError::damaged(seq, &why));
            }
            if !record::is_torn(rest, seq) {
                return Err(ReadError::damaged(seq, "its checksum does not match"));
            }
        }
        Ok(scan)
    }

    /// Truncates a torn record, syncs the segment, whose content is `bytes`, and makes it the
    /// active one.
    fn activate(&self, file: File, bytes: &[u8]) -> io::Result<ActiveSegment> {
        let (at, zeroed_end) = (self.end as u64, bytes.len() as u64);
        if !self.is_clean {
            let seq = self.position.seq + 1;
            tracing::warn!(
                seq,
                "truncated a torn record at the tail (never acknowledged)"
            );
            segment::write_zeros(&file, at, zeroed_end)?;
        }
        // An earlier process may have written the last batch and ended when the sync failed. Then
        // the page cache has data that the disk lacks, and only a new write makes the next sync
        // write it. All batches before were synced before this one was written.
        if let Some(last) = self.last
            && let Some(record) = bytes.get(last..self.end.min(bytes.len()))
        {
            file.write_all_at(record, last as u64)?;
        }
        file.sync_all()?;
        Ok(ActiveSegment {
            file,
            at,
            zeroed_end,
        })
    }
}

/// The id of a log on disk.
pub(super) fn log_id(log: RandomId) -> LogId {
    LogId(format!("disk-{log}").into())
}

fn read_all(file: &File) -> io::Result<Vec<u8>> {
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
