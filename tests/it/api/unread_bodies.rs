//! Responses that come before the end of the request's body.

use std::time::Duration;

use crate::harness::wire::{RawConnection, Response};
use crate::harness::{InProcessNode, Node, get_request, set_request, set_request_framed};

const PATCH: &str = r#"{"user_id":"a","spp":1}"#;
/// Longer than the first read of a connection.
const BODY_BYTES: usize = 40_000;

/// Requests that are rejected because of their header.
fn rejected(body: &str) -> [(String, u16); 7] {
    let request = set_request(body);
    [
        (request.replace("authorization", "x"), 401),
        (request.replace("application/json", "text/plain"), 415),
        (
            request.replace("content-type", "content-encoding: gzip\r\ncontent-type"),
            415,
        ),
        (request.replace("POST /set", "POST /other"), 404),
        (request.replace("POST /set", "PUT /set"), 405),
        (request.replace("POST /set", "DELETE /set"), 400),
        (request.replace("host: localhost", "host: other"), 400),
    ]
}

fn closes(response: &Response) -> bool {
    response.header("connection") == "close"
}

#[tokio::test]
async fn the_rest_of_a_short_body_is_discarded_and_the_connection_stays_open() {
    let node = Node::start().await;
    let body = " ".repeat(BODY_BYTES);
    let mut connection = RawConnection::connect(node.write).await;
    let mut position = 0;
    for (request, status) in rejected(&body) {
        for first_part in [request.len() - BODY_BYTES, request.len()] {
            connection.send(&request[..first_part]).await;
            connection.send(&request[first_part..]).await;
            let response = connection.response().await;
            assert_eq!(response.status, status, "{request:.200}");
            assert!(!closes(&response), "{request:.200}");
            position += 1;
            let written = connection.request(set_request(PATCH)).await;
            assert_eq!(written.position(), position);
        }
    }
    // The read port, where no request has a body of its own.
    let mut connection = RawConnection::connect(node.read).await;
    let framing = format!("content-length: {BODY_BYTES}\r\n");
    for request in [
        get_request("?user_id=b", &framing),
        get_request("", &framing),
    ] {
        connection.send(request + &body).await;
        assert!(!closes(&connection.response().await));
        let read = connection.request(get_request("?user_id=a", "")).await;
        assert_eq!(read.status, 200);
    }
}

#[tokio::test]
async fn the_response_says_that_the_connection_closes_if_the_body_is_too_long_or_does_not_arrive() {
    let node = InProcessNode::start(|config| {
        config.http.body_wait_max = Duration::from_millis(100);
    })
    .await;
    let request = set_request_framed("content-length: 10000000", "");
    let chunked = "transfer-encoding: chunked";
    let endless = format!("40000\r\n{}\r\n", " ".repeat(0x40000)).repeat(2);
    let cases = [
        // Too long.
        (request.replace("authorization", "x"), 401),
        (request.replace("application/json", "x"), 415),
        (request.replace("POST /set", "POST /other"), 404),
        (request.replace("POST /set", "PUT /set"), 405),
        (request.replace("host: localhost", "host: other"), 400),
        (request, 413),
        (set_request_framed(chunked, &endless), 413),
        (
            set_request_framed(chunked, &endless).replace("authorization", "x"),
            401,
        ),
        // It does not arrive.
        (set_request_framed("content-length: 23", ""), 408),
        (
            set_request_framed("content-length: 23", "").replace("authorization", "x"),
            401,
        ),
        (
            set_request_framed(chunked, "17\r\n").replace("/json", "/x-ndjson"),
            408,
        ),
        // It is malformed.
        (set_request_framed(chunked, "zz\r\n"), 400),
        (
            set_request_framed(chunked, "zz\r\n").replace("authorization", "x"),
            401,
        ),
    ];
    for (request, status) in cases {
        let mut connection = RawConnection::connect(node.write).await;
        let response = connection.request(&request).await;
        assert_eq!(response.status, status, "{request:.200}");
        assert!(closes(&response), "{request:.200}");
        connection.expect_closed().await;
    }
}

#[tokio::test]
async fn a_rejected_client_that_expects_a_continue_is_not_told_to_continue() {
    let node = Node::start().await;
    let body = " ".repeat(BODY_BYTES);
    for (request, status) in rejected(&body) {
        let request = request.replace("\r\n\r\n", "\r\nexpect: 100-continue\r\n\r\n");
        let header = request.strip_suffix(&body).unwrap();
        let mut connection = RawConnection::connect(node.write).await;
        let response = connection.request(header).await;
        assert_eq!(response.status, status);
        assert!(closes(&response), "{status}");
        connection.expect_closed().await;
    }
    // Once the body is read, it is like any other.
    let request = set_request(&body.replace(' ', "x"));
    let request = request.replace("\r\n\r\n", "\r\nexpect: 100-continue\r\n\r\n");
    let (header, body) = request.split_at(request.len() - BODY_BYTES);
    let mut connection = RawConnection::connect(node.write).await;
    connection.send(header).await;
    assert_eq!(connection.response().await.status, 100);
    connection.send(body).await;
    let response = connection.response().await;
    response.expect_problem(400, "not-json");
    assert!(!closes(&response));
    connection.request(set_request(PATCH)).await.position();
}

/// A proxy sends all of a long upload and then reads the response.
#[tokio::test]
async fn a_long_upload_that_is_rejected_early_gets_its_response() {
    let node = Node::start().await;
    let line = format!("{PATCH}\n");
    let body = format!("{}x\n{}", line.repeat(1500), line.repeat(1_800_000));
    assert!(body.len() > 40 << 20);
    let upload = set_request(&body).replace("/json", "/x-ndjson");
    let mut connection = RawConnection::connect(node.write).await;
    connection.send(&upload).await;
    let response = connection.response().await;
    response.expect_problem(422, "bad-line");
    assert!(closes(&response));
    assert_eq!(response.json()["accepted"], 1000);
    let mut connection = RawConnection::connect(node.write).await;
    connection.send(upload.replace("authorization", "x")).await;
    let response = connection.response().await;
    response.expect_problem(401, "unauthorized");
    assert!(closes(&response));
}

#[tokio::test]
async fn a_node_stops_although_a_rejected_client_goes_on_sending() {
    let node = Node::start().await;
    let mut connection = RawConnection::connect(node.write).await;
    let request = set_request_framed("content-length: 10000000", "").replace("authorization", "x");
    assert_eq!(connection.request(&request).await.status, 401);
    let (stopped, _) = tokio::join!(node.stop(), async {
        while connection.try_send(" ").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    let () = stopped;
}
