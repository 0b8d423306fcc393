//! The value of a record: one batch. Integers are little-endian:
//!
//! | bytes | content |
//! | --- | --- |
//! | 1 | format, from 1 |
//! | 8 | when the log stored the batch, in nanoseconds since 1970 |
//! | 16 | the writer |
//! | 8 | the writer's sequence number of the batch |
//! | rest | the writes, a JSON array |
//!
//! The record has the checksum.

use crate::grade::Write;
use crate::log::codec::{self, FORMAT};
use crate::log::{
    Batch, BatchId, ChainEntry, Entry, Position, RandomId, ReadError, Seq, StoredBatch,
};

/// Bytes before the writes.
pub(super) const HEADER_BYTES: usize = 1 + 8 + 16 + 8;

/// Appends the value of the batch after `previous` to `out`. Returns the batch's position.
#[expect(clippy::indexing_slicing, reason = "the header was appended before")]
pub fn write(
    previous: &Position,
    time_ns: u64,
    id: BatchId,
    writes: &[Write],
    out: &mut Vec<u8>,
) -> Position {
    let payload_at = out.len() + HEADER_BYTES;
    out.push(FORMAT);
    out.extend_from_slice(&time_ns.to_le_bytes());
    out.extend_from_slice(&id.writer.bytes());
    out.extend_from_slice(&id.seq.to_le_bytes());
    codec::write(writes, out);
    let batch = StoredBatch {
        format: FORMAT,
        id,
        payload: &out[payload_at..],
    };
    previous.next(time_ns, ChainEntry::Batch(batch))
}

/// Splits the value of batch `seq` into its time and the rest.
fn split(seq: Seq, value: &[u8]) -> Result<(u64, StoredBatch<'_>), ReadError> {
    let damaged = |why: &str| ReadError::damaged(seq, why);
    let Some((&format, mut rest)) = value.split_first() else {
        return Err(damaged("it is empty"));
    };
    match format {
        0 => return Err(damaged("it has format 0")),
        1..=FORMAT => {}
        newer => {
            let format = newer.into();
            return Err(ReadError::NewerFormat { seq, format });
        }
    }
    let parts = (|| {
        let time_ns = u64::from_le_bytes(take(&mut rest)?);
        let id = BatchId {
            writer: RandomId(u128::from_le_bytes(take(&mut rest)?)),
            seq: u64::from_le_bytes(take(&mut rest)?),
        };
        let batch = StoredBatch {
            format,
            id,
            payload: rest,
        };
        Some((time_ns, batch))
    })();
    parts.ok_or_else(|| damaged("it ends within its header"))
}

/// The position of the batch with this value, which comes after `previous`.
///
/// # Errors
/// `value` is not an output of [`write()`].
pub fn position(previous: &Position, value: &[u8]) -> Result<Position, ReadError> {
    let (time_ns, batch) = split(previous.seq + 1, value)?;
    Ok(previous.next(time_ns, ChainEntry::Batch(batch)))
}

/// The batch with this value, which comes after `previous`.
///
/// # Errors
/// `value` is not an output of [`write()`].
pub fn read(previous: &Position, value: &[u8]) -> Result<Entry, ReadError> {
    let seq = previous.seq + 1;
    let (time_ns, stored) = split(seq, value)?;
    let writes = codec::read(stored.payload).map_err(|why| ReadError::damaged(seq, &why))?;
    Ok(Entry {
        position: previous.next(time_ns, ChainEntry::Batch(stored)),
        batch: Batch {
            ticket: None,
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
