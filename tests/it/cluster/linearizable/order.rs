//! Checks that the order of the log explains the recorded histories.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::checker::{State, keys};
use super::history::{Operation, Outcome, REPLICAS, Record, USERS, user_id};
use crate::harness::cluster::broker::LoggedWrite;

/// A log and the records of its clients.
pub(crate) struct Order<'a> {
    records: &'a [Record],
    /// The writes in the order of the log: position of the batch, index of the record.
    places: Vec<(u64, usize)>,
    place_of: HashMap<usize, usize>,
    /// By user, where in `places` each state is valid. Only the state without a record occurs more
    /// than once.
    states: Vec<HashMap<State, Vec<Span>>>,
}

/// The deletions of one history. They all look the same in the log.
#[derive(Default)]
struct Deletions {
    /// By user and position, those that were acknowledged.
    answered: HashMap<(String, u64), Vec<usize>>,
    /// By user, those with an unknown outcome, by invocation.
    unknown: HashMap<String, VecDeque<usize>>,
}

impl Deletions {
    fn of(records: &[Record]) -> Self {
        let mut deletions = Self::default();
        let mut by_invocation: Vec<usize> = (0..records.len()).collect();
        by_invocation.sort_by_key(|index| records[*index].invoked);
        for index in by_invocation {
            let Operation::Delete { outcome } = records[index].operation else {
                continue;
            };
            let user = user_id(records[index].user);
            match outcome {
                Outcome::Written(position) => {
                    let answered = deletions.answered.entry((user, position));
                    answered.or_default().push(index);
                }
                Outcome::Unknown => {
                    deletions.unknown.entry(user).or_default().push_back(index);
                }
                Outcome::NotWritten => {}
            }
        }
        deletions
    }

    /// The record of the next deletion of `user` in the log. Among several candidates, the one with
    /// the earliest invocation fits wherever the others do.
    fn next(&mut self, user: &str, position: u64) -> Option<usize> {
        let answered = self.answered.get_mut(&(user.to_owned(), position));
        let answered = answered.and_then(Vec::pop);
        answered.or_else(|| self.unknown.get_mut(user)?.pop_front())
    }
}

/// Where a state of a user is valid: from its write until before the next.
#[derive(Debug, Clone, Copy)]
struct Span {
    from: Option<usize>,
    until: usize,
}

impl<'a> Order<'a> {
    /// Finds each write of the log among the records: complete, once, and not rejected.
    pub(crate) fn new(records: &'a [Record], log: &BTreeMap<u64, Vec<LoggedWrite>>) -> Self {
        let mut sent = HashMap::new();
        for (index, record) in records.iter().enumerate() {
            if let Operation::Set { fields, .. } = &record.operation {
                sent.extend(keys(fields).map(|key| (key, index)));
            }
        }
        let mut deletions = Deletions::of(records);
        let mut places: Vec<(u64, usize)> = Vec::new();
        let mut found = vec![0; records.len()];
        for (position, write) in log
            .iter()
            .flat_map(|(at, writes)| writes.iter().map(move |w| (*at, w)))
        {
            let index = match write {
                LoggedWrite::Set(set) => sent.get(&(set.field, set.value)).copied(),
                LoggedWrite::Delete(user) => deletions.next(user, position),
            };
            let index = index.unwrap_or_else(|| panic!("no client sent {write:?} at {position}"));
            if let Some(set) = write.set() {
                assert_eq!(set.user, user_id(records[index].user));
            }
            found[index] += 1;
            if places.last() != Some(&(position, index)) {
                places.push((position, index));
            }
        }
        let place_of = (0..places.len()).map(|place| (places[place].1, place));
        let mut order = Self {
            records,
            place_of: place_of.collect(),
            places,
            states: vec![HashMap::new(); USERS],
        };
        for (index, record) in records.iter().enumerate() {
            let (whole, outcome) = match &record.operation {
                Operation::Set { fields, outcome } => (keys(fields).count(), outcome),
                Operation::Delete { outcome } => (1, outcome),
                Operation::Get { .. } => continue,
            };
            match outcome {
                Outcome::NotWritten => {
                    assert_eq!(found[index], 0, "rejected and stored: {record:?}")
                }
                Outcome::Unknown => {
                    assert!(found[index] == 0 || found[index] == whole, "{record:?}")
                }
                Outcome::Written(position) => {
                    assert_eq!(
                        found[index], whole,
                        "acknowledged and not stored once: {record:?}"
                    );
                    let (here, _) = order.places[order.place_of[&index]];
                    assert_eq!(
                        here, *position,
                        "not at its acknowledged position: {record:?}"
                    );
                }
            }
        }
        order.fold();
        order
    }

    /// The successive states of each user's record.
    fn fold(&mut self) {
        let end = self.places.len();
        let mut now: Vec<(State, Option<usize>)> = vec![(None, None); USERS];
        for (place, (_, index)) in self.places.iter().enumerate() {
            let record = &self.records[*index];
            let (state, from) = &mut now[record.user];
            let after = match &record.operation {
                Operation::Set { fields, .. } => {
                    let mut values = state.unwrap_or_default();
                    for (field, value) in keys(fields) {
                        values[field] = value;
                    }
                    Some(values)
                }
                Operation::Delete { .. } => None,
                Operation::Get { .. } => unreachable!("only writes are in the log"),
            };
            if after == *state {
                continue;
            }
            let span = Span {
                from: *from,
                until: place,
            };
            let spans = self.states[record.user].entry(*state);
            spans.or_default().push(span);
            (*state, *from) = (after, Some(place));
        }
        for (user, (state, from)) in now.into_iter().enumerate() {
            let spans = self.states[user].entry(state);
            spans.or_default().push(Span { from, until: end });
        }
    }

    /// Checks everything.
    pub(crate) fn check(&self) {
        self.writes_are_in_the_order_of_time();
        self.positions_of_a_client_grow();
        for replica in 0..REPLICAS {
            self.a_replica_shows_a_growing_prefix(replica);
        }
        self.reads_see_the_position_they_asked_for();
    }

    /// A write that was acknowledged before another was invoked precedes it in the log, whichever
    /// clients and replicas they used.
    fn writes_are_in_the_order_of_time(&self) {
        let mut latest: Option<&Record> = None;
        for (_, index) in &self.places {
            let record = &self.records[*index];
            if let Some(latest) = latest
                && acked_position(record).is_some()
            {
                assert!(
                    record.returned >= latest.invoked,
                    "the log has the first after the second: {record:?} {latest:?}"
                );
            }
            latest = latest
                .filter(|latest| latest.invoked >= record.invoked)
                .or(Some(record));
        }
    }

    fn positions_of_a_client_grow(&self) {
        let mut by_client: BTreeMap<usize, Vec<&Record>> = BTreeMap::new();
        for record in self.records {
            by_client.entry(record.client).or_default().push(record);
        }
        for records in by_client.values_mut() {
            records.sort_by_key(|record| record.invoked);
            let positions: Vec<u64> = records
                .iter()
                .filter_map(|record| acked_position(record))
                .collect();
            assert!(
                positions.is_sorted_by(|before, after| before < after),
                "{positions:?}"
            );
        }
    }

    /// Where in the log the result of a read is valid, the first span first.
    fn spans(&self, record: &Record, found: &State) -> &[Span] {
        let spans = self.states[record.user].get(found);
        spans.unwrap_or_else(|| panic!("the log never has this state: {record:?}"))
    }

    /// Everything that a replica returns, in all its lives, is a prefix of the log that never
    /// shrinks, includes its own acknowledged writes, and nothing that was not yet invoked.
    fn a_replica_shows_a_growing_prefix(&self, replica: usize) {
        let here = |record: &&(usize, &Record)| record.1.replica == replica;
        let all: Vec<(usize, &Record)> = self.records.iter().enumerate().collect();
        let mut by_return: Vec<_> = all.iter().filter(here).copied().collect();
        by_return.sort_by_key(|(_, record)| record.returned);
        let mut by_invocation = by_return.clone();
        by_invocation.sort_by_key(|(_, record)| record.invoked);
        // The least prefix that the replica must serve, and the record that proves it.
        let mut minimal: Option<(usize, &Record)> = None;
        // Where the result of each read starts to be valid.
        let mut found_from: HashMap<usize, Option<usize>> = HashMap::new();
        let mut returned = by_return.into_iter().peekable();
        for (index, record) in by_invocation {
            while let Some((index, before)) =
                returned.next_if(|(_, before)| before.returned < record.invoked)
            {
                let shown = match acked_position(before) {
                    Some(_) => Some(self.place_of[&index]),
                    None => found_from.get(&index).copied().flatten(),
                };
                let further = |place: &usize| minimal.is_none_or(|(minimal, _)| *place > minimal);
                if let Some(place) = shown.filter(further) {
                    minimal = Some((place, before));
                }
            }
            let Operation::Get { found, .. } = &record.operation else {
                continue;
            };
            let spans = self.spans(record, found).iter();
            let late_enough = |span: &&Span| minimal.is_none_or(|(place, _)| place < span.until);
            let Some(span) = spans.copied().find(|span| late_enough(&span)) else {
                let (_, before) = minimal.expect("only an older prefix can be missing");
                panic!("the second read an older state than the first: {before:?} {record:?}");
            };
            // The earliest write that the read can have seen.
            if let Some(from) = span.from {
                let write = &self.records[self.places[from].1];
                assert!(
                    write.invoked < record.returned,
                    "read before its invocation: {write:?} {record:?}"
                );
            }
            found_from.insert(index, span.from);
        }
    }

    /// Read your own writes: a read with a position sees all up to it, on any replica.
    fn reads_see_the_position_they_asked_for(&self) {
        for record in self.records {
            let Operation::Get {
                position: Some(position),
                found,
            } = &record.operation
            else {
                continue;
            };
            let asked_for = self.places.partition_point(|(at, _)| at <= position);
            let mut spans = self.spans(record, found).iter();
            assert!(
                spans.any(|span| asked_for <= span.until),
                "read an older state than its position: {record:?}"
            );
        }
    }
}

/// The position of an acknowledged write.
fn acked_position(record: &Record) -> Option<u64> {
    match record.operation.outcome() {
        Some(Outcome::Written(position)) => Some(position),
        _ => None,
    }
}
