//! The records, in memory: a map from user id to values, split into shards with a lock each.
//!
//! The store knows nothing of logs or HTTP. Its handle is cheap to clone, its methods are short and
//! synchronous, and no lock outlives a call, so none can be held across an `.await`.
//!
//! A shard is a hash table of record numbers over records that never move (see `shard.rs`). Beside
//! a concurrent map of the same records (scc) it takes half to two thirds of the memory from a
//! million records on, and a scan is a cursor: it needs no lock between two pieces and sees every
//! record once, however much the shard grows meanwhile. The price is one more cache miss to find a
//! record. `benches/store.rs` and `benches/memory.rs` measure both; the figures stand in
//! `benches/README.md`.

mod shard;

use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use foldhash::quality::{FixedState, RandomState};
use parking_lot::RwLock;

use crate::grade::{Digest, Patch, UserGrade, Values};
use shard::Shard;

/// A power of two. Enough that growing one shard's table (a pause for whoever wants that shard)
/// stays near 0.2 ms at ten million records, few enough that an empty store is small.
const SHARD_COUNT: usize = 1024;

/// Says which shard an id belongs to, the same in every process: rows that were scanned together, as
/// in a backup, are then put together as well, into tables that fit in a core's cache: what that is
/// worth to a restore stands in `benches/README.md`. It also makes the order of a scan depend on that
/// of the writes alone. Who prepares ids that meet in one shard makes that one large, and slow for
/// its own ids.
const SHARD_HASHER: FixedState = FixedState::with_seed(0);

/// The handle of a store; clones are the same store.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    shards: Box<[RwLock<Shard>]>,
    /// Seeded anew by each process, so that nobody can prepare ids that collide in a shard's table.
    hasher: RandomState,
    epoch: AtomicU64,
}

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
            shards: (0..SHARD_COUNT).map(|_| RwLock::default()).collect(),
            hasher: RandomState::default(),
            epoch: AtomicU64::new(0),
        }))
    }

    /// Sets the fields that `patch` carries and leaves the others; makes the record if there is
    /// none. A reader sees all of the patch or nothing of it.
    pub fn apply<S: AsRef<str>>(&self, patch: &Patch<S>) {
        let user_id = patch.user_id.as_ref();
        let hash = self.hash(user_id);
        self.shard(shard_of(user_id))
            .write()
            .apply(hash, user_id, &patch.changes, &self.0.hasher);
    }

    /// The values under `user_id`.
    #[must_use]
    pub fn get(&self, user_id: &str) -> Option<Values> {
        let hash = self.hash(user_id);
        self.shard(shard_of(user_id)).read().get(hash, user_id)
    }

    /// Puts the records of `piece`, with all their values; the sum of their digests.
    ///
    /// Quickest in the order of a scan: a shard is locked once for records that follow each other.
    pub fn put(&self, piece: &Piece) -> Digest {
        let mut sum = Digest::default();
        let mut locked = None;
        for (user_id, values) in piece.iter() {
            let at = shard_of(user_id);
            // Given back before another is taken: nobody holds two.
            drop(locked.take_if(|(held, _)| *held != at));
            let (_, shard) = locked.get_or_insert_with(|| (at, self.shard(at).write()));
            let values = *values;
            let grade = UserGrade { user_id, values };
            sum += shard.put(self.hash(user_id), &grade, &self.0.hasher);
        }
        sum
    }

    /// Makes room for `records` in all, so that none of them has to wait for a table to grow.
    pub fn reserve(&self, records: usize) {
        for shard in &self.0.shards {
            shard.write().reserve(records / SHARD_COUNT, &self.0.hasher);
        }
    }

    /// How many records there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.shards.iter().map(|shard| shard.read().len()).sum()
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
            sum += shard.read().digest();
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
            *shard.write() = Shard::default();
        }
    }

    fn hash(&self, user_id: &str) -> u64 {
        self.0.hasher.hash_one(user_id.as_bytes())
    }

    #[expect(clippy::indexing_slicing, reason = "masked by the number of shards")]
    fn shard(&self, at: usize) -> &RwLock<Shard> {
        &self.0.shards[at & (SHARD_COUNT - 1)]
    }
}

/// The number of the shard that has `user_id`.
fn shard_of(user_id: &str) -> usize {
    SHARD_HASHER.hash_one(user_id.as_bytes()) as usize & (SHARD_COUNT - 1)
}

/// A walk over all records in bounded pieces. No lock is held between two of them.
///
/// A record that was there when the scan began comes up exactly once; one made meanwhile comes up
/// once or not at all. Each comes whole, as it was when its piece was taken.
pub struct Scan {
    store: Store,
    shard: usize,
    record: usize,
}

impl Scan {
    /// Fills `piece` with the next records, replacing what it held; `false` at the end.
    pub fn next_into(&mut self, piece: &mut Piece) -> bool {
        piece.clear();
        while let Some(shard) = self.store.0.shards.get(self.shard) {
            let shard = shard.read();
            let room = piece.room();
            let copied = shard.copy_from(self.record, room, piece);
            self.record += copied;
            if self.record < shard.len() {
                return true;
            }
            self.shard += 1;
            self.record = 0;
            if piece.room() == 0 {
                return true;
            }
        }
        !piece.is_empty()
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
            let id = self.ids.get(begin..*end).unwrap_or_default();
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
