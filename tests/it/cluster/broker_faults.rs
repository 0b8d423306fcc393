//! NATS is killed, connections to it fail, acknowledgements get lost: no acknowledged write is
//! lost, none is applied twice, and all replicas end with the same state.

use std::time::{Duration, Instant};

use crate::harness::Node;
use crate::harness::cluster::broker::{Broker, Load, STREAM, check, replica_at};
use crate::harness::cluster::proxy::{Proxy, Rules};
use crate::harness::pending_set;
use crate::harness::wire::eventually;
use futures_util::TryStreamExt;

const PATCH: &str = r#"{"user_id":"x","spp":1}"#;
/// From when the stream stores messages again until it has stored the lost batch, on a busy
/// machine. The NATS client waits 2 s for an acknowledgement.
const LOST_MAX: Duration = Duration::from_secs(1);

/// Waits until a write is applied.
async fn wait_until_writable(node: &Node) {
    node.in_state("ready").await;
    let before = node.metric("gradestore_log_position").await.unwrap();
    eventually("a batch more", async || {
        (node.metric("gradestore_log_position").await? > before).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeatedly_killed_broker_loses_no_acknowledged_write() {
    let mut broker = Broker::start().await;
    let [a, b, c] = broker.replicas().await;
    let load = Load::start(&[&a, &b, &c], 50, usize::MAX);
    for _round in 0..10 {
        for node in [&a, &b, &c] {
            wait_until_writable(node).await;
        }
        broker.kill();
        broker.restart().await;
    }
    for node in [&a, &b, &c] {
        wait_until_writable(node).await;
    }
    let answered = load.stop().await;
    check(&broker.client().await, &[&a, &b, &c], &answered).await;
}

#[tokio::test]
async fn without_the_broker_writes_are_rejected_immediately_and_reads_continue() {
    let mut broker = Broker::start().await;
    let a = broker.replica().await;
    a.set(PATCH).await.position();
    broker.kill();
    a.in_state("read-only").await;
    let started_at = Instant::now();
    for _ in 0..20 {
        let detail = a.set(PATCH).await.expect_problem(503, "not-written");
        assert!(detail.contains("NATS"), "{detail}");
    }
    assert!(started_at.elapsed() < Duration::from_secs(1));
    assert_eq!(a.get("x").await.json()["spp"], 1);
    assert_eq!(a.ops("/readyz").await.status, 200);
    a.ops("/readyz/write")
        .await
        .expect_problem(503, "not-ready");
    broker.restart().await;
    a.in_state("ready").await;
    assert!(a.set(PATCH).await.position() >= 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_or_closed_connection_is_replaced() {
    let broker = Broker::start().await;
    let proxy = Proxy::to(broker.address).await;
    let a = Node::start_with(&mut replica_at(proxy.address)).await;
    let b = broker.replica().await;
    let load = Load::start(&[&a, &b], 50, usize::MAX);
    let dead = Rules::BLACKHOLE;
    let (drop_requests, drop_replies) = (
        Rules {
            drop_replies: false,
            ..dead
        },
        Rules {
            drop_requests: false,
            ..dead
        },
    );
    for rules in [dead, drop_requests, drop_replies] {
        wait_until_writable(&a).await;
        proxy.set(rules);
        a.in_state("read-only").await;
        // The other replica is not affected.
        wait_until_writable(&b).await;
        proxy.set(Rules::default());
    }
    wait_until_writable(&a).await;
    proxy.cut();
    wait_until_writable(&a).await;
    let answered = load.stop().await;
    check(&broker.client().await, &[&a, &b], &answered).await;
}

#[tokio::test]
async fn a_deleted_consumer_is_recreated() {
    let broker = Broker::start().await;
    let a = broker.replica().await;
    let client = broker.client().await;
    let stream = client.get_stream(STREAM).await.unwrap();
    let started = a.applied_position().await;
    for written in 1..=3 {
        let names: Vec<String> = stream.consumer_names().try_collect().await.unwrap();
        assert_eq!(names.len(), 1);
        stream.delete_consumer(&names[0]).await.unwrap();
        assert_eq!(a.set(PATCH).await.position(), started + written);
    }
    a.metric_reaches("gradestore_log_resumes_total", 3.0).await;
    a.metric_reaches("gradestore_log_reconnects_total", 0.0)
        .await;
}

#[tokio::test]
async fn a_batch_with_a_lost_acknowledgement_is_stored_once() {
    let mut broker = Broker::start().await;
    let proxy = Proxy::to(broker.address).await;
    let mut command = replica_at(proxy.address);
    let a = Node::start_with(command.env("GRADESTORE_WRITE_TIMEOUT", "30s")).await;
    let started = a.applied_position().await;
    // Without the acknowledgement, the delivered batch confirms the write.
    proxy.set(Rules {
        drop_acks: true,
        ..Rules::default()
    });
    let first = a.set(r#"{"user_id":"x","spp":1}"#).await.position();
    assert_eq!(first, started + 1);
    a.metric_reaches("gradestore_log_resends_total", 0.0).await;

    // With neither, the replica sends the batch again, and the log stores it once.
    let silent = Rules {
        drop_acks: true,
        drop_batches: true,
        ..Rules::default()
    };
    proxy.set(silent);
    let mut waiting = pending_set(&a, r#"{"user_id":"x","spp":2}"#).await;
    // The batch and the fence after it.
    let client = broker.client().await;
    let ends_at = async |end: u64| {
        eventually("a fence", async || {
            let mut stream = client.get_stream(STREAM).await.ok()?;
            let last = stream.info().await.ok()?.state.last_sequence;
            (last >= end).then_some(last)
        })
        .await
    };
    ends_at(first + 2).await;
    proxy.set(Rules::default());
    assert_eq!(waiting.response().await.position(), first + 1);
    let third = a.set(r#"{"user_id":"x","spp":3}"#).await.position();
    assert!(third > first + 2);

    // The broker dies after it stored the batch and delivered it to the other replica only.
    let b = broker.replica().await;
    let started = b.applied_position().await;
    assert_eq!(started, third + 1);
    a.ready_at(started).await;
    proxy.set(silent);
    let mut waiting = pending_set(&a, r#"{"user_id":"x","spp":4}"#).await;
    let fourth = started + 1;
    b.ready_at(fourth).await;
    broker.kill();
    broker.restart().await;
    proxy.set(Rules::default());
    assert_eq!(waiting.response().await.position(), fourth);
    a.set(r#"{"user_id":"x","spp":5}"#).await.position();
    check(&broker.client().await, &[&a, &b], &[]).await;
}

#[tokio::test]
async fn a_silently_dropped_batch_is_soon_sent_again() {
    let broker = Broker::start().await;
    let proxy = Proxy::to(broker.address).await;
    let a = Node::start_with(&mut replica_at(proxy.address)).await;
    a.set(PATCH).await.position();
    let lose = Rules {
        drop_publishes: true,
        ..Rules::default()
    };
    // The fastest of three, because the machine may be busy.
    let mut quickest = Duration::MAX;
    for spp in 2..5 {
        proxy.set(lose);
        let before = proxy.dropped_publishes();
        let patch = format!(r#"{{"user_id":"x","spp":{spp}}}"#);
        let mut waiting = pending_set(&a, &patch).await;
        eventually("a lost batch", async || {
            (proxy.dropped_publishes() > before).then_some(())
        })
        .await;
        proxy.set(Rules::default());
        let start = Instant::now();
        waiting.response().await.position();
        quickest = quickest.min(start.elapsed());
        assert_eq!(a.get("x").await.json()["spp"], spp);
    }
    assert!(quickest < LOST_MAX, "stored after {quickest:?}");
    check(&broker.client().await, &[&a], &[]).await;
}
