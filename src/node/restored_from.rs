//! Which backup a data directory was restored from. With it a start with the same `--restore-from`
//! is a normal start, so that a unit file may keep the flag.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use xxhash_rust::xxh3::Xxh3Default;

use crate::sys::files;

/// The file in the data directory with the fingerprint of the backup.
const NAME: &str = "restored-from";
/// How much of a backup is read at once.
const BUFFER_BYTES: usize = 1 << 20;

/// The XXH3-128 of all bytes of a backup, and their number, as text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fingerprint(String);

impl Fingerprint {
    /// That of the file at `path`. Blocks.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let (mut hash, mut bytes) = (Xxh3Default::new(), 0);
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let read = file.read(&mut buffer)?;
            let Some(part) = buffer.get(..read).filter(|part| !part.is_empty()) else {
                return Ok(Self(format!("{:032x} {bytes}", hash.digest128())));
            };
            hash.update(part);
            bytes += part.len();
        }
    }

    /// Whether data directory `dir` was restored from this backup.
    pub(super) fn is_kept_in(&self, dir: &Path) -> io::Result<bool> {
        match fs::read_to_string(dir.join(NAME)) {
            Ok(kept) => Ok(kept.trim_end() == self.0),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Records that data directory `dir` is being restored from this backup.
    pub(super) fn keep_in(&self, dir: &Path) -> io::Result<()> {
        files::write(&dir.join(NAME), &format!("{}\n", self.0))
    }
}
