//! Tests of the checker: small histories with known answers, a comparison with all permutations,
//! and long generated histories.

use proptest::collection::vec;
use proptest::prelude::*;

use super::checker::{ChainEntry, Op, State, keys, linearizable, minimal_history};
use crate::harness::cluster::broker::FIELDS;

type Fields = [Option<i64>; FIELDS.len()];

fn op(invoked: u64, returned: impl Into<Option<u64>>, effect: ChainEntry) -> Op {
    Op {
        invoked,
        returned: returned.into(),
        effect,
        label: String::new(),
    }
}

/// Sets the first field.
fn set(invoked: u64, returned: impl Into<Option<u64>>, value: i64) -> Op {
    op(
        invoked,
        returned,
        ChainEntry::Set([Some(value), None, None, None]),
    )
}

fn delete(invoked: u64, returned: impl Into<Option<u64>>) -> Op {
    op(invoked, returned, ChainEntry::Delete)
}

/// Returns the first field, and 0 in the others; 0 is no record.
fn get(invoked: u64, returned: u64, value: i64) -> Op {
    let found = (value != 0).then_some([value, 0, 0, 0]);
    op(invoked, returned, ChainEntry::Get(found))
}

#[test]
fn linearizable_histories_are_accepted() {
    let both = ChainEntry::Set([Some(7), Some(8), None, None]);
    let histories = [
        vec![],
        vec![get(0, 1, 0), set(2, 3, 1), get(4, 5, 1), get(6, 7, 1)],
        // Concurrent writes, in either order.
        vec![set(0, 9, 1), set(0, 9, 2), get(2, 3, 1), get(4, 5, 2)],
        vec![set(0, 9, 1), set(0, 9, 2), get(2, 3, 2), get(4, 5, 1)],
        // Reads concurrent with a write, before it and after it.
        vec![set(0, 9, 1), get(1, 2, 0), get(3, 4, 1)],
        // A write with an unknown outcome: it takes effect late, or never.
        vec![
            set(0, None, 1),
            get(1, 2, 0),
            get(50, 51, 0),
            get(60, 61, 1),
        ],
        vec![set(0, None, 1), set(2, 3, 2), get(4, 5, 2), get(6, 7, 1)],
        vec![set(0, None, 1), set(2, 3, 2), get(4, 5, 2)],
        // The read returns after the write is invoked.
        vec![get(0, 9, 1), set(5, 6, 1)],
        // Two fields in one write, one of them overwritten concurrently.
        vec![
            op(0, 9, both),
            set(0, 9, 1),
            op(10, 11, ChainEntry::Get(Some([1, 8, 0, 0]))),
        ],
        // Deletions: concurrent with a write, after it, and of no record.
        vec![set(0, 1, 1), delete(2, 3), get(4, 5, 0), delete(6, 7)],
        vec![set(0, 9, 1), delete(0, 9), get(2, 3, 1), get(4, 5, 0)],
        vec![delete(0, 9), set(0, 9, 1), get(2, 3, 0), get(10, 11, 1)],
        // A field set before a deletion is not visible after a later write.
        vec![
            op(0, 1, ChainEntry::Set([Some(7), Some(8), None, None])),
            delete(2, 3),
            set(4, 5, 1),
            get(6, 7, 1),
        ],
        // Deletions with an unknown outcome: never, late, and two of them.
        vec![set(0, 1, 1), delete(0, None), get(2, 3, 1)],
        vec![set(0, 1, 1), delete(0, None), get(2, 3, 1), get(4, 5, 0)],
        vec![
            set(0, 1, 1),
            delete(0, None),
            delete(0, None),
            get(2, 3, 0),
            set(4, 5, 2),
            get(6, 7, 2),
            get(8, 9, 0),
        ],
    ];
    for history in histories {
        assert!(linearizable(&history), "{history:#?}");
    }
}

#[test]
fn other_histories_are_rejected_with_a_minimal_one() {
    let both = |invoked, returned| {
        op(
            invoked,
            returned,
            ChainEntry::Set([Some(7), Some(8), None, None]),
        )
    };
    let finds = |invoked, values| op(invoked, invoked + 1, ChainEntry::Get(Some(values)));
    let after = |invoked| {
        vec![
            both(invoked, Some(invoked + 1)),
            delete(invoked + 2, invoked + 3),
        ]
    };
    // Each with the length of its minimal failing history.
    let histories = [
        // An acknowledged write is lost.
        (vec![set(0, 1, 1), get(2, 3, 0)], 2),
        (vec![set(0, 1, 1), set(2, 3, 2), get(4, 5, 1)], 3),
        // The value was never written, or written later.
        (vec![set(0, 1, 1), get(2, 3, 5)], 1),
        (vec![get(0, 1, 1), set(2, 3, 1)], 1),
        // A read goes back in time.
        (vec![set(0, None, 1), get(1, 2, 1), get(3, 4, 0)], 3),
        (
            vec![
                set(0, 99, 1),
                set(0, 99, 2),
                get(2, 3, 1),
                get(4, 5, 2),
                get(6, 7, 1),
            ],
            5,
        ),
        // Half of a write is visible.
        (vec![both(0, Some(9)), finds(2, [7, 0, 0, 0])], 2),
        (vec![both(0, None), finds(2, [0, 8, 0, 0])], 2),
        // Two reads see two writes in different orders.
        (
            vec![
                both(0, None),
                set(0, None, 1),
                finds(3, [1, 8, 0, 0]),
                finds(5, [7, 8, 0, 0]),
            ],
            4,
        ),
        // An acknowledged deletion is lost, or removes half of a record.
        ([after(0), vec![finds(4, [7, 8, 0, 0])]].concat(), 3),
        ([after(0), vec![finds(4, [7, 0, 0, 0])]].concat(), 3),
        // A deleted field is visible after a later write.
        (
            [after(0), vec![set(4, 5, 1), finds(6, [1, 8, 0, 0])]].concat(),
            4,
        ),
        // No record, with fewer deletions than that takes.
        (
            vec![
                set(0, 1, 1),
                delete(0, None),
                get(2, 3, 0),
                set(4, 5, 2),
                get(6, 7, 0),
            ],
            5,
        ),
        // Deleted before the deletion was invoked.
        (vec![set(0, 1, 1), get(2, 3, 0), delete(4, None)], 2),
    ];
    for (history, enough) in histories {
        assert!(!linearizable(&history), "{history:#?}");
        let minimal = minimal_history(&history);
        assert!(!linearizable(&minimal));
        assert_eq!(minimal.len(), enough, "{minimal:#?}");
    }
}

#[test]
fn one_stale_read_in_a_long_history_is_found() {
    let mut history = Vec::new();
    for n in 1..=500 {
        let invoked = 10 * n as u64;
        history.extend([
            set(invoked, invoked + 12, n),
            get(invoked + 13, invoked + 14, n),
        ]);
    }
    assert!(linearizable(&history));
    history.push(get(3018, 3019, 298));
    assert!(!linearizable(&history));
    let describe: Vec<String> = minimal_history(&history)
        .iter()
        .map(Op::to_string)
        .collect();
    assert_eq!(describe.len(), 3, "{describe:#?}");
    assert!(
        describe[0].contains("sets {\"postpaid_limit\": 298}"),
        "{describe:#?}"
    );
    assert!(
        describe[2].contains("finds [298, 0, 0, 0]"),
        "{describe:#?}"
    );
}

/// Tries all permutations.
fn by_all_orders(left: &mut Vec<Op>, state: State) -> bool {
    if left.iter().all(|op| op.returned.is_none()) {
        return true;
    }
    for index in 0..left.len() {
        let first = left.remove(index);
        let too_late = left
            .iter()
            .any(|op| op.returned.is_some_and(|end| end < first.invoked));
        let next = match &first.effect {
            _ if too_late => None,
            ChainEntry::Get(found) => (*found == state).then_some(state),
            ChainEntry::Set(fields) => Some(Some(applied(state, fields))),
            ChainEntry::Delete => Some(None),
        };
        let found = next.is_some_and(|next| by_all_orders(left, next));
        left.insert(index, first);
        if found {
            return true;
        }
    }
    false
}

fn applied(state: State, fields: &Fields) -> [i64; FIELDS.len()] {
    let mut values = state.unwrap_or_default();
    for (field, value) in keys(fields) {
        values[field] = value;
    }
    values
}

/// Which fields a write sets.
fn fields() -> impl Strategy<Value = [bool; FIELDS.len()]> {
    any::<[bool; FIELDS.len()]>().prop_filter("sets something", |fields| fields.contains(&true))
}

/// Concurrent writes and reads; most reads see written values.
fn small_history() -> impl Strategy<Value = Vec<Op>> {
    // Two fields are enough for one write to overwrite half of another.
    let write = (
        0..8u64,
        1..8u64,
        any::<bool>(),
        // 0 deletes.
        prop_oneof![Just(0), Just(1), Just(2), Just(3)],
    );
    let read = (0..12u64, 1..8u64, 0..5i64, 0..5i64);
    (vec(write, 0..6), vec(read, 0..4)).prop_map(|(writes, reads)| {
        let writes = writes
            .into_iter()
            .enumerate()
            .map(|(n, (invoked, took, known, which))| {
                let value = |bit| (which & bit != 0).then_some(n as i64 + 1);
                let effect = match which {
                    0 => ChainEntry::Delete,
                    _ => ChainEntry::Set([value(1), value(2), None, None]),
                };
                op(invoked, known.then_some(invoked + took), effect)
            });
        let reads = reads.into_iter().map(|(invoked, took, one, other)| {
            let found = (one != 0 || other != 0).then_some([one, other, 0, 0]);
            op(invoked, invoked + took, ChainEntry::Get(found))
        });
        writes.chain(reads).collect()
    })
}

/// A linearizable history: operations take effect at moments 10 apart and overlap around them.
/// Writes with an unknown outcome may or may not have taken effect.
fn real_history() -> impl Strategy<Value = Vec<Op>> {
    let one = (proptest::option::of(fields()), 0..60u64, 0..60u64, 0..12u8);
    vec(one, 1..400).prop_map(|all| {
        let mut state = None;
        let mut history = Vec::new();
        for (n, (write, before, after, fate)) in all.into_iter().enumerate() {
            let moment = 100 + n as u64 * 10;
            let returned = (fate > 1).then_some(moment + after);
            let (returned, effect) = match write {
                Some(_) if fate >= 10 => {
                    if fate > 10 {
                        state = None;
                    }
                    ((fate > 10).then_some(moment + after), ChainEntry::Delete)
                }
                Some(which) => {
                    let fields = which.map(|set| set.then_some(n as i64 + 1));
                    if fate > 0 {
                        state = Some(applied(state, &fields));
                    }
                    (returned, ChainEntry::Set(fields))
                }
                None => (Some(moment + after), ChainEntry::Get(state)),
            };
            history.push(op(moment - before, returned, effect));
        }
        history
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_checker_agrees_with_all_permutations(history in small_history()) {
        let wanted = by_all_orders(&mut history.clone(), None);
        prop_assert_eq!(linearizable(&history), wanted);
        if !wanted {
            let minimal = minimal_history(&history);
            prop_assert!(!by_all_orders(&mut minimal.clone(), None), "{:#?}", minimal);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn long_histories_are_accepted_and_stale_reads_rejected(history in real_history()) {
        prop_assert!(linearizable(&history));
        // A read of a value that was certainly overwritten before the read.
        let end = 100 + 10 * history.len() as u64 + 60;
        let known = |op: &&Op| matches!(op.effect, ChainEntry::Set(_)) && op.returned.is_some();
        let mut overwritten = None;
        for old in history.iter().filter(known) {
            for new in history.iter().filter(known) {
                if let (ChainEntry::Set(before), ChainEntry::Set(after)) = (&old.effect, &new.effect)
                    && old.returned < Some(new.invoked)
                    && let Some((field, value)) = keys(before).find(|(field, _)| after[*field].is_some())
                {
                    overwritten = Some((field, value));
                }
            }
        }
        if let Some((field, value)) = overwritten {
            let mut values = [0; FIELDS.len()];
            values[field] = value;
            let mut wrong = history.clone();
            wrong.push(op(end, end + 1, ChainEntry::Get(Some(values))));
            prop_assert!(!linearizable(&wrong));
        }
    }
}
