//! The fast path returns the same bytes as hyper and the router.

use std::fmt::Write as _;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

use crate::harness::wire::{RawConnection, eventually, with_timeout};
use crate::harness::{
    AUTHORIZATION, InProcessNode, Node, Ports, delete_request, get_request, set_request,
};

/// A header that the fast path does not handle, and that has no effect.
const ROUTER_HEADER: &str = "connection: keep-alive, x\r\n";
const READS: &str = r#"gradestore_http_requests_total{route="/get",status="200"}"#;
const WRITES: &str = r#"gradestore_http_requests_total{route="/set",status="204"}"#;
const FAST_PATH: &str = r#"gradestore_http_path_total{path="fast"}"#;

/// The number of requests that the fast path has handled.
async fn fast_path_count(node: &Ports) -> u64 {
    node.metric(FAST_PATH).await.unwrap_or_default() as u64
}

/// All bytes of the response to `request`, with the values of its date and request id replaced.
async fn response_bytes(port: SocketAddr, request: &str) -> String {
    let mut connection = RawConnection::connect(port).await;
    connection.send(request).await;
    connection.shutdown_write().await;
    let response = String::from_utf8(connection.read_to_end().await).unwrap();
    let (before, date) = response.split_once("date: ").unwrap();
    let (date, after) = date.split_once("\r\n").unwrap();
    // The format of RFC 9110.
    let date = httpdate::parse_http_date(date).expect(date);
    assert!(date.elapsed().unwrap().as_secs() < 60);
    let response = format!("{before}date: ?\r\n{after}");
    match response.split_once("x-request-id: ") {
        Some((before, rest)) => {
            let (id, after) = rest.split_once("\r\n").unwrap();
            assert_eq!(id.len(), 16);
            format!("{before}x-request-id: ?\r\n{after}")
        }
        None => response,
    }
}

#[tokio::test]
async fn reads_have_the_same_responses_as_from_the_router() {
    let node = Node::start().await;
    let most = "m".repeat(256);
    let position = node.set(r#"{"user_id":"a b","spp":1}"#).await.position();
    for user in ["a", "A-z.0_9~:@", &most] {
        let patch = serde_json::json!({ "user_id": user, "spp": -7, "return_fee": i64::MAX });
        node.set(patch.to_string()).await.position();
    }
    let reached = format!("grade-position: {position}\r\n");
    let proxied =
        "x-forwarded-for: 10.0.0.1\r\nvia: 1.1 proxy\r\ncookie: a=b\r\ntracestate: a=b\r\n";
    for (query, lines, status) in [
        ("?user_id=a", "", 200),
        ("?user_id=A-z.0_9~:@", "", 200),
        (&format!("?user_id={most}"), "", 200),
        ("?user_id=a%20b", "", 200),
        ("?user_id=a+b", "", 200),
        ("?user_id=%61", "", 200),
        ("?user_id=nobody", "", 404),
        ("?user_id=no%20body", "", 404),
        ("?user_id=a", reached.as_str(), 200),
        ("?user_id=a", proxied, 200),
    ] {
        let before = fast_path_count(&node).await;
        let response = response_bytes(node.read, &get_request(query, lines)).await;
        assert_eq!(fast_path_count(&node).await, before + 1, "{query} {lines}");
        let routed = response_bytes(
            node.read,
            &get_request(query, &format!("{lines}{ROUTER_HEADER}")),
        )
        .await;
        assert_eq!(fast_path_count(&node).await, before + 1, "{query} {lines}");
        assert_eq!(response, routed);
        assert!(
            response.starts_with(&format!("HTTP/1.1 {status} ")),
            "{response}"
        );
    }
    assert_eq!(node.metric(READS).await, Some(16.0));
    // The router handles these.
    let before = fast_path_count(&node).await;
    for query in ["?user_id=a%2", "?user_id=a%00", "?user_id=%ff", "?user_id="] {
        let response = response_bytes(node.read, &get_request(query, "")).await;
        assert!(response.starts_with("HTTP/1.1 400 "), "{query}: {response}");
    }
    assert_eq!(fast_path_count(&node).await, before);
}

#[tokio::test]
async fn writes_have_the_same_responses_as_from_the_router() {
    let node = Node::start().await;
    let body = r#"{"user_id":"a","spp":1}"#;
    let response = response_bytes(node.write, &set_request(body)).await;
    assert_eq!(fast_path_count(&node).await, 1);
    let with_another_line = set_request(body).replace(
        "host: localhost\r\n",
        &format!("host: localhost\r\n{ROUTER_HEADER}"),
    );
    let routed = response_bytes(node.write, &with_another_line).await;
    assert_eq!(fast_path_count(&node).await, 1);
    assert_eq!(response.replace("position: 1", "position: 2"), routed);
    assert_eq!(node.metric(WRITES).await, Some(2.0));
    let in_flight = "gradestore_http_requests_in_flight";
    // The request for the metrics itself.
    assert_eq!(node.metric(in_flight).await, Some(1.0));
}

/// After each request that the router handles, one follows that the fast path handles.
#[tokio::test]
async fn a_connection_returns_to_the_fast_path() {
    let node = Node::start().await;
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    let read = get_request("?user_id=a", "");
    let mut connection = RawConnection::connect(node.read).await;
    for (request, status) in [
        (get_request("?user_id=a", "x-request-id: b\r\n"), 200),
        (get_request("?user_ids=a&user_ids=b", ""), 200),
        (get_request("", ""), 400),
        (
            "PUT /get HTTP/1.1\r\nhost: localhost\r\n\r\n".to_owned(),
            405,
        ),
        (
            "GET /other HTTP/1.1\r\nhost: localhost\r\n\r\n".to_owned(),
            404,
        ),
    ] {
        let before = fast_path_count(&node).await;
        connection.send(&request).await;
        assert_eq!(connection.response().await.status, status, "{request}");
        assert_eq!(fast_path_count(&node).await, before, "{request}");
        connection.send(&read).await;
        assert_eq!(connection.response().await.status, 200);
        assert_eq!(fast_path_count(&node).await, before + 1, "{request}");
    }
    let body = r#"{"user_id":"a","spp":1}"#;
    let write = set_request(body);
    let chunked = write.replace(
        &format!("content-length: {}", body.len()),
        "transfer-encoding: chunked",
    );
    let chunked = chunked.replace(body, &format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len()));
    let mut connection = RawConnection::connect(node.write).await;
    for (request, status) in [
        (chunked, 204),
        (write.replace("/json", "/x-ndjson"), 200),
        (write.replace("/json", "/json; charset=utf-8"), 204),
        (delete_request("?user_id=b"), 204),
        (write.replace("spp", "sqq"), 422),
    ] {
        let before = fast_path_count(&node).await;
        connection.send(&request).await;
        assert_eq!(connection.response().await.status, status, "{request}");
        connection.send(&write).await;
        assert_eq!(connection.response().await.status, 204, "{request}");
        assert_eq!(fast_path_count(&node).await, before + 1, "{request}");
    }
}

#[tokio::test]
async fn the_fast_path_waits_for_a_delayed_body() {
    let node = Node::start().await;
    let body = r#"{"user_id":"a","spp":1}"#;
    let request = set_request(body);
    let header = request.strip_suffix(body).unwrap();
    let mut connection = RawConnection::connect(node.write).await;
    for round in 1..=3 {
        connection.send(header).await;
        node.metric_reaches("gradestore_http_requests_in_flight", 2.0)
            .await;
        connection.send(&body[..5]).await;
        connection.send(&body[5..]).await;
        connection.response().await.position();
        assert_eq!(fast_path_count(&node).await, round);
    }
    // A wrong password is rejected before the body arrives.
    connection
        .send(header.replace(AUTHORIZATION, "Basic eDp5"))
        .await;
    assert_eq!(connection.response().await.status, 401);
}

#[tokio::test]
async fn writes_on_both_paths_are_applied_in_order() {
    let node = Node::start().await;
    let set = |spp: u32| set_request(&format!(r#"{{"user_id":"a","spp":{spp}}}"#));
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
        (
            set(9).replace("host: localhost", "host: localhost\r\nconnection: close"),
            204,
        ),
    ];
    for first in 0..requests.len() {
        let mut connection = RawConnection::connect(node.write).await;
        let bytes: String = requests[first..]
            .iter()
            .map(|(bytes, _)| &**bytes)
            .collect();
        connection.send(bytes).await;
        let mut before = 0;
        for (request, status) in &requests[first..] {
            let response = connection.response().await;
            assert_eq!(response.status, *status, "{request}: {}", response.body);
            if *status == 204 {
                assert!(response.position() > before, "{request}");
                before = response.position();
            }
        }
        connection.expect_closed().await;
        assert_eq!(node.get("a").await.json()["spp"], 9);
    }
}

#[tokio::test]
async fn reads_on_both_paths_are_answered_in_order() {
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
            "PUT /get HTTP/1.1\r\nhost: localhost\r\n\r\n".to_owned(),
            405,
            "method-not-allowed",
        ),
        (
            get_request("?user_id=a", "connection: close\r\n"),
            200,
            r#""spp":1"#,
        ),
    ];
    // In one write, starting from each request in turn, so that each is once the first of its
    // connection.
    for first in 0..requests.len() {
        let mut connection = RawConnection::connect(node.read).await;
        let bytes: String = requests[first..]
            .iter()
            .map(|(bytes, ..)| &**bytes)
            .collect();
        connection.send(bytes).await;
        for (request, status, part) in &requests[first..] {
            let response = connection.response().await;
            assert_eq!(response.status, *status, "{request}: {}", response.body);
            assert!(response.body.contains(part), "{request}: {}", response.body);
        }
        connection.expect_closed().await;
    }
}

#[tokio::test]
async fn a_request_split_at_any_byte_is_answered() {
    let node = Node::start().await;
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    let write = set_request(r#"{"user_id":"a","spp":1}"#);
    for cut in 1..write.len() {
        let mut connection = RawConnection::connect(node.write).await;
        let before = node.metric(WRITES).await.unwrap();
        let (begin, end) = write.split_at(cut);
        connection.send(format!("{write}{begin}")).await;
        let first = connection.response().await.position();
        connection.send(end).await;
        assert_eq!(connection.response().await.position(), first + 1, "{cut}");
        let more = node.metric(WRITES).await.unwrap() - before;
        assert!((more - 2.0).abs() < 0.5, "{cut}: {more}");
    }
    let request = get_request("?user_id=a", "");
    for cut in 1..request.len() {
        let mut connection = RawConnection::connect(node.read).await;
        let before = node.metric(READS).await;
        // The first response shows that the beginning of the second request has arrived too.
        let (begin, end) = request.split_at(cut);
        connection.send(format!("{request}{begin}")).await;
        assert!(connection.response().await.body.contains(r#""spp":1"#));
        connection.send(end).await;
        assert!(
            connection.response().await.body.contains(r#""spp":1"#),
            "{cut}"
        );
        let more = node.metric(READS).await.unwrap() - before.unwrap_or_default();
        assert!((more - 2.0).abs() < 0.5, "{cut}: {more}");
    }
}

#[tokio::test]
async fn a_client_that_reads_late_gets_all_responses() {
    const REQUESTS: usize = 60_000;
    let node = Node::start().await;
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    let mut bytes = get_request("?user_id=a", "").repeat(REQUESTS - 1);
    // The router's response must come after all responses of the fast path.
    let _ = write!(
        bytes,
        "{}",
        get_request("?user_id=nobody", "connection: close\r\n")
    );

    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let stream = with_timeout("connect", socket.connect(node.read))
        .await
        .unwrap();
    let (mut incoming, mut outgoing) = stream.into_split();
    let sending = tokio::spawn(async move { outgoing.write_all(bytes.as_bytes()).await });
    // The node's send buffer is full, so it stops reading.
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
    with_timeout("all answers", all).await.unwrap();
    with_timeout("all requests", sending)
        .await
        .unwrap()
        .unwrap();
    let received = String::from_utf8(received).unwrap();
    let responses: Vec<_> = received.split("HTTP/1.1 ").skip(1).collect();
    assert_eq!(responses.len(), REQUESTS);
    let (last, others) = responses.split_last().unwrap();
    assert!(last.starts_with("404 "));
    let whole = |response: &&&str| response.starts_with("200 OK\r\n") && response.ends_with("0}");
    assert_eq!(others.iter().filter(whole).count(), REQUESTS - 1);
    assert!(
        before.unwrap() < REQUESTS as f64 - 1.0,
        "the node was never blocked"
    );
}

/// Reproducible random numbers (Knuth's 64-bit linear congruential generator).
struct Lcg(u64);

impl Lcg {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

/// `request` with one to three random changes.
fn mutated(request: &[u8], rng: &mut Lcg) -> Vec<u8> {
    const BYTES: &[u8] = b"\r\n\0\t :;,/?=&%+#\"{}a0A1-_\x7f\xc3\xff";
    const LINES: [&str; 15] = [
        "via: 1.1 proxy\r\n",
        "grade-position: 99999\r\n",
        "content-encoding: gzip\r\n",
        "host: 127.0.0.1\r\n",
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
    for _ in 0..=rng.below(3) {
        let at = rng.below(bytes.len());
        match rng.below(6) {
            0 => {
                bytes.remove(at);
            }
            1 => bytes.insert(at, BYTES[rng.below(BYTES.len())]),
            2 => bytes[at] = BYTES[rng.below(BYTES.len())],
            3 => bytes[at] ^= 0x20,
            4 => bytes.truncate(at.max(1)),
            _ => {
                let ends = bytes
                    .windows(2)
                    .enumerate()
                    .filter(|(_, end)| end == b"\r\n");
                let ends: Vec<_> = ends.map(|(at, _)| at + 2).collect();
                if !ends.is_empty() {
                    let at = ends[rng.below(ends.len())];
                    let line = LINES[rng.below(LINES.len())].bytes();
                    bytes.splice(at..at, line);
                }
            }
        }
    }
    bytes
}

/// The whole response to `bytes`, without dates and generated request ids.
async fn exchange(port: SocketAddr, bytes: &[u8]) -> String {
    let mut connection = RawConnection::connect(port).await;
    // The node may have closed the connection after a bad beginning.
    if connection.try_send(bytes).await.is_ok() {
        connection.shutdown_write().await;
    }
    let printed = connection.read_to_end().await;
    let printed = String::from_utf8(printed).unwrap();
    let lines = printed.split_inclusive("\r\n");
    let lines = lines.filter(|line| !line.starts_with("date: "));
    lines
        .filter(|line| !line.starts_with("x-request-id: "))
        .collect()
}

#[tokio::test]
async fn altered_requests_have_the_same_responses_as_without_the_fast_path() {
    const ROUNDS: usize = 1500;
    let node = InProcessNode::start(|_| {}).await;
    let without = InProcessNode::start(|config| config.http.fast_path = false).await;
    let read = get_request("?user_id=ab", "user-agent: x\r\n");
    let write = set_request(r#"{"user_id":"ab","spp":1}"#);
    let mut rng = Lcg(1);
    let mut answered = [0, 0];
    for _ in 0..ROUNDS {
        let (ports, request) = match rng.below(2) {
            0 => ([node.read, without.read], read.repeat(1 + rng.below(2))),
            _ => ([node.write, without.write], write.repeat(1 + rng.below(2))),
        };
        let request = mutated(request.as_bytes(), &mut rng);
        let printed = exchange(ports[0], &request).await;
        let routed = exchange(ports[1], &request).await;
        assert_eq!(printed, routed, "{}", request.escape_ascii());
        answered[usize::from(printed.starts_with("HTTP/1.1 20"))] += 1;
    }
    // Both successes and errors are frequent.
    assert!(
        answered.iter().all(|count| count * 5 > ROUNDS),
        "{answered:?}"
    );
    let [records, routed] = [&node, &without].map(|node| async {
        let status = node.status().await;
        (status["digest"].clone(), status["position"].clone())
    });
    assert_eq!(records.await, routed.await);
    assert!(fast_path_count(&node).await > 0);
    assert_eq!(fast_path_count(&without).await, 0);
}
