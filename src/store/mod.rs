//! The in-memory store: a map from user id to values, split into shards with a lock each.
//!
//! The store does not depend on the log or on HTTP. Its handle is cheap to clone. Its methods are
//! short and synchronous, and no lock outlives a call, so none can be held across an `.await`.
//!
//! A shard is an index over a slab of records of 32 bytes (see `shard.rs`, `index.rs`,
//! `record.rs`). It takes at most half the memory of a concurrent map (scc) with the same records.
//! A scan is a cursor: it holds no lock between two batches and sees every record once, even if the
//! shard grows meanwhile. New records reuse the slots of removed ones, but not while a scan is in
//! the shard: the scan could see a record twice. See `benches/store.rs`, `benches/memory.rs` and
//! ADR 0003.

mod free_list;
mod growth;
mod index;
mod key;
mod long_ids;
mod record;
mod shard;

use std::hash::{self, BuildHasher, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use foldhash::SharedSeed;
use foldhash::quality::{FoldHasher, RandomState};
use parking_lot::RwLock;
use prefetch_index::prefetch_index;
use smallvec::SmallVec;

use crate::grade::{Digest, UserGrade, Values, Write};
use growth::Growth;
use key::Key;
use shard::Shard;

/// A power of two. Enough that growing one shard's table, which blocks that shard, takes about
/// 0.2 ms at ten million records; few enough that an empty store is small.
const SHARD_COUNT: usize = 1024;

/// How many writes are looked up together: about as many reads as a core can have outstanding.
const GROUP_WRITES: usize = 16;

/// A handle to a store. Clones share the store.
#[derive(Clone)]
pub struct Store(Arc<StoreInner>);

struct StoreInner {
    shards: Box<[PaddedShard]>,
    /// Set before the first record is looked up.
    shard_hash: OnceLock<ShardHash>,
    /// Seeded randomly in each process, so that clients cannot choose ids that collide in an index.
    hasher: RandomState,
    /// How often the store was cleared.
    epoch: AtomicU64,
}

/// Chooses the shard of an id, by a seed that clients do not know: otherwise they could choose ids of
/// one shard, and a large shard stops the thread that grows it, and with it the reads of all users.
/// A restored store uses the seed in its backup, so that a restore fills one shard after the other and
/// each fits into a core's cache (ADR 0003 has the times).
struct ShardHash {
    seed: u64,
    /// With the constants of the hash in its place, some ids have equal hashes whatever the seed.
    shared: SharedSeed,
}

impl ShardHash {
    fn new(seed: u64) -> Self {
        Self {
            seed,
            shared: SharedSeed::from_u64(seed),
        }
    }

    fn random() -> Self {
        Self::new(hash::RandomState::new().build_hasher().finish())
    }

    fn shard_of(&self, bytes: &[u8]) -> usize {
        let mut hasher = FoldHasher::with_seed(self.seed, &self.shared);
        hasher.write(bytes);
        hasher.finish() as usize & (SHARD_COUNT - 1)
    }
}

/// A shard padded to a cache line.
#[repr(align(64))]
struct PaddedShard(RwLock<Shard>);

const _: () = assert!(size_of::<PaddedShard>() == 64);

impl Default for Store {
    fn default() -> Self {
        Self::new()
    }
}

impl Store {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(StoreInner {
            shards: (0..SHARD_COUNT as u16)
                .map(|shard| PaddedShard(RwLock::new(Shard::new(Growth::of_shard(shard)))))
                .collect(),
            shard_hash: OnceLock::new(),
            hasher: RandomState::default(),
            epoch: AtomicU64::new(0),
        }))
    }

    /// An empty store with this seed. In stores of one seed the same writes give the same order of a
    /// scan.
    #[must_use]
    pub fn with_shard_seed(seed: u64) -> Self {
        let store = Self::new();
        store.set_shard_seed(seed);
        store
    }

    /// The seed that chooses the shards. A store whose records come in the order of a scan of this
    /// one is filled in a third of the time if it has the same.
    #[must_use]
    pub fn shard_seed(&self) -> u64 {
        self.shard_hash().seed
    }

    /// Sets the seed, unless the store has one because of an earlier call or lookup.
    pub fn set_shard_seed(&self, seed: u64) {
        let _ = self.0.shard_hash.set(ShardHash::new(seed));
    }

    fn shard_hash(&self) -> &ShardHash {
        self.0.shard_hash.get_or_init(ShardHash::random)
    }

    /// Applies `writes` in order. Each is atomic: a reader sees all of a patch or nothing of it.
    ///
    /// Looks up several writes together, so that their cache misses overlap. `cargo bench --bench
    /// store -- batch` compares this with one call per write.
    pub fn apply_all<S: AsRef<str>>(&self, writes: &[Write<S>]) {
        for group in writes.chunks(GROUP_WRITES) {
            self.apply_group(group);
        }
    }

    fn apply_group<S: AsRef<str>>(&self, writes: &[Write<S>]) {
        let all = writes.iter().map(|write| {
            let user_id = write.user_id();
            let hashes = self.hashes(user_id, &Key::of(user_id));
            prefetch_index(&self.0.shards, hashes.shard);
            hashes
        });
        let all: SmallVec<[_; GROUP_WRITES]> = all.collect();
        let mut rest = all.iter().zip(writes).peekable();
        while rest.peek().is_some() {
            let mut together = SmallVec::<[_; GROUP_WRITES]>::new();
            while let Some((hashes, write)) = rest.peek() {
                let shard = self.shard(hashes.shard);
                // Waits for a lock only while it holds no other, so two threads that apply writes
                // cannot deadlock. A shard that this group has already locked ends the group, too.
                let locked = match together.is_empty() {
                    true => shard.write(),
                    false => match shard.try_write() {
                        Some(locked) => locked,
                        None => break,
                    },
                };
                // All searches' first reads are prefetched, then their second reads, so that their
                // cache misses overlap.
                locked.prefetch_index(hashes.hash);
                together.push((locked, **hashes, None, *write));
                rest.next();
            }
            for (shard, hashes, slot_hint, _) in &mut together {
                *slot_hint = shard.prefetch_record(hashes.hash);
            }
            for (shard, hashes, slot_hint, write) in &mut together {
                // Computing the key again costs less than keeping it from above.
                let user_id = write.user_id();
                let lookup = Lookup {
                    user_id,
                    key: Key::of(user_id),
                    hashes: *hashes,
                };
                match write {
                    Write::Set(patch) => {
                        shard.apply(&lookup, *slot_hint, &patch.changes, &self.0.hasher);
                    }
                    Write::Delete(_) => {
                        shard.remove(&lookup, &self.0.hasher);
                    }
                }
            }
        }
    }

    /// The values of this user; `None` if there is no record.
    #[must_use]
    pub fn get(&self, user_id: &str) -> Option<Values> {
        let lookup = self.lookup(user_id);
        self.shard(lookup.hashes.shard).read().get(&lookup)
    }

    /// Whether this user has a record.
    #[must_use]
    pub fn contains(&self, user_id: &str) -> bool {
        let lookup = self.lookup(user_id);
        self.shard(lookup.hashes.shard).read().contains(&lookup)
    }

    /// Inserts or replaces the records of `batch`. Returns the sum of their digests.
    ///
    /// Fastest in the order of a scan: consecutive records of one shard share one lock.
    pub fn put(&self, batch: &RecordBatch) -> Digest {
        let mut sum = Digest::default();
        let mut locked = None;
        for (user_id, values) in batch.iter() {
            let lookup = self.lookup(user_id);
            let at = lookup.hashes.shard;
            // Unlocks one shard before it locks the next.
            drop(locked.take_if(|(locked_at, _)| *locked_at != at));
            let (_, shard) = locked.get_or_insert_with(|| (at, self.shard(at).write()));
            sum += shard.put(&lookup, *values, &self.0.hasher);
        }
        sum
    }

    /// Reserves capacity for `records` in total, so that no table has to grow for them.
    pub fn reserve(&self, records: usize) {
        let mean = records / SHARD_COUNT;
        // Plus four standard deviations: about one shard in thirty thousand still has to grow.
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

    /// Bytes of free slots, which new records take before the store allocates. Locks each shard
    /// briefly.
    #[must_use]
    pub fn reusable_bytes(&self) -> u64 {
        let shards = self.0.shards.iter();
        shards
            .map(|shard| shard.0.read().reusable_bytes() as u64)
            .sum()
    }

    /// Whether there are no records.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The digest of all records. Exact only if nothing is applied meanwhile, which the caller must
    /// ensure where it matters.
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
            slot: 0,
            end: None,
        }
    }

    /// How often the store was cleared. A scan that ends in another epoch than it began in has
    /// mixed two states.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.0.epoch.load(Ordering::Acquire)
    }

    /// Removes all records and frees their memory.
    pub fn clear(&self) {
        self.0.epoch.fetch_add(1, Ordering::AcqRel);
        for shard in &self.0.shards {
            shard.0.write().clear();
        }
    }

    fn lookup<'a>(&self, user_id: &'a str) -> Lookup<'a> {
        let key = Key::of(user_id);
        let hashes = self.hashes(user_id, &key);
        Lookup {
            user_id,
            key,
            hashes,
        }
    }

    #[inline(always)]
    fn hashes(&self, user_id: &str, key: &Key<'_>) -> Hashes {
        key.with_bytes(user_id, |bytes| Hashes {
            shard: self.shard_hash().shard_of(bytes),
            hash: self.0.hasher.hash_one(bytes),
        })
    }

    #[expect(clippy::indexing_slicing, reason = "masked by the number of shards")]
    fn shard(&self, at: usize) -> &RwLock<Shard> {
        &self.0.shards[at & (SHARD_COUNT - 1)].0
    }
}

/// The hashes of a user id.
#[derive(Clone, Copy)]
struct Hashes {
    /// The index of its shard.
    shard: usize,
    /// Its hash in the shard's index.
    hash: u64,
}

/// A user id, prepared for a lookup.
struct Lookup<'a> {
    user_id: &'a str,
    key: Key<'a>,
    hashes: Hashes,
}

/// A cursor over all records, in bounded batches. Holds no lock between two batches.
///
/// Returns every record exactly once that exists during the whole scan. A record that is inserted
/// or removed meanwhile is returned once or not at all. Each record has the values that it had when
/// its batch was filled.
pub struct Scan {
    store: Store,
    shard: usize,
    slot: usize,
    /// The slot at which the scan of the current shard ends, once it has started.
    end: Option<usize>,
}

impl Scan {
    /// Replaces the content of `batch` with the next records. Returns `false` at the end.
    pub fn next_into(&mut self, batch: &mut RecordBatch) -> bool {
        batch.clear();
        while let Some(shard) = self.store.0.shards.get(self.shard) {
            let shard = shard.0.read();
            let end = *self.end.get_or_insert_with(|| shard.begin_scan());
            self.slot = shard.copy(self.slot..end, batch);
            if self.slot == end {
                shard.end_scan();
                self.end = None;
                self.shard += 1;
                self.slot = 0;
            }
            if batch.is_full() {
                return true;
            }
        }
        !batch.is_empty()
    }
}

impl Drop for Scan {
    fn drop(&mut self) {
        if self.end.is_some() {
            self.store.shard(self.shard).read().end_scan();
        }
    }
}

/// Some records, in two flat buffers, so that refilling the batch does not allocate.
pub struct RecordBatch {
    ids: String,
    /// The end of each record's id in `ids`, and its values.
    records: Vec<(usize, Values)>,
    records_max: usize,
}

impl Default for RecordBatch {
    fn default() -> Self {
        Self::with_max(Self::RECORDS_MAX)
    }
}

impl RecordBatch {
    /// The most records in one batch. Bounds how long a scan locks a shard.
    pub const RECORDS_MAX: usize = 1024;

    /// An empty batch for `records_max` records: at least one and at most
    /// [`RECORDS_MAX`](Self::RECORDS_MAX).
    #[must_use]
    pub fn with_max(records_max: usize) -> Self {
        Self {
            ids: String::new(),
            records: Vec::new(),
            records_max: records_max.clamp(1, Self::RECORDS_MAX),
        }
    }

    /// How many more records fit.
    fn space(&self) -> usize {
        self.records_max.saturating_sub(self.records.len())
    }

    /// How many records it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether it has no records.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// The records: user id and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Values)> {
        let mut start = 0;
        self.records.iter().map(move |(end, values)| {
            let id = &self.ids[start..*end];
            start = *end;
            (id, values)
        })
    }

    /// The sum of the records' digests.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let mut sum = Digest::default();
        for (user_id, values) in self.iter() {
            let values = *values;
            sum += UserGrade { user_id, values }.digest();
        }
        sum
    }

    /// Whether no more records fit.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.space() == 0
    }

    /// Removes the records.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.records.clear();
    }

    /// Adds a record, even if the batch is full.
    pub fn push(&mut self, id: &str, values: Values) {
        self.ids.push_str(id);
        self.records.push((self.ids.len(), values));
    }
}

#[cfg(test)]
mod tests;
