//! Request ids and the log of failed requests.

use std::collections::BTreeSet;

use http::{HeaderMap, HeaderValue};
use serde_json::Value;

use crate::harness::wire::{Response, eventually};
use crate::harness::{ANY_PORTS, AUTHORIZATION, Node, PASSWORD, program, run};

pub(crate) const ID: &str = "x-request-id";
const PATCH: &str = r#"{"user_id":"alice","spp":1}"#;

/// Sends a request, given as method, port and path.
pub(crate) async fn send(node: &Node, what: &str, headers: &HeaderMap) -> Response {
    let [method, port, path] = what.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let port = match port {
        "write" => node.write,
        "read" => node.read,
        _ => node.ops,
    };
    let url = format!("http://{port}{path}");
    let request = node.client.request(method.parse().unwrap(), url);
    let mut request = request.headers(headers.clone());
    if method == "POST" {
        request = request
            .header("content-type", "application/json")
            .body(PATCH);
    }
    Response::of(request.send().await.unwrap()).await
}

pub(crate) fn request_headers(ids: &[&[u8]], authorized: bool) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for id in ids {
        headers.append(ID, HeaderValue::from_bytes(id).unwrap());
    }
    if authorized {
        headers.insert("authorization", AUTHORIZATION.parse().unwrap());
    }
    headers
}

/// Requests that succeed without a generated request id, and others.
pub(crate) const FAST_PATH_REQUESTS: [&str; 2] = ["POST write /set", "GET read /get?user_id=alice"];
pub(crate) const OTHER_REQUESTS: [&str; 9] = [
    "GET write /backup",
    "GET read /get?user_id=nobody",
    "GET read /get",
    "GET write /set",
    "GET read /nowhere",
    "GET ops /livez",
    "GET ops /status",
    "GET ops /",
    "POST ops /status",
];

#[tokio::test]
async fn a_request_id_is_kept_or_generated_where_it_is_useful() {
    let node = Node::start().await;
    let own = "!a~0b-4f_#1";
    for what in FAST_PATH_REQUESTS.iter().chain(&OTHER_REQUESTS) {
        let response = send(&node, what, &request_headers(&[own.as_bytes()], true)).await;
        assert_eq!(response.header(ID), own, "{what}");
    }
    let mut made = BTreeSet::new();
    let long = [b'a'; 129];
    let wrong: [&[&[u8]]; 5] = [
        &[],
        &[b"two words"],
        &[&long],
        &[b"\xc3\xa9"],
        &[b"a", b"b"],
    ];
    for ids in wrong {
        for what in FAST_PATH_REQUESTS {
            let response = send(&node, what, &request_headers(ids, true)).await;
            assert!(
                response.status < 300 && response.headers.get(ID).is_none(),
                "{what}"
            );
        }
        for what in OTHER_REQUESTS {
            let response = send(&node, what, &request_headers(ids, true)).await;
            let id = response.header(ID);
            let hex = id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
            assert!(hex && made.insert(id.to_owned()), "{what} {ids:?}: {id}");
        }
    }
    let longest = [b'a'; 128];
    let response = send(
        &node,
        FAST_PATH_REQUESTS[1],
        &request_headers(&[&longest], false),
    )
    .await;
    assert_eq!(response.header(ID).as_bytes(), longest);
    let refused = send(&node, FAST_PATH_REQUESTS[0], &request_headers(&[], false)).await;
    refused.expect_problem(401, "unauthorized");
    assert!(made.insert(refused.header(ID).to_owned()));
}

/// Waits for a log line that contains all of `parts`.
pub(crate) async fn log_line(node: &Node, parts: &[&str]) -> String {
    eventually(&format!("a line with {parts:?}"), async || {
        let printed = node.stderr.lock();
        let mut lines = printed.lines();
        let found = lines.find(|log_line| parts.iter().all(|part| log_line.contains(part)));
        found.map(str::to_owned)
    })
    .await
}

#[tokio::test]
async fn failures_above_the_log_limit_are_counted() {
    let node = Node::start().await;
    let number = |log_line: &str, name: &str| {
        let (_, rest) = log_line.split_once(&format!("{name}=")).unwrap();
        rest.split(' ').next().unwrap().parse::<usize>().unwrap()
    };
    let mut sent = 0;
    let lines = eventually("a line that counts suppressed ones", async || {
        for _ in 0..50 {
            send(&node, FAST_PATH_REQUESTS[0], &request_headers(&[], false))
                .await
                .expect_problem(401, "unauthorized");
            sent += 1;
        }
        let printed = node.stderr.lock();
        let lines = printed
            .lines()
            .filter(|log_line| log_line.contains("request failed"));
        let lines: Vec<String> = lines.map(str::to_owned).collect();
        let counts = lines
            .iter()
            .any(|log_line| number(log_line, "unlogged") > 0);
        counts.then_some(lines)
    })
    .await;
    let unlogged: usize = lines
        .iter()
        .map(|log_line| number(log_line, "unlogged"))
        .sum();
    assert!(
        unlogged > 0 && lines.len() + unlogged <= sent,
        "{unlogged} of {sent}"
    );
}

#[tokio::test]
async fn the_log_format_and_level_are_configurable() {
    let mut by_flag = program();
    by_flag.args(["--log-format", "json"]);
    let mut by_variable = program();
    by_variable.env("GRADESTORE_LOG_FORMAT", "json");
    for mut command in [by_flag, by_variable] {
        command
            .env("GRADESTORE_PASSWORD", PASSWORD)
            .env("RUST_LOG", "gradestore=debug");
        let node = Node::start_with(command.args(ANY_PORTS)).await;
        send(
            &node,
            OTHER_REQUESTS[1],
            &request_headers(&[b"in\"json"], false),
        )
        .await
        .expect_problem(404, "user-unknown");
        let printed = log_line(&node, &["request failed", "in\\\"json"]).await;
        let failed: Value = serde_json::from_str(&printed).unwrap();
        for (field, value) in [
            ("level", "DEBUG"),
            ("message", "request failed"),
            ("request_id", "in\"json"),
            ("route", "/get"),
            ("problem", "user-unknown"),
        ] {
            assert_eq!(failed[field], value, "{printed}");
        }
        assert_eq!(failed["status"], 404);
        assert!(failed["took_ms"].is_u64(), "{printed}");
        let printed = node.stderr.lock().clone();
        for log_line in printed.lines() {
            let log_line: Value = serde_json::from_str(log_line).unwrap();
            for field in ["timestamp", "level", "target", "message"] {
                assert!(log_line[field].is_string(), "{field}: {log_line}");
            }
        }
        node.stop().await;
    }
    let refused = run(program().args(["--log-format", "xml"]));
    let printed = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success());
    for part in ["--log-format", "xml", "text", "json"] {
        assert!(printed.contains(part), "{printed}");
    }
}
