//! Clients that violate HTTP, send too much or disconnect.

use crate::api::set::bad_bodies;
use crate::harness::wire::{RawConnection, TIMEOUT};
use crate::harness::{Node, gated_log, get_request, pending_set, set_request, set_request_framed};

const PATCH: &str = r#"{"user_id":"a","spp":1}"#;

#[tokio::test]
async fn ambiguous_framing_is_rejected_and_the_connection_closed() {
    let node = Node::start().await;
    let hidden = set_request(r#"{"user_id":"smuggled","spp":1}"#);
    let chunked = format!("{:x}\r\n{PATCH}\r\n0\r\n\r\n", PATCH.len());
    for (framing, body) in [
        ("content-length: 23\r\ncontent-length: 24", PATCH),
        ("content-length: 24\r\ncontent-length: 23", PATCH),
        ("content-length: 23, 24", PATCH),
        ("content-length: -1", PATCH),
        ("content-length: +23", PATCH),
        ("content-length: 0x17", PATCH),
        ("content-length: 99999999999999999999", PATCH),
        ("transfer-encoding: identity", PATCH),
        ("transfer-encoding: chunked, gzip", &chunked),
        ("transfer-encoding : chunked", &chunked),
        ("transfer-encoding: gzip, chunked", &chunked),
        ("transfer-encoding: chunked, chunked", &chunked),
        (
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
            &chunked,
        ),
        (
            "transfer-encoding: gzip\r\ntransfer-encoding: chunked",
            &chunked,
        ),
        ("transfer-encoding: \"chunked\"", &chunked),
        ("transfer-encoding: chunked;q=1", &chunked),
    ] {
        let mut connection = RawConnection::connect(node.write).await;
        connection
            .send(set_request_framed(framing, body) + &hidden)
            .await;
        assert_eq!(connection.response().await.status, 400, "{framing}");
        connection.expect_closed().await;
    }
    assert_eq!(node.status().await["position"], 0);
}

#[tokio::test]
async fn a_chunked_request_with_a_content_length_smuggles_no_request() {
    let node = Node::start().await;
    let hidden = set_request(r#"{"user_id":"smuggled","spp":1}"#);
    let body = format!("{:x}\r\n{PATCH}\r\n0\r\n\r\n", PATCH.len());
    // A proxy that uses the length takes `hidden` for a part of this body.
    let length = body.len() + hidden.len();
    let framing = format!("content-length: {length}\r\ntransfer-encoding: chunked");
    let mut connection = RawConnection::connect(node.write).await;
    connection
        .send(set_request_framed(&framing, &body) + &hidden)
        .await;
    // The node uses the chunks and ignores what follows them.
    assert_eq!(connection.response().await.position(), 1);
    connection.expect_closed().await;
    node.get("smuggled")
        .await
        .expect_problem(404, "user-unknown");
}

#[tokio::test]
async fn oversized_and_malformed_headers_are_rejected() {
    let node = Node::start().await;
    let line = |bytes: usize| format!("x-long: {}\r\n", "x".repeat(bytes));
    let lines = |count: usize| "x: y\r\n".repeat(count);
    for (headers, status) in [
        (line(30 * 1024), 404),
        (line(33 * 1024), 431),
        (line(1024 * 1024), 431),
        (lines(60), 404),
        (lines(100), 431),
        ("no colon\r\n".to_owned(), 400),
        ("bad name: x\r\n".to_owned(), 400),
        ("x: \0\r\n".to_owned(), 400),
    ] {
        let mut connection = RawConnection::connect(node.read).await;
        let response = connection
            .request(get_request("?user_id=nobody", &headers))
            .await;
        assert_eq!(response.status, status, "{:.20}", headers);
    }
}

#[tokio::test]
async fn bytes_that_are_not_http_are_rejected_or_dropped() {
    let node = Node::start().await;
    let tls_hello = &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"[..];
    for bytes in [
        tls_hello,
        b"GET / HTTP/3.0\r\n\r\n",
        b"GET /\r\n\r\n",
        b"\0\0\0\0",
    ] {
        let mut connection = RawConnection::connect(node.read).await;
        assert_eq!(connection.request(bytes).await.status, 400);
        connection.expect_closed().await;
    }
    // The preface of HTTP/2, which the node does not support.
    let mut connection = RawConnection::connect(node.read).await;
    connection.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    connection.expect_closed().await;
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let node = Node::start().await;
    let requests: String = (1..=50)
        .map(|spp| set_request(&format!(r#"{{"user_id":"a","spp":{spp}}}"#)))
        .collect();
    let mut connection = RawConnection::connect(node.write).await;
    connection.send(requests).await;
    for position in 1..=50 {
        assert_eq!(connection.response().await.position(), position);
    }
    assert_eq!(node.get("a").await.json()["spp"], 50);
}

#[tokio::test]
async fn an_error_response_is_readable_before_the_body_is_sent() {
    let node = Node::start().await;
    // More than the socket buffers hold.
    let body = " ".repeat(12 * 1024 * 1024);
    for (request, status, cause) in [
        (set_request(&body), 413, "body-too-large"),
        (
            set_request_framed(
                "transfer-encoding: chunked",
                &format!("c00000\r\n{body}\r\n0\r\n\r\n"),
            ),
            413,
            "body-too-large",
        ),
        (
            set_request(&body).replace("authorization", "x"),
            401,
            "unauthorized",
        ),
        (
            set_request(&body).replace("application/json", "x"),
            415,
            "unsupported-media-type",
        ),
        (
            set_request(&body).replace("/set", "/"),
            404,
            "route-unknown",
        ),
    ] {
        let mut connection = RawConnection::connect(node.write).await;
        // Like simple clients: all of the request first, then the response.
        connection.send(&request).await;
        connection.response().await.expect_problem(status, cause);
    }
}

#[tokio::test]
async fn a_client_that_closes_its_sending_side_gets_its_response() {
    let (log, node) = gated_log::start_node(TIMEOUT).await;
    let mut connection = pending_set(&node, PATCH).await;
    connection.shutdown_write().await;
    log.open();
    assert_eq!(connection.response().await.position(), 1);
    connection.expect_closed().await;

    let mut connection = RawConnection::connect(node.write).await;
    connection
        .send(set_request_framed("content-length: 50", PATCH))
        .await;
    connection.shutdown_write().await;
    connection
        .response()
        .await
        .expect_problem(400, "body-broken");
    connection.expect_closed().await;
}

#[tokio::test]
async fn malformed_requests_leak_no_memory() {
    let node = Node::start().await;
    let bodies = bad_bodies();
    let round = async |connection: &mut RawConnection| {
        for (body, status, cause) in &bodies {
            let framing = format!("content-length: {}", body.len());
            connection.send(set_request_framed(&framing, "")).await;
            connection.send(body).await;
            connection.response().await.expect_problem(*status, cause);
        }
    };
    let rss = async || node.metric("process_resident_memory_bytes").await.unwrap();
    let mut connection = RawConnection::connect(node.write).await;
    round(&mut connection).await;
    let before = rss().await;
    for _ in 0..200 {
        round(&mut connection).await;
    }
    let grown = rss().await - before;
    assert!(grown < 8.0 * 1024.0 * 1024.0, "{grown} bytes more");
    node.set(PATCH).await.position();
}
