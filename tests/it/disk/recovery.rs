//! Start from the newest valid snapshot and the log; without a complete state the node stays
//! unready with the reason.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use gradestore::grade::{Changes, Patch, Write};
use gradestore::log::{Batch, DiskLog, Log};
use serde_json::Value;
use tempfile::tempdir;

use crate::harness::backup_files::{
    NodeState, file_names, program_with_data_dir, random_store, read_backup, write_backup_file,
};
use crate::harness::wire::{Response, eventually};
use crate::harness::{AUTHORIZATION, Node, Ports, run, without_root_capabilities};

/// Writes some grades and stops the node.
async fn write_and_stop(dir: &Path, users: std::ops::Range<u64>) -> NodeState {
    let node = Node::start_with(&mut program_with_data_dir(dir)).await;
    for user in users {
        let patch = format!(r#"{{"user_id":"{user}","spp":{user}}}"#);
        node.set(patch).await.position();
    }
    let held = NodeState::of(&node).await;
    node.stop().await;
    held
}

/// The snapshots of a data directory, oldest first.
fn snapshots(dir: &Path) -> Vec<PathBuf> {
    let dir = dir.join("snapshots");
    file_names(&dir).iter().map(|name| dir.join(name)).collect()
}

/// Flips one bit in the middle.
fn damage(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(file, bytes).unwrap();
}

/// The file from which the node was restored.
async fn restored_from(node: &Node) -> PathBuf {
    let restore = &node.status().await["restore"];
    assert_eq!(restore["done"], true, "{restore}");
    restore["source"].as_str().unwrap().into()
}

#[tokio::test]
async fn a_clean_stop_writes_a_snapshot_for_the_next_start() {
    let directory = tempdir().unwrap();
    let dir = directory.path();
    let held = write_and_stop(dir, 0..10).await;
    let first = snapshots(dir);
    assert_eq!(first.len(), 1);
    let (store, summary) = read_backup(&fs::read(&first[0]).unwrap());
    assert_eq!(summary.records.unwrap().0.position, held.position);
    assert_eq!(NodeState::of_store(&store, held.position), held);

    let node = Node::start_with(&mut program_with_data_dir(dir)).await;
    assert_eq!(NodeState::of(&node).await, held);
    assert_eq!(restored_from(&node).await, first[0]);
    let path = first[0].display().to_string();
    eventually("a log line", async || {
        node.stderr.lock().contains(&path).then_some(())
    })
    .await;
    // Without a write there is no new snapshot.
    node.stop().await;
    assert_eq!(snapshots(dir), first);

    for last in [20, 30, 40] {
        write_and_stop(dir, last - 10..last).await;
    }
    assert_eq!(snapshots(dir).len(), 2);
}

#[tokio::test]
async fn a_damaged_snapshot_falls_back_to_the_previous_one() {
    let directory = tempdir().unwrap();
    let dir = directory.path();
    write_and_stop(dir, 0..10).await;
    let held = write_and_stop(dir, 5..20).await;
    let both = snapshots(dir);
    let whole = fs::read(&both[1]).unwrap();
    let mut swapped = whole.clone();
    swapped.reverse();
    for wrong in [&whole[..whole.len() - 1], &whole[..9], &[], &swapped] {
        fs::write(&both[1], wrong).unwrap();
        let node = Node::start_with(&mut program_with_data_dir(dir)).await;
        assert_eq!(NodeState::of(&node).await, held);
        assert_eq!(restored_from(&node).await, both[0]);
        let path = both[1].display().to_string();
        eventually("a warning", async || {
            let printed = node.stderr.lock();
            printed
                .lines()
                .any(|line| line.contains("cannot use snapshot") && line.contains(&path))
                .then_some(())
        })
        .await;
        node.kill();
    }
    // The quarantined file is not one of the two that are kept.
    assert!(!both[1].exists());
    // The log is complete, so neither snapshot is needed.
    fs::write(&both[1], whole).unwrap();
    both.iter().for_each(|file| damage(file));
    let node = Node::start_with(&mut program_with_data_dir(dir)).await;
    assert_eq!(NodeState::of(&node).await, held);
}

/// Waits until the start has succeeded or failed; returns `/status`.
async fn wait_for_start_result(node: &Ports) -> Value {
    let started_at = ["starting", "restoring", "catching-up"];
    node.status_where("the result", |status| {
        !started_at.contains(&status["state"].as_str().unwrap())
    })
    .await
}

/// Starts a node that must stay unready; returns the reason.
async fn assert_unready(dir: &Path) -> String {
    let names = || {
        let names = file_names(&dir.join("snapshots"));
        let name = |name: &String| name.trim_end_matches(".damaged").to_owned();
        names.iter().map(name).collect::<Vec<_>>()
    };
    let before = names();
    let node = Node::launch(&mut program_with_data_dir(dir)).await;
    let state = wait_for_start_result(&node).await;
    assert!(["no-source", "other-log"].contains(&state["state"].as_str().unwrap()));
    let reason = node.ops("/readyz").await.expect_problem(503, "not-ready");
    assert!(
        reason.contains(state["reason"].as_str().unwrap()),
        "{reason}"
    );
    node.ops("/readyz/write")
        .await
        .expect_problem(503, "not-ready");
    node.get("1").await.expect_problem(503, "not-ready");
    let patch = r#"{"user_id":"1","spp":5}"#;
    node.set(patch).await.expect_problem(503, "not-ready");
    let backup = node.client.get(format!("http://{}/backup", node.write));
    let backup = backup.header("authorization", AUTHORIZATION).send().await;
    Response::of(backup.unwrap())
        .await
        .expect_problem(503, "not-ready");
    assert_eq!(node.ops("/livez").await.status, 200);
    // An incomplete state must not replace a snapshot.
    node.stop().await;
    assert_eq!(names(), before);
    reason
}

/// A data directory with a trimmed log.
async fn seeded(root: &Path, name: &str, position: u64) -> (PathBuf, NodeState) {
    let dir = root.join(name);
    let seed = write_backup_file(root, &random_store(100, 50), position);
    let node = Node::start_with(program_with_data_dir(&dir).arg("--restore-from").arg(&seed)).await;
    node.set(r#"{"user_id":"new","spp":1}"#).await.position();
    let held = NodeState::of(&node).await;
    node.kill();
    (dir, held)
}

#[tokio::test]
async fn without_a_valid_snapshot_and_a_complete_log_a_node_serves_nothing() {
    let directory = tempdir().unwrap();
    let (dir, held) = seeded(directory.path(), "data", 500).await;
    let [snapshot] = snapshots(&dir).try_into().unwrap();
    let good = fs::read(&snapshot).unwrap();
    damage(&snapshot);
    let reason = assert_unready(&dir).await;
    assert!(reason.contains("begins at batch 501"), "{reason}");
    assert!(reason.contains("--restore-from"), "{reason}");
    assert!(!snapshot.exists());
    assert_unready(&dir).await;
    // The fix that the reason names.
    fs::write(&snapshot, good).unwrap();
    let node = Node::start_with(&mut program_with_data_dir(&dir)).await;
    assert_eq!(NodeState::of(&node).await, held);
}

#[tokio::test]
async fn snapshots_of_another_log_are_not_used() {
    let directory = tempdir().unwrap();
    let (one, _) = seeded(directory.path(), "one", 500).await;
    let (other, held) = seeded(directory.path(), "other", 500).await;
    let kept = directory.path().join("kept");
    fs::rename(other.join("snapshots"), &kept).unwrap();
    fs::rename(one.join("snapshots"), other.join("snapshots")).unwrap();
    let reason = assert_unready(&other).await;
    assert!(reason.contains("belongs to log disk-"), "{reason}");

    fs::remove_dir_all(other.join("snapshots")).unwrap();
    fs::rename(&kept, other.join("snapshots")).unwrap();
    let node = Node::start_with(&mut program_with_data_dir(&other)).await;
    assert_eq!(NodeState::of(&node).await, held);
}

#[tokio::test]
async fn a_lost_log_is_not_recreated_beside_its_snapshots() {
    let directory = tempdir().unwrap();
    let dir = directory.path();
    write_and_stop(dir, 0..10).await;
    fs::rename(dir.join("log"), dir.join("lost")).unwrap();
    let reason = assert_unready(dir).await;
    let snapshot = snapshots(dir)[0].display().to_string();
    assert!(reason.contains(&snapshot), "{reason}");
}

/// A user id of nearly the maximum length.
fn long_id(user: u64) -> String {
    format!("{user:0>250}")
}

/// A log of 100 batches in several segments, without a snapshot; returns its first segment.
async fn long_log(dir: &Path) -> PathBuf {
    let log = DiskLog::open(&dir.join("log"), None).unwrap();
    let mut changes = Changes::default();
    changes.set(0, 1);
    for number in 1..=100 {
        let patches = (0..1000).map(|user| Patch {
            user_id: long_id(number * 1000 + user).into(),
            changes,
        });
        log.append(Batch {
            ticket: None,
            writes: patches.map(Write::Set).collect(),
            checkpoint: None,
        })
        .await
        .unwrap();
    }
    let files = file_names(&dir.join("log"));
    assert!(files.len() > 1, "{files:?}");
    dir.join("log").join(&files[0])
}

/// Applies `by` to the file's bytes from the id of `user` on.
fn change_at_user(file: &Path, user: u64, by: impl Fn(&mut [u8])) {
    let (mut bytes, id) = (fs::read(file).unwrap(), long_id(user));
    let place = bytes.windows(250).position(|at| at == id.as_bytes());
    by(&mut bytes[place.unwrap()..]);
    fs::write(file, bytes).unwrap();
}

#[tokio::test]
async fn a_damaged_log_leaves_the_node_unready() {
    let directory = tempdir().unwrap();
    let dir = directory.path();
    let file = long_log(dir).await;
    change_at_user(&file, 51_500, |bytes| bytes[0] ^= 1);
    let node = Node::launch(&mut program_with_data_dir(dir)).await;
    let status = wait_for_start_result(&node).await;
    assert_eq!(status["state"], "gap", "{status}");
    assert_eq!(status["log_end"], 100);
    let reason = status["reason"].as_str().unwrap();
    let why = reason.contains("batch 51") && reason.contains("checksum");
    assert!(why, "{reason}");
    let detail = node.ops("/readyz").await.expect_problem(503, "not-ready");
    let same = detail.contains("(gap)") && detail.contains(reason);
    assert!(same, "{detail}");
    node.get(&long_id(1_500))
        .await
        .expect_problem(503, "not-ready");
    assert_eq!(node.ops("/livez").await.status, 200);
    // A partial state is not written as a snapshot.
    node.stop().await;
    assert!(snapshots(dir).is_empty());
}

#[tokio::test]
async fn missing_batches_stop_the_start_and_leave_the_log_unchanged() {
    let directory = tempdir().unwrap();
    let dir = directory.path();
    let file = long_log(dir).await;
    let files = file_names(&dir.join("log"));
    let missing = format!(
        "to {} are missing",
        files[1][..20].parse::<u64>().unwrap() - 1
    );
    change_at_user(&file, 51_500, |bytes| bytes.fill(0));
    let before = fs::read(&file).unwrap();
    for _ in 0..2 {
        let output = run(&mut program_with_data_dir(dir));
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let printed = String::from_utf8(output.stderr).unwrap();
        assert!(
            printed.contains("batches 52") && printed.contains(&missing),
            "{printed}"
        );
        assert!(printed.contains("restore from a backup"), "{printed}");
    }
    assert!(before == fs::read(&file).unwrap());
}

#[tokio::test]
async fn a_foreign_log_directory_stops_the_start_and_is_left_unchanged() {
    let directory = tempdir().unwrap();
    let log = directory.path().join("log");
    fs::create_dir(&log).unwrap();
    fs::write(log.join("0.jnl"), "kept").unwrap();
    let output = run(&mut program_with_data_dir(directory.path()));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let printed = String::from_utf8(output.stderr).unwrap();
    let named = printed.contains(log.to_str().unwrap()) && printed.contains("no segment");
    assert!(named && printed.contains("move it away"), "{printed}");
    assert_eq!(file_names(&log), ["0.jnl"]);
}

#[tokio::test]
async fn a_directory_named_like_a_snapshot_is_ignored() {
    let directory = tempdir().unwrap();
    let dir = directory.path();
    let odd = ["grades-0.csv.gz", "grades-99.csv.gz"];
    let odd = odd.map(|name| dir.join("snapshots").join(name));
    for odd in &odd {
        fs::create_dir_all(odd.join("kept")).unwrap();
    }
    let mut held = write_and_stop(dir, 0..1).await;
    for last in [10, 20, 30] {
        let node = Node::start_with(&mut program_with_data_dir(dir)).await;
        assert_eq!(NodeState::of(&node).await, held);
        node.stop().await;
        held = write_and_stop(dir, last - 10..last).await;
    }
    let node = Node::start_with(&mut program_with_data_dir(dir)).await;
    assert_eq!(NodeState::of(&node).await, held);
    let from = restored_from(&node).await;
    assert!(from.is_file(), "{from:?}");
    // Directories do not count as one of the two that are kept.
    let files = snapshots(dir).into_iter().filter(|path| path.is_file());
    assert_eq!(files.count(), 2);
    assert!(odd.iter().all(|odd| odd.join("kept").is_dir()));
}

#[tokio::test]
async fn a_data_directory_is_locked_by_one_process() {
    let directory = tempdir().unwrap();
    let node = Node::start_with(&mut program_with_data_dir(directory.path())).await;
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    let second = run(&mut program_with_data_dir(directory.path()));
    assert_eq!(second.status.code(), Some(1), "{second:?}");
    let printed = String::from_utf8(second.stderr).unwrap();
    let name = directory.path().to_str().unwrap();
    assert!(
        printed.contains(name) && printed.contains("another gradestore"),
        "{printed}"
    );
    assert!(second.stdout.is_empty());
    node.set(r#"{"user_id":"a","spp":2}"#).await.position();
    let held = NodeState::of(&node).await;
    // The lock ends with the process, even after a kill.
    node.kill();
    let node = Node::start_with(&mut program_with_data_dir(directory.path())).await;
    assert_eq!(NodeState::of(&node).await, held);
}

#[tokio::test]
async fn an_unusable_data_directory_is_named() {
    let directory = tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    for dir in [file.clone(), file.join("below")] {
        let output = run(&mut program_with_data_dir(&dir));
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let printed = String::from_utf8(output.stderr).unwrap();
        assert!(
            printed.contains(dir.to_str().unwrap()) && printed.contains("--data-dir"),
            "{printed}"
        );
    }
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[tokio::test]
async fn a_data_directory_without_permissions_is_named_with_the_fix() {
    let directory = tempdir().unwrap();
    let parent = directory.path().join("parent");
    let dir = parent.join("data");
    // Missing parents are created.
    let mut command = without_root_capabilities(&program_with_data_dir(&dir));
    let node = Node::start_with(&mut command).await;
    let held = NodeState::of(&node).await;
    node.stop().await;

    let below = dir.join("another").join("data");
    for mode in [0o000, 0o444, 0o555] {
        set_mode(&dir, mode);
        let output = run(&mut without_root_capabilities(&program_with_data_dir(
            &below,
        )));
        set_mode(&dir, 0o755);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let printed = String::from_utf8(output.stderr).unwrap();
        let named = format!("cannot use --data-dir {}: ", below.display());
        let fix = "choose a directory that this user may write to";
        assert!(
            printed.contains(&named) && printed.contains(fix),
            "{printed}"
        );
        assert!(printed.contains("Permission denied"), "{printed}");
    }

    // Search permission on the parents is enough.
    set_mode(&parent, 0o111);
    let node = Node::start_with(&mut command).await;
    set_mode(&parent, 0o755);
    assert_eq!(NodeState::of(&node).await, held);
}
