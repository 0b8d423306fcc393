//! A segment: a file in the log's directory, named for its first batch in 20 digits,
//! `00000000000000000001.seg`. It begins with a header of 4 KiB; integers are little-endian:
//!
//! | bytes | what |
//! | --- | --- |
//! | 8 | `gradeseg` |
//! | 8 | version of the format: 1 |
//! | 16 | which log it is of |
//! | 8 | the sequence number that the log's numbering began after |
//! | 8 | the first batch |
//! | 8 | the time of the batch before that, nanoseconds since 1970; 0 if there was none |
//! | 8 | XXH3-64 of all before |
//! | rest | zeros |
//!
//! After it come [records](super::record) without a gap, and after the last one room: zeros up to the
//! file's end, written and synced before a record goes there. Writing over what is there changes
//! nothing but data, so a sync has neither the file's length nor its blocks to write.
//!
//! A segment ends where the next one begins: what it has of that batch or later ones counts for
//! nothing.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

use super::record::{HEAD_BYTES, Head};
use crate::log::{Chain, Position, RandomId, Seq};

/// Where the first record is: a page of its own, so that no record's write touches the header.
pub(super) const HEADER_BYTES: u64 = 4096;
/// What of it the checksum is of.
const SUMMED_BYTES: usize = 88;
const MAGIC: &[u8; 8] = b"gradeseg";
const VERSION: u64 = 1;
const EXTENSION: &str = "seg";
/// Of a segment that is being made.
const NEW_EXTENSION: &str = "new";
/// What is read at once to go from record to record.
const WINDOW_BYTES: usize = 64 * 1024;

static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// What a segment says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) log: RandomId,
    /// What the log's numbering began after.
    pub(super) base: Seq,
    /// The position before its first batch.
    pub(super) start: Position,
}

impl Header {
    /// Its first batch.
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
        let checksum = xxh3_64(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes.resize(HEADER_BYTES as usize, 0);
        bytes
    }

    /// Reads what [`write`](Self::write) wrote, or says what is wrong.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, String> {
        let number = |at: usize| {
            let bytes = bytes.get(at..)?.first_chunk()?;
            Some(u64::from_le_bytes(*bytes))
        };
        if !bytes.starts_with(MAGIC) {
            return Err("it does not begin as one of the log's files does".to_owned());
        }
        if let Some(version) = number(8)
            && version != VERSION
        {
            return Err(format!(
                "its format is {version}, this version reads {VERSION} only"
            ));
        }
        let whole = (|| {
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
            };
            (number(SUMMED_BYTES)? == xxh3_64(summed)).then_some(header)
        })();
        whole.ok_or_else(|| "its header is not what was written".to_owned())
    }
}

/// The file of the segment that begins with batch `first`.
pub(super) fn path(dir: &Path, first: Seq) -> PathBuf {
    dir.join(format!("{first:020}.{EXTENSION}"))
}

/// What of a log a directory holds, by name.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// First batches, in order.
    pub(super) segments: Vec<Seq>,
    /// Segments that were never finished.
    pub(super) unfinished: Vec<PathBuf>,
}

/// Looks through `dir`.
pub(super) fn list(dir: &Path) -> io::Result<Listing> {
    let mut listing = Listing::default();
    for file in fs::read_dir(dir)? {
        let path = file?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let number = |digits: &str| match digits.len() {
            20 => digits.parse::<Seq>().ok(),
            _ => None,
        };
        let numbered = name
            .split_once('.')
            .and_then(|(digits, extension)| Some((number(digits)?, extension)));
        match numbered {
            Some((first, EXTENSION)) => listing.segments.push(first),
            Some((_, NEW_EXTENSION)) => listing.unfinished.push(path),
            _ => {}
        }
    }
    listing.segments.sort_unstable();
    Ok(listing)
}

/// Makes a segment with `room_bytes` for records, durable when this returns. One that begins with the
/// same batch is replaced: none of its batches counted.
///
/// After an error it may be there or not.
pub(super) fn create(dir: &Path, header: &Header, room_bytes: u64) -> io::Result<File> {
    let path = path(dir, header.first());
    let new = path.with_extension(NEW_EXTENSION);
    let make = || -> io::Result<File> {
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(true);
        let file = options.open(&new)?;
        file.write_all_at(&header.write(), 0)?;
        write_zeros(&file, HEADER_BYTES, HEADER_BYTES + room_bytes)?;
        file.sync_all()?;
        Ok(file)
    };
    let file = make().inspect_err(|_| {
        // It may hold room that others need. Opening the log removes it too.
        let _ = fs::remove_file(&new);
    })?;
    fs::rename(&new, &path)?;
    sync_dir(dir)?;
    Ok(file)
}

/// Makes the bytes from `from` up to `to` zeros.
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

/// Makes which files there are in `dir` durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Replaces what is in `bytes` by up to `wanted` bytes from `at` on: fewer only at the file's end.
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

/// The heads of records, one after the other, without what is between them.
pub(super) struct Heads<'a> {
    file: &'a File,
    window: Vec<u8>,
    window_at: u64,
}

impl<'a> Heads<'a> {
    pub(super) fn of(file: &'a File) -> Self {
        Self {
            file,
            window: Vec::new(),
            window_at: 0,
        }
    }

    /// The head at `at`; `None` where the file ends before it does.
    pub(super) fn at(&mut self, at: u64) -> io::Result<Option<Head>> {
        let skipped = at.checked_sub(self.window_at);
        let skipped = skipped.and_then(|bytes| usize::try_from(bytes).ok());
        let held = skipped.and_then(|skipped| self.window.get(skipped..));
        if let Some(held) = held.filter(|held| held.len() >= HEAD_BYTES) {
            return Ok(Head::read(held));
        }
        read_at(self.file, at, WINDOW_BYTES, &mut self.window)?;
        self.window_at = at;
        Ok(Head::read(&self.window))
    }
}
