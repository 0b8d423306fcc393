//! A batch of the log on disk as bytes. Integers are little-endian:
//!
//! | bytes | what |
//! | --- | --- |
//! | 1 | format: 1, or 2 where the batch has a deletion |
//! | 8 | the log's time, nanoseconds since 1970 |
//! | 16 | the sender's origin |
//! | 8 | the sender's number of the batch |
//! | rest | the writes, a JSON array |
//!
//! The record around it has the checksum.

use crate::log::writes::{self, Format};
use crate::log::{Batch, Entry, Origin, ReadError, Seq};

/// Bytes before the writes.
pub(super) const HEADER_BYTES: usize = 1 + 8 + 16 + 8;

/// Replaces what is in `out` by `entry`'s value.
pub fn write(entry: &Entry, out: &mut Vec<u8>) {
    out.clear();
    append(entry, out);
}

/// Writes `entry`'s value after what is in `out`.
pub(super) fn append(entry: &Entry, out: &mut Vec<u8>) {
    out.push(Format::of(&entry.batch.writes).number());
    out.extend_from_slice(&entry.time_ns.to_le_bytes());
    out.extend_from_slice(&entry.batch.origin.0.to_le_bytes());
    out.extend_from_slice(&entry.batch.number.to_le_bytes());
    writes::write(&entry.batch.writes, out);
}

/// What stands before the writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    format: Format,
    pub(super) time_ns: u64,
    pub(super) origin: Origin,
    pub(super) number: u64,
}

/// Takes the value of batch `seq` apart: its header, and the writes as JSON.
pub(super) fn header(seq: Seq, value: &[u8]) -> Result<(Header, &[u8]), ReadError> {
    let damaged = |why: &str| ReadError::Damaged {
        seq,
        why: why.into(),
    };
    let Some(number) = value.first() else {
        return Err(damaged("it is empty"));
    };
    let format = Format::numbered(u64::from(*number)).ok_or_else(|| {
        damaged(&format!(
            "its format is {number}, this version reads 1 and 2 only"
        ))
    })?;
    let mut rest = value.get(1..).unwrap_or_default();
    let parts = (|| {
        let header = Header {
            format,
            time_ns: u64::from_le_bytes(take(&mut rest)?),
            origin: Origin(u128::from_le_bytes(take(&mut rest)?)),
            number: u64::from_le_bytes(take(&mut rest)?),
        };
        Some((header, rest))
    })();
    parts.ok_or_else(|| damaged("it ends within its header"))
}

/// The whole of batch `seq`.
///
/// # Errors
/// `value` is not what [`write()`] wrote.
pub fn read(seq: Seq, value: &[u8]) -> Result<Entry, ReadError> {
    let (header, json) = header(seq, value)?;
    let writes = writes::read(header.format, json);
    let writes = writes.map_err(|why| ReadError::Damaged { seq, why })?;
    Ok(Entry {
        seq,
        time_ns: header.time_ns,
        batch: Batch {
            origin: header.origin,
            number: header.number,
            writes,
            checkpoint: None,
        },
    })
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, after) = rest.split_first_chunk()?;
    *rest = after;
    Some(*taken)
}
