//! Which replica creates the stream, and what a start waits for.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use gradestore::backup::{FORMAT, HeadRecord};
use gradestore::log::Chain;
use parking_lot::Mutex;
use tempfile::tempdir;

use crate::harness::backup_files::{
    NodeState, backup_file_with_head, program_with_data_dir, random_store,
};
use crate::harness::cluster::broker::{Broker, STREAM, copy_tree};
use crate::harness::cluster::nats::NatsCluster;
use crate::harness::wire::eventually;
use crate::harness::{
    Node, PASSWORD, Process, ReservedPort, collect_output, program, run, without_root_capabilities,
};

/// The command that starts a replica on `broker` with its data in `dir`.
pub(crate) fn replica_with_data(broker: &Broker, dir: &Path) -> Command {
    let mut command = program_with_data_dir(dir);
    command.args(["--nats-url", &broker.address.to_string()]);
    command
}

/// A replica that has not opened its log yet.
pub(crate) struct Starting {
    _process: Process,
    logged: Arc<Mutex<String>>,
}

impl Starting {
    fn spawn(mut command: Command) -> Self {
        let command = command.stdin(Stdio::null()).stdout(Stdio::null());
        let mut process = Process(command.stderr(Stdio::piped()).spawn().unwrap());
        let logged = collect_output(process.0.stderr.take().unwrap());
        Self {
            _process: process,
            logged,
        }
    }

    /// Waits for a log line that contains all parts.
    pub(crate) async fn logs(&self, parts: &[&str]) {
        eventually(&format!("{parts:?}"), async || {
            let logged = self.logged.lock();
            let has_all = |line: &str| parts.iter().all(|part| line.contains(part));
            logged.lines().any(has_all).then_some(())
        })
        .await;
    }
}

/// A replica that creates the stream only together with another one.
pub(crate) fn replica_expecting_two(broker: &Broker, dir: &Path) -> Starting {
    let mut command = replica_with_data(broker, dir);
    command.args(["--expect-peers", "2"]);
    Starting::spawn(command)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_snapshot_counts_as_data() {
    let broker = Broker::start_with(&[]).await;
    let client = broker.client().await;
    let head = |format| HeadRecord {
        format,
        created_ns: 1_700_000_000_000_000_000,
        log_id: "lost".into(),
        position: 7,
        time_ns: 1_700_000_000_000_000_000,
        chain: Chain::default(),
        previous_chain: Chain::default(),
        rows_expected: 10,
        shard_seed: None,
    };
    let backup_file = |format| backup_file_with_head(&random_store(10, 50), &head(format));
    let mut damaged = backup_file(FORMAT);
    damaged[12..60].fill(0);
    for (file, mode, why) in [
        (damaged, 0o600, "it names no log"),
        (backup_file(FORMAT + 1), 0o600, "use a newer gradestore"),
        (
            backup_file(FORMAT)[..20].to_vec(),
            0o600,
            "truncated at byte 20",
        ),
        (Vec::new(), 0o600, "truncated at byte 0"),
        (backup_file(FORMAT), 0o000, "Permission denied"),
    ] {
        let (holder, empty) = (tempdir().unwrap(), tempdir().unwrap());
        let snapshots = holder.path().join("snapshots");
        fs::create_dir(&snapshots).unwrap();
        let snapshot = snapshots.join("grades-00000000000000000007.csv.gz");
        fs::write(&snapshot, file).unwrap();
        fs::set_permissions(&snapshot, Permissions::from_mode(mode)).unwrap();

        let command = replica_with_data(&broker, holder.path());
        let holder = Starting::spawn(without_root_capabilities(&command));
        let name = snapshot.to_str().unwrap();
        let fix = "move the file out of the data directory";
        holder.logs(&[name, why, fix]).await;
        // Another replica does not create the stream either.
        let empty = Starting::spawn(replica_with_data(&broker, empty.path()));
        empty.logs(&["holds data of log unknown"]).await;
        client.get_stream(STREAM).await.unwrap_err();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copied_data_directory_is_rejected_while_the_original_is_in_use() {
    let broker = Broker::start_with(&[]).await;
    let root = tempdir().unwrap();
    let [original, copy] = ["original", "copy"].map(|name| root.path().join(name));
    Node::start_with(&mut replica_with_data(&broker, &original))
        .await
        .stop()
        .await;
    fs::create_dir(&copy).unwrap();
    copy_tree(&original, &copy);

    let node = Node::start_with(&mut replica_with_data(&broker, &original)).await;
    let output = run(&mut replica_with_data(&broker, &copy));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let printed = String::from_utf8(output.stderr).unwrap();
    let replica = fs::read_to_string(original.join("replica-id")).unwrap();
    for part in [
        replica.trim(),
        &format!("http://{}", node.write),
        "remove the file replica-id",
    ] {
        assert!(printed.contains(part), "{printed}");
    }
    node.set(r#"{"user_id":"x","spp":1}"#).await.position();

    // The fix that the message names; and a replica whose process is gone may restart immediately.
    fs::remove_file(copy.join("replica-id")).unwrap();
    let copy = Node::start_with(&mut replica_with_data(&broker, &copy)).await;
    node.kill();
    let node = Node::start_with(&mut replica_with_data(&broker, &original)).await;
    assert_eq!(NodeState::of(&node).await, NodeState::of(&copy).await);
}

/// A start gives up 30 s after the last response about the stream, not after its own beginning.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_waits_for_replicas_survives_a_restart_of_the_server() {
    let mut broker = Broker::start_with(&[]).await;
    let dir = tempdir().unwrap();
    let a = replica_expecting_two(&broker, &dir.path().join("a"));
    a.logs(&["1 of 2 replicas (--expect-peers)"]).await;

    // One server of three is left. This start gives up, so the other one has lasted as long.
    let mut cluster = NatsCluster::start().await;
    cluster.kill(1);
    cluster.kill(2);
    let mut command = cluster.replica_at("c", &cluster.servers[0].url());
    let output = tokio::task::spawn_blocking(move || run(&mut command));
    let output = output.await.unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let printed = String::from_utf8(output.stderr).unwrap();
    let error = printed.lines().last().unwrap();
    for part in [
        "JetStream has no leader",
        "temporarily unavailable",
        "a majority is connected",
    ] {
        assert!(error.contains(part), "{printed}");
    }

    broker.kill();
    a.logs(&["waiting for NATS at"]).await;
    broker.restart().await;
    let b = replica_expecting_two(&broker, &dir.path().join("b"));
    for replica in [&a, &b] {
        replica.logs(&["listening"]).await;
    }
}

/// All replicas have the same list of peers, with other URLs than they announce.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_announces_another_url_does_not_block_creation() {
    let broker = Broker::start_with(&[]).await;
    let dir = tempdir().unwrap();
    let ports = [ReservedPort::new(), ReservedPort::new()];
    let peers = ports.each_ref().map(|port| {
        let port = port.address().port();
        format!("http://localhost:{port}")
    });
    let replica = |index: usize| {
        let mut command = program();
        command.env_remove("GRADESTORE_EPHEMERAL");
        command.env("GRADESTORE_PASSWORD", PASSWORD);
        command.args(["--nats-url", &broker.address.to_string()]);
        command.args(["--write-addr", &ports[index].address().to_string()]);
        command.args(["--read-addr", "127.0.0.1:0", "--ops-addr", "127.0.0.1:0"]);
        command.args(["--expect-peers", "2", "--data-dir"]);
        command.arg(dir.path().join(index.to_string()));
        for peer in &peers {
            command.args(["--peer", peer]);
        }
        Starting::spawn(command)
    };
    let a = replica(0);
    a.logs(&["waiting for --peer", &peers[1], "onnection refused"])
        .await;
    let client = broker.client().await;
    client.get_stream(STREAM).await.unwrap_err();
    let b = replica(1);
    for replica in [&a, &b] {
        replica.logs(&["listening"]).await;
    }
}
