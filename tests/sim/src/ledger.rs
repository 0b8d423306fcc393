//! The ground truth: every batch that any log ever stored, and the state after each.

use std::collections::BTreeMap;
use std::sync::Arc;

use gradestore::grade::{Digest, FIELD_COUNT, UserGrade, Values, Write};
use gradestore::log::{Chain, Position, Seq};

/// The records after a batch, computed independently of the program.
#[derive(Debug, Clone, Default)]
pub struct Records(BTreeMap<Box<str>, Values>);

impl Records {
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

/// A stored batch.
pub struct LedgerEntry {
    pub position: Position,
    pub writes: Arc<[Write]>,
    pub state: Arc<Records>,
    pub digest: Digest,
    /// Whether the broker lost it, alone or with the stream.
    pub lost: bool,
}

/// All stored batches, by chain.
pub struct Ledger {
    entries: BTreeMap<u128, LedgerEntry>,
    empty: Arc<Records>,
}

impl Ledger {
    pub fn new() -> Self {
        Self {
            entries: BTreeMap::new(),
            empty: Arc::default(),
        }
    }

    /// Records that a log stored a batch of `writes` at `position`.
    pub fn record(&mut self, position: Position, writes: Arc<[Write]>) {
        let mut state = match self.entries.get(&position.previous.0) {
            Some(before) => Records::clone(&before.state),
            None => Records::default(),
        };
        writes.iter().for_each(|write| state.apply(write));
        let entry = LedgerEntry {
            position,
            writes,
            digest: state.digest(),
            state: Arc::new(state),
            lost: false,
        };
        self.entries.insert(position.chain.0, entry);
    }

    pub fn lose(&mut self, chain: Chain) {
        if let Some(entry) = self.entries.get_mut(&chain.0) {
            entry.lost = true;
        }
    }

    pub fn lose_all(&mut self) {
        self.entries
            .values_mut()
            .for_each(|entry| entry.lost = true);
    }

    /// The last batch of the history of `chain`.
    pub fn at(&self, chain: Chain) -> Option<&LedgerEntry> {
        self.entries.get(&chain.0)
    }

    /// Whether the log still has all of the history of `chain`.
    pub fn holds(&self, chain: Chain) -> bool {
        self.at(chain).is_none_or(|entry| !entry.lost)
    }

    /// The records that a store at `position` must hold; `None` if no log had that position.
    pub fn state(&self, position: &Position) -> Option<(&Records, Digest)> {
        if position.seq == 0 {
            return Some((&self.empty, Digest::default()));
        }
        let entry = self.at(position.chain)?;
        let same = entry.position == *position;
        same.then_some((&*entry.state, entry.digest))
    }

    /// The position before `position`.
    pub fn before(&self, position: &Position) -> Option<Position> {
        self.at(position.previous).map(|entry| entry.position)
    }

    /// Batch `seq` of the history of `chain`.
    pub fn find(&self, mut chain: Chain, seq: Seq) -> Option<&LedgerEntry> {
        loop {
            let entry = self.at(chain)?;
            match entry.position.seq {
                found if found == seq => return Some(entry),
                found if found < seq => return None,
                _ => chain = entry.position.previous,
            }
        }
    }

    /// A batch with a write that matches, lost or not.
    pub fn find_write(&self, matches: impl Fn(&Write) -> bool) -> Option<Seq> {
        let mut entries = self.entries.values();
        entries
            .find(|entry| entry.writes.iter().any(&matches))
            .map(|entry| entry.position.seq)
    }
}
