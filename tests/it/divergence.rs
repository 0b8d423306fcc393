//! Replicas vote on what their state is: the one that a majority contradicts is not ready and
//! bootstraps again. Without a majority an operator chooses.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use gradestore::backup::Snapshots;
use gradestore::grade::{Changes, Patch};
use gradestore::log::Position;
use serde_json::Value;
use tempfile::TempDir;

use crate::broker::{Broker, Load, get_at, replica_at, status_where};
use crate::disk::{backup_of, names_in, restored};
use crate::harness::{Node, Ports};
use crate::wire::eventually;

const COMPARED: &str = "gradestore_checkpoints_compared_total";
const DIVERGENCES: &str = "gradestore_divergences_total";
const RESYNCS: &str = "gradestore_resyncs_total";
/// What a replica logs when it stops being ready because of votes.
pub(crate) const IN_DOUBT: &str = "the state may be wrong";

/// A replica that votes often.
pub(crate) fn talkative(broker: &Broker) -> Command {
    let mut command = replica_at(broker.address);
    command.env("GRADESTORE_CHECKPOINT_INTERVAL", "200ms");
    command
}

pub(crate) async fn talkative_replicas<const N: usize>(broker: &Broker) -> [Node; N] {
    let mut commands: Vec<_> = (0..N).map(|_| talkative(broker)).collect();
    let nodes = futures_util::future::join_all(commands.iter_mut().map(Node::start_with)).await;
    nodes.try_into().ok().unwrap()
}

/// Waits until a counter has at least this value.
async fn counted(node: &Ports, counter: &str, at_least: f64) {
    eventually(counter, async || {
        node.metric(counter)
            .await
            .filter(|counted| *counted >= at_least)
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
        counted(node, COMPARED, 10.0).await;
    }
    load.stop().await;
    equal(&[&a, &b, &c]).await;
    for node in [&a, &b, &c] {
        assert_eq!(node.metric(DIVERGENCES).await, Some(0.0));
    }
}

/// A data directory with a snapshot of what `node` holds, but for one grade.
async fn wrong_snapshot(node: &Ports) -> TempDir {
    let (store, summary) = restored(&backup_of(node).await);
    let (head, end) = summary.records.unwrap();
    let mut changes = Changes::default();
    changes.set(1, 666);
    store.apply(&Patch {
        user_id: "y",
        changes,
    });
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::open(&dir.path().join("snapshots")).unwrap();
    let end = Position {
        seq: end.position,
        chain: end.chain,
        ..head.position()
    };
    let written = snapshots.write(&store, head, || Ok(end));
    written.unwrap();
    dir
}

/// A replica with this data directory.
pub(crate) async fn in_dir(broker: &Broker, dir: &TempDir) -> Node {
    let mut command = talkative(broker);
    command.env("GRADESTORE_EPHEMERAL", "false");
    command.arg("--data-dir").arg(dir.path());
    Node::start_with(&mut command).await
}

fn set(spp: u64) -> String {
    format!(r#"{{"user_id":"x","spp":{spp}}}"#)
}

async fn in_state(node: &Ports, state: &'static str) -> Value {
    status_where(node, state, |status| status["state"] == state).await
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_three_that_is_wrong_is_overruled_and_bootstraps_again() {
    let broker = Broker::start().await;
    let [a, b] = talkative_replicas(&broker).await;
    for spp in 1..=3 {
        a.set(set(spp)).await.position();
    }
    let dir = wrong_snapshot(&a).await;
    let wrong = in_dir(&broker, &dir).await;
    // Writers go on all the while, at the wrong one too.
    let load = Load::start(&[&a, &b, &wrong], 5, usize::MAX);
    wrong.metric_reaches(RESYNCS, 1.0).await;
    for node in [&a, &b, &wrong] {
        in_state(node, "ready").await;
    }
    load.stop().await;
    let written = wrong.set(set(9)).await.position();
    for node in [&a, &b, &wrong] {
        assert_eq!(get_at(node, "x", written).await["spp"], 9);
        assert!(node.metric(DIVERGENCES).await.unwrap() >= 1.0);
    }
    // The majority has not been unready for a moment.
    for node in [&a, &b] {
        assert_eq!(node.metric(RESYNCS).await, Some(0.0));
        let logged = node.stderr.lock().clone();
        assert!(
            logged.contains("digest mismatch with a replica"),
            "{logged}"
        );
        assert!(!logged.contains(IN_DOUBT), "{logged}");
    }
    equal(&[&a, &b, &wrong]).await;
    // It does not start from its old snapshots again.
    let names = names_in(&dir.path().join("snapshots"));
    assert!(
        names.iter().any(|name| name.ends_with(".diverged")),
        "{names:?}"
    );
    // And does not report them.
    let snapshot = async |what| wrong.metric(&format!("gradestore_snapshot_{what}")).await;
    assert_eq!(snapshot("position").await, Some(0.0));
    assert!(snapshot("age_seconds").await.unwrap().is_nan());
}

/// The runbook: docs/operations/alerts.md, GradestoreDivergence.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_that_differ_the_operator_stops_the_wrong_one_and_deletes_its_data() {
    let broker = Broker::start().await;
    let [a] = talkative_replicas(&broker).await;
    for spp in 1..=3 {
        a.set(set(spp)).await.position();
    }
    let dir = wrong_snapshot(&a).await;
    let wrong = in_dir(&broker, &dir).await;
    // Nobody writes: what came out of a file is compared all the same.
    for node in [&a, &wrong] {
        let status = in_state(node, "diverged").await;
        let reason = status["reason"].as_str().unwrap();
        assert!(
            reason.contains("digest mismatch without a majority"),
            "{reason}"
        );
        node.get("x").await.problem(503, "not-ready");
        node.set(set(2)).await.problem(503, "not-ready");
    }
    // They stay so, whatever they vote.
    let votes = a.metric(DIVERGENCES).await.unwrap();
    counted(&a, DIVERGENCES, votes + 2.0).await;
    for node in [&a, &wrong] {
        in_state(node, "diverged").await;
        assert_eq!(node.metric(RESYNCS).await, Some(0.0));
    }
    wrong.end().await;
    fs::remove_dir_all(dir.path().join("snapshots")).unwrap();
    fs::remove_file(dir.path().join("replica-id")).unwrap();
    in_state(&a, "ready").await;
    let again = in_dir(&broker, &dir).await;
    for node in [&a, &again] {
        in_state(node, "ready").await;
        node.set(set(5)).await.position();
    }
    equal(&[&a, &again]).await;
    assert_eq!(again.get("y").await.status, 404);
    // A restart replays all those votes.
    let replayed = talkative_replicas::<1>(&broker).await;
    let logged = replayed[0].stderr.lock().clone();
    assert!(!logged.contains(IN_DOUBT), "{logged}");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_that_differ_a_third_one_decides_that_reads_the_whole_log() {
    let broker = Broker::start().await;
    let [a] = talkative_replicas(&broker).await;
    for spp in 1..=3 {
        a.set(set(spp)).await.position();
    }
    let dir = wrong_snapshot(&a).await;
    let wrong = in_dir(&broker, &dir).await;
    for node in [&a, &wrong] {
        in_state(node, "diverged").await;
    }
    let [third] = talkative_replicas(&broker).await;
    wrong.metric_reaches(RESYNCS, 1.0).await;
    for node in [&a, &wrong, &third] {
        in_state(node, "ready").await;
    }
    equal(&[&a, &wrong, &third]).await;
    assert_eq!(a.metric(RESYNCS).await, Some(0.0));
}
