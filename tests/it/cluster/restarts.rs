//! Replicas that are killed and restarted, one by one or all at once.

use std::fs;
use std::path::Path;
use std::process::Command;

use futures_util::future::join_all;
use gradestore::backup::Snapshots;
use rustix::process::Signal;
use tempfile::tempdir;

use crate::cluster::clients::Clients;
use crate::cluster::fake_peer::{FakePeer, PeerBehavior};
use crate::harness::Node;
use crate::harness::backup_files::{fetch_backup, file_names};
use crate::harness::cluster::broker::{Broker, check, replica_at, replica_with_data};
use crate::harness::cluster::seeded::SeededCluster;
use crate::harness::cluster::throttle::Throttle;
use crate::harness::wire::eventually;

/// A replica with a data directory and a snapshot every second.
fn replica_with_snapshots(broker: &Broker, root: &Path, index: usize) -> Command {
    let mut command = replica_with_data(broker.address, &root.join(index.to_string()));
    command.args(["--snapshot-interval", "1s"]);
    command
}

/// Restarts a replica; clients use it before it is ready.
async fn restart(clients: &Clients, index: usize, command: &mut Command) -> Node {
    let node = Node::launch(command).await;
    clients.set_replica(index, &node);
    node.in_state("ready").await;
    node
}

async fn wait_for_acks(clients: &Clients, more: usize) {
    let expected = clients.answered() + more;
    eventually("more writes", async || {
        (clients.answered() >= expected).then_some(())
    })
    .await;
}

/// Three replicas started with `command`, and clients for them.
async fn start_three_with_clients(
    command: impl Fn(usize) -> Command,
    always: bool,
) -> (Vec<Node>, Clients) {
    let start = async |index| Node::start_with(&mut command(index)).await;
    let nodes = join_all((0..3).map(start)).await;
    let ports = nodes.iter().map(|node| (**node).clone()).collect();
    (nodes, Clients::start(ports, always))
}

#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_write_is_lost_when_all_replicas_are_killed() {
    let (broker, root) = (Broker::start().await, tempdir().unwrap());
    let command = |index| replica_with_snapshots(&broker, root.path(), index);
    let (mut nodes, clients) = start_three_with_clients(command, false).await;
    for order in [[2, 0, 1], [1, 2, 0]] {
        wait_for_acks(&clients, 100).await;
        // The snapshots lag behind the log.
        for index in 0..3 {
            let dir = root.path().join(index.to_string()).join("snapshots");
            let snapshots = Snapshots::in_dir(&dir);
            eventually("a snapshot", async || {
                (!snapshots.list().unwrap().is_empty()).then_some(())
            })
            .await;
        }
        for node in &nodes {
            node.signal(Signal::KILL);
        }
        nodes.clear();
        let mut back = Vec::new();
        for index in order {
            let node = restart(&clients, index, &mut command(index)).await;
            wait_for_acks(&clients, 20).await;
            back.push((index, node));
        }
        back.sort_by_key(|(index, _)| *index);
        nodes.extend(back.into_iter().map(|(_, node)| node));
    }
    let answered = clients.stop().await;
    let nodes: Vec<&Node> = nodes.iter().collect();
    check(&broker.client().await, &nodes, &answered).await;
    for node in nodes {
        let status = node.status().await;
        let source = status["restore"]["source"].as_str().unwrap();
        assert!(source.ends_with(".csv.gz"), "{source}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_loses_no_write_and_fails_no_read() {
    let (broker, root) = (Broker::start().await, tempdir().unwrap());
    let command = |index| replica_with_snapshots(&broker, root.path(), index);
    let (mut nodes, clients) = start_three_with_clients(command, true).await;
    for index in 0..3 {
        wait_for_acks(&clients, 100).await;
        nodes.remove(index).stop().await;
        wait_for_acks(&clients, 50).await;
        let node = restart(&clients, index, &mut command(index)).await;
        nodes.insert(index, node);
    }
    wait_for_acks(&clients, 100).await;
    let answered = clients.stop().await;
    let nodes: Vec<&Node> = nodes.iter().collect();
    check(&broker.client().await, &nodes, &answered).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_bootstrap_from_one_survivor_at_once() {
    // More than the socket buffers hold.
    let mut cluster = SeededCluster::with_rows(30_000).await;
    let throttle = Throttle::without_target(u64::MAX).await;
    let survivor = cluster.start_first_behind(&throttle).await;
    let size = fetch_backup(&survivor).await.len() as u64;
    throttle.set_limit(size / 10);
    let launch = async || Node::launch(&mut replica_at(cluster.broker.address)).await;
    let (one, other) = tokio::join!(launch(), launch());
    throttle.wait_until_limited(2).await;
    survivor
        .metric_reaches("gradestore_backups_running", 2.0)
        .await;
    let answered = cluster.write(&survivor, 10).await;
    throttle.remove_limit();
    // Each of the two appends an empty batch.
    let end = answered.last().unwrap().position + 2;
    for node in [&one, &other] {
        let status = node.ready_at(end).await;
        assert_eq!(status["restore"]["source"], throttle.url());
    }
    cluster.check(&[&survivor, &one, &other], &answered).await;
}

#[tokio::test]
async fn the_first_replica_of_a_new_log_waits_for_no_peer() {
    let broker = Broker::start().await;
    let silent = FakePeer::start(PeerBehavior::Stall(Vec::new())).await;
    let gone = FakePeer::start(PeerBehavior::Refuse).await;
    let mut command = replica_at(broker.address);
    command.args(["--peer", &silent.url, "--peer", &gone.url]);
    let node = Node::start_with(&mut command).await;
    assert_eq!(silent.backup_requests(), 0);
    let written = node.set(r#"{"user_id":"x"}"#).await.position();
    // A complete log is enough too, once the request to the silent peer has timed out.
    let mut command = replica_at(broker.address);
    let late = Node::launch(command.args(["--peer", &gone.url])).await;
    node.kill();
    let status = late.in_state("ready").await;
    assert_eq!(
        (&status["position"], &status["records"]),
        (&(written + 1).into(), &1.into())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_was_restored_may_keep_its_restore_flag() {
    let mut cluster = SeededCluster::with_rows(100).await;
    let first = cluster.start_first().await;
    let second = Node::start_with(&mut cluster.replica("second")).await;
    let mut answered = cluster.write(&first, 3).await;
    first.kill();
    let first = cluster.start_first().await;
    answered.extend(cluster.write(&first, 3).await);
    cluster.check(&[&first, &second], &answered).await;
    let restored = "already restored from this file";
    assert!(first.stderr.lock().contains(restored));
    first.kill();
    // As after a divergence, which quarantines the snapshots.
    let snapshots = cluster.dir.path().join("first/snapshots");
    for name in file_names(&snapshots) {
        fs::remove_file(snapshots.join(name)).unwrap();
    }
    let first = cluster.start_first().await;
    cluster.check(&[&first, &second], &answered).await;
    assert!(first.stderr.lock().contains(restored));
    let source = &first.status().await["restore"]["source"];
    assert_eq!(*source, format!("http://{}", second.write));
}
