//! Messages of the JetStream log. Any client that may publish can write them. The first byte is the
//! kind:
//!
//! - A message as text: one header per line, an empty line, the payload. Nothing panics, serde_json
//!   reads the same writes, and a decoded message is the same after encoding and decoding it again.
//! - A batch from the input. It is the same after encoding and decoding, and nothing panics if one
//!   byte is changed.

use std::sync::Arc;

use async_nats::{HeaderMap, HeaderName, HeaderValue};
use gradestore::grade::{Changes, FIELD_COUNT, Patch, Values, Write, check_user_id};
use gradestore::log::message::{self, BatchHeaders, Unreadable};
use gradestore::log::{Batch, BatchId, InFlight, RandomId};

pub(crate) fn check(data: &[u8]) {
    match data.split_first() {
        Some((b'm', rest)) => check_text(rest),
        Some((_, rest)) => check_batch(rest),
        None => {}
    }
}

fn check_text(text: &[u8]) {
    let at = text.windows(2).position(|two| two == b"\n\n");
    let (head, payload) = match at {
        Some(at) => (&text[..at], &text[at + 2..]),
        None => (&b""[..], text),
    };
    let mut headers = HeaderMap::new();
    for line in String::from_utf8_lossy(head).lines() {
        let (name, value) = line.split_once(": ").unwrap_or((line, ""));
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), value.parse::<HeaderValue>()) {
            headers.append(name, value);
        }
    }
    let read = message::read(Some(&headers), payload, &InFlight::default());
    let format = headers.get("Grade-Format").map(|format| format.as_str());
    let format = format.map_or(Ok(1), |format| format.parse::<u64>().map_err(drop));
    match read {
        Err(Unreadable::Newer(newer)) => assert!(newer > 1 && format == Ok(newer)),
        Err(Unreadable::Poisoned(why)) => assert!(!why.is_empty() && format.unwrap_or(0) < 2),
        Ok((batch_headers, batch)) => {
            assert_eq!(format, Ok(1));
            assert_eq!(batch_headers.id, batch_id(&headers));
            round_trip(&batch_headers, &batch);
        }
    }
    // serde_json reads -0 as a float.
    if !payload.windows(2).any(|two| two == b"-0") {
        let writes = serde_json::from_slice::<Vec<Write<String>>>(payload).ok();
        let writes: Option<Arc<[Write]>> =
            writes.map(|plain| plain.iter().map(Write::to_owned).collect());
        let read = message::read(None, payload, &InFlight::default()).ok();
        assert_eq!(read.map(|(_, batch)| batch.writes), writes);
    }
}

/// Encodes the batch, decodes it again and compares.
fn round_trip(expected: &BatchHeaders, batch: &Batch) {
    let mut headers = message::headers(expected.id);
    if let Some(checkpoint) = &batch.checkpoint {
        message::add_checkpoint(&mut headers, checkpoint);
    }
    let payload = message::payload(&batch.writes);
    let read = message::read(Some(&headers), &payload, &InFlight::default());
    let (read_headers, read) = read.expect("an encoded batch can be decoded");
    assert_eq!(
        (read_headers.id, &read.writes),
        (expected.id, &batch.writes)
    );
    assert_eq!(read.checkpoint, batch.checkpoint);
}

/// The batch's identity, if the headers have one.
fn batch_id(headers: &HeaderMap) -> BatchId {
    let id = headers.get("Grade-Batch").map(HeaderValue::as_str);
    let named = id.and_then(|id| {
        let (writer, seq) = id.split_once('-')?;
        let hex = writer.len() == 32 && !writer.starts_with('+');
        Some(BatchId {
            writer: RandomId::of(u128::from_str_radix(writer, 16).ok().filter(|_| hex)?),
            seq: seq.parse().ok()?,
        })
    });
    named.unwrap_or(BatchId::UNNAMED)
}

fn check_batch(data: &[u8]) {
    let Some((&[at, put], rest)) = data.split_first_chunk::<2>() else {
        return;
    };
    let batch = Batch {
        writes: writes(rest),
        ..Batch::default()
    };
    let headers = BatchHeaders {
        format: 1,
        id: BatchId::UNNAMED,
        time_ns: None,
        checkpoint: None,
    };
    round_trip(&headers, &batch);
    let mut payload = message::payload(&batch.writes).to_vec();
    let at = usize::from(at) * payload.len() / 256;
    payload[at] = put;
    let _ = message::read(None, &payload, &InFlight::default());
}

/// One write per line: a byte for the fields or a deletion, the value, the user id.
fn writes(data: &[u8]) -> Arc<[Write]> {
    let write = |line: &[u8]| {
        let (&[set], rest) = line.split_first_chunk()?;
        let (&value, id) = rest.split_first_chunk::<8>()?;
        let user_id = str::from_utf8(id)
            .ok()
            .filter(|id| check_user_id(id).is_ok())?;
        if set == b'd' {
            return Some(Write::Delete(user_id.into()));
        }
        let value = i64::from_le_bytes(value);
        let values: Values = std::array::from_fn(|index| value.wrapping_shr(index as u32));
        let mut changes = Changes::default();
        for index in (0..FIELD_COUNT).filter(|index| set >> index & 1 == 1) {
            changes.set(index, values[index]);
        }
        let user_id = user_id.into();
        Some(Write::Set(Patch { user_id, changes }))
    };
    data.split(|byte| *byte == b'\n')
        .filter_map(write)
        .collect()
}
