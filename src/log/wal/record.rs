//! A batch in a segment. Records follow each other, each at a multiple of 8 bytes; integers are
//! little-endian:
//!
//! | bytes | what |
//! | --- | --- |
//! | 8 | XXH3-64 of the sequence number, the length and the value |
//! | 8 | the sequence number |
//! | 4 | the value's length |
//! | length | the [value](super::format) |
//! | 0 to 7 | zeros, up to the next multiple of 8 |
//!
//! All zeros is no record: there is no batch 0.

use std::io;

use xxhash_rust::xxh3::xxh3_64;

use super::format;
use crate::log::Seq;

/// Where records may begin.
pub(super) const ALIGNMENT: usize = 8;
/// What the checksum is not of: itself.
const CHECKSUM_BYTES: usize = 8;
/// Bytes before the value.
pub(super) const HEAD_BYTES: usize = CHECKSUM_BYTES + 8 + 4;

/// What stands before the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    checksum: u64,
    pub(super) seq: Seq,
    value_bytes: u32,
}

/// A record that is as it was written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Record<'a> {
    pub(super) seq: Seq,
    pub(super) value: &'a [u8],
    /// Its length in the segment.
    pub(super) bytes: usize,
}

/// Replaces what is in `out` by the record of batch `seq`, whose value `append_value` appends;
/// returns what that returns.
#[expect(clippy::indexing_slicing, reason = "`out` begins with a head")]
pub(super) fn write<T>(
    seq: Seq,
    append_value: impl FnOnce(&mut Vec<u8>) -> T,
    out: &mut Vec<u8>,
) -> io::Result<T> {
    out.clear();
    out.extend_from_slice(&[0; HEAD_BYTES]);
    let appended = append_value(out);
    let value_bytes = u32::try_from(out.len() - HEAD_BYTES).map_err(io::Error::other)?;
    out[8..16].copy_from_slice(&seq.to_le_bytes());
    out[16..20].copy_from_slice(&value_bytes.to_le_bytes());
    let checksum = xxh3_64(&out[CHECKSUM_BYTES..]);
    out[..CHECKSUM_BYTES].copy_from_slice(&checksum.to_le_bytes());
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    Ok(appended)
}

impl Head {
    /// What `bytes` begin with; `None` if they are too few.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let (checksum, rest) = bytes.split_first_chunk()?;
        let (seq, rest) = rest.split_first_chunk()?;
        Some(Self {
            checksum: u64::from_le_bytes(*checksum),
            seq: Seq::from_le_bytes(*seq),
            value_bytes: u32::from_le_bytes(*rest.first_chunk()?),
        })
    }

    /// Whether nothing was written here.
    pub(super) fn is_zero(&self) -> bool {
        (self.checksum, self.seq, self.value_bytes) == (0, 0, 0)
    }

    /// Length of head and value.
    pub(super) fn bytes(&self) -> usize {
        HEAD_BYTES + self.value_bytes as usize
    }

    /// Length of the record in the segment.
    pub(super) fn bytes_padded(&self) -> usize {
        self.bytes().next_multiple_of(ALIGNMENT)
    }
}

/// The record that `bytes` begin with, if it is as it was written.
pub(super) fn read(bytes: &[u8]) -> Option<Record<'_>> {
    let head = Head::read(bytes)?;
    let summed = bytes.get(CHECKSUM_BYTES..head.bytes())?;
    let whole = head.seq != 0 && xxh3_64(summed) == head.checksum;
    whole.then_some(Record {
        seq: head.seq,
        value: bytes.get(HEAD_BYTES..head.bytes())?,
        bytes: head.bytes_padded(),
    })
}

/// Whether `bytes`, which do not begin with a whole record, begin with what is left of the record of
/// batch `seq` when some of its sectors were never written.
///
/// A record is written over zeros, and none of its parts that can be a sector's alone is all zeros:
/// the first has the checksum or the sequence number, every other one some of the writes' JSON. So
/// what has all of that and not the right checksum was written whole, and changed since.
pub(super) fn is_torn(bytes: &[u8], seq: Seq) -> bool {
    let Some(head) = Head::read(bytes) else {
        return true;
    };
    let json = bytes.get(HEAD_BYTES + format::HEADER_BYTES..head.bytes());
    head.checksum == 0 || head.seq != seq || json.is_none_or(|json| json.contains(&0))
}
