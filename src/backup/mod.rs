//! The backup file: a whole store as `*.csv.gz` that any tool can open.
//!
//! # Format, version 1
//!
//! The file is a sequence of gzip members (RFC 1952). Their concatenated content is one CSV text
//! (RFC 4180, lines end in `\n`): a header row, then one row per record, in any order, each user at
//! most once. All other data is in the members' headers, in a FEXTRA subfield named `GS`, which
//! other tools ignore:
//!
//! | member | inflates to | subfield `GS` |
//! | --- | --- | --- |
//! | first | the header row | `H`, a CRC-32 of the rest as little-endian `u32`, and a [`HeadRecord`] as JSON |
//! | any number | some rows | `M`, then three little-endian `u32`: the member's length in bytes, its inflated length, its rows |
//! | last | nothing | `E`, a CRC-32 of the rest as little-endian `u32`, and an [`EndRecord`] as JSON |
//!
//! The first member also has FNAME and MTIME, so that `gunzip -N` restores a file name and a time.
//! There is no FCOMMENT and no FHCRC: DuckDB rejects both.
//!
//! Each member has its own length, so that members can be inflated in parallel without searching
//! for their boundaries. The last one has the number of rows, their digest, and the XXH3-128 of
//! every byte before it. A file without it is a failed backup, and the reader detects any changed
//! bit.
//!
//! Writes continue during the scan, so rows may have effects of batches after the head's position.
//! Replaying the log from there overwrites them, because a patch sets values and never adds, and a
//! deletion removes a record whatever its values. From the end's position on, the state is
//! complete. A user who was deleted during the scan may have a row; the replay removes it. A user
//! who was deleted and set again may have a row from before, from after, or none; the replay sets
//! all later values. So no row needs to mark a deletion.

mod error;
mod format;
mod member;
mod native;
mod parallelism;
mod pipeline;
mod progress;
mod reader;
mod row;
mod snapshots;
mod strict_csv;
#[cfg(test)]
mod tests;
mod third_party_csv;
mod writer;

pub use error::BackupError;
pub use format::{EndRecord, FORMAT, HeadRecord, file_name, rfc3339};
pub use pipeline::ChunkPipeline;
pub use progress::{ReadProgress, RowSink, Summary};
pub use reader::{end_position, read, read_head, read_in_order};
pub use row::Row;
pub use snapshots::{SnapshotInfo, Snapshots, quarantine, restore, restore_file};
pub use writer::{BackupWriter, CHUNK_TEXT_BYTES, Chunk, ChunkSource};
