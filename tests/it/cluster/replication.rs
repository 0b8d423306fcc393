//! Replicas on one stream hold the same state.

use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::harness;
use crate::harness::cluster::broker::{
    Broker, Load, check, replica_at, replica_with, replica_with_data,
};
use crate::harness::cluster::proxy::{Proxy, Rules};
use crate::harness::wire::eventually;
use crate::harness::{Node, PASSWORD, Ports, Process, ReservedPort, collect_output, program, run};

/// Per writer; nine writers send 100,008.
const WRITES: usize = 11_112;

#[tokio::test(flavor = "multi_thread")]
async fn replicas_with_conflicting_writes_end_with_the_same_state() {
    let broker = Broker::start().await;
    let [a, b, c] = broker.replicas().await;
    let load = Load::start(&[&a, &b, &c], 50, WRITES);
    let answered = load.done().await;
    assert_eq!(answered.len(), 9 * WRITES);
    check(&broker.client().await, &[&a, &b, &c], &answered).await;
    // A new replica reads the whole log.
    let late = broker.replica().await;
    check(&broker.client().await, &[&a, &late], &answered).await;
}

#[tokio::test]
async fn a_write_is_readable_on_every_replica_at_its_position() {
    let broker = Broker::start().await;
    let [a, b, c] = broker.replicas().await;
    for spp in 1..=20 {
        let response = a.set(format!(r#"{{"user_id":"x","spp":{spp}}}"#)).await;
        for node in [&b, &c] {
            assert_eq!(node.get_at("x", response.position()).await["spp"], spp);
        }
    }
}

#[tokio::test]
async fn the_order_of_the_log_decides_between_concurrent_writes() {
    let broker = Broker::start().await;
    let proxy = Proxy::to(broker.address).await;
    let a = Node::start_with(&mut replica_at(proxy.address)).await;
    let b = broker.replica().await;
    let hold = Rules {
        hold_batches: true,
        ..Rules::default()
    };

    let started = b.applied_position().await;
    a.ready_at(started).await;

    // The other replica's write is first in the log; A gets the acknowledgement of its own first.
    proxy.set(hold);
    let first = b.set(r#"{"user_id":"x","spp":1}"#).await.position();
    assert_eq!(first, started + 1);
    let mut own = harness::pending_set(&a, r#"{"user_id":"x","spp":2}"#).await;
    b.ready_at(started + 2).await;
    a.get("x").await.expect_problem(404, "user-unknown");
    proxy.set(Rules::default());
    assert_eq!(own.response().await.position(), started + 2);

    // A's own write is first in the log, and A receives both late.
    proxy.set(hold);
    let mut own = harness::pending_set(&a, r#"{"user_id":"x","spp":3}"#).await;
    b.ready_at(started + 3).await;
    let last = b.set(r#"{"user_id":"x","spp":4}"#).await.position();
    assert_eq!(last, started + 4);
    assert_eq!(a.get("x").await.json()["spp"], 2);
    proxy.set(Rules::default());
    assert_eq!(own.response().await.position(), started + 3);
    assert_eq!(a.get_at("x", last).await["spp"], 4);
    check(&broker.client().await, &[&a, &b], &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_frozen_for_30_s_catches_up() {
    let broker = Broker::start().await;
    let [a, b, c] = broker.replicas().await;
    let load = Load::start(&[&a, &c], 5, usize::MAX);
    b.signal(Signal::STOP);
    // Longer than all timeouts that concern the replica.
    tokio::time::sleep(Duration::from_secs(30)).await;
    b.signal(Signal::CONT);
    let behind = b.status().await;
    assert!(behind["position"].as_u64() < a.status().await["position"].as_u64());
    let answered = load.stop().await;
    check(&broker.client().await, &[&a, &b, &c], &answered).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_frozen_for_many_batches_catches_up() {
    let broker = Broker::start().await;
    let [a, b] = broker.replicas().await;
    let load = Load::start(&[&a], 5, usize::MAX);
    b.signal(Signal::STOP);
    // More than one request to the consumer returns.
    eventually("1,500 batches", async || {
        (a.metric("gradestore_log_position").await? > 1500.0).then_some(())
    })
    .await;
    b.signal(Signal::CONT);
    let answered = load.stop().await;
    check(&broker.client().await, &[&a, &b], &answered).await;
}

#[tokio::test]
async fn a_restarted_replica_continues_from_its_snapshot() {
    let broker = Broker::start().await;
    let dir = tempfile::tempdir().unwrap();
    let with_dir = || replica_with_data(broker.address, dir.path());
    let mut a = Node::start_with(&mut with_dir()).await;
    let b = broker.replica().await;
    a.set(r#"{"user_id":"x","spp":1}"#).await.position();
    a.signal(Signal::TERM);
    assert!(a.wait_for_exit().await.success());
    let last = b.set(r#"{"user_id":"x","return_fee":2}"#).await.position();
    let a = Node::start_with(&mut with_dir()).await;
    let status = a.ready_at(last + 1).await;
    assert_eq!(status["restore"]["rows"], 1);
    check(&broker.client().await, &[&a, &b], &[]).await;
}

#[tokio::test]
async fn a_backup_seeds_a_new_stream_at_its_position() {
    let (first, second) = (Broker::start().await, Broker::start_with(&[]).await);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("grades.csv.gz");
    let a = first.replica().await;
    for spp in 1..=3 {
        let patch = format!(r#"{{"user_id":"x","spp":{spp}}}"#);
        a.set(patch).await.position();
    }
    let last = a.applied_position().await;
    let mut backup = program();
    backup.args(["backup", "--from", &format!("http://{}", a.write), "-o"]);
    let backup = backup
        .arg(&file)
        .env("GRADESTORE_PASSWORD", harness::PASSWORD);
    assert!(run(backup).status.success());
    let mut seeded = replica_with_data(second.address, &dir.path().join("seeded"));
    let b = Node::start_with(seeded.arg("--restore-from").arg(&file)).await;
    assert_eq!(b.get("x").await.json()["spp"], 3);
    assert_eq!(b.set(r#"{"user_id":"y"}"#).await.position(), last + 2);

    let mut again = replica_at(second.address);
    let output = run(again.arg("--restore-from").arg(&file));
    let printed = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(printed.contains("refusing to restore: stream"), "{printed}");
}

#[tokio::test]
async fn nats_credentials_in_the_url_are_used() {
    let broker = Broker::start_with(&["--user", "u", "--pass", "p w"]).await;
    let url = |user: &str| format!("nats://{user}@{}", broker.address);
    let mut output = replica_with(&url("u:wrong"));
    let output = run(&mut output);
    let printed = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(printed.contains("rejects this replica"), "{printed}");
    assert!(!printed.contains("wrong"), "{printed}");
    let dir = tempfile::tempdir().unwrap();
    let mut command = replica_with_data(url("u:p%20w"), dir.path());
    let a = Node::start_with(&mut command).await;
    a.set(r#"{"user_id":"x"}"#).await.position();
}

#[tokio::test]
async fn a_replica_waiting_for_nats_is_alive_and_can_be_stopped() {
    let (nobody, ops) = (ReservedPort::new(), ReservedPort::new());
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .args(["--nats-url", &nobody.address().to_string()])
        .args(["--write-addr", "127.0.0.1:0", "--read-addr", "127.0.0.1:0"])
        .args(["--ops-addr", &ops.address().to_string()]);
    let mut process = Process(command.stderr(Stdio::piped()).spawn().unwrap());
    let printed = collect_output(process.0.stderr.take().unwrap());
    eventually("waiting", async || {
        printed.lock().contains("waiting for NATS").then_some(())
    })
    .await;
    let node = Ports::new(ops.address(), ops.address(), ops.address());
    assert_eq!(node.ops("/livez").await.status, 200);
    for path in ["/readyz", "/readyz/write", "/status"] {
        let why = node.ops(path).await.expect_problem(503, "not-ready");
        assert!(why.contains("starting"), "{why}");
    }
    kill_process(Pid::from_child(&process.0), Signal::TERM).unwrap();
    let exit = eventually("the end", async || process.0.try_wait().unwrap()).await;
    assert!(exit.success());
}
