//! A user id in the form in which it is looked up, hashed and compared.

use uuid::Uuid;
use uuid::fmt::Hyphenated;

/// The longest id, other than a UUID, that is stored in the record itself.
const INLINE_BYTES_MAX: usize = 15;
/// The bytes of a UUID. As the `len` of a packed key, it means that the bytes are those of a UUID.
pub(super) const UUID_BYTES: usize = 16;

/// A user id. Two ids are equal if their keys are.
pub(super) enum Key<'a> {
    /// An id of up to 15 bytes as it is, or the 16 bytes of a UUID, little-endian. A number,
    /// because it stays in registers: bytes written to memory in parts stall the load that follows.
    Packed { len: u8, id: u128 },
    /// Any other id.
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
        match parse_uuid(id) {
            Some(bytes) => Self::Packed {
                len: UUID_BYTES as u8,
                id: u128::from_le_bytes(bytes),
            },
            None => Self::Long(id),
        }
    }

    /// Calls `f` with the bytes to hash for `user_id`, whose key this is.
    pub(super) fn with_bytes<T>(&self, user_id: &str, f: impl FnOnce(&[u8]) -> T) -> T {
        match self {
            Self::Packed { len, id } if usize::from(*len) == UUID_BYTES => f(&id.to_le_bytes()),
            // The bytes of the text, because those of the number would have to be written to
            // memory first.
            _ => f(user_id.as_bytes()),
        }
    }
}

/// Up to sixteen bytes as a number, padded with zeros. Loads two words that may overlap: copying a
/// variable number of bytes takes longer than the rest of a lookup's arithmetic.
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

/// The bytes of a UUID in lower case with hyphens, the most common form. Other forms are stored as
/// text, because the bytes do not tell them apart.
fn parse_uuid(id: &[u8]) -> Option<[u8; UUID_BYTES]> {
    if id.len() != Hyphenated::LENGTH || id.get(8) != Some(&b'-') {
        return None;
    }
    let uuid = Uuid::try_parse_ascii(id).ok()?;
    let is_canonical = with_uuid_text(*uuid.as_bytes(), |text| text.as_bytes() == id);
    is_canonical.then(|| *uuid.as_bytes())
}

/// Calls `f` with the text of the UUID with these bytes.
pub(super) fn with_uuid_text<T>(bytes: [u8; UUID_BYTES], f: impl FnOnce(&str) -> T) -> T {
    let mut buffer = [0; Hyphenated::LENGTH];
    f(Uuid::from_bytes(bytes)
        .hyphenated()
        .encode_lower(&mut buffer))
}
