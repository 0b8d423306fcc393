//! A restore that is slower than the writes: the log grows and is trimmed, and nothing is lost.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::stream::Config;
use futures_util::future::join_all;
use gradestore::log::{
    ClusterKey, ExistingData, JetStreamConfig, JetStreamLog, MemoryLog, RandomId, ReplicaIdentity,
};
use gradestore::node::data_dir::Storage;
use serde_json::Value;

use crate::harness::backup_files::fetch_backup;
use crate::harness::cluster::broker::{Broker, Load, STREAM, SUBJECT, Write};
use crate::harness::cluster::client;
use crate::harness::cluster::seeded::{SeededCluster, assert_serves_nothing};
use crate::harness::cluster::throttle::Throttle;
use crate::harness::{InProcessNode, Node, PASSWORD, Ports};

/// Batches that one read of the log may add to a full buffer.
const BATCHES_PER_READ: u64 = 64;

/// A replica in this process with a small buffer.
async fn replica_with_buffer(broker: &Broker, buffer_bytes_max: u64) -> InProcessNode {
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
        wal: None,
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
    InProcessNode::launch(storage, origin, |config| {
        config.cluster.restore_buffer_bytes_max = buffer_bytes_max;
    })
}

fn buffered(status: &Value) -> (u64, u64) {
    let of = |name: &str| status["restore"][name].as_u64().unwrap();
    (of("buffered_batches"), of("buffered_bytes"))
}

/// Publishes batches of one write each, as any client of NATS may.
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

/// Waits until the node has applied this many more batches.
async fn wait_for_batches(node: &Ports, batches: u64) {
    let position = |status: &Value| status["position"].as_u64().unwrap();
    let now = position(&node.status().await);
    let further = |status: &Value| position(status) >= now + batches;
    node.status_where("more batches", further).await;
}

/// A seeded cluster and a replica that has half of its peer's backup.
async fn half_restored_replica(
    buffer_bytes_max: u64,
) -> (SeededCluster, Node, Throttle, InProcessNode) {
    let cluster = SeededCluster::with_rows(3000).await;
    let throttle = Throttle::without_target(u64::MAX).await;
    let first = cluster.start_first_behind(&throttle).await;
    throttle.set_limit(fetch_backup(&first).await.len() as u64 / 2);
    let late = replica_with_buffer(&cluster.broker, buffer_bytes_max).await;
    throttle.wait_until_limited(1).await;
    (cluster, first, throttle, late)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_trimmed_during_a_restore_is_noticed_and_the_replica_bootstraps_again() {
    let (mut cluster, first, throttle, late) = half_restored_replica(1).await;
    // More than the buffer and the messages that NATS sends ahead.
    publish(&cluster.broker, 3000).await;
    cluster.reference.read(&cluster.broker.client().await).await;
    let context = cluster.broker.client().await;
    let stream = context.get_stream(STREAM).await.unwrap();
    let config = Config {
        max_messages: 10,
        ..stream.cached_info().config.clone()
    };
    context.update_stream(config).await.unwrap();
    let trimmed = context.get_stream(STREAM).await.unwrap();
    assert_eq!(trimmed.cached_info().state.messages, 10);
    let (batches, _) = buffered(&assert_serves_nothing(&late, &["restoring"]).await);
    assert!((1..=BATCHES_PER_READ).contains(&batches), "{batches}");

    throttle.remove_limit();
    cluster.check(&[&first, &late], &[]).await;
    assert_eq!(late.metric("gradestore_resyncs_total").await, Some(1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_during_a_restore_do_not_exceed_the_buffer() {
    const BYTES_MAX: u64 = 16 * 1024;
    let (mut cluster, first, throttle, late) = half_restored_replica(BYTES_MAX).await;
    let load = Load::start(&[&first], 500, usize::MAX);
    let full = |status: &Value| buffered(status).1 >= BYTES_MAX;
    late.status_where("a full buffer", full).await;
    wait_for_batches(&first, 50).await;
    let status = assert_serves_nothing(&late, &["restoring"]).await;
    let (batches, bytes) = buffered(&status);
    let largest = 3 * (bytes / batches);
    assert!(bytes < BYTES_MAX + BATCHES_PER_READ * largest, "{bytes}");
    // The log grows by as much again, and the buffer does not.
    wait_for_batches(&first, batches).await;
    let status = late.status().await;
    assert_eq!(buffered(&status), (batches, bytes));

    throttle.remove_limit();
    late.in_state("ready").await;
    let answered = load.stop().await;
    cluster.check(&[&first, &late], &answered).await;
    let status = late.status().await;
    assert_eq!(buffered(&status), (0, 0));
    assert_eq!(late.metric("gradestore_resyncs_total").await, Some(0.0));
}
