//! Decodes messages independently of the program: it shares only the rule for header blocks.

use std::sync::Arc;

use async_nats::HeaderMap;
use gradestore::grade::Write;
use gradestore::log::{BatchId, ChainEntry, Position, RandomId, StoredBatch, header_block};

/// The format of all messages.
const FORMAT: u8 = 1;

/// How the client library handles a message.
#[derive(Debug, Clone)]
pub enum Delivery {
    /// It delivers the message.
    Ordinary(Option<HeaderMap>),
    /// It treats the message as the server's status for a request, and delivers nothing.
    Status,
    /// It can't parse the message and ends the connection.
    EndsConnection,
}

/// A decoded message.
pub struct Decoded {
    pub delivery: Delivery,
    batch: Option<(BatchId, Option<u64>, Arc<[Write]>)>,
}

impl Decoded {
    /// The position of the message after `last`, stored at `stored_ns`.
    pub fn position(&self, last: &Position, stored_ns: u64, payload: &[u8]) -> Position {
        let Some((id, time_ns, _)) = &self.batch else {
            return last.next(stored_ns, ChainEntry::Skipped);
        };
        let header_ns = time_ns.filter(|time_ns| (last.time_ns..=stored_ns).contains(time_ns));
        let stored = StoredBatch {
            format: FORMAT,
            id: *id,
            payload,
        };
        last.next(header_ns.unwrap_or(stored_ns), ChainEntry::Batch(stored))
    }

    pub fn writes(&self) -> Arc<[Write]> {
        match &self.batch {
            Some((_, _, writes)) => Arc::clone(writes),
            None => Arc::from([]),
        }
    }
}

pub fn decode(block: Option<&[u8]>, payload: &[u8]) -> Decoded {
    let Ok(headers) = header_block::parse_optional(block) else {
        let block = block.unwrap_or_default();
        let first_line = block.split(|byte| *byte == b'\n').next();
        let words = first_line.unwrap_or_default();
        let is_status = str::from_utf8(block).is_ok() && words.starts_with(b"NATS/1.0 ");
        return Decoded {
            delivery: match is_status {
                true => Delivery::Status,
                false => Delivery::EndsConnection,
            },
            batch: None,
        };
    };
    let text = |name: &str| headers.as_ref()?.get(name).map(|value| value.as_str());
    let is_readable = text("Grade-Format").is_none_or(|text| text == FORMAT.to_string());
    let writes = serde_json::from_slice::<Vec<Write>>(payload).ok();
    let writes = writes.filter(|_| is_readable);
    let batch = writes.map(|writes| {
        let id = text("Grade-Batch").and_then(batch_id);
        let time_ns = text("Grade-Time").and_then(|text| text.parse().ok());
        (id.unwrap_or(BatchId::UNNAMED), time_ns, writes.into())
    });
    Decoded {
        batch,
        delivery: Delivery::Ordinary(headers),
    }
}

fn batch_id(text: &str) -> Option<BatchId> {
    let (writer, seq) = text.split_once('-')?;
    Some(BatchId {
        writer: RandomId::parse(writer)?,
        seq: seq.parse().ok()?,
    })
}
