//! Staggers the growth of the shards' tables.
//!
//! All shards fill at the same rate. Tables of equal size would all grow within a few records of
//! each other and free the memory of all old tables at once. Until the allocator returns it, some
//! seconds later, the store would take up to twice its memory. So each shard's tables have sizes of
//! their own, offset by the shard's index.

use super::SHARD_COUNT;

/// Smaller tables have equal sizes: together they are small, and too coarse to stagger.
const STAGGERED_FROM: usize = 512;

/// A full slab grows by this fraction: a quarter, so that little memory is unused and little is
/// copied at a time.
pub(super) const GROWTH: usize = 4;

/// The table sizes of one shard. The default is that of shard 0.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Growth {
    shard: u16,
}

impl Growth {
    pub(super) const fn of_shard(shard: u16) -> Self {
        Self { shard }
    }

    /// The capacity of a table that grows from `from` to about `to` records.
    pub(super) fn next_capacity(self, from: usize, to: usize) -> usize {
        match from < STAGGERED_FROM && to >= STAGGERED_FROM {
            true => to + self.offset(to - from),
            false => to,
        }
    }

    /// The capacity to reserve for an expected number of `records`.
    pub(super) fn reserved_capacity(self, records: usize) -> usize {
        records + self.offset(records / GROWTH)
    }

    /// This shard's share of `range`.
    fn offset(self, range: usize) -> usize {
        range * usize::from(self.shard) / SHARD_COUNT
    }
}

#[cfg(test)]
mod tests {
    use super::super::free_list;
    use super::*;

    /// While all tables get 2% more records, at most a sixth of them grow.
    #[test]
    fn tables_of_different_shards_do_not_grow_at_once() {
        const RECORDS: usize = 4000;
        for reserved in [0, 1000] {
            let mut grown = [0; RECORDS];
            for shard in 0..SHARD_COUNT as u16 {
                let growth = Growth::of_shard(shard);
                let mut table = Vec::with_capacity(match reserved {
                    0 => 0,
                    _ => growth.reserved_capacity(reserved),
                });
                for grown in &mut grown {
                    let before = table.capacity();
                    free_list::append(&mut table, 0_u8, growth);
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
