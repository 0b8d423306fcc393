//! A log that stalls, rejects or loses batches, as clients see it.

use std::time::Duration;

use crate::harness::gated_log::{QUEUE_PATCHES_MAX, start_node};
use crate::harness::wire::{RawConnection, eventually};
use crate::harness::{pending_set, set_request};

const PATCH: &str = r#"{"user_id":"a","spp":1}"#;

#[tokio::test]
async fn a_full_queue_rejects_writes_and_keeps_the_order_of_queued_ones() {
    let (log, node) = start_node(Duration::from_secs(60)).await;
    let mut waiting = Vec::new();
    // At most two batches are in flight; the others are queued.
    for spp in 0..2 + QUEUE_PATCHES_MAX {
        waiting.push(pending_set(&node, &format!(r#"{{"user_id":"a","spp":{spp}}}"#)).await);
        node.metric_reaches(
            "gradestore_write_queue_requests",
            spp.saturating_sub(1) as f64,
        )
        .await;
    }
    let detail = node.set(PATCH).await.expect_problem(503, "queue-full");
    assert!(detail.contains("not written"), "{detail}");
    node.get("a").await.expect_problem(404, "user-unknown");

    log.open();
    for (before, connection) in waiting.iter_mut().enumerate() {
        assert_eq!(connection.response().await.position(), before as u64 + 1);
    }
    assert_eq!(node.get("a").await.json()["spp"], 1 + QUEUE_PATCHES_MAX);
    node.set(PATCH).await.position();
}

#[tokio::test]
async fn an_unacknowledged_write_returns_504_and_may_still_be_applied() {
    let (log, node) = start_node(Duration::from_secs(1)).await;
    let mut sent = Vec::new();
    for spp in [6, 7] {
        let mut connection = RawConnection::connect(node.write).await;
        let patch = format!(r#"{{"user_id":"a","spp":{spp}}}"#);
        connection.send(set_request(&patch)).await;
        sent.push(connection);
        node.metric_reaches("gradestore_log_end", (spp - 5) as f64)
            .await;
    }
    // A write that was never sent is rejected as not written.
    let detail = node.set(PATCH).await.expect_problem(503, "not-written");
    assert!(detail.contains("not written"), "{detail}");
    for connection in &mut sent {
        let detail = connection
            .response()
            .await
            .expect_problem(504, "outcome-unknown");
        assert!(detail.contains("read the grade back"), "{detail}");
    }
    log.open();
    node.metric_reaches("gradestore_log_position", 2.0).await;
    assert_eq!(node.get("a").await.json()["spp"], 7);
    assert_eq!(node.set(PATCH).await.position(), 3);
}

#[tokio::test]
async fn a_rejecting_log_returns_503() {
    let (log, node) = start_node(Duration::from_secs(60)).await;
    log.open();
    node.set(PATCH).await.position();
    log.reject_appends();
    for _ in 0..10 {
        node.set(PATCH).await.expect_problem(503, "not-written");
    }
    assert_eq!(node.get("a").await.status, 200);
}

#[tokio::test]
async fn a_node_that_misses_a_batch_stops_serving() {
    let (log, node) = start_node(Duration::from_secs(1)).await;
    log.open();
    node.set(PATCH).await.position();
    log.skip_batches();
    node.set(PATCH).await.expect_problem(504, "outcome-unknown");
    let reason = eventually("unready", async || {
        let response = node.ops("/readyz").await;
        (response.status != 200).then(|| response.expect_problem(503, "not-ready"))
    })
    .await;
    assert!(
        reason.contains("batch 3 was delivered after batch 1"),
        "{reason}"
    );
    for (port, path) in [
        (node.ops, "/readyz/write"),
        (node.read, "/readyz"),
        (node.write, "/readyz"),
    ] {
        let response = node.get_from(port, path).await;
        assert_eq!(response.expect_problem(503, "not-ready"), reason);
    }
    node.get("a").await.expect_problem(503, "not-ready");
    node.set(PATCH).await.expect_problem(503, "not-ready");
    assert_eq!(node.status().await["state"], "gap");
    assert_eq!(node.ops("/livez").await.status, 200);
}

#[tokio::test]
async fn a_panic_while_applying_ends_the_process() {
    let (log, node) = start_node(Duration::from_secs(60)).await;
    log.open();
    node.set(PATCH).await.position();
    log.panic_on_next_batch();
    let _waiting = pending_set(&node, PATCH).await;
    let why = node.wait_for_error().await;
    assert!(why.contains("task driver ended"), "{why}");
    assert!(why.contains("a broken invariant"), "{why}");
}

#[tokio::test]
async fn a_write_of_a_disconnected_client_is_applied_once_and_in_order() {
    let (log, node) = start_node(Duration::from_secs(60)).await;
    for spp in 1..=2 + QUEUE_PATCHES_MAX {
        let patch = format!(r#"{{"user_id":"a","spp":{spp},"shipping_fee":{spp}}}"#);
        drop(pending_set(&node, &patch).await);
    }
    log.open();
    node.metric_reaches("gradestore_write_queue_requests", 0.0)
        .await;
    let last = QUEUE_PATCHES_MAX as u64 + 3;
    assert_eq!(
        node.set(r#"{"user_id":"a","spp":0}"#).await.position(),
        last
    );
    let grade = node.get("a").await.json();
    assert_eq!(
        (&grade["spp"], &grade["shipping_fee"]),
        (&0.into(), &(last - 1).into())
    );
    let applied = node.metric("gradestore_patches_applied_total").await;
    assert_eq!(applied, Some(last as f64));
    // Only the request for the metrics is in flight.
    node.metric_reaches("gradestore_http_requests_in_flight", 1.0)
        .await;
}
