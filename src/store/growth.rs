//! How the tables of a shard grow.
//!
//! All shards fill alike. Tables of equal size would all grow within a few records of each other,
//! and the memory of all the old ones would be freed at once: until the allocator returns it, some
//! seconds later, the store would take up to twice its memory. So tables of different shards have
//! different sizes: the shard's number decides how far between two steps of growth.

use super::SHARD_COUNT;

/// Smaller tables have equal sizes: all of them together are small, and their sizes have too few
/// steps to differ by.
const STAGGERED_FROM: usize = 512;

/// The sizes of the tables of one shard. The default is that of the first shard.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Growth {
    shard: u16,
}

impl Growth {
    pub(super) const fn of(shard: u16) -> Self {
        Self { shard }
    }

    /// The size of a table that grows from `from` to about `to` records.
    pub(super) fn step(self, from: usize, to: usize) -> usize {
        match from < STAGGERED_FROM && to >= STAGGERED_FROM {
            true => to + self.part(to - from),
            false => to,
        }
    }

    /// The size of a table that `records` are known to come into.
    pub(super) fn reserved(self, records: usize) -> usize {
        records + self.part(records / super::free::GROWTH)
    }

    fn part(self, of: usize) -> usize {
        of * usize::from(self.shard) / SHARD_COUNT
    }
}

#[cfg(test)]
mod tests {
    use super::super::free;
    use super::*;

    /// Of tables that fill alike, from nothing or from what was reserved, no more than a sixth grow
    /// while each gets 2 % more records.
    #[test]
    fn tables_of_different_shards_do_not_grow_at_once() {
        const RECORDS: usize = 4000;
        for reserved in [0, 1000] {
            let mut grown = [0; RECORDS];
            for shard in 0..SHARD_COUNT as u16 {
                let growth = Growth::of(shard);
                let mut table = Vec::with_capacity(match reserved {
                    0 => 0,
                    _ => growth.reserved(reserved),
                });
                for grown in &mut grown {
                    let before = table.capacity();
                    free::append(&mut table, 0_u8, growth);
                    *grown += usize::from(table.capacity() != before);
                }
            }
            for from in [1000, 1500, 2000, 3000] {
                let grown: usize = grown[from..from + from / 50].iter().sum();
                assert!(grown <= SHARD_COUNT / 6, "{grown} after {from}");
            }
        }
    }
}
