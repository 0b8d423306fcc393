//! A last write that power loss left with a hole.
//!
//! Pages of a write that was not synced reach the disk in any order. The library cuts off an end
//! that is missing, but of an entry whose end is there and whose middle is not it says that the
//! checksum is wrong, and opens no more. Every batch is synced before the next is written, so only
//! the last entry can be torn like that, and its batch was never answered: cutting its end marker
//! makes it the missing end that the library knows what to do with.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// What is read at once while looking for the journal's end.
const CHUNK_BYTES: u64 = 64 * 1024;

/// A cut that can be undone.
pub(super) struct Cut {
    file: File,
    /// The journal's length before.
    len: u64,
    /// Where its last byte was, and that byte.
    at: u64,
    byte: u8,
}

impl Cut {
    /// Cuts the last byte off the newest journal in `dir`; `None` if there is nothing to cut.
    pub(super) fn make(dir: &Path) -> io::Result<Option<Self>> {
        let Some(path) = newest_journal(dir)? else {
            return Ok(None);
        };
        let mut file = OpenOptions::new().read(true).write(true).open(path)?;
        let len = file.metadata()?.len();
        let Some((at, byte)) = last_byte(&mut file, len)? else {
            return Ok(None);
        };
        file.set_len(at)?;
        file.sync_all()?;
        Ok(Some(Self {
            file,
            len,
            at,
            byte,
        }))
    }

    /// Puts back what was cut: it was not what kept the journal from being read.
    pub(super) fn undo(mut self) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(self.at))?;
        self.file.write_all(&[self.byte])?;
        self.file.set_len(self.len)?;
        self.file.sync_all()
    }
}

/// The journal that was written to last: they are numbered.
fn newest_journal(dir: &Path) -> io::Result<Option<PathBuf>> {
    let mut newest = None;
    for file in fs::read_dir(dir)? {
        let path = file?.path();
        let number = path.file_name().and_then(|name| name.to_str());
        let number = number.and_then(|name| name.strip_suffix(".jnl")?.parse::<u64>().ok());
        if let Some(number) = number {
            newest = newest.max(Some((number, path)));
        }
    }
    Ok(newest.map(|(_, path)| path))
}

/// Where the last byte is that is not 0, and that byte: a journal is made with room at its end,
/// filled with zeros, and no entry ends in one.
fn last_byte(file: &mut File, len: u64) -> io::Result<Option<(u64, u8)>> {
    let mut end = len;
    let mut chunk = Vec::new();
    while end > 0 {
        let begin = end.saturating_sub(CHUNK_BYTES);
        file.seek(SeekFrom::Start(begin))?;
        chunk.clear();
        (&mut *file).take(end - begin).read_to_end(&mut chunk)?;
        let last = chunk.iter().enumerate().rev().find(|(_, byte)| **byte != 0);
        if let Some((at, byte)) = last {
            return Ok(Some((begin + at as u64, *byte)));
        }
        end = begin;
    }
    Ok(None)
}
