//! The digest of records.

use std::fmt;
use std::ops::AddAssign;

use xxhash_rust::xxh3::xxh3_128;

use super::{FIELD_COUNT, USER_ID_BYTES_MAX, UserGrade, Values};
use crate::sys::hex;

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
        let [digest] = digests(self.user_id.as_ref(), [&self.values]);
        digest
    }
}

/// What a record adds to the store's digest with one values or another.
pub(crate) fn digests<const N: usize>(user_id: &str, values: [&Values; N]) -> [Digest; N] {
    // Most ids are short, and room that is not there need not be cleared.
    match user_id.len() {
        0..=SHORT_ID => digests_in::<{ record_bytes(SHORT_ID) }, N>(user_id, values),
        _ => digests_in::<{ record_bytes(USER_ID_BYTES_MAX) }, N>(user_id, values),
    }
}

fn digests_in<const BYTES: usize, const N: usize>(
    user_id: &str,
    values: [&Values; N],
) -> [Digest; N] {
    // All are written before the first is read: what was just written in small parts is not had back in
    // larger ones at once.
    let mut records = [const { RecordBytes::<BYTES>::EMPTY }; N];
    for (record, values) in records.iter_mut().zip(values) {
        record.write(user_id, values);
    }
    let mut digests = [Digest::default(); N];
    for (digest, record) in digests.iter_mut().zip(&records) {
        *digest = Digest(xxh3_128(record.filled()));
    }
    digests
}

/// Bytes of an id that is called short: a UUID is.
const SHORT_ID: usize = 40;
/// Bytes of a field: its index and its value.
const FIELD_BYTES: usize = 1 + size_of::<i64>();

/// Bytes that a record with an id of `id` bytes takes at most.
const fn record_bytes(id: usize) -> usize {
    size_of::<u64>() + id + FIELD_COUNT * FIELD_BYTES
}

/// A record's canonical bytes, on the stack.
struct RecordBytes<const BYTES: usize> {
    bytes: [u8; BYTES],
    len: usize,
}

impl<const BYTES: usize> RecordBytes<BYTES> {
    const EMPTY: Self = Self {
        bytes: [0; BYTES],
        len: 0,
    };

    fn write(&mut self, user_id: &str, values: &Values) {
        // The length first, so that no id can look like an id and a field.
        self.put(&(user_id.len() as u64).to_le_bytes(), true);
        self.put_id(user_id.as_bytes());
        for (index, value) in values.iter().enumerate() {
            let counts = *value != 0;
            self.put(&[index as u8], counts);
            self.put(&value.to_le_bytes(), counts);
        }
    }

    /// Puts `part` behind the others if it counts. It is written in any case, as which it is can't be
    /// foreseen: what does not count is overwritten, or stands behind the end.
    fn put(&mut self, part: &[u8], counts: bool) {
        if let Some(room) = self.bytes.get_mut(self.len..self.len + part.len()) {
            room.copy_from_slice(part);
            self.len += part.len() * usize::from(counts);
        }
    }

    /// Puts an id; most are of 8 to 16 bytes, which are two numbers that may overlap: to copy as many bytes as
    /// there happen to be is a call.
    fn put_id(&mut self, id: &[u8]) {
        let end = self.len + id.len();
        let (8..=16, Some(first), Some(last)) =
            (id.len(), id.first_chunk::<8>(), id.last_chunk::<8>())
        else {
            self.put(id, true);
            return;
        };
        self.put(first, true);
        self.len = end - last.len();
        self.put(last, true);
    }

    fn filled(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}
