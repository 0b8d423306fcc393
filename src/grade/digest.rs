//! The digest of records.

use std::fmt;
use std::ops::AddAssign;

use xxhash_rust::xxh3::xxh3_128;

use super::{FIELD_COUNT, USER_ID_BYTES_MAX, UserGrade};
use crate::hex;

/// A sum over records that does not depend on their order: two stores with equal digests hold, but
/// for a chance of 2^-128, equal records.
///
/// Each record counts as the XXH3-128 of its id and its fields that are not 0; the sum wraps.
/// Leaving out zeros lets replicas with and without a new, unset field agree.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Digest(pub u128);

impl Digest {
    /// Reads what displaying one writes.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        hex::parse(text).map(Self)
    }

    /// Takes `old` out of the sum and puts `new` in.
    pub fn replace(&mut self, old: Digest, new: Digest) {
        self.0 = self.0.wrapping_sub(old.0).wrapping_add(new.0);
    }
}

impl AddAssign for Digest {
    fn add_assign(&mut self, other: Self) {
        self.0 = self.0.wrapping_add(other.0);
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl<S: AsRef<str>> UserGrade<S> {
    /// What the record adds to the store's digest.
    pub fn digest(&self) -> Digest {
        // Most ids are short, and room that is not there need not be cleared.
        match self.user_id.as_ref().len() {
            0..=SHORT_ID => self.digest_in::<{ record_bytes(SHORT_ID) }>(),
            _ => self.digest_in::<{ record_bytes(USER_ID_BYTES_MAX) }>(),
        }
    }

    fn digest_in<const BYTES: usize>(&self) -> Digest {
        let user_id = self.user_id.as_ref();
        let mut bytes = RecordBytes::<BYTES>::default();
        // The length first, so that no id can look like an id and a field.
        bytes.push(&(user_id.len() as u64).to_le_bytes());
        bytes.push(user_id.as_bytes());
        for (index, value) in self.values.iter().enumerate() {
            if *value != 0 {
                bytes.push(&[index as u8]);
                bytes.push(&value.to_le_bytes());
            }
        }
        Digest(xxh3_128(bytes.filled()))
    }
}

/// Bytes of an id that is called short: a UUID is.
const SHORT_ID: usize = 40;

/// Room on the stack for one record's canonical bytes.
struct RecordBytes<const BYTES: usize> {
    bytes: [u8; BYTES],
    len: usize,
}

/// Bytes that a record with an id of `id` bytes takes at most.
const fn record_bytes(id: usize) -> usize {
    8 + id + FIELD_COUNT * 9
}

impl<const BYTES: usize> Default for RecordBytes<BYTES> {
    fn default() -> Self {
        Self {
            bytes: [0; BYTES],
            len: 0,
        }
    }
}

impl<const BYTES: usize> RecordBytes<BYTES> {
    fn push(&mut self, part: &[u8]) {
        let end = self.len + part.len();
        if let Some(room) = self.bytes.get_mut(self.len..end) {
            room.copy_from_slice(part);
            self.len = end;
        }
    }

    fn filled(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}
