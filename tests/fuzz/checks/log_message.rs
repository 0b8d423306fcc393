//! Messages of the JetStream log, which anyone who may publish can write. The first byte is the kind:
//!
//! - a message as text, headers a line each, an empty line, the payload. Nothing panics; the patches are
//!   those that serde_json reads; and what was read is written and read again as the same.
//! - a batch, made from the input. It is read as it was written, and with one byte changed nothing
//!   panics.

use std::sync::Arc;

use async_nats::{HeaderMap, HeaderName, HeaderValue};
use gradestore::grade::{Changes, FIELD_COUNT, Patch, Values, check_user_id};
use gradestore::log::message::{self, Unreadable};
use gradestore::log::{Batch, Checkpoint};

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
        Err(Unreadable::Newer(newer)) => assert!(newer > 1 && number == Ok(newer)),
        Err(Unreadable::Poisoned(why)) => assert!(!why.is_empty() && number.unwrap_or(0) < 2),
        Ok(batch) => {
            assert_eq!(number, Ok(1));
            again(&batch);
        }
    }
    // serde_json reads -0 as a float, so as no integer.
    if number == Ok(1) && !payload.windows(2).any(|two| two == b"-0") {
        let patches = message::read(None, payload, |_, _| None).ok();
        let plain = serde_json::from_slice::<Vec<Patch<String>>>(payload).ok();
        let plain = plain.map(|plain| plain.iter().map(Patch::to_owned).collect());
        assert_eq!(patches.map(|batch| batch.patches), plain);
    }
}

/// What is read is what was written, headers and all.
fn again(batch: &Batch) {
    let (headers, payload) = (message::headers(batch), message::payload(&batch.patches));
    let read = message::read(Some(&headers), &payload, |_, _| None).expect("what we write we read");
    assert_eq!(parts(&read), parts(batch));
    let at_hand = |origin, number| {
        assert_eq!((origin, number), (batch.origin, batch.number));
        Some(Arc::clone(&batch.patches))
    };
    let own = message::read(Some(&headers), b"not looked at", at_hand).unwrap();
    assert!(Arc::ptr_eq(&own.patches, &batch.patches));
}

fn parts(batch: &Batch) -> (String, u64, &[Patch], Option<Checkpoint>) {
    let origin = batch.origin.to_string();
    (origin, batch.number, &batch.patches, batch.checkpoint)
}

fn as_written(data: &[u8]) {
    let Some((&[at, put], rest)) = data.split_first_chunk::<2>() else {
        return;
    };
    let batch = Batch {
        patches: patches(rest),
        ..Batch::nothing()
    };
    again(&batch);
    let mut payload = message::payload(&batch.patches).to_vec();
    let at = usize::from(at) * payload.len() / 256;
    payload[at] = put;
    let _ = message::read(None, &payload, |_, _| None);
}

/// A patch a line: a byte that says which fields, their value, the id.
fn patches(data: &[u8]) -> Arc<[Patch]> {
    let patch = |line: &[u8]| {
        let (&[set], rest) = line.split_first_chunk()?;
        let (&value, id) = rest.split_first_chunk::<8>()?;
        let user_id = str::from_utf8(id)
            .ok()
            .filter(|id| check_user_id(id).is_ok())?;
        let value = i64::from_le_bytes(value);
        let values: Values = std::array::from_fn(|index| value.wrapping_shr(index as u32));
        let mut changes = Changes::default();
        for index in (0..FIELD_COUNT).filter(|index| set >> index & 1 == 1) {
            changes.set(index, values[index]);
        }
        Some(Patch {
            user_id: user_id.into(),
            changes,
        })
    };
    data.split(|byte| *byte == b'\n')
        .filter_map(patch)
        .collect()
}
