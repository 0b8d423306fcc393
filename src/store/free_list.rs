//! The free slots of a slab: a `Vec` whose items keep their index.

use super::growth::{GROWTH, Growth};

/// Lists of at most this capacity are not shrunk.
const SHRUNK_FROM: usize = 64;

/// The free slots of a slab.
#[derive(Default)]
pub(super) struct FreeList(Vec<u32>);

impl FreeList {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.0.capacity()
    }

    /// Marks `slot` as free. Its item stays until another takes the slot.
    pub(super) fn push(&mut self, slot: u32) {
        push(&mut self.0, slot, Growth::default());
    }

    /// Stores `item` in a free slot, or appends it. Returns its slot.
    #[expect(clippy::indexing_slicing, reason = "every free slot is in `items`")]
    pub(super) fn insert<T>(&mut self, items: &mut Vec<T>, item: T, growth: Growth) -> u32 {
        match self.0.pop() {
            Some(slot) => {
                self.shrink();
                items[slot as usize] = item;
                slot
            }
            None => append(items, item, growth),
        }
    }

    /// Returns memory once most of the slots are taken again. Otherwise a store that was emptied
    /// and filled again would hold fewer records in the same memory.
    fn shrink(&mut self) {
        let (len, capacity) = (self.0.len(), self.0.capacity());
        if capacity > SHRUNK_FROM && len < capacity / 4 {
            self.0.shrink_to(capacity / 2);
        }
    }
}

/// Appends `item` and returns its slot.
pub(super) fn append<T>(items: &mut Vec<T>, item: T, growth: Growth) -> u32 {
    // 2^32 items in one shard means 4 * 10^12 records in the store: memory ends long before.
    let slot = items.len() as u32;
    push(items, item, growth);
    slot
}

fn push<T>(items: &mut Vec<T>, item: T, growth: Growth) {
    let len = items.len();
    if len == items.capacity() {
        let larger = len + len / GROWTH + GROWTH;
        items.reserve_exact(growth.next_capacity(len, larger) - len);
    }
    items.push(item);
}
