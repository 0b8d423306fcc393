//! One shard: a slab of records, and an index of their slots.
//!
//! A lookup reads three cache lines: of the shard, the index and the record. At ten million records
//! the latter two come from main memory, which takes most of a lookup's time.

use std::hash::BuildHasher;
use std::mem;
use std::ops::Range;
use std::slice;
use std::sync::atomic::{AtomicUsize, Ordering};

use prefetch_index::prefetch_index;

use super::free_list::{self, FreeList};
use super::growth::Growth;
use super::index::Index;
use super::key::{self, Key};
use super::long_ids::LongIds;
use super::record::{PackedRecord, StoredId, StoredValues};
use super::{Lookup, RecordBatch};
use crate::grade::{Changes, Digest, Values, digests};

/// The records whose ids hash to this shard. With its lock it fills one cache line.
#[derive(Default)]
pub(super) struct Shard {
    index: Index,
    records: Vec<PackedRecord>,
    cold: Box<ColdPart>,
}

/// The fields that most reads do not need. A write reads the first cache line of them.
#[derive(Default)]
#[repr(C, align(64))]
struct ColdPart {
    digest: Digest,
    free_slots: FreeList,
    /// The values of records in which they do not fit.
    wide: Vec<Values>,
    free_wide_slots: FreeList,
    long_ids: LongIds,
    /// Scans in this shard. Each ends at the number of slots when it began. While there is one, new
    /// records f new slots, so no scan sees a record twice that was removed and inserted again.
    scans: AtomicUsize,
    growth: Growth,
}

impl Shard {
    pub(super) fn new(growth: Growth) -> Self {
        let mut shard = Self::default();
        shard.cold.growth = growth;
        shard
    }

    pub(super) fn len(&self) -> usize {
        self.records.len() - self.cold.free_slots.len()
    }

    pub(super) fn digest(&self) -> Digest {
        self.cold.digest
    }

    pub(super) fn get(&self, lookup: &Lookup<'_>) -> Option<Values> {
        Some(self.values_at(self.find(lookup)?))
    }

    pub(super) fn contains(&self, lookup: &Lookup<'_>) -> bool {
        self.find(lookup).is_some()
    }

    /// Sets the fields in `changes`; inserts the record if it does not exist. Tries `slot_hint`
    /// before the index.
    pub(super) fn apply(
        &mut self,
        lookup: &Lookup<'_>,
        slot_hint: Option<u32>,
        changes: &Changes,
        hasher: &impl BuildHasher,
    ) {
        let is_right =
            |slot: &u32| id_matches(&self.records, &self.cold.long_ids, *slot, &lookup.key);
        let slot = slot_hint.filter(is_right).or_else(|| self.find(lookup));
        let stored = slot.map(|slot| self.values_at(slot));
        // The fields of a new record are 0.
        let mut values = stored.unwrap_or_default();
        changes.apply_to(&mut values);
        self.set(slot.zip(stored), lookup, &values, hasher);
    }

    /// Inserts or replaces a record. Returns its digest.
    pub(super) fn put(
        &mut self,
        lookup: &Lookup<'_>,
        values: Values,
        hasher: &impl BuildHasher,
    ) -> Digest {
        let slot = self.find(lookup);
        let stored = slot.map(|slot| self.values_at(slot));
        self.set(slot.zip(stored), lookup, &values, hasher)
    }

    /// Sets the values of the record that was found, given with its old values, or inserts it.
    /// Returns its new digest.
    fn set(
        &mut self,
        found: Option<(u32, Values)>,
        lookup: &Lookup<'_>,
        values: &Values,
        hasher: &impl BuildHasher,
    ) -> Digest {
        let (slot, digest) = match found {
            Some((slot, stored)) => {
                let [old, new] = digests(lookup.user_id, [&stored, values]);
                self.cold.digest.replace(old, new);
                (slot, new)
            }
            None => {
                let [digest] = digests(lookup.user_id, [values]);
                self.cold.digest += digest;
                (self.insert(lookup, hasher), digest)
            }
        };
        self.set_values(slot, values);
        digest
    }

    /// Inserts a record that does not exist, without values. Returns its slot.
    fn insert(&mut self, lookup: &Lookup<'_>, hasher: &impl BuildHasher) -> u32 {
        let scanned = self.cold.scans.load(Ordering::Relaxed) > 0;
        let grows = scanned || self.cold.free_slots.len() == 0;
        // The index has bits for as many slots as its capacity. During a scan there may be more
        // slots than records.
        if self.index.is_full() || grows && self.records.len() >= self.index.capacity() {
            let (capacity, next) = (self.index.capacity(), self.index.next_capacity());
            self.reserve_index(self.cold.growth.next_capacity(capacity, next), hasher);
        }
        let record = match lookup.key {
            Key::Packed { len, id } => PackedRecord::packed(len, id),
            Key::Long(id) => PackedRecord::long(self.cold.long_ids.push(id)),
        };
        let (free, growth) = (&mut self.cold.free_slots, self.cold.growth);
        let slot = match scanned {
            false => free.insert(&mut self.records, record, growth),
            true => free_list::append(&mut self.records, record, growth),
        };
        self.index.insert(lookup.hashes.hash, slot);
        slot
    }

    /// Reserves capacity for `records` in total.
    pub(super) fn reserve(&mut self, records: usize, hasher: &impl BuildHasher) {
        let records = self.cold.growth.reserved_capacity(records);
        self.records
            .reserve_exact(records.saturating_sub(self.records.len()));
        self.reserve_index(records, hasher);
    }

    fn reserve_index(&mut self, records: usize, hasher: &impl BuildHasher) {
        let records = records.max(self.records.len());
        if records <= self.index.capacity() {
            return;
        }
        let mut index = Index::with_capacity(records);
        for slot in 0..self.records.len() as u32 {
            if let Some(hash) = hash_of(&self.records, &self.cold.long_ids, slot, hasher) {
                index.insert(hash, slot);
            }
        }
        self.index = index;
    }

    /// Registers a scan. Returns the slot at which it ends.
    pub(super) fn begin_scan(&self) -> usize {
        self.cold.scans.fetch_add(1, Ordering::Relaxed);
        self.records.len()
    }

    /// Unregisters a scan.
    pub(super) fn end_scan(&self) {
        self.cold.scans.fetch_sub(1, Ordering::Relaxed);
    }

    /// Appends the records in `slots` to `batch`; visits at most as many slots as it has space for.
    /// Returns the next slot.
    pub(super) fn copy(&self, slots: Range<usize>, batch: &mut RecordBatch) -> usize {
        let end = slots.end.min(slots.start + batch.space());
        // A shard that was cleared during the scan has fewer slots.
        for record in self.records.get(slots.start..end).unwrap_or_default() {
            self.with_id(record, |id| batch.push(id, self.values(record)));
        }
        end
    }

    /// Removes all records and frees their memory.
    pub(super) fn clear(&mut self) {
        // Scans in this shard still call `end_scan`.
        let scans = mem::take(&mut self.cold.scans);
        *self = Self::new(self.cold.growth);
        self.cold.scans = scans;
    }

    /// Prefetches the first read of a search.
    pub(super) fn prefetch_index(&self, hash: u64) {
        self.index.prefetch(hash);
    }

    /// Prefetches the second read of a search, the record. Returns the record's probable slot: that
    /// of the first record with the same tag in the index.
    pub(super) fn prefetch_record(&self, hash: u64) -> Option<u32> {
        // A write also updates the digest.
        prefetch_index(slice::from_ref(&*self.cold), 0);
        let slot = self.index.find(hash, |_| true)?;
        prefetch_index(&self.records, slot as usize);
        Some(slot)
    }

    /// Removes the record, if it exists.
    #[expect(clippy::expect_used, reason = "an invariant of this module")]
    pub(super) fn remove(&mut self, lookup: &Lookup<'_>, hasher: &impl BuildHasher) {
        let Self {
            index,
            records,
            cold,
        } = self;
        let long_ids = &cold.long_ids;
        let removed = index.remove(
            lookup.hashes.hash,
            |slot| id_matches(records, long_ids, slot, &lookup.key),
            |slot| {
                let hash = hash_of(records, long_ids, slot, hasher);
                hash.expect("a slot in the index has a record")
            },
        );
        let Some(slot) = removed else {
            return;
        };
        let record = *record(records, slot);
        let [stored] = digests(lookup.user_id, [&self.values(&record)]);
        self.cold.digest.replace(stored, Digest::default());
        if let StoredValues::Wide(wide) = record.values() {
            self.cold.free_wide_slots.push(wide);
        }
        *record_mut(&mut self.records, slot) = PackedRecord::FREE;
        self.cold.free_slots.push(slot);
        if let StoredId::Long(location) = record.id() {
            self.cold.long_ids.release(location);
            self.compact_long_ids();
        }
    }

    /// Frees the bytes of released ids once they are many.
    fn compact_long_ids(&mut self) {
        if !self.cold.long_ids.should_compact() {
            return;
        }
        let old = mem::take(&mut self.cold.long_ids);
        for record in &mut self.records {
            if let StoredId::Long(location) = record.id() {
                record.set_location(self.cold.long_ids.push(old.get(location)));
            }
        }
    }

    fn find(&self, lookup: &Lookup<'_>) -> Option<u32> {
        self.index.find(lookup.hashes.hash, |slot| {
            id_matches(&self.records, &self.cold.long_ids, slot, &lookup.key)
        })
    }

    #[inline(always)]
    fn values_at(&self, slot: u32) -> Values {
        self.values(record(&self.records, slot))
    }

    #[inline(always)]
    #[expect(clippy::indexing_slicing, reason = "the slot is from `insert`")]
    fn values(&self, record: &PackedRecord) -> Values {
        match record.values() {
            StoredValues::Inline(values) => values,
            StoredValues::Wide(slot) => self.cold.wide[slot as usize],
        }
    }

    #[expect(clippy::indexing_slicing, reason = "the slot is from `insert`")]
    fn set_values(&mut self, slot: u32, values: &Values) {
        let record = record_mut(&mut self.records, slot);
        let wide = match record.values() {
            StoredValues::Wide(slot) => Some(slot),
            StoredValues::Inline(_) => None,
        };
        let cold = &mut self.cold;
        match (record.set(values), wide) {
            (true, None) => {}
            (true, Some(wide)) => cold.free_wide_slots.push(wide),
            (false, None) => {
                let (wide, growth) = (&mut cold.wide, cold.growth);
                record.set_wide_slot(cold.free_wide_slots.insert(wide, *values, growth));
            }
            (false, Some(wide)) => cold.wide[wide as usize] = *values,
        }
    }

    /// Bytes of free slots, which new records take before the store allocates.
    pub(super) fn reusable_bytes(&self) -> usize {
        let slots = self.cold.free_slots.len();
        // Free wide values count only for as many records as there are free slots, so that nothing
        // counts as reusable once no slot is free.
        let wide = self.cold.free_wide_slots.len().min(slots);
        slots * size_of::<PackedRecord>() + wide * size_of::<Values>()
    }

    /// The number of slots, free or not.
    #[cfg(test)]
    pub(super) fn slots(&self) -> usize {
        self.records.len()
    }

    /// Bytes of long ids, including released ones.
    #[cfg(test)]
    pub(super) fn id_bytes(&self) -> usize {
        self.cold.long_ids.bytes()
    }

    /// Calls `f` with the id of `record`, unless the slot is free.
    #[expect(
        clippy::expect_used,
        clippy::indexing_slicing,
        reason = "`insert` stored a valid id"
    )]
    fn with_id<T>(&self, record: &PackedRecord, f: impl FnOnce(&str) -> T) -> Option<T> {
        let text = |bytes| std::str::from_utf8(bytes).expect("ids are UTF-8");
        Some(match record.id() {
            StoredId::Free => return None,
            StoredId::Inline(len, bytes) => f(text(&bytes[..usize::from(len)])),
            StoredId::Uuid(bytes) => key::with_uuid_text(bytes, f),
            StoredId::Long(location) => f(text(self.cold.long_ids.get(location))),
        })
    }
}

// Functions over the fields, so that the index can be borrowed mutably at the same time.

#[expect(clippy::indexing_slicing, reason = "callers pass slots of records")]
fn record(records: &[PackedRecord], slot: u32) -> &PackedRecord {
    &records[slot as usize]
}

#[expect(clippy::indexing_slicing, reason = "callers pass slots of records")]
fn record_mut(records: &mut [PackedRecord], slot: u32) -> &mut PackedRecord {
    &mut records[slot as usize]
}

/// Whether the record in `slot` has the id of `key`.
fn id_matches(records: &[PackedRecord], long_ids: &LongIds, slot: u32, key: &Key<'_>) -> bool {
    let record = record(records, slot);
    match key {
        Key::Packed { len, id } => record.is_packed(*len, *id),
        Key::Long(id) => match record.id() {
            StoredId::Long(location) => long_ids.get(location) == *id,
            _ => false,
        },
    }
}

/// The hash of the id in `slot`, the same as that of its [`Key`]; `None` for a free slot.
#[expect(
    clippy::indexing_slicing,
    reason = "kinds below that of UUIDs are lengths"
)]
fn hash_of(
    records: &[PackedRecord],
    long_ids: &LongIds,
    slot: u32,
    hasher: &impl BuildHasher,
) -> Option<u64> {
    Some(match record(records, slot).id() {
        StoredId::Free => return None,
        StoredId::Inline(len, bytes) => hasher.hash_one(&bytes[..usize::from(len)]),
        StoredId::Uuid(bytes) => hasher.hash_one(&bytes[..]),
        StoredId::Long(location) => hasher.hash_one(long_ids.get(location)),
    })
}
