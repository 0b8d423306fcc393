//! Encodes a batch as a message, and decodes it.
//!
//! The payload is a JSON array of writes: patches as `POST /set` accepts them and
//! `{"delete":"ID"}`.
//! The headers are `Grade-Format`, the format (1, also without the header); `Grade-Batch`, the
//! batch's identity; `Nats-Msg-Id`, the same text, by which the broker detects duplicates; and in
//! some messages `Grade-Checkpoint`, the sender's vote on its state at a position. All headers are
//! optional: any client of the broker can write to the log.

use async_nats::HeaderMap;
use bytes::Bytes;

use crate::grade::Write;
use crate::log::codec::{self, FORMAT};
use crate::log::{Batch, BatchId, ChainEntry, Checkpoint, InFlight, Message, StoredBatch};

const FORMAT_HEADER: &str = "Grade-Format";
const BATCH_HEADER: &str = "Grade-Batch";
/// When the batch was first stored, in nanoseconds since 1970. Set on a batch that is appended
/// again because the broker lost it.
const TIME_HEADER: &str = "Grade-Time";
/// NATS' own header, for the detection of duplicates.
const ID_HEADER: &str = "Nats-Msg-Id";
/// The checkpoint in its displayed form.
const CHECKPOINT_HEADER: &str = "Grade-Checkpoint";

/// Why a message cannot be read as a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unreadable {
    /// It has this format, which only a newer program reads. A replica that skipped it would
    /// diverge from those that apply it.
    Newer(u64),
    /// It is not a batch, for this reason. All replicas skip it.
    Poisoned(Box<str>),
}

/// The headers of a batch.
#[derive(Debug, PartialEq, Eq)]
pub struct BatchHeaders {
    /// The format of the payload.
    pub format: u8,
    /// Its identity; [`BatchId::UNNAMED`] if the header is missing or invalid.
    pub id: BatchId,
    /// When it was first stored, if the header is present and valid.
    pub time_ns: Option<u64>,
    /// The sender's vote, if the header is present and valid.
    pub checkpoint: Option<Checkpoint>,
}

impl BatchHeaders {
    /// The batch with these headers and this payload, for its chain.
    #[must_use]
    pub fn chain_entry<'a>(&self, payload: &'a [u8]) -> ChainEntry<'a> {
        ChainEntry::Batch(StoredBatch {
            format: self.format,
            id: self.id,
            payload,
        })
    }

    /// The message with these headers and this payload.
    #[must_use]
    pub fn message(&self, payload: Bytes) -> Message {
        Message::Batch {
            format: self.format,
            id: self.id,
            payload,
        }
    }

    /// The time of a batch that the broker stored at `stored_ns`, after a batch with `previous_ns`.
    /// `Grade-Time` counts only if it lies between the two.
    #[must_use]
    pub fn time_at(&self, previous_ns: u64, stored_ns: u64) -> u64 {
        let in_order = |time_ns: &u64| (previous_ns..=stored_ns).contains(time_ns);
        self.time_ns.filter(in_order).unwrap_or(stored_ns)
    }
}

/// The headers of a batch without a checkpoint.
#[must_use]
pub fn headers(id: BatchId) -> HeaderMap {
    let id = id.to_string();
    let mut headers = HeaderMap::new();
    headers.insert(FORMAT_HEADER, FORMAT.to_string());
    headers.insert(BATCH_HEADER, id.as_str());
    headers.insert(ID_HEADER, id);
    headers
}

/// Adds a checkpoint to a batch's headers.
pub fn add_checkpoint(headers: &mut HeaderMap, checkpoint: &Checkpoint) {
    headers.insert(CHECKPOINT_HEADER, checkpoint.to_string());
}

/// The payload of a batch of `writes`.
#[must_use]
pub fn payload(writes: &[Write]) -> Bytes {
    let mut json = Vec::new();
    codec::write(writes, &mut json);
    json.into()
}

/// Reads a message. A batch that is `in_flight` with the same bytes is not decoded.
///
/// # Errors
/// The message is not a batch, or has a newer format.
pub fn read(
    headers: Option<&HeaderMap>,
    payload: &[u8],
    in_flight: &InFlight,
) -> Result<(BatchHeaders, Batch), Unreadable> {
    let headers = read_headers(headers)?;
    let (ticket, writes) = match in_flight.find(headers.id, payload) {
        Some((ticket, writes)) => (Some(ticket), writes),
        None => (None, codec::read(payload).map_err(Unreadable::Poisoned)?),
    };
    let batch = Batch {
        ticket,
        writes,
        checkpoint: headers.checkpoint,
    };
    Ok((headers, batch))
}

fn read_headers(headers: Option<&HeaderMap>) -> Result<BatchHeaders, Unreadable> {
    let text = |name: &str| {
        // A replica's message has three or four headers. Comparing them is faster than hashing a
        // name (ADR 0004).
        let mut all = headers?.iter();
        let (_, values) = all.find(|(other, _)| AsRef::<str>::as_ref(*other) == name)?;
        values.first().map(async_nats::HeaderValue::as_str)
    };
    // A message without the header has the first format.
    let format: u64 = match text(FORMAT_HEADER).map_or(Ok(1), str::parse) {
        Ok(format @ 1..) => format,
        _ => {
            let why = "its Grade-Format is not a positive integer";
            return Err(Unreadable::Poisoned(why.into()));
        }
    };
    let readable = u8::try_from(format).ok().filter(|known| *known <= FORMAT);
    Ok(BatchHeaders {
        format: readable.ok_or(Unreadable::Newer(format))?,
        id: text(BATCH_HEADER)
            .and_then(BatchId::parse)
            .unwrap_or(BatchId::UNNAMED),
        time_ns: text(TIME_HEADER).and_then(|text| text.parse().ok()),
        checkpoint: text(CHECKPOINT_HEADER).and_then(Checkpoint::parse),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;

    use super::*;
    use crate::grade::Digest;
    use crate::log::{Chain, Mac, RandomId, Ticket};

    fn id() -> BatchId {
        BatchId {
            writer: RandomId::of(5),
            seq: 7,
        }
    }

    fn vote() -> Checkpoint {
        Checkpoint {
            replica: RandomId::of(3),
            position: u64::MAX,
            chain: Chain(1 << 90),
            digest: Digest(u128::MAX - 1),
            round: 5,
            mac: Mac([9; 16]),
        }
    }

    #[test]
    fn headers_carry_identity_and_checkpoint() {
        let mut headers = headers(id());
        let wanted = BatchHeaders {
            format: FORMAT,
            id: id(),
            time_ns: None,
            checkpoint: None,
        };
        assert_eq!(read_headers(Some(&headers)), Ok(wanted));
        add_checkpoint(&mut headers, &vote());
        assert_eq!(
            read_headers(Some(&headers)).unwrap().checkpoint,
            Some(vote())
        );
        let text = headers.get(CHECKPOINT_HEADER).unwrap().as_str();
        for cut in [
            &text[..text.len() - 1],
            &text[1..],
            &format!("{text} 1"),
            "",
        ] {
            assert_eq!(Checkpoint::parse(cut), None, "{cut}");
        }
    }

    #[test]
    fn a_message_needs_no_headers_and_a_newer_format_differs_from_a_broken_one() {
        let unnamed = BatchHeaders {
            format: 1,
            id: BatchId::UNNAMED,
            time_ns: None,
            checkpoint: None,
        };
        assert_eq!(read_headers(None).as_ref(), Ok(&unnamed));
        assert_eq!(read_headers(Some(&HeaderMap::new())).as_ref(), Ok(&unnamed));
        let with_format = |format: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(FORMAT_HEADER, format);
            headers.insert(BATCH_HEADER, "no id");
            read_headers(Some(&headers))
        };
        assert_eq!(with_format("1"), Ok(unnamed));
        for newer in [u64::from(FORMAT) + 1, 256, 257, u64::MAX] {
            let read = with_format(&newer.to_string());
            assert_eq!(read, Err(Unreadable::Newer(newer)));
        }
        for broken in ["0", "x", "-1", "", "18446744073709551616"] {
            let read = with_format(broken);
            assert!(matches!(read, Err(Unreadable::Poisoned(_))), "{broken}");
        }
    }

    #[test]
    fn a_time_counts_only_between_the_batch_before_and_the_broker_s() {
        for (header, time_ns) in [
            ("10", 10),
            ("15", 15),
            ("20", 20),
            ("9", 20),
            ("21", 20),
            ("x", 20),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(TIME_HEADER, header);
            let headers = read_headers(Some(&headers)).unwrap();
            assert_eq!(headers.time_at(10, 20), time_ns, "{header}");
        }
    }

    #[test]
    fn a_batch_in_flight_is_not_decoded_and_other_bytes_under_its_id_are() {
        let in_flight = InFlight::default();
        let slot = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let writes: Arc<[Write]> = Arc::from([Write::Delete("a".into())]);
        let (ticket, sent) = (Ticket(1), payload(&writes));
        in_flight.add(ticket, Arc::clone(&writes), Vec::new(), slot);
        let _delivered = in_flight.sending(ticket, id(), sent.clone());
        let headers = headers(id());
        let (_, own) = read(Some(&headers), &sent, &in_flight).unwrap();
        assert!(Arc::ptr_eq(&own.writes, &writes));
        assert_eq!(own.ticket, Some(ticket));
        let (_, other) = read(Some(&headers), br#"[{"delete":"b"}]"#, &in_flight).unwrap();
        assert_eq!(other.ticket, None);
        assert_eq!(other.writes[0], Write::Delete("b".into()));
        let poisoned = read(Some(&headers), b"no JSON", &in_flight);
        assert!(matches!(poisoned, Err(Unreadable::Poisoned(_))));
    }
}
