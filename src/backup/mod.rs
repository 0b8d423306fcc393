//! The backup file: a whole store as `*.csv.gz` that any tool opens.
//!
//! # The format, version 1
//!
//! The file is a row of gzip members (RFC 1952). Inflated one after the other they are one CSV
//! text (RFC 4180, lines end in `\n`): a header row, then a row a record, in no order, no user
//! twice. What is not CSV lives in the members' headers, in a FEXTRA subfield named `GS`, so the
//! file carries it wherever it is copied and tools pass over it:
//!
//! | member | inflates to | subfield `GS` holds |
//! | --- | --- | --- |
//! | first | the header row | `H` and a [`Head`] as JSON |
//! | any number | some rows | `M`, then as little-endian `u32` the member's length in bytes, its length inflated, its rows |
//! | last | nothing | `E`, a CRC-32 of what follows as little-endian `u32`, and an [`End`] as JSON |
//!
//! The first member also has FNAME and MTIME, so `gunzip -N` gives the file a name and a time.
//! There is no FCOMMENT and no FHCRC: DuckDB refuses both.
//!
//! A member says how long it is, so members inflate side by side without being searched for. The
//! last one says how many rows there are, what their digest is, and the XXH3-128 of every byte
//! before it: a file without it is a failed backup, and one bit changed anywhere is noticed.
//!
//! Rows may hold effects of batches after the head's position: they were read while writes went
//! on. Replaying the log from the batch after it repairs them, since a patch sets values and never
//! adds, and a deletion removes a record whatever it held; from the end's position on, the state is
//! whole. A user who was deleted meanwhile may have a row or none, and has none after the replay;
//! one who was deleted and set again may have the row of before, of after, or none, and what was set
//! since the deletion is in the log after the position. So there is no row that says "deleted".

mod error;
mod member;
mod reader;
mod row;
mod snapshots;
mod third_party_csv;
mod writer;

use std::thread;

use serde::{Deserialize, Serialize};

pub use error::BackupError;
pub use reader::{Progress, Sink, Summary, end_position, head, read, read_in_order};
pub use row::Row;
pub use snapshots::{Snapshots, Written, quarantine, restore, restore_file};
pub use writer::{BackupWriter, CHUNK_TEXT_BYTES, Chunk, ChunkSource};

use crate::log::{Chain, Position, Seq};

/// The version of the format that this program writes, and the newest that it reads.
pub const FORMAT: u32 = 1;

/// What the first member says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The file's version.
    pub format: u32,
    /// Which log the positions count in.
    pub log_id: Box<str>,
    /// Taken before the first row was read: replay goes on after it.
    pub position: Seq,
    /// When the log took the batch at `position`, by the log's clock, in nanoseconds since 1970.
    pub time_ns: u64,
    /// The hash of the log's history up to `position`, 32 hexadecimal digits.
    pub chain: Chain,
    /// The same of the position before. With it the log can be checked to hold the batch at
    /// `position`.
    pub previous_chain: Chain,
    /// About how many rows follow: what the store held when the scan began.
    pub rows_expected: u64,
}

impl Head {
    /// The place in the log where replay starts.
    #[must_use]
    pub fn position(&self) -> Position {
        Position {
            seq: self.position,
            time_ns: self.time_ns,
            chain: self.chain,
            previous: self.previous_chain,
        }
    }
}

/// What the last member says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Taken after the last row was read: from here on a replayed state is whole.
    pub position: Seq,
    /// The hash of the log's history up to `position`, 32 hexadecimal digits. A log with another
    /// history there has lost batches that the rows hold effects of.
    pub chain: Chain,
    /// How many rows the file has.
    pub rows: u64,
    /// The sum of the rows' digests, 32 hexadecimal digits.
    pub digest: String,
    /// XXH3-128 of all bytes before the last member, 32 hexadecimal digits.
    pub checksum: String,
}

/// With fewer rows than this a thread more costs more than it brings: about a chunk's.
const ROWS_A_THREAD: u64 = 8192;

/// How many threads to use for about `rows` rows.
fn threads_for(rows: u64) -> usize {
    let cores = thread::available_parallelism().map_or(2, usize::from);
    let useful = usize::try_from(1 + rows / ROWS_A_THREAD).unwrap_or(usize::MAX);
    cores.min(useful)
}

/// The name that a backup of `time_ns` goes by: `grades-<RFC 3339 time>.csv.gz`, whole seconds.
#[must_use]
pub fn file_name(time_ns: u64) -> String {
    format!("{}.gz", csv_name(time_ns))
}

fn csv_name(time_ns: u64) -> String {
    format!("grades-{}.csv", rfc3339(time_ns))
}

/// `time_ns` since 1970 as `2026-01-31T23:59:59Z`.
#[must_use]
pub fn rfc3339(time_ns: u64) -> String {
    humantime::format_rfc3339_seconds(
        std::time::UNIX_EPOCH + std::time::Duration::from_nanos(time_ns),
    )
    .to_string()
}

#[cfg(test)]
mod tests;
