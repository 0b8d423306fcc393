//! Tests of the log's check: a consistent history, and the same with one fault at a time.

use std::collections::BTreeMap;
use std::panic::catch_unwind;

use super::checker::State;
use super::history::{Operation, Outcome, Record, user_id};
use super::order::Order;
use crate::harness::cluster::broker::{LoggedWrite, Write};

fn set(replica: usize, invoked: u64, value: i64, outcome: Outcome) -> Record {
    let fields = [Some(value), None, None, None];
    record(replica, invoked, Operation::Set { fields, outcome })
}

fn delete(replica: usize, invoked: u64, outcome: Outcome) -> Record {
    record(replica, invoked, Operation::Delete { outcome })
}

fn get(replica: usize, invoked: u64, position: Option<u64>, value: i64) -> Record {
    let found: State = (value != 0).then_some([value, 0, 0, 0]);
    record(replica, invoked, Operation::Get { position, found })
}

fn record(replica: usize, invoked: u64, operation: Operation) -> Record {
    Record {
        client: 0,
        replica,
        user: 0,
        invoked,
        returned: invoked + 1,
        operation,
    }
}

/// Whether a log with these values, one batch each, explains `records`; 0 is a deletion.
fn is_explained_by(values: &[i64], records: Vec<Record>) -> bool {
    let batch = |(index, value): (usize, &i64)| {
        let (user, field, value) = (user_id(0), 0, *value);
        let logged = match value {
            0 => LoggedWrite::Delete(user),
            _ => Write { user, field, value }.into(),
        };
        (index as u64 + 1, vec![logged])
    };
    let log: BTreeMap<u64, Vec<LoggedWrite>> = values.iter().enumerate().map(batch).collect();
    catch_unwind(|| Order::new(&records, &log).check()).is_ok()
}

#[test]
fn violations_of_the_log_order_are_found() {
    let written = |replica, invoked, value, position| {
        set(replica, invoked, value, Outcome::Written(position))
    };
    let unknown = |replica, invoked, value| set(replica, invoked, value, Outcome::Unknown);
    let two = || vec![written(0, 0, 1, 1), written(1, 10, 2, 2)];
    let with = |more: &[Record]| [two(), more.to_vec()].concat();

    assert!(is_explained_by(&[1, 2], two()));
    // Another replica may lag, but does not go back.
    assert!(is_explained_by(
        &[1, 2],
        with(&[get(2, 20, None, 0), get(2, 30, None, 2)])
    ));
    assert!(!is_explained_by(
        &[1, 2],
        with(&[get(2, 20, None, 2), get(2, 30, None, 1)])
    ));
    // A replica serves its own acknowledged writes, and the requested position.
    assert!(!is_explained_by(&[1, 2], with(&[get(1, 20, None, 1)])));
    assert!(is_explained_by(&[1, 2], with(&[get(2, 20, Some(1), 1)])));
    assert!(!is_explained_by(&[1, 2], with(&[get(2, 20, Some(2), 1)])));
    // Nothing is seen before its invocation, nor what is not in the log.
    assert!(!is_explained_by(&[1, 2], with(&[get(2, 5, None, 2)])));
    assert!(!is_explained_by(
        &[1, 2],
        with(&[unknown(0, 20, 3), get(2, 30, None, 3)])
    ));
    // A write with an unknown outcome may be in the log, at any place after its invocation.
    assert!(is_explained_by(&[1, 2, 3], with(&[unknown(0, 5, 3)])));
    let between = [written(0, 0, 1, 1), unknown(0, 5, 3), written(1, 10, 2, 3)];
    assert!(is_explained_by(&[1, 3, 2], between.to_vec()));
    assert!(!is_explained_by(&[1, 2, 3, 3], with(&[unknown(0, 5, 3)])));
    // A rejected write is not in the log.
    assert!(!is_explained_by(
        &[1, 2, 3],
        with(&[set(0, 5, 3, Outcome::NotWritten)])
    ));
    // An acknowledged write is, at its position, and in the order of time.
    assert!(!is_explained_by(&[1], two()));
    assert!(!is_explained_by(&[2, 1], two()));
    let swapped = vec![written(0, 0, 1, 2), written(1, 10, 2, 1)];
    assert!(!is_explained_by(&[2, 1], swapped));
}

#[test]
fn violations_by_deletions_are_found() {
    let written = |replica, invoked, value, position| {
        set(replica, invoked, value, Outcome::Written(position))
    };
    let deleted = |replica, invoked, position| delete(replica, invoked, Outcome::Written(position));
    let maybe = |invoked| delete(0, invoked, Outcome::Unknown);
    let three = || vec![written(0, 0, 1, 1), deleted(1, 10, 2), written(0, 20, 2, 3)];
    let with = |more: &[Record]| [three(), more.to_vec()].concat();
    let log = [1, 0, 2];

    assert!(is_explained_by(&log, three()));
    // There is no record before the first write and after the deletion, but there is one after the
    // second write.
    assert!(is_explained_by(
        &log,
        with(&[
            get(2, 30, None, 0),
            get(2, 40, None, 1),
            get(2, 50, None, 0),
            get(2, 60, None, 2)
        ])
    ));
    assert!(!is_explained_by(
        &log,
        with(&[get(2, 30, None, 2), get(2, 40, None, 0)])
    ));
    assert!(!is_explained_by(
        &log,
        with(&[
            get(2, 30, None, 1),
            get(2, 40, None, 0),
            get(2, 50, None, 1)
        ])
    ));
    // Neither the replica that acknowledged the deletion nor a read at its position shows the older
    // state.
    assert!(!is_explained_by(&log, with(&[get(1, 30, None, 1)])));
    assert!(is_explained_by(&log, with(&[get(1, 30, None, 0)])));
    assert!(is_explained_by(&log, with(&[get(2, 30, Some(2), 0)])));
    assert!(!is_explained_by(&log, with(&[get(2, 30, Some(2), 1)])));
    assert!(!is_explained_by(&log, with(&[get(2, 30, Some(3), 0)])));
    // It is not seen before its invocation.
    assert!(!is_explained_by(
        &log,
        with(&[get(2, 4, None, 1), get(2, 6, None, 0)])
    ));
    // It is in the log, at its position, once.
    assert!(!is_explained_by(&[1, 2], three()));
    assert!(!is_explained_by(&[0, 1, 2], three()));
    assert!(!is_explained_by(&[1, 0, 2, 0], three()));
    assert!(is_explained_by(&[1, 0, 2, 0], with(&[maybe(15)])));
    assert!(is_explained_by(&log, with(&[maybe(15)])));
    assert!(!is_explained_by(&[1, 0, 2, 0, 0], with(&[maybe(15)])));
    assert!(!is_explained_by(
        &[1, 0, 2, 0],
        with(&[delete(0, 15, Outcome::NotWritten)])
    ));
    // A write that was acknowledged before another was invoked precedes it.
    let swapped = vec![deleted(0, 0, 2), written(1, 10, 1, 1)];
    assert!(!is_explained_by(&[1, 0], swapped));
}
