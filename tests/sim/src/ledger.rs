//! What is true: every batch that any log ever took, and the state after each.

use std::collections::BTreeMap;
use std::sync::Arc;

use gradestore::grade::{Digest, FIELD_COUNT, UserGrade, Values, Write};
use gradestore::log::{Chain, Position, Seq};

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
    pub position: Position,
    pub writes: Arc<[Write]>,
    pub state: Arc<State>,
    pub digest: Digest,
    /// Whether the broker lost it: by going back, or with its whole stream.
    pub lost: bool,
}

/// All places, by their chain.
pub struct Ledger {
    places: BTreeMap<u128, Place>,
    nothing: Arc<State>,
}

impl Ledger {
    pub fn new() -> Self {
        Self {
            places: BTreeMap::new(),
            nothing: Arc::default(),
        }
    }

    /// A log took a batch of `writes`, at `position`.
    pub fn take(&mut self, position: Position, writes: Arc<[Write]>) {
        let mut state = match self.places.get(&position.previous.0) {
            Some(before) => State::clone(&before.state),
            None => State::default(),
        };
        writes.iter().for_each(|write| state.apply(write));
        let place = Place {
            position,
            writes,
            digest: state.digest(),
            state: Arc::new(state),
            lost: false,
        };
        self.places.insert(position.chain.0, place);
    }

    pub fn lose(&mut self, chain: Chain) {
        if let Some(place) = self.places.get_mut(&chain.0) {
            place.lost = true;
        }
    }

    pub fn lose_all(&mut self) {
        self.places.values_mut().for_each(|place| place.lost = true);
    }

    /// The batch that the history of `chain` ends with.
    pub fn at(&self, chain: Chain) -> Option<&Place> {
        self.places.get(&chain.0)
    }

    /// Whether the log still has all of the history of `chain`.
    pub fn holds(&self, chain: Chain) -> bool {
        self.at(chain).is_none_or(|place| !place.lost)
    }

    /// What a store at `position` must hold; `None` if no log has that place.
    pub fn state(&self, position: &Position) -> Option<(&State, Digest)> {
        if position.seq == 0 {
            return Some((&self.nothing, Digest::default()));
        }
        let place = self.at(position.chain)?;
        let same = place.position == *position;
        same.then_some((&*place.state, place.digest))
    }

    /// The position before `position`.
    pub fn before(&self, position: &Position) -> Option<Position> {
        self.at(position.previous).map(|place| place.position)
    }

    /// Batch `seq` of the history of `chain`.
    pub fn find(&self, mut chain: Chain, seq: Seq) -> Option<&Place> {
        loop {
            let place = self.at(chain)?;
            match place.position.seq {
                found if found == seq => return Some(place),
                found if found < seq => return None,
                _ => chain = place.position.previous,
            }
        }
    }

    /// A batch that holds such a write, lost or not.
    pub fn anywhere(&self, is: impl Fn(&Write) -> bool) -> Option<Seq> {
        let mut places = self.places.values();
        places
            .find(|place| place.writes.iter().any(&is))
            .map(|place| place.position.seq)
    }
}
