//! The replica's copy of the log: starts without the stream's old batches, and what an acknowledged
//! write survives.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use async_nats::jetstream::stream::Config;
use rustix::process::Signal;
use serde_json::Value;
use tempfile::tempdir;

use crate::harness::cluster::broker::{Broker, STREAM, replica_with_data};
use crate::harness::small_disk::SmallDisk;
use crate::harness::wire::eventually;
use crate::harness::{Node, PASSWORD};

const DISK_MIB: usize = 24;
const USERS: usize = 100_000;

fn replica(address: SocketAddr, dir: &Path, sync: &str) -> Command {
    let mut command = replica_with_data(address, dir);
    command.args(["--wal-sync", sync]);
    command
}

async fn write(node: &Node, spp: usize) -> u64 {
    let patch = format!(r#"{{"user_id":"x","spp":{spp}}}"#);
    node.set(patch).await.position()
}

async fn wal_at(node: &Node, position: u64) -> Value {
    let written = |status: &Value| status["wal"]["last"].as_u64() >= Some(position);
    let status = node.status_where("the batch in the WAL", written).await;
    status["wal"].clone()
}

/// Removes all messages but the last from the stream.
async fn trim_stream(broker: &Broker) {
    let stream = broker.client().await.get_stream(STREAM).await.unwrap();
    for max_messages in [1, -1] {
        let config = Config {
            max_messages,
            ..stream.cached_info().config.clone()
        };
        broker.client().await.update_stream(config).await.unwrap();
    }
}

#[tokio::test]
async fn a_replica_starts_from_its_wal_when_the_stream_was_trimmed() {
    let (broker, root) = (Broker::start().await, tempdir().unwrap());
    let dir = root.path().join("data");
    let mut node = Node::start_with(&mut replica(broker.address, &dir, "10ms")).await;
    let mut last = 0;
    for spp in 1..=20 {
        last = write(&node, spp).await;
    }
    let wal = wal_at(&node, last).await;
    assert_eq!(wal["first"], 1);
    assert_eq!(wal["failure"], Value::Null);
    assert_eq!(
        node.metric("gradestore_wal_last").await,
        Some(wal["last"].as_f64().unwrap())
    );
    let digest = node.status().await["digest"].clone();
    node.signal(Signal::KILL);
    node.wait_for_exit().await;
    trim_stream(&broker).await;
    // Without the WAL the data is nowhere.
    let (wal, moved) = (dir.join("wal"), root.path().join("moved"));
    fs::rename(&wal, &moved).unwrap();
    let without = Node::launch(&mut replica(broker.address, &dir, "10ms")).await;
    without.in_state("no-source").await;
    without.kill();
    fs::remove_dir_all(&wal).unwrap();
    fs::rename(&moved, &wal).unwrap();
    let node = Node::start_with(&mut replica(broker.address, &dir, "10ms")).await;
    let status = node.ready_at(last).await;
    assert_eq!(status["digest"], digest);
    assert_eq!(node.get_at("x", last).await["spp"], 20);
    write(&node, 21).await;
    // From a snapshot and the WAL after it. A clean stop leaves no hole in the WAL, whatever its
    // interval.
    node.stop().await;
    let mut node = Node::start_with(&mut replica(broker.address, &dir, "1h")).await;
    write(&node, 22).await;
    node.stop().await;
    node = Node::start_with(&mut replica(broker.address, &dir, "10ms")).await;
    let wal = wal_at(&node, last + 3).await;
    assert_eq!(wal["first"], 1);
    let last = write(&node, 22).await;
    wal_at(&node, last).await;
    node.signal(Signal::KILL);
    node.wait_for_exit().await;
    trim_stream(&broker).await;
    let node = Node::start_with(&mut replica(broker.address, &dir, "10ms")).await;
    assert_eq!(node.get_at("x", last).await["spp"], 22);
}

#[tokio::test]
async fn with_always_an_acknowledged_write_outlives_a_broker_that_lost_it() {
    let (mut broker, root) = (Broker::start().await, tempdir().unwrap());
    let dir = root.path().join("data");
    let mut command = replica(broker.address, &dir, "always");
    command.args(["--snapshot-interval", "1s"]);
    let mut node = Node::start_with(&mut command).await;
    // So many that loading them takes longer than to find the loss.
    write_many(&node, USERS).await;
    let snapshot = |status: &Value| status["snapshot"]["rows"] == USERS;
    node.status_where("a snapshot", snapshot).await;
    let copy = broker.kill_and_copy();
    broker.restart().await;
    node.in_state("ready").await;
    let mut last = 0;
    for spp in 2..10 {
        last = write(&node, spp).await;
        assert!(node.status().await["wal"]["last"].as_u64() >= Some(last));
    }
    node.signal(Signal::KILL);
    node.wait_for_exit().await;
    broker.roll_back(copy).await;
    // A start with another stream changes nothing.
    let on_other = |dir: &Path| {
        let mut command = replica(broker.address, dir, "always");
        command.args(["--stream", "OTHER"]);
        command
    };
    let other = Node::start_with(&mut on_other(&root.path().join("other"))).await;
    let wrong = Node::launch(&mut on_other(&dir)).await;
    wrong.in_state("other-log").await;
    wrong.kill();
    other.kill();
    // It neither forgets the writes nor serves a state that other replicas do not have.
    let node = Node::launch(&mut replica(broker.address, &dir, "always")).await;
    let lost = |status: &Value| status["state"] == "gap";
    let status = node.status_where("the loss", lost).await;
    assert_eq!(status["position"], last);
    let reason = status["reason"].as_str().unwrap();
    let expected = format!("this replica has applied batch {last}: the broker lost batches");
    assert!(reason.contains(&expected), "{reason}");
    // The whole state is kept as a snapshot.
    let kept = |status: &Value| status["snapshot"]["position"] == last;
    let status = node.status_where("a snapshot of it", kept).await;
    assert_eq!(status["records"], USERS + 1);
}

async fn write_many(node: &Node, users: usize) {
    let lines = (0..users).map(|user| format!("{{\"user_id\":\"user-{user}\",\"spp\":{user}}}\n"));
    let request = node.client.post(format!("http://{}/set", node.write));
    let request = request.basic_auth("admin", Some(PASSWORD));
    let request = request.header("content-type", "application/x-ndjson");
    let response = request
        .body(lines.collect::<String>())
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 200, "{}", response.text().await.unwrap());
}

#[tokio::test]
async fn a_damaged_wal_does_not_prevent_a_start() {
    let (broker, root) = (Broker::start().await, tempdir().unwrap());
    let dir = root.path().join("data");
    let command = || replica(broker.address, &dir, "always");
    let mut node = Node::start_with(&mut command()).await;
    let mut last = 0;
    for spp in 1..=50 {
        last = write(&node, spp).await;
    }
    let digest = node.status().await["digest"].clone();
    node.signal(Signal::KILL);
    node.wait_for_exit().await;
    let log = fs::read_dir(dir.join("wal"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let segment = log.path().join("00000000000000000001.seg");
    let whole = fs::read(&segment).unwrap();
    // In the header, in a record, and a cut one.
    for (at, cut) in [(20, whole.len()), (6000, whole.len()), (6000, 6001)] {
        let mut bytes = whole[..cut].to_vec();
        bytes[at] ^= 1;
        fs::write(&segment, bytes).unwrap();
        let mut node = Node::start_with(&mut command()).await;
        let status = node.ready_at(last).await;
        assert_eq!(status["digest"], digest);
        let next = write(&node, 50).await;
        wal_at(&node, next).await;
        node.signal(Signal::KILL);
        node.wait_for_exit().await;
    }
}

#[tokio::test]
async fn a_full_disk_ends_the_run_and_rejects_writes_only_with_always() {
    let broker = Broker::start().await;
    for sync in ["10ms", "always"] {
        let disk = SmallDisk::new(DISK_MIB);
        let dir = disk.data_dir();
        let mut command = replica(broker.address, &dir, sync);
        let node = Node::start_with(command.args(["--snapshot-interval", "1h"])).await;
        write(&node, 1).await;
        let ballast = disk.fill(0);
        // The records of a segment fill its last block first.
        let mut rejected = None;
        let failing = eventually("a failing WAL", async || {
            let response = node
                .set(format!(r#"{{"user_id":"{}"}}"#, "y".repeat(250)))
                .await;
            if response.status != 204 {
                rejected = Some(response);
            }
            let status = node.status().await;
            status["wal"]["failure"].as_str().map(str::to_owned)
        })
        .await;
        assert!(failing.contains("No space left"), "{failing}");
        assert_eq!(node.metric("gradestore_wal_failing").await, Some(1.0));
        assert_eq!(node.get("x").await.json()["spp"], 1);
        match sync {
            "always" => {
                let detail = write_problem(&node).await;
                assert!(detail.contains("cannot write the WAL"), "{detail}");
                assert_eq!(node.ops("/readyz").await.status, 200);
                node.ops("/readyz/write")
                    .await
                    .expect_problem(503, "not-ready");
            }
            _ => {
                write(&node, 2).await;
                assert!(rejected.is_none());
            }
        }
        drop(ballast);
        let written = |status: &Value| status["wal"]["failure"].is_null();
        node.status_where("a written WAL", written).await;
        let last = write(&node, 3).await;
        let wal = wal_at(&node, last).await;
        assert!(wal["first"].as_u64() > Some(1), "{wal}");
        node.stop().await;
    }
}

async fn write_problem(node: &Node) -> String {
    eventually("a rejected write", async || {
        let response = node.set(r#"{"user_id":"x","spp":9}"#).await;
        (response.status == 503).then_some(response)
    })
    .await
    .expect_problem(503, "not-written")
}
