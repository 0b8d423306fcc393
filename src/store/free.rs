//! Items under numbers that they keep, and that are given again.

use super::growth::Growth;

/// How much a full slab grows: a quarter, so that little of it stands empty and little is copied at
/// a time.
pub(super) const GROWTH: usize = 4;

/// A list with fewer numbers is never shrunk.
const SHRUNK_FROM: usize = 64;

/// The numbers that nobody has in a slab of items.
#[derive(Default)]
pub(super) struct Free(Vec<u32>);

impl Free {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.0.capacity()
    }

    /// Gives `number` free; what is there stays until it is given again.
    pub(super) fn push(&mut self, number: u32) {
        push(&mut self.0, number, Growth::default());
    }

    /// Puts `item` where it is free, or at the end; its number.
    #[expect(clippy::indexing_slicing, reason = "a free number is one of an item")]
    pub(super) fn insert<T>(&mut self, items: &mut Vec<T>, item: T, growth: Growth) -> u32 {
        match self.0.pop() {
            Some(number) => {
                self.shrink();
                items[number as usize] = item;
                number
            }
            None => append(items, item, growth),
        }
    }

    /// Returns memory once most of the numbers are taken again. Otherwise a store that was emptied
    /// and filled again would hold fewer records in the same memory.
    fn shrink(&mut self) {
        let (len, capacity) = (self.0.len(), self.0.capacity());
        if capacity > SHRUNK_FROM && len < capacity / 4 {
            self.0.shrink_to(capacity / 2);
        }
    }
}

/// Puts `item` at the end; its number.
pub(super) fn append<T>(items: &mut Vec<T>, item: T, growth: Growth) -> u32 {
    // 2^32 items in a shard would be a store of 4 * 10^12: memory ends long before.
    let number = items.len() as u32;
    push(items, item, growth);
    number
}

fn push<T>(items: &mut Vec<T>, item: T, growth: Growth) {
    let len = items.len();
    if len == items.capacity() {
        let larger = len + len / GROWTH + GROWTH;
        items.reserve_exact(growth.step(len, larger) - len);
    }
    items.push(item);
}
