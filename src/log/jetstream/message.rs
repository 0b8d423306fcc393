//! A batch as a message, and back.
//!
//! The payload is a JSON array of patches as `POST /set` takes them; headers say the rest:
//! `Grade-Format: 1`, `Grade-Origin` (who sent it) and `Nats-Msg-Id`, which is origin and number and
//! makes the broker store a batch once however often it is sent. `Grade-Checkpoint`, in a message now
//! and then, is a position and the sender's digest there. A message without headers is read all the
//! same: any client of the broker can write to the log.

use std::sync::Arc;

use async_nats::HeaderMap;
use bytes::Bytes;

use crate::grade::{Digest, Patch};
use crate::log::{Batch, Checkpoint, Origin, patches};

/// The newest format that this program reads, and the one that it writes.
const FORMAT: u64 = 1;
const FORMAT_HEADER: &str = "Grade-Format";
const ORIGIN_HEADER: &str = "Grade-Origin";
/// The broker's own: the name that it knows a message again by.
const ID_HEADER: &str = "Nats-Msg-Id";
/// A position and the digest there, 32 hexadecimal digits, with a space between.
const CHECKPOINT_HEADER: &str = "Grade-Checkpoint";

/// What the headers say of a batch.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Label {
    /// It can be read. Who sent it is [`Origin::NOBODY`] where they don't say.
    Known {
        /// Who sent it.
        origin: Origin,
        /// Which of the sender's batches it is.
        number: u64,
        /// What the sender says of its state; one that can't be read is none.
        checkpoint: Option<Checkpoint>,
    },
    /// It has a format that only a newer program reads.
    Newer(u64),
    /// Its format is no number.
    Broken,
}

/// The headers of `batch`.
pub(super) fn headers(batch: &Batch) -> HeaderMap {
    let (origin, number) = (batch.origin, batch.number);
    let mut headers = HeaderMap::new();
    headers.insert(FORMAT_HEADER, FORMAT.to_string());
    headers.insert(ORIGIN_HEADER, origin.to_string());
    headers.insert(ID_HEADER, format!("{origin}-{number}"));
    if let Some(Checkpoint { position, digest }) = batch.checkpoint {
        headers.insert(CHECKPOINT_HEADER, format!("{position} {digest}"));
    }
    headers
}

/// The payload of a batch of `patches`.
pub(super) fn payload(patches: &[Patch]) -> Bytes {
    let mut json = Vec::new();
    patches::write(patches, &mut json);
    json.into()
}

/// Reads what [`headers()`] wrote.
pub(super) fn label(headers: Option<&HeaderMap>) -> Label {
    let text = |name: &str| headers?.get(name).map(async_nats::HeaderValue::as_str);
    match text(FORMAT_HEADER).map(str::parse) {
        None | Some(Ok(FORMAT)) => {}
        Some(Ok(format @ FORMAT..)) => return Label::Newer(format),
        Some(_) => return Label::Broken,
    }
    let origin = text(ORIGIN_HEADER).and_then(Origin::parse);
    let number = text(ID_HEADER).and_then(|id| id.rsplit_once('-')?.1.parse().ok());
    let checkpoint = text(CHECKPOINT_HEADER).and_then(checkpoint);
    match (origin, number) {
        (Some(origin), Some(number)) => Label::Known {
            origin,
            number,
            checkpoint,
        },
        _ => Label::Known {
            origin: Origin::NOBODY,
            number: 0,
            checkpoint: None,
        },
    }
}

fn checkpoint(text: &str) -> Option<Checkpoint> {
    let (position, digest) = text.split_once(' ')?;
    Some(Checkpoint {
        position: position.parse().ok()?,
        digest: Digest::parse(digest)?,
    })
}

/// Reads what [`payload()`] wrote.
///
/// # Errors
/// It is no batch; says what is wrong.
pub(super) fn patches(payload: &[u8]) -> Result<Arc<[Patch]>, Box<str>> {
    patches::read(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_say_who_sent_which_batch() {
        let (origin, number) = (Origin::random().unwrap(), 7);
        let spoken = Checkpoint {
            position: u64::MAX,
            digest: Digest(u128::MAX - 1),
        };
        for checkpoint in [None, Some(spoken)] {
            let batch = Batch {
                origin,
                number,
                patches: Arc::from([]),
                checkpoint,
            };
            let wanted = Label::Known {
                origin,
                number,
                checkpoint,
            };
            assert_eq!(label(Some(&headers(&batch))), wanted);
        }
        for no_checkpoint in [
            "",
            "1",
            "1 x",
            "-1 0",
            "1 0123456789abcdef0123456789abcdef0",
        ] {
            assert_eq!(checkpoint(no_checkpoint), None, "{no_checkpoint}");
        }
    }

    #[test]
    fn strangers_need_no_headers_and_a_newer_format_is_told_from_a_broken_one() {
        let nobody = || Label::Known {
            origin: Origin::NOBODY,
            number: 0,
            checkpoint: None,
        };
        assert_eq!(label(None), nobody());
        assert_eq!(label(Some(&HeaderMap::new())), nobody());
        for (format, wanted) in [
            ("1", nobody()),
            ("2", Label::Newer(2)),
            ("0", Label::Broken),
            ("x", Label::Broken),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(FORMAT_HEADER, format);
            headers.insert(ORIGIN_HEADER, "no hex");
            assert_eq!(label(Some(&headers)), wanted, "{format}");
        }
    }
}
