//! Injects faults.

use std::time::Duration;

use gradestore::grade::{Changes, Patch, Write};
use gradestore::store::RecordBatch;
use tokio::time::{Instant, sleep};

use crate::broker::BrokerFaults;
use crate::plan::Fault;
use crate::process::{self, Knobs};
use crate::world::{Isolated, Slot, World};

/// How far the broker's clock jumps ahead of a suspended process, so that it forgets message ids.
const CLOCK_JUMP: Duration = Duration::from_secs(130);
/// A node that starts requests the log's end within this time.
const REQUESTS_END_WITHIN_MS: u64 = 2000;
/// How long a server that lost its routes keeps leading the stream.
const LEADS_MAX: Duration = Duration::from_secs(21);
/// Within this time the broker stores a message of a node that is then suspended.
const STORES_WITHIN_MS: u64 = 1000;

/// Injects `fault` and ends it after its duration.
pub async fn inject(world: World, knobs: Knobs, fault: Fault) {
    world.note(|| format!("{fault:?}"));
    if let Fault::Publish { what } = fault
        && what.is_readable()
    {
        what.publish(&mut world.lock());
        return world.change();
    }
    world.lock().begin_fault();
    inject_fault(&world, knobs, fault).await;
    world.lock().end_fault();
    world.change();
}

async fn inject_fault(world: &World, knobs: Knobs, fault: Fault) {
    match fault {
        Fault::Kill { .. } | Fault::Stop { .. } | Fault::Suspend { .. } => {
            process_fault(world, &knobs, fault).await;
        }
        Fault::Cut { .. }
        | Fault::Slow { .. }
        | Fault::PeersCut { .. }
        | Fault::BrokerDown { .. }
        | Fault::Isolate { .. } => network_fault(world, fault).await,
        Fault::BrokerLosesBatches { .. }
        | Fault::BrokerLosesUnreadBatches { .. }
        | Fault::Recreate
        | Fault::Trim { .. }
        | Fault::NoLeader { .. }
        | Fault::NoConsumers { .. }
        | Fault::NoQuorum { .. }
        | Fault::StorageFull { .. }
        | Fault::StreamGone { .. }
        | Fault::ShorterStream { .. } => stream_fault(world, &knobs, fault).await,
        Fault::Corrupt { node } => corrupt(world, node),
        Fault::DropDelivery { node } => world.slot(node).drop_next_delivery = true,
        Fault::RepeatDelivery { node } => world.slot(node).repeat_next_delivery = true,
        Fault::LoseAck { node } => world.slot(node).lose_next_ack = true,
        Fault::DelayPublish { node, ms } => world.slot(node).delay_next_publish_ms = Some(ms),
        Fault::TruncateBackup { node, after } => {
            world.slot(node).truncate_next_backup_at = Some(after);
        }
        Fault::CorruptBackup { node, at } => {
            world.slot(node).corrupt_next_backup_at = Some(at);
        }
        Fault::Publish { what } => what.publish(&mut world.lock()),
    }
}

async fn after(ms: u64) {
    sleep(Duration::from_millis(ms)).await;
}

/// Faults of a node's process.
async fn process_fault(world: &World, knobs: &Knobs, fault: Fault) {
    match fault {
        Fault::Kill { node, wipe, ms } => {
            process::kill(world, node, wipe, knobs);
            after(ms).await;
            process::start(world, node, knobs);
        }
        Fault::Stop { node, ms } => {
            process::stop(world, node).await;
            after(ms).await;
            process::start(world, node, knobs);
        }
        Fault::Suspend {
            node,
            alive,
            stored,
            ms,
        } => {
            {
                let mut slot = world.slot(node);
                (slot.suspended, slot.suspend_when_stored) = (!stored, stored);
            }
            if stored {
                after(STORES_WITHIN_MS).await;
                world.slot(node).suspend_when_stored = false;
            }
            after(ms / 2).await;
            world.lock().broker.jump(CLOCK_JUMP);
            after(ms / 2).await;
            let mut slot = world.slot(node);
            slot.suspended = false;
            slot.allow_reconnect();
            if !alive {
                slot.break_links();
            }
        }
        _ => {}
    }
}

/// Faults of the network between nodes and servers.
async fn network_fault(world: &World, fault: Fault) {
    match fault {
        Fault::Cut {
            node,
            outbound_cut,
            inbound_cut,
            ms,
        } => {
            world.cut(node, outbound_cut, inbound_cut);
            after(ms).await;
            world.cut(node, false, false);
        }
        Fault::Slow { node, ms } => {
            world.slot(node).slow = true;
            after(ms).await;
            world.slot(node).slow = false;
        }
        Fault::PeersCut { node, ms } => {
            world.slot(node).cut_from_peers = true;
            after(ms).await;
            world.slot(node).cut_from_peers = false;
        }
        Fault::BrokerDown { ms } => {
            {
                let mut state = world.lock();
                state.broker.up = false;
                state.break_links();
            }
            world.change();
            after(ms).await;
            world.lock().broker.up = true;
        }
        Fault::Isolate {
            node,
            lag,
            leader,
            heartbeats,
            ms,
        } => {
            {
                let mut state = world.lock();
                let (first, end) = (state.broker.first(), state.broker.visible_end());
                let slot = &mut state.nodes[node];
                slot.allow_reconnect();
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
            slot.allow_reconnect();
        }
        _ => {}
    }
}

/// Faults of the stream and of the servers that hold it.
async fn stream_fault(world: &World, knobs: &Knobs, fault: Fault) {
    match fault {
        Fault::BrokerLosesBatches { batches } => world.lock().lose_last(batches),
        Fault::BrokerLosesUnreadBatches { node, wipe, ms } => {
            process::kill(world, node, wipe, knobs);
            after(ms).await;
            world.slot(node).loses_unread = true;
            process::start(world, node, knobs);
            after(REQUESTS_END_WITHIN_MS).await;
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
        Fault::Trim { keep } => world.lock().broker.trim(keep),
        Fault::NoLeader { silent, ms } => {
            world.lock().broker.faults.silent = silent;
            broker_fault(world, ms, |faults| &mut faults.no_leader).await;
        }
        Fault::NoConsumers { ms } => {
            for slot in &mut world.lock().nodes {
                slot.consumer += 1;
            }
            broker_fault(world, ms, |faults| &mut faults.no_metadata_leader).await;
        }
        Fault::StorageFull { ms } => broker_fault(world, ms, |faults| &mut faults.full).await,
        Fault::StreamGone { ms } => broker_fault(world, ms, |faults| &mut faults.gone).await,
        Fault::NoQuorum { ms } => {
            broker_fault(world, ms, |faults| &mut faults.no_quorum).await;
            let mut state = world.lock();
            if state.broker.faults.no_quorum == 0 {
                for message in state.broker.take_proposed() {
                    if state.rng.bool() {
                        let _ = state.publish(message, false);
                    }
                }
            }
        }
        Fault::ShorterStream { batches, ms } => {
            {
                let mut state = world.lock();
                let broker = &mut state.broker;
                let least = broker.first() - 1;
                let end = broker.visible_end().saturating_sub(batches).max(least);
                broker.faults.short = Some(end);
                state.break_links();
            }
            after(ms).await;
            world.lock().broker.faults.short = None;
        }
        _ => {}
    }
}

/// Corrupts a record of `node`, if it has one and all nodes are ready. Another node that starts
/// would copy it.
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
            // The order of a scan differs between runs.
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

/// Increments a fault counter of the broker for `ms`.
async fn broker_fault(world: &World, ms: u64, which: impl Fn(&mut BrokerFaults) -> &mut u32) {
    let change = |by: i32| {
        let mut state = world.lock();
        let count = which(&mut state.broker.faults);
        *count = count.saturating_add_signed(by);
        state.nodes.iter_mut().for_each(Slot::allow_reconnect);
    };
    change(1);
    world.change();
    sleep(Duration::from_millis(ms)).await;
    change(-1);
}
