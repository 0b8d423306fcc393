//! Checks the invariants of a node from outside.

use std::sync::atomic::Ordering;
use std::time::Duration;

use gradestore::replication::state::NodeState;
use gradestore::store::RecordBatch;
use tokio::time::Instant;

use crate::consumer::ARRIVE_MAX;
use crate::process::{Knobs, Process, WRITE_SILENCE};
use crate::world::World;

/// An upper bound on the memory of any batch of these runs.
const ENTRY_BYTES_MAX: u64 = 16 * 1024;

/// How soon a node must report that the broker rejects its batches.
const REJECTED_MAX: Duration = Duration::from_secs(5);
/// How soon a node must report that the broker stores none of its batches.
const SILENCE_MAX: Duration = Knobs::WRITE_WAIT_MAX
    .saturating_add(WRITE_SILENCE)
    .saturating_add(Duration::from_secs(2));

/// Checks the state of `process` at `node`; with `fields` every field of every record.
pub fn check_node(world: &World, node: usize, process: &Process, knobs: &Knobs, fields: bool) {
    let node_state = &process.node;
    let gaps = process.gaps.load(Ordering::Relaxed);
    if gaps > world.slot(node).losses {
        world.violate(format!(
            "node {node} misses a batch that was delivered to it"
        ));
    }
    let is_corrupted = is_corrupted(world, node, process);
    // While one node is corrupted, another one may have no majority.
    if world.lock().corrupted.is_none() {
        if process.divergences.load(Ordering::Relaxed) > 0 {
            world.violate(format!("node {node} reports a digest mismatch with a peer"));
        }
        if node_state.readiness.state() == NodeState::Diverged {
            world.violate(format!(
                "node {node} reports divergence although its state is correct"
            ));
        }
    }
    if is_corrupted {
        return;
    }
    if node_state.writer.queue_requests() > knobs.queue_requests_max {
        world.violate(format!("node {node} has too many requests in its queue"));
    }
    if let Some(restore) = node_state.restore.current() {
        let bytes = restore.buffer.bytes();
        if bytes > knobs.buffer_bytes_max + ARRIVE_MAX as u64 * ENTRY_BYTES_MAX {
            world.violate(format!("node {node} buffers {bytes} bytes of the log"));
        }
    }
    check_write_health(world, node, process);
    let Err(unready) = node_state.readiness.check() else {
        return check_state(world, node, process, fields);
    };
    let (records, position) = (node_state.store.len(), node_state.applied.seq());
    if unready.state == NodeState::NoSource && (records, position) != (0, 0) {
        world.violate(format!(
            "node {node} has no source, but {records} records at batch {position}"
        ));
    }
}

/// Whether a record of the node was corrupted and is still wrong.
fn is_corrupted(world: &World, node: usize, process: &Process) -> bool {
    let (position, digest) = (process.node.applied.position(), process.node.store.digest());
    let mut state = world.lock();
    let correct = state.ledger.state(&position).map(|(_, digest)| digest);
    state.nodes[node].is_corrupted &= correct != Some(digest);
    state.nodes[node].is_corrupted
}

/// A node reports that its writes are not stored.
fn check_write_health(world: &World, node: usize, process: &Process) {
    let slot = world.slot(node);
    let longer = |since: Option<Instant>, max| since.is_some_and(|since| since.elapsed() > max);
    let rejected = longer(slot.rejected_since, REJECTED_MAX);
    let silent = longer(slot.unstored_since, SILENCE_MAX);
    drop(slot);
    if (rejected || silent) && process.node.log.unwritable().is_none() {
        let what = match rejected {
            true => "the broker rejects its batches",
            false => "the broker stores none of its batches",
        };
        world.violate(format!("node {node} accepts writes although {what}"));
    }
}

/// A node serves the state at its position, and is not ready before the log's end at its start.
fn check_state(world: &World, node: usize, process: &Process, fields: bool) {
    let shown = &process.node;
    let position = shown.applied.position();
    let (digest, records) = (shown.store.digest(), shown.store.len());
    let state = world.lock();
    let Some((expected, expected_digest)) = state.ledger.state(&position) else {
        drop(state);
        let what = format!("node {node} is at {position:?}, which no log ever had");
        return world.violate(what);
    };
    let mut wrong = None;
    if digest != expected_digest || records != expected.len() {
        wrong = Some(format!(
            "node {node} at batch {} serves {records} records with digest {digest}; it should be \
             {} with {expected_digest}",
            position.seq,
            expected.len(),
        ));
    }
    if fields {
        let mut found = 0;
        let (mut scan, mut batch) = (shown.store.scan(), RecordBatch::default());
        while scan.next_into(&mut batch) {
            for (user_id, values) in batch.iter() {
                found += 1;
                if expected.get(user_id) != Some(values) {
                    wrong = Some(format!(
                        "node {node} at batch {} serves {user_id} as {values:?}, not {:?}",
                        position.seq,
                        expected.get(user_id),
                    ));
                }
            }
        }
        if found != expected.len() {
            wrong = Some(format!(
                "node {node} serves {found} records of {}",
                expected.len()
            ));
        }
    }
    let end = state.nodes[node].log_end_at_start;
    let held = end.filter(|end| state.ledger.holds(end.chain));
    if let Some(end) = held.filter(|end| position.seq < end.seq) {
        wrong = Some(format!(
            "node {node} is ready at batch {}, before batch {}, where the log ended when it started",
            position.seq, end.seq,
        ));
    }
    drop(state);
    if let Some(wrong) = wrong {
        world.violate(wrong);
    }
}

/// A node keeps batches that the log has lost, because an operator may need them.
pub fn check_keeps_lost_batches(world: &World, node: usize, process: &Process) {
    let position = process.node.applied.position();
    let state = world.lock();
    let Some(lost) = state.nodes[node].lost else {
        return;
    };
    let entry = state.ledger.find(position.chain, lost.seq);
    let is_kept = entry.is_some_and(|entry| entry.position == lost);
    drop(state);
    if !is_kept {
        world.violate(format!(
            "node {node} is at batch {} and discarded batch {}, which the log lost",
            position.seq, lost.seq
        ));
    }
}

/// Whether `node` is ready for reads and writes and at the end of the log.
pub fn caught_up(world: &World, node: usize) -> bool {
    let process = world.slot(node).process.clone();
    let last = world.lock().broker.last();
    process.is_some_and(|process| {
        let (node, position) = (&process.node, process.node.applied.position());
        let at_end = last.is_some_and(|last| last.chain == position.chain);
        node.readiness.check().is_ok() && node.log.unwritable().is_none() && at_end
    })
}
