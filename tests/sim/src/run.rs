//! One run: executes a plan and checks that the cluster recovers.

use std::sync::atomic::Ordering;
use std::time::Duration;

use gradestore::backup::HeadRecord;
use gradestore::log::Chain;
use gradestore::replication::state::NodeState;
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::check;
use crate::client::Client;
use crate::fault::inject;
use crate::plan::Plan;
use crate::process::{self, Knobs, Process, snapshot_heads};
use crate::world::{State, World};

/// How often the invariants of all nodes are checked.
const CHECK_EVERY: Duration = Duration::from_millis(700);
/// How long a node is unready, because the log has lost its batches, before the operator wipes its
/// disk.
const WIPE_AFTER: Duration = Duration::from_secs(45);
/// How soon after the last fault all nodes must have recovered, without and with an operator.
const RECOVERED_AFTER: Duration = Duration::from_secs(180);
const RECOVERED_WITH_OPERATOR_AFTER: Duration = Duration::from_secs(400);

/// A corrupted record is detected and repaired within this time, once there are writes.
const REPAIRED_AFTER: Duration = Duration::from_secs(60);

/// The result of a run.
pub struct Outcome {
    /// The first violated invariant.
    pub violation: Option<String>,
    /// The events, if they were recorded.
    pub history: Vec<String>,
    /// The number of acknowledged writes.
    pub acknowledged: u64,
    /// Whether the faults left no node with the data.
    pub data_lost: bool,
}

/// Runs `plan`. The same plan gives the same history.
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
        let data_lost = execute(&world, plan).await;
        for node in 0..plan.nodes {
            process::kill(&world, node, false, &plan.knobs);
        }
        let acknowledged = world.lock().acknowledged;
        let (violation, history) = world.take_results();
        Outcome {
            violation,
            history,
            acknowledged,
            data_lost,
        }
    })
}

/// Executes `plan`. Returns whether the faults left no node with the data.
async fn execute(world: &World, plan: &Plan) -> bool {
    let started = Instant::now();
    for node in 0..plan.nodes {
        if plan.knobs.snapshots {
            world.slot(node).dir = Some(process::new_disk());
        }
        process::start(world, node, &plan.knobs);
    }
    let mut background = JoinSet::new();
    background.spawn(watch(
        world.clone(),
        plan.knobs.clone(),
        plan.loses_history(),
    ));
    let mut clients = JoinSet::new();
    for (number, ops) in plan.clients.iter().enumerate() {
        let client = Client::new(world.clone(), plan.knobs.clone(), number + 1);
        clients.spawn(client.run(ops.clone()));
    }
    let mut active_faults = JoinSet::new();
    for (at_ms, fault) in &plan.faults {
        sleep_until(started + Duration::from_millis(*at_ms)).await;
        if world.violated() {
            return false;
        }
        active_faults.spawn(inject(world.clone(), plan.knobs.clone(), fault.clone()));
    }
    let (mut rejected, mut sent) = (Vec::new(), Vec::new());
    while let Some(client) = clients.join_next().await {
        match client {
            Ok(client) => {
                rejected.extend(client.rejected);
                sent.extend(client.sent);
            }
            Err(error) => world.violate(format!("a client failed: {error}")),
        }
    }
    while active_faults.join_next().await.is_some() {}
    if world.violated() {
        return false;
    }
    world.note(|| "all faults have ended".into());
    let data_lost = wait_until_recovered(world, plan).await;
    // A deletion may be another client's.
    for write in rejected.iter().filter(|write| !sent.contains(write)) {
        let found = world.lock().ledger.find_write(|found| found == write);
        if let Some(seq) = found {
            world.violate(format!("{write:?} was rejected and is in batch {seq}"));
        }
    }
    data_lost
}

/// Waits until every node is ready at the end of the log. Returns whether no node has the data.
async fn wait_until_recovered(world: &World, plan: &Plan) -> bool {
    let wait_max = match plan.loses_history() {
        true => RECOVERED_WITH_OPERATOR_AFTER,
        false => RECOVERED_AFTER,
    };
    let deadline = Instant::now() + wait_max;
    loop {
        let behind = (0..plan.nodes).find(|node| !check::caught_up(world, *node));
        let Some(behind) = behind else {
            break;
        };
        if world.violated() {
            return false;
        }
        if is_data_lost(world, plan) {
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
                "node {behind} does not recover: {state:?}, the log ends at {end}"
            ));
            return false;
        }
        sleep(Duration::from_millis(200)).await;
    }
    let mut client = Client::new(world.clone(), plan.knobs.clone(), plan.clients.len() + 1);
    (0..plan.nodes).for_each(|node| world.slot(node).clear_one_shot_faults());
    for node in 0..plan.nodes {
        client.set_at(node).await;
    }
    if let Some(node) = plan.corrupted() {
        wait_until_repaired(world, node).await;
    }
    for node in 0..plan.nodes {
        let process = world.slot(node).process.clone();
        if let Some(process) = process {
            check::check_node(world, node, &process, &plan.knobs, true);
            let resyncs = process.resyncs.load(Ordering::Relaxed);
            if resyncs > 0 && !plan.loses_log() && plan.corrupted() != Some(node) {
                world.violate(format!(
                    "node {node} discarded its state although nothing was lost"
                ));
            }
        }
    }
    false
}

/// Waits until `node`, which has a corrupted record, has the right state again.
async fn wait_until_repaired(world: &World, node: usize) {
    let deadline = Instant::now() + REPAIRED_AFTER;
    while world.slot(node).is_corrupted || !check::caught_up(world, node) {
        if Instant::now() > deadline {
            world.violate(format!("node {node} still has a corrupted record"));
        }
        if world.violated() {
            return;
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// Whether no node is ready, no snapshot is covered by the log, and the log is trimmed.
fn is_data_lost(world: &World, plan: &Plan) -> bool {
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
    let has_snapshot = state.nodes.iter().any(|slot| {
        let dir = slot.dir.as_ref().filter(|_| plan.knobs.snapshots);
        let snapshots = dir.map(|dir| gradestore::backup::Snapshots::in_dir(dir.path()));
        let found = snapshots.and_then(|snapshots| snapshots.list().ok());
        let usable = |position: u64| (first..=end + 1).contains(&(position + 1));
        found.is_some_and(|found| found.iter().any(|(position, _)| usable(*position)))
    });
    first > 1 && waiting && !ready && !has_snapshot
}

/// Checks all nodes every 0.7 s, and acts as the operator.
async fn watch(world: World, knobs: Knobs, loses_history: bool) {
    loop {
        sleep(CHECK_EVERY).await;
        let nodes = world.lock().nodes.len();
        for node in 0..nodes {
            let process = world.slot(node).process.clone();
            if let Some(process) = process {
                check::check_node(&world, node, &process, &knobs, false);
                if loses_history {
                    wipe_if_stuck(&world, node, &process, &knobs);
                }
            }
        }
    }
}

/// Wipes the disk of a node that has been stuck for some time, because the log has lost its
/// batches.
fn wipe_if_stuck(world: &World, node: usize, process: &Process, knobs: &Knobs) {
    let unready = process.node.readiness.check().err();
    let mut state = world.lock();
    let stuck = unready.filter(|_| state.has_lost_history(node));
    let since = &mut state.nodes[node].stuck_since;
    let Some(unready) = stuck else {
        *since = None;
        return;
    };
    let since = *since.get_or_insert_with(Instant::now);
    drop(state);
    if since.elapsed() > WIPE_AFTER {
        world.note(|| format!("node {node} needs an operator: {}", unready.state));
        check::check_keeps_lost_batches(world, node, process);
        process::kill(world, node, true, knobs);
        process::start(world, node, knobs);
    }
}

impl State {
    /// Whether the log has lost batches that `node` has applied or has on its disk.
    fn has_lost_history(&self, node: usize) -> bool {
        let slot = &self.nodes[node];
        let lost = |chain: Chain| !self.ledger.holds(chain);
        let is_other_log = |of: &str| self.broker.log().is_none_or(|log| *log.0 != *of);
        let has_lost = |process: &Process| {
            lost(process.node.applied.position().chain) || is_other_log(&process.log.0)
        };
        slot.process.as_ref().is_some_and(has_lost)
            || snapshot_heads(slot)
                .iter()
                .any(|head: &HeadRecord| lost(head.chain) || is_other_log(&head.log_id))
    }
}
