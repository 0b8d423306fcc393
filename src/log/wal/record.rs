//! A record in a segment: one batch. Records are contiguous, each at a multiple of 8 bytes.
//! Integers are little-endian:
//!
//! | bytes | content |
//! | --- | --- |
//! | 8 | XXH3-64 of the sequence number, the length and the value |
//! | 8 | the sequence number |
//! | 4 | the length of the value |
//! | length | the [value](super::format) |
//! | 0 to 7 | zeros, up to the next multiple of 8 |
//!
//! Zeros are not a record, because there is no batch 0.

use std::io;

use xxhash_rust::xxh3::xxh3_64;

use super::format;
use crate::log::Seq;

/// Records begin at multiples of this.
pub(super) const ALIGNMENT: usize = 8;
/// The checksum covers the bytes after itself.
const CHECKSUM_BYTES: usize = 8;
/// Bytes before the value.
pub(super) const RECORD_HEADER_BYTES: usize = CHECKSUM_BYTES + 8 + 4;

/// The header of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RecordHeader {
    checksum: u64,
    pub(super) seq: Seq,
    value_bytes: u32,
}

/// A record with a valid checksum.
#[derive(Debug, Clone, Copy)]
pub(super) struct WalRecord<'a> {
    pub(super) seq: Seq,
    pub(super) value: &'a [u8],
    /// Its length in the segment, with padding.
    pub(super) bytes: usize,
}

/// Appends the record of batch `seq` to `out`, whose length is a multiple of [`ALIGNMENT`].
/// `append_value` appends the value; returns its result.
#[expect(clippy::indexing_slicing, reason = "the header was appended before")]
pub(super) fn append<T>(
    seq: Seq,
    append_value: impl FnOnce(&mut Vec<u8>) -> T,
    out: &mut Vec<u8>,
) -> io::Result<T> {
    let at = out.len();
    out.extend_from_slice(&[0; RECORD_HEADER_BYTES]);
    let appended = append_value(out);
    let record = &mut out[at..];
    let value_bytes = record.len() - RECORD_HEADER_BYTES;
    let value_bytes = u32::try_from(value_bytes).map_err(io::Error::other)?;
    record[8..16].copy_from_slice(&seq.to_le_bytes());
    record[16..20].copy_from_slice(&value_bytes.to_le_bytes());
    let checksum = xxh3_64(&record[CHECKSUM_BYTES..]);
    record[..CHECKSUM_BYTES].copy_from_slice(&checksum.to_le_bytes());
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    Ok(appended)
}

impl RecordHeader {
    /// Parses the header at the start of `bytes`; `None` if they are too few.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let (checksum, rest) = bytes.split_first_chunk()?;
        let (seq, rest) = rest.split_first_chunk()?;
        Some(Self {
            checksum: u64::from_le_bytes(*checksum),
            seq: Seq::from_le_bytes(*seq),
            value_bytes: u32::from_le_bytes(*rest.first_chunk()?),
        })
    }

    /// Whether no record was written here.
    pub(super) fn is_zero(&self) -> bool {
        (self.checksum, self.seq, self.value_bytes) == (0, 0, 0)
    }

    /// The length of header and value.
    pub(super) fn bytes(&self) -> usize {
        RECORD_HEADER_BYTES + self.value_bytes as usize
    }

    /// The length of the record in the segment.
    pub(super) fn bytes_padded(&self) -> usize {
        self.bytes().next_multiple_of(ALIGNMENT)
    }
}

/// Parses the record at the start of `bytes`, if its checksum is valid.
pub(super) fn read(bytes: &[u8]) -> Option<WalRecord<'_>> {
    let header = RecordHeader::read(bytes)?;
    let summed = bytes.get(CHECKSUM_BYTES..header.bytes())?;
    let is_valid = header.seq != 0 && xxh3_64(summed) == header.checksum;
    is_valid.then_some(WalRecord {
        seq: header.seq,
        value: bytes.get(RECORD_HEADER_BYTES..header.bytes())?,
        bytes: header.bytes_padded(),
    })
}

/// Whether `bytes`, which have no valid record, can be a torn write of batch `seq`: a record of
/// which some sectors were not written.
///
/// Records are written over zeros, and no sector of a record is all zeros: the first has the
/// checksum or the sequence number, all others have JSON. So a record without a zeroed part but
/// with a wrong checksum was written completely and has changed since.
pub(super) fn is_torn(bytes: &[u8], seq: Seq) -> bool {
    let Some(header) = RecordHeader::read(bytes) else {
        return true;
    };
    let json = bytes.get(RECORD_HEADER_BYTES + format::HEADER_BYTES..header.bytes());
    header.checksum == 0 || header.seq != seq || json.is_none_or(|json| json.contains(&0))
}
