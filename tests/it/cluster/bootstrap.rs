//! Bootstrap of a replica without data, from peers that fail: it either becomes ready with the
//! complete state, or stays unready with the reason.

use std::fs;

use futures_util::future::join_all;
use serde_json::Value;

use crate::cluster::fake_peer::{FAULTS, FakePeer, Fault, SLOW_FAULTS, ValidBackup};
use crate::harness::backup_files::{fetch_backup, read_backup};
use crate::harness::cluster::broker::{STREAM, copy_tree, replica_at};
use crate::harness::cluster::seeded::{SeededCluster, assert_serves_nothing};
use crate::harness::cluster::throttle::Throttle;
use crate::harness::wire::eventually;
use crate::harness::{Node, PASSWORD, Ports, ReservedPort, UnusedProxy, program};

/// Waits until a replica reports that it has no source of a complete state; returns its `/status`.
async fn in_no_source_state(node: &Ports, what: &str) -> Value {
    // The state may be newer than the counts.
    node.status_where(what, |status| {
        status["state"] == "no-source" && status["records"] == 0 && status["position"] == 0
    })
    .await
}

/// A replica whose `--peer` has a fault.
struct FaultyPeerCase {
    fault: Fault,
    peer: FakePeer,
    node: Node,
}

impl FaultyPeerCase {
    async fn launch(cluster: &SeededCluster, good: &ValidBackup, fault: Fault) -> Self {
        let (_, act, _) = fault;
        let peer = FakePeer::start(act(good)).await;
        let mut command = replica_at(cluster.broker.address);
        let node = Node::launch(command.args(["--peer", &peer.url])).await;
        Self { fault, peer, node }
    }

    /// Checks that the replica serves nothing and names the fault of the peer.
    async fn assert_rejected(&self) {
        let (name, _, why) = self.fault;
        let status = in_no_source_state(&self.node, name).await;
        let printed = status["reason"].as_str().unwrap();
        let (_, of_peer) = printed.split_once(&format!("{}: ", self.peer.url)).unwrap();
        let of_peer = of_peer.split("; http").next().unwrap();
        assert!(of_peer.contains(why), "{name}: {of_peer}");
        assert!(printed.contains("the log begins at batch 101"), "{printed}");
        assert_serves_nothing(&self.node, &["no-source", "restoring"]).await;
    }

    /// Checks that the replica is ready, after it asked the faulty peer and then another one.
    async fn assert_passed_over(&self, position: u64) {
        let (name, ..) = self.fault;
        let status = self.node.status_where(name, |status| {
            status["position"].as_u64() >= Some(position) && status["state"] == "ready"
        });
        let status = status.await;
        assert_ne!(status["restore"]["source"], self.peer.url, "{name}");
        assert_eq!(status["restore"]["stage"], "done", "{name}");
        if name != "connection refused" {
            assert_eq!(status["peers"][0]["url"], self.peer.url, "{name}");
            assert_ne!(self.peer.backup_requests(), 0, "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_faulty_peer_is_named_and_the_next_peer_is_asked() {
    let mut cluster = SeededCluster::with_rows(3000).await;
    let first = cluster.start_first().await;
    let mut answered = cluster.write(&first, 3).await;
    let good = ValidBackup::new(fetch_backup(&first).await);
    first.kill();

    let cases = FAULTS.map(|fault| FaultyPeerCase::launch(&cluster, &good, fault));
    let cases = join_all(cases).await;
    join_all(cases.iter().map(FaultyPeerCase::assert_rejected)).await;

    let first = Node::start_with(&mut cluster.replica("first")).await;
    answered.extend(cluster.write(&first, 3).await);
    let end = answered.last().unwrap().position;
    join_all(cases.iter().map(|cases| cases.assert_passed_over(end))).await;
    let mut nodes = vec![&*first];
    nodes.extend(cases.iter().map(|cases| &*cases.node));
    cluster.check(&nodes, &answered).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_stops_or_drips_times_out() {
    let mut cluster = SeededCluster::with_rows(3000).await;
    let first = cluster.start_first().await;
    let good = ValidBackup::new(fetch_backup(&first).await);
    let cases = SLOW_FAULTS.map(|fault| FaultyPeerCase::launch(&cluster, &good, fault));
    let cases = join_all(cases).await;
    let answered = cluster.write(&first, 3).await;
    for cases in &cases {
        cases
            .assert_passed_over(answered.last().unwrap().position)
            .await;
        let (name, _, why) = cases.fault;
        assert!(cases.node.stderr.lock().contains(why), "{name}");
    }
    let mut nodes = vec![&*first];
    nodes.extend(cases.iter().map(|case| &*case.node));
    cluster.check(&nodes, &answered).await;
}

/// A replica sends its password to the peer itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_bootstrap_uses_no_proxy() {
    let mut cluster = SeededCluster::with_rows(10).await;
    let first = cluster.start_first().await;
    let proxy = UnusedProxy::new();
    let mut command = replica_at(cluster.broker.address);
    command.args(["--peer", &format!("http://{}", first.write)]);
    let late = Node::start_with(proxy.configure(&mut command)).await;
    cluster.check(&[&first, &late], &[]).await;
    proxy.assert_unused();
}

/// The log has another batch at the end of the backup, so the replica needs another backup.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_with_a_batch_that_the_log_lost_is_discarded() {
    let mut cluster = SeededCluster::with_rows(3000).await;
    let first = cluster.start_first().await;
    let good = ValidBackup::new(fetch_backup(&first).await);
    let answered = cluster.write(&first, 3).await;
    let peer = FakePeer::start(good.with_a_lost_batch()).await;
    let mut command = replica_at(cluster.broker.address);
    let node = Node::launch(command.args(["--peer", &peer.url])).await;
    eventually("the log line", async || {
        let printed = node.stderr.lock();
        printed
            .contains("the log has lost batches that the restored state includes")
            .then_some(())
    })
    .await;
    assert_serves_nothing(&node, &["gap", "restoring", "catching-up"]).await;
    drop(peer);
    node.in_state("ready").await;
    node.get("lost").await.expect_problem(404, "user-unknown");
    cluster.check(&[&first, &node], &answered).await;
}

#[tokio::test]
async fn a_replica_is_not_its_own_peer() {
    let mut cluster = SeededCluster::with_rows(10).await;
    cluster.start_first().await.kill();
    let own = ReservedPort::new();
    let address = own.address().to_string();
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .args(["--nats-url", &cluster.broker.address.to_string()])
        .args(["--write-addr", &address, "--peer"])
        .arg(format!("http://{address}"))
        .args(["--read-addr=127.0.0.1:0", "--ops-addr=127.0.0.1:0"]);
    let node = Node::launch(&mut command).await;
    let status = in_no_source_state(&node, "itself").await;
    let printed = status["reason"].as_str().unwrap();
    assert!(printed.contains("answered 503"), "{printed}");
    let first = Node::start_with(&mut cluster.replica("first")).await;
    cluster.check(&[&first, &node], &[]).await;
    // It is ready now, and still does not list itself.
    eventually("only the other node", async || {
        let peers = node.status().await["peers"].take();
        let urls: Vec<&Value> = peers.as_array()?.iter().map(|peer| &peer["url"]).collect();
        (urls == [&format!("http://{}", first.write)]).then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_time_of_a_backup_is_the_brokers() {
    let mut cluster = SeededCluster::with_rows(10).await;
    let first = cluster.start_first().await;
    let late = cluster.broker.replica().await;
    let answered = cluster.write(&first, 3).await;
    let position = answered.last().unwrap().position;
    cluster.check(&[&first, &late], &answered).await;
    let client = cluster.broker.client().await;
    let stream = client.get_stream(STREAM).await.unwrap();
    let time = stream.get_raw_message(position).await.unwrap().time;
    for node in [&first, &late] {
        let (head, _) = read_backup(&fetch_backup(node).await).1.records.unwrap();
        assert_eq!(head.position, position);
        assert_eq!(i128::from(head.time_ns), time.unix_timestamp_nanos());
    }
}

/// The peer dies after it sent this share of its backup; with `another`, another peer is ready
/// then.
async fn peer_dies_at(percent: u64, another: bool) {
    let mut cluster = SeededCluster::with_rows(30_000).await;
    let throttle = Throttle::without_target(u64::MAX).await;
    let first = cluster.start_first_behind(&throttle).await;
    let size = fetch_backup(&first).await.len() as u64;
    throttle.set_limit(size * percent / 100);
    let late = Node::launch(&mut replica_at(cluster.broker.address)).await;
    throttle.wait_until_limited(1).await;

    // Writes continue, and `/status` shows the progress of the restore.
    let mut answered = cluster.write(&first, 20).await;
    let buffered = |status: &Value| status["restore"]["buffered_batches"] == 20;
    late.status_where("20 batches", buffered).await;
    let status = assert_serves_nothing(&late, &["restoring"]).await;
    let restore = &status["restore"];
    assert_eq!(restore["source"], throttle.url());
    assert_eq!(
        (&restore["stage"], &restore["done"]),
        (&"restoring".into(), &false.into())
    );
    let rows = restore["rows"].as_u64().unwrap();
    assert!(rows < 30_000, "{rows}");
    // Rows count once their chunk is complete.
    assert_eq!(rows > 0, percent > 10, "{rows}");
    assert_eq!(restore["rows_expected"], 30_000);
    assert!(restore["bytes"].as_u64().unwrap() <= size * percent / 100);
    assert!(restore["buffered_bytes"].as_u64().unwrap() > 20);
    let remaining = restore["remaining_s"].as_f64();
    assert_eq!(remaining.map(|left| left > 0.0), (rows > 0).then_some(true));
    assert_eq!(
        (&status["position"], &status["lag"]),
        (&0.into(), &status["log_end"])
    );

    let mut nodes = Vec::new();
    if another {
        // Another peer that bootstraps from the first would be throttled too, so it gets a
        // snapshot.
        let dir = cluster.dir.path();
        let (from, to) = (dir.join("first/snapshots"), dir.join("other/snapshots"));
        fs::create_dir_all(&to).unwrap();
        copy_tree(&from, &to);
        nodes.push(Node::start_with(&mut cluster.replica("other")).await);
    }
    first.kill();
    throttle.cut();
    if !another {
        let status = in_no_source_state(&late, "no source").await;
        let printed = status["reason"].as_str().unwrap();
        assert!(
            printed.contains("no known peer") || printed.contains(&throttle.url()),
            "{printed}"
        );
        nodes.push(Node::start_with(&mut cluster.replica("first")).await);
    }
    answered.extend(cluster.write(&nodes[0], 20).await);
    let source = format!("http://{}", nodes[0].write);
    let from_it = |status: &Value| status["restore"]["source"] == source;
    late.status_where("the other source", from_it).await;
    cluster.check(&[&nodes[0], &late], &answered).await;
}

macro_rules! peers_that_die {
    ($($name:ident: $percent:literal, $another:literal;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                peer_dies_at($percent, $another).await;
            }
        )*
    };
}

peers_that_die! {
    the_peer_dies_at_10_percent_and_another_takes_over: 10, true;
    the_peer_dies_at_50_percent_and_another_takes_over: 50, true;
    the_peer_dies_at_99_percent_and_another_takes_over: 99, true;
    the_only_peer_dies_at_10_percent_and_comes_back: 10, false;
    the_only_peer_dies_at_50_percent_and_comes_back: 50, false;
    the_only_peer_dies_at_99_percent_and_comes_back: 99, false;
}
