//! `--memory-max`: above it a replica refuses new users, and all replicas with it; updates and
//! deletes pass.

use std::fmt::Write as _;
use std::fs;
use std::ops::Range;
use std::process::Command;

use gradestore::backup::{FORMAT, Head};
use gradestore::store::Store;
use serde_json::Value;
use tempfile::tempdir;

use crate::broker::{Broker, SUBJECT, at, delete, get_at, replica_at, status_where};
use crate::disk::{Held, file_with, program_on};
use crate::harness::{ANY_PORTS, Node, PASSWORD, Ports, program, run, run_by};
use crate::lines::set_lines;
use crate::wire::{Answer, eventually, in_time};

/// What a node may take beyond what it takes with no records.
const ROOM_BYTES: u64 = 18 << 20;
/// The program accepts no smaller limit.
const MAX_BYTES_MIN: u64 = 16 << 20;
/// More than have room in [`ROOM_BYTES`].
const USERS_MAX: usize = 400_000;
/// Users in a body.
const USERS: usize = 5000;
/// Larger than the memory of any machine.
const ROWS: u64 = 1 << 50;

/// A line whose four values have no room in the record: 70 bytes of memory a user.
fn line(user: usize) -> String {
    let value = i64::MIN;
    format!(
        r#"{{"user_id":"user-{user}","postpaid_limit":{value},"spp":{value},"shipping_fee":{value},"return_fee":{value}}}"#
    )
}

fn lines(users: Range<usize>) -> String {
    let mut lines = String::new();
    for user in users {
        let _ = writeln!(lines, "{}", line(user));
    }
    lines
}

/// What this build of the program takes with no records.
async fn idle_bytes() -> u64 {
    let mut command = program();
    command.env("GRADESTORE_PASSWORD", PASSWORD).args(ANY_PORTS);
    let node = Node::start_with(at_once(&mut command)).await;
    let status = node.ops("/status").await.json();
    status["memory_used_bytes"].as_u64().unwrap()
}

fn limited(command: &mut Command, bytes: u64) -> &mut Command {
    at_once(command).env("GRADESTORE_MEMORY_MAX", bytes.to_string())
}

/// Lets the allocator return memory when it is freed and not up to ten seconds later: a node that
/// has become full then stays so.
fn at_once(command: &mut Command) -> &mut Command {
    command.env("_RJEM_MALLOC_CONF", "dirty_decay_ms:0")
}

/// Adds users until one is refused; how many there are then, and the refusal.
async fn fill(node: &Ports, mut users: usize) -> (usize, Answer) {
    for _ in 0..2 * USERS_MAX / USERS {
        let answer = set_lines(node, lines(users..users + USERS)).await;
        users += answer.json()["accepted"].as_u64().unwrap() as usize;
        // After a timeout of the log, continue with the users that were not accepted.
        if ![200, 503, 504].contains(&answer.status) {
            return (users, answer);
        }
        assert!(users < USERS_MAX, "never full");
    }
    panic!("never full, and only {users} users were accepted");
}

async fn create(node: &Ports, user: &str) -> Answer {
    node.set(format!(r#"{{"user_id":"{user}","spp":1}}"#)).await
}

fn is_full(status: &Value) -> bool {
    status["full"] == true && status["creates"] == false
}

#[tokio::test]
async fn above_its_limit_a_node_refuses_new_users_alone() {
    let max_bytes = idle_bytes().await + ROOM_BYTES;
    let dir = tempdir().unwrap();
    let node = Node::start_with(limited(&mut program_on(dir.path()), max_bytes)).await;
    assert_eq!(node.metric("gradestore_store_full").await, Some(0.0));
    let (users, refusal) = fill(&node, 0).await;

    // Whole groups were written, and nothing of the one with the line that was refused.
    let detail = refusal.problem(507, "store-full");
    assert!(detail.contains("--memory-max"), "{detail}");
    let problem = refusal.json();
    let accepted = problem["accepted"].as_u64().unwrap();
    let line = problem["line"].as_u64().unwrap();
    assert!(accepted.is_multiple_of(1000), "{accepted}");
    assert!((accepted + 1..=accepted + 1000).contains(&line), "{line}");
    let held = Held::by(&node).await;
    assert_eq!(held.records, users as u64);

    let status = status_where(&node, "full", is_full).await;
    assert_eq!(status["memory_max_bytes"], max_bytes);
    assert!(status["memory_used_bytes"].as_u64().unwrap() > max_bytes / 100 * 95);
    assert_eq!(
        (&status["state"], &status["writes"]),
        (&"ready".into(), &true.into())
    );
    assert_eq!(node.metric("gradestore_store_full").await, Some(1.0));
    assert_eq!(
        node.metric("gradestore_memory_max_bytes").await,
        Some(max_bytes as f64)
    );
    assert!(node.ops("/").await.body.contains("Rejecting new users"));
    let said = node.stderr.lock().clone();
    assert_eq!(said.matches("store full").count(), 1, "{said}");

    // One by one and by the line: a known user passes, a new one does not.
    let detail = create(&node, "new").await.problem(507, "store-full");
    assert!(detail.contains("delete users"), "{detail}");
    create(&node, "user-1").await.position();
    assert_eq!(set_lines(&node, self::lines(0..1500)).await.status, 200);
    let mixed = "\n{\"user_id\":\"user-2\",\"spp\":77}\n{\"user_id\":\"new\",\"spp\":1}\n";
    let refusal = set_lines(&node, mixed).await;
    refusal.problem(507, "store-full");
    let problem = refusal.json();
    assert_eq!(
        (&problem["line"], &problem["accepted"]),
        (&3.into(), &0.into())
    );
    assert_eq!(node.get("user-2").await.json()["spp"], i64::MIN);
    node.get("new").await.problem(404, "user-unknown");
    delete(&node, "user-3").await.position();
    node.get("user-3").await.problem(404, "user-unknown");
    let refused = r#"gradestore_http_requests_total{route="/set",status="507"}"#;
    assert_eq!(node.metric(refused).await, Some(1.0));

    // It comes back with all it had, and is full at once where that is above the limit.
    let held = Held::by(&node).await;
    node.kill();
    let less = max_bytes - (ROOM_BYTES - MAX_BYTES_MIN);
    let node = Node::start_with(limited(&mut program_on(dir.path()), less)).await;
    assert_eq!(Held::by(&node).await, held);
    status_where(&node, "full", is_full).await;
    create(&node, "new").await.problem(507, "store-full");
    create(&node, "user-1").await.position();
    // Nothing but the limit keeps it from taking new users.
    node.kill();
    let node = Node::start_with(&mut program_on(dir.path())).await;
    create(&node, "new").await.position();
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_refuse_new_users_while_a_ready_peer_is_full() {
    let max_bytes = idle_bytes().await + ROOM_BYTES;
    let broker = Broker::start().await;
    let smallest = Node::start_with(limited(&mut replica_at(broker.address), max_bytes)).await;
    let small = Node::start_with(limited(&mut replica_at(broker.address), 2 * max_bytes)).await;
    let large = broker.replica().await;
    let nodes = [&smallest, &small, &large];

    // Through the largest one: it can know only from the smallest that there is no room.
    let (users, refusal) = fill(&large, 0).await;
    let detail = refusal.problem(507, "store-full");
    let url = format!("http://{}", smallest.write);
    assert!(detail.contains(&url), "{detail}");
    for node in nodes {
        status_where(node, "no creates", |status| status["creates"] == false).await;
        create(node, "new").await.problem(507, "store-full");
        create(node, "user-1").await.position();
    }
    let [full, ..] = nodes.map(|node| async { node.ops("/status").await.json() });
    assert!(is_full(&full.await));
    let status = large.ops("/status").await.json();
    assert_eq!(status["full"], false);
    let peers = status["peers"].as_array().unwrap();
    let full: Vec<_> = peers.iter().filter(|peer| peer["full"] == true).collect();
    assert_eq!(full.len(), 1, "{peers:?}");
    assert_eq!(full[0]["url"], url);

    // Nothing is refused when it is applied: all hold the same.
    let position = create(&large, "user-2").await.position();
    let mut digests = Vec::new();
    for node in nodes {
        digests.push(at(node, position).await["digest"].clone());
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]));
    assert_eq!(at(&large, position).await["records"], users);

    // Deletes make room, on all. Nearly all users: on a busy machine many are added before the writer
    // hears that there is no room.
    let client = broker.client().await;
    for first in (0..users / 10 * 9).step_by(1000) {
        let delete = |user| format!(r#"{{"delete":"user-{user}"}}"#);
        let deletes: Vec<String> = (first..first + 1000).map(delete).collect();
        let payload = format!("[{}]", deletes.join(","));
        let published = client.publish(SUBJECT, payload.into());
        in_time("an ack", async { published.await.unwrap().await })
            .await
            .unwrap();
    }
    for (number, node) in nodes.into_iter().enumerate() {
        let new = format!("new-{number}");
        let position = eventually("a new user", async || {
            let answer = create(node, &new).await;
            (answer.status == 204).then(|| answer.position())
        })
        .await;
        assert_eq!(get_at(&smallest, &new, position).await["spp"], 1);
    }
    let status = status_where(&smallest, "not full", |status| status["full"] == false).await;
    assert!(status["memory_used_bytes"].as_u64() < status["memory_bytes"].as_u64());

    // A peer that is gone is full no more.
    fill(&small, users).await;
    status_where(&large, "no creates", |status| status["creates"] == false).await;
    create(&large, "newer").await.problem(507, "store-full");
    smallest.kill();
    eventually("a new user", async || {
        (create(&large, "newer").await.status == 204).then_some(())
    })
    .await;
}

/// A backup that says that it has more rows than any machine has memory for.
fn oversized() -> Vec<u8> {
    let head = Head {
        format: FORMAT,
        log_id: "x".into(),
        position: 5,
        time_ns: 0,
        chain: gradestore::log::Chain::default(),
        previous_chain: gradestore::log::Chain::default(),
        rows_expected: ROWS,
    };
    file_with(&Store::new(), &head)
}

fn assert_does_not_fit(command: &mut Command, path: &str, limit: &str) {
    let output = run(command);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    let last = said.lines().last().unwrap();
    let rows = ROWS.to_string();
    for wanted in [path, &rows, "memory", limit] {
        assert!(last.contains(wanted), "{wanted}: {last}");
    }
}

#[tokio::test]
async fn what_does_not_fit_into_memory_ends_the_start_with_what_it_needs() {
    let dir = tempdir().unwrap();
    let file = dir.path().join("oversized.csv.gz");
    fs::write(&file, oversized()).unwrap();
    let path = file.to_str().unwrap();
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .args(["--restore-from", path]);
    assert_does_not_fit(&mut command, path, " is ");

    let data = dir.path().join("data");
    let snapshots = data.join("snapshots");
    fs::create_dir_all(&snapshots).unwrap();
    let name = format!("grades-{:020}.csv.gz", 5);
    fs::write(snapshots.join(&name), oversized()).unwrap();
    let limit = ["prlimit", "--as=4000000000"];
    let mut command = run_by(&limit, &program_on(&data));
    assert_does_not_fit(&mut command, &name, "ulimit -v");
    // And again: nothing was quarantined.
    assert_does_not_fit(&mut command, &name, "ulimit -v");
}

#[tokio::test]
async fn a_share_is_of_the_lowest_limit_and_what_is_limited_is_counted() {
    let mut command = program();
    command.env("GRADESTORE_PASSWORD", PASSWORD);
    command.args(ANY_PORTS);
    command.arg("--memory-max=50%");
    let limit = ["prlimit", "--as=4000000000"];
    let node = Node::start_with(&mut run_by(&limit, &command)).await;
    let status = node.ops("/status").await.json();
    assert_eq!(status["memory_max_bytes"], 2_000_000_000_u64);
    let limit = node.metric("gradestore_memory_limit_bytes").await;
    assert_eq!(limit, Some(4e9));
    // Of addresses there are always more than of memory.
    let used = status["memory_used_bytes"].as_u64().unwrap();
    assert!(
        used > status["memory_bytes"].as_u64().unwrap() * 3 / 2,
        "{status}"
    );
}
