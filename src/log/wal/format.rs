//! The value of a record: one message of the log. Integers are little-endian:
//!
//! | bytes | content |
//! | --- | --- |
//! | 1 | format, from 1; 0 for a message that all replicas skip |
//! | 8 | when the log stored the message, in nanoseconds since 1970 |
//! | 16 | the writer |
//! | 8 | the writer's sequence number of the batch |
//! | 1 | the length of the checkpoint |
//! | length | the sender's checkpoint in its displayed form, in some batches of a cluster |
//! | rest | the writes, a JSON array |
//!
//! The record has the checksum.

use crate::grade::Write;
use crate::log::codec::{self, FORMAT};
use crate::log::{
    Batch, BatchId, ChainEntry, Checkpoint, Entry, Position, RandomId, ReadError, Seq, StoredBatch,
};

/// The format of a message that all replicas skip.
const SKIPPED: u8 = 0;
/// Bytes before the checkpoint.
pub(super) const HEADER_BYTES: usize = 1 + 8 + 16 + 8 + 1;

/// A value, split into its parts.
struct Value<'a> {
    time_ns: u64,
    message: ChainEntry<'a>,
    checkpoint: Option<Checkpoint>,
}

/// Appends the value of the batch after `previous` to `out`. Returns the batch's position.
#[expect(clippy::indexing_slicing, reason = "the header was appended before")]
pub fn write(
    previous: &Position,
    time_ns: u64,
    id: BatchId,
    writes: &[Write],
    out: &mut Vec<u8>,
) -> Position {
    write_header(FORMAT, time_ns, id, "", out);
    let payload_at = out.len();
    codec::write(writes, out);
    let batch = StoredBatch {
        format: FORMAT,
        id,
        payload: &out[payload_at..],
    };
    previous.next(time_ns, ChainEntry::Batch(batch))
}

/// Appends the value of a message that a cluster's log delivered to `out`.
pub(super) fn write_message(
    time_ns: u64,
    message: ChainEntry<'_>,
    checkpoint: Option<&Checkpoint>,
    out: &mut Vec<u8>,
) {
    match message {
        ChainEntry::Skipped => write_header(SKIPPED, time_ns, BatchId::UNNAMED, "", out),
        ChainEntry::Batch(batch) => {
            let checkpoint = checkpoint.map(Checkpoint::to_string).unwrap_or_default();
            write_header(batch.format, time_ns, batch.id, &checkpoint, out);
            out.extend_from_slice(batch.payload);
        }
    }
}

#[expect(
    clippy::expect_used,
    reason = "a checkpoint has at most 163 characters"
)]
fn write_header(format: u8, time_ns: u64, id: BatchId, checkpoint: &str, out: &mut Vec<u8>) {
    out.push(format);
    out.extend_from_slice(&time_ns.to_le_bytes());
    out.extend_from_slice(&id.writer.bytes());
    out.extend_from_slice(&id.seq.to_le_bytes());
    out.push(u8::try_from(checkpoint.len()).expect("a checkpoint is short"));
    out.extend_from_slice(checkpoint.as_bytes());
}

/// Splits the value of message `seq`.
fn split(seq: Seq, value: &[u8]) -> Result<Value<'_>, ReadError> {
    let damaged = |why: &str| ReadError::damaged(seq, why);
    let Some((&format, mut rest)) = value.split_first() else {
        return Err(damaged("it is empty"));
    };
    if format > FORMAT {
        let format = format.into();
        return Err(ReadError::NewerFormat { seq, format });
    }
    let parts = (|| {
        let time_ns = u64::from_le_bytes(take(&mut rest)?);
        let id = BatchId {
            writer: RandomId(u128::from_le_bytes(take(&mut rest)?)),
            seq: u64::from_le_bytes(take(&mut rest)?),
        };
        let [checkpoint_bytes] = take(&mut rest)?;
        let (checkpoint, payload) = rest.split_at_checked(checkpoint_bytes.into())?;
        let checkpoint = match checkpoint {
            [] => None,
            text => Some(Checkpoint::parse(std::str::from_utf8(text).ok()?)?),
        };
        let message = match format {
            SKIPPED if id == BatchId::UNNAMED && payload.is_empty() => ChainEntry::Skipped,
            SKIPPED => return None,
            _ => ChainEntry::Batch(StoredBatch {
                format,
                id,
                payload,
            }),
        };
        Some(Value {
            time_ns,
            message,
            checkpoint,
        })
    })();
    parts.ok_or_else(|| damaged("its header is malformed"))
}

/// The position of the message with this value, which comes after `previous`.
///
/// # Errors
/// `value` is not the value of a record.
pub fn position(previous: &Position, value: &[u8]) -> Result<Position, ReadError> {
    let value = split(previous.seq + 1, value)?;
    Ok(previous.next(value.time_ns, value.message))
}

/// The entry with this value, which comes after `previous`.
///
/// # Errors
/// `value` is not the value of a record.
pub fn read(previous: &Position, value: &[u8]) -> Result<Entry, ReadError> {
    let seq = previous.seq + 1;
    let value = split(seq, value)?;
    let batch = match value.message {
        ChainEntry::Skipped => Batch::default(),
        ChainEntry::Batch(batch) => Batch {
            ticket: None,
            writes: codec::read(batch.payload).map_err(|why| ReadError::damaged(seq, &why))?,
            checkpoint: value.checkpoint,
        },
    };
    Ok(Entry {
        position: previous.next(value.time_ns, value.message),
        batch,
        message: None,
    })
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, after) = rest.split_first_chunk()?;
    *rest = after;
    Some(*taken)
}
