//! The broker dies, the connection to it fails, its words get lost: nothing that was answered is
//! lost, nothing is applied twice, and all end equal.

use std::time::{Duration, Instant};

use crate::harness::Node;
use crate::harness::cluster::broker::{Broker, Load, STREAM, check, replica_at};
use crate::harness::cluster::proxy::{Proxy, Rules};
use crate::harness::pending_set;
use crate::harness::wire::eventually;
use futures_util::TryStreamExt;

const PATCH: &str = r#"{"user_id":"x","spp":1}"#;
/// Since the stream stores batches again until one that was lost is stored, on a busy machine. NATS'
/// client waits 2 s for an answer.
const LOST_MAX: Duration = Duration::from_secs(1);

/// Waits until a write is taken.
async fn writable(node: &Node) {
    node.in_state("ready").await;
    let before = node.metric("gradestore_log_position").await.unwrap();
    eventually("a batch more", async || {
        (node.metric("gradestore_log_position").await? > before).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_killed_again_and_again_loses_nothing_that_was_answered() {
    let mut broker = Broker::start().await;
    let [a, b, c] = broker.replicas().await;
    let load = Load::start(&[&a, &b, &c], 50, usize::MAX);
    for _round in 0..10 {
        for node in [&a, &b, &c] {
            writable(node).await;
        }
        broker.kill();
        broker.restart().await;
    }
    for node in [&a, &b, &c] {
        writable(node).await;
    }
    let answered = load.stop().await;
    check(&broker.client().await, &[&a, &b, &c], &answered).await;
}

#[tokio::test]
async fn while_the_broker_is_away_writes_are_refused_at_once_and_reads_go_on() {
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
async fn a_connection_that_dies_in_silence_or_is_cut_is_replaced() {
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
        writable(&a).await;
        proxy.set(rules);
        a.in_state("read-only").await;
        // The others do not notice.
        writable(&b).await;
        proxy.set(Rules::default());
    }
    writable(&a).await;
    proxy.cut();
    writable(&a).await;
    let answered = load.stop().await;
    check(&broker.client().await, &[&a, &b], &answered).await;
}

#[tokio::test]
async fn a_consumer_that_is_deleted_is_made_anew() {
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
async fn a_broker_whose_word_got_lost_is_not_told_twice() {
    let mut broker = Broker::start().await;
    let proxy = Proxy::to(broker.address).await;
    let mut command = replica_at(proxy.address);
    let a = Node::start_with(command.env("GRADESTORE_WRITE_TIMEOUT", "30s")).await;
    let started = a.applied_position().await;
    // The batch itself is word enough.
    proxy.set(Rules {
        drop_acks: true,
        ..Rules::default()
    });
    let first = a.set(r#"{"user_id":"x","spp":1}"#).await.position();
    assert_eq!(first, started + 1);
    a.metric_reaches("gradestore_log_resends_total", 0.0).await;

    // Neither comes: it is sent again, and is in the log once.
    let silent = Rules {
        drop_acks: true,
        drop_batches: true,
        ..Rules::default()
    };
    proxy.set(silent);
    let mut waiting = pending_set(&a, r#"{"user_id":"x","spp":2}"#).await;
    // The batch, and the fence after it.
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

    // The broker dies having stored it and having told nobody but another replica.
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
async fn a_batch_that_was_lost_silently_is_soon_sent_again() {
    let broker = Broker::start().await;
    let proxy = Proxy::to(broker.address).await;
    let a = Node::start_with(&mut replica_at(proxy.address)).await;
    a.set(PATCH).await.position();
    let lose = Rules {
        drop_publishes: true,
        ..Rules::default()
    };
    // The quickest of some: the machine may be busy.
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
