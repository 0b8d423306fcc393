//! A full disk: writes are rejected until space is free, reads continue, and no acknowledged write
//! is lost.

use std::path::Path;

use gradestore::grade::{Changes, Patch, Write};
use gradestore::log::{Batch, DiskLog, Log};
use tempfile::tempdir;

use super::file_size_limit::{assert_accepts_writes, set};
use crate::harness::backup_files::{
    NodeState, fetch_backup, program_with_data_dir, random_store, read_backup, write_backup_file,
};
use crate::harness::small_disk::SmallDisk;
use crate::harness::wire::{eventually, with_timeout};
use crate::harness::{Node, run};

/// Larger than one segment.
const DISK_MIB: usize = 24;

async fn assert_read_only(node: &Node, data: &Path, held: &NodeState) {
    for _ in 0..10 {
        let detail = set(node, 0).await.expect_problem(503, "not-written");
        assert!(
            detail.contains("full") && detail.contains(data.to_str().unwrap()),
            "{detail}"
        );
    }
    assert_eq!(node.get("user 1").await.json()["spp"], 1);
    assert_eq!(node.ops("/readyz").await.status, 200);
    let reason = node
        .ops("/readyz/write")
        .await
        .expect_problem(503, "not-ready");
    assert!(reason.contains("full"), "{reason}");
    assert_eq!(node.status().await["state"], "read-only");
    assert_eq!(&NodeState::of(node).await, held);
    // An operator may want a backup first.
    let (store, _) = read_backup(&fetch_backup(node).await);
    assert_eq!(&NodeState::of_store(&store, held.position), held);
}

/// Whether the metrics report free space in the data directory.
async fn has_free_space(node: &Node) -> bool {
    let size = node.metric("gradestore_data_dir_size_bytes").await;
    assert_eq!(size, Some((DISK_MIB << 20) as f64));
    let free = node.metric("gradestore_data_dir_free_bytes").await;
    free.unwrap() >= f64::from(1 << 20)
}

#[tokio::test]
async fn a_full_disk_rejects_writes_until_space_is_free() {
    let disk = SmallDisk::new(DISK_MIB);
    let data = disk.data_dir();
    let node = Node::start_with(program_with_data_dir(&data).arg("--snapshot-interval=1s")).await;
    let mut held;
    for round in 0..3 {
        for value in 1..20 {
            set(&node, round * 100 + value).await.position();
        }
        assert!(has_free_space(&node).await);
        let ballast = disk.fill(0);
        held = NodeState::of(&node).await;
        assert_read_only(&node, &data, &held).await;
        assert!(!has_free_space(&node).await);
        drop(ballast);
        assert!(has_free_space(&node).await);
        assert_accepts_writes(&node, round * 100 + 50).await;
    }

    let ballast = disk.fill(0);
    held = NodeState::of(&node).await;
    assert_read_only(&node, &data, &held).await;
    node.kill();
    drop(ballast);
    let node = Node::start_with(&mut program_with_data_dir(&data)).await;
    assert_eq!(NodeState::of(&node).await, held);
    held = assert_accepts_writes(&node, 99).await;
    node.kill();
    let node = Node::start_with(&mut program_with_data_dir(&data)).await;
    assert_eq!(NodeState::of(&node).await, held);
}

#[tokio::test]
async fn a_node_starts_on_a_full_disk_and_serves_reads() {
    let disk = SmallDisk::new(DISK_MIB);
    let data = disk.data_dir();
    let node = Node::start_with(&mut program_with_data_dir(&data)).await;
    for value in 1..20 {
        set(&node, value).await.position();
    }
    let ballast = disk.fill(0);
    let held = NodeState::of(&node).await;
    node.kill();
    let node = Node::start_with(&mut program_with_data_dir(&data)).await;
    assert_read_only(&node, &data, &held).await;
    // There is no space for a final snapshot; the log has everything.
    node.stop().await;
    let node = Node::start_with(&mut program_with_data_dir(&data)).await;
    assert_read_only(&node, &data, &held).await;
    drop(ballast);
    // The log checks for free space periodically.
    eventually("a write", async || {
        (set(&node, 98).await.status == 204).then_some(())
    })
    .await;
    let held = assert_accepts_writes(&node, 99).await;
    node.kill();
    let node = Node::start_with(&mut program_with_data_dir(&data)).await;
    assert_eq!(NodeState::of(&node).await, held);
}

#[tokio::test]
async fn a_file_system_that_does_not_report_its_space_is_written_to() {
    let disk = SmallDisk::of_unknown_size();
    let data = disk.data_dir();
    let node = Node::start_with(program_with_data_dir(&data).arg("--snapshot-interval=1s")).await;
    let held = assert_accepts_writes(&node, 1).await;
    for metric in ["free", "size"] {
        let name = format!("gradestore_data_dir_{metric}_bytes");
        assert!(node.metric(&name).await.unwrap().is_nan(), "{name}");
    }
    node.kill();
    let node = Node::start_with(&mut program_with_data_dir(&data)).await;
    assert_eq!(NodeState::of(&node).await, held);
}

#[tokio::test]
async fn a_restore_that_does_not_fit_on_the_disk_stops_the_start() {
    let directory = tempdir().unwrap();
    let store = random_store(100_000, u64::MAX);
    let seed = write_backup_file(directory.path(), &store, 9);
    let disk = SmallDisk::new(40);
    let ballast = disk.fill(3 << 20);
    let output = run(program_with_data_dir(&disk.data_dir())
        .arg("--restore-from")
        .arg(&seed));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let printed = String::from_utf8(output.stderr).unwrap();
    let last = printed.lines().last().unwrap();
    assert!(
        last.contains("snapshot") && last.contains("No space left"),
        "{printed}"
    );
    // With more space the same command succeeds.
    drop(ballast);
    let node = Node::start_with(
        program_with_data_dir(&disk.data_dir())
            .arg("--restore-from")
            .arg(&seed),
    )
    .await;
    assert_eq!(NodeState::of(&node).await, NodeState::of_store(&store, 9));
}

/// A quarter of a MiB in the log.
fn large_batch() -> Batch {
    let mut changes = Changes::default();
    changes.set(0, 1);
    let patches = (0..1000).map(|user| Patch {
        user_id: format!("{user:0>250}").into_boxed_str(),
        changes,
    });
    Batch {
        ticket: None,
        writes: patches.map(Write::Set).collect(),
        checkpoint: None,
    }
}

/// Appends until the disk is full; returns the end of the log.
async fn append_until_full(log: &DiskLog) -> u64 {
    loop {
        let before = log.end();
        let append = log.append(large_batch());
        if let Err(error) = with_timeout("the result", append).await {
            assert!(error.to_string().contains("is full"), "{error}");
            assert!(log.unwritable().is_some());
            assert_eq!(log.end(), before);
            return before;
        }
    }
}

/// Reads the batches after `after`, and checks their order and contents.
async fn assert_batches(log: &DiskLog, after: u64) {
    let mut subscription = log
        .subscribe(log.position(after).unwrap().unwrap())
        .await
        .unwrap();
    let (mut read, mut entries) = (after, Vec::new());
    let expected = large_batch().writes;
    while read < log.end() {
        let next = subscription.next(&mut entries);
        with_timeout("the next batches", next).await.unwrap();
        for entry in entries.drain(..) {
            read += 1;
            assert_eq!(entry.position.seq, read);
            assert_eq!(entry.batch.writes, expected);
        }
    }
}

#[tokio::test]
async fn a_log_that_filled_its_disk_continues_after_a_trim() {
    let disk = SmallDisk::new(64);
    let dir = disk.data_dir();
    let log = DiskLog::open(&dir, None).unwrap();
    // In turn, the log alone and other files fill the disk.
    for round in 0..4 {
        let before = log.end();
        let ballast = (round % 2 == 1).then(|| disk.occupy(20 << 20));
        let end = append_until_full(&log).await;
        assert!(ballast.is_some() || end > before, "nothing was appended");
        // On a slow machine a round may fit few batches, and a trim removes the older ones.
        assert_batches(&log, (log.first() - 1).max(end.saturating_sub(20))).await;
        log.trim(end).await.unwrap();
        drop(ballast);
        eventually("free space", async || {
            log.unwritable().is_none().then_some(())
        })
        .await;
    }
    let end = log.end();
    drop(log);
    let log = DiskLog::open(&dir, None).unwrap();
    assert_eq!(log.end(), end);
    assert_batches(&log, log.first() - 1).await;
}
