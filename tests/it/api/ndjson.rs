//! `POST /set` with newline-delimited JSON.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use tempfile::tempdir;

use crate::api::set::bad_bodies;
use crate::harness::backup_files::program_with_data_dir;
use crate::harness::wire::{RawConnection, Response, eventually};
use crate::harness::{AUTHORIZATION, InProcessNode, Node, Ports};

const APPLIED: &str = "gradestore_patches_applied_total";

/// One patch a line, for these user numbers.
pub(crate) fn lines(users: std::ops::Range<usize>) -> String {
    let mut lines = String::new();
    for user in users {
        let _ = writeln!(lines, r#"{{"user_id":"user-{user}","spp":{user}}}"#);
    }
    lines
}

/// Checks that all lines were accepted, with `position` as the last position.
#[track_caller]
fn assert_accepted(response: &Response, lines: u64, position: u64) {
    assert_eq!(response.status, 200, "{}", response.body);
    assert_eq!(response.header("content-type"), "application/json");
    assert_eq!(
        response.body,
        format!(r#"{{"accepted":{lines},"position":{position}}}"#)
    );
    assert_eq!(response.header("grade-position"), position.to_string());
}

pub(crate) async fn record_count(node: &Ports) -> u64 {
    node.status().await["records"].as_u64().unwrap()
}

/// A chunked body that a test sends in parts.
pub(crate) struct NdjsonBody(pub(crate) RawConnection);

impl NdjsonBody {
    pub(crate) async fn begin(node: &Ports) -> Self {
        let mut connection = RawConnection::connect(node.write).await;
        let head = format!(
            "POST /set HTTP/1.1\r\nhost: localhost\r\nauthorization: {AUTHORIZATION}\r\n\
             content-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n"
        );
        connection.send(head).await;
        Self(connection)
    }

    pub(crate) async fn send(&mut self, part: &str) {
        let chunk = format!("{:x}\r\n{part}\r\n", part.len());
        self.0.send(chunk).await;
    }

    pub(crate) async fn end(mut self) -> Response {
        self.0.send("0\r\n\r\n").await;
        self.0.response().await
    }
}

#[tokio::test]
async fn all_lines_are_written_and_readable() {
    let node = Node::start().await;
    assert_accepted(&node.set_lines(lines(0..2500)).await, 2500, 3);
    for user in [0, 999, 1000, 2499] {
        let grade = node.get(&format!("user-{user}")).await.json();
        assert_eq!(grade["spp"], user);
    }
    assert_eq!(record_count(&node).await, 2500);
    assert_eq!(node.metric(APPLIED).await, Some(2500.0));
    // CRLF, empty lines and no newline at the end. The later of two patches wins.
    let body = "\r\n {\"user_id\":\"a\",\"spp\":1}\r\n\n \t\n{\"user_id\":\"a\",\"spp\":2,\"return_fee\":3}";
    assert_accepted(&node.set_lines(body).await, 5, 4);
    let grade = node.get("a").await.json();
    assert_eq!(
        (&grade["spp"], &grade["return_fee"]),
        (&2.into(), &3.into())
    );
    // An empty body succeeds without a batch.
    assert_accepted(&node.set_lines("").await, 0, 4);
    assert_accepted(&node.set_lines("\n\r\n\n").await, 3, 4);
    node.set_lines("x").await.expect_problem(422, "bad-line");
    // Counted apart from single writes, because their durations are not comparable.
    node.set(r#"{"user_id":"a"}"#).await.position();
    for (name, value) in [
        (r#"requests_total{route="/set lines",status="200"}"#, 4.0),
        (r#"requests_total{route="/set lines",status="422"}"#, 1.0),
        (r#"requests_total{route="/set",status="204"}"#, 1.0),
        (r#"request_duration_seconds_count{route="/set"}"#, 1.0),
    ] {
        let name = format!("gradestore_http_{name}");
        assert_eq!(node.metric(&name).await, Some(value), "{name}");
    }
}

#[tokio::test]
async fn lines_may_be_split_at_any_byte() {
    let node = Node::start().await;
    let text = "{\"user_id\":\"é\",\"spp\":1}\r\n\r\n{\"user_id\":\"b\"}\n";
    let mut body = NdjsonBody::begin(&node).await;
    for byte in text.as_bytes() {
        body.0
            .send([b"1\r\n", &[*byte][..], b"\r\n"].concat())
            .await;
    }
    assert_accepted(&body.end().await, 3, 1);
    assert_eq!(node.get("é").await.json()["spp"], 1);
    assert_eq!(record_count(&node).await, 2);
}

#[tokio::test]
async fn a_bad_line_is_named_and_groups_before_it_stay() {
    let node = Node::start().await;
    let with = |user: usize, line: &str| {
        let good = format!(r#"{{"user_id":"user-{user}","spp":{user}}}"#);
        lines(0..2500).replace(&good, line)
    };
    let bad = with(1499, r#"{"user_id":"x","spp":1.5}"#);
    let response = node.set_lines(bad).await;
    let detail = response.expect_problem(422, "bad-line");
    let problem = response.json();
    assert_eq!(
        (&problem["line"], &problem["accepted"]),
        (&1500.into(), &1000.into())
    );
    for printed in [
        "line 1500: ",
        "spp",
        "fraction",
        "1000 lines were accepted",
        "from line 1001",
    ] {
        assert!(detail.contains(printed), "{printed} in {detail}");
    }
    assert!(!detail.contains("line 1 "), "{detail}");
    assert_eq!(record_count(&node).await, 1000);
    // Resuming from there gives the same result as one complete body.
    assert_accepted(&node.set_lines(lines(1000..2500)).await, 1500, 3);
    assert_eq!(record_count(&node).await, 2500);

    // The bad line in the first group, in the last, at the end of a group, and at the start of one.
    for (user, left) in [(0, 0), (2499, 2000), (999, 0), (1000, 1000)] {
        let node = Node::start().await;
        let response = node.set_lines(with(user, "x")).await;
        response.expect_problem(422, "bad-line");
        let problem = response.json();
        assert_eq!(
            (&problem["line"], &problem["accepted"]),
            (&(user + 1).into(), &left.into())
        );
        assert_eq!(record_count(&node).await, left);
    }
}

#[tokio::test]
async fn every_invalid_patch_is_a_bad_line() {
    let node = Node::start().await;
    let mut tried = 0;
    for (line, _, cause) in bad_bodies() {
        if line.is_empty() || line.contains(&b'\n') {
            continue;
        }
        tried += 1;
        let good = br#"{"user_id":"good","spp":1}"#;
        let response = node
            .set_lines([good, &b"\n"[..], &line, b"\n", good].concat())
            .await;
        let detail = response.expect_problem(422, "bad-line");
        assert!(detail.starts_with("line 2: it "), "{detail}");
        let printed = match cause {
            "not-json" => "it is not JSON",
            "body-not-utf8" => "it is not UTF-8",
            _ => "it is not a patch",
        };
        assert!(detail.contains(printed), "{detail}");
        assert_eq!(response.json()["accepted"], 0);
    }
    assert!(tried > 40, "{tried}");
    // A deletion is not a patch.
    let response = node.set_lines(r#"{"delete":"good"}"#).await;
    assert!(response.expect_problem(422, "bad-line").contains("delete"));
    assert_eq!(node.status().await["position"], 0);
}

#[tokio::test]
async fn the_largest_line_has_64_kib_and_a_group_holds_four_of_them() {
    let node = Node::start().await;
    let padded = |user: usize, bytes: usize| {
        let patch = format!(r#"{{"user_id":"user-{user}"}}"#);
        format!("{patch}{}", " ".repeat(bytes - patch.len()))
    };
    let longest: Vec<String> = (0..9).map(|user| padded(user, 64 * 1024)).collect();
    assert_accepted(&node.set_lines(longest.join("\n")).await, 9, 3);
    for body in [
        padded(0, 64 * 1024 + 1),
        format!("{}\n", padded(0, 64 * 1024 + 1)),
        // A line without an end.
        padded(0, 1 << 20),
    ] {
        let response = node
            .set_lines(format!("{}\n{body}", longest.join("\n")))
            .await;
        let detail = response.expect_problem(422, "bad-line");
        assert!(
            detail.contains("line 10: it has more than 65536 bytes"),
            "{detail}"
        );
        assert_eq!(response.json()["accepted"], 8);
    }
}

#[tokio::test]
async fn a_body_may_take_any_time_while_it_makes_progress() {
    let silence_max = Duration::from_secs(2);
    let node = InProcessNode::start(|config| config.http.body_wait_max = silence_max).await;
    let (started_at, mut body, mut groups) = (Instant::now(), NdjsonBody::begin(&node).await, 0);
    while started_at.elapsed() < 2 * silence_max {
        body.send(&lines(0..1000)).await;
        groups += 1;
        node.metric_reaches(APPLIED, groups as f64 * 1000.0).await;
    }
    body.send(&lines(0..1)).await;
    assert_accepted(&body.end().await, groups * 1000 + 1, groups + 1);

    // A stalled body loses only the incomplete group.
    let mut body = NdjsonBody::begin(&node).await;
    body.send(&lines(0..1500)).await;
    let response = body.0.response().await;
    response.expect_problem(408, "body-slow");
    assert_eq!(response.json()["accepted"], 1000);
    body.0.expect_closed().await;

    let mut body = NdjsonBody::begin(&node).await;
    body.send(&lines(0..1001)).await;
    body.0.send("xyz\r\n").await;
    let response = body.0.response().await;
    response.expect_problem(400, "body-broken");
    assert_eq!(response.json()["accepted"], 1000);
}

#[tokio::test]
async fn bulk_writes_beyond_the_limit_are_rejected() {
    let node = InProcessNode::start(|config| config.writer.bulks_max = 2).await;
    let mut bodies = [
        NdjsonBody::begin(&node).await,
        NdjsonBody::begin(&node).await,
    ];
    for body in &mut bodies {
        body.send(&lines(0..1000)).await;
    }
    node.metric_reaches(APPLIED, 2000.0).await;
    let response = node.set_lines(lines(0..1)).await;
    response.expect_problem(503, "queue-full");
    assert_eq!(response.json()["accepted"], 0);
    // The limit does not apply to single writes.
    node.set(r#"{"user_id":"a"}"#).await.position();
    let [one, other] = bodies;
    assert_eq!(one.end().await.json()["accepted"], 1000);
    assert_accepted(&node.set_lines(lines(0..1)).await, 1, 4);
    // A client that disconnects frees its place.
    drop(other);
    eventually("two places", async || {
        let mut bodies = [
            NdjsonBody::begin(&node).await,
            NdjsonBody::begin(&node).await,
        ];
        for body in &mut bodies {
            body.send(&lines(0..1)).await;
        }
        let [one, other] = bodies;
        let (one, other) = tokio::join!(one.end(), other.end());
        (one.status == 200 && other.status == 200).then_some(())
    })
    .await;
}

#[tokio::test]
async fn memory_does_not_grow_with_the_length_of_a_body() {
    let node = Node::start().await;
    let line = format!("{{\"user_id\":\"a\"}}{}\n", " ".repeat(60_000));
    let mut body = NdjsonBody::begin(&node).await;
    let name = "process_resident_memory_bytes";
    let mut before = 0.0;
    for count in 0..1600 {
        body.send(&line).await;
        if count == 100 {
            before = node.metric(name).await.unwrap();
        }
    }
    let grown = node.metric(name).await.unwrap() - before;
    assert_eq!(body.end().await.json()["accepted"], 1600);
    // 96 MB were sent.
    assert!(grown < 24e6, "{grown}");
}

#[tokio::test]
async fn a_kill_leaves_only_complete_groups() {
    let dir = tempdir().unwrap();
    let node = Node::start_with(&mut program_with_data_dir(dir.path())).await;
    let mut body = NdjsonBody::begin(&node).await;
    body.send(&lines(0..3000)).await;
    node.metric_reaches(APPLIED, 3000.0).await;
    // The node may have received any part of these.
    body.send(&lines(3000..9500)).await;
    node.kill();
    let node = Node::start_with(&mut program_with_data_dir(dir.path())).await;
    let record_count = record_count(&node).await;
    assert!(
        record_count >= 3000 && record_count.is_multiple_of(1000),
        "{record_count}"
    );
}

#[tokio::test]
async fn a_stopping_node_reports_how_many_lines_it_accepted() {
    let mut node = Node::start().await;
    let mut body = NdjsonBody::begin(&node).await;
    body.send(&lines(0..1000)).await;
    node.metric_reaches(APPLIED, 1000.0).await;
    node.signal(Signal::TERM);
    eventually("stopping", async || {
        (node.ops("/readyz").await.status == 503).then_some(())
    })
    .await;
    body.send(&lines(1000..2000)).await;
    let response = body.0.response().await;
    response.expect_problem(503, "not-ready");
    assert_eq!(response.json()["accepted"], 1000);
    assert!(node.wait_for_exit().await.success());
}

#[tokio::test]
async fn bulk_writes_need_the_password_and_the_media_type() {
    let node = Node::start().await;
    let url = format!("http://{}/set", node.write);
    let request = node
        .client
        .post(&url)
        .header("content-type", "application/x-ndjson");
    let response = Response::of(request.body(lines(0..2)).send().await.unwrap()).await;
    response.expect_problem(401, "unauthorized");
    let send = async |name: &str| {
        let request = node
            .client
            .post(&url)
            .header("authorization", AUTHORIZATION);
        let request = request.header("content-type", name).body(lines(0..2));
        Response::of(request.send().await.unwrap()).await
    };
    for wrong in ["application/ndjson", "text/plain", "application/x-ndjson2"] {
        let detail = send(wrong)
            .await
            .expect_problem(415, "unsupported-media-type");
        for name in ["application/json", "application/x-ndjson"] {
            assert!(detail.contains(name), "{detail}");
        }
    }
    send("application/json")
        .await
        .expect_problem(400, "not-json");
    assert_eq!(record_count(&node).await, 0);
    for right in [
        "application/x-ndjson",
        "Application/X-NDJSON; charset=utf-8",
    ] {
        assert_eq!(send(right).await.json()["accepted"], json!(2));
    }
}
