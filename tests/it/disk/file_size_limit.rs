//! A limit on the size of files, as `ulimit -f` sets it.

use tempfile::tempdir;

use crate::harness::backup_files::{NodeState, file_names, program_with_data_dir};
use crate::harness::wire::{Response, eventually};
use crate::harness::{Node, wrapped_by};

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
