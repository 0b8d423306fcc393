//! What must hold, looked at from outside a node.

use std::sync::atomic::Ordering;

use gradestore::log::Seq;
use gradestore::store::Piece;

use crate::process::{Knobs, Process};
use crate::twin::GIVE_MAX;
use crate::world::World;

/// No batch of these runs takes more memory than this.
const ENTRY_BYTES_MAX: u64 = 16 * 1024;

/// Looks at what `process` at `node` shows now; with `fields` at every field of every record.
pub fn look(world: &World, node: usize, process: &Process, knobs: &Knobs, fields: bool) {
    let shown = &process.node;
    let gaps = process.gaps.load(Ordering::Relaxed);
    if gaps > world.slot(node).losses {
        world.violate(format!("node {node} misses a batch that was given to it"));
    }
    if process.divergences.load(Ordering::Relaxed) > 0 {
        world.violate(format!(
            "node {node} heard that a peer holds something else"
        ));
    }
    if shown.writer.queue_patches() > knobs.queue_patches_max {
        world.violate(format!("node {node} lets too many patches wait"));
    }
    if let Some(restore) = shown.restore.current() {
        let bytes = restore.buffer.bytes();
        if bytes > knobs.buffer_bytes_max + GIVE_MAX as u64 * ENTRY_BYTES_MAX {
            world.violate(format!("node {node} holds {bytes} bytes of the log"));
        }
    }
    let Err(unready) = shown.readiness.reads() else {
        return whole(world, node, process, fields);
    };
    let (records, position) = (shown.store.len(), shown.applied.seq());
    if unready.state == "no-source" && (records, position) != (0, 0) {
        let held = format!("{records} records of batch {position}");
        world.violate(format!("node {node} has no source, yet {held}"));
    }
}

/// What is served is the state at the position, and not an old one.
fn whole(world: &World, node: usize, process: &Process, fields: bool) {
    let shown = &process.node;
    let position = shown.applied.position();
    let (digest, records) = (shown.store.digest(), shown.store.len());
    let state = world.lock();
    let Some((expected, expected_digest)) = state.ledger.state(position.seq, position.time_ns)
    else {
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
        let (mut scan, mut piece) = (shown.store.scan(), Piece::default());
        while scan.next_into(&mut piece) {
            for (user_id, values) in piece.iter() {
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
    let (fence, fence_ns) = state.nodes[node].fence;
    let held = state.ledger.at(fence_ns).is_some_and(|place| !place.lost);
    if held && position.seq < fence {
        wrong = Some(format!(
            "node {node} is ready at batch {}, before batch {fence}, where the log ended when it started",
            position.seq,
        ));
    }
    drop(state);
    if let Some(wrong) = wrong {
        world.violate(wrong);
    }
}

/// Whether `node` is ready and at the end of the log.
pub fn caught_up(world: &World, node: usize) -> bool {
    let process = world.slot(node).process.clone();
    let end: Seq = world.lock().broker.end();
    process.is_some_and(|process| {
        process.node.readiness.writes().is_ok() && process.node.applied.seq() == end
    })
}
