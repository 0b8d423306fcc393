//! The `Host` header, and the headers that every response has.

use std::net::SocketAddr;

use crate::harness::wire::RawConnection;
use crate::harness::{ANY_PORTS, InProcessNode, Node, PASSWORD, Ports, program, set_request};

/// The status of a request with `line` as its only header, and the problem's type.
async fn status(port: SocketAddr, target: &str, line: &str) -> (u16, String) {
    let mut connection = RawConnection::connect(port).await;
    let request = format!("GET {target} HTTP/1.1\r\n{line}\r\n");
    let response = connection.request(request).await;
    let problem = match response.status {
        400 => response.json()["type"].as_str().unwrap().to_owned(),
        _ => String::new(),
    };
    (response.status, problem)
}

async fn expect(node: &Ports, target: &str, line: &str, problem: Option<&str>) {
    let target_of = |path: &str| match target {
        "" => path.to_owned(),
        host => format!("http://{host}{path}"),
    };
    let write = target_of("/backup");
    for (port, path, accepted) in [
        (node.read, target_of("/get?user_id=a"), 200),
        (node.write, write, 401),
        (node.ops, target_of("/livez"), 200),
    ] {
        let found = status(port, &path, line).await;
        let wanted = match problem {
            Some(problem) => (400, format!("urn:gradestore:problem:{problem}")),
            None => (accepted, String::new()),
        };
        assert_eq!(found, wanted, "{path} {line:?}");
    }
}

const INVALID: [&str; 10] = [
    "",
    "host: localhost\r\nhost: localhost\r\n",
    "host: localhost\r\nHOST: 127.0.0.1\r\n",
    "host: localhost, localhost\r\n",
    "host: local host\r\n",
    "host: a@localhost\r\n",
    "host: localhost:x\r\n",
    "host: http://localhost\r\n",
    "host: [::1\r\n",
    "host: \u{e9}\r\n",
];

#[tokio::test]
async fn a_loopback_port_answers_only_requests_for_local_hosts_and_allowed_names() {
    let mut command = program();
    command
        .args(ANY_PORTS)
        .args(["--allowed-host", "grades.example"])
        .env("GRADESTORE_PASSWORD", PASSWORD);
    let node = Node::start_with(&mut command).await;
    node.set(r#"{"user_id":"a"}"#).await.position();
    for line in INVALID {
        expect(&node, "", line, Some("host-invalid")).await;
    }
    for host in [
        "localhost",
        "LOCALHOST:80",
        "127.0.0.1:1",
        "[::1]:8081",
        "Grades.Example:443",
    ] {
        expect(&node, "", &format!("host: {host}\r\n"), None).await;
        expect(&node, host, "host: localhost\r\n", None).await;
    }
    for host in [
        "rebind.example",
        "rebind.example:8081",
        "10.0.0.1",
        "0.0.0.0",
        "x.localhost",
    ] {
        expect(
            &node,
            "",
            &format!("host: {host}\r\n"),
            Some("host-unknown"),
        )
        .await;
        expect(&node, host, "host: localhost\r\n", Some("host-unknown")).await;
    }
    expect(&node, "", "host:\r\n", Some("host-unknown")).await;
    // On the fast path a write is rejected like a read.
    let write = set_request(r#"{"user_id":"a"}"#).replace("localhost", "rebind.example");
    let response = RawConnection::connect(node.write)
        .await
        .request(write)
        .await;
    let detail = response.expect_problem(400, "host-unknown");
    assert!(detail.contains("--allowed-host"), "{detail}");
    // HTTP/1.0 does not require the header.
    let mut connection = RawConnection::connect(node.read).await;
    let response = connection
        .request("GET /get?user_id=a HTTP/1.0\r\n\r\n")
        .await;
    assert_eq!(response.status, 200);
}

#[tokio::test]
async fn a_port_on_another_address_answers_for_every_valid_host() {
    let node = InProcessNode::start(|config| {
        for address in [
            &mut config.read_addr,
            &mut config.write_addr,
            &mut config.ops_addr,
        ] {
            *address = "0.0.0.0:0".parse().unwrap();
        }
    })
    .await;
    node.set(r#"{"user_id":"a"}"#).await.position();
    for line in INVALID {
        expect(&node, "", line, Some("host-invalid")).await;
    }
    for host in ["grades.example", "10.0.0.1:8081", "[2001:db8::1]:80", ""] {
        expect(&node, "", &format!("host: {host}\r\n"), None).await;
    }
}

#[tokio::test]
async fn no_response_may_be_cached_or_used_by_a_page_of_another_server() {
    let node = Node::start().await;
    node.set(r#"{"user_id":"a"}"#).await.position();
    let with = |request: &str| request.replace("\r\n\r\n", "\r\nx-request-id: b\r\n\r\n");
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    let write = set_request(r#"{"user_id":"a"}"#);
    let mut requests = vec![
        (node.write, write.clone(), 204),
        (node.write, with(&write), 204),
        (node.write, write.replace("user_id", "xser_id"), 422),
        (node.write, write.replace("authorization", "x"), 401),
        (node.write, write.replace("POST /set", "GET /backup"), 200),
        (node.write, get("/backup"), 401),
        (node.write, get("/other"), 404),
        (
            node.read,
            get("/get?user_id=a").replace("localhost", "other"),
            400,
        ),
    ];
    for (path, status) in [("?user_id=a", 200), ("?user_id=b", 404), ("", 400)] {
        let request = get(&format!("/get{path}"));
        requests.push((node.read, with(&request), status));
        requests.push((node.read, request, status));
    }
    for path in [
        "/",
        "/livez",
        "/readyz",
        "/readyz/write",
        "/metrics",
        "/status",
        "/openapi.json",
    ] {
        requests.push((node.ops, get(path), 200));
        requests.push((node.ops, get(path).replace("GET", "HEAD"), 200));
    }
    for (port, request, status) in requests {
        let mut connection = RawConnection::connect(port).await;
        connection.send(&request).await;
        let mut header = Vec::new();
        while !header.windows(4).any(|end| end == b"\r\n\r\n") {
            assert_ne!(connection.read_some(1, &mut header).await, 0, "{request}");
        }
        let header = String::from_utf8(header).unwrap();
        assert!(
            header.starts_with(&format!("HTTP/1.1 {status} ")),
            "{request}\n{header}"
        );
        for line in [
            "cache-control: no-store",
            "cross-origin-resource-policy: same-origin",
            "x-content-type-options: nosniff",
        ] {
            assert_eq!(header.matches(line).count(), 1, "{request}\n{header}");
        }
    }
}
