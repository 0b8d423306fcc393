//! Bounds of connections: how many, how long in the header, how long idle.

use std::time::Duration;

use futures_util::future::join_all;

use crate::harness::wire::{RawConnection, eventually, with_timeout};
use crate::harness::{InProcessNode, Node, get_request, incomplete_set_request, set_request};

const PATCH: &str = r#"{"user_id":"a","spp":1}"#;
const CUT: &str = r#"gradestore_http_connections_cut_total{port="read"}"#;
const OPEN: &str = r#"gradestore_http_connections{port="read"}"#;

#[tokio::test]
async fn a_new_client_takes_the_place_of_an_idle_one() {
    let node = InProcessNode::start(|config| config.http.data.connections_max = 4).await;
    let mut idle = Vec::new();
    for open in 1..=4 {
        idle.push(RawConnection::connect(node.read).await);
        node.metric_reaches(OPEN, open as f64).await;
    }
    assert_eq!(node.metric(CUT).await, Some(0.0));
    let mut new = RawConnection::connect(node.read).await;
    assert_eq!(new.request(get_request("?user_id=a", "")).await.status, 404);
    // The one idle longest made room, and no other.
    idle[0].expect_closed().await;
    assert_eq!(node.metric(CUT).await, Some(1.0));
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
async fn a_new_client_waits_while_all_places_are_at_work() {
    let node = InProcessNode::start(|config| config.http.data.connections_max = 1).await;
    let mut running = incomplete_set_request(&node, PATCH).await;
    let mut new = RawConnection::connect(node.write).await;
    new.send(set_request(PATCH)).await;
    running.send(PATCH).await;
    // Not cut to make room, and the other one's turn comes.
    assert_eq!(running.response().await.position(), 1);
    assert_eq!(new.response().await.position(), 2);
}

#[tokio::test]
async fn a_header_that_does_not_end_and_a_connection_that_idles_are_cut() {
    let node = InProcessNode::start(|config| {
        config.http.data.header_wait_max = Duration::from_millis(500);
        config.http.data.idle_max = Duration::from_millis(500);
    })
    .await;
    let (mut silent, mut slow) = (
        RawConnection::connect(node.read).await,
        RawConnection::connect(node.read).await,
    );
    slow.send("GET /get?user_id=a HTTP/1.1\r\nhost: x\r\n")
        .await;
    let mut idle = RawConnection::connect(node.read).await;
    idle.request(get_request("?user_id=a", ""))
        .await
        .expect_problem(404, "user-unknown");
    for connection in [&mut silent, &mut slow, &mut idle] {
        connection.expect_closed().await;
    }
    assert_eq!(node.metric(CUT).await, Some(3.0));
    node.metric_reaches(OPEN, 0.0).await;
}

#[tokio::test]
async fn a_request_that_runs_is_not_cut_for_being_idle() {
    let node = InProcessNode::start(|config| {
        config.http.data.header_wait_max = Duration::from_millis(500);
        config.http.data.idle_max = Duration::from_millis(500);
    })
    .await;
    let mut running = incomplete_set_request(&node, PATCH).await;
    // Cut in a sweep that would have cut the other as well.
    RawConnection::connect(node.write)
        .await
        .expect_closed()
        .await;
    running.send(PATCH).await;
    running.response().await.position();
}

#[tokio::test]
async fn thousands_of_idle_and_slow_connections_stand_in_nobodys_way() {
    const EACH: usize = 1500;
    rlimit::increase_nofile_limit(u64::MAX).unwrap();
    let node = Node::start().await;
    node.set(PATCH).await.position();
    let mut open = Vec::new();
    for _ in 0..EACH {
        open.push(RawConnection::connect(node.read).await);
        let mut slow = RawConnection::connect(node.read).await;
        slow.send("GET /get?user_id=a HTTP/1.1\r\n").await;
        open.push(slow);
    }
    node.metric_reaches(OPEN, (2 * EACH) as f64).await;
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
    // What is left is what this test reads through.
    eventually("closed", async || {
        node.metric(OPEN).await.filter(|open| *open <= 10.0)
    })
    .await;
}
