//! One run: the world, its course, and how it must end.

use std::sync::atomic::Ordering;
use std::time::Duration;

use gradestore::backup::HeadRecord;
use gradestore::grade::{Changes, Patch, Write};
use gradestore::log::Chain;
use gradestore::replication::state::NodeState;
use gradestore::store::RecordBatch;
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::broker::Troubles;
use crate::check;
use crate::client::Client;
use crate::plan::{Fault, Plan};
use crate::process::{self, Knobs, Process, heads};
use crate::world::{Isolated, Slot, State, World};

/// How often nodes are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(700);
/// When an operator would give a node an empty disk, whose log has lost what the node has.
const HELP_AFTER: Duration = Duration::from_secs(45);
/// By then all must be well again once nothing goes wrong any more; and where an operator is needed.
const WELL_AFTER: Duration = Duration::from_secs(180);
const HELPED_AFTER: Duration = Duration::from_secs(400);
/// How far the broker's clock goes ahead of a process that stands still: it forgets message ids.
const JUMP: Duration = Duration::from_secs(130);

/// A node that starts asks for the log's end within this.
const ASKS_WITHIN_MS: u64 = 2000;
/// A changed record is found and repaired within this, once there are writes.
const REPAIRED_AFTER: Duration = Duration::from_secs(60);
/// How long a server that lost its routes goes on leading the stream.
const LEADS_MAX: Duration = Duration::from_secs(21);

/// A node that is suspended right after the broker has stored something of it is so within this.
const STORES_WITHIN_MS: u64 = 1000;

/// How a run ended.
pub struct Outcome {
    /// What happened that must not.
    pub violation: Option<String>,
    /// What happened, if it was written down.
    pub history: Vec<String>,
    /// Writes that were answered.
    pub answered: u64,
    /// Whether nobody had the data any more, by the faults alone.
    pub nobody: bool,
}

/// Runs `plan`; the same happens whenever the same plan is run.
pub fn run(plan: &Plan, record: bool) -> Outcome {
    let runtime = Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let world = World::new(
            plan.seed,
            plan.latency_ms.clone(),
            plan.nodes,
            plan.clustered,
            record,
        );
        let nobody = course(&world, plan).await;
        for node in 0..plan.nodes {
            process::kill(&world, node, false);
        }
        let answered = world.lock().answered;
        let (violation, history) = world.take_results();
        Outcome {
            violation,
            history,
            answered,
            nobody,
        }
    })
}

async fn course(world: &World, plan: &Plan) -> bool {
    let begun = Instant::now();
    for node in 0..plan.nodes {
        if plan.knobs.snapshots {
            world.slot(node).dir = Some(process::disk());
        }
        process::start(world, node, &plan.knobs);
    }
    let mut beside = JoinSet::new();
    beside.spawn(watch(
        world.clone(),
        plan.knobs.clone(),
        plan.loses_history(),
    ));
    let mut clients = JoinSet::new();
    for (number, ops) in plan.clients.iter().enumerate() {
        let client = Client::new(world.clone(), plan.knobs.clone(), number + 1);
        clients.spawn(client.run(ops.clone()));
    }
    let mut healing = JoinSet::new();
    for (at_ms, fault) in &plan.faults {
        sleep_until(begun + Duration::from_millis(*at_ms)).await;
        if world.violated() {
            return false;
        }
        healing.spawn(happen(world.clone(), plan.knobs.clone(), fault.clone()));
    }
    let (mut refused, mut sent) = (Vec::new(), Vec::new());
    while let Some(client) = clients.join_next().await {
        match client {
            Ok(client) => {
                refused.extend(client.refused);
                sent.extend(client.sent);
            }
            Err(error) => world.violate(format!("a client failed: {error}")),
        }
    }
    while healing.join_next().await.is_some() {}
    if world.violated() {
        return false;
    }
    world.note(|| "nothing goes wrong any more".into());
    let nobody = become_well(world, plan).await;
    // A deletion that somebody else has sent as well may be theirs.
    for write in refused.iter().filter(|write| !sent.contains(write)) {
        let found = world.lock().ledger.anywhere(|there| there == write);
        if let Some(seq) = found {
            world.violate(format!("{write:?} was refused and is in batch {seq}"));
        }
    }
    nobody
}

/// Until every node is ready at the end of the log; whether that can't be.
async fn become_well(world: &World, plan: &Plan) -> bool {
    let patience = match plan.loses_history() {
        true => HELPED_AFTER,
        false => WELL_AFTER,
    };
    let deadline = Instant::now() + patience;
    loop {
        let behind = (0..plan.nodes).find(|node| !check::caught_up(world, *node));
        let Some(behind) = behind else {
            break;
        };
        if world.violated() {
            return false;
        }
        if nobody_has_it(world, plan) {
            return true;
        }
        if Instant::now() > deadline {
            let process = world.slot(behind).process.clone();
            let state = process.map(|process| {
                let (node, seq) = (&process.node, process.node.applied.seq());
                (node.readiness.check(), node.log.unwritable(), seq)
            });
            let end = world.lock().broker.end();
            world.violate(format!(
                "node {behind} does not become well: {state:?}, the log ends at {end}"
            ));
            return false;
        }
        sleep(Duration::from_millis(200)).await;
    }
    let mut client = Client::new(world.clone(), plan.knobs.clone(), plan.clients.len() + 1);
    (0..plan.nodes).for_each(|node| world.slot(node).spare());
    for node in 0..plan.nodes {
        client.set_at(node).await;
    }
    if let Some(node) = plan.corrupted() {
        become_repaired(world, node).await;
    }
    for node in 0..plan.nodes {
        let process = world.slot(node).process.clone();
        if let Some(process) = process {
            check::look(world, node, &process, &plan.knobs, true);
            let resyncs = process.resyncs.load(Ordering::Relaxed);
            if resyncs > 0 && !plan.loses_log() && plan.corrupted() != Some(node) {
                world.violate(format!("node {node} began anew though nothing was lost"));
            }
        }
    }
    false
}

/// Until `node`, whose record was changed, holds what the log says.
async fn become_repaired(world: &World, node: usize) {
    let deadline = Instant::now() + REPAIRED_AFTER;
    while world.slot(node).is_corrupted || !check::caught_up(world, node) {
        if Instant::now() > deadline {
            world.violate(format!("node {node} keeps a wrong record"));
        }
        if world.violated() {
            return;
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// Whether no node is ready, none has a snapshot that the log goes on from, and the log does not
/// begin at its first batch.
fn nobody_has_it(world: &World, plan: &Plan) -> bool {
    let state = world.lock();
    let (first, end) = (state.broker.first(), state.broker.end());
    let ready = state.nodes.iter().any(|slot| {
        let process = slot.process.as_ref();
        process.is_some_and(|process| process.node.readiness.check().is_ok())
    });
    let waiting = state.nodes.iter().all(|slot| {
        let process = slot.process.as_ref();
        let state = process.and_then(|process| process.node.readiness.check().err());
        state.is_some_and(|unready| unready.state == NodeState::NoSource)
    });
    let kept = state.nodes.iter().any(|slot| {
        let dir = slot.dir.as_ref().filter(|_| plan.knobs.snapshots);
        let snapshots = dir.map(|dir| gradestore::backup::Snapshots::in_dir(dir.path()));
        let found = snapshots.and_then(|snapshots| snapshots.list().ok());
        let usable = |position: u64| (first..=end + 1).contains(&(position + 1));
        found.is_some_and(|found| found.iter().any(|(position, _)| usable(*position)))
    });
    first > 1 && waiting && !ready && !kept
}

/// Looks at all nodes now and then, and does what an operator would do.
async fn watch(world: World, knobs: Knobs, loses_history: bool) {
    loop {
        sleep(LOOK_EVERY).await;
        let nodes = world.lock().nodes.len();
        for node in 0..nodes {
            let process = world.slot(node).process.clone();
            if let Some(process) = process {
                check::look(&world, node, &process, &knobs, false);
                if loses_history {
                    help(&world, node, &process, &knobs);
                }
            }
        }
    }
}

/// Gives a node an empty disk that follows a log which has lost what the node has.
fn help(world: &World, node: usize, process: &Process, knobs: &Knobs) {
    let unready = process.node.readiness.check().err();
    let mut state = world.lock();
    let helpless = unready.filter(|_| state.has_lost_history(node));
    let since = &mut state.nodes[node].helpless_since;
    let Some(unready) = helpless else {
        *since = None;
        return;
    };
    let since = *since.get_or_insert_with(Instant::now);
    drop(state);
    if since.elapsed() > HELP_AFTER {
        world.note(|| format!("node {node} can't go on by itself: {}", unready.state));
        check::keeps_lost(world, node, process);
        process::kill(world, node, true);
        process::start(world, node, knobs);
    }
}

impl State {
    /// Whether the log no longer has what `node` has applied, or has on its disk.
    fn has_lost_history(&self, node: usize) -> bool {
        let slot = &self.nodes[node];
        let lost = |chain: Chain| !self.ledger.holds(chain);
        let is_other_log = |of: &str| self.broker.log().is_none_or(|log| *log.0 != *of);
        let has_lost = |process: &Process| {
            lost(process.node.applied.position().chain) || is_other_log(&process.log.0)
        };
        slot.process.as_ref().is_some_and(has_lost)
            || heads(slot)
                .iter()
                .any(|head: &HeadRecord| lost(head.chain) || is_other_log(&head.log_id))
    }
}

/// Lets `fault` happen and mends it after its time.
async fn happen(world: World, knobs: Knobs, fault: Fault) {
    world.note(|| format!("{fault:?}"));
    if let Fault::Publish { what } = fault
        && what.is_readable()
    {
        what.publish(&mut world.lock());
        return world.change();
    }
    world.lock().begin_fault();
    make_happen(&world, knobs, fault).await;
    world.lock().end_fault();
    world.change();
}

async fn make_happen(world: &World, knobs: Knobs, fault: Fault) {
    let after = |ms: u64| sleep(Duration::from_millis(ms));
    match fault {
        Fault::Cut {
            node,
            mute,
            deaf,
            ms,
        } => {
            world.cut(node, mute, deaf);
            after(ms).await;
            world.cut(node, false, false);
        }
        Fault::Slow { node, ms } => {
            world.slot(node).slow = true;
            after(ms).await;
            world.slot(node).slow = false;
        }
        Fault::Apart { node, ms } => {
            world.slot(node).apart = true;
            after(ms).await;
            world.slot(node).apart = false;
        }
        Fault::Kill { node, wipe, ms } => {
            process::kill(world, node, wipe);
            after(ms).await;
            process::start(world, node, &knobs);
        }
        Fault::Stop { node, ms } => {
            process::stop(world, node).await;
            after(ms).await;
            process::start(world, node, &knobs);
        }
        Fault::BrokerAway { ms } => {
            {
                let mut state = world.lock();
                state.broker.up = false;
                state.break_links();
            }
            world.change();
            after(ms).await;
            world.lock().broker.up = true;
        }
        Fault::BrokerLoses { batches } => world.lock().lose_last(batches),
        Fault::BrokerLosesUnread { node, wipe, ms } => {
            process::kill(world, node, wipe);
            after(ms).await;
            world.slot(node).loses_unread = true;
            process::start(world, node, &knobs);
            after(ASKS_WITHIN_MS).await;
            world.slot(node).loses_unread = false;
        }
        Fault::Recreate => {
            let mut state = world.lock();
            let state = &mut *state;
            let id = format!("{:032x}", state.next_id());
            state.broker.recreate(&id, &mut state.ledger);
            state.note_lost();
            state.break_links();
        }
        Fault::Corrupt { node } => corrupt(world, node),
        Fault::Trim { keep } => world.lock().broker.trim(keep),
        Fault::Lose { node } => world.slot(node).lose_next = true,
        Fault::Repeat { node } => world.slot(node).repeat_next = true,
        Fault::LoseAck { node } => world.slot(node).ack_lost = true,
        Fault::Hold { node, ms } => world.slot(node).hold_next = Some(ms),
        Fault::Isolate {
            node,
            lag,
            leader,
            heartbeats,
            ms,
        } => {
            {
                let mut state = world.lock();
                let (first, end) = (state.broker.first(), state.broker.shown_end());
                let slot = &mut state.nodes[node];
                slot.excuse();
                slot.isolated = Some(Isolated {
                    first,
                    last: end.saturating_sub(lag).max(first - 1),
                    leader_until: leader.then(|| Instant::now() + LEADS_MAX),
                    heartbeats,
                });
            }
            after(ms).await;
            let mut slot = world.slot(node);
            slot.isolated = None;
            slot.excuse();
        }
        Fault::NoLeader { silent, ms } => {
            world.lock().broker.troubles.silent = silent;
            trouble(world, ms, |troubles| &mut troubles.leaderless).await;
        }
        Fault::NoConsumers { ms } => {
            for slot in &mut world.lock().nodes {
                slot.consumer += 1;
            }
            trouble(world, ms, |troubles| &mut troubles.metadata_leaderless).await;
        }
        Fault::Full { ms } => trouble(world, ms, |troubles| &mut troubles.full).await,
        Fault::Gone { ms } => trouble(world, ms, |troubles| &mut troubles.gone).await,
        Fault::NoQuorum { ms } => {
            trouble(world, ms, |troubles| &mut troubles.quorumless).await;
            let mut state = world.lock();
            if state.broker.troubles.quorumless == 0 {
                for message in state.broker.take_proposed() {
                    if state.rng.bool() {
                        let _ = state.publish(message, false);
                    }
                }
            }
        }
        Fault::Short { batches, ms } => {
            {
                let mut state = world.lock();
                let broker = &mut state.broker;
                let least = broker.first() - 1;
                let end = broker.shown_end().saturating_sub(batches).max(least);
                broker.troubles.short = Some(end);
                state.break_links();
            }
            after(ms).await;
            world.lock().broker.troubles.short = None;
        }
        Fault::Publish { what } => what.publish(&mut world.lock()),
        Fault::Suspend {
            node,
            alive,
            stored,
            ms,
        } => {
            {
                let mut slot = world.slot(node);
                (slot.frozen, slot.freeze_when_stored) = (!stored, stored);
            }
            if stored {
                after(STORES_WITHIN_MS).await;
                world.slot(node).freeze_when_stored = false;
            }
            after(ms / 2).await;
            world.lock().broker.jump(JUMP);
            after(ms / 2).await;
            let mut slot = world.slot(node);
            slot.frozen = false;
            slot.excuse();
            if !alive {
                slot.break_links();
            }
        }
        Fault::BreakBackup { node, after } => {
            world.slot(node).break_backup_after = Some(after);
        }
        Fault::ChangeBackup { node, at } => {
            world.slot(node).change_backup_at = Some(at);
        }
    }
}

/// Changes a record of `node`, if it has one and all nodes are ready: one that starts would copy it.
fn corrupt(world: &World, node: usize) {
    let mut state = world.lock();
    let is_ready = |slot: &Slot| {
        let process = slot.process.as_ref();
        process.is_some_and(|process| process.node.readiness.check().is_ok())
    };
    let process = state.nodes[node].process.clone();
    let Some(process) = process.filter(|_| state.nodes.iter().all(is_ready)) else {
        return;
    };
    let store = &process.node.store;
    let (mut scan, mut batch) = (store.scan(), RecordBatch::default());
    let mut first: Option<Patch> = None;
    while scan.next_into(&mut batch) {
        for (user_id, values) in batch.iter() {
            // The order of a scan is not the same in two runs.
            if first.as_ref().is_none_or(|first| user_id < &*first.user_id) {
                let mut changes = Changes::default();
                // A field that the writes at the end of a run do not repair.
                changes.set(3, values[3] ^ 1);
                let user_id = user_id.into();
                first = Some(Patch { user_id, changes });
            }
        }
    }
    if let Some(patch) = first {
        store.apply_all(&[Write::Set(patch)]);
        state.corrupted = Some(node);
        state.nodes[node].is_corrupted = true;
    }
}

/// The broker is in some trouble for a while.
async fn trouble(world: &World, ms: u64, which: impl Fn(&mut Troubles) -> &mut u32) {
    let change = |by: i32| {
        let mut state = world.lock();
        let count = which(&mut state.broker.troubles);
        *count = count.saturating_add_signed(by);
        state.nodes.iter_mut().for_each(Slot::excuse);
    };
    change(1);
    world.change();
    sleep(Duration::from_millis(ms)).await;
    change(-1);
}
