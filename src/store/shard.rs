//! One shard: records in chunks that never move, and a table of their numbers.
//!
//! A record is 48 bytes: 16 for its key, 32 for its values. A short id stands in the key itself; a
//! longer one in the shard's byte chunks, with no header and no allocation of its own. Growing
//! copies neither records nor ids, only the table of 4-byte numbers, so the peak while growing is
//! next to the steady size.
//!
//! A record that is removed leaves its place free for a later one, and its bytes among the long ids
//! with it: an id that is no longer goes there.

use std::hash::BuildHasher;
use std::mem;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use hashbrown::HashTable;

use super::Piece;
use crate::grade::{Changes, Digest, UserGrade, Values};

/// Records a chunk: 12 KiB, so a nearly empty shard wastes little.
const CHUNK_RECORDS: usize = 256;
/// Bytes a chunk of long ids.
const CHUNK_ID_BYTES: usize = 16 * 1024;
/// Longest id that stands in the key itself.
const INLINE_BYTES: usize = 14;

/// The records whose ids hash to this shard.
#[derive(Default)]
pub(super) struct Shard {
    table: HashTable<u32>,
    records: Vec<Vec<Record>>,
    ids: Vec<Vec<u8>>,
    /// Records and free places.
    places: usize,
    /// The numbers of the free ones.
    free: Vec<u32>,
    digest: Digest,
    /// Scans that are in this shard. While there is one no free place is taken again, and it ends
    /// where the places ended when it came: so it meets nobody who was removed and made again twice.
    scans: AtomicUsize,
}

struct Record {
    key: Key,
    values: Values,
}

#[derive(Clone, Copy)]
enum Key {
    Inline {
        len: u8,
        bytes: [u8; INLINE_BYTES],
    },
    Chunk {
        chunk: u32,
        at: u16,
        len: u16,
    },
    /// Nobody's; the bytes are those of the long id that was there, none of a short one.
    Free {
        chunk: u32,
        at: u16,
        len: u16,
    },
}

const _: () = assert!(size_of::<Key>() == 16);

impl Shard {
    pub(super) fn len(&self) -> usize {
        self.places - self.free.len()
    }

    pub(super) fn digest(&self) -> Digest {
        self.digest
    }

    pub(super) fn get(&self, hash: u64, user_id: &str) -> Option<Values> {
        let number = self.find(hash, user_id)?;
        self.record(number).map(|record| record.values)
    }

    pub(super) fn apply(
        &mut self,
        hash: u64,
        user_id: &str,
        changes: &Changes,
        hasher: &impl BuildHasher,
    ) {
        if let Some(number) = self.find(hash, user_id) {
            if let Some(record) = record_mut(&mut self.records, number) {
                let values = record.values;
                let old = UserGrade { user_id, values }.digest();
                changes.apply_to(&mut record.values);
                let values = record.values;
                self.digest
                    .replace(old, UserGrade { user_id, values }.digest());
            }
            return;
        }
        let mut values = Values::default();
        changes.apply_to(&mut values);
        self.digest += UserGrade { user_id, values }.digest();
        self.insert(hash, user_id, values, hasher);
    }

    /// Puts a record with all its values; its digest.
    pub(super) fn put(
        &mut self,
        hash: u64,
        grade: &UserGrade<&str>,
        hasher: &impl BuildHasher,
    ) -> Digest {
        let UserGrade { user_id, values } = *grade;
        let digest = grade.digest();
        let found = self.find(hash, user_id);
        match found.and_then(|number| record_mut(&mut self.records, number)) {
            Some(record) => {
                let old = std::mem::replace(&mut record.values, values);
                let old = UserGrade {
                    user_id,
                    values: old,
                };
                self.digest.replace(old.digest(), digest);
            }
            None => {
                self.digest += digest;
                self.insert(hash, user_id, values, hasher);
            }
        }
        digest
    }

    /// Removes the record of `user_id`; whether there was one.
    pub(super) fn remove(&mut self, hash: u64, user_id: &str) -> bool {
        let (records, ids) = (&self.records, &self.ids);
        let found = self.table.find_entry(hash, |number| {
            id_of(records, ids, *number) == user_id.as_bytes()
        });
        let Ok(found) = found else {
            return false;
        };
        let (number, _) = found.remove();
        if let Some(record) = record_mut(&mut self.records, number) {
            let values = record.values;
            let digest = UserGrade { user_id, values }.digest();
            self.digest.replace(digest, Digest::default());
            record.key = record.key.freed();
        }
        self.free.push(number);
        true
    }

    /// Removes all records and gives their memory back.
    pub(super) fn clear(&mut self) {
        *self = Self {
            // They leave as they came.
            scans: mem::take(&mut self.scans),
            ..Self::default()
        };
    }

    /// Adds a record whose id is not there.
    fn insert(&mut self, hash: u64, user_id: &str, values: Values, hasher: &impl BuildHasher) {
        let scanned = self.scans.load(Ordering::Relaxed) > 0;
        let number = match self.free.pop_if(|_| !scanned) {
            Some(number) => {
                let key = self.key(user_id, record(&self.records, number).map(|free| free.key));
                if let Some(place) = record_mut(&mut self.records, number) {
                    *place = Record { key, values };
                }
                number
            }
            None => self.add(user_id, values),
        };
        let (records, ids) = (&self.records, &self.ids);
        self.table.insert_unique(hash, number, |number| {
            hasher.hash_one(id_of(records, ids, *number))
        });
    }

    /// Puts a record in a new place; its number.
    fn add(&mut self, user_id: &str, values: Values) -> u32 {
        let key = self.key(user_id, None);
        // A shard of 2^32 records would be a store of 4 * 10^12: memory ends long before.
        let number = self.places as u32;
        let full = self
            .records
            .last()
            .is_none_or(|chunk| chunk.len() == CHUNK_RECORDS);
        if full {
            self.records.push(Vec::with_capacity(CHUNK_RECORDS));
        }
        if let Some(chunk) = self.records.last_mut() {
            chunk.push(Record { key, values });
        }
        self.places += 1;
        number
    }

    /// Makes room for `records` in all.
    pub(super) fn reserve(&mut self, records: usize, hasher: &impl BuildHasher) {
        let (stored, ids) = (&self.records, &self.ids);
        self.table
            .reserve(records.saturating_sub(self.len()), |number| {
                hasher.hash_one(id_of(stored, ids, *number))
            });
    }

    /// A scan comes; where it is to end.
    pub(super) fn enter(&self) -> usize {
        self.scans.fetch_add(1, Ordering::Relaxed);
        self.places
    }

    /// A scan goes.
    pub(super) fn leave(&self) {
        self.scans.fetch_sub(1, Ordering::Relaxed);
    }

    /// Appends the records of `places` until `piece` is full or has looked at as many places as it
    /// may hold records; the next place.
    pub(super) fn copy(&self, places: Range<usize>, piece: &mut Piece) -> usize {
        let end = places.end.min(places.start + piece.room());
        for number in places.start..end {
            let number = number as u32;
            let record = self.record(number);
            if let Some(Record { key, values }) = record
                && !matches!(key, Key::Free { .. })
            {
                let id = id_of(&self.records, &self.ids, number);
                // Ids came in as `str`, byte by byte.
                piece.push(std::str::from_utf8(id).unwrap_or_default(), *values);
            }
        }
        end
    }

    #[cfg(test)]
    pub(super) fn places(&self) -> usize {
        self.places
    }

    /// Bytes of long ids, in use or not.
    #[cfg(test)]
    pub(super) fn id_bytes(&self) -> usize {
        self.ids.iter().map(Vec::len).sum()
    }

    fn find(&self, hash: u64, user_id: &str) -> Option<u32> {
        self.table
            .find(hash, |number| {
                id_of(&self.records, &self.ids, *number) == user_id.as_bytes()
            })
            .copied()
    }

    fn record(&self, number: u32) -> Option<&Record> {
        record(&self.records, number)
    }

    /// The key of a record; `before` is that of the place it goes to, if it was another's.
    fn key(&mut self, user_id: &str, before: Option<Key>) -> Key {
        let id = user_id.as_bytes();
        let mut bytes = [0; INLINE_BYTES];
        if let Some(room) = bytes.get_mut(..id.len()) {
            room.copy_from_slice(id);
            return Key::Inline {
                len: id.len() as u8,
                bytes,
            };
        }
        if let Some(Key::Free { chunk, at, len }) = before
            && id.len() <= usize::from(len)
            && let Some(bytes) = self.ids.get_mut(chunk as usize)
            && let Some(room) = bytes.get_mut(usize::from(at)..usize::from(at) + id.len())
        {
            room.copy_from_slice(id);
            let len = id.len() as u16;
            return Key::Chunk { chunk, at, len };
        }
        let fits = self
            .ids
            .last()
            .is_some_and(|chunk| chunk.len() + id.len() <= CHUNK_ID_BYTES);
        if !fits {
            self.ids.push(Vec::with_capacity(CHUNK_ID_BYTES));
        }
        let chunk = (self.ids.len() - 1) as u32;
        let mut at = 0;
        if let Some(chunk) = self.ids.last_mut() {
            at = chunk.len() as u16;
            chunk.extend_from_slice(id);
        }
        Key::Chunk {
            chunk,
            at,
            len: id.len() as u16,
        }
    }
}

impl Key {
    /// That of the place once its record is gone.
    fn freed(self) -> Self {
        match self {
            Self::Chunk { chunk, at, len } | Self::Free { chunk, at, len } => {
                Self::Free { chunk, at, len }
            }
            Self::Inline { .. } => Self::Free {
                chunk: 0,
                at: 0,
                len: 0,
            },
        }
    }
}

// Free functions over the parts, so that the table can be borrowed mutably beside them.

fn record(records: &[Vec<Record>], number: u32) -> Option<&Record> {
    let number = number as usize;
    records
        .get(number / CHUNK_RECORDS)?
        .get(number % CHUNK_RECORDS)
}

fn record_mut(records: &mut [Vec<Record>], number: u32) -> Option<&mut Record> {
    let number = number as usize;
    records
        .get_mut(number / CHUNK_RECORDS)?
        .get_mut(number % CHUNK_RECORDS)
}

fn id_of<'a>(records: &'a [Vec<Record>], ids: &'a [Vec<u8>], number: u32) -> &'a [u8] {
    let id = match record(records, number).map(|record| &record.key) {
        Some(Key::Inline { len, bytes }) => bytes.get(..usize::from(*len)),
        Some(Key::Chunk { chunk, at, len }) => {
            let at = usize::from(*at);
            ids.get(*chunk as usize)
                .and_then(|chunk| chunk.get(at..at + usize::from(*len)))
        }
        Some(Key::Free { .. }) | None => None,
    };
    id.unwrap_or_default()
}
