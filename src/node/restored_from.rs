//! Which backup a data directory was restored from. With it a start with the same `--restore-from`
//! is a normal start, so that a unit file may keep the flag.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use xxhash_rust::xxh3::Xxh3Default;

use crate::sys::files;

/// The file in the data directory with the fingerprint of the backup, and its path on a second line.
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
        Ok(kept_in(dir)?.lines().next() == Some(&self.0))
    }

    /// Records that data directory `dir` is being restored from this backup, the file at `path`.
    pub(super) fn keep_in(&self, dir: &Path, path: &Path) -> io::Result<()> {
        let path = std::path::absolute(path)?;
        files::write(
            &dir.join(NAME),
            &format!("{}\n{}\n", self.0, path.display()),
        )
    }
}

/// Whether data directory `dir` was restored from a file that was at `path`.
pub(super) fn is_path_kept_in(dir: &Path, path: &Path) -> io::Result<bool> {
    let path = std::path::absolute(path)?;
    let path = path.display().to_string();
    Ok(kept_in(dir)?
        .split_once('\n')
        .is_some_and(|(_, kept)| kept.trim_end_matches('\n') == path))
}

fn kept_in(dir: &Path) -> io::Result<String> {
    match fs::read_to_string(dir.join(NAME)) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        read => read,
    }
}
