use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::grade::{Changes, FIELD_COUNT, UserGrade};

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
    Apply(Vec<(String, Vec<(usize, i64)>)>),
    Remove(String),
    Put(String, [i64; FIELD_COUNT]),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let fields = prop::collection::vec((0..FIELD_COUNT, values()), 0..=FIELD_COUNT);
    let step = prop_oneof![
        3 => prop::collection::vec((ids(), fields), 0..40).prop_map(Step::Apply),
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
                Step::Apply(patches) => {
                    let together: Vec<_> =
                        patches.iter().map(|(id, fields)| patch(id, fields)).collect();
                    match &together[..] {
                        [alone] => store.apply(alone),
                        many => store.apply_all(many),
                    }
                    for (id, fields) in patches {
                        let values = model.entry(id.clone()).or_default();
                        for (index, value) in fields {
                            values[*index] = *value;
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
            for (id, values) in &model {
                prop_assert_eq!(store.get(id), Some(*values));
            }
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
    let sets = |users: std::ops::Range<i64>| -> Vec<_> {
        users
            .map(|user| patch(&id(user), &[(0, user), (1, -user << 40)]))
            .collect()
    };
    for begin in 0..10 {
        let begin = begin * 20_000;
        store.apply_all(&sets(begin..begin + 30_000));
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
    for user in 200_000..210_000 {
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
                let patches: Vec<_> = users
                    .map(|user| patch(&user.to_string(), &[(field, 7)]))
                    .collect();
                for _ in 0..50 {
                    store.apply_all(&patches);
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
