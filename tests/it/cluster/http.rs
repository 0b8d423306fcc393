//! The HTTP API of a replica, where it depends on NATS and on other replicas.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::api::delete::{assert_written_and_deleted, write_and_delete};
use crate::api::ndjson::{NdjsonBody, lines, record_count};
use crate::harness::cluster::broker::{Broker, Load, LoggedWrite, check, read_stream, replica_at};
use crate::harness::wire::{Response, eventually};
use crate::harness::{Node, PASSWORD};
use crate::ops::logs::{FAST_PATH_REQUESTS, ID, OTHER_REQUESTS, log_line, request_headers, send};

const APPLIED: &str = "gradestore_patches_applied_total";

#[tokio::test]
async fn a_group_of_lines_is_one_batch_of_the_log() {
    let broker = Broker::start().await;
    let node = broker.replica().await;
    // Single writes at the same time.
    let (bulk, single) = tokio::join!(node.set_lines(lines(0..4500)), async {
        for spp in 0..50 {
            let patch = format!(r#"{{"user_id":"single","shipping_fee":{spp}}}"#);
            node.set(patch).await.position();
        }
    });
    let () = single;
    assert_eq!(bulk.json()["accepted"], 4500);
    let mut groups: BTreeMap<i64, Vec<usize>> = BTreeMap::new();
    for (index, batch) in read_stream(&broker.client().await).await.iter().enumerate() {
        for write in batch.iter().filter_map(LoggedWrite::set) {
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
async fn a_bulk_write_stops_when_the_broker_is_lost_and_can_be_resumed() {
    let mut broker = Broker::start().await;
    let node = broker.replica().await;
    let mut body = NdjsonBody::begin(&node).await;
    body.send(&lines(0..2000)).await;
    node.metric_reaches(APPLIED, 2000.0).await;
    broker.kill();
    node.in_state("read-only").await;
    body.send(&lines(2000..3500)).await;
    let response = body.0.response().await;
    let detail = response.expect_problem(503, "not-written");
    assert!(detail.contains("2000 lines were accepted"), "{detail}");
    assert_eq!(response.json()["accepted"], 2000);
    assert_eq!(response.json()["line"], Value::Null);
    broker.restart().await;
    node.in_state("ready").await;
    let response = node.set_lines(lines(2000..3500)).await;
    // Empty batches that probe the broker may precede these.
    assert_eq!(response.json()["accepted"], 1500);
    assert!(response.json()["position"].as_u64().unwrap() >= 4);
    assert_eq!(record_count(&node).await, 3500);
}

#[tokio::test]
async fn replicas_apply_deletes_in_the_order_of_the_log() {
    let broker = Broker::start().await;
    let [a, b] = broker.replicas().await;
    write_and_delete(&a).await;
    b.ready_at(a.applied_position().await).await;
    assert_written_and_deleted(&b).await;
    // Deleted on one replica, unknown on the other; and the other way round.
    let deleted = b.delete("a b").await.position();
    let read = a
        .client
        .get(format!("http://{}/get?user_id=a+b", a.read))
        .header("grade-position", deleted);
    let response = Response::of(read.send().await.unwrap()).await;
    response.expect_problem(404, "user-unknown");
    let set = a.set(r#"{"user_id":"c","spp":1}"#).await.position();
    assert_eq!(b.get_at("c", set).await["spp"], 1);
    // A new replica reads the whole log.
    check(
        &broker.client().await,
        &[&a, &b, &broker.replica().await],
        &[],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_bootstrapped_during_deletes_ends_with_the_same_state() {
    let broker = Broker::start().await;
    let [a, b] = broker.replicas().await;
    let load = Load::start(&[&a, &b], 40, usize::MAX);
    let mut late = Vec::new();
    for _ in 0..3 {
        let applied = "gradestore_deletions_applied_total";
        let before = a.metric(applied).await.unwrap();
        eventually("more deletions", async || {
            (a.metric(applied).await? >= before + 20.0).then_some(())
        })
        .await;
        late.push(broker.replica().await);
    }
    let answered = load.stop().await;
    let nodes = [&a, &b, &late[0], &late[1], &late[2]];
    check(&broker.client().await, &nodes, &answered).await;
}

#[tokio::test]
async fn a_failed_request_is_logged_with_its_id() {
    let mut broker = Broker::start().await;
    let node = Node::start_with(&mut replica_at(broker.address)).await;
    broker.kill();
    node.in_state("read-only").await;

    send(
        &node,
        FAST_PATH_REQUESTS[0],
        &request_headers(&[b"by-name"], true),
    )
    .await
    .expect_problem(503, "not-written");
    let printed = log_line(&node, &["request failed", r#"request_id="by-name""#]).await;
    for part in [
        "WARN",
        r#"route="/set""#,
        "status=503",
        r#"problem="not-written""#,
        // Which error reports the lost broker first is a race.
        "detail=not written: ",
        "took_ms=",
    ] {
        assert!(printed.contains(part), "{part}: {printed}");
    }
    let response = send(&node, FAST_PATH_REQUESTS[0], &request_headers(&[], false)).await;
    response.expect_problem(401, "unauthorized");
    log_line(
        &node,
        &["request failed", response.header(ID), "status=401"],
    )
    .await;

    // Client errors and readiness probes are not logged.
    for (what, status) in [(OTHER_REQUESTS[1], 404), ("GET ops /readyz/write", 503)] {
        assert_eq!(
            send(&node, what, &request_headers(&[b"unlogged"], false))
                .await
                .status,
            status
        );
    }
    // This one is, so those would have been logged by now.
    send(
        &node,
        FAST_PATH_REQUESTS[0],
        &request_headers(&[b"last"], true),
    )
    .await
    .expect_problem(503, "not-written");
    log_line(&node, &[r#"request_id="last""#]).await;
    let printed = node.stderr.lock();
    assert!(!printed.contains("request_id=\"unlogged\""), "{printed}");
    assert!(
        !printed.contains("alice") && !printed.contains(PASSWORD),
        "{printed}"
    );
}
