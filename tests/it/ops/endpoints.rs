//! The ops port: probes, status, metrics and the status page.

use std::process::Command;

use serde_json::json;
use tempfile::tempdir;

use crate::harness::backup_files::program_with_data_dir;
use crate::harness::wire::{RawConnection, Response, TIMEOUT, eventually};
use crate::harness::{Node, run};

#[tokio::test]
async fn liveness_and_readiness_of_a_ready_node_return_200() {
    let node = Node::start().await;
    for path in ["/livez", "/readyz", "/readyz/write"] {
        assert_eq!(node.ops(path).await.status, 200, "{path}");
    }
    for port in [node.read, node.write] {
        let response = node.get_from(port, "/readyz").await;
        assert_eq!((response.status, &*response.body), (200, "ready\n"));
        let request = node.client.post(format!("http://{port}/readyz"));
        let response = Response::of(request.send().await.unwrap()).await;
        response.expect_problem(405, "method-not-allowed");
        let unknown = node.get_from(port, "/readyz/write").await;
        let detail = unknown.expect_problem(404, "route-unknown");
        assert!(detail.contains("GET /readyz"), "{detail}");
    }
    for path in ["/index.html", "/get?user_id=a", "/readyz/read"] {
        node.ops(path).await.expect_problem(404, "route-unknown");
    }
    for path in ["/livez", "/readyz", "/readyz/write", "/metrics", "/status"] {
        let request = node.client.post(format!("http://{}{path}", node.ops));
        let response = Response::of(request.send().await.unwrap()).await;
        response.expect_problem(405, "method-not-allowed");
        assert_eq!(response.header("allow"), "GET, HEAD");
    }
}

#[tokio::test]
async fn status_reports_the_state_of_the_node() {
    let node = Node::start().await;
    let empty = node.status().await;
    assert_eq!(empty["state"], "ready");
    assert_eq!(empty["log_kind"], "memory");
    assert_eq!(empty["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(empty["digest"], "0".repeat(32));
    for patch in [
        r#"{"user_id":"alice","spp":4}"#,
        r#"{"user_id":"alice","spp":5}"#,
    ] {
        node.set(patch).await.position();
    }
    let one = node.status().await;
    for (name, value) in [
        ("records", 1),
        ("position", 2),
        ("log_end", 2),
        ("lag", 0),
        ("queue", 0),
    ] {
        assert_eq!(one[name], value, "{name}");
    }
    // The digest of this record, which no version may change.
    assert_eq!(one["digest"], "dd6a0570c454b97f66aac1625bf5536d");
    assert_eq!(one["node"], empty["node"]);
}

#[tokio::test]
async fn status_reports_where_the_node_runs() {
    let host = run(Command::new("uname").arg("-n")).stdout;
    let host = String::from_utf8(host).unwrap().trim().to_owned();
    let directory = tempdir().unwrap();
    let node = Node::start_with(&mut program_with_data_dir(directory.path())).await;
    let status = node.status().await;
    assert_eq!(status["host"], host);
    assert_eq!(status["data_dir"], directory.path().to_str().unwrap());
    let [free, size] = ["free_bytes", "size_bytes"].map(|name| status["disk"][name].as_u64());
    assert!(free <= size && size > Some(0), "{}", status["disk"]);
    let ports = status["ports"].as_array().unwrap();
    let addresses = ports.iter().map(|port| (&port["name"], &port["address"]));
    let expected = [
        ("write", node.write),
        ("read", node.read),
        ("ops", node.ops),
    ];
    let expected = expected.map(|(name, address)| (json!(name), json!(address.to_string())));
    assert!(
        addresses.eq(expected.iter().map(|(name, address)| (name, address))),
        "{ports:?}"
    );

    let ephemeral = Node::start().await.status().await;
    assert_eq!(
        (&ephemeral["data_dir"], &ephemeral["disk"]),
        (&json!(null), &json!(null))
    );
}

#[tokio::test]
async fn status_counts_connections_and_rejected_requests() {
    let node = Node::start().await;
    let _open = [
        RawConnection::connect(node.read).await,
        RawConnection::connect(node.read).await,
    ];
    node.get("nobody").await.expect_problem(404, "user-unknown");
    node.set("{").await.expect_problem(400, "not-json");
    node.ops("/readyz/read")
        .await
        .expect_problem(404, "route-unknown");
    let status = node
        .status_where("the rejected request", |status| {
            status["traffic"]["rejected"]["client_errors"] == 1
        })
        .await;
    assert_eq!(status["traffic"]["rejected"]["server_errors"], 0);
    // One of the client that read.
    let connections = |port: usize| status["ports"][port]["connections"].as_u64();
    assert_eq!((connections(0), connections(1)), (Some(1), Some(3)));
    assert_eq!(status["ports"][1]["connections_max"], 8192);
    assert_eq!(status["ports"][1]["connections_cut"], 0);
}

/// After the requests of the next test.
const METRICS: [(&str, f64); 18] = [
    (
        r#"gradestore_http_requests_total{route="/set",status="204"}"#,
        3.0,
    ),
    (
        r#"gradestore_http_requests_total{route="/set",status="422"}"#,
        1.0,
    ),
    (
        r#"gradestore_http_requests_total{route="/get",status="200"}"#,
        1.0,
    ),
    (
        r#"gradestore_http_requests_total{route="/get",status="404"}"#,
        1.0,
    ),
    (
        r#"gradestore_http_requests_total{route="other",status="404"}"#,
        1.0,
    ),
    (
        r#"gradestore_http_request_duration_seconds_count{route="/set"}"#,
        4.0,
    ),
    (
        r#"gradestore_http_request_duration_seconds_bucket{route="/set",le="+Inf"}"#,
        4.0,
    ),
    (r#"gradestore_http_connections{port="write"}"#, 1.0),
    (
        r#"gradestore_http_connections_accepted_total{port="read"}"#,
        1.0,
    ),
    ("gradestore_http_requests_in_flight", 1.0),
    ("gradestore_records", 1.0),
    ("gradestore_log_position", 3.0),
    ("gradestore_log_end", 3.0),
    ("gradestore_patches_applied_total", 3.0),
    ("gradestore_batch_writes_count", 3.0),
    (r#"gradestore_batch_writes_bucket{le="1"}"#, 3.0),
    ("gradestore_write_queue_requests", 0.0),
    ("gradestore_ready", 1.0),
];

#[tokio::test]
async fn metrics_count_requests_and_contain_no_user_ids() {
    let node = Node::start().await;
    for spp in 0..3 {
        node.set(format!(r#"{{"user_id":"secret-user","spp":{spp}}}"#))
            .await
            .position();
    }
    node.get("secret-user").await;
    node.get("secret-nobody").await;
    node.set(r#"{"secret-field":1}"#).await;
    let odd = format!("http://{}/secret-path", node.read);
    node.client.get(odd).send().await.unwrap();

    for (name, value) in METRICS {
        assert_eq!(node.metric(name).await, Some(value), "{name}");
    }
    let response = node.ops("/metrics").await;
    assert!(
        response
            .header("content-type")
            .starts_with("text/plain; version=0.0.4")
    );
    let metrics = response.body;
    assert!(!metrics.contains("secret"), "{metrics}");
    let version = env!("CARGO_PKG_VERSION");
    for name in [
        &format!(r#"gradestore_build_info{{version="{version}"}} 1"#),
        r#"gradestore_http_request_duration_seconds_bucket{route="/get",le="0.00005"}"#,
        "process_cpu_seconds_total",
        "gradestore_memory_limit_bytes",
        "process_resident_memory_bytes",
        "process_open_fds",
        "process_start_time_seconds",
    ] {
        assert!(
            metrics.contains(&format!("\n{name}")),
            "{name} in {metrics}"
        );
    }
    let measured: Vec<&str> = metrics
        .lines()
        .filter(|line| !line.starts_with('#'))
        .collect();
    for line in metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
    {
        let name = line.split(' ').next().unwrap();
        assert!(
            measured.iter().any(|line| line.starts_with(name)),
            "{name} has no value"
        );
        assert!(
            metrics.contains(&format!("# HELP {name} ")),
            "{name} has no help"
        );
    }
}

#[tokio::test]
async fn the_snapshot_age_is_nan_before_the_first_snapshot() {
    let age = async |node: &Node| {
        let name = "gradestore_snapshot_age_seconds";
        let age = node.metric(name).await.unwrap();
        let snapshot = node.status().await["snapshot"].clone();
        assert_eq!(snapshot.is_null(), age.is_nan(), "{age}: {snapshot}");
        age
    };
    // 0 would mean that one was just written.
    assert!(age(&Node::start().await).await.is_nan());

    let directory = tempdir().unwrap();
    let mut command = program_with_data_dir(directory.path());
    let node = Node::start_with(command.arg("--snapshot-interval=1s")).await;
    assert!(age(&node).await.is_nan());
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    node.metric_reaches("gradestore_snapshot_position", 1.0)
        .await;
    let young = age(&node).await;
    assert!((0.0..TIMEOUT.as_secs_f64()).contains(&young), "{young}");
    let older = async || (age(&node).await > young).then_some(());
    eventually("a greater age", older).await;
}

#[tokio::test]
async fn the_status_page_is_small_and_self_contained() {
    let node = Node::start().await;
    let response = node.ops("/").await;
    assert_eq!(response.status, 200);
    assert_eq!(response.header("content-type"), "text/html; charset=utf-8");
    assert_eq!(response.header("cache-control"), "no-store");
    assert_eq!(response.header("x-content-type-options"), "nosniff");
    assert!(response.body.len() < 20_000, "{}", response.body.len());
    let policy = response.header("content-security-policy");
    let parts: Vec<&str> = policy.split("; ").collect();
    for part in [
        "default-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ] {
        assert!(parts.contains(&part), "{part} in {policy}");
    }
    assert!(
        !policy.contains("unsafe") && !policy.contains('*'),
        "{policy}"
    );
    for part in ["script-src 'sha256-", "style-src 'sha256-"] {
        assert!(policy.contains(part), "{part} in {policy}");
    }
    // Nothing is loaded from other origins.
    for outside in ["http://", "https://", "//cdn", "@import", "url("] {
        let namespace = "xmlns='http://www.w3.org/2000/svg'";
        let body = response.body.replace(namespace, "");
        assert!(!body.contains(outside), "{outside}");
    }
    let request = node.client.post(format!("http://{}/", node.ops));
    let response = Response::of(request.send().await.unwrap()).await;
    response.expect_problem(405, "method-not-allowed");
}
