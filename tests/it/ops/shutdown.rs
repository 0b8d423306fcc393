//! Shutdown: the node becomes unready, finishes running requests, and exits.

use std::fs;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gradestore::log::RandomId;
use gradestore::node::data_dir::{DataDir, Storage, StorageConfig};
use rustix::process::Signal;
use tempfile::tempdir;
use tokio::net::TcpStream;

use crate::harness::backup_files::{
    file_names, open_pipe, random_store, read_backup, read_pipe_to_end, write_backup_file,
};
use crate::harness::gated_log::{GatedLog, start_node, start_node_with};
use crate::harness::wire::{RawConnection, TIMEOUT, eventually};
use crate::harness::{
    InProcessNode, Node, Ports, get_request, incomplete_set_request, opening, pending_set,
};

const PATCH: &str = r#"{"user_id":"a","spp":1}"#;

async fn wait_until_unready(node: &Ports) {
    let detail = eventually("unready", async || {
        let response = node.ops("/readyz").await;
        (response.status != 200).then(|| response.expect_problem(503, "not-ready"))
    })
    .await;
    assert!(detail.contains("stopping"), "{detail}");
}

async fn wait_until_refused(node: &Ports) {
    for address in [node.write, node.read] {
        eventually("a refused connection", async || {
            TcpStream::connect(address).await.err()
        })
        .await;
    }
}

#[tokio::test]
async fn a_signal_finishes_the_running_request_and_accepts_no_other() {
    for signal in [Signal::TERM, Signal::INT, Signal::QUIT] {
        let mut node = Node::start().await;
        let mut idle = RawConnection::connect(node.read).await;
        let mut running = incomplete_set_request(&node, PATCH).await;
        node.signal(signal);
        wait_until_unready(&node).await;
        wait_until_refused(&node).await;
        idle.expect_closed().await;
        assert_eq!(node.ops("/livez").await.status, 200);

        running.send(PATCH).await;
        // It was sent before the signal, so it is accepted.
        let response = running.response().await;
        assert_eq!(response.position(), 1);
        assert_eq!(response.header("connection"), "close");
        running.expect_closed().await;
        assert_eq!(node.wait_for_exit().await.code(), Some(0));
    }
}

#[tokio::test]
async fn a_partially_received_header_is_read_to_its_end() {
    let mut node = Node::start().await;
    node.set(PATCH).await.position();
    let request = get_request("?user_id=a", "");
    let (begin, end) = request.split_at(request.len() / 2);
    let mut connection = RawConnection::connect(node.read).await;
    connection.send(format!("{request}{begin}")).await;
    // So the beginning of the next request has been read too.
    assert_eq!(connection.response().await.status, 200);
    node.signal(Signal::TERM);
    wait_until_unready(&node).await;
    connection.send(end).await;
    let response = connection.response().await;
    assert!(
        response
            .expect_problem(503, "not-ready")
            .contains("stopping")
    );
    assert_eq!(response.header("connection"), "close");
    connection.expect_closed().await;
    assert_eq!(node.wait_for_exit().await.code(), Some(0));
}

#[tokio::test]
async fn an_idle_node_stops_immediately() {
    let mut node = Node::start().await;
    node.get("a").await;
    let started_at = Instant::now();
    node.signal(Signal::TERM);
    assert_eq!(node.wait_for_exit().await.code(), Some(0));
    assert!(
        started_at.elapsed() < Duration::from_secs(5),
        "{:?}",
        started_at.elapsed()
    );
}

#[tokio::test]
async fn a_second_signal_ends_the_process_immediately() {
    let mut node = Node::start().await;
    let _running = incomplete_set_request(&node, PATCH).await;
    node.signal(Signal::TERM);
    wait_until_unready(&node).await;
    node.signal(Signal::INT);
    assert_eq!(node.wait_for_exit().await.code(), Some(130));
}

/// A stopping node with four pending writes, and its log.
async fn stopping_with_writes() -> (Arc<GatedLog>, InProcessNode, Vec<RawConnection>) {
    let (log, mut node) = start_node(Duration::from_secs(60)).await;
    let mut running = Vec::new();
    for _ in 0..4 {
        running.push(pending_set(&node, PATCH).await);
    }
    node.request_stop();
    wait_until_unready(&node).await;
    (log, node, running)
}

#[tokio::test]
async fn pending_writes_are_acknowledged_before_shutdown() {
    let (log, node, mut running) = stopping_with_writes().await;
    wait_until_refused(&node).await;
    log.open();
    for (before, connection) in running.iter_mut().enumerate() {
        let response = connection.response().await;
        assert_eq!(response.position(), before as u64 + 1);
        // So that the client sends no further request on it.
        assert_eq!(response.header("connection"), "close");
        connection.expect_closed().await;
    }
    node.wait_until_stopped().await;
}

#[tokio::test]
async fn pending_writes_that_the_log_rejects_return_503() {
    let (log, node, mut running) = stopping_with_writes().await;
    // Two batches are in flight; the other writes are queued.
    log.reject_appends();
    log.open();
    for (before, connection) in running.iter_mut().enumerate() {
        let response = connection.response().await;
        match before {
            0 | 1 => assert_eq!(response.position(), before as u64 + 1),
            _ => drop(response.expect_problem(503, "not-written")),
        }
        assert_eq!(response.header("connection"), "close");
        connection.expect_closed().await;
    }
    node.wait_until_stopped().await;
}

#[tokio::test]
async fn shutdown_waits_for_a_stuck_request_until_its_deadline_only() {
    let (_log, mut node) = start_node_with(|config| {
        config.http.drain_max = Duration::from_millis(200);
    })
    .await;
    let _running = pending_set(&node, PATCH).await;
    let started_at = Instant::now();
    node.request_stop();
    node.wait_until_stopped().await;
    let took = started_at.elapsed();
    assert!(
        took >= Duration::from_millis(200) && took < TIMEOUT / 2,
        "{took:?}"
    );
}

#[tokio::test]
async fn a_shutdown_during_a_snapshot_waits_for_it() {
    let directory = tempdir().unwrap();
    let dir = directory.path().join("data");
    let seed = write_backup_file(directory.path(), &random_store(60_000, u64::MAX), 6);
    let origin = RandomId::random().unwrap();
    let config = StorageConfig::Disk(DataDir {
        dir: dir.clone(),
        snapshot_interval: Duration::from_millis(20),
        wal: None,
    });
    let storage = Storage::open(&config, opening(origin, Some(seed.clone()))).unwrap();
    let mut node = InProcessNode::start_on_storage(storage, origin, |config| {
        config.restore_from = Some(seed);
        // The shutdown waits for the snapshot only.
        config.http.drain_max = Duration::ZERO;
    })
    .await;

    // The next snapshot is written into a pipe, so that the test controls how long it takes.
    let snapshot = |position| format!("grades-{position:020}.csv.gz");
    let snapshots = dir.join("snapshots");
    let partial = snapshots.join(format!("{}.partial", snapshot(7)));
    let mut pipe = open_pipe(&partial);
    node.set(PATCH).await.position();
    let mut bytes = vec![0; 1024];
    let started_at = eventually("a snapshot under way", async || {
        pipe.read(&mut bytes).ok().filter(|read| *read > 0)
    })
    .await;
    bytes.truncate(started_at);
    node.request_stop();
    wait_until_unready(&node).await;
    bytes.extend(read_pipe_to_end(&mut pipe).await);
    let whole = read_backup(&bytes).1;
    assert_eq!((whole.records.unwrap().0.position, whole.rows), (7, 60_001));

    // A pipe cannot be synced, so this snapshot failed, and the shutdown wrote it again.
    node.wait_until_stopped().await;
    assert_eq!(file_names(&snapshots), [snapshot(6), snapshot(7)]);
    let kept = fs::read(snapshots.join(snapshot(7))).unwrap();
    assert_eq!(read_backup(&kept).1.digest, whole.digest);
}
