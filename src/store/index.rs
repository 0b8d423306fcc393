//! Which record a hash belongs to: a table of record numbers, four bytes a slot.
//!
//! Open addressing with linear probing. A slot holds a record's number and, in the bits that the
//! number leaves free, bits of its hash, so that a lookup reads one cache line of the table and
//! then, nearly always, the right record: one cache miss less than a table with its control bytes
//! apart. It grows by half, and fills to four fifths: 5 to 7.5 bytes a record.

use prefetch_index::prefetch_index;

/// No record.
const EMPTY: u32 = 0;
const SLOTS_MIN: usize = 16;

#[derive(Default)]
pub(super) struct Index {
    /// Each [`EMPTY`], or a record's number plus 1 in the low [`number_bits`](Self::number_bits) and
    /// low bits of its hash above.
    slots: Box<[u32]>,
    len: usize,
}

impl Index {
    /// An index with room for `records`.
    pub(super) fn with_room(records: usize) -> Self {
        let slots = (records + 1).saturating_mul(5).div_ceil(4).max(SLOTS_MIN);
        Self {
            slots: vec![EMPTY; slots].into(),
            len: 0,
        }
    }

    /// Whether it is to be made anew, with more room, before another record is added.
    pub(super) fn is_full(&self) -> bool {
        self.len + 1 > self.room()
    }

    /// How many records it has room for.
    pub(super) fn room(&self) -> usize {
        self.slots.len() * 4 / 5
    }

    /// How many records the next larger one has room for.
    pub(super) fn next_room(&self) -> usize {
        self.room() + self.room() / 2 + 1
    }

    /// The number of the record with `hash` for which `is` holds.
    pub(super) fn find(&self, hash: u64, is: impl FnMut(u32) -> bool) -> Option<u32> {
        self.probe(hash, is).map(|(_, number)| number)
    }

    /// Asks memory for the slot at which a search for `hash` begins.
    pub(super) fn prefetch(&self, hash: u64) {
        prefetch_index(&self.slots, self.home(hash));
    }

    /// Adds a record that is not there. There must be room, and `number` be less than it.
    #[expect(clippy::indexing_slicing, reason = "the caller has made room")]
    pub(super) fn insert(&mut self, hash: u64, number: u32) {
        let slot = self.slot(hash, number);
        let mut at = self.home(hash);
        while self.slots[at] != EMPTY {
            at = self.after(at);
        }
        self.slots[at] = slot;
        self.len += 1;
    }

    /// Removes the record with `hash` for which `is` holds; `hash_of` gives the hashes of others.
    #[expect(clippy::indexing_slicing, reason = "`hole` is a slot that was found")]
    pub(super) fn remove(
        &mut self,
        hash: u64,
        is: impl FnMut(u32) -> bool,
        hash_of: impl Fn(u32) -> u64,
    ) -> Option<u32> {
        let (mut hole, removed) = self.probe(hash, is)?;
        self.len -= 1;
        // Whoever stands behind the hole and would be found through it moves into it.
        let mut at = hole;
        loop {
            at = self.after(at);
            let Some(number) = self.number(at) else {
                break;
            };
            let home = self.home(hash_of(number));
            if self.steps(home, at) >= self.steps(hole, at) {
                self.slots.swap(hole, at);
                hole = at;
            }
        }
        self.slots[hole] = EMPTY;
        Some(removed)
    }

    /// Where the record stands, and its number.
    fn probe(&self, hash: u64, mut is: impl FnMut(u32) -> bool) -> Option<(usize, u32)> {
        let bits = self.number_bits();
        let tag = self.slot(hash, 0);
        let mut at = self.home(hash);
        loop {
            let slot = *self.slots.get(at)?;
            if slot == EMPTY {
                return None;
            }
            let differs = u64::from(slot ^ tag) >> bits != 0;
            let number = number_of(slot, bits);
            if !differs && is(number) {
                return Some((at, number));
            }
            at = self.after(at);
        }
    }

    /// The number in the slot `at`, if there is one.
    fn number(&self, at: usize) -> Option<u32> {
        let slot = *self.slots.get(at)?;
        (slot != EMPTY).then(|| number_of(slot, self.number_bits()))
    }

    fn slot(&self, hash: u64, number: u32) -> u32 {
        (hash << self.number_bits()) as u32 | (number + 1)
    }

    /// Enough for as many numbers as there are slots.
    fn number_bits(&self) -> u32 {
        usize::BITS - self.slots.len().leading_zeros()
    }

    /// Where a search for `hash` begins: the high bits, scaled to the slots.
    fn home(&self, hash: u64) -> usize {
        ((u128::from(hash) * self.slots.len() as u128) >> 64) as usize
    }

    fn after(&self, at: usize) -> usize {
        match at + 1 < self.slots.len() {
            true => at + 1,
            false => 0,
        }
    }

    fn steps(&self, from: usize, to: usize) -> usize {
        match to >= from {
            true => to - from,
            false => to + self.slots.len() - from,
        }
    }
}

fn number_of(slot: u32, bits: u32) -> u32 {
    let mask = (1_u64 << bits) - 1;
    ((u64::from(slot) & mask) as u32).wrapping_sub(1)
}
