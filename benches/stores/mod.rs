//! The two stores that are compared, behind one trait, and the users that fill them.

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
    /// Shows every record.
    fn scan(&self, see: impl FnMut(&str, &Values));
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

    fn scan(&self, mut see: impl FnMut(&str, &Values)) {
        let mut scan = self.scan();
        let mut batch = RecordBatch::default();
        while scan.next_into(&mut batch) {
            batch.iter().for_each(|(id, values)| see(id, values));
        }
    }

    fn digest(&self) -> Digest {
        self.digest()
    }
}

/// The same records in `scc::HashMap`: same hasher, same digest, short ids without an allocation.
pub(crate) struct Scc {
    map: scc::HashMap<Id, Values, RandomState>,
    /// As many sums as the store has shards, so that threads seldom meet at one.
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
            // Any of the sums will do: they wrap, and are only ever added up.
            let at = new.0 as usize % self.digests.len();
            self.digests[at].lock().replace(old, new);
        };
        // Updates first, since an entry wants an id of its own even if there is one.
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

    fn scan(&self, mut see: impl FnMut(&str, &Values)) {
        self.map.iter_sync(|id, values| {
            see(std::str::from_utf8(id).unwrap_or_default(), values);
            true
        });
    }

    fn digest(&self) -> Digest {
        let mut sum = Digest::default();
        self.digests.iter().for_each(|part| sum += *part.lock());
        sum
    }
}

/// A user id in 24 bytes: up to 22 of them in place, else on the heap.
enum Id {
    Inline { len: u8, bytes: [u8; 22] },
    Heap(Box<[u8]>),
}

const _: () = assert!(size_of::<Id>() == 24);

impl From<&str> for Id {
    fn from(id: &str) -> Self {
        let mut bytes = [0; 22];
        match bytes.get_mut(..id.len()) {
            Some(room) => {
                room.copy_from_slice(id.as_bytes());
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

/// What ids look like: a number, or a UUID where they are as long as one.
const NUMBER: [u8; 13] = *b"1000000000000";
const UUID: [u8; 36] = *b"00000000-0000-4000-8000-000000000000";

/// Calls `with` on the id of the `user`th user, a number in its last 12 of `id_bytes` bytes;
/// allocates nothing.
pub(crate) fn with_id<R>(user: u64, id_bytes: usize, with: impl FnOnce(&str) -> R) -> R {
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
    with(std::str::from_utf8(id).unwrap_or_default())
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

/// That the store holds `count` records and the digest that is theirs: what was measured did its
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
