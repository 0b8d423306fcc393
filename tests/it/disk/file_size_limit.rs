//! A limit on the size of a file, as `ulimit -f` sets it.

use tempfile::tempdir;

use crate::harness::backup_files::{Held, names_in, program_on};
use crate::harness::wire::{Answer, eventually};
use crate::harness::{Node, run_by};

pub(super) async fn set(node: &Node, value: u64) -> Answer {
    node.set(format!(r#"{{"user_id":"user {value}","spp":{value}}}"#))
        .await
}

/// Waits until a node accepts writes; what it holds after one.
pub(super) async fn assert_takes_writes(node: &Node, value: u64) -> Held {
    eventually("writes", async || {
        (node.ops("/readyz/write").await.status == 200).then_some(())
    })
    .await;
    set(node, value).await.position();
    assert_eq!(
        node.get(&format!("user {value}")).await.json()["spp"],
        value
    );
    Held::by(node).await
}

#[tokio::test]
async fn files_that_may_not_grow_are_followed_by_others() {
    let directory = tempdir().unwrap();
    let dir = directory.path();
    // A step that fails half way, and not for want of room on the disk.
    let limited = "trap '' XFSZ; exec prlimit --fsize=2621440 \"$0\" \"$@\"";
    let mut command = run_by(&["sh", "-c", limited], &program_on(dir));
    let node = Node::start_with(&mut command).await;
    for number in 0..30 {
        let line = |user| format!("{{\"user_id\":\"{user:0>250}\",\"spp\":{number}}}\n");
        let lines: String = (0..1000).map(line).collect();
        assert_eq!(node.set_lines(lines).await.status, 200);
    }
    let held = Held::by(&node).await;
    node.kill();
    let files = names_in(&dir.join("log"));
    assert!(files.len() > 2, "{files:?}");
    let node = Node::start_with(&mut program_on(dir)).await;
    assert_eq!(Held::by(&node).await, held);
    assert_takes_writes(&node, 99).await;
}
