//! `GET /openapi.json`, held against nodes by a tester that is driven by it: schemathesis makes requests that
//! fit the document and requests that don't, and looks whether status, headers and body of each answer are
//! those that the document has.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::broker::{Broker, STREAM, status_where};
use crate::harness::{Local, Node, PASSWORD, Ports, run};
use crate::wire::Answer;

/// As tests/install.sh puts it there.
const SCHEMATHESIS: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/.tools/schemathesis/bin/schemathesis"
);
const HERE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openapi");

/// Asks a node's port for those of the document's paths that `paths` names, `examples` times each at most
/// beside the edges of each parameter; how many requests that made.
fn conforms(node: &Ports, port: SocketAddr, paths: &str, examples: usize) -> usize {
    // Where it may leave what it likes.
    let dir = tempfile::tempdir().unwrap();
    let mut tester = Command::new(SCHEMATHESIS);
    tester
        .current_dir(&dir)
        .args(["--config-file", &format!("{HERE}/schemathesis.toml")])
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
        .envs([("SCHEMATHESIS_HOOKS", "hooks"), ("PYTHONPATH", HERE)])
        .envs([("PYTHONDONTWRITEBYTECODE", "1"), ("NO_PROXY", "*")]);
    assert!(
        std::path::Path::new(SCHEMATHESIS).exists(),
        "{SCHEMATHESIS} is missing; tests/install.sh gets it"
    );
    let output = run(&mut tester);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}");
    let (_, counted) = said.split_once("Test cases:\n").unwrap();
    let (made, _) = counted.trim_start().split_once(" generated").unwrap();
    println!("{paths}: {}", counted.trim_start().lines().next().unwrap());
    made.replace(',', "").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_answers_as_its_document_says() {
    // Some requests wait for a position that never comes.
    let wait_max = Duration::from_millis(10);
    let node = Local::start(|config| config.http.position_wait_max = wait_max).await;
    for (port, paths) in [
        (node.write, "^/set$"),
        (node.read, "^/get$"),
        (node.write, "^/backup$"),
        (
            node.ops,
            "^/(livez|readyz|readyz/write|status|metrics|openapi.json|)$",
        ),
    ] {
        let made = conforms(&node, port, paths, 60);
        assert!(made > 50, "{paths}: {made} requests");
    }
    // Some of those that were to succeed did.
    assert_ne!(node.ops("/status").await.json()["records"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_may_not_answer_says_so_as_its_document_says() {
    let broker = Broker::start().await;
    let node: Node = broker.replica().await;
    broker.client().await.delete_stream(STREAM).await.unwrap();
    status_where(&node, "a gap", |status| status["state"] == "gap").await;
    for (port, paths) in [
        (node.write, "^/(set|backup)$"),
        (node.read, "^/get$"),
        (node.ops, "^/(readyz|readyz/write|status)$"),
    ] {
        let made = conforms(&node, port, paths, 10);
        assert!(made > 10, "{paths}: {made} requests");
    }
}

#[tokio::test]
async fn the_document_says_where_what_is() {
    let node = Node::start().await;
    let answer = node.ops("/openapi.json").await;
    assert_eq!(
        (answer.status, answer.header("content-type")),
        (200, "application/json")
    );
    let document = answer.json();
    assert_eq!(document["openapi"], "3.1.0");
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    for (path, port) in [
        ("/set", "8080"),
        ("/backup", "8080"),
        ("/get", "8081"),
        ("/status", "8082"),
    ] {
        let server = &document["paths"][path]["servers"][0];
        assert_eq!(server["variables"]["port"]["default"], port, "{path}");
    }
    for (path, method, security) in [
        ("/set", "post", json!([{"basic": []}])),
        ("/set", "delete", json!([{"basic": []}])),
        ("/backup", "get", json!([{"basic": []}])),
        ("/get", "get", json!(null)),
    ] {
        assert_eq!(
            document["paths"][path][method]["security"], security,
            "{path}"
        );
    }
    let request = node
        .client
        .post(format!("http://{}/openapi.json", node.ops));
    Answer::of(request.send().await.unwrap())
        .await
        .problem(405, "method-not-allowed");
}
