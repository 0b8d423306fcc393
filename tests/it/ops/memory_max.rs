//! `--memory-max`: a node above it rejects new users; updates and deletes are accepted.

use std::fmt::Write as _;
use std::fs;
use std::ops::Range;
use std::process::Command;

use gradestore::backup::{FORMAT, HeadRecord};
use gradestore::store::Store;
use serde_json::Value;
use tempfile::tempdir;

use crate::harness::backup_files::{NodeState, backup_file_with_head, program_with_data_dir};
use crate::harness::wire::Response;
use crate::harness::{ANY_PORTS, Node, PASSWORD, Ports, program, run, wrapped_by};

/// What a node may use beyond its memory without records.
pub(crate) const HEADROOM_BYTES: u64 = 18 << 20;
/// The smallest limit that the program accepts.
const MAX_BYTES_MIN: u64 = 16 << 20;
/// Many times the users that fit into [`HEADROOM_BYTES`]: a replica learns of a full peer within
/// seconds, in which a fast machine adds hundreds of thousands.
const USERS_MAX: usize = 4_000_000;
/// Users of one request.
pub(crate) const USERS: usize = 5000;
/// Larger than the memory of any machine.
const ROWS: u64 = 1 << 50;

/// A line with values that are too large to be packed: 70 bytes of memory a user.
fn line(user: usize) -> String {
    let value = i64::MIN;
    format!(
        r#"{{"user_id":"user-{user}","postpaid_limit":{value},"spp":{value},"shipping_fee":{value},"return_fee":{value}}}"#
    )
}

pub(crate) fn lines(users: Range<usize>) -> String {
    let mut lines = String::new();
    for user in users {
        let _ = writeln!(lines, "{}", line(user));
    }
    lines
}

/// The memory of this build without records.
pub(crate) async fn idle_bytes() -> u64 {
    let mut command = program();
    command.env("GRADESTORE_PASSWORD", PASSWORD).args(ANY_PORTS);
    let node = Node::start_with(with_immediate_decay(&mut command)).await;
    let status = node.status().await;
    status["memory_used_bytes"].as_u64().unwrap()
}

pub(crate) fn limited(command: &mut Command, bytes: u64) -> &mut Command {
    with_immediate_decay(command).env("GRADESTORE_MEMORY_MAX", bytes.to_string())
}

/// Lets the allocator return memory immediately instead of within ten seconds, so that a full node
/// stays full.
fn with_immediate_decay(command: &mut Command) -> &mut Command {
    command.env("_RJEM_MALLOC_CONF", "dirty_decay_ms:0")
}

/// Adds users until one is rejected; returns their number and the response.
pub(crate) async fn fill(node: &Ports, mut users: usize) -> (usize, Response) {
    for _ in 0..2 * USERS_MAX / USERS {
        let response = node.set_lines(lines(users..users + USERS)).await;
        users += response.json()["accepted"].as_u64().unwrap() as usize;
        // After a timeout of the log, continue with the users that were not accepted.
        if ![200, 503, 504].contains(&response.status) {
            return (users, response);
        }
        assert!(users < USERS_MAX, "the node was never full");
    }
    panic!("the node was never full; {users} users were accepted");
}

pub(crate) async fn create(node: &Ports, user: &str) -> Response {
    node.set(format!(r#"{{"user_id":"{user}","spp":1}}"#)).await
}

pub(crate) fn is_full(status: &Value) -> bool {
    status["full"] == true && status["creates"] == false
}

#[tokio::test]
async fn a_full_node_rejects_only_new_users() {
    let max_bytes = idle_bytes().await + HEADROOM_BYTES;
    let dir = tempdir().unwrap();
    let node = Node::start_with(limited(&mut program_with_data_dir(dir.path()), max_bytes)).await;
    assert_eq!(node.metric("gradestore_store_full").await, Some(0.0));
    let (users, refusal) = fill(&node, 0).await;

    // Complete groups were accepted, and nothing of the group with the rejected line.
    let detail = refusal.expect_problem(507, "store-full");
    assert!(detail.contains("--memory-max"), "{detail}");
    let problem = refusal.json();
    let accepted = problem["accepted"].as_u64().unwrap();
    let line = problem["line"].as_u64().unwrap();
    assert!(accepted.is_multiple_of(1000), "{accepted}");
    assert!((accepted + 1..=accepted + 1000).contains(&line), "{line}");
    let held = NodeState::of(&node).await;
    assert_eq!(held.records, users as u64);

    let status = node.status_where("full", is_full).await;
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
    let printed = node.stderr.lock().clone();
    assert_eq!(printed.matches("store full").count(), 1, "{printed}");

    // Single and bulk writes: a known user is accepted, a new one is not.
    let detail = create(&node, "new").await.expect_problem(507, "store-full");
    assert!(detail.contains("delete users"), "{detail}");
    create(&node, "user-1").await.position();
    assert_eq!(node.set_lines(self::lines(0..1500)).await.status, 200);
    let mixed = "\n{\"user_id\":\"user-2\",\"spp\":77}\n{\"user_id\":\"new\",\"spp\":1}\n";
    let refusal = node.set_lines(mixed).await;
    refusal.expect_problem(507, "store-full");
    let problem = refusal.json();
    assert_eq!(
        (&problem["line"], &problem["accepted"]),
        (&3.into(), &0.into())
    );
    assert_eq!(node.get("user-2").await.json()["spp"], i64::MIN);
    node.get("new").await.expect_problem(404, "user-unknown");
    node.delete("user-3").await.position();
    node.get("user-3").await.expect_problem(404, "user-unknown");
    let refused = r#"gradestore_http_requests_total{route="/set",status="507"}"#;
    assert_eq!(node.metric(refused).await, Some(1.0));

    // After a restart it has the same state, and is full immediately with a lower limit.
    let held = NodeState::of(&node).await;
    node.kill();
    let less = max_bytes - (HEADROOM_BYTES - MAX_BYTES_MIN);
    let node = Node::start_with(limited(&mut program_with_data_dir(dir.path()), less)).await;
    assert_eq!(NodeState::of(&node).await, held);
    node.status_where("full", is_full).await;
    create(&node, "new").await.expect_problem(507, "store-full");
    create(&node, "user-1").await.position();
    // Without the limit it accepts new users.
    node.kill();
    let node = Node::start_with(&mut program_with_data_dir(dir.path())).await;
    create(&node, "new").await.position();
}

/// A backup that claims more rows than fit into the memory of any machine.
fn oversized() -> Vec<u8> {
    let head = HeadRecord {
        format: FORMAT,
        created_ns: 1_700_000_000_000_000_000,
        log_id: "x".into(),
        position: 5,
        time_ns: 0,
        chain: gradestore::log::Chain::default(),
        previous_chain: gradestore::log::Chain::default(),
        rows_expected: ROWS,
        shard_seed: None,
    };
    backup_file_with_head(&Store::new(), &head)
}

fn assert_does_not_fit(command: &mut Command, path: &str, limit: &str) {
    let output = run(command);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let printed = String::from_utf8(output.stderr).unwrap();
    let last = printed.lines().last().unwrap();
    let rows = ROWS.to_string();
    for expected in [path, &rows, "memory", limit] {
        assert!(last.contains(expected), "{expected}: {last}");
    }
}

#[tokio::test]
async fn a_restore_that_does_not_fit_into_memory_stops_the_start() {
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
    let mut command = wrapped_by(&limit, &program_with_data_dir(&data));
    assert_does_not_fit(&mut command, &name, "ulimit -v");
    // Again, because nothing was quarantined.
    assert_does_not_fit(&mut command, &name, "ulimit -v");
}

#[tokio::test]
async fn a_percentage_applies_to_the_lowest_limit() {
    let mut command = program();
    command.env("GRADESTORE_PASSWORD", PASSWORD);
    command.args(ANY_PORTS);
    command.arg("--memory-max=50%");
    let limit = ["prlimit", "--as=4000000000"];
    let node = Node::start_with(&mut wrapped_by(&limit, &command)).await;
    let status = node.status().await;
    assert_eq!(status["memory_max_bytes"], 2_000_000_000_u64);
    let limit = node.metric("gradestore_memory_limit_bytes").await;
    assert_eq!(limit, Some(4e9));
    // Address space in use is always more than resident memory.
    let used = status["memory_used_bytes"].as_u64().unwrap();
    assert!(
        used > status["memory_bytes"].as_u64().unwrap() * 3 / 2,
        "{status}"
    );
}
