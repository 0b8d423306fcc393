//! Whether a history is told by the log: its order is one in which everything that was asked and
//! answered makes sense.

use std::collections::{BTreeMap, HashMap};

use super::checker::{State, keys};
use super::history::{Asked, Outcome, REPLICAS, Record, USERS, user_id};
use crate::broker::Write;

/// A log and what clients recorded of it.
pub(crate) struct Order<'a> {
    records: &'a [Record],
    /// The writes in the log's order: the batch's position, and which record it is.
    places: Vec<(u64, usize)>,
    place_of: HashMap<usize, usize>,
    /// By user, what the record was before and after each of its writes, and the place of that.
    states: Vec<HashMap<State, Span>>,
}

/// A user's state holds from one place in the log until before another.
#[derive(Debug, Clone, Copy)]
struct Span {
    from: Option<usize>,
    until: usize,
}

impl<'a> Order<'a> {
    /// Finds each of the log's writes among the records: whole, once, and none that was refused.
    pub(crate) fn new(records: &'a [Record], log: &BTreeMap<u64, Vec<Write>>) -> Self {
        let mut sent = HashMap::new();
        for (index, record) in records.iter().enumerate() {
            if let Asked::Set { fields, .. } = &record.asked {
                sent.extend(keys(fields).map(|key| (key, index)));
            }
        }
        let mut places: Vec<(u64, usize)> = Vec::new();
        let mut found = vec![0; records.len()];
        for (position, write) in log
            .iter()
            .flat_map(|(at, writes)| writes.iter().map(move |w| (*at, w)))
        {
            let index = sent.get(&(write.field, write.value));
            let index = *index.unwrap_or_else(|| panic!("nobody sent {write:?} at {position}"));
            assert_eq!(write.user, user_id(records[index].user));
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
            let Asked::Set { fields, outcome } = &record.asked else {
                continue;
            };
            let whole = keys(fields).count();
            match outcome {
                Outcome::NotWritten => {
                    assert_eq!(found[index], 0, "refused and written: {record:?}")
                }
                Outcome::Unknown => {
                    assert!(found[index] == 0 || found[index] == whole, "{record:?}")
                }
                Outcome::Written(position) => {
                    assert_eq!(
                        found[index], whole,
                        "answered, and not written once: {record:?}"
                    );
                    let (here, _) = order.places[order.place_of[&index]];
                    assert_eq!(here, *position, "not where it was said to be: {record:?}");
                }
            }
        }
        order.fold();
        order
    }

    /// What each user's record was in turn. Each write sets values of its own, so no state comes
    /// twice.
    fn fold(&mut self) {
        let end = self.places.len();
        let mut now: Vec<(State, Option<usize>)> = vec![(None, None); USERS];
        for (place, (_, index)) in self.places.iter().enumerate() {
            let record = &self.records[*index];
            let Asked::Set { fields, .. } = &record.asked else {
                unreachable!("only writes are in the log");
            };
            let (state, from) = &mut now[record.user];
            let span = Span {
                from: *from,
                until: place,
            };
            self.states[record.user].insert(*state, span);
            let values = state.get_or_insert_default();
            for (field, value) in keys(fields) {
                values[field] = value;
            }
            *from = Some(place);
        }
        for (user, (state, from)) in now.into_iter().enumerate() {
            self.states[user].insert(state, Span { from, until: end });
        }
    }

    /// All that must hold.
    pub(crate) fn check(&self) {
        self.writes_are_in_the_order_of_time();
        self.positions_of_a_client_grow();
        for replica in 0..REPLICAS {
            self.a_replica_shows_a_growing_prefix(replica);
        }
        self.reads_see_the_position_they_asked_for();
    }

    /// A write that was answered before another was begun is before it in the log, whoever sent
    /// them and through whichever replica.
    fn writes_are_in_the_order_of_time(&self) {
        let mut latest: Option<&Record> = None;
        for (_, index) in &self.places {
            let record = &self.records[*index];
            if let Some(latest) = latest
                && written(record).is_some()
            {
                assert!(
                    record.ended >= latest.begun,
                    "the log has the first behind the second: {record:?} {latest:?}"
                );
            }
            latest = latest
                .filter(|latest| latest.begun >= record.begun)
                .or(Some(record));
        }
    }

    fn positions_of_a_client_grow(&self) {
        let mut by_client: BTreeMap<usize, Vec<&Record>> = BTreeMap::new();
        for record in self.records {
            by_client.entry(record.client).or_default().push(record);
        }
        for records in by_client.values_mut() {
            records.sort_by_key(|record| record.begun);
            let positions: Vec<u64> = records
                .iter()
                .filter_map(|record| written(record))
                .collect();
            assert!(
                positions.is_sorted_by(|before, after| before < after),
                "{positions:?}"
            );
        }
    }

    /// What a read has found, as a part of the log.
    fn span(&self, record: &Record, found: &State) -> Span {
        let span = self.states[record.user].get(found);
        *span.unwrap_or_else(|| panic!("the log never comes to this: {record:?}"))
    }

    /// All that a replica answers, to whomever and in all its lives, is of a beginning of the log
    /// that never gets shorter; it holds what the replica has answered, and nothing of what nobody
    /// has sent yet.
    fn a_replica_shows_a_growing_prefix(&self, replica: usize) {
        let here = |record: &&(usize, &Record)| record.1.replica == replica;
        let all: Vec<(usize, &Record)> = self.records.iter().enumerate().collect();
        let mut by_end: Vec<_> = all.iter().filter(here).copied().collect();
        by_end.sort_by_key(|(_, record)| record.ended);
        let mut by_begin = by_end.clone();
        by_begin.sort_by_key(|(_, record)| record.begun);
        // How far the replica must have come, and who says so.
        let mut least: Option<(usize, &Record)> = None;
        let mut ended = by_end.into_iter().peekable();
        for (_, record) in by_begin {
            while let Some((index, before)) =
                ended.next_if(|(_, before)| before.ended < record.begun)
            {
                let shown = match &before.asked {
                    Asked::Get { found, .. } => self.span(before, found).from,
                    Asked::Set {
                        outcome: Outcome::Written(_),
                        ..
                    } => Some(self.place_of[&index]),
                    Asked::Set { .. } => None,
                };
                let further = |place: &usize| least.is_none_or(|(least, _)| *place > least);
                if let Some(place) = shown.filter(further) {
                    least = Some((place, before));
                }
            }
            let Asked::Get { found, .. } = &record.asked else {
                continue;
            };
            let span = self.span(record, found);
            if let Some((place, before)) = least {
                assert!(
                    place < span.until,
                    "the second is of an earlier state of the replica: {before:?} {record:?}"
                );
            }
            if let Some(from) = span.from {
                let write = &self.records[self.places[from].1];
                assert!(
                    write.begun < record.ended,
                    "read before it was sent: {write:?} {record:?}"
                );
            }
        }
    }

    /// Read your own writes: a read that asks for a position finds all that the log holds up to it,
    /// whichever replica it asks.
    fn reads_see_the_position_they_asked_for(&self) {
        for record in self.records {
            let Asked::Get {
                position: Some(position),
                found,
            } = &record.asked
            else {
                continue;
            };
            let asked_for = self.places.partition_point(|(at, _)| at <= position);
            let span = self.span(record, found);
            assert!(
                asked_for <= span.until,
                "it does not hold what it asked for: {record:?}"
            );
        }
    }
}

/// The position of a write that was answered.
fn written(record: &Record) -> Option<u64> {
    match record.asked {
        Asked::Set {
            outcome: Outcome::Written(position),
            ..
        } => Some(position),
        _ => None,
    }
}
