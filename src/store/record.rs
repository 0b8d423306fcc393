//! A record in 32 bytes, half a cache line: its id, then its values, each in as few bytes as it
//! needs.
//!
//! | bytes | what |
//! | --- | --- |
//! | 1 | the id's kind (below); [`WIDE`] if the values stand elsewhere |
//! | 1 to 15, 16, or 8 | the id itself, a UUID, or the [`Place`] of a longer one |
//! | half a byte a field | how many bytes the field's value takes, 0 to 8 |
//! | the rest | the values, least byte first; or, if they are [`WIDE`], their number |

use super::key::UUID_BYTES;
use crate::grade::{FIELD_COUNT, Values};

const BYTES: usize = 32;
/// Where the last eight bytes begin.
const LAST_WORD: usize = BYTES - size_of::<i64>();
/// Where the lengths of the values end, from where they begin.
const LENGTHS: usize = FIELD_COUNT.div_ceil(2);

/// Kinds: nothing here; 1 to 15 is the length of an id; a UUID; an id that stands elsewhere.
const FREE: u8 = 0;
const UUID: u8 = UUID_BYTES as u8;
const LONG: u8 = UUID + 1;
/// Beside the kind.
const WIDE: u8 = 0x80;

// Whatever stands before it, the number of wide values has room.
const _: () = assert!(1 + UUID_BYTES + size_of::<u32>() <= BYTES);

/// A record, or the room for one.
#[derive(Clone, Copy)]
#[repr(align(32))]
pub(super) struct Record([u8; BYTES]);

/// Where a long id stands in its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) chunk: u32,
    pub(super) at: u16,
    pub(super) len: u16,
}

/// An id as a record has it.
pub(super) enum Id {
    /// Nobody's.
    Free,
    /// The bytes themselves, so many of the sixteen.
    Inline(u8, [u8; UUID_BYTES]),
    Uuid([u8; UUID_BYTES]),
    Long(Place),
}

/// Values as a record has them.
pub(super) enum Held {
    Here(Values),
    /// Under this number, elsewhere.
    Wide(u32),
}

impl Record {
    pub(super) const FREE: Self = Self([FREE; BYTES]);

    /// One that has a packed id, as a key has it, and no values yet.
    pub(super) fn packed(len: u8, id: u128) -> Self {
        let mut record = Self::FREE;
        record.write(0, [len]);
        record.write(1, id.to_le_bytes());
        record
    }

    /// One whose id stands at `place`, and no values yet.
    pub(super) fn long(place: Place) -> Self {
        let mut record = Self::FREE;
        record.write(0, [LONG]);
        record.place(place);
        record
    }

    /// Moves its long id to `place`.
    pub(super) fn place(&mut self, place: Place) {
        self.write(1, place.chunk.to_le_bytes());
        self.write(5, place.at.to_le_bytes());
        self.write(7, place.len.to_le_bytes());
    }

    pub(super) fn id(&self) -> Id {
        match self.kind() {
            FREE => Id::Free,
            LONG => Id::Long(Place {
                chunk: u32::from_le_bytes(self.read(1)),
                at: u16::from_le_bytes(self.read(5)),
                len: u16::from_le_bytes(self.read(7)),
            }),
            UUID => Id::Uuid(self.read(1)),
            len => Id::Inline(len, self.read(1)),
        }
    }

    /// Whether its id is that of [`packed()`](Self::packed).
    pub(super) fn is_packed(&self, len: u8, id: u128) -> bool {
        // One comparison of all sixteen, those that are no longer the id's shifted out.
        let unused = (UUID_BYTES as u32 * 8).saturating_sub(u32::from(len) * 8);
        let other = u128::from_le_bytes(self.read(1)) ^ id;
        self.kind() == len && other << unused == 0
    }

    // Inlined, like what calls it: values that go through memory are waited for.
    #[inline(always)]
    pub(super) fn values(&self) -> Held {
        let begin = self.values_begin();
        if self.head() & WIDE != 0 {
            return Held::Wide(u32::from_le_bytes(self.read(begin)));
        }
        let mut values = Values::default();
        let mut at = begin + LENGTHS;
        for (field, value) in values.iter_mut().enumerate() {
            let [pair] = self.read(begin + field / 2);
            let len = u32::from(pair >> (field % 2 * 4)) & 0xf;
            let unused = i64::BITS - len * 8;
            // Cut to its bytes, and the sign carried on; no bytes at all are a 0.
            *value = self.word(at).unbounded_shl(unused).unbounded_shr(unused);
            at += len as usize;
        }
        Held::Here(values)
    }

    /// Sets its values; `false`, and nothing is set, if they need more room than there is.
    #[expect(
        clippy::indexing_slicing,
        reason = "`LENGTHS` has half a byte for each field"
    )]
    pub(super) fn set(&mut self, values: &Values) -> bool {
        let begin = self.values_begin();
        let lens = values.map(bytes_of);
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

    /// Says that its values stand elsewhere, under `number`.
    pub(super) fn set_wide(&mut self, number: u32) {
        self.write(0, [self.kind() | WIDE]);
        self.write(self.values_begin(), number.to_le_bytes());
    }

    /// Eight bytes from `at` on as a number, with zeros for what is behind the record's end.
    fn word(&self, at: usize) -> i64 {
        let begin = at.min(LAST_WORD);
        let word = u64::from_le_bytes(self.read(begin));
        word.unbounded_shr((at - begin) as u32 * 8).cast_signed()
    }

    /// Writes the `len` low bytes of `word` at `at`, and anything behind them.
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

    fn head(&self) -> u8 {
        let [head] = self.read(0);
        head
    }

    fn kind(&self) -> u8 {
        self.head() & !WIDE
    }

    fn values_begin(&self) -> usize {
        1 + match self.kind() {
            LONG => size_of::<Place>(),
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

/// How many bytes hold `value` and its sign; 0 is held by none.
fn bytes_of(value: i64) -> usize {
    let significant = i64::BITS - (value ^ (value >> 63)).leading_zeros() + 1;
    significant.div_ceil(8) as usize * usize::from(value != 0)
}

/// The bytes from `at` on.
#[expect(clippy::expect_used, reason = "an invariant of this module")]
fn read<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    let bytes = from.get(at..).and_then(<[u8]>::first_chunk);
    *bytes.expect("read within a record")
}

/// Puts `bytes` at `at`.
#[expect(clippy::expect_used, reason = "an invariant of this module")]
fn write<const N: usize>(to: &mut [u8], at: usize, bytes: [u8; N]) {
    let room = to.get_mut(at..).and_then(<[u8]>::first_chunk_mut);
    *room.expect("written within a record") = bytes;
}
