//! What names a request, and what is logged of one that failed.

use std::collections::BTreeSet;

use http::{HeaderMap, HeaderValue};
use serde_json::Value;

use crate::broker::{Broker, replica_at, status_where};
use crate::harness::{ANY_PORTS, AUTHORIZATION, Node, PASSWORD, program, run};
use crate::wire::{Answer, eventually};

const ID: &str = "x-request-id";
const PATCH: &str = r#"{"user_id":"alice","spp":1}"#;

/// Asks a node for `what`, a method, a port and a path; the answer.
async fn ask(node: &Node, what: &str, headers: &HeaderMap) -> Answer {
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
    Answer::of(request.send().await.unwrap()).await
}

fn with(ids: &[&[u8]], authorized: bool) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for id in ids {
        headers.append(ID, HeaderValue::from_bytes(id).unwrap());
    }
    if authorized {
        headers.insert("authorization", AUTHORIZATION.parse().unwrap());
    }
    headers
}

/// What succeeds where nobody asks for a name, and all else.
const HOT: [&str; 2] = ["POST write /set", "GET read /get?user_id=alice"];
const OTHERS: [&str; 9] = [
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
async fn a_request_that_has_a_name_keeps_it_and_others_get_one_where_it_is_of_use() {
    let node = Node::start().await;
    let own = "!a~0b-4f_#1";
    for what in HOT.iter().chain(&OTHERS) {
        let answer = ask(&node, what, &with(&[own.as_bytes()], true)).await;
        assert_eq!(answer.header(ID), own, "{what}");
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
        for what in HOT {
            let answer = ask(&node, what, &with(ids, true)).await;
            assert!(
                answer.status < 300 && answer.headers.get(ID).is_none(),
                "{what}"
            );
        }
        for what in OTHERS {
            let answer = ask(&node, what, &with(ids, true)).await;
            let id = answer.header(ID);
            let hex = id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
            assert!(hex && made.insert(id.to_owned()), "{what} {ids:?}: {id}");
        }
    }
    let longest = [b'a'; 128];
    let answer = ask(&node, HOT[1], &with(&[&longest], false)).await;
    assert_eq!(answer.header(ID).as_bytes(), longest);
    let refused = ask(&node, HOT[0], &with(&[], false)).await;
    refused.problem(401, "unauthorized");
    assert!(made.insert(refused.header(ID).to_owned()));
}

/// Waits until a node has said a line with all of `parts`; the line.
async fn line(node: &Node, parts: &[&str]) -> String {
    eventually(&format!("a line with {parts:?}"), async || {
        let said = node.stderr.lock();
        let mut lines = said.lines();
        let found = lines.find(|line| parts.iter().all(|part| line.contains(part)));
        found.map(str::to_owned)
    })
    .await
}

#[tokio::test]
async fn a_request_that_failed_is_in_the_log_under_its_name() {
    let mut broker = Broker::start().await;
    let node = Node::start_with(&mut replica_at(broker.address)).await;
    broker.kill();
    status_where(&node, "read-only", |status| status["state"] == "read-only").await;

    ask(&node, HOT[0], &with(&[b"by-name"], true))
        .await
        .problem(503, "not-written");
    let said = line(&node, &["request failed", r#"request_id="by-name""#]).await;
    for part in [
        "WARN",
        r#"route="/set""#,
        "status=503",
        r#"problem="not-written""#,
        // How it learnt that the broker is away is a race.
        "detail=not written: ",
        "took_ms=",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let answer = ask(&node, HOT[0], &with(&[], false)).await;
    answer.problem(401, "unauthorized");
    line(&node, &["request failed", answer.header(ID), "status=401"]).await;

    // What is no failure of the node, or is asked to be told, is not logged.
    for (what, status) in [(OTHERS[1], 404), ("GET ops /readyz/write", 503)] {
        assert_eq!(
            ask(&node, what, &with(&[b"unlogged"], false)).await.status,
            status
        );
    }
    // Another one that is, so that they would have been.
    ask(&node, HOT[0], &with(&[b"last"], true))
        .await
        .problem(503, "not-written");
    line(&node, &[r#"request_id="last""#]).await;
    let said = node.stderr.lock();
    assert!(!said.contains("request_id=\"unlogged\""), "{said}");
    assert!(
        !said.contains("alice") && !said.contains(PASSWORD),
        "{said}"
    );
}

#[tokio::test]
async fn more_failures_than_anybody_can_read_are_counted() {
    let node = Node::start().await;
    let number = |line: &str, name: &str| {
        let (_, rest) = line.split_once(&format!("{name}=")).unwrap();
        rest.split(' ').next().unwrap().parse::<usize>().unwrap()
    };
    let mut sent = 0;
    let lines = eventually("a line that counts others", async || {
        for _ in 0..50 {
            ask(&node, HOT[0], &with(&[], false))
                .await
                .problem(401, "unauthorized");
            sent += 1;
        }
        let said = node.stderr.lock();
        let lines = said.lines().filter(|line| line.contains("request failed"));
        let lines: Vec<String> = lines.map(str::to_owned).collect();
        let counts = lines.iter().any(|line| number(line, "unlogged") > 0);
        counts.then_some(lines)
    })
    .await;
    let unlogged: usize = lines.iter().map(|line| number(line, "unlogged")).sum();
    assert!(
        unlogged > 0 && lines.len() + unlogged <= sent,
        "{unlogged} of {sent}"
    );
}

#[tokio::test]
async fn lines_are_json_where_that_is_wanted_and_as_many_as_rust_log_says() {
    let mut by_flag = program();
    by_flag.args(["--log-format", "json"]);
    let mut by_variable = program();
    by_variable.env("GRADESTORE_LOG_FORMAT", "json");
    for mut command in [by_flag, by_variable] {
        command
            .env("GRADESTORE_PASSWORD", PASSWORD)
            .env("RUST_LOG", "gradestore=debug");
        let node = Node::start_with(command.args(ANY_PORTS)).await;
        ask(&node, OTHERS[1], &with(&[b"in\"json"], false))
            .await
            .problem(404, "user-unknown");
        let said = line(&node, &["request failed", "in\\\"json"]).await;
        let failed: Value = serde_json::from_str(&said).unwrap();
        for (field, value) in [
            ("level", "DEBUG"),
            ("message", "request failed"),
            ("request_id", "in\"json"),
            ("route", "/get"),
            ("problem", "user-unknown"),
        ] {
            assert_eq!(failed[field], value, "{said}");
        }
        assert_eq!(failed["status"], 404);
        assert!(failed["took_ms"].is_u64(), "{said}");
        let said = node.stderr.lock().clone();
        for line in said.lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            for field in ["timestamp", "level", "target", "message"] {
                assert!(line[field].is_string(), "{field}: {line}");
            }
        }
        node.end().await;
    }
    let refused = run(program().args(["--log-format", "xml"]));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success());
    for part in ["--log-format", "xml", "text", "json"] {
        assert!(said.contains(part), "{said}");
    }
}
