//! The contract of `POST /set` with many lines.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::tempdir;

use crate::broker::{Broker, Logged, read_stream, status_where};
use crate::disk::program_on;
use crate::harness::{AUTHORIZATION, Local, Node, Ports};
use crate::set::bad_bodies;
use crate::wire::{Answer, Raw, eventually, in_time};

const APPLIED: &str = "gradestore_patches_applied_total";

/// A patch a line, of users by their numbers.
fn lines(users: std::ops::Range<usize>) -> String {
    let mut lines = String::new();
    for user in users {
        let _ = writeln!(lines, r#"{{"user_id":"user-{user}","spp":{user}}}"#);
    }
    lines
}

/// `POST /set` with many lines, as it should be done.
pub(crate) async fn set_lines(node: &Ports, body: impl Into<reqwest::Body>) -> Answer {
    let request = node.client.post(format!("http://{}/set", node.write));
    let request = request
        .header("authorization", AUTHORIZATION)
        .header("content-type", "application/x-ndjson")
        .body(body);
    Answer::of(in_time("POST /set", request.send()).await.unwrap()).await
}

/// Checks that all of a body was written, up to `position`.
#[track_caller]
fn accepted(answer: &Answer, lines: u64, position: u64) {
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(
        answer.body,
        format!(r#"{{"accepted":{lines},"position":{position}}}"#)
    );
    assert_eq!(answer.header("grade-position"), position.to_string());
}

async fn records(node: &Ports) -> u64 {
    node.ops("/status").await.json()["records"]
        .as_u64()
        .unwrap()
}

/// A body that is sent part by part.
struct Body(Raw);

impl Body {
    async fn begin(node: &Ports) -> Self {
        let mut connection = Raw::connect(node.write).await;
        let head = format!(
            "POST /set HTTP/1.1\r\nhost: x\r\nauthorization: {AUTHORIZATION}\r\n\
             content-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n"
        );
        connection.send(head).await;
        Self(connection)
    }

    async fn send(&mut self, part: &str) {
        let chunk = format!("{:x}\r\n{part}\r\n", part.len());
        self.0.send(chunk).await;
    }

    async fn end(mut self) -> Answer {
        self.0.send("0\r\n\r\n").await;
        self.0.answer().await
    }
}

#[tokio::test]
async fn all_lines_are_written_and_read_back() {
    let node = Node::start().await;
    accepted(&set_lines(&node, lines(0..2500)).await, 2500, 3);
    for user in [0, 999, 1000, 2499] {
        let grade = node.get(&format!("user-{user}")).await.json();
        assert_eq!(grade["spp"], user);
    }
    assert_eq!(records(&node).await, 2500);
    assert_eq!(node.metric(APPLIED).await, Some(2500.0));
    // Lines of other programs; the last one without its end. Who comes later holds.
    let body = "\r\n {\"user_id\":\"a\",\"spp\":1}\r\n\n \t\n{\"user_id\":\"a\",\"spp\":2,\"return_fee\":3}";
    accepted(&set_lines(&node, body).await, 5, 4);
    let grade = node.get("a").await.json();
    assert_eq!(
        (&grade["spp"], &grade["return_fee"]),
        (&2.into(), &3.into())
    );
    // Nothing to write is no fault, and waits for nothing.
    accepted(&set_lines(&node, "").await, 0, 4);
    accepted(&set_lines(&node, "\n\r\n\n").await, 3, 4);
    set_lines(&node, "x").await.problem(422, "bad-line");
    // They are counted beside single writes, since they take as long as they are.
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
async fn lines_may_be_cut_anywhere_on_their_way() {
    let node = Node::start().await;
    let text = "{\"user_id\":\"é\",\"spp\":1}\r\n\r\n{\"user_id\":\"b\"}\n";
    let mut body = Body::begin(&node).await;
    for byte in text.as_bytes() {
        body.0
            .send([b"1\r\n", &[*byte][..], b"\r\n"].concat())
            .await;
    }
    accepted(&body.end().await, 3, 1);
    assert_eq!(node.get("é").await.json()["spp"], 1);
    assert_eq!(records(&node).await, 2);
}

#[tokio::test]
async fn a_bad_line_is_named_and_what_is_before_its_group_stays() {
    let node = Node::start().await;
    let with = |user: usize, line: &str| {
        let good = format!(r#"{{"user_id":"user-{user}","spp":{user}}}"#);
        lines(0..2500).replace(&good, line)
    };
    let bad = with(1499, r#"{"user_id":"x","spp":1.5}"#);
    let answer = set_lines(&node, bad).await;
    let detail = answer.problem(422, "bad-line");
    let problem = answer.json();
    assert_eq!(
        (&problem["line"], &problem["accepted"]),
        (&1500.into(), &1000.into())
    );
    for said in [
        "line 1500: ",
        "spp",
        "fraction",
        "1000 lines were accepted",
        "from line 1001",
    ] {
        assert!(detail.contains(said), "{said} in {detail}");
    }
    assert!(!detail.contains("line 1 "), "{detail}");
    assert_eq!(records(&node).await, 1000);
    // Going on from there does what the whole would have done.
    accepted(&set_lines(&node, lines(1000..2500)).await, 1500, 3);
    assert_eq!(records(&node).await, 2500);

    // The first group, the last one, and one that ends with the bad line.
    for (user, left) in [(0, 0), (2499, 2000), (999, 0), (1000, 1000)] {
        let node = Node::start().await;
        let answer = set_lines(&node, with(user, "x")).await;
        answer.problem(422, "bad-line");
        let problem = answer.json();
        assert_eq!(
            (&problem["line"], &problem["accepted"]),
            (&(user + 1).into(), &left.into())
        );
        assert_eq!(records(&node).await, left);
    }
}

#[tokio::test]
async fn whatever_is_no_patch_is_no_line() {
    let node = Node::start().await;
    let mut tried = 0;
    for (line, _, cause) in bad_bodies() {
        if line.is_empty() || line.contains(&b'\n') {
            continue;
        }
        tried += 1;
        let good = br#"{"user_id":"good","spp":1}"#;
        let answer = set_lines(&node, [good, &b"\n"[..], &line, b"\n", good].concat()).await;
        let detail = answer.problem(422, "bad-line");
        assert!(detail.starts_with("line 2: it "), "{detail}");
        let said = match cause {
            "not-json" => "it is not JSON",
            "body-not-utf8" => "it is not UTF-8",
            _ => "it is not a patch",
        };
        assert!(detail.contains(said), "{detail}");
        assert_eq!(answer.json()["accepted"], 0);
    }
    assert!(tried > 40, "{tried}");
    // A deletion is not a patch either.
    let answer = set_lines(&node, r#"{"delete":"good"}"#).await;
    assert!(answer.problem(422, "bad-line").contains("delete"));
    assert_eq!(node.ops("/status").await.json()["position"], 0);
}

#[tokio::test]
async fn a_line_of_64_kib_is_the_longest_and_a_group_holds_four() {
    let node = Node::start().await;
    let padded = |user: usize, bytes: usize| {
        let patch = format!(r#"{{"user_id":"user-{user}"}}"#);
        format!("{patch}{}", " ".repeat(bytes - patch.len()))
    };
    let longest: Vec<String> = (0..9).map(|user| padded(user, 64 * 1024)).collect();
    accepted(&set_lines(&node, longest.join("\n")).await, 9, 3);
    for body in [
        padded(0, 64 * 1024 + 1),
        format!("{}\n", padded(0, 64 * 1024 + 1)),
        // One that does not end.
        padded(0, 1 << 20),
    ] {
        let answer = set_lines(&node, format!("{}\n{body}", longest.join("\n"))).await;
        let detail = answer.problem(422, "bad-line");
        assert!(
            detail.contains("line 10: it has more than 65536 bytes"),
            "{detail}"
        );
        assert_eq!(answer.json()["accepted"], 8);
    }
}

#[tokio::test]
async fn a_group_is_one_batch_of_the_log() {
    let broker = Broker::start().await;
    let node = broker.replica().await;
    // Single writes all the while.
    let (bulk, single) = tokio::join!(set_lines(&node, lines(0..4500)), async {
        for spp in 0..50 {
            let patch = format!(r#"{{"user_id":"single","shipping_fee":{spp}}}"#);
            node.set(patch).await.position();
        }
    });
    let () = single;
    assert_eq!(bulk.json()["accepted"], 4500);
    let mut groups: BTreeMap<i64, Vec<usize>> = BTreeMap::new();
    for (index, batch) in read_stream(&broker.client().await).await.iter().enumerate() {
        for write in batch.iter().filter_map(Logged::set) {
            if write.user != "single" {
                groups.entry(write.value / 1000).or_default().push(index);
            }
        }
    }
    let sizes: Vec<usize> = groups.values().map(Vec::len).collect();
    assert_eq!(sizes, [1000, 1000, 1000, 1000, 500]);
    for batches in groups.values() {
        assert!(batches.iter().all(|batch| *batch == batches[0]));
    }
}

#[tokio::test]
async fn a_body_may_go_on_for_as_long_as_it_does_not_stand_still() {
    let silence_max = Duration::from_secs(2);
    let node = Local::start(|config| config.http.body_wait_max = silence_max).await;
    let (begun, mut body, mut groups) = (Instant::now(), Body::begin(&node).await, 0);
    while begun.elapsed() < 2 * silence_max {
        body.send(&lines(0..1000)).await;
        groups += 1;
        node.metric_reaches(APPLIED, groups as f64 * 1000.0).await;
    }
    body.send(&lines(0..1)).await;
    accepted(&body.end().await, groups * 1000 + 1, groups + 1);

    // One that does loses what has not made a group.
    let mut body = Body::begin(&node).await;
    body.send(&lines(0..1500)).await;
    let answer = body.0.answer().await;
    answer.problem(408, "body-slow");
    assert_eq!(answer.json()["accepted"], 1000);
    body.0.closed().await;

    let mut body = Body::begin(&node).await;
    body.send(&lines(0..1001)).await;
    body.0.send("xyz\r\n").await;
    let answer = body.0.answer().await;
    answer.problem(400, "body-broken");
    assert_eq!(answer.json()["accepted"], 1000);
}

#[tokio::test]
async fn a_broker_that_goes_away_ends_it_and_the_rest_can_follow() {
    let mut broker = Broker::start().await;
    let node = broker.replica().await;
    let mut body = Body::begin(&node).await;
    body.send(&lines(0..2000)).await;
    node.metric_reaches(APPLIED, 2000.0).await;
    broker.kill();
    status_where(&node, "read-only", |status| status["state"] == "read-only").await;
    body.send(&lines(2000..3500)).await;
    let answer = body.0.answer().await;
    let detail = answer.problem(503, "not-written");
    assert!(detail.contains("2000 lines were accepted"), "{detail}");
    assert_eq!(answer.json()["accepted"], 2000);
    assert_eq!(answer.json()["line"], Value::Null);
    broker.restart().await;
    status_where(&node, "ready", |status| status["state"] == "ready").await;
    let answer = set_lines(&node, lines(2000..3500)).await;
    // Empty batches that probe the broker may come before.
    assert_eq!(answer.json()["accepted"], 1500);
    assert!(answer.json()["position"].as_u64().unwrap() >= 4);
    assert_eq!(records(&node).await, 3500);
}

#[tokio::test]
async fn so_many_at_once_and_one_more_is_told_to_wait() {
    let node = Local::start(|config| config.writer.bulks_max = 2).await;
    let mut bodies = [Body::begin(&node).await, Body::begin(&node).await];
    for body in &mut bodies {
        body.send(&lines(0..1000)).await;
    }
    node.metric_reaches(APPLIED, 2000.0).await;
    let answer = set_lines(&node, lines(0..1)).await;
    answer.problem(503, "queue-full");
    assert_eq!(answer.json()["accepted"], 0);
    // Single writes have nothing to do with it.
    node.set(r#"{"user_id":"a"}"#).await.position();
    let [one, other] = bodies;
    assert_eq!(one.end().await.json()["accepted"], 1000);
    accepted(&set_lines(&node, lines(0..1)).await, 1, 4);
    // Who hangs up makes room, too.
    drop(other);
    eventually("two places", async || {
        let mut bodies = [Body::begin(&node).await, Body::begin(&node).await];
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
async fn a_long_body_takes_no_more_memory_than_a_short_one() {
    let node = Node::start().await;
    let line = format!("{{\"user_id\":\"a\"}}{}\n", " ".repeat(60_000));
    let mut body = Body::begin(&node).await;
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
    // 96 MB went through.
    assert!(grown < 24e6, "{grown}");
}

#[tokio::test]
async fn a_kill_leaves_whole_groups() {
    let dir = tempdir().unwrap();
    let node = Node::start_with(&mut program_on(dir.path())).await;
    let mut body = Body::begin(&node).await;
    body.send(&lines(0..3000)).await;
    node.metric_reaches(APPLIED, 3000.0).await;
    // The next ones are somewhere on their way.
    body.send(&lines(3000..9500)).await;
    node.kill();
    let node = Node::start_with(&mut program_on(dir.path())).await;
    let records = records(&node).await;
    assert!(records >= 3000 && records.is_multiple_of(1000), "{records}");
}

#[tokio::test]
async fn a_node_that_stops_says_how_far_it_came() {
    let mut node = Node::start().await;
    let mut body = Body::begin(&node).await;
    body.send(&lines(0..1000)).await;
    node.metric_reaches(APPLIED, 1000.0).await;
    node.signal(Signal::TERM);
    eventually("stopping", async || {
        (node.ops("/readyz").await.status == 503).then_some(())
    })
    .await;
    body.send(&lines(1000..2000)).await;
    let answer = body.0.answer().await;
    answer.problem(503, "not-ready");
    assert_eq!(answer.json()["accepted"], 1000);
    assert!(node.exit().await.success());
}

#[tokio::test]
async fn it_needs_the_password_and_its_name() {
    let node = Node::start().await;
    let url = format!("http://{}/set", node.write);
    let request = node
        .client
        .post(&url)
        .header("content-type", "application/x-ndjson");
    let answer = Answer::of(request.body(lines(0..2)).send().await.unwrap()).await;
    answer.problem(401, "unauthorized");
    let send = async |name: &str| {
        let request = node
            .client
            .post(&url)
            .header("authorization", AUTHORIZATION);
        let request = request.header("content-type", name).body(lines(0..2));
        Answer::of(request.send().await.unwrap()).await
    };
    for wrong in ["application/ndjson", "text/plain", "application/x-ndjson2"] {
        let detail = send(wrong).await.problem(415, "unsupported-media-type");
        for name in ["application/json", "application/x-ndjson"] {
            assert!(detail.contains(name), "{detail}");
        }
    }
    send("application/json").await.problem(400, "not-json");
    assert_eq!(records(&node).await, 0);
    for right in [
        "application/x-ndjson",
        "Application/X-NDJSON; charset=utf-8",
    ] {
        assert_eq!(send(right).await.json()["accepted"], json!(2));
    }
}
