//! A record in 32 bytes, half a cache line: its id, then its values, each in as few bytes as it
//! needs.
//!
//! | bytes | content |
//! | --- | --- |
//! | 1 | the kind of the id (below), and the flag [`WIDE`] |
//! | 1 to 15, 16, or 8 | the id itself, a UUID, or the [`LongIdLocation`] of a longer id |
//! | half a byte per field | the length of the field's value, 0 to 8 bytes |
//! | the rest | the values, little-endian; with [`WIDE`], the slot of the values instead |

use super::key::UUID_BYTES;
use crate::grade::{FIELD_COUNT, Values};

const BYTES: usize = 32;
/// The offset of the last eight bytes.
const LAST_WORD: usize = BYTES - size_of::<i64>();
/// Bytes of the lengths of the values.
const LENGTHS: usize = FIELD_COUNT.div_ceil(2);

/// Kinds: a free slot; 1 to 15 is the length of an inline id; a UUID; an id in `LongIds`.
const FREE: u8 = 0;
const UUID: u8 = UUID_BYTES as u8;
const LONG: u8 = UUID + 1;
/// A flag beside the kind: the values do not fit and are stored outside the record.
const WIDE: u8 = 0x80;

// The slot of wide values fits behind an id of any kind.
const _: () = assert!(1 + UUID_BYTES + size_of::<u32>() <= BYTES);

/// A record, or a free slot.
#[derive(Clone, Copy)]
#[repr(align(32))]
pub(super) struct PackedRecord([u8; BYTES]);

/// Where a long id is stored in the `LongIds` of its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LongIdLocation {
    pub(super) chunk: u32,
    pub(super) at: u16,
    pub(super) len: u16,
}

/// An id as a record stores it.
pub(super) enum StoredId {
    /// The slot has no record.
    Free,
    /// A length, and the bytes padded to sixteen.
    Inline(u8, [u8; UUID_BYTES]),
    Uuid([u8; UUID_BYTES]),
    Long(LongIdLocation),
}

/// Values as a record stores them.
pub(super) enum StoredValues {
    Inline(Values),
    /// In this slot of the shard's wide values.
    Wide(u32),
}

impl PackedRecord {
    pub(super) const FREE: Self = Self([FREE; BYTES]);

    /// A record with the id of [`Key::Packed`](super::key::Key::Packed) and no values.
    pub(super) fn packed(len: u8, id: u128) -> Self {
        let mut record = Self::FREE;
        record.write(0, [len]);
        record.write(1, id.to_le_bytes());
        record
    }

    /// A record with a long id and no values.
    pub(super) fn long(location: LongIdLocation) -> Self {
        let mut record = Self::FREE;
        record.write(0, [LONG]);
        record.set_location(location);
        record
    }

    /// Sets where the record's long id is stored.
    pub(super) fn set_location(&mut self, location: LongIdLocation) {
        self.write(1, location.chunk.to_le_bytes());
        self.write(5, location.at.to_le_bytes());
        self.write(7, location.len.to_le_bytes());
    }

    pub(super) fn id(&self) -> StoredId {
        match self.kind() {
            FREE => StoredId::Free,
            LONG => StoredId::Long(LongIdLocation {
                chunk: u32::from_le_bytes(self.read(1)),
                at: u16::from_le_bytes(self.read(5)),
                len: u16::from_le_bytes(self.read(7)),
            }),
            UUID => StoredId::Uuid(self.read(1)),
            len => StoredId::Inline(len, self.read(1)),
        }
    }

    /// Whether this record was made by [`packed()`](Self::packed) with the same id.
    pub(super) fn is_packed(&self, len: u8, id: u128) -> bool {
        // Compares all sixteen bytes at once and shifts out those behind the id.
        let unused = (UUID_BYTES as u32 * 8).saturating_sub(u32::from(len) * 8);
        let other = u128::from_le_bytes(self.read(1)) ^ id;
        self.kind() == len && other << unused == 0
    }

    // Inlined, like its callers: passing the values through memory would stall.
    #[inline(always)]
    pub(super) fn values(&self) -> StoredValues {
        let begin = self.values_begin();
        if self.first_byte() & WIDE != 0 {
            return StoredValues::Wide(u32::from_le_bytes(self.read(begin)));
        }
        let mut values = Values::default();
        let mut at = begin + LENGTHS;
        for (field, value) in values.iter_mut().enumerate() {
            let [pair] = self.read(begin + field / 2);
            let len = u32::from(pair >> (field % 2 * 4)) & 0xf;
            let unused = i64::BITS - len * 8;
            // Truncates to `len` bytes and extends the sign. No bytes make a 0.
            *value = self.word(at).unbounded_shl(unused).unbounded_shr(unused);
            at += len as usize;
        }
        StoredValues::Inline(values)
    }

    /// Stores the values inline; changes nothing and returns `false` if they do not fit.
    #[expect(
        clippy::indexing_slicing,
        reason = "`LENGTHS` has half a byte for each field"
    )]
    pub(super) fn set(&mut self, values: &Values) -> bool {
        let begin = self.values_begin();
        let lens = values.map(significant_bytes);
        let mut at = begin + LENGTHS;
        if at + lens.iter().sum::<usize>() > BYTES {
            return false;
        }
        let mut lengths = [0; LENGTHS];
        for (field, (value, len)) in values.iter().zip(lens).enumerate() {
            lengths[field / 2] |= (len as u8) << (field % 2 * 4);
            self.set_word(at, *value, len);
            at += len;
        }
        self.write(begin, lengths);
        self.write(0, [self.kind()]);
        true
    }

    /// Records that the values are in this slot of the wide values.
    pub(super) fn set_wide_slot(&mut self, slot: u32) {
        self.write(0, [self.kind() | WIDE]);
        self.write(self.values_begin(), slot.to_le_bytes());
    }

    /// The eight bytes at `at` as a number, padded with zeros at the end of the record.
    fn word(&self, at: usize) -> i64 {
        let begin = at.min(LAST_WORD);
        let word = u64::from_le_bytes(self.read(begin));
        word.unbounded_shr((at - begin) as u32 * 8).cast_signed()
    }

    /// Writes the `len` low bytes of `word` at `at`. May overwrite up to eight bytes, so values are
    /// written in order.
    #[expect(
        clippy::indexing_slicing,
        reason = "`set` has checked that the values fit"
    )]
    fn set_word(&mut self, at: usize, word: i64, len: usize) {
        let bytes = word.to_le_bytes();
        if at <= LAST_WORD {
            self.write(at, bytes);
        } else {
            self.0[at..at + len].copy_from_slice(&bytes[..len]);
        }
    }

    fn first_byte(&self) -> u8 {
        let [first_byte] = self.read(0);
        first_byte
    }

    fn kind(&self) -> u8 {
        self.first_byte() & !WIDE
    }

    fn values_begin(&self) -> usize {
        1 + match self.kind() {
            LONG => size_of::<LongIdLocation>(),
            kind => usize::from(kind),
        }
    }

    fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        read(&self.0, at)
    }

    fn write<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
        write(&mut self.0, at, bytes);
    }
}

/// How many bytes `value` needs with its sign; 0 needs none.
fn significant_bytes(value: i64) -> usize {
    let significant = i64::BITS - (value ^ (value >> 63)).leading_zeros() + 1;
    significant.div_ceil(8) as usize * usize::from(value != 0)
}

#[expect(clippy::expect_used, reason = "all offsets are within a record")]
fn read<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    let bytes = from.get(at..).and_then(<[u8]>::first_chunk);
    *bytes.expect("read within a record")
}

#[expect(clippy::expect_used, reason = "all offsets are within a record")]
fn write<const N: usize>(to: &mut [u8], at: usize, bytes: [u8; N]) {
    let target = to.get_mut(at..).and_then(<[u8]>::first_chunk_mut);
    *target.expect("written within a record") = bytes;
}
