//! A restore that is slower than the writes: the log goes on, is trimmed, and nothing is lost.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::stream::Config;
use futures_util::future::join_all;
use gradestore::log::{
    ClusterKey, ExistingData, JetStreamConfig, JetStreamLog, MemoryLog, RandomId, ReplicaIdentity,
};
use gradestore::node::data_dir::Storage;
use serde_json::Value;

use crate::broker::{Broker, Load, STREAM, SUBJECT, Write, status_where};
use crate::disk::backup_of;
use crate::harness::{Local, Node, PASSWORD, Ports, client};
use crate::seeded::{Cluster, serves_nothing};
use crate::throttle::Throttle;

/// What a read of the log may add beyond a full buffer: as many batches as are handed out at once.
const GIVEN_AT_ONCE: u64 = 64;

/// A replica in this process whose buffer is small.
async fn late(broker: &Broker, buffer_bytes_max: u64) -> Local {
    let origin = RandomId::random().unwrap();
    let config = JetStreamConfig {
        servers: broker.address.to_string().parse().unwrap(),
        creds: None,
        stream: STREAM.to_owned(),
        replicas: 1,
        retention: Duration::from_secs(24 * 3600),
        expect_peers: 1,
        peers: Vec::new(),
        write_silence_max: Duration::from_secs(12),
    };
    let identity = ReplicaIdentity {
        node: origin,
        replica: origin,
        existing_data: ExistingData::None,
        keeps_data: false,
        url: String::new(),
        ask_node: Arc::new(client()),
        key: ClusterKey::derive(PASSWORD),
    };
    let mut storage = Storage::of(Arc::new(MemoryLog::new(origin, 0)), origin);
    let in_flight = storage.in_flight.clone();
    let log = JetStreamLog::open(config, identity, in_flight, None, Arc::new(|_| {}));
    storage.log = Arc::new(log.await.unwrap());
    Local::launch(storage, origin, |config| {
        config.cluster.restore_buffer_bytes_max = buffer_bytes_max;
    })
}

fn buffered(status: &Value) -> (u64, u64) {
    let of = |name: &str| status["restore"][name].as_u64().unwrap();
    (of("buffered_batches"), of("buffered_bytes"))
}

/// Puts batches of one write each into the stream, as any client of the broker may.
async fn publish(broker: &Broker, count: i64) {
    let client = broker.client().await;
    let acks = (0..count).map(async |value| {
        let (user, field) = (format!("user {}", value % 500), 0);
        let payload = format!("[{}]", Write { user, field, value }.json());
        client.publish(SUBJECT, payload.into()).await.unwrap().await
    });
    for ack in join_all(acks).await {
        ack.unwrap();
    }
}

/// Waits until the log has gone on by so many batches.
async fn goes_on(node: &Ports, batches: u64) {
    let position = |status: &Value| status["position"].as_u64().unwrap();
    let now = position(&node.ops("/status").await.json());
    let further = |status: &Value| position(status) >= now + batches;
    status_where(node, "more batches", further).await;
}

/// A seeded cluster, and a replica that has half of its peer's backup.
async fn halfway(buffer_bytes_max: u64) -> (Cluster, Node, Throttle, Local) {
    let cluster = Cluster::of(3000).await;
    let throttle = Throttle::to_nobody(u64::MAX).await;
    let first = cluster.first_behind(&throttle).await;
    throttle.limit(backup_of(&first).await.len() as u64 / 2);
    let late = late(&cluster.broker, buffer_bytes_max).await;
    throttle.reached(1).await;
    (cluster, first, throttle, late)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_trimmed_beyond_a_restore_is_noticed_and_it_begins_anew() {
    let (mut cluster, first, throttle, late) = halfway(1).await;
    // More than the buffer, and what the broker has sent ahead of it, hold.
    publish(&cluster.broker, 3000).await;
    cluster.truth.read(&cluster.broker.client().await).await;
    let context = cluster.broker.client().await;
    let stream = context.get_stream(STREAM).await.unwrap();
    let config = Config {
        max_messages: 10,
        ..stream.cached_info().config.clone()
    };
    context.update_stream(config).await.unwrap();
    let trimmed = context.get_stream(STREAM).await.unwrap();
    assert_eq!(trimmed.cached_info().state.messages, 10);
    let (batches, _) = buffered(&serves_nothing(&late, &["restoring"]).await);
    assert!((1..=GIVEN_AT_ONCE).contains(&batches), "{batches}");

    throttle.open();
    cluster.check(&[&first, &late], &[]).await;
    assert_eq!(late.metric("gradestore_resyncs_total").await, Some(1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_that_outrun_a_restore_take_no_more_memory_than_they_may() {
    const BYTES_MAX: u64 = 16 * 1024;
    let (mut cluster, first, throttle, late) = halfway(BYTES_MAX).await;
    let load = Load::start(&[&first], 500, usize::MAX);
    let full = |status: &Value| buffered(status).1 >= BYTES_MAX;
    status_where(&late, "a full buffer", full).await;
    goes_on(&first, 50).await;
    let status = serves_nothing(&late, &["restoring"]).await;
    let (batches, bytes) = buffered(&status);
    let largest = 3 * (bytes / batches);
    assert!(bytes < BYTES_MAX + GIVEN_AT_ONCE * largest, "{bytes}");
    // The log goes on by as much again, and the buffer does not.
    goes_on(&first, batches).await;
    let status = late.ops("/status").await.json();
    assert_eq!(buffered(&status), (batches, bytes));

    throttle.open();
    status_where(&late, "ready", |status| status["state"] == "ready").await;
    let answered = load.stop().await;
    cluster.check(&[&first, &late], &answered).await;
    let status = late.ops("/status").await.json();
    assert_eq!(buffered(&status), (0, 0));
    assert_eq!(late.metric("gradestore_resyncs_total").await, Some(0.0));
}
