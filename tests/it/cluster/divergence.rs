//! Replicas vote on the digest of their state. A replica that a majority contradicts becomes
//! unready and bootstraps again. Without a majority an operator decides.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use gradestore::backup::Snapshots;
use gradestore::grade::{Changes, Patch, Write};
use gradestore::log::Position;
use gradestore::sys::exec::Blocking;
use tempfile::TempDir;

use crate::harness::backup_files::{fetch_backup, file_names, read_backup};
use crate::harness::cluster::broker::{Broker, Load, replica_at};
use crate::harness::wire::eventually;
use crate::harness::{Node, Ports};

const COMPARED: &str = "gradestore_checkpoints_compared_total";
const DIVERGENCES: &str = "gradestore_divergences_total";
const RESYNCS: &str = "gradestore_resyncs_total";
/// Logged by a replica that becomes unready because of votes.
pub(crate) const IN_DOUBT: &str = "the state may be wrong";

/// A replica that votes every 200 ms.
pub(crate) fn replica_with_frequent_votes(broker: &Broker) -> Command {
    let mut command = replica_at(broker.address);
    command.env("GRADESTORE_CHECKPOINT_INTERVAL", "200ms");
    command
}

pub(crate) async fn replicas_with_frequent_votes<const N: usize>(broker: &Broker) -> [Node; N] {
    let mut commands: Vec<_> = (0..N)
        .map(|_| replica_with_frequent_votes(broker))
        .collect();
    let nodes = futures_util::future::join_all(commands.iter_mut().map(Node::start_with)).await;
    nodes.try_into().ok().unwrap()
}

/// Waits until a counter has at least this value.
async fn wait_for_count(node: &Ports, counter: &str, at_least: f64) {
    eventually(counter, async || {
        node.metric(counter)
            .await
            .filter(|wait_for_count| *wait_for_count >= at_least)
    })
    .await;
}

/// Waits until all nodes have the same digest at the same position.
async fn wait_until_equal(nodes: &[&Ports]) {
    eventually("equal digests at one position", async || {
        let mut seen = BTreeSet::new();
        for node in nodes {
            let status = node.status().await;
            seen.insert(format!("{} {}", status["position"], status["digest"]));
        }
        (seen.len() == 1).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_replicas_agree_under_load() {
    let broker = Broker::start().await;
    let [a, b, c] = replicas_with_frequent_votes(&broker).await;
    let load = Load::start(&[&a, &b, &c], 20, usize::MAX);
    for node in [&a, &b, &c] {
        wait_for_count(node, COMPARED, 10.0).await;
    }
    load.stop().await;
    wait_until_equal(&[&a, &b, &c]).await;
    for node in [&a, &b, &c] {
        assert_eq!(node.metric(DIVERGENCES).await, Some(0.0));
    }
}

/// A data directory with a snapshot of the state of `node`, with one grade changed.
async fn diverged_snapshot(node: &Ports) -> TempDir {
    let (store, summary) = read_backup(&fetch_backup(node).await);
    let (head, end) = summary.records.unwrap();
    let mut changes = Changes::default();
    changes.set(1, 666);
    store.apply_all(&[Write::Set(Patch {
        user_id: "y",
        changes,
    })]);
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::open(&dir.path().join("snapshots")).unwrap();
    let end = Position {
        seq: end.position,
        chain: end.chain,
        ..head.position()
    };
    let pool = Blocking::threads();
    let written = snapshots.write(&store, head, || Ok(end), &pool);
    written.await.unwrap();
    dir
}

/// A replica with this data directory.
pub(crate) async fn start_with_dir(broker: &Broker, dir: &TempDir) -> Node {
    let mut command = replica_with_frequent_votes(broker);
    command.env("GRADESTORE_EPHEMERAL", "false");
    command.arg("--data-dir").arg(dir.path());
    Node::start_with(&mut command).await
}

fn set(spp: u64) -> String {
    format!(r#"{{"user_id":"x","spp":{spp}}}"#)
}

/// `N` equal replicas, and one that starts from a diverged snapshot in the directory.
async fn with_diverged_replica<const N: usize>() -> (Broker, [Node; N], Node, TempDir) {
    let broker = Broker::start().await;
    let replicas = replicas_with_frequent_votes::<N>(&broker).await;
    for spp in 1..=3 {
        replicas[0].set(set(spp)).await.position();
    }
    let dir = diverged_snapshot(&replicas[0]).await;
    let diverged = start_with_dir(&broker, &dir).await;
    (broker, replicas, diverged, dir)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_diverged_replica_of_three_bootstraps_again() {
    let (_broker, [a, b], diverged, dir) = with_diverged_replica().await;
    // Writes continue, also through the diverged replica.
    let load = Load::start(&[&a, &b, &diverged], 5, usize::MAX);
    diverged.metric_reaches(RESYNCS, 1.0).await;
    for node in [&a, &b, &diverged] {
        node.in_state("ready").await;
    }
    load.stop().await;
    let written = diverged.set(set(9)).await.position();
    for node in [&a, &b, &diverged] {
        assert_eq!(node.get_at("x", written).await["spp"], 9);
        assert!(node.metric(DIVERGENCES).await.unwrap() >= 1.0);
    }
    // The majority stayed ready.
    for node in [&a, &b] {
        assert_eq!(node.metric(RESYNCS).await, Some(0.0));
        let logged = node.stderr.lock().clone();
        assert!(
            logged.contains("digest mismatch with a replica"),
            "{logged}"
        );
        assert!(!logged.contains(IN_DOUBT), "{logged}");
    }
    wait_until_equal(&[&a, &b, &diverged]).await;
    // The old snapshots are quarantined.
    let names = file_names(&dir.path().join("snapshots"));
    assert!(
        names.iter().any(|name| name.ends_with(".diverged")),
        "{names:?}"
    );
    // And not reported.
    let snapshot = async |what| {
        diverged
            .metric(&format!("gradestore_snapshot_{what}"))
            .await
    };
    assert_eq!(snapshot("position").await, Some(0.0));
    assert!(snapshot("age_seconds").await.unwrap().is_nan());
}

/// The runbook: docs/operations/alerts.md, GradestoreDivergence.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_diverged_replicas_the_operator_removes_one() {
    let (broker, [a], diverged, dir) = with_diverged_replica().await;
    // Without any write: a state loaded from a file is compared too.
    for node in [&a, &diverged] {
        let status = node.in_state("diverged").await;
        let reason = status["reason"].as_str().unwrap();
        assert!(
            reason.contains("digest mismatch without a majority"),
            "{reason}"
        );
        node.get("x").await.expect_problem(503, "not-ready");
        node.set(set(2)).await.expect_problem(503, "not-ready");
    }
    // Further votes change nothing.
    let votes = a.metric(DIVERGENCES).await.unwrap();
    wait_for_count(&a, DIVERGENCES, votes + 2.0).await;
    for node in [&a, &diverged] {
        node.in_state("diverged").await;
        assert_eq!(node.metric(RESYNCS).await, Some(0.0));
    }
    diverged.stop().await;
    fs::remove_dir_all(dir.path().join("snapshots")).unwrap();
    fs::remove_file(dir.path().join("replica-id")).unwrap();
    a.in_state("ready").await;
    let again = start_with_dir(&broker, &dir).await;
    for node in [&a, &again] {
        node.in_state("ready").await;
        node.set(set(5)).await.position();
    }
    wait_until_equal(&[&a, &again]).await;
    assert_eq!(again.get("y").await.status, 404);
    // A restarted replica replays all those votes.
    let replayed = replicas_with_frequent_votes::<1>(&broker).await;
    let logged = replayed[0].stderr.lock().clone();
    assert!(!logged.contains(IN_DOUBT), "{logged}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_third_replica_that_reads_the_whole_log_decides_between_two() {
    let (broker, [a], diverged, _dir) = with_diverged_replica().await;
    for node in [&a, &diverged] {
        node.in_state("diverged").await;
    }
    let [third] = replicas_with_frequent_votes(&broker).await;
    diverged.metric_reaches(RESYNCS, 1.0).await;
    for node in [&a, &diverged, &third] {
        node.in_state("ready").await;
    }
    wait_until_equal(&[&a, &diverged, &third]).await;
    assert_eq!(a.metric(RESYNCS).await, Some(0.0));
}
