//! What is answered past hyper can't be told from what hyper answers.

use std::fmt::Write as _;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

use crate::harness::{
    ANY_PORTS, AUTHORIZATION, Node, PASSWORD, get_request, program, set_request_of,
};
use crate::wire::{Raw, eventually, in_time};

/// A header line that makes a request hyper's.
const HYPERS: &str = "x-other: 1\r\n";
const READS: &str = r#"gradestore_http_requests_total{route="/get",status="200"}"#;

const WRITES: &str = r#"gradestore_http_requests_total{route="/set",status="204"}"#;

/// All bytes of the one answer to `request`, and of those only the date is left out.
async fn bytes_of(port: SocketAddr, request: &str) -> String {
    let mut connection = Raw::connect(port).await;
    connection.send(request).await;
    connection.send_no_more().await;
    let answer = String::from_utf8(connection.rest().await).unwrap();
    let (before, date) = answer.split_once("date: ").unwrap();
    let (date, after) = date.split_once("\r\n").unwrap();
    // Of the form that RFC 9110 wants, and of these days.
    let date = httpdate::parse_http_date(date).expect(date);
    assert!(date.elapsed().unwrap().as_secs() < 60);
    format!("{before}date: ?\r\n{after}")
}

#[tokio::test]
async fn answers_are_those_of_hyper_byte_for_byte() {
    let node = Node::start().await;
    let most = "m".repeat(256);
    for user in ["a", "A-z.0_9~:@", &most] {
        let patch = serde_json::json!({ "user_id": user, "spp": -7, "return_fee": i64::MAX });
        node.set(patch.to_string()).await.position();
        let query = format!("?user_id={user}");
        let plain = bytes_of(node.read, &get_request(&query, "")).await;
        let hypers = bytes_of(node.read, &get_request(&query, HYPERS)).await;
        assert_eq!(plain, hypers);
        assert!(plain.contains(user) && plain.contains("9223372036854775807"));
    }
    assert_eq!(node.metric(READS).await, Some(6.0));
}

#[tokio::test]
async fn what_is_said_of_writes_is_what_hyper_says_byte_for_byte() {
    let node = Node::start().await;
    let body = r#"{"user_id":"a","spp":1}"#;
    let plain = bytes_of(node.write, &set_request_of(body)).await;
    let with_another_line =
        set_request_of(body).replace("host: x\r\n", &format!("host: x\r\n{HYPERS}"));
    let hypers = bytes_of(node.write, &with_another_line).await;
    assert_eq!(plain.replace("position: 1", "position: 2"), hypers);
    assert_eq!(node.metric(WRITES).await, Some(2.0));
    let in_flight = "gradestore_http_requests_in_flight";
    // What asks for it is one.
    assert_eq!(node.metric(in_flight).await, Some(1.0));
}

#[tokio::test]
async fn writes_of_both_kinds_are_done_in_their_order() {
    let node = Node::start().await;
    let set = |spp: u32| set_request_of(&format!(r#"{{"user_id":"a","spp":{spp}}}"#));
    let requests = [
        (set(1), 204),
        (set(2), 204),
        (
            set(3).replace("application/json", "application/json; charset=utf-8"),
            204,
        ),
        (set(4), 204),
        (set(5).replace(AUTHORIZATION, "Basic eDp5"), 401),
        (set(6).replace("spp", "sqq"), 422),
        (set(7).replace("application/json", "text/plain"), 415),
        (set(8).replace("POST /set", "DELETE /set?user_id=b"), 204),
        (set(9).replace("host: x", "connection: close"), 204),
    ];
    for first in 0..requests.len() {
        let mut connection = Raw::connect(node.write).await;
        let bytes: String = requests[first..]
            .iter()
            .map(|(bytes, _)| &**bytes)
            .collect();
        connection.send(bytes).await;
        let mut before = 0;
        for (request, status) in &requests[first..] {
            let answer = connection.answer().await;
            assert_eq!(answer.status, *status, "{request}: {}", answer.body);
            if *status == 204 {
                assert!(answer.position() > before, "{request}");
                before = answer.position();
            }
        }
        connection.closed().await;
        assert_eq!(node.get("a").await.json()["spp"], 9);
    }
}

#[tokio::test]
async fn requests_of_both_kinds_are_answered_in_their_order() {
    let node = Node::start().await;
    for (user, spp) in [("a", 1), ("b c", 2)] {
        let patch = serde_json::json!({ "user_id": user, "spp": spp });
        node.set(patch.to_string()).await.position();
    }
    let requests = [
        (get_request("?user_id=a", ""), 200, r#""spp":1"#),
        (
            get_request("?user_id=a", "accept: */*\r\n"),
            200,
            r#""spp":1"#,
        ),
        (get_request("?user_id=b+c", ""), 200, r#""spp":2"#),
        (get_request("?user_id=a", ""), 200, r#""spp":1"#),
        (get_request("?user_id=nobody", ""), 404, "user-unknown"),
        (get_request("?user_id=", ""), 400, "user-id-invalid"),
        (get_request("?user_id=a", ""), 200, r#""spp":1"#),
        (
            "PUT /get HTTP/1.1\r\n\r\n".to_owned(),
            405,
            "method-not-allowed",
        ),
        (
            get_request("?user_id=a", "connection: close\r\n"),
            200,
            r#""spp":1"#,
        ),
    ];
    // At once, from each of them on: so each is the first that comes to a new connection.
    for first in 0..requests.len() {
        let mut connection = Raw::connect(node.read).await;
        let bytes: String = requests[first..]
            .iter()
            .map(|(bytes, ..)| &**bytes)
            .collect();
        connection.send(bytes).await;
        for (request, status, part) in &requests[first..] {
            let answer = connection.answer().await;
            assert_eq!(answer.status, *status, "{request}: {}", answer.body);
            assert!(answer.body.contains(part), "{request}: {}", answer.body);
        }
        connection.closed().await;
    }
}

#[tokio::test]
async fn a_request_in_two_parts_is_answered_wherever_it_is_cut() {
    let node = Node::start().await;
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    let write = set_request_of(r#"{"user_id":"a","spp":1}"#);
    for cut in 1..write.len() {
        let mut connection = Raw::connect(node.write).await;
        let before = node.metric(WRITES).await.unwrap();
        let (begin, end) = write.split_at(cut);
        connection.send(format!("{write}{begin}")).await;
        let first = connection.answer().await.position();
        connection.send(end).await;
        assert_eq!(connection.answer().await.position(), first + 1, "{cut}");
        let more = node.metric(WRITES).await.unwrap() - before;
        assert!((more - 2.0).abs() < 0.5, "{cut}: {more}");
    }
    let request = get_request("?user_id=a", "");
    for cut in 1..request.len() {
        let mut connection = Raw::connect(node.read).await;
        let before = node.metric(READS).await;
        // The first one's answer says that the second one's beginning has come as well.
        let (begin, end) = request.split_at(cut);
        connection.send(format!("{request}{begin}")).await;
        assert!(connection.answer().await.body.contains(r#""spp":1"#));
        connection.send(end).await;
        assert!(
            connection.answer().await.body.contains(r#""spp":1"#),
            "{cut}"
        );
        let more = node.metric(READS).await.unwrap() - before.unwrap_or_default();
        assert!((more - 2.0).abs() < 0.5, "{cut}: {more}");
    }
}

#[tokio::test]
async fn who_does_not_read_gets_all_answers_later() {
    const REQUESTS: usize = 60_000;
    let node = Node::start().await;
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    let mut bytes = get_request("?user_id=a", "").repeat(REQUESTS - 1);
    // What hyper answers comes behind all that was not yet sent.
    let _ = write!(
        bytes,
        "{}",
        get_request("?user_id=nobody", "connection: close\r\n")
    );

    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let stream = in_time("connect", socket.connect(node.read)).await.unwrap();
    let (mut incoming, mut outgoing) = stream.into_split();
    let sending = tokio::spawn(async move { outgoing.write_all(bytes.as_bytes()).await });
    // Until the node can send no more, and so reads no more.
    let mut before = None;
    eventually("the node waits for its client", async || {
        let now = node.metric(READS).await;
        let stands = now.is_some() && now == before;
        before = now;
        stands.then_some(())
    })
    .await;
    let mut received = Vec::new();
    let all = incoming.read_to_end(&mut received);
    in_time("all answers", all).await.unwrap();
    in_time("all requests", sending).await.unwrap().unwrap();
    let received = String::from_utf8(received).unwrap();
    let answers: Vec<_> = received.split("HTTP/1.1 ").skip(1).collect();
    assert_eq!(answers.len(), REQUESTS);
    let (last, others) = answers.split_last().unwrap();
    assert!(last.starts_with("404 "));
    let whole = |answer: &&&str| answer.starts_with("200 OK\r\n") && answer.ends_with("0}");
    assert_eq!(others.iter().filter(whole).count(), REQUESTS - 1);
    assert!(
        before.unwrap() < REQUESTS as f64 - 1.0,
        "the node never waited"
    );
}

/// Numbers that come out the same each time (Knuth's 64-bit linear congruential generator).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

/// `request`, changed in one to three places.
fn changed(request: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    const BYTES: &[u8] = b"\r\n\0\t :;,/?=&%+#\"{}a0A1-_\x7f\xc3\xff";
    const LINES: [&str; 12] = [
        "host: y\r\n",
        "Connection: close\r\n",
        "connection: keep-alive\r\n",
        "content-length: 5\r\n",
        "content-length: 0\r\n",
        "transfer-encoding: chunked\r\n",
        "expect: 100-continue\r\n",
        "x-request-id: b\r\n",
        "grade-position: 0\r\n",
        "accept: */*\r\n",
        " folded\r\n",
        "\r\n",
    ];
    let mut bytes = request.to_vec();
    for _ in 0..=numbers.below(3) {
        let at = numbers.below(bytes.len());
        match numbers.below(6) {
            0 => {
                bytes.remove(at);
            }
            1 => bytes.insert(at, BYTES[numbers.below(BYTES.len())]),
            2 => bytes[at] = BYTES[numbers.below(BYTES.len())],
            3 => bytes[at] ^= 0x20,
            4 => bytes.truncate(at.max(1)),
            _ => {
                let ends = bytes
                    .windows(2)
                    .enumerate()
                    .filter(|(_, end)| end == b"\r\n");
                let ends: Vec<_> = ends.map(|(at, _)| at + 2).collect();
                if !ends.is_empty() {
                    let at = ends[numbers.below(ends.len())];
                    let line = LINES[numbers.below(LINES.len())].bytes();
                    bytes.splice(at..at, line);
                }
            }
        }
    }
    bytes
}

/// All that comes back for `bytes`, without dates and made names.
async fn all_said(port: SocketAddr, bytes: &[u8]) -> String {
    let mut connection = Raw::connect(port).await;
    // A node that has refused the beginning may have hung up.
    if connection.try_send(bytes).await.is_ok() {
        connection.send_no_more().await;
    }
    let said = connection.rest().await;
    let said = String::from_utf8(said).unwrap();
    let lines = said.split_inclusive("\r\n");
    let lines = lines.filter(|line| !line.starts_with("date: "));
    lines
        .filter(|line| !line.starts_with("x-request-id: "))
        .collect()
}

#[tokio::test]
async fn nothing_that_is_nearly_plain_is_answered_otherwise_than_by_hyper() {
    const ROUNDS: usize = 1500;
    let node = Node::start().await;
    let hypers = Node::start_with(
        program()
            .args(ANY_PORTS)
            .args(["--ephemeral", "--measure-without=plain"])
            .env("GRADESTORE_PASSWORD", PASSWORD),
    )
    .await;
    let read = get_request("?user_id=ab", "user-agent: x\r\n");
    let write = set_request_of(r#"{"user_id":"ab","spp":1}"#);
    let mut numbers = Numbers(1);
    let mut answered = [0, 0];
    for _ in 0..ROUNDS {
        let (ports, request) = match numbers.below(2) {
            0 => ([node.read, hypers.read], read.repeat(1 + numbers.below(2))),
            _ => (
                [node.write, hypers.write],
                write.repeat(1 + numbers.below(2)),
            ),
        };
        let request = changed(request.as_bytes(), &mut numbers);
        let said = all_said(ports[0], &request).await;
        let by_hyper = all_said(ports[1], &request).await;
        assert_eq!(said, by_hyper, "{}", request.escape_ascii());
        answered[usize::from(said.starts_with("HTTP/1.1 20"))] += 1;
    }
    // Neither is rare.
    assert!(
        answered.iter().all(|count| count * 5 > ROUNDS),
        "{answered:?}"
    );
    let [records, by_hyper] = [&node, &hypers].map(|node| async {
        let status = node.ops("/status").await.json();
        (status["digest"].clone(), status["position"].clone())
    });
    assert_eq!(records.await, by_hyper.await);
}
