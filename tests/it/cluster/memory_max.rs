//! `--memory-max` in a cluster: all replicas refuse new users while one of them is full.

use crate::harness::Node;
use crate::harness::cluster::broker::{Broker, SUBJECT, replica_at};
use crate::harness::wire::{Response, eventually, with_timeout};
use crate::ops::memory_max::{
    HEADROOM_BYTES, USERS, create, fill, idle_bytes, is_full, limited, lines,
};

/// Adds users through `node` until `peer` is full; returns their number and how `node` then rejects
/// another. Looks at the peer after each request: `node` learns of it only seconds later, and a fast
/// machine would add more users until then than the deletes below make up for.
async fn fill_peer(node: &Node, peer: &Node) -> (usize, Response) {
    let mut users = 0;
    loop {
        let response = node.set_lines(lines(users..users + USERS)).await;
        users += response.json()["accepted"].as_u64().unwrap() as usize;
        let applied = node.status().await["position"].as_u64().unwrap();
        if is_full(&peer.ready_at(applied).await) {
            break;
        }
    }
    node.status_where("no creates", |status| status["creates"] == false)
        .await;
    (users, create(node, "new").await)
}

#[tokio::test(flavor = "multi_thread")]
async fn all_replicas_reject_new_users_while_a_ready_peer_is_full() {
    let max_bytes = idle_bytes().await + HEADROOM_BYTES;
    let broker = Broker::start().await;
    let smallest = Node::start_with(limited(&mut replica_at(broker.address), max_bytes)).await;
    let small = Node::start_with(limited(&mut replica_at(broker.address), 8 * max_bytes)).await;
    let large = broker.replica().await;
    let nodes = [&smallest, &small, &large];

    // Through the largest replica, which can only know from the smallest one.
    let (users, refusal) = fill_peer(&large, &smallest).await;
    let detail = refusal.expect_problem(507, "store-full");
    let url = format!("http://{}", smallest.write);
    assert!(detail.contains(&url), "{detail}");
    for node in nodes {
        node.status_where("no creates", |status| status["creates"] == false)
            .await;
        create(node, "new").await.expect_problem(507, "store-full");
        create(node, "user-1").await.position();
    }
    let [full, ..] = nodes.map(|node| async { node.status().await });
    assert!(is_full(&full.await));
    let status = large.status().await;
    assert_eq!(status["full"], false);
    let peers = status["peers"].as_array().unwrap();
    let full: Vec<_> = peers.iter().filter(|peer| peer["full"] == true).collect();
    assert_eq!(full.len(), 1, "{peers:?}");
    assert_eq!(full[0]["url"], url);

    // Limits do not apply to the log: all replicas apply the same batches.
    let position = create(&large, "user-2").await.position();
    let mut digests = Vec::new();
    for node in nodes {
        digests.push(node.ready_at(position).await["digest"].clone());
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]));
    assert_eq!(large.ready_at(position).await["records"], users);

    // Deletes free memory on all replicas. Nearly all users are deleted: on a busy machine many are
    // added before the writer learns that a replica is full.
    let client = broker.client().await;
    for first in (0..users / 10 * 9).step_by(1000) {
        let delete = |user| format!(r#"{{"delete":"user-{user}"}}"#);
        let deletes: Vec<String> = (first..first + 1000).map(delete).collect();
        let payload = format!("[{}]", deletes.join(","));
        let published = client.publish(SUBJECT, payload.into());
        with_timeout("an ack", async { published.await.unwrap().await })
            .await
            .unwrap();
    }
    for (number, node) in nodes.into_iter().enumerate() {
        let new = format!("new-{number}");
        let position = eventually("a new user", async || {
            let response = create(node, &new).await;
            (response.status == 204).then(|| response.position())
        })
        .await;
        assert_eq!(smallest.get_at(&new, position).await["spp"], 1);
    }
    let status = smallest
        .status_where("not full", |status| status["full"] == false)
        .await;
    assert!(status["memory_used_bytes"].as_u64() < status["memory_bytes"].as_u64());

    // A peer that is gone does not count.
    fill(&small, users).await;
    large
        .status_where("no creates", |status| status["creates"] == false)
        .await;
    create(&large, "newer")
        .await
        .expect_problem(507, "store-full");
    smallest.kill();
    eventually("a new user", async || {
        (create(&large, "newer").await.status == 204).then_some(())
    })
    .await;
}
