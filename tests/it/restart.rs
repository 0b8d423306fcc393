//! Replicas that are killed and started again, one after the other or all at once.

use std::path::Path;
use std::process::Command;

use futures_util::future::join_all;
use gradestore::backup::Snapshots;
use rustix::process::Signal;
use tempfile::tempdir;

use crate::broker::{Broker, at, check, replica_at, status_where};
use crate::clients::Clients;
use crate::disk::backup_of;
use crate::fake_peer::{Act, FakePeer};
use crate::harness::Node;
use crate::seeded::Cluster;
use crate::throttle::Throttle;
use crate::wire::eventually;

/// A replica with a data directory of its own, that writes snapshots all the time.
fn keeping(broker: &Broker, root: &Path, index: usize) -> Command {
    let mut command = replica_at(broker.address);
    command
        .env("GRADESTORE_EPHEMERAL", "false")
        .args(["--snapshot-interval", "1s", "--data-dir"])
        .arg(root.join(index.to_string()));
    command
}

/// Starts a replica again; clients know of it before it is ready.
async fn started(clients: &Clients, index: usize, command: &mut Command) -> Node {
    let node = Node::launch(command).await;
    clients.replaced(index, &node);
    status_where(&node, "ready", |status| status["state"] == "ready").await;
    node
}

async fn answers(clients: &Clients, more: usize) {
    let wanted = clients.answered() + more;
    eventually("more writes", async || {
        (clients.answered() >= wanted).then_some(())
    })
    .await;
}

/// Three replicas that `command` starts, and clients of theirs.
async fn three_with_clients(
    command: impl Fn(usize) -> Command,
    always: bool,
) -> (Vec<Node>, Clients) {
    let start = async |index| Node::start_with(&mut command(index)).await;
    let nodes = join_all((0..3).map(start)).await;
    let ports = nodes.iter().map(|node| (**node).clone()).collect();
    (nodes, Clients::start(ports, always))
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_are_all_killed_at_once_come_back_with_all_that_was_answered() {
    let (broker, root) = (Broker::start().await, tempdir().unwrap());
    let command = |index| keeping(&broker, root.path(), index);
    let (mut nodes, clients) = three_with_clients(command, false).await;
    for order in [[2, 0, 1], [1, 2, 0]] {
        answers(&clients, 100).await;
        // A snapshot that is behind is the point.
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
            let node = started(&clients, index, &mut command(index)).await;
            answers(&clients, 20).await;
            back.push((index, node));
        }
        back.sort_by_key(|(index, _)| *index);
        nodes.extend(back.into_iter().map(|(_, node)| node));
    }
    let answered = clients.stop().await;
    let nodes: Vec<&Node> = nodes.iter().collect();
    check(&broker.client().await, &nodes, &answered).await;
    for node in nodes {
        let status = node.ops("/status").await.json();
        let source = status["restore"]["source"].as_str().unwrap();
        assert!(source.ends_with(".csv.gz"), "{source}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_restarted_one_by_one_lose_no_write_and_fail_no_read() {
    let (broker, root) = (Broker::start().await, tempdir().unwrap());
    let command = |index| keeping(&broker, root.path(), index);
    let (mut nodes, clients) = three_with_clients(command, true).await;
    for index in 0..3 {
        answers(&clients, 100).await;
        nodes.remove(index).end().await;
        answers(&clients, 50).await;
        let node = started(&clients, index, &mut command(index)).await;
        nodes.insert(index, node);
    }
    answers(&clients, 100).await;
    let answered = clients.stop().await;
    let nodes: Vec<&Node> = nodes.iter().collect();
    check(&broker.client().await, &nodes, &answered).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_survivor_serves_two_at_once() {
    // More than the kernel holds for a connection.
    let mut cluster = Cluster::of(30_000).await;
    let throttle = Throttle::to_nobody(u64::MAX).await;
    let survivor = cluster.first_behind(&throttle).await;
    let size = backup_of(&survivor).await.len() as u64;
    throttle.limit(size / 10);
    let launch = async || Node::launch(&mut replica_at(cluster.broker.address)).await;
    let (one, other) = tokio::join!(launch(), launch());
    throttle.reached(2).await;
    survivor
        .metric_reaches("gradestore_backups_running", 2.0)
        .await;
    let answered = cluster.write(&survivor, 10).await;
    throttle.open();
    // Each of the two appends an empty batch.
    let end = answered.last().unwrap().position + 2;
    for node in [&one, &other] {
        let status = at(node, end).await;
        assert_eq!(status["restore"]["source"], throttle.url());
    }
    cluster.check(&[&survivor, &one, &other], &answered).await;
}

#[tokio::test]
async fn the_first_replica_of_a_new_log_waits_for_no_peer() {
    let broker = Broker::start().await;
    let silent = FakePeer::start(Act::Stall(Vec::new())).await;
    let gone = FakePeer::start(Act::Refuse).await;
    let mut command = replica_at(broker.address);
    command.args(["--peer", &silent.url, "--peer", &gone.url]);
    let node = Node::start_with(&mut command).await;
    assert_eq!(silent.asked(), 0);
    let written = node.set(r#"{"user_id":"x"}"#).await.position();
    // A log that is whole is enough, too, once the peer that does not answer is given up.
    let mut command = replica_at(broker.address);
    let late = Node::launch(command.args(["--peer", &gone.url])).await;
    node.kill();
    let status = status_where(&late, "ready", |status| status["state"] == "ready").await;
    assert_eq!(
        (&status["position"], &status["records"]),
        (&(written + 1).into(), &1.into())
    );
}
