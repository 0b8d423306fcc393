//! schemathesis runs `/openapi.json` against nodes: it sends requests that fit the document and
//! requests that violate it, and checks status, headers and body of each response.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use crate::harness::cluster::broker::{Broker, STREAM};
use crate::harness::{InProcessNode, Node, PASSWORD, Ports, run};

/// Installed by tests/install.sh.
const SCHEMATHESIS: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/.tools/schemathesis/bin/schemathesis"
);
const OPENAPI_DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openapi");

/// Tests the paths of the document that match `paths` on one port of a node, with `examples` random
/// requests for each operation at most. Returns the number of requests.
fn run_schemathesis(node: &Ports, port: SocketAddr, paths: &str, examples: usize) -> usize {
    // schemathesis writes its files here.
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(SCHEMATHESIS);
    command
        .current_dir(&dir)
        .args(["--config-file", &format!("{OPENAPI_DIR}/schemathesis.toml")])
        .args(["run", &format!("http://{}/openapi.json", node.ops)])
        .args(["--url", &format!("http://{port}")])
        .args(["--include-path-regex", paths])
        .args(["--auth", &format!("admin:{PASSWORD}")])
        .args(["--seed", "1", "--max-examples", &examples.to_string()])
        .args([
            "--generation-database",
            "none",
            "--continue-on-failure",
            "--no-color",
        ])
        .envs([("SCHEMATHESIS_HOOKS", "hooks"), ("PYTHONPATH", OPENAPI_DIR)])
        .envs([("PYTHONDONTWRITEBYTECODE", "1"), ("NO_PROXY", "*")]);
    assert!(
        std::path::Path::new(SCHEMATHESIS).exists(),
        "{SCHEMATHESIS} is missing; tests/install.sh gets it"
    );
    let output = run(&mut command);
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{printed}");
    let (_, counted) = printed.split_once("Test cases:\n").unwrap();
    let (made, _) = counted.trim_start().split_once(" generated").unwrap();
    println!("{paths}: {}", counted.trim_start().lines().next().unwrap());
    made.replace(',', "").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_of_a_ready_node_match_the_document() {
    // Some requests wait for a position that never comes.
    let wait_max = Duration::from_millis(10);
    let node = InProcessNode::start(|config| config.http.position_wait_max = wait_max).await;
    for (port, paths) in [
        (node.write, "^/set$"),
        (node.read, "^/get$"),
        (node.write, "^/backup$"),
        (
            node.ops,
            "^/(livez|readyz|readyz/write|status|metrics|openapi.json|)$",
        ),
    ] {
        let made = run_schemathesis(&node, port, paths, 60);
        assert!(made > 50, "{paths}: {made} requests");
    }
    // Some of the writes succeeded.
    assert_ne!(node.status().await["records"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_of_an_unready_node_match_the_document() {
    let broker = Broker::start().await;
    let node: Node = broker.replica().await;
    broker.client().await.delete_stream(STREAM).await.unwrap();
    node.in_state("gap").await;
    for (port, paths) in [
        (node.write, "^/(set|backup)$"),
        (node.read, "^/get$"),
        (node.ops, "^/(readyz|readyz/write|status)$"),
    ] {
        let made = run_schemathesis(&node, port, paths, 10);
        assert!(made > 10, "{paths}: {made} requests");
    }
}
