//! The records, in memory: a map from user id to values, split into shards with a lock each.
//!
//! The store knows nothing of logs or HTTP. Its handle is cheap to clone, its methods are short and
//! synchronous, and no lock outlives a call, so none can be held across an `.await`.
//!
//! A shard is an index of record numbers over records of 32 bytes that keep their number (see
//! `shard.rs`, `index.rs`, `record.rs`). Beside a concurrent map of the same records (scc) it takes
//! half of the memory or less, and a scan is a cursor: it needs no lock between two pieces and sees every
//! record once, however much the shard grows meanwhile. A removed record's place is taken by a later
//! one, but not while a scan is in its shard: what is removed and made again would come up twice. `benches/store.rs` and `benches/memory.rs`
//! measure both; ADR 0003 has the figures.

mod free;
mod growth;
mod index;
mod key;
mod long_ids;
mod record;
mod shard;

use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use foldhash::quality::{FixedState, RandomState};
use parking_lot::RwLock;
use prefetch_index::prefetch_index;
use smallvec::SmallVec;

use crate::grade::{Digest, Patch, UserGrade, Values, Write};
use growth::Growth;
use key::Key;
use shard::Shard;

/// A power of two. Enough that growing one shard's table (a pause for whoever wants that shard)
/// stays near 0.2 ms at ten million records, few enough that an empty store is small.
const SHARD_COUNT: usize = 1024;

/// Says which shard an id belongs to, the same in every process: rows that were scanned together, as
/// in a backup, are then put together as well, into tables that fit in a core's cache: ADR 0003
/// has the times of a restore. It also makes the order of a scan depend on that
/// of the writes alone. Who prepares ids that meet in one shard makes that one large, and slow for
/// its own ids.
const SHARD_HASHER: FixedState = FixedState::with_seed(0);

/// How many patches are applied side by side. Memory serves about as many reads at a time.
const SIDE_BY_SIDE: usize = 16;

/// The handle of a store; clones are the same store.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    shards: Box<[Locked]>,
    /// Seeded anew by each process, so that nobody can prepare ids that collide in a shard's table.
    hasher: RandomState,
    epoch: AtomicU64,
}

/// In a cache line of its own.
#[repr(align(64))]
struct Locked(RwLock<Shard>);

const _: () = assert!(size_of::<Locked>() == 64);

impl Default for Store {
    fn default() -> Self {
        Self::new()
    }
}

impl Store {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(Inner {
            shards: (0..SHARD_COUNT as u16)
                .map(|shard| Locked(RwLock::new(Shard::new(Growth::of(shard)))))
                .collect(),
            hasher: RandomState::default(),
            epoch: AtomicU64::new(0),
        }))
    }

    /// Sets the fields that `patch` carries and leaves the others; makes the record if there is
    /// none. A reader sees all of the patch or nothing of it.
    pub fn apply<S: AsRef<str>>(&self, patch: &Patch<S>) {
        let sought = self.sought(patch.user_id.as_ref());
        self.shard(sought.hashes.shard).write().apply(
            &sought,
            None,
            &patch.changes,
            &self.0.hasher,
        );
    }

    /// Does all of `writes` in their order. Memory serves several of them at a time, which
    /// one call each does not let it: `cargo bench --bench store -- batch` compares both.
    pub fn apply_all<S: AsRef<str>>(&self, writes: &[Write<S>]) {
        for row in writes.chunks(SIDE_BY_SIDE) {
            self.apply_row(row);
        }
    }

    fn apply_row<S: AsRef<str>>(&self, writes: &[Write<S>]) {
        let all = writes.iter().map(|write| {
            let user_id = write.user_id();
            let hashes = self.hashes(user_id, &Key::of(user_id));
            prefetch_index(&self.0.shards, hashes.shard);
            hashes
        });
        let all: SmallVec<[_; SIDE_BY_SIDE]> = all.collect();
        let mut rest = all.iter().zip(writes).peekable();
        while rest.peek().is_some() {
            let mut together = SmallVec::<[_; SIDE_BY_SIDE]>::new();
            while let Some((hashes, write)) = rest.peek() {
                let shard = self.shard(hashes.shard);
                // Waited for only while no other is held: so two who do this can't wait for each
                // other. One that is held already, for another user's write, ends the row as well.
                let locked = match together.is_empty() {
                    true => shard.write(),
                    false => match shard.try_write() {
                        Some(locked) => locked,
                        None => break,
                    },
                };
                // Memory is asked for what all searches read first, and then for what they read second:
                // it serves several at a time.
                locked.prefetch_index(hashes.hash);
                together.push((locked, **hashes, None, *write));
                rest.next();
            }
            for (shard, hashes, likely, _) in &mut together {
                *likely = shard.prefetch_record(hashes.hash);
            }
            for (shard, hashes, likely, write) in &mut together {
                // The key is made again: to keep it from above costs more.
                let user_id = write.user_id();
                let sought = Sought {
                    user_id,
                    key: Key::of(user_id),
                    hashes: *hashes,
                };
                match write {
                    Write::Set(patch) => {
                        shard.apply(&sought, *likely, &patch.changes, &self.0.hasher);
                    }
                    Write::Delete(_) => {
                        shard.remove(&sought, &self.0.hasher);
                    }
                }
            }
        }
    }

    /// Removes the record under `user_id`; whether there was one.
    pub fn remove(&self, user_id: &str) -> bool {
        let sought = self.sought(user_id);
        self.shard(sought.hashes.shard)
            .write()
            .remove(&sought, &self.0.hasher)
    }

    /// The values under `user_id`.
    #[must_use]
    pub fn get(&self, user_id: &str) -> Option<Values> {
        let sought = self.sought(user_id);
        self.shard(sought.hashes.shard).read().get(&sought)
    }

    /// Whether there is a record under `user_id`.
    #[must_use]
    pub fn contains(&self, user_id: &str) -> bool {
        let sought = self.sought(user_id);
        self.shard(sought.hashes.shard).read().contains(&sought)
    }

    /// Puts the records of `piece`, with all their values; the sum of their digests.
    ///
    /// Quickest in the order of a scan: a shard is locked once for records that follow each other.
    pub fn put(&self, piece: &Piece) -> Digest {
        let mut sum = Digest::default();
        let mut locked = None;
        for (user_id, values) in piece.iter() {
            let sought = self.sought(user_id);
            let at = sought.hashes.shard;
            // Given back before another is taken: nobody holds two.
            drop(locked.take_if(|(held, _)| *held != at));
            let (_, shard) = locked.get_or_insert_with(|| (at, self.shard(at).write()));
            sum += shard.put(&sought, *values, &self.0.hasher);
        }
        sum
    }

    /// Makes room for `records` in all, so that none of them has to wait for a table to grow.
    pub fn reserve(&self, records: usize) {
        let mean = records / SHARD_COUNT;
        // Four standard deviations more: one shard in thirty thousand has to grow after all.
        let each = mean + 4 * mean.isqrt();
        for shard in &self.0.shards {
            shard.0.write().reserve(each, &self.0.hasher);
        }
    }

    /// How many records there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.shards.iter().map(|shard| shard.0.read().len()).sum()
    }

    /// Bytes that removed records left to new ones, which then need no new memory. Takes the lock of
    /// each shard for a moment.
    #[must_use]
    pub fn reusable_bytes(&self) -> u64 {
        let shards = self.0.shards.iter();
        shards
            .map(|shard| shard.0.read().reusable_bytes() as u64)
            .sum()
    }

    /// Whether there is no record.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The digest of all records. Exact when nothing is applied meanwhile; the reader of the log
    /// sees to that where it matters.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let mut sum = Digest::default();
        for shard in &self.0.shards {
            sum += shard.0.read().digest();
        }
        sum
    }

    /// Starts a scan over the records, shard by shard.
    #[must_use]
    pub fn scan(&self) -> Scan {
        Scan {
            store: self.clone(),
            shard: 0,
            record: 0,
            entered: None,
        }
    }

    /// How often the store has been cleared. A scan that ends in another epoch than it began in has
    /// seen what was never there at one time.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.0.epoch.load(Ordering::Acquire)
    }

    /// Removes all records and gives their memory back.
    pub fn clear(&self) {
        self.0.epoch.fetch_add(1, Ordering::AcqRel);
        for shard in &self.0.shards {
            shard.0.write().clear();
        }
    }

    fn sought<'a>(&self, user_id: &'a str) -> Sought<'a> {
        let key = Key::of(user_id);
        let hashes = self.hashes(user_id, &key);
        Sought {
            user_id,
            key,
            hashes,
        }
    }

    #[inline(always)]
    fn hashes(&self, user_id: &str, key: &Key<'_>) -> Hashes {
        key.with_bytes(user_id, |bytes| Hashes {
            shard: SHARD_HASHER.hash_one(bytes) as usize & (SHARD_COUNT - 1),
            hash: self.0.hasher.hash_one(bytes),
        })
    }

    #[expect(clippy::indexing_slicing, reason = "masked by the number of shards")]
    fn shard(&self, at: usize) -> &RwLock<Shard> {
        &self.0.shards[at & (SHARD_COUNT - 1)].0
    }
}

/// What says where a user id is.
#[derive(Clone, Copy)]
struct Hashes {
    /// Which shard has it.
    shard: usize,
    /// What the shard's index knows it by.
    hash: u64,
}

/// A user id, and where to look for it.
struct Sought<'a> {
    user_id: &'a str,
    key: Key<'a>,
    hashes: Hashes,
}

/// A walk over all records in bounded pieces. No lock is held between two of them.
///
/// A record that was there when the scan began and stays comes up exactly once; one made or removed
/// meanwhile comes up once or not at all, and no user twice. Each comes whole, as it was when its
/// piece was taken.
pub struct Scan {
    store: Store,
    shard: usize,
    record: usize,
    /// The place in the shard that ends the scan there, once it has entered it.
    entered: Option<usize>,
}

impl Scan {
    /// Fills `piece` with the next records, replacing what it held; `false` at the end.
    pub fn next_into(&mut self, piece: &mut Piece) -> bool {
        piece.clear();
        while let Some(shard) = self.store.0.shards.get(self.shard) {
            let shard = shard.0.read();
            let end = *self.entered.get_or_insert_with(|| shard.enter());
            self.record = shard.copy(self.record..end, piece);
            if self.record == end {
                shard.leave();
                self.entered = None;
                self.shard += 1;
                self.record = 0;
            }
            if piece.is_full() {
                return true;
            }
        }
        !piece.is_empty()
    }
}

impl Drop for Scan {
    fn drop(&mut self) {
        if self.entered.is_some() {
            self.store.shard(self.shard).read().leave();
        }
    }
}

/// Some records of a scan, kept in two flat buffers so that refilling it allocates nothing.
pub struct Piece {
    ids: String,
    /// Where each record's id ends in `ids`, and its values.
    records: Vec<(usize, Values)>,
    records_max: usize,
}

impl Default for Piece {
    fn default() -> Self {
        Self::of(Self::RECORDS_MAX)
    }
}

impl Piece {
    /// The most records in one piece; what bounds the time that a shard is locked for a scan.
    pub const RECORDS_MAX: usize = 1024;

    /// One for `records_max` records, at least one and at most [`RECORDS_MAX`](Self::RECORDS_MAX).
    #[must_use]
    pub fn of(records_max: usize) -> Self {
        Self {
            ids: String::new(),
            records: Vec::new(),
            records_max: records_max.clamp(1, Self::RECORDS_MAX),
        }
    }

    fn room(&self) -> usize {
        self.records_max.saturating_sub(self.records.len())
    }

    /// How many records the piece holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// The records: user id and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Values)> {
        let mut begin = 0;
        self.records.iter().map(move |(end, values)| {
            let id = &self.ids[begin..*end];
            begin = *end;
            (id, values)
        })
    }

    /// The sum of their digests.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let mut sum = Digest::default();
        for (user_id, values) in self.iter() {
            let values = *values;
            sum += UserGrade { user_id, values }.digest();
        }
        sum
    }

    /// Whether there is room for no more.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.room() == 0
    }

    /// Removes the records.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.records.clear();
    }

    /// Adds a record, beyond its room if need be.
    pub fn push(&mut self, id: &str, values: Values) {
        self.ids.push_str(id);
        self.records.push((self.ids.len(), values));
    }
}

#[cfg(test)]
mod tests;
