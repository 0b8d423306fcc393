//! One run: the world, its course, and how it must end.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::check;
use crate::client::Client;
use crate::plan::{Fault, Plan};
use crate::process::{self, Knobs};
use crate::world::World;

/// How often nodes are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(700);
/// When an operator would restart a node that says it can't go on; and when take away its disk.
const RESTART_AFTER: Duration = Duration::from_secs(4);
/// By then all must be well again once nothing goes wrong any more.
const WELL_AFTER: Duration = Duration::from_secs(180);

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
        let world = World::new(plan.seed, plan.latency_ms.clone(), plan.nodes, record);
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
    beside.spawn(watch(world.clone(), plan.knobs.clone(), plan.loses_log()));
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
    let mut refused = Vec::new();
    while let Some(client) = clients.join_next().await {
        match client {
            Ok(client) => refused.extend(client.refused),
            Err(error) => world.violate(format!("a client failed: {error}")),
        }
    }
    while healing.join_next().await.is_some() {}
    if world.violated() {
        return false;
    }
    world.note(|| "nothing goes wrong any more".into());
    let nobody = become_well(world, plan).await;
    for patch in &refused {
        let found = world.lock().ledger.anywhere(|there| there == patch);
        if let Some(seq) = found {
            world.violate(format!("{patch:?} was refused and is in batch {seq}"));
        }
    }
    nobody
}

/// Until every node is ready at the end of the log; whether that can't be.
async fn become_well(world: &World, plan: &Plan) -> bool {
    let deadline = Instant::now() + WELL_AFTER;
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
            let state = process.map(|process| process.node.readiness.writes());
            let extent = world.lock().broker.extent();
            world.violate(format!(
                "node {behind} does not become well: {state:?}, {extent:?}"
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
    for node in 0..plan.nodes {
        let process = world.slot(node).process.clone();
        if let Some(process) = process {
            check::look(world, node, &process, &plan.knobs, true);
            let resyncs = process.resyncs.load(Ordering::Relaxed);
            if resyncs > 0 && !plan.loses_place() {
                world.violate(format!("node {node} began anew though nothing was lost"));
            }
        }
    }
    false
}

/// Whether no node is ready, none has a snapshot that the log goes on from, and the log does not
/// begin at its first batch.
fn nobody_has_it(world: &World, plan: &Plan) -> bool {
    let state = world.lock();
    let extent = state.broker.extent();
    let ready = state.nodes.iter().any(|slot| {
        let process = slot.process.as_ref();
        process.is_some_and(|process| process.node.readiness.reads().is_ok())
    });
    let waiting = state.nodes.iter().all(|slot| {
        let process = slot.process.as_ref();
        let state = process.and_then(|process| process.node.readiness.reads().err());
        state.is_some_and(|unready| unready.state == "no-source")
    });
    let kept = state.nodes.iter().any(|slot| {
        let dir = slot.dir.as_ref().filter(|_| plan.knobs.snapshots);
        let snapshots = dir.map(|dir| gradestore::backup::Snapshots::open(dir.path()));
        let found = snapshots.and_then(|snapshots| snapshots.ok()?.list().ok());
        let usable = |position: u64| (extent.first..=extent.end + 1).contains(&(position + 1));
        found.is_some_and(|found| found.iter().any(|(position, _)| usable(*position)))
    });
    extent.first > 1 && waiting && !ready && !kept
}

/// Looks at all nodes now and then, and does what an operator would do.
async fn watch(world: World, knobs: Knobs, loses_log: bool) {
    loop {
        sleep(LOOK_EVERY).await;
        let nodes = world.lock().nodes.len();
        for node in 0..nodes {
            let process = world.slot(node).process.clone();
            if let Some(process) = process {
                check::look(&world, node, &process, &knobs, false);
                help(&world, node, &process, &knobs, loses_log);
            }
        }
    }
}

/// Restarts a node that says that it can't go on by itself; one that still can't, or begins with
/// what does not belong to this log, gets an empty disk.
fn help(world: &World, node: usize, process: &process::Process, knobs: &Knobs, loses_log: bool) {
    let helpless = process.node.readiness.reads().err();
    let helpless = helpless.filter(|unready| {
        unready.state == "gap"
            || unready.reason.contains("--restore-from") && !unready.reason.contains("no snapshot")
    });
    let mut slot = world.slot(node);
    let Some(unready) = helpless else {
        slot.helpless_since = None;
        slot.restarted = false;
        return;
    };
    if !loses_log {
        drop(slot);
        let why = &unready.reason;
        return world.violate(format!(
            "node {node} needs help though nothing was lost: {why}"
        ));
    }
    let wipe = unready.state != "gap" || slot.restarted;
    let since = *slot.helpless_since.get_or_insert_with(Instant::now);
    drop(slot);
    if since.elapsed() > RESTART_AFTER {
        world.note(|| format!("node {node} can't go on by itself: {}", unready.state));
        process::kill(world, node, wipe);
        world.slot(node).restarted = true;
        process::start(world, node, knobs);
    }
}

/// Lets `fault` happen and mends it after its time.
async fn happen(world: World, knobs: Knobs, fault: Fault) {
    world.note(|| format!("{fault:?}"));
    let after = |ms: u64| sleep(Duration::from_millis(ms));
    match fault {
        Fault::Cut {
            node,
            mute,
            deaf,
            ms,
        } => {
            world.lock().cut(node, mute, deaf);
            after(ms).await;
            world.lock().cut(node, false, false);
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
            process::kill(&world, node, wipe);
            after(ms).await;
            process::start(&world, node, &knobs);
        }
        Fault::Stop { node, ms } => {
            process::stop(&world, node).await;
            after(ms).await;
            process::start(&world, node, &knobs);
        }
        Fault::BrokerAway { ms } => {
            {
                let mut state = world.lock();
                state.broker.up = false;
                state.end_sessions();
            }
            world.change();
            after(ms).await;
            world.lock().broker.up = true;
        }
        Fault::BrokerLoses { batches } => {
            let mut state = world.lock();
            let state = &mut *state;
            state.broker.lose_last(batches, &mut state.ledger);
            state.end_sessions();
        }
        Fault::Recreate => {
            let mut state = world.lock();
            let state = &mut *state;
            state.broker.recreate(&mut state.ledger);
            state.end_sessions();
        }
        Fault::Trim { keep } => world.lock().broker.trim(keep),
        Fault::Lose { node } => world.slot(node).lose_next = true,
        Fault::Repeat { node } => world.slot(node).repeat_next = true,
        Fault::LoseAck { node } => world.slot(node).ack_lost = true,
        Fault::StoreTwice { node } => world.slot(node).store_twice = true,
        Fault::BreakBackup { node, after } => {
            world.slot(node).break_backup_after = Some(after);
        }
        Fault::ChangeBackup { node, at } => {
            world.slot(node).change_backup_at = Some(at);
        }
    }
    world.change();
}
