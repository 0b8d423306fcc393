use std::collections::{BTreeMap, HashMap, HashSet};

use proptest::prelude::*;

use super::record::Record;
use super::*;
use crate::grade::{Changes, FIELD_COUNT, UserGrade, Values};

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

fn sets(patches: impl IntoIterator<Item = Patch<String>>) -> Vec<Write<String>> {
    patches.into_iter().map(Write::Set).collect()
}

fn scanned(store: &Store) -> Vec<(String, Values)> {
    let mut records = Vec::new();
    let mut scan = store.scan();
    let mut piece = Piece::default();
    while scan.next_into(&mut piece) {
        assert!(piece.len() <= Piece::RECORDS_MAX);
        records.extend(piece.iter().map(|(id, values)| (id.to_owned(), *values)));
    }
    records
}

/// Ids of every kind that a record tells apart, few enough to meet.
fn ids() -> impl Strategy<Value = String> {
    let uuid = "0{8}-0{4}-4000-8000-0{11}[ab]";
    prop_oneof![
        "[ab]{1,2}|[ab]{13,18}|é{100,102}",
        uuid,
        // What looks like a UUID and can't be made again from its bytes.
        "0{8}-0{4}-4000-8000-0{11}[AB]|\\{0{8}-0{4}-4000-8000-0{10}ab\\}|[ab]{36}|a{8}-a{27}",
        // The bytes of a UUID above, as an id of their own.
        Just("\0\0\0\0\0\0@\0\u{80}".to_owned()),
    ]
}

/// Values of every length, and those next to where one more byte is needed.
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
enum Step {
    Apply(Vec<Write<String>>),
    Remove(String),
    Put(String, [i64; FIELD_COUNT]),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let fields = prop::collection::vec((0..FIELD_COUNT, values()), 0..=FIELD_COUNT);
    let write = prop_oneof![
        4 => (ids(), fields).prop_map(|(id, fields)| Write::Set(patch(&id, &fields))),
        1 => ids().prop_map(Write::Delete),
    ];
    let step = prop_oneof![
        3 => prop::collection::vec(write, 0..40).prop_map(Step::Apply),
        2 => ids().prop_map(Step::Remove),
        1 => (ids(), prop::array::uniform(values())).prop_map(|(id, values)| Step::Put(id, values)),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    #[test]
    fn equals_a_plain_map(steps in steps()) {
        let store = Store::new();
        let mut model: HashMap<String, Values> = HashMap::new();
        for step in &steps {
            match step {
                Step::Apply(writes) => {
                    match &writes[..] {
                        [Write::Set(alone)] => store.apply(alone),
                        many => store.apply_all(many),
                    }
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
                Step::Remove(id) => {
                    prop_assert_eq!(store.remove(id), model.remove(id).is_some());
                }
                Step::Put(id, values) => {
                    let mut piece = Piece::default();
                    piece.push(id, *values);
                    prop_assert_eq!(store.put(&piece), piece.digest());
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

/// Enough in one shard that its index grows, wraps and has holes to close.
#[test]
fn records_are_found_while_others_come_and_go() {
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
fn two_threads_that_apply_many_at_once_both_come_to_an_end() {
    let store = Store::new();
    std::thread::scope(|scope| {
        for field in 0..2 {
            let store = &store;
            scope.spawn(move || {
                // One walks the users forwards, the other backwards.
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
fn a_scan_sees_who_stays_once_while_others_go_and_their_room_is_taken() {
    let store = Store::new();
    for user in 0..20_000 {
        store.apply(&patch(&format!("stays-{user}"), &[(0, user)]));
        store.apply(&patch(&format!("goes-{user}"), &[(0, user)]));
    }
    let mut scan = store.scan();
    let mut piece = Piece::default();
    let mut stayed = Vec::new();
    let mut gone = 0..20_000;
    while scan.next_into(&mut piece) {
        let stays = piece.iter().filter(|(id, _)| id.starts_with("stays-"));
        stayed.extend(stays.map(|(_, values)| values[0]));
        for user in gone.by_ref().take(1_000) {
            assert!(store.remove(&format!("goes-{user}")));
            store.apply(&patch(&format!("new-{user}"), &[]));
        }
    }
    stayed.sort_unstable();
    assert_eq!(stayed, (0..20_000).collect::<Vec<_>>());
    assert_eq!(gone, 20_000..20_000);
}

/// The digest of what a plain map holds.
fn digest_of(model: &BTreeMap<String, Values>) -> Digest {
    let mut digest = Digest::default();
    for (user_id, values) in model {
        let values = *values;
        digest += UserGrade { user_id, values }.digest();
    }
    digest
}

/// Ids of one shard, some so short that they stand in the key, others of several lengths.
fn ids_of_one_shard(count: usize) -> Vec<String> {
    let lengths = [8, 36, 15, 60, 14, 20];
    let store = Store::new();
    let ids = (0..).map(|n: usize| format!("{n:00$}", lengths[n % lengths.len()]));
    let ids = ids.filter(|id| store.sought(id).hashes.shard == store.sought("a").hashes.shard);
    ids.take(count).collect()
}

#[derive(Debug, Clone)]
enum OneShardStep {
    Set(String, Vec<(usize, i64)>),
    Remove(String),
    /// Puts a record with all its values.
    Put(String, Values),
    /// Begins a scan, or takes the next piece of the one that has begun.
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

/// A scan under way, and what must be true of what it shows.
struct Watched {
    scan: Scan,
    /// Who was there when it began, and has stayed.
    stayed: HashSet<String>,
    seen: HashSet<String>,
}

proptest! {
    #[test]
    fn equals_a_plain_map_from_which_records_are_removed(steps in prop::collection::vec(step(), 0..300)) {
        let store = Store::new();
        let mut model: BTreeMap<String, Values> = BTreeMap::new();
        let mut watched: Option<Watched> = None;
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
                    if let Some(watched) = &mut watched {
                        watched.stayed.remove(&id);
                    }
                }
                OneShardStep::Put(id, values) => {
                    let mut piece = Piece::default();
                    piece.push(&id, values);
                    store.put(&piece);
                    model.insert(id, values);
                }
                OneShardStep::Clear => {
                    store.clear();
                    model.clear();
                    // What it shows from here on was never there at one time.
                    watched = None;
                }
                OneShardStep::Scan(records) => {
                    let at = watched.get_or_insert_with(|| Watched {
                        scan: store.scan(),
                        stayed: model.keys().cloned().collect(),
                        seen: HashSet::new(),
                    });
                    let mut piece = Piece::of(records);
                    let more = at.scan.next_into(&mut piece);
                    for (id, values) in piece.iter() {
                        prop_assert_eq!(model.get(id), Some(values));
                        prop_assert!(at.seen.insert(id.to_owned()), "{} twice", id);
                    }
                    if !more {
                        prop_assert!(at.stayed.is_subset(&at.seen));
                        watched = None;
                    }
                }
            }
            prop_assert_eq!(store.len(), model.len());
            prop_assert_eq!(store.digest(), digest_of(&model));
        }
        drop(watched);
        for (id, values) in &model {
            prop_assert_eq!(store.get(id), Some(*values));
        }
        let records = scanned(&store);
        prop_assert_eq!(records.len(), model.len());
        prop_assert_eq!(records.into_iter().collect::<BTreeMap<_, _>>(), model);
    }
}

#[test]
fn who_is_removed_and_made_again_during_a_scan_comes_up_once_at_most() {
    let ids = ids_of_one_shard(600);
    let store = Store::new();
    for (value, id) in ids.iter().enumerate() {
        store.apply(&patch(id, &[(0, value as i64)]));
    }
    let mut scan = store.scan();
    let mut piece = Piece::of(100);
    let mut seen = Vec::new();
    while scan.next_into(&mut piece) {
        seen.extend(piece.iter().map(|(id, _)| id.to_owned()));
        // Two that have come up and two that have not leave and come back in another order; one
        // stays away.
        for back in [[0, 300, 1, 301], [2, 302, 3, 303]] {
            for at in back {
                assert!(store.remove(&ids[at]));
            }
            // Each would get the place of the last one that left.
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
    // The next one shows all that is there.
    assert_eq!(scanned(&store).len(), 599);
}

#[test]
fn what_removed_records_leave_is_reusable_until_new_ones_take_it() {
    const WIDE: i64 = i64::MIN;
    const RECORD: u64 = size_of::<Record>() as u64;
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
    // The places are taken again, the wide values are not: nothing is left for a new record.
    fill(0..2000, 1);
    assert_eq!(store.reusable_bytes(), 0);
    store.clear();
    assert_eq!(store.reusable_bytes(), 0);
}

#[test]
fn the_list_of_free_places_shrinks_as_they_are_taken() {
    let mut free = free::Free::default();
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
fn places_that_became_free_are_taken_again() {
    let ids = ids_of_one_shard(200);
    let store = Store::new();
    let places = || store.shard(store.sought("a").hashes.shard).read().places();
    let ids_bytes = || {
        store
            .shard(store.sought("a").hashes.shard)
            .read()
            .id_bytes()
    };
    for id in &ids {
        store.apply(&patch(id, &[(0, 1)]));
    }
    let before = (places(), ids_bytes(), store.digest());
    for round in 0..10 {
        // A scan that was given up holds nothing back.
        let mut scan = store.scan();
        assert!(scan.next_into(&mut Piece::of(1)));
        drop(scan);
        ids.iter().for_each(|id| assert!(store.remove(id)));
        assert_eq!((store.len(), store.digest()), (0, Digest::default()));
        assert!(!store.remove(&ids[round]));
        for id in ids.iter().rev() {
            // Nothing of who was in the place before shows through.
            store.apply(&patch(id, &[]));
            assert_eq!(store.get(id), Some(Values::default()));
            store.apply(&patch(id, &[(0, 1)]));
        }
        assert_eq!((places(), store.digest()), (before.0, before.2));
        // Those of ids that are no longer there are given back once they are many.
        assert!(ids_bytes() < before.1 + 2 * 16 * 1024, "{}", ids_bytes());
    }
}

#[test]
fn fields_set_from_many_threads_all_survive() {
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
fn a_patch_is_seen_whole_or_not_at_all() {
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
    let mut piece = Piece::default();
    let mut old = Vec::new();
    let mut new = 0;
    while scan.next_into(&mut piece) {
        old.extend(
            piece
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
fn a_likely_number_that_is_anothers_is_not_believed() {
    let store = Store::new();
    let first = store.sought("a");
    let other = (0..).map(|n| format!("{n}"));
    let other = other
        .filter(|id| store.sought(id).hashes.shard == first.hashes.shard)
        .take(2);
    let [second, absent] = other.collect::<Vec<_>>().try_into().unwrap();
    for id in ["a", &second] {
        store.apply(&patch(id, &[(0, 1)]));
    }
    for id in ["a", &second, &absent] {
        let sought = store.sought(id);
        for likely in [None, Some(0), Some(1)] {
            let mut shard = store.shard(sought.hashes.shard).write();
            let changes = patch(id, &[(1, 2)]).changes;
            shard.apply(&sought, likely, &changes, &store.0.hasher);
        }
    }
    assert_eq!(store.len(), 3);
    for (id, first) in [("a", 1), (&second, 1), (&absent, 0)] {
        let held = store.get(id).unwrap();
        assert_eq!(held[..2], [first, 2], "{id}");
    }
}

#[test]
fn who_comes_and_goes_during_a_scan_is_found_however_many_there_are() {
    let store = Store::new();
    let shard = store.sought("a").hashes.shard;
    let of_shard = |id: &String| store.sought(id).hashes.shard == shard;
    let ids: Vec<_> = (0..)
        .map(|n| n.to_string())
        .filter(of_shard)
        .take(300)
        .collect();
    for id in &ids[..3] {
        store.apply(&patch(id, &[(0, 1)]));
    }
    let mut scan = store.scan();
    let mut piece = Piece::of(1);
    assert!(scan.next_into(&mut piece));
    // Each takes a number of its own, since the scan is in their shard.
    for pair in ids.windows(2) {
        store.apply(&patch(&pair[1], &[(0, 2)]));
        assert!(store.remove(&pair[0]));
        assert_eq!(store.get(&pair[0]), None);
        assert_eq!(store.get(&pair[1]).map(|held| held[0]), Some(2));
    }
    drop(scan);
    store.reserve(1024 * 40);
    assert_eq!(store.len(), 1);
    assert_eq!(scanned(&store).len(), 1);
    assert!(store.get(&ids[299]).is_some());
}
