//! Replicas discover each other through NATS and `--peer`.

use futures_util::StreamExt;
use gradestore::log::{Announcement, ClusterKey};
use serde_json::{Value, json};

use crate::harness::cluster::broker::{Broker, STREAM, replica_at};
use crate::harness::wire::{eventually, with_timeout};
use crate::harness::{Node, PASSWORD, Ports, program};

/// Waits until a node lists exactly these others as ready.
async fn wait_for_peers(node: &Ports, others: &[&Ports]) -> Value {
    let mut expected: Vec<String> = others.iter().map(|other| url(other)).collect();
    expected.sort();
    node.status_where("its peers", |status| {
        let peers = status["peers"].as_array().unwrap();
        let ready = peers.iter().filter(|peer| peer["state"] == "ready");
        let mut urls: Vec<_> = ready.map(|peer| peer["url"].as_str().unwrap()).collect();
        urls.sort_unstable();
        urls == expected && peers.len() == expected.len()
    })
    .await
}

fn url(node: &Ports) -> String {
    format!("http://{}", node.write)
}

#[tokio::test]
async fn replicas_list_each_other_and_drop_those_that_stopped() {
    let broker = Broker::start().await;
    let [a, b, c] = broker.replicas().await;
    let position = a.set(r#"{"user_id":"x","spp":1}"#).await.position();
    wait_for_peers(&b, &[&a, &c]).await;
    wait_for_peers(&c, &[&a, &b]).await;
    let status = a
        .status_where("peers at its position", |status| {
            let peers = status["peers"].as_array().unwrap();
            peers.len() == 2 && peers.iter().all(|peer| peer["position"] == position)
        })
        .await;
    let node = b.status().await["node"].clone();
    let peers = status["peers"].as_array().unwrap();
    let b_seen = peers.iter().find(|peer| peer["node"] == node).unwrap();
    assert_eq!(b_seen["url"], url(&b));
    assert_eq!(b_seen["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(a.metric("gradestore_peers_ready").await, Some(2.0));
    c.kill();
    wait_for_peers(&a, &[&b]).await;
    b.stop().await;
    wait_for_peers(&a, &[]).await;
}

#[tokio::test]
async fn the_tools_of_nats_see_the_replicas() {
    let broker = Broker::start().await;
    let [a] = broker.replicas().await;
    let position = a.set(r#"{"user_id":"x","spp":1}"#).await.position();
    let status = a.status().await;
    let client = broker.client().await.client();
    let nonce = "a nonce";
    let ask = async |subject: String| {
        let response = with_timeout(&subject, client.request(subject.clone(), nonce.into())).await;
        serde_json::from_slice::<Value>(&response.unwrap().payload).unwrap()
    };
    // Like `nats micro ls`, `info` and `stats`.
    let info = eventually("an answer", async || {
        let inbox = client.new_inbox();
        let mut responses = client.subscribe(inbox.clone()).await.unwrap();
        let asked = client.publish_with_reply("$SRV.INFO.gradestore", inbox, "".into());
        asked.await.unwrap();
        let response = with_timeout("an answer", responses.next()).await.unwrap();
        serde_json::from_slice::<Value>(&response.payload).ok()
    })
    .await;
    assert_eq!(info["name"], "gradestore");
    assert_eq!(info["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(info["metadata"]["url"], url(&a));
    assert_eq!(info["metadata"]["node"], status["node"]);
    assert_eq!(info["metadata"]["log"], status["log_id"]);
    assert_eq!(info["metadata"]["stream"], STREAM);
    let printed = json!({
        "node": status["node"],
        "version": env!("CARGO_PKG_VERSION"),
        "log_id": status["log_id"],
        "url": url(&a),
        "state": "ready",
        "position": position,
        "replica": status["replica"],
        "chain": status["chain"],
        "full": false,
    });
    let key = ClusterKey::derive(PASSWORD);
    let same = |mut announced: Value, is_signed: bool| {
        let signed: Announcement = serde_json::from_value(announced.clone()).unwrap();
        let verified = key.verify_announcement(&signed, nonce);
        assert_eq!(verified, is_signed, "{announced}");
        announced.as_object_mut().unwrap().remove("mac");
        assert_eq!(announced, printed);
    };
    let mut stats = ask("$SRV.STATS.gradestore".to_owned()).await;
    for endpoint in stats["endpoints"].as_array_mut().unwrap() {
        same(endpoint["data"].take(), false);
    }
    let replica = status["replica"].as_str().unwrap();
    for to in ["all", replica] {
        same(ask(format!("gradestore.status.{to}")).await, true);
    }
}

#[tokio::test]
async fn peers_are_rediscovered_after_the_broker_returns() {
    let mut broker = Broker::start().await;
    let [a, b] = broker.replicas().await;
    wait_for_peers(&a, &[&b]).await;
    broker.kill();
    wait_for_peers(&a, &[]).await;
    broker.restart().await;
    wait_for_peers(&a, &[&b]).await;
    wait_for_peers(&b, &[&a]).await;
}

#[tokio::test]
async fn a_configured_peer_is_listed_once() {
    let broker = Broker::start().await;
    let [a] = broker.replicas().await;
    let away = "http://127.0.0.1:1";
    let mut command = replica_at(broker.address);
    command.args(["--peer", away, "--peer", &url(&a)]);
    let b = Node::start_with(&mut command).await;
    let status = b
        .status_where("both", |status| {
            status["peers"].as_array().unwrap().len() == 2
        })
        .await;
    assert_eq!(status["peers"][0]["url"], url(&a));
    assert_eq!(status["peers"][0]["state"], "ready");
    assert_eq!(status["peers"][1]["url"], away);
    assert_eq!(status["peers"][1]["node"], Value::Null);
    let why = status["peers"][1]["state"].as_str().unwrap();
    assert!(why.contains("127.0.0.1:1"), "{why}");
}

#[tokio::test]
async fn a_replica_announces_its_reachable_url() {
    let broker = Broker::start().await;
    let mut command = replica_at(broker.address);
    command.args(["--advertise-url", "http://grades-0.example:8080/"]);
    let named = Node::start_with(&mut command).await;
    // A node that listens on all addresses announces the local address of its connection to NATS.
    let mut command = program();
    command.env("GRADESTORE_PASSWORD", PASSWORD);
    command.args(["--nats-url", &broker.address.to_string()]);
    command.args(["--write-addr", "0.0.0.0:0"]);
    command.args(["--read-addr", "127.0.0.1:0", "--ops-addr", "127.0.0.1:0"]);
    let everywhere = Node::start_with(&mut command).await;
    let port = everywhere.write.port();
    let status = named
        .status_where("the other", |status| {
            status["peers"].as_array().unwrap().len() == 1
        })
        .await;
    let reached = format!("http://127.0.0.1:{port}");
    assert_eq!(status["peers"][0]["url"], reached);
    let status = everywhere
        .status_where("the other", |status| {
            status["peers"].as_array().unwrap().len() == 1
        })
        .await;
    assert_eq!(status["peers"][0]["url"], "http://grades-0.example:8080");
}
