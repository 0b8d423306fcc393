//! Items under numbers that they keep, and that are given again.

/// How much a full slab grows: a quarter, so that little of it stands empty and little is copied at
/// a time.
const GROWTH: usize = 4;

/// The numbers that nobody has in a slab of items.
#[derive(Default)]
pub(super) struct Free(Vec<u32>);

impl Free {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Gives `number` free; what is there stays until it is given again.
    pub(super) fn push(&mut self, number: u32) {
        self.0.push(number);
    }

    /// Puts `item` where it is free, or at the end; its number.
    pub(super) fn insert<T>(&mut self, items: &mut Vec<T>, item: T) -> u32 {
        while let Some(number) = self.0.pop() {
            if let Some(room) = items.get_mut(number as usize) {
                *room = item;
                return number;
            }
        }
        append(items, item)
    }
}

/// Puts `item` at the end; its number.
pub(super) fn append<T>(items: &mut Vec<T>, item: T) -> u32 {
    if items.len() == items.capacity() {
        items.reserve_exact(items.len() / GROWTH + GROWTH);
    }
    // 2^32 items in a shard would be a store of 4 * 10^12: memory ends long before.
    let number = items.len() as u32;
    items.push(item);
    number
}
