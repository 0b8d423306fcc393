//! The broker: one stream, and what can happen to it.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use gradestore::log::{Batch, Entry, Extent, LogId, Origin, Seq};
use tokio::time::Instant;

use crate::ledger::Ledger;

/// For how long a batch that is sent again is known.
pub const DEDUP_WINDOW: Duration = Duration::from_secs(12);
/// Where its clock begins, in nanoseconds since 1970.
const BEGIN_NS: u64 = 1_700_000_000_000_000_000;

pub struct Broker {
    pub up: bool,
    pub id: LogId,
    begun: Instant,
    streams: u32,
    first: Seq,
    entries: VecDeque<Entry>,
    /// The time of the last batch; 0 before the first.
    last_ns: u64,
    /// The last time given to any batch of any stream.
    clock_ns: u64,
    known: HashMap<(Origin, u64), Instant>,
}

impl Broker {
    pub fn new() -> Self {
        Self {
            up: true,
            id: LogId("sim-1".into()),
            begun: Instant::now(),
            streams: 1,
            first: 1,
            entries: VecDeque::new(),
            last_ns: 0,
            clock_ns: 0,
            known: HashMap::new(),
        }
    }

    pub fn extent(&self) -> Extent {
        Extent {
            first: self.first,
            end: self.end(),
        }
    }

    pub fn end(&self) -> Seq {
        self.first + self.entries.len() as Seq - 1
    }

    /// What every clock shows.
    pub fn now_ns(&self) -> u64 {
        BEGIN_NS + u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// The time of the last batch; 0 before the first.
    pub fn end_ns(&self) -> u64 {
        self.last_ns
    }

    pub fn get(&self, seq: Seq) -> Option<&Entry> {
        let index = seq.checked_sub(self.first)?;
        self.entries.get(usize::try_from(index).ok()?)
    }

    /// Takes `batch`, unless it is known by its name; `again` overlooks that.
    pub fn store(&mut self, batch: Batch, again: bool, ledger: &mut Ledger) {
        let now = Instant::now();
        let name = (batch.origin, batch.number);
        let known = self.known.get(&name);
        if !again && known.is_some_and(|at| now - *at < DEDUP_WINDOW) {
            return;
        }
        self.known.insert(name, now);
        self.clock_ns = self.now_ns().max(self.clock_ns + 1);
        let (seq, time_ns) = (self.end() + 1, self.clock_ns);
        ledger.take(time_ns, self.last_ns, seq, batch.patches.clone());
        self.last_ns = time_ns;
        self.entries.push_back(Entry {
            seq,
            time_ns,
            batch,
        });
    }

    /// Forgets all but the last `keep` batches.
    pub fn trim(&mut self, keep: usize) {
        while self.entries.len() > keep {
            self.entries.pop_front();
            self.first += 1;
        }
    }

    /// Loses the last `count` batches of those it holds.
    pub fn lose_last(&mut self, count: usize, ledger: &mut Ledger) {
        for _ in 0..count {
            let Some(lost) = self.entries.pop_back() else {
                return;
            };
            ledger.lose(lost.time_ns);
            self.known.remove(&(lost.batch.origin, lost.batch.number));
            self.last_ns = ledger.at(lost.time_ns).map_or(0, |place| place.before_ns);
        }
    }

    /// The stream is removed and made anew.
    pub fn recreate(&mut self, ledger: &mut Ledger) {
        let mut time_ns = self.last_ns;
        while let Some(before_ns) = ledger.at(time_ns).map(|place| place.before_ns) {
            ledger.lose(time_ns);
            time_ns = before_ns;
        }
        self.streams += 1;
        self.id = LogId(format!("sim-{}", self.streams).into());
        self.first = 1;
        self.entries.clear();
        self.last_ns = 0;
        self.known.clear();
    }
}
