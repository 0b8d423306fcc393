//! A batch as a message, and back.
//!
//! The payload is a JSON array of writes: patches as `POST /set` takes them and `{"delete":"ID"}`;
//! headers say the rest: `Grade-Format` (2 where there is a deletion, else 1, which has none; a
//! message without it is of format 1), `Grade-Origin` (who sent it) and `Nats-Msg-Id`, which is origin and number and
//! makes the broker store a batch once however often it is sent. `Grade-Checkpoint`, in a message now
//! and then, is a position and the sender's digest there. A message without headers is read all the
//! same: any client of the broker can write to the log.

use std::sync::Arc;

use async_nats::HeaderMap;
use bytes::Bytes;

use crate::grade::{Digest, Write};
use crate::log::writes::{self, Format};
use crate::log::{Batch, Checkpoint, Origin};

const FORMAT_HEADER: &str = "Grade-Format";
const ORIGIN_HEADER: &str = "Grade-Origin";
/// The broker's own: the name that it knows a message again by.
const ID_HEADER: &str = "Nats-Msg-Id";
/// A position, the digest there as 32 hexadecimal digits, and the time of that batch in nanoseconds
/// since 1970, with a space between; the time may be left out.
const CHECKPOINT_HEADER: &str = "Grade-Checkpoint";

/// Why a message gives no batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unreadable {
    /// It has this format, which only a newer program reads: whoever skipped it would hold something
    /// else than those who read it.
    Newer(u64),
    /// It is no batch to any program; says why. All replicas skip it alike.
    Poisoned(Box<str>),
}

/// What the headers say of a batch.
#[derive(Debug, PartialEq, Eq)]
struct Label {
    /// How its writes are spelled.
    format: Format,
    /// Who sent it; [`Origin::NOBODY`] where they don't say.
    origin: Origin,
    /// Which of the sender's batches it is.
    number: u64,
    /// What the sender says of its state; one that can't be read is none.
    checkpoint: Option<Checkpoint>,
}

/// The headers of `batch`.
#[must_use]
pub fn headers(batch: &Batch) -> HeaderMap {
    let (origin, number) = (batch.origin, batch.number);
    let mut headers = HeaderMap::new();
    let format = Format::of(&batch.writes).number();
    headers.insert(FORMAT_HEADER, format.to_string());
    headers.insert(ORIGIN_HEADER, origin.to_string());
    headers.insert(ID_HEADER, format!("{origin}-{number}"));
    if let Some(checkpoint) = batch.checkpoint {
        let Checkpoint {
            position, digest, ..
        } = checkpoint;
        let mut text = format!("{position} {digest}");
        if let Some(time_ns) = checkpoint.time_ns {
            text += &format!(" {time_ns}");
        }
        headers.insert(CHECKPOINT_HEADER, text);
    }
    headers
}

/// The payload of a batch of `writes`.
#[must_use]
pub fn payload(writes: &[Write]) -> Bytes {
    let mut json = Vec::new();
    writes::write(writes, &mut json);
    json.into()
}

/// Reads a message. `at_hand` is asked for the writes of the batch that the headers name; what it has
/// is not decoded.
///
/// # Errors
/// The message gives no batch.
pub fn read(
    headers: Option<&HeaderMap>,
    payload: &[u8],
    at_hand: impl FnOnce(Origin, u64) -> Option<Arc<[Write]>>,
) -> Result<Batch, Unreadable> {
    let Label {
        format,
        origin,
        number,
        checkpoint,
    } = label(headers)?;
    let writes = match at_hand(origin, number) {
        Some(writes) => writes,
        None => writes::read(format, payload).map_err(Unreadable::Poisoned)?,
    };
    Ok(Batch {
        origin,
        number,
        writes,
        checkpoint,
    })
}

/// Reads what [`headers()`] wrote.
fn label(headers: Option<&HeaderMap>) -> Result<Label, Unreadable> {
    let text = |name: &str| {
        // Ours have three or four, which are looked at sooner than a name is hashed: `load/README.md`.
        let mut all = headers?.iter();
        let (_, values) = all.find(|(other, _)| AsRef::<str>::as_ref(*other) == name)?;
        values.first().map(async_nats::HeaderValue::as_str)
    };
    let number = text(FORMAT_HEADER).map_or(Ok(1), str::parse);
    let number = number.ok().filter(|number| *number > 0);
    let Some(number) = number else {
        let why = "its Grade-Format is no number from 1 up";
        return Err(Unreadable::Poisoned(why.into()));
    };
    let format = Format::numbered(number).ok_or(Unreadable::Newer(number))?;
    let origin = text(ORIGIN_HEADER).and_then(Origin::parse);
    let number = text(ID_HEADER).and_then(|id| id.rsplit_once('-')?.1.parse().ok());
    let checkpoint = text(CHECKPOINT_HEADER).and_then(checkpoint);
    Ok(match (origin, number) {
        (Some(origin), Some(number)) => Label {
            format,
            origin,
            number,
            checkpoint,
        },
        _ => Label {
            format,
            origin: Origin::NOBODY,
            number: 0,
            checkpoint: None,
        },
    })
}

fn checkpoint(text: &str) -> Option<Checkpoint> {
    let (position, rest) = text.split_once(' ')?;
    let (digest, time_ns) = match rest.split_once(' ') {
        Some((digest, time_ns)) => (digest, Some(time_ns.parse().ok()?)),
        None => (rest, None),
    };
    Some(Checkpoint {
        position: position.parse().ok()?,
        time_ns,
        digest: Digest::parse(digest)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_say_who_sent_which_batch() {
        let (origin, number) = (Origin::random().unwrap(), 7);
        let spoken = |time_ns| Checkpoint {
            position: u64::MAX,
            time_ns,
            digest: Digest(u128::MAX - 1),
        };
        for checkpoint in [None, Some(spoken(None)), Some(spoken(Some(1)))] {
            let batch = Batch {
                origin,
                number,
                writes: Arc::from([]),
                checkpoint,
            };
            let wanted = Label {
                format: Format::Patches,
                origin,
                number,
                checkpoint,
            };
            assert_eq!(label(Some(&headers(&batch))), Ok(wanted));
        }
        for no_checkpoint in [
            "",
            "1",
            "1 x",
            "-1 0",
            "1 0123456789abcdef0123456789abcdef0",
            "1 0123456789abcdef0123456789abcdef x",
            "1 0123456789abcdef0123456789abcdef 1 2",
        ] {
            assert_eq!(checkpoint(no_checkpoint), None, "{no_checkpoint}");
        }
    }

    #[test]
    fn strangers_need_no_headers_and_a_newer_format_is_told_from_a_broken_one() {
        let nobody = |format| {
            Ok(Label {
                format,
                origin: Origin::NOBODY,
                number: 0,
                checkpoint: None,
            })
        };
        let broken = || {
            let why = "its Grade-Format is no number from 1 up";
            Err(Unreadable::Poisoned(why.into()))
        };
        assert_eq!(label(None), nobody(Format::Patches));
        assert_eq!(label(Some(&HeaderMap::new())), nobody(Format::Patches));
        for (format, wanted) in [
            ("1", nobody(Format::Patches)),
            ("2", nobody(Format::Writes)),
            ("3", Err(Unreadable::Newer(3))),
            ("0", broken()),
            ("x", broken()),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(FORMAT_HEADER, format);
            headers.insert(ORIGIN_HEADER, "no hex");
            assert_eq!(label(Some(&headers)), wanted, "{format}");
        }
    }

    #[test]
    fn a_batch_with_a_deletion_is_of_another_format_and_no_other_has_one() {
        let payload = br#"[{"user_id":"a","spp":1},{"delete":"a"}]"#;
        let of_format = |format: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(FORMAT_HEADER, format);
            read(Some(&headers), payload, |_, _| None)
        };
        let batch = of_format("2").unwrap();
        assert_eq!(batch.writes[1], Write::Delete("a".into()));
        assert_eq!(headers(&batch).get(FORMAT_HEADER).unwrap().as_str(), "2");
        assert_eq!(super::payload(&batch.writes), &payload[..]);
        let sets_only = Batch {
            writes: batch.writes[..1].into(),
            ..batch
        };
        let headers = headers(&sets_only);
        assert_eq!(headers.get(FORMAT_HEADER).unwrap().as_str(), "1");
        for poisoned in [of_format("1"), read(None, payload, |_, _| None)] {
            assert!(matches!(poisoned, Err(Unreadable::Poisoned(_))));
        }
    }

    #[test]
    fn writes_at_hand_are_not_decoded() {
        let writes: Arc<[Write]> = Arc::from([]);
        let batch = read(None, b"no JSON", |_, _| Some(Arc::clone(&writes))).unwrap();
        assert!(Arc::ptr_eq(&batch.writes, &writes));
        let poisoned = read(None, b"no JSON", |_, _| None);
        assert!(matches!(poisoned, Err(Unreadable::Poisoned(_))));
    }
}
