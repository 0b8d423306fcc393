//! Histories of real replicas under faults, checked for linearizability.
//!
//! Clients set, delete and read a few users on three replicas, and record the invocation, the
//! return and the result of each operation. Two checks follow.
//!
//! **One replica is linearizable for each user** ([`checker`]), over all its restarts. An
//! acknowledged write took effect before it returned; a rejected one never did; one without a
//! response may take effect at any time, or never. Writes to other replicas count as such writes
//! too: a replica may learn of them at any time after their invocation. A replica that restarts
//! serves nothing before it holds all that it acknowledged, so no client sees it go back. The
//! cluster as a whole is *not* linearizable: a replica that lags answers a plain read with an older
//! state.
//!
//! A replica's responses alone would allow an order of its own. **The order of the log explains all
//! histories** ([`order`]): each write is in the log at most once, at its acknowledged position,
//! and after all writes that were acknowledged before it was invoked. A replica always serves a
//! prefix of the log that never shrinks. A read with `Grade-Position` sees all up to that position
//! on any replica. The positions of one client increase.

mod checker;
mod checker_tests;
mod cluster;
mod history;
mod order;
mod order_tests;

use rustix::process::Signal;

use self::cluster::{DURABLE, RecordedCluster};
use self::history::REPLICAS;
use crate::harness::cluster::proxy::Rules;

#[tokio::test(flavor = "multi_thread")]
async fn killed_and_restarted_replicas_never_go_back() {
    let mut cluster = RecordedCluster::start().await;
    // One has a snapshot, the others start without data.
    for replica in [0, DURABLE, 1, DURABLE] {
        cluster.wait_for_responses(None).await;
        cluster.kill(replica);
        cluster.wait_for_responses(None).await;
        // Its snapshot is old, and newer batches arrive late.
        cluster.proxies[replica].set(Rules {
            hold_batches: true,
            ..Rules::default()
        });
        cluster.launch(replica).await;
        cluster.wait_for_responses(None).await;
        cluster.proxies[replica].set(Rules::default());
        cluster.wait_for_responses(Some(replica)).await;
    }
    cluster.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_broker_changes_no_order() {
    let mut cluster = RecordedCluster::start().await;
    for _ in 0..4 {
        cluster.wait_for_writes_of_all().await;
        cluster.wait_for_responses(None).await;
        cluster.broker.kill();
        cluster.wait_for_responses(None).await;
        cluster.broker.restart().await;
    }
    cluster.wait_for_writes_of_all().await;
    cluster.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frozen_replicas_continue_where_they_stopped() {
    let cluster = RecordedCluster::start().await;
    for replica in 0..REPLICAS {
        cluster.node(replica).signal(Signal::STOP);
        for other in (0..REPLICAS).filter(|other| *other != replica) {
            cluster.wait_for_responses(Some(other)).await;
        }
        cluster.node(replica).signal(Signal::CONT);
        cluster.wait_for_responses(Some(replica)).await;
    }
    cluster.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_and_delayed_messages_change_no_order() {
    let cluster = RecordedCluster::start().await;
    let none = Rules::default();
    let all = [
        Rules {
            drop_requests: true,
            ..none
        },
        Rules {
            drop_replies: true,
            ..none
        },
        Rules {
            hold_batches: true,
            ..none
        },
        Rules {
            drop_acks: true,
            ..none
        },
        Rules {
            drop_batches: true,
            ..none
        },
    ];
    for (round, rules) in all.into_iter().enumerate() {
        let replica = round % REPLICAS;
        cluster.wait_for_responses(Some(replica)).await;
        cluster.proxies[replica].set(rules);
        cluster
            .wait_for_responses(Some((replica + 1) % REPLICAS))
            .await;
        cluster.proxies[replica].set(none);
    }
    for proxy in &cluster.proxies {
        proxy.cut();
    }
    cluster.wait_for_writes_of_all().await;
    cluster.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trimmed_log_is_not_served_across_the_gap() {
    let mut cluster = RecordedCluster::start().await;
    cluster.wait_for_responses(None).await;
    // One replica is disconnected and one is stopped while the batches that they need are trimmed.
    cluster.kill(1);
    let dead = Rules {
        drop_requests: true,
        drop_replies: true,
        ..Rules::default()
    };
    cluster.proxies[0].set(dead);
    cluster.proxies[0].cut();
    for _ in 0..2 {
        cluster.wait_for_responses(Some(DURABLE)).await;
    }
    cluster.trim_beyond(0).await;
    cluster.proxies[0].set(Rules::default());
    cluster.launch(1).await;
    for replica in 0..REPLICAS {
        cluster.wait_for_responses(Some(replica)).await;
    }
    let resyncs = cluster.node(0).metric("gradestore_resyncs_total").await;
    assert_eq!(resyncs, Some(1.0));
    cluster.check().await;
}
