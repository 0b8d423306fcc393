//! Messages of the JetStream log, which anyone who may publish can write. The first byte is the kind:
//!
//! - a message as text, headers a line each, an empty line, the payload. Nothing panics; the writes are
//!   those that serde_json reads, without deletions in format 1; and what was read is written and read
//!   again as the same.
//! - a batch, made from the input. It is read as it was written, and with one byte changed nothing
//!   panics.

use std::sync::Arc;

use async_nats::{HeaderMap, HeaderName, HeaderValue};
use gradestore::grade::{Changes, FIELD_COUNT, Patch, Values, Write, check_user_id};
use gradestore::log::message::{self, Unreadable};
use gradestore::log::{Batch, Checkpoint, Origin};

pub(crate) fn check(data: &[u8]) {
    match data.split_first() {
        Some((b'm', rest)) => as_sent(rest),
        Some((_, rest)) => as_written(rest),
        None => {}
    }
}

fn as_sent(text: &[u8]) {
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
    let read = message::read(Some(&headers), payload, |_, _| None);
    let format = headers.get("Grade-Format").map(|format| format.as_str());
    let number = format.map_or(Ok(1), |format| format.parse::<u64>().map_err(drop));
    match read {
        Err(Unreadable::Newer(newer)) => assert!(newer > 2 && number == Ok(newer)),
        Err(Unreadable::Poisoned(why)) => assert!(!why.is_empty() && number.unwrap_or(0) < 3),
        Ok(batch) => {
            assert!(number == Ok(1) || number == Ok(2));
            assert_eq!((batch.origin, batch.number), sender(&headers));
            again(&batch);
        }
    }
    // serde_json reads -0 as a float, so as no integer.
    if !payload.windows(2).any(|two| two == b"-0") {
        let patches = serde_json::from_slice::<Vec<Patch<String>>>(payload).ok();
        let patches: Option<Arc<[Write]>> =
            patches.map(|plain| plain.iter().map(|patch| patch.to_owned().into()).collect());
        let writes = serde_json::from_slice::<Vec<Write<String>>>(payload).ok();
        let writes = writes.map(|plain| plain.iter().map(Write::to_owned).collect());
        for (format, plain) in [("1", patches), ("2", writes)] {
            let mut headers = HeaderMap::new();
            headers.insert("Grade-Format", format);
            let read = message::read(Some(&headers), payload, |_, _| None).ok();
            assert_eq!(read.map(|batch| batch.writes), plain, "{format}");
        }
    }
}

/// What is read is what was written, headers and all.
fn again(batch: &Batch) {
    let (headers, payload) = (message::headers(batch), message::payload(&batch.writes));
    let read = message::read(Some(&headers), &payload, |_, _| None).expect("what we write we read");
    assert_eq!(parts(&read), parts(batch));
    let at_hand = |origin, number| {
        assert_eq!((origin, number), (batch.origin, batch.number));
        Some(Arc::clone(&batch.writes))
    };
    let own = message::read(Some(&headers), b"not looked at", at_hand).unwrap();
    assert!(Arc::ptr_eq(&own.writes, &batch.writes));
}

fn parts(batch: &Batch) -> (String, u64, &[Write], Option<Checkpoint>) {
    let origin = batch.origin.to_string();
    (origin, batch.number, &batch.writes, batch.checkpoint)
}

/// Who sent it, and which of the sender's batches it is; nobody, unless both are there.
fn sender(headers: &HeaderMap) -> (Origin, u64) {
    let text = |name: &str| headers.get(name).map(HeaderValue::as_str);
    let digits = text("Grade-Origin").filter(|id| id.len() == 32 && !id.starts_with('+'));
    let origin = digits.and_then(|digits| u128::from_str_radix(digits, 16).ok());
    let number = text("Nats-Msg-Id").and_then(|id| id.rsplit_once('-')?.1.parse().ok());
    match (origin, number) {
        (Some(origin), Some(number)) => (Origin::of(origin), number),
        _ => (Origin::NOBODY, 0),
    }
}

fn as_written(data: &[u8]) {
    let Some((&[at, put], rest)) = data.split_first_chunk::<2>() else {
        return;
    };
    let batch = Batch {
        writes: writes(rest),
        ..Batch::nothing()
    };
    again(&batch);
    let mut payload = message::payload(&batch.writes).to_vec();
    let at = usize::from(at) * payload.len() / 256;
    payload[at] = put;
    let _ = message::read(None, &payload, |_, _| None);
}

/// A write a line: a byte that says which fields, or that it deletes, their value, the id.
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
