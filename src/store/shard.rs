//! One shard: records in chunks that never move, and a table of their numbers.
//!
//! A record is 48 bytes: 16 for its key, 32 for its values. A short id stands in the key itself; a
//! longer one in the shard's byte chunks, with no header and no allocation of its own. Growing
//! copies neither records nor ids, only the table of 4-byte numbers, so the peak while growing is
//! next to the steady size.

use std::hash::BuildHasher;

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
    len: usize,
    digest: Digest,
}

struct Record {
    key: Key,
    values: Values,
}

#[derive(Clone, Copy)]
enum Key {
    Inline { len: u8, bytes: [u8; INLINE_BYTES] },
    Chunk { chunk: u32, at: u16, len: u16 },
}

const _: () = assert!(size_of::<Key>() == 16);

impl Shard {
    pub(super) fn len(&self) -> usize {
        self.len
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

    /// Adds a record whose id is not there.
    fn insert(&mut self, hash: u64, user_id: &str, values: Values, hasher: &impl BuildHasher) {
        let key = self.key(user_id);
        // A shard of 2^32 records would be a store of 4 * 10^12: memory ends long before.
        let number = self.len as u32;
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
        self.len += 1;
        let (records, ids) = (&self.records, &self.ids);
        self.table.insert_unique(hash, number, |number| {
            hasher.hash_one(id_of(records, ids, *number))
        });
    }

    /// Makes room for `records` in all.
    pub(super) fn reserve(&mut self, records: usize, hasher: &impl BuildHasher) {
        let (stored, ids) = (&self.records, &self.ids);
        self.table
            .reserve(records.saturating_sub(self.len), |number| {
                hasher.hash_one(id_of(stored, ids, *number))
            });
    }

    /// Appends up to `most` records from number `from` on; returns how many.
    pub(super) fn copy_from(&self, from: usize, most: usize, piece: &mut Piece) -> usize {
        let end = self.len.min(from + most);
        for number in from..end {
            let number = number as u32;
            if let Some(record) = self.record(number) {
                let id = id_of(&self.records, &self.ids, number);
                // Ids came in as `str`, byte by byte.
                piece.push(std::str::from_utf8(id).unwrap_or_default(), record.values);
            }
        }
        end.saturating_sub(from)
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

    fn key(&mut self, user_id: &str) -> Key {
        let id = user_id.as_bytes();
        let mut bytes = [0; INLINE_BYTES];
        if let Some(room) = bytes.get_mut(..id.len()) {
            room.copy_from_slice(id);
            return Key::Inline {
                len: id.len() as u8,
                bytes,
            };
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
        None => None,
    };
    id.unwrap_or_default()
}
