//! A limit on the size of files, as `ulimit -f` sets it.

use rustix::process::{Resource, Rlimit, prlimit};
use tempfile::tempdir;

use crate::harness::backup_files::{NodeState, file_names, program_with_data_dir};
use crate::harness::wire::{Response, eventually};
use crate::harness::{Node, run, wrapped_by};

pub(super) async fn set(node: &Node, value: u64) -> Response {
    node.set(format!(r#"{{"user_id":"user {value}","spp":{value}}}"#))
        .await
}

/// Waits until a node accepts writes; returns its state after one write.
pub(super) async fn assert_accepts_writes(node: &Node, value: u64) -> NodeState {
    eventually("writes", async || {
        (node.ops("/readyz/write").await.status == 200).then_some(())
    })
    .await;
    set(node, value).await.position();
    assert_eq!(
        node.get(&format!("user {value}")).await.json()["spp"],
        value
    );
    NodeState::of(node).await
}

#[tokio::test]
async fn a_segment_that_cannot_grow_is_followed_by_a_new_one() {
    let directory = tempdir().unwrap();
    let dir = directory.path();
    // The preallocation of a segment fails half way, with space left on the disk.
    let limited = "trap '' XFSZ; exec prlimit --fsize=2621440 \"$0\" \"$@\"";
    let mut command = wrapped_by(&["sh", "-c", limited], &program_with_data_dir(dir));
    let node = Node::start_with(&mut command).await;
    for number in 0..30 {
        let line = |user| format!("{{\"user_id\":\"{user:0>250}\",\"spp\":{number}}}\n");
        let lines: String = (0..1000).map(line).collect();
        assert_eq!(node.set_lines(lines).await.status, 200);
    }
    let held = NodeState::of(&node).await;
    node.kill();
    let files = file_names(&dir.join("log"));
    assert!(files.len() > 2, "{files:?}");
    let node = Node::start_with(&mut program_with_data_dir(dir)).await;
    assert_eq!(NodeState::of(&node).await, held);
    assert_accepts_writes(&node, 99).await;
}

/// Sets the limit of a running node. The kernel sends SIGXFSZ for each write beyond it.
fn limit_file_size(node: &Node, bytes: Option<u64>) {
    let limit = Rlimit {
        current: bytes,
        maximum: None,
    };
    prlimit(Some(node.pid()), Resource::Fsize, limit).unwrap();
}

#[tokio::test]
async fn a_write_beyond_the_limit_is_rejected_and_reads_continue() {
    let directory = tempdir().unwrap();
    let dir = directory.path();
    let node = Node::start_with(&mut program_with_data_dir(dir)).await;
    for value in 1..10 {
        set(&node, value).await.position();
    }
    limit_file_size(&node, Some(4096));
    let detail = eventually("a rejected write", async || {
        // Until the space that the log has reserved is used up.
        let lines: String = (0..1000)
            .map(|user| format!("{{\"user_id\":\"{user:0>250}\"}}\n"))
            .collect();
        let response = node.set_lines(lines).await;
        (response.status != 200).then(|| response.expect_problem(503, "not-written"))
    })
    .await;
    assert!(detail.contains("ulimit -f"), "{detail}");
    assert_eq!(node.get("user 1").await.json()["spp"], 1);
    assert_eq!(node.ops("/readyz").await.status, 200);
    limit_file_size(&node, None);
    let held = assert_accepts_writes(&node, 99).await;
    node.kill();
    let node = Node::start_with(&mut program_with_data_dir(dir)).await;
    assert_eq!(NodeState::of(&node).await, held);
}

#[tokio::test]
async fn a_node_that_cannot_create_its_log_says_why() {
    let directory = tempdir().unwrap();
    let limited = ["prlimit", "--fsize=4096"];
    let output = run(&mut wrapped_by(
        &limited,
        &program_with_data_dir(directory.path()),
    ));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let printed = String::from_utf8(output.stderr).unwrap();
    assert!(printed.contains("File too large"), "{printed}");
}
