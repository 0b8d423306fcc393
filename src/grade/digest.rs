//! An order-independent digest of records.

use std::fmt;
use std::ops::AddAssign;

use xxhash_rust::xxh3::xxh3_128;

use super::{FIELD_COUNT, USER_ID_BYTES_MAX, UserGrade, Values};
use crate::sys::hex;

/// The wrapping sum of the records' hashes. Two stores with equal digests hold equal records,
/// except with a probability of 2^-128.
///
/// A record's hash is the XXH3-128 of its id and its fields other than 0. Zeros are left out, so
/// that replicas with and without a new, unset field agree.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Digest(pub u128);

impl Digest {
    /// Parses a digest in its displayed form.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        hex::parse(text).map(Self)
    }

    /// Subtracts `old` from the sum and adds `new`.
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
    /// The record's part of the store's digest.
    pub fn digest(&self) -> Digest {
        let [digest] = digests(self.user_id.as_ref(), [&self.values]);
        digest
    }
}

/// A record's part of the store's digest, for each of several values.
pub(crate) fn digests<const N: usize>(user_id: &str, values: [&Values; N]) -> [Digest; N] {
    // Most ids are short, and a smaller buffer takes less time to clear.
    match user_id.len() {
        0..=SHORT_ID => digests_in::<{ record_bytes(SHORT_ID) }, N>(user_id, values),
        _ => digests_in::<{ record_bytes(USER_ID_BYTES_MAX) }, N>(user_id, values),
    }
}

fn digests_in<const BYTES: usize, const N: usize>(
    user_id: &str,
    values: [&Values; N],
) -> [Digest; N] {
    // Writes all records before it hashes the first: a wide load right after narrow stores to the
    // same bytes would stall.
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

/// The longest id for the small buffer; a UUID fits.
const SHORT_ID: usize = 40;
/// The index of a field and its value.
const FIELD_BYTES: usize = 1 + size_of::<i64>();

/// The most bytes of a record with an id of `id` bytes.
const fn record_bytes(id: usize) -> usize {
    size_of::<u64>() + id + FIELD_COUNT * FIELD_BYTES
}

/// The bytes of a record that are hashed, on the stack.
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
        // The length prevents an id from being confused with a shorter id and a field.
        self.put(&(user_id.len() as u64).to_le_bytes(), true);
        self.put_id(user_id.as_bytes());
        for (index, value) in values.iter().enumerate() {
            let is_set = *value != 0;
            self.put(&[index as u8], is_set);
            self.put(&value.to_le_bytes(), is_set);
        }
    }

    /// Appends `part` if `keep` is set. Always writes it, because a branch would be unpredictable:
    /// the next part overwrites bytes that are not kept.
    fn put(&mut self, part: &[u8], keep: bool) {
        if let Some(target) = self.bytes.get_mut(self.len..self.len + part.len()) {
            target.copy_from_slice(part);
            self.len += part.len() * usize::from(keep);
        }
    }

    /// Appends an id. Copies ids of 8 to 16 bytes, which most are, as two words that may overlap:
    /// copying a variable number of bytes would be a call.
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
