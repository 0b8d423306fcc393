//! A log that stalls, refuses or loses batches, as clients of the node see it.

use std::sync::Arc;
use std::time::Duration;

use gradestore::log::RandomId;
use gradestore::node::config::Config;

use crate::harness::{Local, Ports, set_request_of};
use crate::held_log::HeldLog;
use crate::wire::{Raw, eventually};

const PATCH: &str = r#"{"user_id":"a","spp":1}"#;
const QUEUE_PATCHES_MAX: usize = 3;

/// A node with room for few writes, on a log that gives nothing back yet.
pub(crate) async fn start(wait_max: Duration) -> (Arc<HeldLog>, Local) {
    start_with(|config| config.writer.wait_max = wait_max).await
}

/// The same with limits of the test's own.
pub(crate) async fn start_with(adjust: impl FnOnce(&mut Config)) -> (Arc<HeldLog>, Local) {
    let origin = RandomId::random().unwrap();
    let log = HeldLog::new(origin);
    let node = Local::run(log.clone(), origin, |config| {
        config.writer.queue_requests_max = QUEUE_PATCHES_MAX;
        config.writer.batch_patches_max = 1;
        adjust(config);
    });
    let node = node.await;
    (log, node)
}

/// Sends a write that will have to wait; returns once the node works on it.
pub(crate) async fn waiting_set(node: &Ports, body: &str) -> Raw {
    let name = "gradestore_http_requests_in_flight";
    let running = node.metric(name).await.unwrap();
    let mut connection = Raw::connect(node.write).await;
    connection.send(set_request_of(body)).await;
    node.metric_reaches(name, running + 1.0).await;
    connection
}

#[tokio::test]
async fn a_full_queue_refuses_and_what_waits_is_written_in_order() {
    let (log, node) = start(Duration::from_secs(60)).await;
    let mut waiting = Vec::new();
    // Two batches are under way at most; the others queue.
    for spp in 0..2 + QUEUE_PATCHES_MAX {
        waiting.push(waiting_set(&node, &format!(r#"{{"user_id":"a","spp":{spp}}}"#)).await);
        node.metric_reaches(
            "gradestore_write_queue_patches",
            spp.saturating_sub(1) as f64,
        )
        .await;
    }
    let detail = node.set(PATCH).await.problem(503, "queue-full");
    assert!(detail.contains("not written"), "{detail}");
    node.get("a").await.problem(404, "user-unknown");

    log.release();
    for (before, connection) in waiting.iter_mut().enumerate() {
        assert_eq!(connection.answer().await.position(), before as u64 + 1);
    }
    assert_eq!(node.get("a").await.json()["spp"], 1 + QUEUE_PATCHES_MAX);
    node.set(PATCH).await.position();
}

#[tokio::test]
async fn a_batch_that_does_not_come_back_has_an_unknown_outcome_and_may_still_land() {
    let (log, node) = start(Duration::from_secs(1)).await;
    let mut sent = Vec::new();
    for spp in [6, 7] {
        let mut connection = Raw::connect(node.write).await;
        let patch = format!(r#"{{"user_id":"a","spp":{spp}}}"#);
        connection.send(set_request_of(&patch)).await;
        sent.push(connection);
        node.metric_reaches("gradestore_log_end", (spp - 5) as f64)
            .await;
    }
    // What was never sent is refused for certain.
    let detail = node.set(PATCH).await.problem(503, "not-written");
    assert!(detail.contains("not written"), "{detail}");
    for connection in &mut sent {
        let detail = connection.answer().await.problem(504, "outcome-unknown");
        assert!(detail.contains("read the grade back"), "{detail}");
    }
    log.release();
    node.metric_reaches("gradestore_log_position", 2.0).await;
    assert_eq!(node.get("a").await.json()["spp"], 7);
    assert_eq!(node.set(PATCH).await.position(), 3);
}

#[tokio::test]
async fn a_log_that_takes_nothing_is_told_to_the_client() {
    let (log, node) = start(Duration::from_secs(60)).await;
    log.release();
    node.set(PATCH).await.position();
    log.refuse();
    for _ in 0..10 {
        node.set(PATCH).await.problem(503, "not-written");
    }
    assert_eq!(node.get("a").await.status, 200);
}

#[tokio::test]
async fn a_node_that_misses_a_batch_answers_no_more() {
    let (log, node) = start(Duration::from_secs(1)).await;
    log.release();
    node.set(PATCH).await.position();
    log.lose();
    node.set(PATCH).await.problem(504, "outcome-unknown");
    let reason = eventually("unready", async || {
        let answer = node.ops("/readyz").await;
        (answer.status != 200).then(|| answer.problem(503, "not-ready"))
    })
    .await;
    assert!(
        reason.contains("batch 3 was delivered after batch 1"),
        "{reason}"
    );
    node.ops("/readyz/write").await.problem(503, "not-ready");
    node.get("a").await.problem(503, "not-ready");
    node.set(PATCH).await.problem(503, "not-ready");
    assert_eq!(node.ops("/status").await.json()["state"], "gap");
    assert_eq!(node.ops("/livez").await.status, 200);
}

#[tokio::test]
async fn a_panic_in_the_task_that_applies_ends_the_process() {
    let (log, node) = start(Duration::from_secs(60)).await;
    log.release();
    node.set(PATCH).await.position();
    log.crash();
    let _waiting = waiting_set(&node, PATCH).await;
    let why = node.failed().await;
    assert!(why.contains("task driver ended"), "{why}");
    assert!(why.contains("a broken invariant"), "{why}");
}

#[tokio::test]
async fn a_write_whose_client_went_away_is_applied_once_in_its_place() {
    let (log, node) = start(Duration::from_secs(60)).await;
    for spp in 1..=2 + QUEUE_PATCHES_MAX {
        let patch = format!(r#"{{"user_id":"a","spp":{spp},"shipping_fee":{spp}}}"#);
        drop(waiting_set(&node, &patch).await);
    }
    log.release();
    node.metric_reaches("gradestore_write_queue_patches", 0.0)
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
    // Nothing is left of those who went away but the request that asks.
    node.metric_reaches("gradestore_http_requests_in_flight", 1.0)
        .await;
}
