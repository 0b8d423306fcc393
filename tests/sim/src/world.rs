//! The shared state of a run: the broker, the links, the ground truth and the history.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use gradestore::log::{Announce, LogId, Position, Seq};
use gradestore::replication::state::NodeState;
use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};
use tempfile::TempDir;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::broker::Broker;
use crate::ledger::Ledger;
use crate::process::{NodeTask, Process};

/// A client closes a connection after this long without data.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// The maximum number of connections, and of consumers, that a node may create in 30 s without a
/// fault.
const CONNECTS_WITHIN: Duration = Duration::from_secs(30);
const CONNECTS_MAX: usize = 10;
/// The maximum number of requests to the broker in this time, without publishes.
const REQUESTS_MAX: usize = 1000;
/// Connections allowed in addition for each fault of the broker, and for each unreadable message.
const CONNECTS_PER_FAULT: usize = 3;
const CONNECTS_PER_MESSAGE: usize = 6;

/// How long after a fault writes may have an unknown outcome.
const QUIET_AFTER: Duration = Duration::from_secs(15);

/// The shared state. Clones share it.
#[derive(Clone)]
pub struct World(Arc<WorldInner>);

struct WorldInner {
    state: Mutex<State>,
    /// Notified on every change that a task may wait for.
    changed: Notify,
    runtime: Handle,
}

pub struct State {
    pub rng: fastrand::Rng,
    pub broker: Broker,
    pub ledger: Ledger,
    pub nodes: Vec<Slot>,
    /// The number of acknowledged writes.
    pub acknowledged: u64,
    /// The node with a corrupted record.
    pub corrupted: Option<usize>,
    /// The number of active faults, and when the last one ended.
    active_faults: u32,
    last_fault: Option<Instant>,
    /// The number of identities created so far.
    ids: u128,
    latency_ms: Range<u64>,
    started: Instant,
    history: Option<Vec<String>>,
    violation: Option<String>,
}

/// A node's slot, with or without a running process.
#[derive(Default)]
pub struct Slot {
    /// Nothing that it sends to the broker arrives while this is set.
    pub outbound_cut: bool,
    /// Nothing that the broker sends to it arrives while this is set.
    pub inbound_cut: bool,
    /// Its process is suspended: it sends and receives nothing.
    pub suspended: bool,
    /// How often its link was cut or restored.
    cuts: u64,
    /// Its connections to the broker.
    links: Vec<Arc<Link>>,
    /// The state of the server that it is connected to, if that is isolated.
    pub isolated: Option<Isolated>,
    pub slow: bool,
    /// Its connections to other nodes are cut.
    pub cut_from_peers: bool,
    /// One-shot faults, which happen at the next opportunity.
    pub drop_next_delivery: bool,
    /// How many deliveries were dropped, or trimmed before they were delivered.
    pub losses: u64,
    pub repeat_next_delivery: bool,
    pub lose_next_ack: bool,
    /// The delay of its next publish, in milliseconds.
    pub delay_next_publish_ms: Option<u64>,
    pub truncate_next_backup_at: Option<usize>,
    pub corrupt_next_backup_at: Option<usize>,
    /// The directory of its snapshots and its WAL.
    pub dir: Option<TempDir>,
    /// The last write that it acknowledged and must find on its disk at the next start, if it syncs
    /// its WAL first.
    pub acknowledged: Option<(LogId, Seq)>,
    /// The number of wiped disks.
    pub disks: u64,
    /// The number of process starts.
    pub starts: u64,
    pub task: Option<NodeTask>,
    /// Set once it has opened its log.
    pub process: Option<Process>,
    pub announcing: Vec<(u64, Announce)>,
    /// The generation of the replica's only consumer.
    pub consumer: u64,
    /// When connections, consumers and requests were made recently, and when a fault allowed more.
    connects: VecDeque<Instant>,
    consumes: VecDeque<Instant>,
    requests_sent: VecDeque<Instant>,
    reconnects_allowed: VecDeque<Instant>,
    /// Since when the broker has rejected its batches.
    pub rejected_since: Option<Instant>,
    /// Since when a published batch was not stored.
    pub unstored_since: Option<Instant>,
    /// Suspend it as soon as the broker has stored a message of it.
    pub suspend_when_stored: bool,
    /// The number of requests that it is processing.
    pub requests: u64,
    /// The log's end when the process started.
    pub log_end_at_start: Option<Position>,
    /// Nothing is delivered to it before it has requested the log's end. Then the broker loses
    /// batches that it has not read.
    pub loses_unread: bool,
    /// A record was corrupted and is still wrong.
    pub is_corrupted: bool,
    /// The position that its process had applied when the log lost it.
    pub lost: Option<Position>,
    /// Since when it has not been able to recover without an operator.
    pub stuck_since: Option<Instant>,
}

/// The outdated state of a server that has lost its routes.
#[derive(Debug, Clone)]
pub struct Isolated {
    pub first: Seq,
    pub last: Seq,
    /// Until when it reports itself as the stream's leader.
    pub leader_until: Option<Instant>,
    /// Whether its consumers keep sending heartbeats.
    pub heartbeats: bool,
}

/// The state of a connection at both ends.
pub struct Link {
    /// Cancelled when the client has noticed the end.
    pub ended: CancellationToken,
    /// Nothing in flight arrives any more.
    dead: AtomicBool,
    /// Whether it leads to the server that may be isolated.
    pub to_isolated: bool,
}

impl Link {
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    /// The client closes it. Messages in flight may still arrive.
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
    /// Clears one-shot faults that have not happened.
    pub fn clear_one_shot_faults(&mut self) {
        self.drop_next_delivery = false;
        self.repeat_next_delivery = false;
        self.lose_next_ack = false;
        self.delay_next_publish_ms = None;
    }

    /// Allows more connections and consumers, because of a fault.
    pub fn allow_reconnect(&mut self) {
        self.reconnects_allowed.push_back(Instant::now());
    }

    /// Breaks its connections.
    pub fn break_links(&mut self) {
        self.allow_reconnect();
        for link in self.links.drain(..) {
            link.break_off();
        }
    }

    /// Its client closes its connections.
    pub fn end_links(&mut self, rng: &mut fastrand::Rng) {
        for link in &self.links {
            link.end(rng);
        }
    }

    /// Whether the node cannot send to the broker now.
    pub fn sends_nothing(&self) -> bool {
        self.outbound_cut || self.suspended
    }

    /// Whether the node cannot receive from the broker now.
    pub fn receives_nothing(&self) -> bool {
        self.inbound_cut || self.suspended
    }

    /// The isolated server, if `link` leads there.
    pub fn isolated_for(&self, link: &Link) -> Option<&Isolated> {
        self.isolated.as_ref().filter(|_| link.to_isolated)
    }

    /// Counts a consumer; fails if there were too many recently.
    pub fn count_consume(&mut self, unreadable: usize) -> Result<(), usize> {
        Self::count(&mut self.consumes, &mut self.reconnects_allowed, unreadable)
    }

    fn count(
        counted: &mut VecDeque<Instant>,
        allowed: &mut VecDeque<Instant>,
        unreadable: usize,
    ) -> Result<(), usize> {
        counted.push_back(Instant::now());
        for times in [&mut *counted, allowed] {
            while times
                .front()
                .is_some_and(|at| at.elapsed() > CONNECTS_WITHIN)
            {
                times.pop_front();
            }
        }
        let max =
            CONNECTS_MAX + CONNECTS_PER_FAULT * allowed.len() + CONNECTS_PER_MESSAGE * unreadable;
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
        Self(Arc::new(WorldInner {
            state: Mutex::new(State {
                rng: fastrand::Rng::with_seed(seed),
                broker: Broker::new(clustered),
                ledger: Ledger::new(),
                nodes: (0..nodes).map(|_| Slot::default()).collect(),
                acknowledged: 0,
                corrupted: None,
                active_faults: 0,
                last_fault: None,
                ids: 0,
                latency_ms,
                started: Instant::now(),
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

    /// Wakes all tasks that wait for a change.
    pub fn change(&self) {
        self.0.changed.notify_waiters();
    }

    /// Waits for a change, 500 ms at most.
    pub async fn wait(&self) {
        let wait_max = Duration::from_millis(500);
        let _ = tokio::time::timeout(wait_max, self.0.changed.notified()).await;
    }

    /// Waits while the process at `node` is suspended.
    pub async fn wait_until_resumed(&self, node: usize) {
        while self.slot(node).suspended {
            self.wait().await;
        }
    }

    /// A random latency to or from `node`.
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

    /// Adds `line` to the history, if one is recorded.
    pub fn note(&self, line: impl FnOnce() -> String) {
        self.lock().note(line);
    }

    /// Reports a violation. The first one counts.
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

    /// Sets which directions between `node` and the broker are cut.
    pub fn cut(&self, node: usize, outbound_cut: bool, inbound_cut: bool) {
        let mut slot = self.slot(node);
        (slot.outbound_cut, slot.inbound_cut) = (outbound_cut, inbound_cut);
        slot.cuts += 1;
        slot.allow_reconnect();
        let cuts = slot.cuts;
        drop(slot);
        self.change();
        if outbound_cut || inbound_cut {
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
    /// Called when a fault begins that may delay writes.
    pub fn begin_fault(&mut self) {
        self.active_faults += 1;
    }

    pub fn end_fault(&mut self) {
        self.active_faults -= 1;
        self.last_fault = Some(Instant::now());
    }

    /// Whether no fault was active recently.
    pub fn is_quiet(&self) -> bool {
        let last = self.last_fault;
        self.active_faults == 0 && last.is_none_or(|at| at.elapsed() > QUIET_AFTER)
    }

    pub fn note(&mut self, line: impl FnOnce() -> String) {
        let at = self.started.elapsed();
        if let Some(history) = &mut self.history {
            history.push(format!("{:>9.3} {}", at.as_secs_f64(), line()));
        }
    }

    pub fn violate(&mut self, what: String) {
        self.note(|| format!("VIOLATION {what}"));
        self.violation.get_or_insert(what);
    }

    /// A new identity.
    pub fn next_id(&mut self) -> u128 {
        self.ids += 1;
        self.ids << 64 | u128::from(self.rng.u64(..))
    }

    /// Counts a request of `node` to the broker.
    pub fn count_request(&mut self, node: usize) {
        let sent = &mut self.nodes[node].requests_sent;
        sent.push_back(Instant::now());
        if sent.len() > REQUESTS_MAX
            && let Some(first) = sent.pop_front()
            && first.elapsed() < CONNECTS_WITHIN
        {
            self.violate(format!(
                "node {node} has sent {REQUESTS_MAX} requests to the broker in 30 s"
            ));
        }
    }

    /// The broker restarts without its last batches.
    pub fn lose_last(&mut self, batches: usize) {
        self.broker.lose_last(batches, &mut self.ledger);
        self.note_lost();
        self.break_links();
    }

    /// The broker loses batches that `node` has not read, if that fault is pending and the node is
    /// catching up. Returns whether it does.
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
            format!("node {node} has requested the log's end; {batches} batches are lost")
        });
        self.lose_last(batches);
        true
    }

    /// Records the positions of ready nodes that the log has just lost.
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

    /// Breaks all connections to the broker.
    pub fn break_links(&mut self) {
        self.nodes.iter_mut().for_each(Slot::break_links);
    }

    /// Opens a connection of `node`.
    pub fn connect(&mut self, node: usize) -> Arc<Link> {
        let slot = &mut self.nodes[node];
        let to_isolated = slot.isolated.is_none() || self.rng.bool();
        let link = Arc::new(Link {
            ended: CancellationToken::new(),
            dead: AtomicBool::new(false),
            to_isolated,
        });
        // Messages of a closed connection may still be in flight.
        slot.links.retain(|link| Arc::strong_count(link) > 1);
        slot.links.push(Arc::clone(&link));
        let unreadable = self.broker.unreadable;
        let counted = Slot::count(&mut slot.connects, &mut slot.reconnects_allowed, unreadable);
        if let Err(count) = counted {
            self.violate(format!("node {node} has connected {count} times in 30 s"));
        }
        link
    }
}
