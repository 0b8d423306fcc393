//! The records and names of a backup file.

use serde::{Deserialize, Serialize};

use crate::log::{Chain, Position, Seq};

/// The format that this program writes, and the newest that it reads.
pub const FORMAT: u32 = 1;

/// The highest position of a backup. No log comes near it: at a million batches per second it takes
/// 140,000 years. Any higher one is refused, so that positions can be counted up without overflow.
pub(super) const POSITION_MAX: Seq = 1 << 62;

/// The record in the first member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadRecord {
    /// The version of the format.
    pub format: u32,
    /// When the backup began by the node's clock, in nanoseconds since 1970.
    pub created_ns: u64,
    /// The log of the positions.
    pub log_id: Box<str>,
    /// The position before the scan. Replay starts after it.
    pub position: Seq,
    /// When the log stored the batch at `position`, in nanoseconds since 1970.
    pub time_ns: u64,
    /// The chain at `position`.
    pub chain: Chain,
    /// The chain before `position`, for checking that the log holds the same batch there.
    pub previous_chain: Chain,
    /// How many records the store had when the scan began: about the number of rows.
    pub rows_expected: u64,
    /// The seed of the store's shards, in whose order the rows are, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shard_seed: Option<u64>,
}

impl HeadRecord {
    /// The position after which replay starts.
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

/// The record in the last member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndRecord {
    /// The position after the scan. From here on a replayed state is complete.
    pub position: Seq,
    /// The chain at `position`. A log with another chain there has lost batches whose effects may
    /// be in the rows.
    pub chain: Chain,
    /// The number of rows.
    pub rows: u64,
    /// The sum of the rows' digests, 32 hexadecimal digits.
    pub digest: String,
    /// XXH3-128 of all bytes before the last member, 32 hexadecimal digits.
    pub checksum: String,
}

/// The file name of a backup that was created at `created_ns`, in whole seconds:
/// `grades-20260131T235959Z.csv.gz`. No colons, which Windows, tar and scp reject or misread.
#[must_use]
pub fn file_name(created_ns: u64) -> String {
    format!("{}.gz", csv_name(created_ns))
}

pub(super) fn csv_name(created_ns: u64) -> String {
    let time = rfc3339(created_ns).replace(['-', ':'], "");
    format!("grades-{time}.csv")
}

/// `time_ns` since 1970 as `2026-01-31T23:59:59Z`.
#[must_use]
pub fn rfc3339(time_ns: u64) -> String {
    humantime::format_rfc3339_seconds(
        std::time::UNIX_EPOCH + std::time::Duration::from_nanos(time_ns),
    )
    .to_string()
}
