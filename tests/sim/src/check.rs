//! What must hold, looked at from outside a node.

use std::sync::atomic::Ordering;
use std::time::Duration;

use gradestore::replication::state::NodeState;
use gradestore::store::RecordBatch;
use tokio::time::Instant;

use crate::process::{Knobs, Process, WRITE_SILENCE};
use crate::wire::ARRIVE_MAX;
use crate::world::World;

/// No batch of these runs takes more memory than this.
const ENTRY_BYTES_MAX: u64 = 16 * 1024;

/// By then a node must have noticed that the broker refuses its batches.
const REFUSED_MAX: Duration = Duration::from_secs(5);
/// And by then that it stores none.
const SILENCE_MAX: Duration = Knobs::WRITE_WAIT_MAX
    .saturating_add(WRITE_SILENCE)
    .saturating_add(Duration::from_secs(2));

/// Looks at what `process` at `node` shows now; with `fields` at every field of every record.
pub fn look(world: &World, node: usize, process: &Process, knobs: &Knobs, fields: bool) {
    let shown = &process.node;
    let gaps = process.gaps.load(Ordering::Relaxed);
    if gaps > world.slot(node).losses {
        world.violate(format!("node {node} misses a batch that was given to it"));
    }
    let is_corrupted = is_corrupted(world, node, process);
    // Where one node is wrong, another one may have no majority for a while.
    if world.lock().corrupted.is_none() {
        if process.divergences.load(Ordering::Relaxed) > 0 {
            world.violate(format!(
                "node {node} heard that a peer holds something else"
            ));
        }
        if shown.readiness.state() == NodeState::Diverged {
            world.violate(format!(
                "node {node} reports divergence although its state is right"
            ));
        }
    }
    if is_corrupted {
        return;
    }
    if shown.writer.queue_requests() > knobs.queue_requests_max {
        world.violate(format!("node {node} lets too many requests wait"));
    }
    if let Some(restore) = shown.restore.current() {
        let bytes = restore.buffer.bytes();
        if bytes > knobs.buffer_bytes_max + ARRIVE_MAX as u64 * ENTRY_BYTES_MAX {
            world.violate(format!("node {node} holds {bytes} bytes of the log"));
        }
    }
    write_health(world, node, process);
    let Err(unready) = shown.readiness.check() else {
        return whole(world, node, process, fields);
    };
    let (records, position) = (shown.store.len(), shown.applied.seq());
    if unready.state == NodeState::NoSource && (records, position) != (0, 0) {
        let held = format!("{records} records of batch {position}");
        world.violate(format!("node {node} has no source, yet {held}"));
    }
}

/// Whether a record of the node was changed, and is still wrong.
fn is_corrupted(world: &World, node: usize, process: &Process) -> bool {
    let (position, digest) = (process.node.applied.position(), process.node.store.digest());
    let mut state = world.lock();
    let right = state.ledger.state(&position).map(|(_, digest)| digest);
    state.nodes[node].is_corrupted &= right != Some(digest);
    state.nodes[node].is_corrupted
}

/// A node knows that its writes are not stored.
fn write_health(world: &World, node: usize, process: &Process) {
    let slot = world.slot(node);
    let longer = |since: Option<Instant>, max| since.is_some_and(|since| since.elapsed() > max);
    let refused = longer(slot.refused_since, REFUSED_MAX);
    let silent = longer(slot.unstored_since, SILENCE_MAX);
    drop(slot);
    if (refused || silent) && process.node.log.unwritable().is_none() {
        let what = match refused {
            true => "the broker refuses its batches",
            false => "the broker stores none of its batches",
        };
        world.violate(format!("node {node} accepts writes, and {what}"));
    }
}

/// What is served is the state at the position, and not an old one.
fn whole(world: &World, node: usize, process: &Process, fields: bool) {
    let shown = &process.node;
    let position = shown.applied.position();
    let (digest, records) = (shown.store.digest(), shown.store.len());
    let state = world.lock();
    let Some((expected, expected_digest)) = state.ledger.state(&position) else {
        drop(state);
        let what = format!("node {node} is at {position:?}, where no log ever was");
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
                "node {node} shows {found} records of {}",
                expected.len()
            ));
        }
    }
    let fence = state.nodes[node].fence;
    let held = fence.filter(|fence| state.ledger.holds(fence.chain));
    if let Some(fence) = held.filter(|fence| position.seq < fence.seq) {
        wrong = Some(format!(
            "node {node} is ready at batch {}, before batch {}, where the log ended when it started",
            position.seq, fence.seq,
        ));
    }
    drop(state);
    if let Some(wrong) = wrong {
        world.violate(wrong);
    }
}

/// A node keeps what the log has lost: an operator may need it.
pub fn keeps_lost(world: &World, node: usize, process: &Process) {
    let position = process.node.applied.position();
    let state = world.lock();
    let Some(lost) = state.nodes[node].lost else {
        return;
    };
    let place = state.ledger.find(position.chain, lost.seq);
    let is_kept = place.is_some_and(|place| place.position == lost);
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
