//! One shard: records under numbers that they keep, and an index of the numbers.
//!
//! A lookup reads three cache lines, those of the shard, the index and the record: at ten million
//! records the latter two come from memory, and that is most of its time.

use std::hash::BuildHasher;
use std::mem;
use std::ops::Range;
use std::slice;
use std::sync::atomic::{AtomicUsize, Ordering};

use prefetch_index::prefetch_index;

use super::free::{self, Free};
use super::growth::Growth;
use super::index::Index;
use super::key::{self, Key};
use super::long_ids::LongIds;
use super::record::{Held, Id, Record};
use super::{Piece, Sought};
use crate::grade::{Changes, Digest, Values, digests};

/// The records whose ids hash to this shard. With its lock it fills a cache line.
#[derive(Default)]
pub(super) struct Shard {
    index: Index,
    records: Vec<Record>,
    rare: Box<Rare>,
}

/// What a plain read does not look at. A write looks at its first cache line.
#[derive(Default)]
#[repr(C, align(64))]
struct Rare {
    digest: Digest,
    free_records: Free,
    /// Values that a record has no room for.
    wide: Vec<Values>,
    free_wide: Free,
    long_ids: LongIds,
    /// Scans that are in this shard. While there is one no free place is taken again, and it ends
    /// where the places ended when it came: so it meets nobody who was removed and made again twice.
    scans: AtomicUsize,
    growth: Growth,
}

impl Shard {
    /// An empty one, whose tables grow so.
    pub(super) fn new(growth: Growth) -> Self {
        let mut shard = Self::default();
        shard.rare.growth = growth;
        shard
    }

    pub(super) fn len(&self) -> usize {
        self.records.len() - self.rare.free_records.len()
    }

    pub(super) fn digest(&self) -> Digest {
        self.rare.digest
    }

    pub(super) fn get(&self, sought: &Sought<'_>) -> Option<Values> {
        Some(self.held(self.find(sought)?))
    }

    pub(super) fn contains(&self, sought: &Sought<'_>) -> bool {
        self.find(sought).is_some()
    }

    /// Sets what `changes` carry. The record is looked for under the number `likely` first.
    pub(super) fn apply(
        &mut self,
        sought: &Sought<'_>,
        likely: Option<u32>,
        changes: &Changes,
        hasher: &impl BuildHasher,
    ) {
        let right = |number: &u32| has(&self.records, &self.rare.long_ids, *number, &sought.key);
        let number = likely.filter(right).or_else(|| self.find(sought));
        let held = number.map(|number| self.held(number));
        // A new record begins with zeros.
        let mut values = held.unwrap_or_default();
        changes.apply_to(&mut values);
        self.set(number.zip(held), sought, &values, hasher);
    }

    /// Puts a record with all its values; its digest.
    pub(super) fn put(
        &mut self,
        sought: &Sought<'_>,
        values: Values,
        hasher: &impl BuildHasher,
    ) -> Digest {
        let number = self.find(sought);
        let held = number.map(|number| self.held(number));
        self.set(number.zip(held), sought, &values, hasher)
    }

    /// Gives `values` to the record that was found, with what it held, or to a new one; its digest.
    fn set(
        &mut self,
        found: Option<(u32, Values)>,
        sought: &Sought<'_>,
        values: &Values,
        hasher: &impl BuildHasher,
    ) -> Digest {
        let (number, digest) = match found {
            Some((number, held)) => {
                let [old, new] = digests(sought.user_id, [&held, values]);
                self.rare.digest.replace(old, new);
                (number, new)
            }
            None => {
                let [digest] = digests(sought.user_id, [values]);
                self.rare.digest += digest;
                (self.insert(sought, hasher), digest)
            }
        };
        self.set_values(number, values);
        digest
    }

    /// Adds a record whose id is not there; its number.
    fn insert(&mut self, sought: &Sought<'_>, hasher: &impl BuildHasher) -> u32 {
        let scanned = self.rare.scans.load(Ordering::Relaxed) > 0;
        let grows = scanned || self.rare.free_records.len() == 0;
        // The index has bits for as many numbers as it has room for. While there is a scan, numbers grow
        // past the records that there are.
        if self.index.is_full() || grows && self.records.len() >= self.index.room() {
            let (room, next) = (self.index.room(), self.index.next_room());
            self.reserve_index(self.rare.growth.step(room, next), hasher);
        }
        let record = match sought.key {
            Key::Packed { len, id } => Record::packed(len, id),
            Key::Long(id) => Record::long(self.rare.long_ids.push(id)),
        };
        let (free, growth) = (&mut self.rare.free_records, self.rare.growth);
        let number = match scanned {
            false => free.insert(&mut self.records, record, growth),
            true => free::append(&mut self.records, record, growth),
        };
        self.index.insert(sought.hashes.hash, number);
        number
    }

    /// Makes room for `records` in all.
    pub(super) fn reserve(&mut self, records: usize, hasher: &impl BuildHasher) {
        let records = self.rare.growth.reserved(records);
        self.records
            .reserve_exact(records.saturating_sub(self.records.len()));
        self.reserve_index(records, hasher);
    }

    fn reserve_index(&mut self, records: usize, hasher: &impl BuildHasher) {
        let records = records.max(self.records.len());
        if records <= self.index.room() {
            return;
        }
        let mut index = Index::with_room(records);
        for number in 0..self.records.len() as u32 {
            if let Some(hash) = hash_of(&self.records, &self.rare.long_ids, number, hasher) {
                index.insert(hash, number);
            }
        }
        self.index = index;
    }

    /// A scan comes; where it is to end.
    pub(super) fn enter(&self) -> usize {
        self.rare.scans.fetch_add(1, Ordering::Relaxed);
        self.records.len()
    }

    /// A scan goes.
    pub(super) fn leave(&self) {
        self.rare.scans.fetch_sub(1, Ordering::Relaxed);
    }

    /// Appends the records of `places` until `piece` is full or has looked at as many places as it
    /// may hold records; the next place.
    pub(super) fn copy(&self, places: Range<usize>, piece: &mut Piece) -> usize {
        let end = places.end.min(places.start + piece.room());
        // A shard that was cleared since the scan entered it has fewer places.
        for record in self.records.get(places.start..end).unwrap_or_default() {
            self.with_id(record, |id| piece.push(id, self.values(record)));
        }
        end
    }

    /// Removes all records and gives their memory back.
    pub(super) fn clear(&mut self) {
        // The scans leave as they came.
        let scans = mem::take(&mut self.rare.scans);
        *self = Self::new(self.rare.growth);
        self.rare.scans = scans;
    }

    /// Asks memory for what a search reads first.
    pub(super) fn prefetch_index(&self, hash: u64) {
        self.index.prefetch(hash);
    }

    /// Asks memory for what a search reads second: the number of the record that it finds, unless
    /// another has all the bits of the hash that the index has.
    pub(super) fn prefetch_record(&self, hash: u64) -> Option<u32> {
        // Its digest is wanted as well.
        prefetch_index(slice::from_ref(&*self.rare), 0);
        let number = self.index.find(hash, |_| true)?;
        prefetch_index(&self.records, number as usize);
        Some(number)
    }

    /// Removes the record; whether there was one.
    #[expect(clippy::expect_used, reason = "an invariant of this module")]
    pub(super) fn remove(&mut self, sought: &Sought<'_>, hasher: &impl BuildHasher) -> bool {
        let Self {
            index,
            records,
            rare,
        } = self;
        let long_ids = &rare.long_ids;
        let removed = index.remove(
            sought.hashes.hash,
            |number| has(records, long_ids, number, &sought.key),
            |number| {
                let hash = hash_of(records, long_ids, number, hasher);
                hash.expect("a number in the index is a record's")
            },
        );
        let Some(number) = removed else {
            return false;
        };
        let record = *record(records, number);
        let [held] = digests(sought.user_id, [&self.values(&record)]);
        self.rare.digest.replace(held, Digest::default());
        if let Held::Wide(wide) = record.values() {
            self.rare.free_wide.push(wide);
        }
        *record_mut(&mut self.records, number) = Record::FREE;
        self.rare.free_records.push(number);
        if let Id::Long(place) = record.id() {
            self.rare.long_ids.forget(place);
            self.move_long_ids();
        }
        true
    }

    /// Gives back the bytes of ids that nobody has any more, when they are many.
    fn move_long_ids(&mut self) {
        if !self.rare.long_ids.is_mostly_dead() {
            return;
        }
        let old = mem::take(&mut self.rare.long_ids);
        for record in &mut self.records {
            if let Id::Long(place) = record.id() {
                record.place(self.rare.long_ids.push(old.get(place)));
            }
        }
    }

    fn find(&self, sought: &Sought<'_>) -> Option<u32> {
        self.index.find(sought.hashes.hash, |number| {
            has(&self.records, &self.rare.long_ids, number, &sought.key)
        })
    }

    #[inline(always)]
    fn held(&self, number: u32) -> Values {
        self.values(record(&self.records, number))
    }

    #[inline(always)]
    #[expect(clippy::indexing_slicing, reason = "the number is from `insert`")]
    fn values(&self, record: &Record) -> Values {
        match record.values() {
            Held::Here(values) => values,
            Held::Wide(number) => self.rare.wide[number as usize],
        }
    }

    #[expect(clippy::indexing_slicing, reason = "the number is from `insert`")]
    fn set_values(&mut self, number: u32, values: &Values) {
        let record = record_mut(&mut self.records, number);
        let wide = match record.values() {
            Held::Wide(number) => Some(number),
            Held::Here(_) => None,
        };
        let rare = &mut self.rare;
        match (record.set(values), wide) {
            (true, None) => {}
            (true, Some(wide)) => rare.free_wide.push(wide),
            (false, None) => {
                let (wide, growth) = (&mut rare.wide, rare.growth);
                record.set_wide(rare.free_wide.insert(wide, *values, growth));
            }
            (false, Some(wide)) => rare.wide[wide as usize] = *values,
        }
    }

    /// Bytes that removed records left to new ones, which then need no new memory.
    pub(super) fn reusable_bytes(&self) -> usize {
        let places = self.rare.free_records.len();
        // Free wide values count for as many records as can still take them, so that nothing counts
        // as reusable once no place is free.
        let wide = self.rare.free_wide.len().min(places);
        places * size_of::<Record>() + wide * size_of::<Values>()
    }

    /// Records and free places.
    #[cfg(test)]
    pub(super) fn places(&self) -> usize {
        self.records.len()
    }

    /// Bytes of long ids, in use or not.
    #[cfg(test)]
    pub(super) fn id_bytes(&self) -> usize {
        self.rare.long_ids.bytes()
    }

    /// Hands `take` the id of `record`, if it is somebody's.
    #[expect(
        clippy::expect_used,
        clippy::indexing_slicing,
        reason = "as `insert` had the id"
    )]
    fn with_id<T>(&self, record: &Record, take: impl FnOnce(&str) -> T) -> Option<T> {
        let text = |bytes| std::str::from_utf8(bytes).expect("ids came in as text");
        Some(match record.id() {
            Id::Free => return None,
            Id::Inline(len, bytes) => take(text(&bytes[..usize::from(len)])),
            Id::Uuid(bytes) => key::with_uuid(bytes, take),
            Id::Long(place) => take(text(self.rare.long_ids.get(place))),
        })
    }
}

// Free functions over the parts, so that the index can be borrowed mutably beside them.

#[expect(clippy::indexing_slicing, reason = "numbers are those of records")]
fn record(records: &[Record], number: u32) -> &Record {
    &records[number as usize]
}

#[expect(clippy::indexing_slicing, reason = "numbers are those of records")]
fn record_mut(records: &mut [Record], number: u32) -> &mut Record {
    &mut records[number as usize]
}

/// Whether the record under `number` has the id `key`.
fn has(records: &[Record], long_ids: &LongIds, number: u32, key: &Key<'_>) -> bool {
    let record = record(records, number);
    match key {
        Key::Packed { len, id } => record.is_packed(*len, *id),
        Key::Long(id) => match record.id() {
            Id::Long(place) => long_ids.get(place) == *id,
            _ => false,
        },
    }
}

/// The hash of the record under `number`, if it is somebody's: that of its [`Key`].
#[expect(
    clippy::indexing_slicing,
    reason = "a kind below that of UUIDs is a length"
)]
fn hash_of(
    records: &[Record],
    long_ids: &LongIds,
    number: u32,
    hasher: &impl BuildHasher,
) -> Option<u64> {
    Some(match record(records, number).id() {
        Id::Free => return None,
        Id::Inline(len, bytes) => hasher.hash_one(&bytes[..usize::from(len)]),
        Id::Uuid(bytes) => hasher.hash_one(&bytes[..]),
        Id::Long(place) => hasher.hash_one(long_ids.get(place)),
    })
}
