//! Backups during writes: each one, with the log after it, gives the node's state.

use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::future::join_all;
use gradestore::grade::FIELDS;
use gradestore::log::{DiskLog, Log};
use gradestore::store::Store;
use tempfile::tempdir;

use crate::harness::backup_files::{
    NodeState, Rng, backup_file, fetch_backup, program_with_data_dir, random_store, read_backup,
    replay, write_backup_file,
};
use crate::harness::wire::RawConnection;
use crate::harness::{Node, delete_request, set_request};

const ROWS: u64 = 30_000;
const WRITERS: u64 = 8;
const BACKUPS: usize = 4;

/// Writes to existing and new users and deletes some until `stop` is set.
async fn write_until(node: &Node, writer: u64, stop: &AtomicBool) {
    let (mut rng, mut connection) = (Rng(writer + 1), RawConnection::connect(node.write).await);
    while !stop.load(Ordering::Relaxed) {
        let field = FIELDS[rng.below(FIELDS.len() as u64) as usize];
        let (user, value) = (rng.below(ROWS + 1000), rng.next() as i64);
        let patch = format!(r#"{{"user_id":"user {user}","{field}":{value}}}"#);
        let request = match rng.below(4) {
            0 => delete_request(&format!("?user_id=user+{user}")),
            _ => set_request(&patch),
        };
        connection.send(request).await;
        connection.response().await.position();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_under_writes_and_the_log_after_it_give_the_node_state() {
    let directory = tempdir().unwrap();
    let dir = directory.path().join("data");
    let before = random_store(ROWS, u64::MAX);
    let seed = write_backup_file(directory.path(), &before, 1000);
    let node = Node::start_with(program_with_data_dir(&dir).arg("--restore-from").arg(&seed)).await;

    let stop = AtomicBool::new(false);
    let backing_up = async {
        let mut backups = Vec::new();
        for _ in 0..BACKUPS {
            backups.push(fetch_backup(&node).await);
        }
        stop.store(true, Ordering::Relaxed);
        backups
    };
    let writing = join_all((0..WRITERS).map(|writer| write_until(&node, writer, &stop)));
    let (backups, _) = tokio::join!(backing_up, writing);
    let held = NodeState::of(&node).await;
    node.stop().await;

    let log = DiskLog::open(&dir.join("log"), None).unwrap();
    assert_eq!((log.first(), log.end()), (1001, held.position));
    // The seed plus the log, up to each backup.
    let (folded, mut folded_to) = (read_backup(&backup_file(&before, 0)).0, 1000);
    let mut scans_met_writes = 0;
    for backup in &backups {
        let (store, summary) = read_backup(backup);
        let (head, end) = summary.records.unwrap();
        assert_eq!(head.log_id, log.id().0);
        let in_order = folded_to <= head.position && head.position <= end.position;
        assert!(
            in_order && end.position <= held.position,
            "{head:?} {end:?}"
        );

        replay(&log, &folded, folded_to, head.position).await;
        scans_met_writes += usize::from(folded.digest() != store.digest());
        replay(&log, &folded, head.position, end.position).await;
        folded_to = end.position;
        replay(&log, &store, head.position, end.position).await;
        assert_same(&store, &folded, end.position);

        replay(&log, &store, end.position, held.position).await;
        assert_eq!(NodeState::of_store(&store, held.position), held);
    }
    // Otherwise no backup overlapped a write, and the test proves nothing.
    assert!(scans_met_writes > 0);
}

fn assert_same(one: &Store, other: &Store, at: u64) {
    assert_eq!(NodeState::of_store(one, at), NodeState::of_store(other, at));
}
