//! A stream that is not what it was, and messages that are no batches: told, and never served across.

use std::process::Stdio;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::stream::{Config, StorageType};

use rustix::process::Signal;
use serde_json::Value;

use crate::broker::{Broker, STREAM, SUBJECT, at, get_at, position, replica_at, status_where};
use crate::disk::Held;
use crate::harness::{Node, Ports, Process, collected, run};
use crate::proxy::{Proxy, Rules};
use crate::wire::eventually;

const PATCH: &str = r#"{"user_id":"x","spp":1}"#;

/// Waits until a node says that it can't follow its log any more; checks that it serves nothing.
async fn stopped(node: &Ports, reason: &str) {
    stopped_in(node, "gap", reason).await;
}

async fn stopped_in(node: &Ports, state: &str, reason: &str) {
    let status = status_where(node, reason, |status| status["state"] == state).await;
    let said = status["reason"].as_str().unwrap();
    assert!(said.contains(reason), "{said}");
    node.get("x").await.problem(503, "not-ready");
    node.set(PATCH).await.problem(503, "not-ready");
    assert_eq!(node.ops("/livez").await.status, 200);
}

/// A replica behind a proxy, cut off when it has applied two batches: that of its start, and a write.
async fn cut_off(broker: &Broker) -> (Node, Proxy) {
    let proxy = Proxy::to(broker.address).await;
    let node = Node::start_with(&mut replica_at(proxy.address)).await;
    assert_eq!(node.set(PATCH).await.position(), 2);
    proxy.set(Rules::DEAD);
    proxy.cut();
    status_where(&node, "read-only", |status| status["state"] == "read-only").await;
    (node, proxy)
}

#[tokio::test]
async fn a_stream_that_is_removed_ends_serving() {
    let broker = Broker::start().await;
    let [a, b] = broker.replicas().await;
    a.set(PATCH).await.position();
    let client = broker.client().await;
    let stream = client.get_stream(STREAM).await.unwrap();
    stream.purge().await.unwrap_err();
    stream.delete_message(1).await.unwrap_err();
    client.delete_stream(STREAM).await.unwrap();
    // Not on one answer: reads go on until it has been gone for a while.
    assert_eq!(a.get("x").await.json()["spp"], 1);
    stopped(&a, "does not exist").await;
    stopped(&b, "does not exist").await;
    // It may come back, and then has not been removed.
    broker.create_stream().await;
    let other_log = |status: &Value| status["state"] == "other-log";
    status_where(&a, "another log", other_log).await;
}

#[tokio::test]
async fn a_stream_that_is_made_anew_is_another_log() {
    let broker = Broker::start().await;
    let (a, proxy) = cut_off(&broker).await;
    let client = broker.client().await;
    client.delete_stream(STREAM).await.unwrap();
    broker.create_stream().await;
    let b = broker.replica().await;
    for _ in 0..3 {
        b.set(PATCH).await.position();
    }
    proxy.set(Rules::default());
    stopped_in(&a, "other-log", "and the stream holds log").await;
    at(&b, 4).await;
}

#[tokio::test]
async fn what_was_answered_outlives_its_log() {
    let mut broker = Broker::start().await;
    let root = tempfile::tempdir().unwrap();
    let on = |address, dir: &str| {
        let mut command = replica_at(address);
        command.env("GRADESTORE_EPHEMERAL", "false");
        command.arg("--data-dir").arg(root.path().join(dir));
        command
    };
    let a = Node::start_with(&mut on(broker.address, "data")).await;
    for spp in 1..=3 {
        let patch = format!(r#"{{"user_id":"x","spp":{spp}}}"#);
        a.set(patch).await.position();
    }
    let held = Held::by(&a).await;
    broker.roll_back(tempfile::tempdir().unwrap()).await;
    stopped(&a, "does not exist").await;
    let kept = |status: &Value| status["snapshot"]["position"] == 4;
    status_where(&a, "a snapshot", kept).await;
    a.end().await;

    // Neither it nor an empty replica creates a stream in the place of the lost one.
    let waiting = |dir: &str| {
        let mut process = Process(
            on(broker.address, dir)
                .stderr(Stdio::piped())
                .spawn()
                .unwrap(),
        );
        let said = collected(process.0.stderr.take().unwrap());
        (process, said)
    };
    let (holder, empty) = (waiting("data"), waiting("empty"));
    for ((_, said), why) in [
        (&holder, "this replica holds data of log"),
        (&empty, "holds data of log"),
    ] {
        eventually(why, async || said.lock().contains(why).then_some(())).await;
    }
    let client = broker.client().await;
    client.get_stream(STREAM).await.unwrap_err();
    drop((holder, empty));

    // Nor does it follow one that somebody else has created.
    broker.create_stream().await;
    let a = Node::launch(&mut on(broker.address, "data")).await;
    stopped_in(&a, "other-log", "--abandon-log").await;
    let status = a.ops("/status").await.json();
    let (_, old) = status["reason"].as_str().unwrap().rsplit_once(' ').unwrap();
    a.end().await;
    let snapshots = root.path().join("data/snapshots");
    let snapshot = snapshots.join("grades-00000000000000000004.csv.gz");
    assert!(snapshot.exists());

    // From that snapshot the cluster can start over.
    let seeded = || {
        let mut command = on(broker.address, "new");
        command.arg("--restore-from").arg(&snapshot);
        command
    };
    let said = String::from_utf8(run(&mut seeded()).stderr).unwrap();
    assert!(said.contains("nats stream rm GRADES"), "{said}");
    client.delete_stream(STREAM).await.unwrap();
    let b = Node::start_with(&mut seeded()).await;
    let position = held.position + 1;
    assert_eq!(Held::by(&b).await, Held { position, ..held });
    assert_eq!(b.set(PATCH).await.position(), 6);
    // And a replica with data of the lost log follows it once it is told to.
    let mut follows = on(broker.address, "data");
    let a = Node::start_with(follows.args(["--abandon-log", old])).await;
    at(&a, 7).await;
    assert!(
        !snapshot.exists()
            && snapshots
                .join("grades-00000000000000000004.csv.gz.abandoned")
                .exists()
    );
}

/// Cuts `behind` off, lets `b` write on, and makes the stream forget what came first.
async fn forgotten(broker: &Broker) -> (Node, Proxy, Node) {
    let (behind, proxy) = cut_off(broker).await;
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
async fn a_replica_that_the_log_has_forgotten_begins_anew_from_a_peer() {
    let broker = Broker::start().await;
    let (a, proxy, b) = forgotten(&broker).await;
    proxy.set(Rules::default());
    let status = at(&a, position(&b).await).await;
    assert_eq!(status["restore"]["source"], format!("http://{}", b.write));
    assert_eq!(status["restore"]["stage"], "done");
    assert_eq!(a.metric("gradestore_resyncs_total").await, Some(1.0));
    // One that starts now does the same.
    let late = broker.replica().await;
    let last = a.set(PATCH).await.position();
    for node in [&a, &b, &late] {
        assert_eq!(get_at(node, "x", last).await["spp"], 1);
        assert_eq!(at(node, last).await["digest"], at(&a, last).await["digest"]);
    }
}

#[tokio::test]
async fn without_a_peer_a_forgotten_replica_serves_nothing_and_says_why() {
    let broker = Broker::start().await;
    let (a, proxy, b) = forgotten(&broker).await;
    b.kill();
    proxy.set(Rules::default());
    let late = Node::launch(&mut replica_at(broker.address)).await;
    for node in [&a, &late] {
        let no_source = |status: &Value| status["state"] == "no-source";
        let status = status_where(node, "no source", no_source).await;
        let said = status["reason"].as_str().unwrap();
        assert!(said.contains("the log begins at batch"), "{said}");
        assert!(said.contains("start another replica"), "{said}");
        node.get("x").await.problem(503, "not-ready");
        node.set(PATCH).await.problem(503, "not-ready");
        assert_eq!(node.ops("/livez").await.status, 200);
    }
}

#[tokio::test]
async fn a_broker_that_lost_batches_is_not_followed() {
    let mut broker = Broker::start().await;
    let dir = tempfile::tempdir().unwrap();
    let with_dir = |address| {
        let mut command = replica_at(address);
        command.env("GRADESTORE_EPHEMERAL", "false");
        command.arg("--data-dir").arg(dir.path());
        command
    };
    let mut restarted = Node::start_with(&mut with_dir(broker.address)).await;
    let a = broker.replica().await;
    let copied = a.set(PATCH).await.position();
    let copy = broker.kill_and_copy();
    broker.restart().await;
    for node in [&restarted, &a] {
        status_where(node, "ready", |status| status["state"] == "ready").await;
    }
    for _ in 0..3 {
        restarted.set(PATCH).await.position();
    }
    let proxy = Proxy::to(broker.address).await;
    let b = Node::start_with(&mut replica_at(proxy.address)).await;
    let last = position(&b).await;
    at(&a, last).await;
    proxy.set(Rules::DEAD);
    proxy.cut();
    restarted.signal(Signal::TERM);
    assert!(restarted.exit().await.success());

    broker.roll_back(copy).await;
    let shorter =
        format!("the log ends at batch {copied} and this replica has applied batch {last}");
    stopped(&a, &shorter).await;
    // As long as it was, with others in it.
    let c = broker.replica().await;
    while position(&c).await <= last {
        c.set(PATCH).await.position();
    }
    proxy.set(Rules::default());
    stopped(&b, &format!("the log holds another batch {last} than")).await;
    let restarted = Node::launch(&mut with_dir(broker.address)).await;
    stopped(
        &restarted,
        &format!("the log holds another batch {last} than"),
    )
    .await;
    assert_eq!(c.ops("/readyz").await.status, 200);
}

#[tokio::test]
async fn a_message_that_is_no_batch_is_skipped_alike_and_a_strangers_batch_is_read() {
    let broker = Broker::start().await;
    let [a, b] = broker.replicas().await;
    let client = broker.client().await;
    let publish = async |format: &str, payload: &'static str| {
        let mut headers = HeaderMap::new();
        if !format.is_empty() {
            headers.insert("Grade-Format", format);
        }
        let sent = client.publish_with_headers(SUBJECT, headers, payload.into());
        sent.await.unwrap().await.unwrap()
    };
    let started = 2;
    at(&a, started).await;
    publish("", "garbage").await;
    publish("", r#"[{"user_id":"x","spp":1},{"user_id":"x","spp":1.5}]"#).await;
    publish("none", r#"[{"user_id":"x","spp":2}]"#).await;
    publish("", r#"[{"user_id":"y","spp":3}]"#).await;
    publish("1", r#"[{"user_id":"y","return_fee":4}]"#).await;
    publish("0", r#"[{"delete":"y"}]"#).await;
    // This is one: a user who comes and goes.
    publish("1", r#"[{"user_id":"x","spp":1},{"delete":"x"}]"#).await;
    publish("1", r#"[{"delete":"y","spp":1}]"#).await;
    let last = a.set(r#"{"user_id":"z","spp":5}"#).await.position();
    assert_eq!(last, started + 9);
    for node in [&a, &b] {
        let y = get_at(node, "y", last).await;
        assert_eq!(
            (y["spp"].as_i64(), y["return_fee"].as_i64()),
            (Some(3), Some(4))
        );
        node.get("x").await.problem(404, "user-unknown");
        node.metric_reaches("gradestore_log_poisoned_total", 5.0)
            .await;
        let said = node.stderr.lock().clone();
        let skipped = format!("skipped a message that is not a batch seq={}", started + 1);
        assert!(said.contains(&skipped), "{said}");
    }
    let statuses = [at(&a, last).await, at(&b, last).await];
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
    stopped(&a, &newer).await;
    assert_eq!(position(&a).await, last);
}

#[tokio::test]
async fn a_stream_of_another_shape_stops_the_start_and_is_named() {
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
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("GRADES has storage Memory, expected File"),
        "{said}"
    );
    // Another name gets a stream of its own, but not the same subject.
    let dir = tempfile::tempdir().unwrap();
    let mut other = replica_at(broker.address);
    other.env("GRADESTORE_EPHEMERAL", "false");
    let output = run(other
        .args(["--stream", "OTHER", "--data-dir"])
        .arg(dir.path()));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("rejected the request for stream OTHER"),
        "{said}"
    );
}
