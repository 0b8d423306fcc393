use std::collections::{BTreeMap, HashMap, HashSet};

use proptest::prelude::*;

use super::index::Index;
use super::record::PackedRecord;
use super::*;
use crate::grade::{Changes, FIELD_COUNT, Patch, UserGrade, Values};

fn patch(user_id: &str, fields: &[(usize, i64)]) -> Patch<String> {
    let mut changes = Changes::default();
    for (index, value) in fields {
        changes.set(*index, *value);
    }
    Patch {
        user_id: user_id.to_owned(),
        changes,
    }
}

impl Store {
    /// Applies one patch.
    pub(crate) fn apply<S: AsRef<str>>(&self, patch: &Patch<S>) {
        let patch = Patch {
            user_id: patch.user_id.as_ref(),
            changes: patch.changes,
        };
        self.apply_all(&[Write::Set(patch)]);
    }

    /// Removes one record. Returns whether it existed.
    pub(crate) fn remove(&self, user_id: &str) -> bool {
        let existed = self.contains(user_id);
        self.apply_all(&[Write::Delete(user_id)]);
        existed
    }
}

fn sets(patches: impl IntoIterator<Item = Patch<String>>) -> Vec<Write<String>> {
    patches.into_iter().map(Write::Set).collect()
}

fn scanned(store: &Store) -> Vec<(String, Values)> {
    let mut records = Vec::new();
    let mut scan = store.scan();
    let mut batch = RecordBatch::default();
    while scan.next_into(&mut batch) {
        assert!(batch.len() <= RecordBatch::RECORDS_MAX);
        records.extend(batch.iter().map(|(id, values)| (id.to_owned(), *values)));
    }
    records
}

/// Ids of every kind, few enough to repeat.
fn ids() -> impl Strategy<Value = String> {
    let uuid = "0{8}-0{4}-4000-8000-0{11}[ab]";
    prop_oneof![
        "[ab]{1,2}|[ab]{13,18}|é{100,102}",
        uuid,
        // Like a UUID, but not in the canonical form.
        "0{8}-0{4}-4000-8000-0{11}[AB]|\\{0{8}-0{4}-4000-8000-0{10}ab\\}|[ab]{36}|a{8}-a{27}",
        // The bytes of a UUID above, as text.
        Just("\0\0\0\0\0\0@\0\u{80}".to_owned()),
    ]
}

/// Values of every length, and those around each change of length.
fn values() -> impl Strategy<Value = i64> {
    let edges = (0_u32..64, -2_i64..=2).prop_map(|(bit, near)| (1_i64 << bit).wrapping_add(near));
    prop_oneof![
        any::<i64>(),
        edges.clone(),
        edges.prop_map(i64::wrapping_neg),
        -3_i64..200
    ]
}

#[derive(Debug, Clone)]
enum StoreStep {
    Apply(Vec<Write<String>>),
    Remove(String),
    Put(String, [i64; FIELD_COUNT]),
}

fn steps() -> impl Strategy<Value = Vec<StoreStep>> {
    let fields = prop::collection::vec((0..FIELD_COUNT, values()), 0..=FIELD_COUNT);
    let write = prop_oneof![
        4 => (ids(), fields).prop_map(|(id, fields)| Write::Set(patch(&id, &fields))),
        1 => ids().prop_map(Write::Delete),
    ];
    let step = prop_oneof![
        3 => prop::collection::vec(write, 0..40).prop_map(StoreStep::Apply),
        2 => ids().prop_map(StoreStep::Remove),
        1 => (ids(), prop::array::uniform(values())).prop_map(|(id, values)| StoreStep::Put(id, values)),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    #[test]
    fn matches_a_hash_map(steps in steps()) {
        let store = Store::new();
        let mut model: HashMap<String, Values> = HashMap::new();
        for step in &steps {
            match step {
                StoreStep::Apply(writes) => {
                    store.apply_all(writes);
                    for write in writes {
                        match write {
                            Write::Set(patch) => patch
                                .changes
                                .apply_to(model.entry(patch.user_id.clone()).or_default()),
                            Write::Delete(id) => {
                                model.remove(id);
                            }
                        }
                    }
                }
                StoreStep::Remove(id) => {
                    prop_assert_eq!(store.remove(id), model.remove(id).is_some());
                }
                StoreStep::Put(id, values) => {
                    let mut batch = RecordBatch::default();
                    batch.push(id, *values);
                    prop_assert_eq!(store.put(&batch), batch.digest());
                    model.insert(id.clone(), *values);
                }
            }
        }
        for (id, values) in &model {
            prop_assert_eq!(store.get(id), Some(*values));
        }
        prop_assert_eq!(store.len(), model.len());
        prop_assert_eq!(store.get("c"), None);
        let mut digest = Digest::default();
        for (user_id, values) in &model {
            let values = *values;
            digest += UserGrade { user_id, values }.digest();
        }
        prop_assert_eq!(store.digest(), digest);
        let records = scanned(&store);
        prop_assert_eq!(records.len(), model.len());
        prop_assert_eq!(records.into_iter().collect::<HashMap<_, _>>(), model);
    }
}

/// Enough records in a shard that its index grows, wraps around and shifts entries back.
#[test]
fn records_are_found_while_others_are_inserted_and_removed() {
    let store = Store::new();
    let long = "x".repeat(200);
    let id = |user: i64| match user % 3 {
        0 => format!("{user}"),
        1 => format!("{user:08x}-0000-4000-8000-000000000000"),
        _ => format!("{long}{user}"),
    };
    let writes = |users: std::ops::Range<i64>| {
        sets(users.map(|user| patch(&id(user), &[(0, user), (1, -user << 40)])))
    };
    for begin in 0..3 {
        let begin = begin * 20_000;
        store.apply_all(&writes(begin..begin + 30_000));
        for user in begin..begin + 20_000 {
            assert!(store.remove(&id(user)), "{user}");
            assert!(!store.remove(&id(user)), "{user}");
        }
        for user in begin + 20_000..begin + 30_000 {
            let mut values = Values::default();
            values[0] = user;
            values[1] = -user << 40;
            assert_eq!(store.get(&id(user)), Some(values), "{user}");
        }
        assert_eq!(store.len(), 10_000);
        assert_eq!(scanned(&store).len(), 10_000);
    }
    for user in 60_000..70_000 {
        assert!(store.remove(&id(user)));
    }
    assert!(store.is_empty());
    assert_eq!(store.digest(), Digest::default());
    assert_eq!(scanned(&store), []);
}

#[test]
fn concurrent_batches_do_not_deadlock() {
    let store = Store::new();
    std::thread::scope(|scope| {
        for field in 0..2 {
            let store = &store;
            scope.spawn(move || {
                // One thread applies in ascending order, the other in descending order.
                let users = (0..2_000).map(|user| if field == 0 { user } else { 1_999 - user });
                let writes = sets(users.map(|user| patch(&user.to_string(), &[(field, 7)])));
                for _ in 0..50 {
                    store.apply_all(&writes);
                }
            });
        }
    });
    for user in 0..2_000 {
        let values = store.get(&user.to_string()).unwrap();
        assert_eq!((values[0], values[1]), (7, 7));
    }
}

#[test]
fn a_scan_sees_each_record_once_while_others_are_replaced() {
    let store = Store::new();
    for user in 0..20_000 {
        store.apply(&patch(&format!("kept-{user}"), &[(0, user)]));
        store.apply(&patch(&format!("removed-{user}"), &[(0, user)]));
    }
    let mut scan = store.scan();
    let mut batch = RecordBatch::default();
    let mut stayed = Vec::new();
    let mut removed = 0..20_000;
    while scan.next_into(&mut batch) {
        let kept = batch.iter().filter(|(id, _)| id.starts_with("kept-"));
        stayed.extend(kept.map(|(_, values)| values[0]));
        for user in removed.by_ref().take(1_000) {
            assert!(store.remove(&format!("removed-{user}")));
            store.apply(&patch(&format!("new-{user}"), &[]));
        }
    }
    stayed.sort_unstable();
    assert_eq!(stayed, (0..20_000).collect::<Vec<_>>());
    assert_eq!(removed, 20_000..20_000);
}

/// The digest of the records in a map.
fn digest_of(model: &BTreeMap<String, Values>) -> Digest {
    let mut digest = Digest::default();
    for (user_id, values) in model {
        let values = *values;
        digest += UserGrade { user_id, values }.digest();
    }
    digest
}

/// Ids of one shard of `store`, of several lengths: inline, UUID-sized and long ones.
fn ids_of_one_shard_of(store: &Store, count: usize) -> Vec<String> {
    let lengths = [8, 36, 15, 60, 14, 20];
    let ids = (0..).map(|n: usize| format!("{n:00$}", lengths[n % lengths.len()]));
    let ids = ids.filter(|id| store.lookup(id).hashes.shard == store.lookup("a").hashes.shard);
    ids.take(count).collect()
}

/// A store whose shard of "a" has [`ids_of_one_shard`].
fn store_of_one_shard() -> Store {
    Store::with_shard_seed(0)
}

fn ids_of_one_shard(count: usize) -> Vec<String> {
    ids_of_one_shard_of(&store_of_one_shard(), count)
}

fn largest_shard(store: &Store) -> usize {
    let shards = store.0.shards.iter();
    shards.map(|shard| shard.0.read().len()).max().unwrap()
}

/// The ids of one shard of a store are spread over the shards of any other.
#[test]
fn nobody_can_choose_ids_of_one_shard() {
    let (known, other) = (Store::new(), Store::new());
    let ids = ids_of_one_shard_of(&known, 2 * SHARD_COUNT);
    for id in &ids {
        known.apply(&patch(id, &[]));
        other.apply(&patch(id, &[]));
    }
    assert_eq!(largest_shard(&known), ids.len());
    // Two on average. One store in 10^13 has a shard with twenty.
    assert!(largest_shard(&other) < 20, "{}", largest_shard(&other));
    assert_ne!(known.shard_seed(), other.shard_seed());
    // The seed of a store that has been used does not change.
    other.set_shard_seed(known.shard_seed());
    assert_ne!(known.shard_seed(), other.shard_seed());
}

#[derive(Debug, Clone)]
enum OneShardStep {
    Set(String, Vec<(usize, i64)>),
    Remove(String),
    Put(String, Values),
    /// Starts a scan, or takes the next batch of a running one.
    Scan(usize),
    Clear,
}

fn step() -> impl Strategy<Value = OneShardStep> {
    let ids = ids_of_one_shard(20);
    let id = || prop::sample::select(ids.clone());
    let fields = prop::collection::vec((0..FIELD_COUNT, any::<i64>()), 0..3);
    prop_oneof![
        8 => (id(), fields).prop_map(|(id, fields)| OneShardStep::Set(id, fields)),
        6 => id().prop_map(OneShardStep::Remove),
        1 => (id(), any::<Values>()).prop_map(|(id, values)| OneShardStep::Put(id, values)),
        4 => (1..4_usize).prop_map(OneShardStep::Scan),
        1 => Just(OneShardStep::Clear),
    ]
}

/// Hashes that collide: in their first bucket, at both ends of an index, and in all bits.
fn hash() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(u64::MAX),
        (0_u64..4).prop_map(|low| u64::MAX - low),
        (0_u64..4).prop_map(|high| high << 62),
        any::<u64>(),
    ]
}

proptest! {
    /// An index that grows while entries are inserted, removed and found, some with equal hashes.
    #[test]
    fn an_index_with_colliding_hashes_matches_a_list(
        steps in prop::collection::vec((hash(), any::<prop::sample::Index>(), 0..3_u8), 0..400),
    ) {
        let mut index = Index::with_capacity(0);
        // The hash of each slot, and whether the slot is in the index.
        let mut slots: Vec<(u64, bool)> = Vec::new();
        for (hash, at, action) in steps {
            if action > 0 {
                if slots.len() >= index.capacity() {
                    let mut larger = Index::with_capacity(index.next_capacity());
                    for (slot, (hash, held)) in slots.iter().enumerate() {
                        if *held {
                            larger.insert(*hash, slot as u32);
                        }
                    }
                    index = larger;
                }
                index.insert(hash, slots.len() as u32);
                slots.push((hash, true));
            } else if !slots.is_empty() {
                let slot = at.index(slots.len());
                let (hash, held) = slots[slot];
                let removed = index.remove(hash, |found| found as usize == slot, |of| slots[of as usize].0);
                prop_assert_eq!(removed, held.then_some(slot as u32));
                slots[slot].1 = false;
            }
            for (slot, (hash, held)) in slots.iter().enumerate() {
                let found = index.find(*hash, |found| found as usize == slot);
                prop_assert_eq!(found, held.then_some(slot as u32));
            }
        }
    }
}

/// A running scan, and the records that it must return.
struct ScanCheck {
    scan: Scan,
    /// The ids that existed all the time since it began.
    stayed: HashSet<String>,
    seen: HashSet<String>,
}

proptest! {
    #[test]
    fn one_shard_matches_a_map_under_removals_and_scans(steps in prop::collection::vec(step(), 0..300)) {
        let store = store_of_one_shard();
        let mut model: BTreeMap<String, Values> = BTreeMap::new();
        let mut checked: Option<ScanCheck> = None;
        for step in steps {
            match step {
                OneShardStep::Set(id, fields) => {
                    store.apply(&patch(&id, &fields));
                    let values = model.entry(id).or_default();
                    for (index, value) in fields {
                        values[index] = value;
                    }
                }
                OneShardStep::Remove(id) => {
                    prop_assert_eq!(store.remove(&id), model.remove(&id).is_some());
                    prop_assert_eq!(store.get(&id), None);
                    if let Some(checked) = &mut checked {
                        checked.stayed.remove(&id);
                    }
                }
                OneShardStep::Put(id, values) => {
                    let mut batch = RecordBatch::default();
                    batch.push(&id, values);
                    store.put(&batch);
                    model.insert(id, values);
                }
                OneShardStep::Clear => {
                    store.clear();
                    model.clear();
                    // From here on the scan mixes two states.
                    checked = None;
                }
                OneShardStep::Scan(records) => {
                    let at = checked.get_or_insert_with(|| ScanCheck {
                        scan: store.scan(),
                        stayed: model.keys().cloned().collect(),
                        seen: HashSet::new(),
                    });
                    let mut batch = RecordBatch::with_max(records);
                    let more = at.scan.next_into(&mut batch);
                    for (id, values) in batch.iter() {
                        prop_assert_eq!(model.get(id), Some(values));
                        prop_assert!(at.seen.insert(id.to_owned()), "{} twice", id);
                    }
                    if !more {
                        prop_assert!(at.stayed.is_subset(&at.seen));
                        checked = None;
                    }
                }
            }
            prop_assert_eq!(store.len(), model.len());
            prop_assert_eq!(store.digest(), digest_of(&model));
        }
        drop(checked);
        for (id, values) in &model {
            prop_assert_eq!(store.get(id), Some(*values));
        }
        let records = scanned(&store);
        prop_assert_eq!(records.len(), model.len());
        prop_assert_eq!(records.into_iter().collect::<BTreeMap<_, _>>(), model);
    }
}

#[test]
fn a_scan_sees_a_reinserted_record_at_most_once() {
    let ids = ids_of_one_shard(600);
    let store = store_of_one_shard();
    for (value, id) in ids.iter().enumerate() {
        store.apply(&patch(id, &[(0, value as i64)]));
    }
    let mut scan = store.scan();
    let mut batch = RecordBatch::with_max(100);
    let mut seen = Vec::new();
    while scan.next_into(&mut batch) {
        seen.extend(batch.iter().map(|(id, _)| id.to_owned()));
        // Removes two that the scan has seen and two that it has not, and inserts them in another
        // order. One is only removed.
        for back in [[0, 300, 1, 301], [2, 302, 3, 303]] {
            for at in back {
                assert!(store.remove(&ids[at]));
            }
            // Each would get the slot of the last one that was removed.
            for at in back {
                store.apply(&patch(&ids[at], &[(1, 1)]));
            }
        }
        store.remove(&ids[599]);
    }
    let unique: HashSet<&String> = seen.iter().collect();
    assert_eq!(unique.len(), seen.len());
    let stayed = |at: &usize| !matches!(at, 0..=3 | 300..=303 | 599);
    for at in (0..600).filter(stayed) {
        assert!(unique.contains(&ids[at]), "{at}");
    }
    assert_eq!(store.len(), 599);
    // The next scan sees all.
    assert_eq!(scanned(&store).len(), 599);
}

#[test]
fn free_slots_count_as_reusable_until_they_are_taken() {
    const WIDE: i64 = i64::MIN;
    const RECORD: u64 = size_of::<PackedRecord>() as u64;
    const WIDE_VALUES: u64 = size_of::<Values>() as u64;
    let store = Store::new();
    let fill = |users: std::ops::Range<u64>, value| {
        for user in users {
            let fields: Vec<_> = (0..FIELD_COUNT).map(|field| (field, value)).collect();
            store.apply(&patch(&format!("user-{user}"), &fields));
        }
    };
    fill(0..1000, WIDE);
    fill(1000..2000, 1);
    assert_eq!(store.reusable_bytes(), 0);
    for user in 0..1000 {
        assert!(store.contains(&format!("user-{user}")));
        assert!(store.remove(&format!("user-{user}")));
        assert!(!store.contains(&format!("user-{user}")));
    }
    assert_eq!(store.reusable_bytes(), 1000 * (RECORD + WIDE_VALUES));
    for user in 1000..2000 {
        assert!(store.remove(&format!("user-{user}")));
    }
    let reusable = store.reusable_bytes();
    assert!(reusable >= 2000 * RECORD + 1000 * WIDE_VALUES, "{reusable}");
    // The slots are taken again, the wide values are not: nothing is left for a new record.
    fill(0..2000, 1);
    assert_eq!(store.reusable_bytes(), 0);
    store.clear();
    assert_eq!(store.reusable_bytes(), 0);
}

#[test]
fn the_free_list_shrinks_as_slots_are_taken() {
    let mut free = free_list::FreeList::default();
    let mut items = vec![0; 10_000];
    (0..10_000).for_each(|number| free.push(number));
    assert!(free.capacity() < 10_000 + 10_000 / 3);
    for _ in 0..10_000 {
        free.insert(&mut items, 1, Growth::default());
    }
    assert_eq!((free.len(), items.len()), (0, 10_000));
    assert!(free.capacity() <= 64, "{}", free.capacity());
}

#[test]
fn free_slots_are_reused() {
    let ids = ids_of_one_shard(200);
    let store = store_of_one_shard();
    let slots = || store.shard(store.lookup("a").hashes.shard).read().slots();
    let ids_bytes = || {
        store
            .shard(store.lookup("a").hashes.shard)
            .read()
            .id_bytes()
    };
    for id in &ids {
        store.apply(&patch(id, &[(0, 1)]));
    }
    let before = (slots(), ids_bytes(), store.digest());
    for round in 0..10 {
        // A dropped scan does not prevent reuse.
        let mut scan = store.scan();
        assert!(scan.next_into(&mut RecordBatch::with_max(1)));
        drop(scan);
        ids.iter().for_each(|id| assert!(store.remove(id)));
        assert_eq!((store.len(), store.digest()), (0, Digest::default()));
        assert!(!store.remove(&ids[round]));
        for id in ids.iter().rev() {
            // The values of the previous record in the slot are gone.
            store.apply(&patch(id, &[]));
            assert_eq!(store.get(id), Some(Values::default()));
            store.apply(&patch(id, &[(0, 1)]));
        }
        assert_eq!((slots(), store.digest()), (before.0, before.2));
        // The bytes of removed ids are freed once they are many.
        assert!(ids_bytes() < before.1 + 2 * 16 * 1024, "{}", ids_bytes());
    }
}

#[test]
fn concurrent_patches_keep_all_fields() {
    let store = Store::new();
    std::thread::scope(|scope| {
        for field in 0..FIELD_COUNT {
            let store = &store;
            scope.spawn(move || {
                for round in 1..=50 {
                    for user in 0..200 {
                        store.apply(&patch(&format!("user-{user}"), &[(field, round)]));
                    }
                }
            });
        }
    });
    assert_eq!(store.len(), 200);
    for user in 0..200 {
        assert_eq!(store.get(&format!("user-{user}")), Some([50; FIELD_COUNT]));
    }
}

#[test]
fn readers_see_a_patch_atomically() {
    let store = Store::new();
    let all = |value| {
        patch(
            "one",
            &(0..FIELD_COUNT).map(|f| (f, value)).collect::<Vec<_>>(),
        )
    };
    store.apply(&all(0));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for value in 1..=100_000 {
                store.apply(&all(value));
            }
        });
        let mut last = 0;
        while !writer.is_finished() {
            let values = store.get("one").unwrap();
            assert_eq!(values, [values[0]; FIELD_COUNT]);
            assert!(values[0] >= last);
            last = values[0];
        }
    });
}

#[test]
fn a_scan_sees_each_old_record_once_while_the_store_grows() {
    let store = Store::new();
    for user in 0..20_000 {
        store.apply(&patch(&format!("old-{user:020}"), &[(0, user)]));
    }
    let mut scan = store.scan();
    let mut batch = RecordBatch::default();
    let mut old = Vec::new();
    let mut new = 0;
    while scan.next_into(&mut batch) {
        old.extend(
            batch
                .iter()
                .filter(|(id, _)| id.starts_with("old-"))
                .map(|(_, values)| values[0]),
        );
        for _ in 0..2_000 {
            store.apply(&patch(&format!("new-{new}"), &[]));
            new += 1;
        }
    }
    old.sort_unstable();
    assert_eq!(old, (0..20_000).collect::<Vec<_>>());
    assert_eq!(store.len(), 20_000 + new);
}

#[test]
fn a_slot_hint_of_another_record_is_ignored() {
    let store = Store::new();
    let first = store.lookup("a");
    let other = (0..).map(|n| format!("{n}"));
    let other = other
        .filter(|id| store.lookup(id).hashes.shard == first.hashes.shard)
        .take(2);
    let [second, absent] = other.collect::<Vec<_>>().try_into().unwrap();
    for id in ["a", &second] {
        store.apply(&patch(id, &[(0, 1)]));
    }
    for id in ["a", &second, &absent] {
        let lookup = store.lookup(id);
        for slot_hint in [None, Some(0), Some(1)] {
            let mut shard = store.shard(lookup.hashes.shard).write();
            let changes = patch(id, &[(1, 2)]).changes;
            shard.apply(&lookup, slot_hint, &changes, &store.0.hasher);
        }
    }
    assert_eq!(store.len(), 3);
    for (id, first) in [("a", 1), (&second, 1), (&absent, 0)] {
        let values = store.get(id).unwrap();
        assert_eq!(values[..2], [first, 2], "{id}");
    }
}

#[test]
fn records_inserted_during_a_scan_are_found() {
    let store = Store::new();
    let shard = store.lookup("a").hashes.shard;
    let of_shard = |id: &String| store.lookup(id).hashes.shard == shard;
    let ids: Vec<_> = (0..)
        .map(|n| n.to_string())
        .filter(of_shard)
        .take(300)
        .collect();
    for id in &ids[..3] {
        store.apply(&patch(id, &[(0, 1)]));
    }
    let mut scan = store.scan();
    let mut batch = RecordBatch::with_max(1);
    assert!(scan.next_into(&mut batch));
    // Each takes a new slot, because the scan is in their shard.
    for pair in ids.windows(2) {
        store.apply(&patch(&pair[1], &[(0, 2)]));
        assert!(store.remove(&pair[0]));
        assert_eq!(store.get(&pair[0]), None);
        assert_eq!(store.get(&pair[1]).map(|values| values[0]), Some(2));
    }
    drop(scan);
    store.reserve(1024 * 40);
    assert_eq!(store.len(), 1);
    assert_eq!(scanned(&store).len(), 1);
    assert!(store.get(&ids[299]).is_some());
}
