//! What is true: every batch that any log ever took, and the state after each.

use std::collections::BTreeMap;
use std::sync::Arc;

use gradestore::grade::{Digest, FIELD_COUNT, UserGrade, Values, Write};
use gradestore::log::Seq;

/// The records after some batch, by a fold that knows nothing of the program's.
#[derive(Debug, Clone, Default)]
pub struct State(BTreeMap<Box<str>, Values>);

impl State {
    fn apply(&mut self, write: &Write) {
        let patch = match write {
            Write::Set(patch) => patch,
            Write::Delete(user_id) => {
                self.0.remove(user_id);
                return;
            }
        };
        let values = self
            .0
            .entry(patch.user_id.clone())
            .or_insert([0; FIELD_COUNT]);
        for (index, value) in patch.changes.iter() {
            values[index] = value;
        }
    }

    pub fn get(&self, user_id: &str) -> Option<&Values> {
        self.0.get(user_id)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn digest(&self) -> Digest {
        let mut sum = Digest::default();
        for (user_id, values) in &self.0 {
            let values = *values;
            sum += UserGrade {
                user_id: &**user_id,
                values,
            }
            .digest();
        }
        sum
    }
}

/// A batch at its place.
pub struct Place {
    pub seq: Seq,
    /// The time of the batch before it; what makes a place one of its log's.
    pub before_ns: u64,
    pub writes: Arc<[Write]>,
    pub state: Arc<State>,
    pub digest: Digest,
    /// Whether the broker lost it: by going back, or with its whole stream.
    pub lost: bool,
}

/// All places, by their time, which no two share.
pub struct Ledger {
    places: BTreeMap<u64, Place>,
    nothing: Arc<State>,
}

impl Ledger {
    pub fn new() -> Self {
        Self {
            places: BTreeMap::new(),
            nothing: Arc::default(),
        }
    }

    /// A batch was taken at `time_ns`, after the one of `before_ns` (0: it is a log's first).
    pub fn take(&mut self, time_ns: u64, before_ns: u64, seq: Seq, writes: Arc<[Write]>) {
        let mut state = match self.places.get(&before_ns) {
            Some(before) => State::clone(&before.state),
            None => State::default(),
        };
        writes.iter().for_each(|write| state.apply(write));
        let place = Place {
            seq,
            before_ns,
            writes,
            digest: state.digest(),
            state: Arc::new(state),
            lost: false,
        };
        self.places.insert(time_ns, place);
    }

    pub fn lose(&mut self, time_ns: u64) {
        if let Some(place) = self.places.get_mut(&time_ns) {
            place.lost = true;
        }
    }

    pub fn at(&self, time_ns: u64) -> Option<&Place> {
        self.places.get(&time_ns)
    }

    /// What a store at batch `seq`, taken at `time_ns`, must hold; `None` if no log has that place.
    pub fn state(&self, seq: Seq, time_ns: u64) -> Option<(&State, Digest)> {
        if seq == 0 {
            return Some((&self.nothing, Digest::default()));
        }
        let place = self.places.get(&time_ns).filter(|place| place.seq == seq)?;
        Some((&place.state, place.digest))
    }

    /// The time of batch `seq` in the log that goes to `time_ns`.
    pub fn before(&self, mut time_ns: u64, seq: Seq) -> Option<u64> {
        while let Some(place) = self.places.get(&time_ns) {
            match place.seq {
                found if found == seq => return Some(time_ns),
                found if found < seq => return None,
                _ => time_ns = place.before_ns,
            }
        }
        None
    }

    /// A batch that holds such a write, lost or not.
    pub fn anywhere(&self, is: impl Fn(&Write) -> bool) -> Option<Seq> {
        let mut places = self.places.values();
        places
            .find(|place| place.writes.iter().any(&is))
            .map(|place| place.seq)
    }
}
