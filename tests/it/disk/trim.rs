//! Trimming of long logs.

use std::fs;
use std::path::Path;

use gradestore::backup::{FORMAT, HeadRecord, Snapshots};
use gradestore::grade::{Changes, Patch, Write};
use gradestore::log::{Batch, DiskLog, Log};
use gradestore::store::Store;
use gradestore::sys::exec::Blocking;
use tempfile::tempdir;

use crate::disk::kills::assert_consistent;
use crate::harness::Node;
use crate::harness::backup_files::{NodeState, file_names, program_with_data_dir};
use crate::harness::wire::eventually;

/// Creates a log of many segments with one snapshot; returns the state at its end.
async fn long_log(dir: &Path, batches: u64, snapshot_at: u64) -> Store {
    let (store, log) = (Store::new(), DiskLog::open(&dir.join("log"), None).unwrap());
    // The node's next snapshot is the second, and then the log is trimmed up to this one.
    let snapshots = Snapshots::open(&dir.join("snapshots")).unwrap();
    for number in 1..=batches {
        let patches = (0..15_000).map(|user| {
            let mut changes = Changes::default();
            changes.set((number % 4) as usize, (number * user) as i64);
            let user_id = format!("{user:0>250}").into_boxed_str();
            Patch { user_id, changes }
        });
        let writes: Vec<Write> = patches.map(Write::Set).collect();
        // Any four batches set all fields of all users, so older ones leave no trace.
        if number + 4 > batches || (snapshot_at - 3..=snapshot_at).contains(&number) {
            store.apply_all(&writes);
        }
        log.append(Batch {
            ticket: None,
            writes: writes.into(),
            checkpoint: None,
        })
        .await
        .unwrap();
        if number == snapshot_at {
            let position = log.position(number).unwrap().unwrap();
            let head = HeadRecord {
                format: FORMAT,
                created_ns: 1_700_000_000_000_000_000,
                log_id: log.id().0,
                position: number,
                time_ns: 1,
                chain: position.chain,
                previous_chain: position.previous,
                rows_expected: 0,
                shard_seed: None,
            };
            let pool = Blocking::threads();
            let written = snapshots.write(&store, head, || Ok(position), &pool);
            written.await.unwrap();
        }
    }
    store
}

/// The number of segments.
fn segments(dir: &Path) -> usize {
    file_names(&dir.join("log")).len()
}

#[tokio::test]
async fn a_kill_during_a_trim_loses_nothing() {
    let directory = tempdir().unwrap();
    let dir = directory.path();
    let store = long_log(dir, 18, 18).await;
    assert!(segments(dir) > 4, "{} are too few to trim", segments(dir));
    let mut answered = 18;
    loop {
        let node = Node::start_with(program_with_data_dir(dir).arg("--snapshot-interval=1s")).await;
        let held = assert_consistent(&node).await;
        assert!(held.position >= answered, "{held:?}");
        assert_eq!(held, NodeState::of_store(&store, held.position));
        let before = segments(dir);
        if before < 3 {
            break;
        }
        eventually("a trim", async || {
            // A snapshot needs a new batch. This one changes no value.
            let patch = format!(r#"{{"user_id":"{}","spp":0}}"#, "0".repeat(250));
            answered = node.set(patch).await.position();
            (segments(dir) < before).then_some(())
        })
        .await;
        node.kill();
    }
}

#[tokio::test]
async fn a_trimmed_log_covers_the_second_newest_snapshot() {
    let directory = tempdir().unwrap();
    let dir = directory.path();
    let store = long_log(dir, 14, 8).await;
    let held = NodeState::of_store(&store, 14);
    let snapshots = dir.join("snapshots");
    let before = segments(dir);
    let node = Node::start_with(program_with_data_dir(dir).arg("--snapshot-interval=1s")).await;
    eventually("a second snapshot", async || {
        let names = file_names(&snapshots);
        (names.len() == 2 && names[1].ends_with(".gz")).then_some(())
    })
    .await;
    // A stop waits for the trim.
    node.stop().await;
    assert!(segments(dir) < before, "nothing was trimmed");

    let newest = snapshots.join(&file_names(&snapshots)[1]);
    fs::write(newest, "no snapshot").unwrap();
    let node = Node::start_with(&mut program_with_data_dir(dir)).await;
    assert_eq!(assert_consistent(&node).await, held);
}
