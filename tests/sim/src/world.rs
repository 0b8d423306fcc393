//! What all parts of one run share: the broker, the links, the truth, and the history.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use gradestore::log::{Announce, Position, Seq};
use gradestore::replication::state::NodeState;
use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};
use tempfile::TempDir;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::broker::Broker;
use crate::ledger::Ledger;
use crate::process::{Life, Process};

/// After so much silence a client gives a connection up.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// In this time a node may make so many connections, and as many consumers, by itself.
const CONNECTS_WITHIN: Duration = Duration::from_secs(30);
const CONNECTS_MAX: usize = 10;
/// The maximum number of requests to the broker in this time, without publishes.
const ASKS_MAX: usize = 1000;
/// Connections allowed in addition for each fault of the broker, and for each unreadable message.
const CONNECTS_A_REASON: usize = 3;
const CONNECTS_A_MESSAGE: usize = 6;

/// After a fault writes may go unanswered for so long.
const QUIET_AFTER: Duration = Duration::from_secs(15);

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
    /// The node that had a record changed.
    pub corrupted: Option<usize>,
    /// Faults that last, and when the last one ended.
    faults: u32,
    last_fault: Option<Instant>,
    /// Identities given so far.
    ids: u128,
    latency_ms: Range<u64>,
    begun: Instant,
    history: Option<Vec<String>>,
    violation: Option<String>,
}

/// A node's place in the world, whether a process runs there or not.
#[derive(Default)]
pub struct Slot {
    /// What it sends to the broker does not arrive before this ends.
    pub mute: bool,
    /// What the broker sends to it does not arrive before this ends.
    pub deaf: bool,
    /// Its process is suspended: nothing comes out of it, nothing gets in.
    pub frozen: bool,
    /// How often its link was cut or mended.
    cuts: u64,
    /// Its connections to the broker.
    links: Vec<Arc<Link>>,
    /// The server that it is connected to has lost its routes.
    pub isolated: Option<Isolated>,
    pub slow: bool,
    /// Other nodes can't reach it, nor it them.
    pub apart: bool,
    /// Faults that happen once, as soon as they can.
    pub lose_next: bool,
    /// How often deliveries were left out, or trimmed before they were made.
    pub losses: u64,
    pub repeat_next: bool,
    pub ack_lost: bool,
    /// What it publishes next is under way for so many milliseconds.
    pub hold_next: Option<u64>,
    pub break_backup_after: Option<usize>,
    pub change_backup_at: Option<usize>,
    /// Where its snapshots are.
    pub dir: Option<TempDir>,
    /// Disks that it had before.
    pub disks: u64,
    /// Process starts so far.
    pub starts: u64,
    pub life: Option<Life>,
    /// Once it has found the broker.
    pub process: Option<Process>,
    pub announces: Vec<(u64, Announce)>,
    /// The broker has one consumer a replica; this is how often it was replaced.
    pub consumer: u64,
    /// When connections and consumers were made lately, and when there was a reason.
    connects: VecDeque<Instant>,
    consumes: VecDeque<Instant>,
    asks: VecDeque<Instant>,
    reasons: VecDeque<Instant>,
    /// Since when the broker has refused what it publishes.
    pub refused_since: Option<Instant>,
    /// Since when a batch that it has published was not stored.
    pub unstored_since: Option<Instant>,
    /// It is to be suspended as soon as the broker has stored something of it.
    pub freeze_when_stored: bool,
    /// Requests that it is at.
    pub requests: u64,
    /// Where the log was when the process began.
    pub fence: Option<Position>,
    /// Nothing is delivered to it before it has asked for the log's end; then the broker loses what
    /// it has not read.
    pub loses_unread: bool,
    /// A record of it was changed, and is still wrong.
    pub is_corrupted: bool,
    /// What its process had applied when the log lost it.
    pub lost: Option<Position>,
    /// Since when an operator would have seen that it needs help.
    pub helpless_since: Option<Instant>,
}

/// What a server that has lost its routes says.
#[derive(Debug, Clone)]
pub struct Isolated {
    pub first: Seq,
    pub last: Seq,
    /// Until then it says that it leads the stream.
    pub leader_until: Option<Instant>,
    /// Whether consumers that it has keep sending heartbeats.
    pub heartbeats: bool,
}

/// A connection, as both of its ends know it.
pub struct Link {
    /// The client knows that it has ended.
    pub ended: CancellationToken,
    /// The server does, or what is under way is lost.
    dead: AtomicBool,
    /// It leads to the server that may be isolated.
    pub to_isolated: bool,
}

impl Link {
    /// Nothing that is under way arrives.
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    /// Its client has ended it: what is under way may still arrive.
    pub fn end(&self, rng: &mut fastrand::Rng) {
        if !self.ended.is_cancelled() {
            self.dead.fetch_or(rng.bool(), Ordering::Relaxed);
            self.ended.cancel();
        }
    }

    fn break_off(&self) {
        self.dead.store(true, Ordering::Relaxed);
        self.ended.cancel();
    }
}

impl Slot {
    /// What was to go wrong once, and did not come to it, does not any more.
    pub fn spare(&mut self) {
        self.lose_next = false;
        self.repeat_next = false;
        self.ack_lost = false;
        self.hold_next = None;
    }

    /// It has a reason to connect again.
    pub fn excuse(&mut self) {
        self.reasons.push_back(Instant::now());
    }

    /// Its connections break.
    pub fn break_links(&mut self) {
        self.excuse();
        for link in self.links.drain(..) {
            link.break_off();
        }
    }

    /// Its client gives its connections up.
    pub fn end_links(&mut self, rng: &mut fastrand::Rng) {
        for link in &self.links {
            link.end(rng);
        }
    }

    /// Whether nothing gets from the node to the broker now.
    pub fn sends_nothing(&self) -> bool {
        self.mute || self.frozen
    }

    /// Whether nothing gets from the broker to the node now.
    pub fn receives_nothing(&self) -> bool {
        self.deaf || self.frozen
    }

    /// The isolated server, if `link` leads there.
    pub fn isolated_for(&self, link: &Link) -> Option<&Isolated> {
        self.isolated.as_ref().filter(|_| link.to_isolated)
    }

    /// Counts a consumer; `Err` if there were too many lately.
    pub fn count_consume(&mut self, unreadable: usize) -> Result<(), usize> {
        Self::count(&mut self.consumes, &mut self.reasons, unreadable)
    }

    fn count(
        counted: &mut VecDeque<Instant>,
        reasons: &mut VecDeque<Instant>,
        unreadable: usize,
    ) -> Result<(), usize> {
        counted.push_back(Instant::now());
        for times in [&mut *counted, reasons] {
            while times
                .front()
                .is_some_and(|at| at.elapsed() > CONNECTS_WITHIN)
            {
                times.pop_front();
            }
        }
        let max =
            CONNECTS_MAX + CONNECTS_A_REASON * reasons.len() + CONNECTS_A_MESSAGE * unreadable;
        match counted.len() <= max {
            true => Ok(()),
            false => Err(counted.len()),
        }
    }
}

impl World {
    pub fn new(
        seed: u64,
        latency_ms: Range<u64>,
        nodes: usize,
        clustered: bool,
        record: bool,
    ) -> Self {
        Self(Arc::new(Inner {
            state: Mutex::new(State {
                rng: fastrand::Rng::with_seed(seed),
                broker: Broker::new(clustered),
                ledger: Ledger::new(),
                nodes: (0..nodes).map(|_| Slot::default()).collect(),
                answered: 0,
                corrupted: None,
                faults: 0,
                last_fault: None,
                ids: 0,
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

    /// Waits while the process at `node` stands still.
    pub async fn thawed(&self, node: usize) {
        while self.slot(node).frozen {
            self.wait().await;
        }
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
        self.lock().note(line);
    }

    /// Something happened that must not. The first one counts.
    pub fn violate(&self, what: String) {
        self.lock().violate(what);
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

    /// Sets which ways between `node` and the broker are cut.
    pub fn cut(&self, node: usize, mute: bool, deaf: bool) {
        let mut slot = self.slot(node);
        (slot.mute, slot.deaf) = (mute, deaf);
        slot.cuts += 1;
        slot.excuse();
        let cuts = slot.cuts;
        drop(slot);
        self.change();
        if mute || deaf {
            let world = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(SILENCE_MAX).await;
                let mut state = world.lock();
                let state = &mut *state;
                let slot = &mut state.nodes[node];
                if slot.cuts == cuts {
                    slot.end_links(&mut state.rng);
                }
            });
        }
    }
}

impl State {
    /// A fault begins that may keep writes from being answered.
    pub fn begin_fault(&mut self) {
        self.faults += 1;
    }

    pub fn end_fault(&mut self) {
        self.faults -= 1;
        self.last_fault = Some(Instant::now());
    }

    /// Whether nothing has been wrong for a while.
    pub fn is_quiet(&self) -> bool {
        let last = self.last_fault;
        self.faults == 0 && last.is_none_or(|at| at.elapsed() > QUIET_AFTER)
    }

    pub fn note(&mut self, line: impl FnOnce() -> String) {
        let at = self.begun.elapsed();
        if let Some(history) = &mut self.history {
            history.push(format!("{:>9.3} {}", at.as_secs_f64(), line()));
        }
    }

    pub fn violate(&mut self, what: String) {
        self.note(|| format!("VIOLATION {what}"));
        self.violation.get_or_insert(what);
    }

    /// Another identity.
    pub fn next_id(&mut self) -> u128 {
        self.ids += 1;
        self.ids << 64 | u128::from(self.rng.u64(..))
    }

    /// Counts a request of `node` to the broker.
    pub fn count_request(&mut self, node: usize) {
        let asks = &mut self.nodes[node].asks;
        asks.push_back(Instant::now());
        if asks.len() > ASKS_MAX
            && let Some(first) = asks.pop_front()
            && first.elapsed() < CONNECTS_WITHIN
        {
            self.violate(format!(
                "node {node} has asked the broker {ASKS_MAX} times in 30 s"
            ));
        }
    }

    /// The broker comes back without its last batches.
    pub fn lose_last(&mut self, batches: usize) {
        self.broker.lose_last(batches, &mut self.ledger);
        self.note_lost();
        self.break_links();
    }

    /// The broker loses some of what `node` has not read, if the node is to see that and is catching
    /// up. Returns whether it does.
    pub fn lose_unread(&mut self, node: usize) -> bool {
        let slot = &mut self.nodes[node];
        let Some(process) = slot.process.as_ref().filter(|_| slot.loses_unread) else {
            return false;
        };
        let (readiness, applied) = (&process.node.readiness, process.node.applied.seq());
        let unread = self.broker.end().saturating_sub(applied);
        if readiness.state() != NodeState::CatchingUp || unread == 0 {
            return false;
        }
        slot.loses_unread = false;
        let batches = self.rng.u64(1..=unread) as usize;
        self.note(|| {
            format!("node {node} has asked for the log's end; {batches} batches are lost")
        });
        self.lose_last(batches);
        true
    }

    /// Notes what ready nodes have applied and the log has just lost.
    pub fn note_lost(&mut self) {
        for slot in &mut self.nodes {
            let Some(process) = slot.process.as_ref() else {
                continue;
            };
            let position = process.node.applied.position();
            let is_ready = process.node.readiness.check().is_ok();
            if is_ready && !self.ledger.holds(position.chain) {
                slot.lost = Some(position);
            }
        }
    }

    /// All connections to the broker break.
    pub fn break_links(&mut self) {
        self.nodes.iter_mut().for_each(Slot::break_links);
    }

    /// A new connection of `node`.
    pub fn connect(&mut self, node: usize) -> Arc<Link> {
        let slot = &mut self.nodes[node];
        let to_isolated = slot.isolated.is_none() || self.rng.bool();
        let link = Arc::new(Link {
            ended: CancellationToken::new(),
            dead: AtomicBool::new(false),
            to_isolated,
        });
        // Of one that its client has ended something may still be under way.
        slot.links.retain(|link| Arc::strong_count(link) > 1);
        slot.links.push(Arc::clone(&link));
        let unreadable = self.broker.unreadable;
        let counted = Slot::count(&mut slot.connects, &mut slot.reasons, unreadable);
        if let Err(count) = counted {
            self.violate(format!("node {node} has connected {count} times in 30 s"));
        }
        link
    }
}
