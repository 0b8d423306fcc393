//! Limits of connections: their number, the time for a header, and the idle time.

use std::time::Duration;

use futures_util::future::join_all;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::harness::wire::{RawConnection, eventually, with_timeout};
use crate::harness::{InProcessNode, Node, get_request, incomplete_set_request, set_request};

const PATCH: &str = r#"{"user_id":"a","spp":1}"#;
const CLOSED_CONNECTIONS: &str = r#"gradestore_http_connections_cut_total{port="read"}"#;
const OPEN_CONNECTIONS: &str = r#"gradestore_http_connections{port="read"}"#;

#[tokio::test]
async fn a_new_connection_at_the_limit_evicts_the_longest_idle_one() {
    let node = InProcessNode::start(|config| config.http.data.connections_max = 4).await;
    let mut idle = Vec::new();
    for open in 1..=4 {
        idle.push(RawConnection::connect(node.read).await);
        node.metric_reaches(OPEN_CONNECTIONS, open as f64).await;
    }
    assert_eq!(node.metric(CLOSED_CONNECTIONS).await, Some(0.0));
    let mut new = RawConnection::connect(node.read).await;
    assert_eq!(new.request(get_request("?user_id=a", "")).await.status, 404);
    // Only the connection that was idle longest is closed.
    idle[0].expect_closed().await;
    assert_eq!(node.metric(CLOSED_CONNECTIONS).await, Some(1.0));
    let port = &node.status().await["ports"][1];
    for (name, value) in [
        ("connections_cut", 1),
        ("connections", 4),
        ("connections_max", 4),
    ] {
        assert_eq!(port[name], value, "{name}");
    }
    for connection in [&mut idle[1], &mut new] {
        assert_eq!(
            connection
                .request(get_request("?user_id=a", ""))
                .await
                .status,
            404
        );
    }
}

#[tokio::test]
async fn a_new_connection_at_the_limit_waits_while_all_others_are_busy() {
    let node = InProcessNode::start(|config| config.http.data.connections_max = 1).await;
    let mut running = incomplete_set_request(&node, PATCH).await;
    let mut new = RawConnection::connect(node.write).await;
    new.send(set_request(PATCH)).await;
    running.send(PATCH).await;
    // The busy connection is not evicted, and the new one is served after it.
    assert_eq!(running.response().await.position(), 1);
    assert_eq!(new.response().await.position(), 2);
}

#[tokio::test]
async fn slow_headers_and_idle_connections_are_closed() {
    let node = InProcessNode::start(|config| {
        config.http.data.header_wait_max = Duration::from_millis(500);
        config.http.data.idle_max = Duration::from_millis(500);
    })
    .await;
    let (mut silent, mut slow) = (
        RawConnection::connect(node.read).await,
        RawConnection::connect(node.read).await,
    );
    slow.send("GET /get?user_id=a HTTP/1.1\r\nhost: localhost\r\n")
        .await;
    let mut idle = RawConnection::connect(node.read).await;
    idle.request(get_request("?user_id=a", ""))
        .await
        .expect_problem(404, "user-unknown");
    for connection in [&mut silent, &mut slow, &mut idle] {
        connection.expect_closed().await;
    }
    assert_eq!(node.metric(CLOSED_CONNECTIONS).await, Some(3.0));
    node.metric_reaches(OPEN_CONNECTIONS, 0.0).await;
}

#[tokio::test]
async fn a_running_request_is_not_closed_as_idle() {
    let node = InProcessNode::start(|config| {
        config.http.data.header_wait_max = Duration::from_millis(500);
        config.http.data.idle_max = Duration::from_millis(500);
    })
    .await;
    let mut running = incomplete_set_request(&node, PATCH).await;
    // The sweep that closes this connection would have closed the other one too.
    RawConnection::connect(node.write)
        .await
        .expect_closed()
        .await;
    running.send(PATCH).await;
    running.response().await.position();
}

#[tokio::test]
async fn thousands_of_idle_and_slow_connections_do_not_block_requests() {
    const EACH: usize = 1500;
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    let node = Node::start().await;
    node.set(PATCH).await.position();
    let mut open = Vec::new();
    for _ in 0..EACH {
        open.push(RawConnection::connect(node.read).await);
        let mut slow = RawConnection::connect(node.read).await;
        slow.send("GET /get?user_id=a HTTP/1.1\r\n").await;
        open.push(slow);
    }
    node.metric_reaches(OPEN_CONNECTIONS, (2 * EACH) as f64)
        .await;
    for _ in 0..20 {
        let responses = join_all((0..10).map(|_| node.get("a")));
        let responses = with_timeout("answers", responses).await;
        assert!(responses.iter().all(|response| response.status == 200));
        assert!(
            node.ops("/metrics")
                .await
                .body
                .contains("gradestore_records 1")
        );
    }
    drop(open);
    // The connections of this test's own client remain.
    eventually("closed", async || {
        node.metric(OPEN_CONNECTIONS)
            .await
            .filter(|open| *open <= 10.0)
    })
    .await;
}
