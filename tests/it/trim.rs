//! Logs that are long enough to be trimmed.

use std::fs;
use std::path::Path;

use gradestore::backup::{FORMAT, HeadRecord, Snapshots};
use gradestore::grade::{Changes, Patch, Write};
use gradestore::log::{Batch, DiskLog, Log};
use gradestore::store::Store;
use gradestore::sys::exec::Blocking;
use tempfile::tempdir;

use crate::disk::{Held, names_in, program_on};
use crate::durable::assert_consistent;
use crate::harness::Node;
use crate::wire::eventually;

/// Makes a log of many segments, with one snapshot; the store that is the log's sum.
async fn long_log(dir: &Path, batches: u64, snapshot_at: u64) -> Store {
    let (store, log) = (Store::new(), DiskLog::open(&dir.join("log"), None).unwrap());
    // The node's own first one will be the second: then the log is trimmed behind this one.
    let snapshots = Snapshots::open(&dir.join("snapshots")).unwrap();
    for number in 1..=batches {
        let patches = (0..15_000).map(|user| {
            let mut changes = Changes::default();
            changes.set((number % 4) as usize, (number * user) as i64);
            let user_id = format!("{user:0>250}").into_boxed_str();
            Patch { user_id, changes }
        });
        let writes: Vec<Write> = patches.map(Write::Set).collect();
        // Four batches set all fields of all users: those before them leave nothing.
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
                log_id: log.id().0,
                position: number,
                time_ns: 1,
                chain: position.chain,
                previous_chain: position.previous,
                rows_expected: 0,
            };
            let pool = Blocking::threads();
            let written = snapshots.write(&store, head, || Ok(position), &pool);
            written.await.unwrap();
        }
    }
    store
}

/// How many files the log has.
fn segments(dir: &Path) -> usize {
    names_in(&dir.join("log")).len()
}

#[tokio::test]
async fn a_kill_in_the_middle_of_a_trim_loses_nothing() {
    let directory = tempdir().unwrap();
    let dir = directory.path();
    let store = long_log(dir, 18, 18).await;
    assert!(segments(dir) > 4, "{} are too few to trim", segments(dir));
    let mut answered = 18;
    loop {
        let node = Node::start_with(program_on(dir).arg("--snapshot-interval=1s")).await;
        let held = assert_consistent(&node).await;
        assert!(held.position >= answered, "{held:?}");
        assert_eq!(held, Held::in_store(&store, held.position));
        let before = segments(dir);
        if before < 3 {
            break;
        }
        eventually("a trim", async || {
            // Else there would be nothing to take a snapshot of. It changes nothing.
            let patch = format!(r#"{{"user_id":"{}","spp":0}}"#, "0".repeat(250));
            answered = node.set(patch).await.position();
            (segments(dir) < before).then_some(())
        })
        .await;
        node.kill();
    }
}

#[tokio::test]
async fn a_trimmed_log_still_covers_the_snapshot_before_the_newest() {
    let directory = tempdir().unwrap();
    let dir = directory.path();
    let store = long_log(dir, 14, 8).await;
    let held = Held::in_store(&store, 14);
    let snapshots = dir.join("snapshots");
    let before = segments(dir);
    let node = Node::start_with(program_on(dir).arg("--snapshot-interval=1s")).await;
    eventually("a second snapshot", async || {
        let names = names_in(&snapshots);
        (names.len() == 2 && names[1].ends_with(".gz")).then_some(())
    })
    .await;
    // It ends when the trim has.
    node.end().await;
    assert!(segments(dir) < before, "nothing was trimmed");

    let newest = snapshots.join(&names_in(&snapshots)[1]);
    fs::write(newest, "no snapshot").unwrap();
    let node = Node::start_with(&mut program_on(dir)).await;
    assert_eq!(assert_consistent(&node).await, held);
}
