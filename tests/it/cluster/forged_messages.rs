//! Forged votes and announcements by other clients of NATS have no effect.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_nats::HeaderMap;
use bytes::Bytes;
use futures_util::StreamExt;
use gradestore::log::{Announcement, Chain, ClusterKey, Mac, RandomId, message};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::cluster::divergence::{
    IN_DOUBT, replica_with_frequent_votes, replicas_with_frequent_votes, start_with_dir,
};
use crate::cluster::stream_creation::{replica_expecting_two, replica_with_data};
use crate::harness::cluster::broker::{Broker, STREAM, SUBJECT};
use crate::harness::wire::eventually;
use crate::harness::{Node, PASSWORD, Ports};

const ASK_ALL: &str = "gradestore.status.all";
const REJECTED: &str = "gradestore_votes_rejected_total";
const DIVERGENCES: &str = "gradestore_divergences_total";

/// Publishes an empty batch with a checkpoint, as any client of NATS may.
async fn publish_checkpoint(broker: &Broker, checkpoint: &str) {
    let client = broker.client().await;
    let mut headers = HeaderMap::new();
    headers.insert("Grade-Checkpoint", checkpoint);
    let sent = client.publish_with_headers(SUBJECT, headers, "[]".into());
    sent.await.unwrap().await.unwrap();
}

/// Waits until a metric has at least this value.
async fn wait_for_at_least(node: &Ports, name: &str, value: f64) {
    eventually(name, async || {
        node.metric(name).await.filter(|now| *now >= value)
    })
    .await;
}

/// The words of a replica's vote in the stream.
async fn find_vote(broker: &Broker) -> Vec<String> {
    let client = broker.client().await;
    let mut stream = client.get_stream(STREAM).await.unwrap();
    eventually("a vote", async || {
        let end = stream.info().await.unwrap().state.last_sequence;
        for seq in (1..=end).rev() {
            let message = stream.get_raw_message(seq).await.unwrap();
            let Some(text) = message.headers.get("Grade-Checkpoint") else {
                continue;
            };
            let words: Vec<String> = text.as_str().split(' ').map(str::to_owned).collect();
            if words[1] != "0" {
                return Some(words);
            }
        }
        None
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_votes_do_not_change_readiness_even_after_a_restart() {
    let broker = Broker::start().await;
    let [a, b] = replicas_with_frequent_votes(&broker).await;
    a.set(r#"{"user_id":"x","spp":1}"#).await.position();
    // A replica with a snapshot from before the votes.
    let dir = tempfile::tempdir().unwrap();
    start_with_dir(&broker, &dir).await.stop().await;
    let vote = find_vote(&broker).await;
    let forge = |replica: &str, round: u32, mac: &str| {
        let [position, chain] = [&vote[1], &vote[2]];
        let digest = "0123456789abcdef0123456789abcdef";
        format!("{replica} {position} {chain} {digest} {round} {mac}")
    };
    // Unknown replicas with no signature, with the signature of another vote and with that of
    // another password; and an altered vote.
    let mut forged = Vec::new();
    for forger in 1..=4_u128 {
        let replica = RandomId::of(forger).to_string();
        for round in 1..=5 {
            forged.push(forge(&replica, round, &Mac::default().to_string()));
            forged.push(forge(&replica, round, &vote[5]));
        }
        let status = a.status().await;
        let log = gradestore::log::LogId(status["log_id"].as_str().unwrap().into());
        let mut headers = HeaderMap::new();
        headers.insert("Grade-Checkpoint", forged[0].as_str());
        let (label, _) = message::read(Some(&headers), b"[]", &Default::default()).unwrap();
        let guessed = ClusterKey::derive("guessed");
        let mac = guessed.sign_checkpoint(&log, &label.checkpoint.unwrap());
        forged.push(forge(&replica, 1, &mac.to_string()));
    }
    forged.push(forge(&vote[0], 5, &vote[5]));
    for text in &forged {
        publish_checkpoint(&broker, text).await;
    }
    for text in [
        "",
        "x",
        "0 0",
        &vote[..5].join(" "),
        &forged[0].replace(' ', "  "),
    ] {
        publish_checkpoint(&broker, text).await;
    }
    let written = b.set(r#"{"user_id":"x","spp":2}"#).await.position();
    // This write follows all votes, and the replica with the snapshot replays them.
    let c = start_with_dir(&broker, &dir).await;
    for node in [&a, &b, &c] {
        assert_eq!(node.get_at("x", written).await["spp"], 2);
        assert_eq!(node.metric(DIVERGENCES).await, Some(0.0));
        assert_eq!(
            node.metric("gradestore_log_poisoned_total").await,
            Some(0.0)
        );
        assert_eq!(node.ops("/readyz").await.status, 200);
        let logged = node.stderr.lock().clone();
        assert!(!logged.contains(IN_DOUBT), "{logged}");
        assert_eq!(node.metric(REJECTED).await, Some(forged.len() as f64));
        // Only some of them are logged.
        let printed = "ignored a checkpoint that is not signed";
        let lines = logged.matches(printed).count();
        assert!((1..forged.len()).contains(&lines), "{logged}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn votes_with_another_password_are_ignored() {
    let broker = Broker::start().await;
    let [a] = replicas_with_frequent_votes(&broker).await;
    let mut command = replica_with_frequent_votes(&broker);
    let other = Node::start_with(command.env("GRADESTORE_PASSWORD", "other")).await;
    a.set(r#"{"user_id":"x","spp":1}"#).await.position();
    for node in [&a, &other] {
        wait_for_at_least(node, REJECTED, 1.0).await;
        wait_for_at_least(node, "gradestore_announcements_rejected_total", 1.0).await;
        let status = node.status().await;
        assert_eq!(status["peers"], json!([]));
    }
}

/// Responds to all queries for announcements, given their nonces, until it is dropped.
pub(crate) async fn respond_to_queries(
    broker: &Broker,
    mut responses: impl FnMut(&str) -> Vec<Bytes> + Send + 'static,
) -> JoinSet<()> {
    let client = broker.client().await.client();
    let mut questions = client.subscribe(ASK_ALL).await.unwrap();
    client.flush().await.unwrap();
    let mut respond_to_queries = JoinSet::new();
    respond_to_queries.spawn(async move {
        while let Some(question) = questions.next().await {
            for response in responses(str::from_utf8(&question.payload).unwrap()) {
                let inbox = question.reply.clone().unwrap();
                client.publish(inbox, response).await.unwrap();
            }
        }
    });
    respond_to_queries
}

/// Responds to queries for announcements, and counts the connections to their URL.
async fn forger(
    broker: &Broker,
    announcements: Vec<Announcement>,
) -> (JoinSet<()>, Arc<AtomicUsize>) {
    let mut responses = Vec::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url: Box<str> = format!("http://{}", listener.local_addr().unwrap()).into();
    for mut announcement in announcements {
        announcement.url.clone_from(&url);
        responses.push(serde_json::to_vec(&announcement).unwrap().into());
    }
    let connections = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&connections);
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    let respond_to_queries = respond_to_queries(broker, move |_| responses.clone()).await;
    (respond_to_queries, connections)
}

fn unsigned_announcement(node: &str, log_id: &str, state: &str) -> Announcement {
    Announcement {
        node: node.into(),
        replica: node.into(),
        version: "0.1.0".into(),
        log_id: log_id.into(),
        url: "".into(),
        state: state.into(),
        position: 1 << 40,
        chain: Chain::default(),
        full: false,
        mac: Some(Mac::default()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forged_announcement_gets_no_password_and_hides_no_peer() {
    let broker = Broker::start().await;
    let [a] = broker.replicas().await;
    let written = a.set(r#"{"user_id":"x","spp":1}"#).await.position();
    let status = a.status().await;
    let [node, log_id] = ["node", "log_id"].map(|name| status[name].as_str().unwrap());
    // An unknown node, and the known one with another URL.
    let announcements = vec![
        unsigned_announcement("stranger", log_id, "ready"),
        unsigned_announcement(node, log_id, "ready"),
    ];
    let (_answering, connections) = forger(&broker, announcements).await;
    // It bootstraps from a peer, and would ask the one with the highest position first.
    let [b] = broker.replicas().await;
    assert_eq!(b.get_at("x", written).await["spp"], 1);
    wait_for_at_least(&b, "gradestore_announcements_rejected_total", 2.0).await;
    let url = format!("http://{}", a.write);
    let status = b
        .status_where("its peer", |status| status["peers"][0]["url"] == url)
        .await;
    assert_eq!(status["peers"].as_array().unwrap().len(), 1);
    assert_eq!(connections.load(Ordering::Relaxed), 0);
    let logged = b.stderr.lock().clone();
    let printed = "ignored an announcement that is not signed";
    assert_eq!(logged.matches(printed).count(), 1, "{logged}");
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_announcements_neither_prevent_nor_allow_stream_creation() {
    let broker = Broker::start_with(&[]).await;
    let holds_data = vec![unsigned_announcement("stranger", "some log", "ready")];
    let (prevents, _) = forger(&broker, holds_data).await;
    let dir = tempfile::tempdir().unwrap();
    let alone = Node::start_with(&mut replica_with_data(&broker, dir.path())).await;
    alone.kill();
    drop(prevents);

    let broker = Broker::start_with(&[]).await;
    let holds_none = vec![unsigned_announcement("stranger", "none", "starting")];
    let (_allows, _) = forger(&broker, holds_none).await;
    let dir = tempfile::tempdir().unwrap();
    let waiting = replica_expecting_two(&broker, dir.path());
    waiting.logs(&["ignored an announcement that is not"]).await;
    waiting.logs(&["1 of 2 replicas (--expect-peers)"]).await;
    let client = broker.client().await;
    client.get_stream(STREAM).await.unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replayed_announcement_is_rejected() {
    let broker = Broker::start_with(&[]).await;
    let client = broker.client().await;
    let dir = tempfile::tempdir().unwrap();
    let former = replica_expecting_two(&broker, &dir.path().join("former"));
    former.logs(&["1 of 2 replicas (--expect-peers)"]).await;
    let recorded = client.client().request(ASK_ALL, "recorded".into()).await;
    let recorded = recorded.unwrap().payload;
    let announcement: Announcement = serde_json::from_slice(&recorded).unwrap();
    assert_eq!(&*announcement.log_id, "none");
    let key = ClusterKey::derive(PASSWORD);
    assert!(key.verify_announcement(&announcement, "recorded"));
    drop(former);

    let _replaying = respond_to_queries(&broker, move |_| vec![recorded.clone()]).await;
    let waiting = replica_expecting_two(&broker, &dir.path().join("waiting"));
    waiting.logs(&["ignored an announcement that is not"]).await;
    waiting.logs(&["1 of 2 replicas (--expect-peers)"]).await;
    client.get_stream(STREAM).await.unwrap_err();
}
