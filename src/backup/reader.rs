//! Reads backups: files of this program in parallel, other gzip CSV files row by row.

use std::io::{self, Read};

use super::error::BackupError;
use super::format::HeadRecord;
use super::member::{self, MEMBER_BYTES_MAX, MemberKind, MemberRecord, START_BYTES};
use super::native::{NativeReader, check_positions};
use super::progress::{ReadProgress, RowSink, Summary};
use super::third_party_csv;
use crate::log::Seq;

/// In this many bytes at the start of a third-party file, no member of this program may begin.
const MEMBER_SEARCH_BYTES: u64 = 64 * 1024;

/// The head record of the backup in `source`; `None` for a third-party file. Unverified: it is
/// valid only if [`read`] accepts the file.
///
/// # Errors
/// The file does not begin like a backup.
pub fn read_head(mut source: impl Read + Unpin + Send) -> Result<Option<HeadRecord>, BackupError> {
    let start = read_start(&mut source)?;
    match detect(&start)? {
        MemberKind::Native(_) => {
            let progress = ReadProgress::default();
            let mut native = NativeReader::new(io::Cursor::new(start).chain(source), &progress);
            native.read_head().map(|(head, _fields)| Some(head))
        }
        _ => Ok(None),
    }
}

fn read_start(source: &mut impl Read) -> Result<Vec<u8>, BackupError> {
    let mut start = Vec::with_capacity(START_BYTES);
    let read = source.take(START_BYTES as u64).read_to_end(&mut start);
    read.map_err(|error| BackupError::Io { at: 0, error })?;
    Ok(start)
}

/// Reads `source` to its end and passes every row to `sink`, from several threads if there are
/// many.
///
/// Blocks, so must not be called from an async task. The rows are verified only at the end: after
/// an error, the caller must discard what `sink` collected.
///
/// # Errors
/// The file is not a complete, unchanged backup; see [`BackupError`].
pub fn read(
    source: impl Read + Unpin + Send,
    sink: &RowSink<'_>,
    progress: &ReadProgress,
) -> Result<Summary, BackupError> {
    read_with(usize::MAX, source, sink, progress)
}

/// Like [`read`], but on the calling thread only and in the order of the file.
///
/// # Errors
/// The file is not a complete, unchanged backup; see [`BackupError`].
pub fn read_in_order(
    source: impl Read + Unpin + Send,
    sink: &RowSink<'_>,
    progress: &ReadProgress,
) -> Result<Summary, BackupError> {
    read_with(1, source, sink, progress)
}

fn read_with(
    threads_max: usize,
    mut source: impl Read + Unpin + Send,
    sink: &RowSink<'_>,
    progress: &ReadProgress,
) -> Result<Summary, BackupError> {
    let start = read_start(&mut source)?;
    let kind = detect(&start)?;
    let mut source = io::Cursor::new(start).chain(source);
    match kind {
        MemberKind::Native(_) => NativeReader::new(source, progress).read(threads_max, sink),
        _ => {
            // A native file that lost only its first member would pass for a complete third-party
            // file, whatever else it lost.
            let mut ahead = Vec::new();
            let read = (&mut source)
                .take(MEMBER_SEARCH_BYTES)
                .read_to_end(&mut ahead);
            read.map_err(|error| BackupError::Io { at: 0, error })?;
            if member::contains_native_member(&ahead) {
                let what = "a backup of gradestore without its first member";
                return Err(BackupError::Damaged { at: 0, what });
            }
            third_party_csv::read(io::Cursor::new(ahead).chain(source), sink, progress)
        }
    }
}

/// Whether a file that begins with `start` is a native or a third-party one.
fn detect(start: &[u8]) -> Result<MemberKind, BackupError> {
    if start.len() < START_BYTES && member::is_gzip_prefix(start) {
        let at = start.len() as u64;
        return Err(BackupError::Truncated { at });
    }
    match member::kind_of(start) {
        MemberKind::NotGzip => Err(BackupError::NotGzip),
        MemberKind::Unknown => Err(BackupError::Damaged {
            at: 0,
            what: "the gzip header has an unknown extra field",
        }),
        kind => Ok(kind),
    }
}

/// The end position of the backup in `source`; 0 for a third-party file. Reads only the members'
/// headers. Unverified: it is valid only if [`read`] accepts the file.
///
/// # Errors
/// The headers do not lead to the end record.
pub fn end_position(mut source: impl Read + Unpin + Send) -> Result<Seq, BackupError> {
    let start = read_start(&mut source)?;
    if !matches!(member::kind_of(&start), MemberKind::Native(_)) {
        return Ok(0);
    }
    let progress = ReadProgress::default();
    let mut native = NativeReader::new(io::Cursor::new(start).chain(source), &progress);
    let (head, _fields) = native.read_head()?;
    let mut skipped = Vec::new();
    loop {
        let at = native.at();
        let (header, record) = native.read_header()?;
        match record {
            MemberRecord::End(end) => {
                check_positions(head.position, end.position)?;
                return Ok(end.position);
            }
            MemberRecord::Rows { member_bytes, .. }
                if (member_bytes as usize) <= MEMBER_BYTES_MAX =>
            {
                skipped.clear();
                let rest = (member_bytes as usize).saturating_sub(header.len());
                native.read_exact(rest, &mut skipped)?;
            }
            _ => {
                let what = "the members do not lead to an end record";
                return Err(BackupError::Damaged { at, what });
            }
        }
    }
}
