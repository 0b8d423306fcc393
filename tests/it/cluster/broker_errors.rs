//! Errors that NATS returns to a replica, and foreign messages in the stream: the replica reports
//! the reason of NATS and continues with the next write.

use async_nats::HeaderMap;

use crate::harness::cluster::broker::{Broker, STREAM, SUBJECT, check, replica_with_data};
use crate::harness::cluster::nats::NatsServer;
use crate::harness::{Node, run};

/// Runs a replica that must refuse to start; returns its stderr.
fn refused_start(nats_url: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let output = run(&mut replica_with_data(nats_url, dir.path()));
    let printed = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{printed}");
    printed
}

/// A server with these permissions for its user `u`.
async fn server_that_denies(permissions: &str) -> (NatsServer, String) {
    let user = format!("{{ user: u, password: p, permissions: {permissions} }}");
    let server = NatsServer::start(&format!("authorization {{ users: [{user}] }}")).await;
    let url = server.url().replace("://", "://u:p@");
    (server, url)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_permission_at_the_start_is_named() {
    for (permissions, denied) in [
        (
            r#"{ publish: { deny: ["$JS.API.STREAM.CREATE.>"] } }"#,
            "$JS.API.STREAM.CREATE.GRADES",
        ),
        (r#"{ subscribe: { deny: ["_INBOX.>"] } }"#, "_INBOX."),
    ] {
        let (_server, url) = server_that_denies(permissions).await;
        let printed = tokio::task::spawn_blocking(move || refused_start(&url))
            .await
            .unwrap();
        let error = printed.lines().last().unwrap();
        for part in ["Permissions Violation", denied] {
            assert!(error.contains(part), "{printed}");
        }
    }
}

/// The replica then fetches messages one by one, which is slow.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_permission_to_pull_messages_is_logged_once() {
    const DENIED: &str = "$JS.API.CONSUMER.MSG.NEXT";
    let permissions = format!(r#"{{ publish: {{ deny: ["{DENIED}.>"] }} }}"#);
    let (_server, url) = server_that_denies(&permissions).await;
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start_with(&mut replica_with_data(url, dir.path())).await;
    for spp in 0..3 {
        node.set(format!(r#"{{"user_id":"x","spp":{spp}}}"#))
            .await
            .position();
    }
    let printed = node.stderr.lock().clone();
    let lines = printed.lines().filter(|line| line.contains(DENIED));
    assert_eq!(lines.count(), 1, "{printed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_max_payload_below_a_full_batch_stops_the_start_with_the_setting() {
    let server = NatsServer::start("max_payload: 65536").await;
    let url = server.url();
    let printed = tokio::task::spawn_blocking(move || refused_start(&url))
        .await
        .unwrap();
    let error = printed.lines().last().unwrap();
    for part in ["max_payload", "65536", "set"] {
        assert!(error.contains(part), "{printed}");
    }
}

/// A message with the id of the next batch makes the broker drop that batch as a duplicate.
#[tokio::test(flavor = "multi_thread")]
async fn a_guessed_message_id_costs_one_write() {
    let broker = Broker::start().await;
    let a = broker.replica().await;
    let client = broker.client().await;
    let mut before = 0;
    for round in 1..=3 {
        before = a
            .set(format!(r#"{{"user_id":"x","spp":{round}}}"#))
            .await
            .position();
        let stream = client.get_stream(STREAM).await.unwrap();
        let last = stream.get_raw_message(before).await.unwrap();
        let id = last.headers.get("Nats-Msg-Id").unwrap().as_str().to_owned();
        let (writer, sequence) = id.rsplit_once('-').unwrap();
        let next = sequence.parse::<u64>().unwrap() + 1;
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", format!("{writer}-{next}"));
        let sent = client
            .publish_with_headers(SUBJECT, headers, "[]".into())
            .await;
        assert!(!sent.unwrap().await.unwrap().duplicate);
        let refused = a.set(r#"{"user_id":"x","return_fee":1}"#).await;
        refused.expect_problem(503, "not-written");
    }
    let last = a
        .set(r#"{"user_id":"x","shipping_fee":5}"#)
        .await
        .position();
    assert!(last > before);
    let grade = a.get("x").await.json();
    assert_eq!(
        (&grade["spp"], &grade["return_fee"]),
        (&3.into(), &0.into())
    );
    let b = broker.replica().await;
    check(&client, &[&a, &b], &[]).await;
}
