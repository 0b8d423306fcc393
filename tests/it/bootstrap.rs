//! From nothing to ready, whatever the peers do: ready with all that the log holds, or not ready and
//! it is said why.

use std::fs;

use futures_util::future::join_all;
use serde_json::Value;
use tokio::net::TcpListener;

use crate::broker::{STREAM, copy_tree, replica_at, status_where};
use crate::disk::{backup_of, restored};
use crate::fake_peer::{FAULTS, FakePeer, Fault, Good, SILENT};
use crate::harness::{Node, PASSWORD, Ports, program};
use crate::seeded::{Cluster, serves_nothing};
use crate::throttle::Throttle;
use crate::wire::eventually;

/// Waits until a replica says that it has no way to a whole state; its `/status`.
async fn no_source(node: &Ports, what: &str) -> Value {
    // The numbers may be a moment older than the word.
    status_where(node, what, |status| {
        status["state"] == "no-source" && status["records"] == 0 && status["position"] == 0
    })
    .await
}

/// A replica that has been told of a peer that does wrong.
struct Led {
    fault: Fault,
    peer: FakePeer,
    node: Node,
}

impl Led {
    async fn launch(cluster: &Cluster, good: &Good, fault: Fault) -> Self {
        let (_, act, _) = fault;
        let peer = FakePeer::start(act(good)).await;
        let mut command = replica_at(cluster.broker.address);
        let node = Node::launch(command.args(["--peer", &peer.url])).await;
        Self { fault, peer, node }
    }

    /// It serves nothing, and says what is wrong with the peer.
    async fn refused(&self) {
        let (name, _, why) = self.fault;
        let status = no_source(&self.node, name).await;
        let said = status["reason"].as_str().unwrap();
        let (_, of_peer) = said.split_once(&format!("{}: ", self.peer.url)).unwrap();
        let of_peer = of_peer.split("; http").next().unwrap();
        assert!(of_peer.contains(why), "{name}: {of_peer}");
        assert!(said.contains("the log begins at batch 101"), "{said}");
        serves_nothing(&self.node, &["no-source", "restoring"]).await;
    }

    /// It is ready, after it has asked the peer first and another one then.
    async fn passed_by(&self, position: u64) {
        let (name, ..) = self.fault;
        let status = status_where(&self.node, name, |status| {
            status["position"].as_u64() >= Some(position) && status["state"] == "ready"
        });
        let status = status.await;
        assert_ne!(status["restore"]["source"], self.peer.url, "{name}");
        assert_eq!(status["restore"]["stage"], "done", "{name}");
        if name != "nobody listens" {
            assert_eq!(status["peers"][0]["url"], self.peer.url, "{name}");
            assert_ne!(self.peer.asked(), 0, "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_does_wrong_is_named_and_the_next_one_is_asked() {
    let mut cluster = Cluster::of(3000).await;
    let first = cluster.first().await;
    let mut answered = cluster.write(&first, 3).await;
    let good = Good::new(backup_of(&first).await);
    first.kill();

    let led = FAULTS.map(|fault| Led::launch(&cluster, &good, fault));
    let led = join_all(led).await;
    join_all(led.iter().map(Led::refused)).await;

    let first = Node::start_with(&mut cluster.with_dir("first")).await;
    answered.extend(cluster.write(&first, 3).await);
    let end = answered.last().unwrap().position;
    join_all(led.iter().map(|led| led.passed_by(end))).await;
    let mut nodes = vec![&*first];
    nodes.extend(led.iter().map(|led| &*led.node));
    cluster.check(&nodes, &answered).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_falls_silent_is_given_up() {
    let mut cluster = Cluster::of(3000).await;
    let first = cluster.first().await;
    let good = Good::new(backup_of(&first).await);
    let led = SILENT.map(|fault| Led::launch(&cluster, &good, fault));
    let led = join_all(led).await;
    let answered = cluster.write(&first, 3).await;
    for led in &led {
        led.passed_by(answered.last().unwrap().position).await;
        let (name, _, why) = led.fault;
        assert!(led.node.stderr.lock().contains(why), "{name}");
    }
    let nodes = [&*first, &*led[0].node, &*led[1].node];
    cluster.check(&nodes, &answered).await;
}

/// The log holds another batch where the backup ends: only a copy from elsewhere will do.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_with_a_batch_that_the_log_lost_is_discarded() {
    let mut cluster = Cluster::of(3000).await;
    let first = cluster.first().await;
    let good = Good::new(backup_of(&first).await);
    let answered = cluster.write(&first, 3).await;
    let peer = FakePeer::start(good.with_a_lost_batch()).await;
    let mut command = replica_at(cluster.broker.address);
    let node = Node::launch(command.args(["--peer", &peer.url])).await;
    eventually("that it says so", async || {
        let said = node.stderr.lock();
        said.contains("the log has lost batches that the restored state includes")
            .then_some(())
    })
    .await;
    serves_nothing(&node, &["gap", "restoring", "catching-up"]).await;
    drop(peer);
    status_where(&node, "ready", |status| status["state"] == "ready").await;
    node.get("lost").await.problem(404, "user-unknown");
    cluster.check(&[&first, &node], &answered).await;
}

#[tokio::test]
async fn a_replica_is_no_peer_of_itself() {
    let mut cluster = Cluster::of(10).await;
    cluster.first().await.kill();
    let own = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = own.local_addr().unwrap().to_string();
    drop(own);
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .args(["--nats-url", &cluster.broker.address.to_string()])
        .args(["--write-addr", &address, "--peer"])
        .arg(format!("http://{address}"))
        .args(["--read-addr=127.0.0.1:0", "--ops-addr=127.0.0.1:0"]);
    let node = Node::launch(&mut command).await;
    let status = no_source(&node, "itself").await;
    let said = status["reason"].as_str().unwrap();
    assert!(said.contains("answered 503"), "{said}");
    let first = Node::start_with(&mut cluster.with_dir("first")).await;
    cluster.check(&[&first, &node], &[]).await;
    // Now that it would answer itself, it still does not count.
    eventually("the other one alone", async || {
        let peers = node.ops("/status").await.json()["peers"].take();
        let urls: Vec<&Value> = peers.as_array()?.iter().map(|peer| &peer["url"]).collect();
        (urls == [&format!("http://{}", first.write)]).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_backups_time_is_that_of_the_broker_and_no_replicas() {
    let mut cluster = Cluster::of(10).await;
    let first = cluster.first().await;
    let late = cluster.broker.replica().await;
    let answered = cluster.write(&first, 3).await;
    let position = answered.last().unwrap().position;
    cluster.check(&[&first, &late], &answered).await;
    let client = cluster.broker.client().await;
    let stream = client.get_stream(STREAM).await.unwrap();
    let time = stream.get_raw_message(position).await.unwrap().time;
    for node in [&first, &late] {
        let (head, _) = restored(&backup_of(node).await).1.records.unwrap();
        assert_eq!(head.position, position);
        assert_eq!(i128::from(head.time_ns), time.unix_timestamp_nanos());
    }
}

/// A peer that dies when it has sent so many hundredths of its backup, or another one that is there.
async fn dies_at(percent: u64, another: bool) {
    let mut cluster = Cluster::of(30_000).await;
    let throttle = Throttle::to_nobody(u64::MAX).await;
    let first = cluster.first_behind(&throttle).await;
    let size = backup_of(&first).await.len() as u64;
    throttle.limit(size * percent / 100);
    let late = Node::launch(&mut replica_at(cluster.broker.address)).await;
    throttle.reached(1).await;

    // Writes go on, and what is to be known of the restore is told.
    let mut answered = cluster.write(&first, 20).await;
    let buffered = |status: &Value| status["restore"]["buffered_batches"] == 20;
    status_where(&late, "20 batches", buffered).await;
    let status = serves_nothing(&late, &["restoring"]).await;
    let restore = &status["restore"];
    assert_eq!(restore["source"], throttle.url());
    assert_eq!(
        (&restore["stage"], &restore["done"]),
        (&"restoring".into(), &false.into())
    );
    let rows = restore["rows"].as_u64().unwrap();
    assert!(rows < 30_000, "{rows}");
    // A chunk of rows comes in when it is whole.
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
        // It has come so far by the only other way: a snapshot.
        let dir = cluster.dir.path();
        let (from, to) = (dir.join("first/snapshots"), dir.join("other/snapshots"));
        fs::create_dir_all(&to).unwrap();
        copy_tree(&from, &to);
        nodes.push(Node::start_with(&mut cluster.with_dir("other")).await);
    }
    first.kill();
    throttle.cut();
    if !another {
        let status = no_source(&late, "no source").await;
        let said = status["reason"].as_str().unwrap();
        assert!(
            said.contains("no known peer") || said.contains(&throttle.url()),
            "{said}"
        );
        nodes.push(Node::start_with(&mut cluster.with_dir("first")).await);
    }
    answered.extend(cluster.write(&nodes[0], 20).await);
    let source = format!("http://{}", nodes[0].write);
    let from_it = |status: &Value| status["restore"]["source"] == source;
    status_where(&late, "the other source", from_it).await;
    cluster.check(&[&nodes[0], &late], &answered).await;
}

macro_rules! peers_that_die {
    ($($name:ident: $percent:literal, $another:literal;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                dies_at($percent, $another).await;
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
