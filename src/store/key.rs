//! A user id in the form in which it is looked up, hashed and compared.

use uuid::Uuid;
use uuid::fmt::Hyphenated;

/// Longest id that stands in the record itself, but for a UUID.
const INLINE_BYTES_MAX: usize = 15;
/// Bytes of a UUID; as a kind of key, what says that the bytes are those of one.
pub(super) const UUID_BYTES: usize = 16;

/// A user id. Two ids are equal if their keys are.
pub(super) enum Key<'a> {
    /// An id of up to 15 bytes as it is, or the 16 bytes of a UUID, little-endian: bytes that go through
    /// memory are waited for.
    Packed { len: u8, id: u128 },
    /// Any other.
    Long(&'a [u8]),
}

impl<'a> Key<'a> {
    pub(super) fn of(user_id: &'a str) -> Self {
        let id = user_id.as_bytes();
        if (1..=INLINE_BYTES_MAX).contains(&id.len()) {
            return Self::Packed {
                len: id.len() as u8,
                id: padded(id),
            };
        }
        match uuid(id) {
            Some(bytes) => Self::Packed {
                len: UUID_BYTES as u8,
                id: u128::from_le_bytes(bytes),
            },
            None => Self::Long(id),
        }
    }

    /// Hands `take` the bytes that stand for the id, whose key this is: what it is hashed by.
    pub(super) fn with_bytes<T>(&self, user_id: &str, take: impl FnOnce(&[u8]) -> T) -> T {
        match self {
            Self::Packed { len, id } if usize::from(*len) == UUID_BYTES => take(&id.to_le_bytes()),
            // As they stand there, and not out of the number, where they would go through memory.
            _ => take(user_id.as_bytes()),
        }
    }
}

/// Up to sixteen bytes, and zeros behind them: as two numbers that may overlap, since copying as
/// many bytes as there happen to be takes longer than all the rest of a lookup's arithmetic.
fn padded(id: &[u8]) -> u128 {
    let bits = id.len() as u32 * 8;
    match (id.first_chunk(), id.last_chunk()) {
        (Some(first), Some(last)) => {
            let last = u128::from(u64::from_le_bytes(*last));
            u128::from(u64::from_le_bytes(*first)) | last << (bits - u64::BITS)
        }
        _ => id
            .iter()
            .rev()
            .fold(0, |bytes, byte| bytes << 8 | u128::from(*byte)),
    }
}

/// The bytes of an id that is a UUID as most systems write one, lower case with hyphens: the one
/// form of several that can be made again from the bytes.
fn uuid(id: &[u8]) -> Option<[u8; UUID_BYTES]> {
    if id.len() != Hyphenated::LENGTH || id.get(8) != Some(&b'-') {
        return None;
    }
    let uuid = Uuid::try_parse_ascii(id).ok()?;
    let written = with_uuid(*uuid.as_bytes(), |written| written.as_bytes() == id);
    written.then(|| *uuid.as_bytes())
}

/// Hands `take` the id that a UUID's bytes stand for.
pub(super) fn with_uuid<T>(bytes: [u8; UUID_BYTES], take: impl FnOnce(&str) -> T) -> T {
    let mut room = [0; Hyphenated::LENGTH];
    take(Uuid::from_bytes(bytes).hyphenated().encode_lower(&mut room))
}
