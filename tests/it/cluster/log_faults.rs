//! A removed, recreated, truncated or foreign stream, and messages that are not batches: replicas
//! report them and never serve across a gap.

use std::process::Stdio;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::stream::{Config, StorageType};

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::backup_files::NodeState;
use crate::harness::cluster::broker::{Broker, STREAM, SUBJECT, replica_at, replica_with_data};
use crate::harness::cluster::proxy::{Proxy, Rules};
use crate::harness::wire::eventually;
use crate::harness::{Node, Ports, Process, collect_output, run};

const PATCH: &str = r#"{"user_id":"x","spp":1}"#;

/// Waits until a node cannot follow its log any more; checks that it serves nothing.
async fn assert_stopped_with_gap(node: &Ports, reason: &str) {
    assert_stopped(node, "gap", reason).await;
}

async fn assert_stopped(node: &Ports, state: &str, reason: &str) {
    let status = node
        .status_where(reason, |status| status["state"] == state)
        .await;
    let printed = status["reason"].as_str().unwrap();
    assert!(printed.contains(reason), "{printed}");
    node.get("x").await.expect_problem(503, "not-ready");
    node.set(PATCH).await.expect_problem(503, "not-ready");
    assert_eq!(node.ops("/livez").await.status, 200);
}

/// A replica behind a proxy, disconnected after it applied two batches: the empty one of its start
/// and a write.
async fn disconnected_replica(broker: &Broker) -> (Node, Proxy) {
    let proxy = Proxy::to(broker.address).await;
    let node = Node::start_with(&mut replica_at(proxy.address)).await;
    assert_eq!(node.set(PATCH).await.position(), 2);
    proxy.set(Rules::BLACKHOLE);
    proxy.cut();
    node.in_state("read-only").await;
    (node, proxy)
}

#[tokio::test]
async fn a_removed_stream_ends_serving() {
    let broker = Broker::start().await;
    let [a, b] = broker.replicas().await;
    a.set(PATCH).await.position();
    let client = broker.client().await;
    let stream = client.get_stream(STREAM).await.unwrap();
    stream.purge().await.unwrap_err();
    stream.delete_message(1).await.unwrap_err();
    client.delete_stream(STREAM).await.unwrap();
    // One failed lookup is not enough: reads continue for a while.
    assert_eq!(a.get("x").await.json()["spp"], 1);
    assert_stopped_with_gap(&a, "does not exist").await;
    assert_stopped_with_gap(&b, "does not exist").await;
    // If it returns, it was not removed, but it is another log.
    broker.create_stream().await;
    let other_log = |status: &Value| status["state"] == "other-log";
    a.status_where("another log", other_log).await;
}

#[tokio::test]
async fn a_recreated_stream_is_another_log() {
    let broker = Broker::start().await;
    let (a, proxy) = disconnected_replica(&broker).await;
    let client = broker.client().await;
    client.delete_stream(STREAM).await.unwrap();
    broker.create_stream().await;
    let b = broker.replica().await;
    for _ in 0..3 {
        b.set(PATCH).await.position();
    }
    proxy.set(Rules::default());
    assert_stopped(&a, "other-log", "and the stream holds log").await;
    b.ready_at(4).await;
}

#[tokio::test]
async fn data_outlives_a_lost_stream_until_the_operator_abandons_it() {
    let mut broker = Broker::start().await;
    let root = tempfile::tempdir().unwrap();
    let on = |address, dir: &str| replica_with_data(address, &root.path().join(dir));
    let a = Node::start_with(&mut on(broker.address, "data")).await;
    for spp in 1..=3 {
        let patch = format!(r#"{{"user_id":"x","spp":{spp}}}"#);
        a.set(patch).await.position();
    }
    let held = NodeState::of(&a).await;
    broker.roll_back(tempfile::tempdir().unwrap()).await;
    assert_stopped_with_gap(&a, "does not exist").await;
    let kept = |status: &Value| status["snapshot"]["position"] == 4;
    a.status_where("a snapshot", kept).await;
    a.stop().await;

    // Neither this replica nor an empty one creates a stream in place of the lost one.
    let waiting = |dir: &str| {
        let mut process = Process(
            on(broker.address, dir)
                .stderr(Stdio::piped())
                .spawn()
                .unwrap(),
        );
        let printed = collect_output(process.0.stderr.take().unwrap());
        (process, printed)
    };
    let (holder, empty) = (waiting("data"), waiting("empty"));
    for ((_, printed), why) in [
        (&holder, "this replica holds data of log"),
        (&empty, "holds data of log"),
    ] {
        eventually(why, async || printed.lock().contains(why).then_some(())).await;
    }
    let client = broker.client().await;
    client.get_stream(STREAM).await.unwrap_err();
    drop((holder, empty));

    // Nor does the replica follow a stream that another client created.
    broker.create_stream().await;
    let a = Node::launch(&mut on(broker.address, "data")).await;
    assert_stopped(&a, "other-log", "--abandon-log").await;
    let status = a.status().await;
    let reason = status["reason"].as_str().unwrap();
    let old = word_after(reason, "--abandon-log");
    a.stop().await;
    let snapshots = root.path().join("data/snapshots");
    let snapshot = snapshots.join("grades-00000000000000000004.csv.gz");
    assert!(snapshot.exists());

    // A cluster can start over from its snapshot.
    let seeded = || {
        let mut command = on(broker.address, "new");
        command.arg("--restore-from").arg(&snapshot);
        command
    };
    let printed = String::from_utf8(run(&mut seeded()).stderr).unwrap();
    assert!(printed.contains("nats stream rm GRADES"), "{printed}");
    client.delete_stream(STREAM).await.unwrap();
    let b = Node::start_with(&mut seeded()).await;
    let position = held.position + 1;
    assert_eq!(NodeState::of(&b).await, NodeState { position, ..held });
    assert_eq!(b.set(PATCH).await.position(), 6);
    // A replica with data of the lost log follows the new one with --abandon-log.
    let mut follows = on(broker.address, "data");
    let a = Node::start_with(follows.args(["--abandon-log", old])).await;
    a.ready_at(7).await;
    assert!(
        !snapshot.exists()
            && snapshots
                .join("grades-00000000000000000004.csv.gz.abandoned")
                .exists()
    );
}

fn word_after<'a>(text: &'a str, word: &str) -> &'a str {
    let (_, rest) = text.split_once(word).unwrap();
    rest.split_whitespace().next().unwrap()
}

/// Disconnects a replica, writes on with another, and trims the batches that the first needs.
async fn replica_behind_trimmed_log(broker: &Broker) -> (Node, Proxy, Node) {
    let (behind, proxy) = disconnected_replica(broker).await;
    let b = broker.replica().await;
    for spp in 2..7 {
        b.set(format!(r#"{{"user_id":"x","spp":{spp}}}"#))
            .await
            .position();
    }
    let client = broker.client().await;
    let stream = client.get_stream(STREAM).await.unwrap();
    let config = Config {
        max_messages: 2,
        ..stream.cached_info().config.clone()
    };
    client.update_stream(config).await.unwrap();
    (behind, proxy, b)
}

#[tokio::test]
async fn a_replica_behind_a_trimmed_log_bootstraps_from_a_peer() {
    let broker = Broker::start().await;
    let (a, proxy, b) = replica_behind_trimmed_log(&broker).await;
    proxy.set(Rules::default());
    let status = a.ready_at(b.applied_position().await).await;
    assert_eq!(status["restore"]["source"], format!("http://{}", b.write));
    assert_eq!(status["restore"]["stage"], "done");
    assert_eq!(a.metric("gradestore_resyncs_total").await, Some(1.0));
    // A replica that starts now does the same.
    let late = broker.replica().await;
    let last = a.set(PATCH).await.position();
    for node in [&a, &b, &late] {
        assert_eq!(node.get_at("x", last).await["spp"], 1);
        assert_eq!(
            node.ready_at(last).await["digest"],
            a.ready_at(last).await["digest"]
        );
    }
}

#[tokio::test]
async fn a_replica_behind_a_trimmed_log_without_a_peer_serves_nothing() {
    let broker = Broker::start().await;
    let (a, proxy, b) = replica_behind_trimmed_log(&broker).await;
    b.kill();
    proxy.set(Rules::default());
    let late = Node::launch(&mut replica_at(broker.address)).await;
    for node in [&a, &late] {
        let in_no_source_state = |status: &Value| status["state"] == "no-source";
        let status = node.status_where("no source", in_no_source_state).await;
        let printed = status["reason"].as_str().unwrap();
        assert!(printed.contains("the log begins at batch"), "{printed}");
        assert!(
            printed.contains("start a replica that has the data"),
            "{printed}"
        );
        node.get("x").await.expect_problem(503, "not-ready");
        node.set(PATCH).await.expect_problem(503, "not-ready");
        assert_eq!(node.ops("/livez").await.status, 200);
    }
}

#[tokio::test]
async fn a_broker_that_lost_batches_is_not_followed() {
    let mut broker = Broker::start().await;
    let dir = tempfile::tempdir().unwrap();
    let with_dir = |address| replica_with_data(address, dir.path());
    let mut restarted = Node::start_with(&mut with_dir(broker.address)).await;
    let a = broker.replica().await;
    let copied = a.set(PATCH).await.position();
    let copy = broker.kill_and_copy();
    broker.restart().await;
    for node in [&restarted, &a] {
        node.in_state("ready").await;
    }
    for _ in 0..3 {
        restarted.set(PATCH).await.position();
    }
    let proxy = Proxy::to(broker.address).await;
    let b = Node::start_with(&mut replica_at(proxy.address)).await;
    let last = b.applied_position().await;
    a.ready_at(last).await;
    proxy.set(Rules::BLACKHOLE);
    proxy.cut();
    restarted.signal(Signal::TERM);
    assert!(restarted.wait_for_exit().await.success());

    broker.roll_back(copy).await;
    let shorter =
        format!("the log ends at batch {copied} and this replica has applied batch {last}");
    assert_stopped_with_gap(&a, &shorter).await;
    // As long as before, with other batches.
    let c = broker.replica().await;
    while c.applied_position().await <= last {
        c.set(PATCH).await.position();
    }
    proxy.set(Rules::default());
    assert_stopped_with_gap(
        &b,
        &format!("the log holds a different batch at position {last} than"),
    )
    .await;
    let restarted = Node::launch(&mut with_dir(broker.address)).await;
    assert_stopped_with_gap(
        &restarted,
        &format!("the log holds a different batch at position {last} than"),
    )
    .await;
    assert_eq!(c.ops("/readyz").await.status, 200);
}

#[tokio::test]
async fn invalid_messages_are_skipped_and_foreign_batches_applied_by_all_replicas() {
    let broker = Broker::start().await;
    let [a, b] = broker.replicas().await;
    let client = broker.client().await;
    let publish = async |format: &str, payload: &'static str| {
        let mut headers = HeaderMap::new();
        if !format.is_empty() {
            headers.insert("Grade-Format", format);
        }
        let sent = client.publish_with_headers(SUBJECT, headers, payload.into());
        sent.await.unwrap().await.unwrap().sequence
    };
    let garbage = publish("", "garbage").await;
    publish("", r#"[{"user_id":"x","spp":1},{"user_id":"x","spp":1.5}]"#).await;
    publish("none", r#"[{"user_id":"x","spp":2}]"#).await;
    publish("", r#"[{"user_id":"y","spp":3}]"#).await;
    publish("1", r#"[{"user_id":"y","return_fee":4}]"#).await;
    publish("0", r#"[{"delete":"y"}]"#).await;
    // A valid batch that creates and deletes a user.
    publish("1", r#"[{"user_id":"x","spp":1},{"delete":"x"}]"#).await;
    publish("1", r#"[{"delete":"y","spp":1}]"#).await;
    let last = a.set(r#"{"user_id":"z","spp":5}"#).await.position();
    for node in [&a, &b] {
        let y = node.get_at("y", last).await;
        assert_eq!(
            (y["spp"].as_i64(), y["return_fee"].as_i64()),
            (Some(3), Some(4))
        );
        node.get("x").await.expect_problem(404, "user-unknown");
        node.metric_reaches("gradestore_log_poisoned_total", 5.0)
            .await;
        let printed = node.stderr.lock().clone();
        let skipped = format!("skipped a message that is not a batch seq={garbage}");
        assert!(printed.contains(&skipped), "{printed}");
    }
    let statuses = [a.ready_at(last).await, b.ready_at(last).await];
    assert_eq!(statuses[0]["digest"], statuses[1]["digest"]);
}

#[tokio::test]
async fn a_newer_format_stops_a_replica_before_it() {
    let broker = Broker::start().await;
    let a = broker.replica().await;
    let last = a.set(PATCH).await.position();
    let client = broker.client().await;
    let mut headers = HeaderMap::new();
    headers.insert("Grade-Format", "3");
    let sent = client.publish_with_headers(SUBJECT, headers, "[]".into());
    sent.await.unwrap().await.unwrap();
    let newer = format!("batch {} has format 3, newer than", last + 1);
    assert_stopped_with_gap(&a, &newer).await;
    assert_eq!(a.applied_position().await, last);
}

#[tokio::test]
async fn a_stream_with_other_settings_stops_the_start_and_is_named() {
    let broker = Broker::start_with(&[]).await;
    let client = broker.client().await;
    let made = client.create_stream(Config {
        name: STREAM.to_owned(),
        subjects: vec![SUBJECT.to_owned()],
        storage: StorageType::Memory,
        max_age: Duration::from_secs(24 * 3600),
        ..Config::default()
    });
    made.await.unwrap();
    let output = run(&mut replica_at(broker.address));
    assert!(!output.status.success());
    let printed = String::from_utf8(output.stderr).unwrap();
    assert!(
        printed.contains("GRADES has storage Memory, expected File"),
        "{printed}"
    );
    // Another stream has the subject.
    let made = client.create_stream(Config {
        name: "HOLDER".to_owned(),
        subjects: vec!["grades.*.set".to_owned()],
        ..Config::default()
    });
    made.await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut other = replica_with_data(broker.address, dir.path());
    let output = run(other.args(["--stream", "OTHER"]));
    let printed = String::from_utf8(output.stderr).unwrap();
    assert!(
        printed.contains("rejected the request for stream OTHER"),
        "{printed}"
    );
}
