//! Replicas on one broker are one store.

use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::net::TcpListener;

use crate::broker::{Broker, Load, at, check, get_at, position, replica_at, replica_with};
use crate::harness::{ANY_PORTS, Node, PASSWORD, Ports, Process, collected, program, run};
use crate::proxy::{Proxy, Rules};
use crate::wire::eventually;
use crate::{harness, stall};

/// A writer's; nine of them send 100,000 and some.
const WRITES: usize = 11_112;

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_race_for_the_same_fields_end_equal() {
    let broker = Broker::start().await;
    let [a, b, c] = broker.replicas().await;
    let load = Load::start(&[&a, &b, &c], 50, WRITES);
    let answered = load.done().await;
    assert_eq!(answered.len(), 9 * WRITES);
    check(&broker.client().await, &[&a, &b, &c], &answered).await;
    // One that comes late reads the whole log.
    let late = broker.replica().await;
    check(&broker.client().await, &[&a, &late], &answered).await;
}

#[tokio::test]
async fn a_write_is_read_on_every_replica_at_its_position() {
    let broker = Broker::start().await;
    let [a, b, c] = broker.replicas().await;
    for spp in 1..=20 {
        let answer = a.set(format!(r#"{{"user_id":"x","spp":{spp}}}"#)).await;
        for node in [&b, &c] {
            assert_eq!(get_at(node, "x", answer.position()).await["spp"], spp);
        }
    }
}

#[tokio::test]
async fn the_logs_order_decides_and_not_who_hears_of_it_first() {
    let broker = Broker::start().await;
    let proxy = Proxy::to(broker.address).await;
    let a = Node::start_with(&mut replica_at(proxy.address)).await;
    let b = broker.replica().await;
    let hold = Rules {
        hold_batches: true,
        ..Rules::default()
    };

    let started = position(&b).await;
    at(&a, started).await;

    // The other's comes first in the log; to A the broker's word on its own does.
    proxy.set(hold);
    let first = b.set(r#"{"user_id":"x","spp":1}"#).await.position();
    assert_eq!(first, started + 1);
    let mut own = stall::waiting_set(&a, r#"{"user_id":"x","spp":2}"#).await;
    at(&b, started + 2).await;
    a.get("x").await.problem(404, "user-unknown");
    proxy.set(Rules::default());
    assert_eq!(own.answer().await.position(), started + 2);

    // Its own comes first in the log, and A hears of both late.
    proxy.set(hold);
    let mut own = stall::waiting_set(&a, r#"{"user_id":"x","spp":3}"#).await;
    at(&b, started + 3).await;
    let last = b.set(r#"{"user_id":"x","spp":4}"#).await.position();
    assert_eq!(last, started + 4);
    assert_eq!(a.get("x").await.json()["spp"], 2);
    proxy.set(Rules::default());
    assert_eq!(own.answer().await.position(), started + 3);
    assert_eq!(get_at(&a, "x", last).await["spp"], 4);
    check(&broker.client().await, &[&a, &b], &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_hung_for_half_a_minute_catches_up() {
    let broker = Broker::start().await;
    let [a, b, c] = broker.replicas().await;
    let load = Load::start(&[&a, &c], 5, usize::MAX);
    b.signal(Signal::STOP);
    // The fault itself: long enough that whoever waits for the replica gives up on it.
    tokio::time::sleep(Duration::from_secs(30)).await;
    b.signal(Signal::CONT);
    let behind = b.ops("/status").await.json();
    assert!(behind["position"].as_u64() < a.ops("/status").await.json()["position"].as_u64());
    let answered = load.stop().await;
    check(&broker.client().await, &[&a, &b, &c], &answered).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_was_stopped_catches_up() {
    let broker = Broker::start().await;
    let [a, b] = broker.replicas().await;
    let load = Load::start(&[&a], 5, usize::MAX);
    b.signal(Signal::STOP);
    // More than the broker is asked for at once.
    eventually("1,500 batches", async || {
        (a.metric("gradestore_log_position").await? > 1500.0).then_some(())
    })
    .await;
    b.signal(Signal::CONT);
    let answered = load.stop().await;
    check(&broker.client().await, &[&a, &b], &answered).await;
}

#[tokio::test]
async fn a_replica_goes_on_from_its_snapshot() {
    let broker = Broker::start().await;
    let dir = tempfile::tempdir().unwrap();
    let with_dir = || {
        let mut command = replica_at(broker.address);
        command.env("GRADESTORE_EPHEMERAL", "false");
        command.arg("--data-dir").arg(dir.path());
        command
    };
    let mut a = Node::start_with(&mut with_dir()).await;
    let b = broker.replica().await;
    a.set(r#"{"user_id":"x","spp":1}"#).await.position();
    a.signal(Signal::TERM);
    assert!(a.exit().await.success());
    let last = b.set(r#"{"user_id":"x","return_fee":2}"#).await.position();
    let a = Node::start_with(&mut with_dir()).await;
    let status = at(&a, last + 1).await;
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
    let last = position(&a).await;
    let mut backup = program();
    backup.args(["backup", "--from", &format!("http://{}", a.write), "-o"]);
    let backup = backup
        .arg(&file)
        .env("GRADESTORE_PASSWORD", harness::PASSWORD);
    assert!(run(backup).status.success());
    let mut seeded = replica_at(second.address);
    seeded.env("GRADESTORE_EPHEMERAL", "false");
    seeded.arg("--data-dir").arg(dir.path().join("seeded"));
    let b = Node::start_with(seeded.arg("--restore-from").arg(&file)).await;
    assert_eq!(b.get("x").await.json()["spp"], 3);
    assert_eq!(b.set(r#"{"user_id":"y"}"#).await.position(), last + 2);

    let mut again = replica_at(second.address);
    let output = run(again.arg("--restore-from").arg(&file));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(said.contains("refusing to restore: stream"), "{said}");
}

#[tokio::test]
async fn the_broker_may_want_a_name_and_a_password() {
    let broker = Broker::start_with(&["--user", "u", "--pass", "p w"]).await;
    let url = |user: &str| format!("nats://{user}@{}", broker.address);
    let mut output = replica_with(&url("u:wrong"));
    let output = run(&mut output);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(said.contains("rejects this replica"), "{said}");
    assert!(!said.contains("wrong"), "{said}");
    let dir = tempfile::tempdir().unwrap();
    let mut command = replica_with(&url("u:p%20w"));
    command.env("GRADESTORE_EPHEMERAL", "false");
    let a = Node::start_with(command.arg("--data-dir").arg(dir.path())).await;
    a.set(r#"{"user_id":"x"}"#).await.position();
}

#[tokio::test]
async fn a_replica_that_waits_for_its_broker_is_alive_and_can_be_stopped() {
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ops = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ops_addr = ops.local_addr().unwrap();
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .args(["--nats-url", &nobody.local_addr().unwrap().to_string()])
        .args(["--write-addr", "127.0.0.1:0", "--read-addr", "127.0.0.1:0"])
        .args(["--ops-addr", &ops_addr.to_string()]);
    drop((nobody, ops));
    let mut process = Process(command.stderr(Stdio::piped()).spawn().unwrap());
    let said = collected(process.0.stderr.take().unwrap());
    eventually("waiting", async || {
        said.lock().contains("waiting for NATS").then_some(())
    })
    .await;
    let node = Ports::new(ops_addr, ops_addr, ops_addr);
    assert_eq!(node.ops("/livez").await.status, 200);
    for path in ["/readyz", "/readyz/write", "/status"] {
        let why = node.ops(path).await.problem(503, "not-ready");
        assert!(why.contains("starting"), "{why}");
    }
    kill_process(Pid::from_child(&process.0), Signal::TERM).unwrap();
    let exit = eventually("the end", async || process.0.try_wait().unwrap()).await;
    assert!(exit.success());
}

#[test]
fn replicas_need_a_password_and_a_broker_flag_needs_a_broker() {
    let said = |arguments: &[&str]| {
        let output = run(program().args(ANY_PORTS).args(arguments));
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let alone = said(&["--nats-url", "127.0.0.1:1"]);
    assert!(alone.contains("--nats-url needs a password"), "{alone}");
    for flag in [
        ["--stream", "X"],
        ["--replicas", "3"],
        ["--log-retention", "1h"],
    ] {
        let alone = said(&flag);
        assert!(alone.contains("--nats-url"), "{alone}");
    }
    for flag in [
        ["--stream", "a.b"],
        ["--replicas", "6"],
        ["--log-retention", "1s"],
    ] {
        let wrong = said(&flag);
        assert!(
            wrong.contains(flag[0]) && wrong.contains("GRADESTORE_"),
            "{wrong}"
        );
    }
}
