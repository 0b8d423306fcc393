//! A segment: a file in the log's directory, named after its first batch in 20 digits,
//! `00000000000000000001.seg`. It begins with a header of 4 KiB. Integers are little-endian:
//!
//! | bytes | content |
//! | --- | --- |
//! | 8 | `gradeseg` |
//! | 8 | version of the format: 1 |
//! | 16 | the log's id |
//! | 8 | the log's base: its first batch is base + 1 |
//! | 8 | the segment's first batch |
//! | 8 | the time of the batch before it, in nanoseconds since 1970; 0 without one |
//! | 16 | the chain of the batch before it |
//! | 16 | the chain before that one |
//! | 8 | 1 if the segment before it ends with that batch, else 0 |
//! | 8 | XXH3-64 of the bytes before |
//! | rest | zeros |
//!
//! [Records](super::record) follow without a gap. After the last one there are zeros up to the end
//! of the file, written and synced in advance. A record overwrites them, so a sync writes data
//! only, and neither the file's length nor its blocks.
//!
//! A segment ends where the next one begins: the log ignores records of that batch and later ones.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

use super::record::{RECORD_HEADER_BYTES, RecordHeader};
use crate::log::{Chain, Position, RandomId, Seq};
use crate::sys::files;

/// The offset of the first record: a page, so that writing records does not touch the header.
pub(super) const HEADER_BYTES: u64 = 4096;
/// The checksum covers this many bytes.
const SUMMED_BYTES: usize = 96;
const MAGIC: &[u8; 8] = b"gradeseg";
const VERSION: u64 = 1;
const EXTENSION: &str = "seg";
/// The extension of a segment that is being created.
const NEW_EXTENSION: &str = "new";
/// Bytes read at once while skipping records.
const WINDOW_BYTES: usize = 64 * 1024;

static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// The header of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    pub(super) log: RandomId,
    /// The log's base: its first batch is base + 1.
    pub(super) base: Seq,
    /// The position before its first batch.
    pub(super) start: Position,
    /// Whether the segment before it ends there.
    pub(super) continues: bool,
}

impl SegmentHeader {
    /// The segment's first batch.
    pub(super) fn first(&self) -> Seq {
        self.start.seq + 1
    }

    fn write(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES as usize);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.log.0.to_le_bytes());
        for number in [self.base, self.first(), self.start.time_ns] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        for chain in [self.start.chain, self.start.previous] {
            bytes.extend_from_slice(&chain.0.to_le_bytes());
        }
        bytes.extend_from_slice(&u64::from(self.continues).to_le_bytes());
        let checksum = xxh3_64(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes.resize(HEADER_BYTES as usize, 0);
        bytes
    }

    /// Parses the output of [`write`](Self::write). The error is the reason why it is invalid.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, String> {
        let number = |at: usize| {
            let bytes = bytes.get(at..)?.first_chunk()?;
            Some(u64::from_le_bytes(*bytes))
        };
        if !bytes.starts_with(MAGIC) {
            return Err("it is not a segment of a log".to_owned());
        }
        if let Some(version) = number(8)
            && version != VERSION
        {
            return Err(format!(
                "it has format {version}, this version reads only {VERSION}"
            ));
        }
        let header = (|| {
            let summed = bytes.get(..SUMMED_BYTES)?;
            let wide = |at: usize| Some(u128::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
            let header = Self {
                log: RandomId(wide(16)?),
                base: number(32)?,
                start: Position {
                    seq: number(40)?.checked_sub(1)?,
                    time_ns: number(48)?,
                    chain: Chain(wide(56)?),
                    previous: Chain(wide(72)?),
                },
                continues: number(88)? == 1,
            };
            (number(SUMMED_BYTES)? == xxh3_64(summed)).then_some(header)
        })();
        header.ok_or_else(|| "its header does not match its checksum".to_owned())
    }
}

/// The file of the segment that begins with batch `first`.
pub(super) fn path(dir: &Path, first: Seq) -> PathBuf {
    dir.join(format!("{first:020}.{EXTENSION}"))
}

/// The files of a log.
#[derive(Debug, Default)]
pub(super) struct LogFiles {
    /// The segments' first batches, in order.
    pub(super) segments: Vec<Seq>,
    /// Segments whose creation did not finish.
    pub(super) unfinished: Vec<PathBuf>,
}

/// Lists the files of the log in `dir`. Ignores other files.
pub(super) fn list(dir: &Path) -> io::Result<LogFiles> {
    let mut files = LogFiles::default();
    for file in fs::read_dir(dir)? {
        let path = file?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let number = |digits: &str| match digits.len() {
            20 if !digits.starts_with('+') => digits.parse::<Seq>().ok(),
            _ => None,
        };
        let numbered = name
            .split_once('.')
            .and_then(|(digits, extension)| Some((number(digits)?, extension)));
        match numbered {
            Some((first, EXTENSION)) => files.segments.push(first),
            Some((_, NEW_EXTENSION)) => files.unfinished.push(path),
            _ => {}
        }
    }
    files.segments.sort_unstable();
    Ok(files)
}

/// Creates a segment with `space_bytes` of zeros for records, and syncs it. Replaces a segment with
/// the same first batch.
///
/// After an error the segment may exist or not.
pub(super) fn create(dir: &Path, header: &SegmentHeader, space_bytes: u64) -> io::Result<File> {
    let path = path(dir, header.first());
    let new = path.with_extension(NEW_EXTENSION);
    let create = || -> io::Result<File> {
        let file = files::create(&new)?;
        file.write_all_at(&header.write(), 0)?;
        write_zeros(&file, HEADER_BYTES, HEADER_BYTES + space_bytes)?;
        file.sync_all()?;
        Ok(file)
    };
    let file = create().inspect_err(|_| {
        // Frees the space. Opening the log removes the file, too.
        let _ = fs::remove_file(&new);
    })?;
    fs::rename(&new, &path)?;
    sync_dir(dir)?;
    Ok(file)
}

/// The segment to which the next batch is written.
pub(super) struct ActiveSegment {
    pub(super) file: File,
    /// The offset of the next record.
    pub(super) at: u64,
    /// The end of the zeros, which is the end of the file.
    pub(super) zeroed_end: u64,
}

impl ActiveSegment {
    /// Extends the zeros up to `end` and syncs them. After an error nothing may be written to this
    /// segment any more: the state of the file after its last record is unknown.
    pub(super) fn reserve_space(&mut self, end: u64) -> io::Result<()> {
        let written = write_zeros(&self.file, self.zeroed_end, end);
        if let Err(error) = written.and_then(|()| self.file.sync_all()) {
            // Frees the space for others.
            let _ = self.file.set_len(self.zeroed_end);
            return Err(error);
        }
        self.zeroed_end = end;
        Ok(())
    }
}

/// Writes zeros from `from` up to `to`.
pub(super) fn write_zeros(file: &File, from: u64, to: u64) -> io::Result<()> {
    let mut at = from;
    while at < to {
        let bytes = usize::try_from(to - at).unwrap_or(usize::MAX);
        let zeros = ZEROS.get(..bytes).unwrap_or(&ZEROS);
        file.write_all_at(zeros, at)?;
        at += zeros.len() as u64;
    }
    Ok(())
}

/// Syncs the directory's entries.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Replaces the content of `bytes` with up to `wanted` bytes from `at`: fewer only at the end of
/// the file.
pub(super) fn read_at(file: &File, at: u64, wanted: usize, bytes: &mut Vec<u8>) -> io::Result<()> {
    bytes.resize(wanted, 0);
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..)
        && !rest.is_empty()
    {
        match file.read_at(rest, at + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(())
}

/// Reads the headers of consecutive records through a window, without their values.
pub(super) struct RecordHeaders<'a> {
    file: &'a File,
    window: Vec<u8>,
    window_at: u64,
}

impl<'a> RecordHeaders<'a> {
    pub(super) fn of(file: &'a File) -> Self {
        Self {
            file,
            window: Vec::new(),
            window_at: 0,
        }
    }

    /// The header at `at`; `None` if the file ends within it.
    pub(super) fn at(&mut self, at: u64) -> io::Result<Option<RecordHeader>> {
        let skipped = at.checked_sub(self.window_at);
        let skipped = skipped.and_then(|bytes| usize::try_from(bytes).ok());
        let buffered = skipped.and_then(|skipped| self.window.get(skipped..));
        if let Some(buffered) = buffered.filter(|buffered| buffered.len() >= RECORD_HEADER_BYTES) {
            return Ok(RecordHeader::read(buffered));
        }
        read_at(self.file, at, WINDOW_BYTES, &mut self.window)?;
        self.window_at = at;
        Ok(RecordHeader::read(&self.window))
    }
}
