//! Replicas compare what they hold at one position; who is outvoted is not ready and begins anew.

use std::collections::BTreeSet;
use std::process::Command;

use async_nats::HeaderMap;
use gradestore::backup::{FORMAT, Head, Snapshots};
use gradestore::grade::{Changes, Patch};
use gradestore::log::Chain;
use gradestore::store::Store;
use serde_json::Value;
use tempfile::TempDir;

use crate::broker::{Broker, Load, STREAM, SUBJECT, at, get_at, replica_at, status_where};
use crate::disk::names_in;
use crate::harness::{Node, Ports};
use crate::wire::eventually;

const COMPARED: &str = "gradestore_checkpoints_compared_total";
const DIVERGENCES: &str = "gradestore_divergences_total";

/// A replica that speaks often.
fn talkative(broker: &Broker) -> Command {
    let mut command = replica_at(broker.address);
    command.env("GRADESTORE_CHECKPOINT_INTERVAL", "200ms");
    command
}

async fn talkative_replicas<const N: usize>(broker: &Broker) -> [Node; N] {
    let mut commands: Vec<_> = (0..N).map(|_| talkative(broker)).collect();
    let nodes = futures_util::future::join_all(commands.iter_mut().map(Node::start_with)).await;
    nodes.try_into().ok().unwrap()
}

async fn compared(node: &Ports, at_least: f64) {
    eventually("checkpoints compared", async || {
        node.metric(COMPARED)
            .await
            .filter(|compared| *compared >= at_least)
    })
    .await;
}

/// Waits until all hold the same at the same position.
async fn equal(nodes: &[&Ports]) {
    eventually("the same at one position", async || {
        let mut seen = BTreeSet::new();
        for node in nodes {
            let status = node.ops("/status").await.json();
            seen.insert(format!("{} {}", status["position"], status["digest"]));
        }
        (seen.len() == 1).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_replicas_agree_under_load() {
    let broker = Broker::start().await;
    let [a, b, c] = talkative_replicas(&broker).await;
    let load = Load::start(&[&a, &b, &c], 20, usize::MAX);
    for node in [&a, &b, &c] {
        compared(node, 10.0).await;
    }
    load.stop().await;
    equal(&[&a, &b, &c]).await;
    for node in [&a, &b, &c] {
        assert_eq!(node.metric(DIVERGENCES).await, Some(0.0));
    }
}

/// A data directory whose snapshot says something else than the log up to its position.
async fn wrong_snapshot(broker: &Broker, node: &Ports, position: u64) -> TempDir {
    let client = broker.client().await;
    let stream = client.get_stream(STREAM).await.unwrap();
    let time = stream.get_raw_message(position).await.unwrap().time;
    let status = node.ops("/status").await.json();
    let head = Head {
        format: FORMAT,
        log_id: status["log_id"].as_str().unwrap().into(),
        position,
        time_ns: time.unix_timestamp_nanos() as u64,
        chain: Chain::default(),
        previous_chain: Chain::default(),
        rows_expected: 1,
    };
    let store = Store::new();
    let mut changes = Changes::default();
    changes.set(1, 666);
    store.apply(&Patch {
        user_id: "x",
        changes,
    });
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::open(&dir.path().join("snapshots")).unwrap();
    snapshots.write(&store, head, || Ok(position)).unwrap();
    dir
}

/// A replica that begins from such a snapshot.
async fn wrong_one(broker: &Broker, node: &Ports, position: u64) -> (Node, TempDir) {
    let dir = wrong_snapshot(broker, node, position).await;
    let mut command = talkative(broker);
    command.env("GRADESTORE_EPHEMERAL", "false");
    command.arg("--data-dir").arg(dir.path());
    (Node::start_with(&mut command).await, dir)
}

fn set(spp: u64) -> String {
    format!(r#"{{"user_id":"x","spp":{spp}}}"#)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_three_that_is_wrong_is_outvoted_and_begins_anew() {
    let broker = Broker::start().await;
    let [a, b] = talkative_replicas(&broker).await;
    for spp in 1..=3 {
        a.set(set(spp)).await.position();
    }
    let (wrong, dir) = wrong_one(&broker, &a, 3).await;
    // Writers go on all the while, at the wrong one too.
    let load = Load::start(&[&a, &b, &wrong], 5, usize::MAX);
    wrong.metric_reaches("gradestore_resyncs_total", 1.0).await;
    for node in [&a, &b, &wrong] {
        status_where(node, "ready", |status| status["state"] == "ready").await;
    }
    load.stop().await;
    let written = wrong.set(set(9)).await.position();
    for node in [&a, &b, &wrong] {
        assert_eq!(get_at(node, "x", written).await["spp"], 9);
        assert!(node.metric(DIVERGENCES).await.unwrap() >= 1.0);
    }
    for node in [&a, &b] {
        assert_eq!(node.metric("gradestore_resyncs_total").await, Some(0.0));
    }
    equal(&[&a, &b, &wrong]).await;
    // What it had kept is not to be begun from again.
    let names = names_in(&dir.path().join("snapshots"));
    assert!(
        names.iter().any(|name| name.ends_with(".diverged")),
        "{names:?}"
    );
    // And not to be told of as if it were.
    let snapshot = async |what| wrong.metric(&format!("gradestore_snapshot_{what}")).await;
    assert_eq!(snapshot("position").await, Some(0.0));
    assert!(snapshot("age_seconds").await.unwrap().is_nan());
    let said = wrong.stderr.lock().clone();
    assert!(said.contains("a peer holds something else"), "{said}");
}

/// A message from a process that nobody knows, with a checkpoint.
async fn speak(broker: &Broker, origin: u128, position: u64, digest: u128) -> u64 {
    let client = broker.client().await;
    let mut headers = HeaderMap::new();
    headers.insert("Grade-Format", "1");
    headers.insert("Grade-RandomId", format!("{origin:032x}"));
    headers.insert("Nats-Msg-Id", format!("{origin:032x}-{position}"));
    headers.insert("Grade-Checkpoint", format!("{position} {digest:032x}"));
    let sent = client.publish_with_headers(SUBJECT, headers, "[]".into());
    sent.await.unwrap().await.unwrap().sequence
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_one_stays_and_the_other_begins_anew() {
    let broker = Broker::start().await;
    let [a] = talkative_replicas(&broker).await;
    for spp in 1..=3 {
        a.set(set(spp)).await.position();
    }
    let (wrong, _dir) = wrong_one(&broker, &a, 3).await;
    // Nobody writes: what came out of a file is compared all the same.
    eventually("one resync", async || {
        let (one, other) = tokio::join!(
            a.metric("gradestore_resyncs_total"),
            wrong.metric("gradestore_resyncs_total")
        );
        (one? + other? == 1.0).then_some(())
    })
    .await;
    for node in [&a, &wrong] {
        status_where(node, "ready", |status| status["state"] == "ready").await;
        node.set(set(5)).await.position();
    }
    equal(&[&a, &wrong]).await;
}

#[tokio::test]
async fn while_it_is_not_known_who_is_wrong_nobody_is_ready() {
    let broker = Broker::start().await;
    let [a, b] = broker.replicas().await;
    a.set(set(1)).await.position();
    let mark = speak(&broker, 1, 0, 0).await;
    speak(&broker, 1, mark, 7).await;
    for node in [&a, &b] {
        let diverged = |status: &Value| status["state"] == "diverged";
        let status = status_where(node, "diverged", diverged).await;
        let said = status["reason"].as_str().unwrap();
        assert!(said.contains("one of them is wrong"), "{said}");
        node.get("x").await.problem(503, "not-ready");
        node.set(set(2)).await.problem(503, "not-ready");
    }
    // Two voices against one.
    for node in [&a, &b] {
        status_where(node, "ready", |status| status["state"] == "ready").await;
        assert_eq!(node.get("x").await.json()["spp"], 1);
        assert_eq!(node.metric("gradestore_resyncs_total").await, Some(0.0));
        assert_eq!(node.metric(DIVERGENCES).await, Some(1.0));
    }
}

#[tokio::test]
async fn a_checkpoint_that_says_nothing_is_passed_over() {
    let broker = Broker::start().await;
    let [a] = broker.replicas().await;
    a.set(set(1)).await.position();
    // Of a place that nobody marked, of one that is to come, and none at all.
    speak(&broker, 1, 1, 7).await;
    speak(&broker, 2, 1000, 7).await;
    let client = broker.client().await;
    for text in ["", "x", "1", "-1 0", "99999999999999999999 0"] {
        let mut headers = HeaderMap::new();
        headers.insert("Grade-Checkpoint", text);
        let sent = client.publish_with_headers(SUBJECT, headers, "[]".into());
        sent.await.unwrap().await.unwrap();
    }
    let position = a.set(set(2)).await.position();
    at(&a, position).await;
    assert_eq!(a.metric(DIVERGENCES).await, Some(0.0));
    assert_eq!(a.metric("gradestore_log_poisoned_total").await, Some(0.0));
}
