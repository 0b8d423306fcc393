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

proptest! {
    /// Few ids, of all lengths around the inline limit, so that patches meet.
    #[test]
    fn equals_a_plain_map(patches in prop::collection::vec(
        ("[ab]{1,2}|[ab]{13,17}|é{100,102}", prop::collection::vec((0..FIELD_COUNT, any::<i64>()), 0..3)), 0..200,
    )) {
        let store = Store::new();
        let mut model: HashMap<String, Values> = HashMap::new();
        for (id, fields) in &patches {
            let patch = patch(id, fields);
            store.apply(&patch);
            let values = model.entry(id.clone()).or_default();
            for (index, value) in fields {
                values[*index] = *value;
            }
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
