//! What all parts of one run share: the broker, the links, the truth, and the history.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use gradestore::log::{Announce, Seq};
use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};
use tempfile::TempDir;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::broker::Broker;
use crate::ledger::Ledger;
use crate::process::{Life, Process};

/// After so much silence a connection is given up.
const NOTICED_AFTER: Duration = Duration::from_secs(2);

/// Clones are the same.
#[derive(Clone)]
pub struct World(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    /// Something happened that somebody may wait for.
    changed: Notify,
    runtime: Handle,
}

pub struct State {
    pub rng: fastrand::Rng,
    pub broker: Broker,
    pub ledger: Ledger,
    pub nodes: Vec<Slot>,
    /// Writes that were answered.
    pub answered: u64,
    latency_ms: Range<u64>,
    begun: Instant,
    history: Option<Vec<String>>,
    violation: Option<String>,
}

/// A node's place in the world, whether a process runs there or not.
#[derive(Default)]
pub struct Slot {
    /// What it sends to the broker does not arrive.
    pub mute: bool,
    /// What the broker sends to it does not arrive.
    pub deaf: bool,
    silent_since: Option<Instant>,
    noticed: bool,
    /// Which connection to the broker it is at.
    session: u64,
    pub slow: bool,
    /// Other nodes can't reach it, nor it them.
    pub apart: bool,
    /// Faults that happen once, as soon as they can.
    pub lose_next: bool,
    /// Deliveries that were left out.
    pub losses: u64,
    pub repeat_next: bool,
    pub ack_lost: bool,
    pub store_twice: bool,
    pub break_backup_after: Option<usize>,
    pub change_backup_at: Option<usize>,
    /// Where its snapshots are.
    pub dir: Option<TempDir>,
    /// Process starts so far.
    pub starts: u64,
    pub life: Option<Life>,
    /// Once it has found the broker.
    pub process: Option<Process>,
    pub announce: Option<Announce>,
    /// Requests that it is at.
    pub requests: u64,
    /// Where the log was when the process began: a position and its time.
    pub fence: (Seq, u64),
    /// Since when an operator would have seen that it needs help.
    pub helpless_since: Option<Instant>,
    /// And that restarting it did not help.
    pub restarted: bool,
}

impl Slot {
    /// What was to go wrong once, and did not come to it, does not any more.
    pub fn spare(&mut self) {
        self.lose_next = false;
        self.repeat_next = false;
        self.ack_lost = false;
        self.store_twice = false;
    }
}

impl World {
    pub fn new(seed: u64, latency_ms: Range<u64>, nodes: usize, record: bool) -> Self {
        Self(Arc::new(Inner {
            state: Mutex::new(State {
                rng: fastrand::Rng::with_seed(seed),
                broker: Broker::new(),
                ledger: Ledger::new(),
                nodes: (0..nodes).map(|_| Slot::default()).collect(),
                answered: 0,
                latency_ms,
                begun: Instant::now(),
                history: record.then(Vec::new),
                violation: None,
            }),
            changed: Notify::new(),
            runtime: Handle::current(),
        }))
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock()
    }

    pub fn slot(&self, node: usize) -> MappedMutexGuard<'_, Slot> {
        MutexGuard::map(self.lock(), |state| &mut state.nodes[node])
    }

    pub fn runtime(&self) -> &Handle {
        &self.0.runtime
    }

    /// Tells everyone to look again.
    pub fn change(&self) {
        self.0.changed.notify_waiters();
    }

    /// Waits until something changes, or for a while.
    pub async fn wait(&self) {
        let while_ = Duration::from_millis(500);
        let _ = tokio::time::timeout(while_, self.0.changed.notified()).await;
    }

    /// How long something takes on its way to `node` or from it.
    pub fn latency(&self, node: usize) -> Duration {
        let mut state = self.lock();
        let slow = state.nodes[node].slow;
        let range = state.latency_ms.clone();
        let mut ms = state.rng.u64(range);
        if slow {
            ms = ms * 20 + 100;
        }
        Duration::from_millis(ms)
    }

    pub fn pause(&self, range_ms: Range<u64>) -> Duration {
        Duration::from_millis(self.lock().rng.u64(range_ms))
    }

    /// Writes `line` into the history, if one is kept.
    pub fn note(&self, line: impl FnOnce() -> String) {
        let mut state = self.lock();
        let at = state.begun.elapsed();
        if let Some(history) = &mut state.history {
            history.push(format!("{:>9.3} {}", at.as_secs_f64(), line()));
        }
    }

    /// Something happened that must not. The first one counts.
    pub fn violate(&self, what: String) {
        self.note(|| format!("VIOLATION {what}"));
        let mut state = self.lock();
        state.violation.get_or_insert(what);
    }

    pub fn violated(&self) -> bool {
        self.lock().violation.is_some()
    }

    pub fn take_results(&self) -> (Option<String>, Vec<String>) {
        let mut state = self.lock();
        (
            state.violation.take(),
            state.history.take().unwrap_or_default(),
        )
    }
}

impl State {
    /// Which connection to the broker `node` has; or why none.
    pub fn session(&mut self, node: usize) -> Result<u64, &'static str> {
        if !self.broker.up {
            return Err("the broker does not answer");
        }
        let slot = &mut self.nodes[node];
        let silent = slot
            .silent_since
            .is_some_and(|since| since.elapsed() >= NOTICED_AFTER);
        if silent && !slot.noticed {
            slot.noticed = true;
            slot.session += 1;
        }
        match silent {
            true => Err("the broker is silent"),
            false => Ok(slot.session),
        }
    }

    /// All connections to the broker end.
    pub fn end_sessions(&mut self) {
        for slot in &mut self.nodes {
            slot.session += 1;
        }
    }

    /// Sets which ways between `node` and the broker are cut.
    pub fn cut(&mut self, node: usize, mute: bool, deaf: bool) {
        // What was silent for long enough has been noticed.
        let _ = self.session(node);
        let slot = &mut self.nodes[node];
        (slot.mute, slot.deaf) = (mute, deaf);
        if !(mute || deaf) {
            slot.silent_since = None;
            slot.noticed = false;
        } else if slot.silent_since.is_none() {
            slot.silent_since = Some(Instant::now());
        }
    }
}
