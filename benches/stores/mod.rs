//! The two stores to compare, behind one trait, and their test data.

#![expect(clippy::indexing_slicing, reason = "a bench may panic")]

use std::hash::{Hash, Hasher};
use std::ops::Deref;

use foldhash::quality::RandomState;
use gradestore::grade::{Changes, Digest, FIELD_COUNT, Patch, UserGrade, Values, Write};
use gradestore::store::{RecordBatch, Store};
use parking_lot::Mutex;
use scc::hash_map::Entry;

pub(crate) trait Grades: Default + Sync {
    const NAME: &str;
    fn apply(&self, patch: &Patch<&str>);
    fn get(&self, user_id: &str) -> Option<Values>;
    /// Calls `visit` with every record.
    fn scan(&self, visit: impl FnMut(&str, &Values));
    fn digest(&self) -> Digest;
}

impl Grades for Store {
    const NAME: &str = "gradestore";

    fn apply(&self, patch: &Patch<&str>) {
        self.apply_all(&[Write::Set(patch.clone())]);
    }

    fn get(&self, user_id: &str) -> Option<Values> {
        self.get(user_id)
    }

    fn scan(&self, mut visit: impl FnMut(&str, &Values)) {
        let mut scan = self.scan();
        let mut batch = RecordBatch::default();
        while scan.next_into(&mut batch) {
            batch.iter().for_each(|(id, values)| visit(id, values));
        }
    }

    fn digest(&self) -> Digest {
        self.digest()
    }
}

/// `scc::HashMap` with the store's hasher and digest, and without an allocation for short ids.
pub(crate) struct Scc {
    map: scc::HashMap<Id, Values, RandomState>,
    /// As many sums as the store has shards, so that threads seldom contend.
    digests: Box<[Mutex<Digest>]>,
}

impl Default for Scc {
    fn default() -> Self {
        Self {
            map: scc::HashMap::default(),
            digests: (0..1024).map(|_| Mutex::default()).collect(),
        }
    }
}

impl Grades for Scc {
    const NAME: &str = "scc";

    fn apply(&self, patch: &Patch<&str>) {
        let user_id = patch.user_id;
        let digest_of = |values| UserGrade { user_id, values }.digest();
        let replace = |values: &mut Values, old| {
            patch.changes.apply_to(values);
            let new = digest_of(*values);
            // Any of the sums is right, because they wrap and are added up.
            let at = new.0 as usize % self.digests.len();
            self.digests[at].lock().replace(old, new);
        };
        // Tries an update first, because an entry needs an owned id even if it exists.
        let updated = self.map.update_sync(user_id.as_bytes(), |_, values| {
            let old = digest_of(*values);
            replace(values, old);
        });
        if updated.is_none() {
            match self.map.entry_sync(Id::from(user_id)) {
                Entry::Occupied(mut entry) => {
                    let old = digest_of(*entry.get());
                    replace(entry.get_mut(), old);
                }
                Entry::Vacant(entry) => {
                    let mut values = Values::default();
                    replace(&mut values, Digest::default());
                    entry.insert_entry(values);
                }
            }
        }
    }

    fn get(&self, user_id: &str) -> Option<Values> {
        self.map.read_sync(user_id.as_bytes(), |_, values| *values)
    }

    fn scan(&self, mut visit: impl FnMut(&str, &Values)) {
        self.map.iter_sync(|id, values| {
            visit(std::str::from_utf8(id).unwrap_or_default(), values);
            true
        });
    }

    fn digest(&self) -> Digest {
        let mut sum = Digest::default();
        self.digests.iter().for_each(|part| sum += *part.lock());
        sum
    }
}

/// A user id in 24 bytes: inline up to 22 bytes, else on the heap.
enum Id {
    Inline { len: u8, bytes: [u8; 22] },
    Heap(Box<[u8]>),
}

const _: () = assert!(size_of::<Id>() == 24);

impl From<&str> for Id {
    fn from(id: &str) -> Self {
        let mut bytes = [0; 22];
        match bytes.get_mut(..id.len()) {
            Some(target) => {
                target.copy_from_slice(id.as_bytes());
                let len = id.len() as u8;
                Self::Inline { len, bytes }
            }
            None => Self::Heap(id.as_bytes().into()),
        }
    }
}

impl Deref for Id {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Inline { len, bytes } => &bytes[..usize::from(*len)],
            Self::Heap(bytes) => bytes,
        }
    }
}

impl Hash for Id {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state);
    }
}

impl PartialEq for Id {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Id {}

impl scc::Equivalent<Id> for [u8] {
    fn equivalent(&self, id: &Id) -> bool {
        *self == **id
    }
}

/// Templates of ids: a number, and a UUID.
const NUMBER: [u8; 13] = *b"1000000000000";
const UUID: [u8; 36] = *b"00000000-0000-4000-8000-000000000000";

/// Calls `f` with the id of user number `user`, which is in the last 12 digits. Does not allocate.
pub(crate) fn with_id<R>(user: u64, id_bytes: usize, f: impl FnOnce(&str) -> R) -> R {
    let (mut number, mut uuid) = (NUMBER, UUID);
    let id = match id_bytes == UUID.len() {
        true => &mut uuid[..],
        false => &mut number[..],
    };
    let mut rest = user;
    for digit in id.iter_mut().rev().take(12) {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    f(std::str::from_utf8(id).unwrap_or_default())
}

/// A store of `count` users with every field set.
pub(crate) fn filled<G: Grades>(count: u64, id_bytes: usize) -> G {
    let grades = G::default();
    for user in 0..count {
        let mut changes = Changes::default();
        for field in 0..FIELD_COUNT {
            changes.set(field, user as i64 + field as i64);
        }
        with_id(user, id_bytes, |user_id| {
            grades.apply(&Patch { user_id, changes });
        });
    }
    grades
}

/// Checks that the store has `count` records and their digest, so that the benchmark measured real
/// work.
pub(crate) fn check<G: Grades>(grades: &G, count: u64) {
    let (mut seen, mut digest) = (0, Digest::default());
    grades.scan(|user_id, values| {
        let values = *values;
        seen += 1;
        digest += UserGrade { user_id, values }.digest();
    });
    assert_eq!((seen, digest), (count, grades.digest()));
}
