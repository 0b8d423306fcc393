//! Histories of real replicas under faults, and what they may say.
//!
//! Many clients set, delete and read few users at three replicas; each request is kept with when it
//! began and ended and what came of it. What must then be true is said twice, once by each replica's own answers and
//! once by the log.
//!
//! **One replica is linearizable, user by user** ([`checker`]). The operations that went to it, in
//! all its lives, can be told as if each had happened at one moment between its beginning and its
//! end. A write that it answered has happened by then; one that it refused never does; one without
//! an answer may at any time, or never. So may the writes that other replicas were sent: nothing is
//! promised of when a replica hears of them, only that nobody can see them before they are sent. A
//! replica that starts again shows nothing before it holds all that was answered, so this goes
//! across its lives: no client sees it go back. It is *not* true of all replicas together: one that
//! is behind answers a plain read with what it has.
//!
//! The replica's answers alone would be content with an order of its own. **The log's order is one
//! in which everything makes sense** ([`order`]): each write is there once or not at all, where its
//! answer said, and behind what was answered before it began; a replica shows a beginning of the
//! log that never gets shorter, whomever it answers; a read with `Grade-Position` holds all up to
//! there on any replica, so clients read their own writes; and positions only grow.

mod checker;
mod checker_tests;
mod cluster;
mod history;
mod order;
mod order_tests;

use rustix::process::Signal;

use self::cluster::{KEEPS, RecordedCluster};
use self::history::REPLICAS;
use crate::harness::cluster::proxy::Rules;

/// So many answers between two faults.
const SOME: usize = 100;

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_are_killed_and_begin_again_never_go_back() {
    let mut cluster = RecordedCluster::start().await;
    // One has a snapshot, the others begin from nothing.
    for replica in [0, KEEPS, 1, KEEPS] {
        cluster.clients.wait_for_responses(None, SOME).await;
        cluster.kill(replica);
        cluster.clients.wait_for_responses(None, SOME).await;
        // What it begins from is old, and what came since is slow to arrive.
        cluster.proxies[replica].set(Rules {
            hold_batches: true,
            ..Rules::default()
        });
        cluster.launch(replica).await;
        cluster.clients.wait_for_responses(None, SOME).await;
        cluster.proxies[replica].set(Rules::default());
        cluster
            .clients
            .wait_for_responses(Some(replica), SOME)
            .await;
    }
    cluster.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_killed_changes_no_order() {
    let mut cluster = RecordedCluster::start().await;
    for _ in 0..4 {
        cluster.all_write().await;
        cluster.clients.wait_for_responses(None, SOME).await;
        cluster.broker.kill();
        cluster.clients.wait_for_responses(None, SOME).await;
        cluster.broker.restart().await;
    }
    cluster.all_write().await;
    cluster.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_stand_still_go_on_where_they_were() {
    let cluster = RecordedCluster::start().await;
    for replica in 0..REPLICAS {
        cluster.node(replica).signal(Signal::STOP);
        for other in (0..REPLICAS).filter(|other| *other != replica) {
            cluster.clients.wait_for_responses(Some(other), SOME).await;
        }
        cluster.node(replica).signal(Signal::CONT);
        cluster
            .clients
            .wait_for_responses(Some(replica), SOME)
            .await;
    }
    cluster.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_lose_or_delay_words_change_no_order() {
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
        cluster
            .clients
            .wait_for_responses(Some(replica), SOME)
            .await;
        cluster.proxies[replica].set(rules);
        cluster
            .clients
            .wait_for_responses(Some((replica + 1) % REPLICAS), SOME)
            .await;
        cluster.proxies[replica].set(none);
    }
    for proxy in &cluster.proxies {
        proxy.cut();
    }
    cluster.all_write().await;
    cluster.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_forgets_what_a_replica_needs_is_not_served_across() {
    let mut cluster = RecordedCluster::start().await;
    cluster.clients.wait_for_responses(None, SOME).await;
    // One is cut off, one is not there: what they lack is soon forgotten.
    cluster.kill(1);
    let dead = Rules {
        drop_requests: true,
        drop_replies: true,
        ..Rules::default()
    };
    cluster.proxies[0].set(dead);
    cluster.proxies[0].cut();
    cluster
        .clients
        .wait_for_responses(Some(KEEPS), 2 * SOME)
        .await;
    cluster.trim_beyond(0).await;
    cluster.proxies[0].set(Rules::default());
    cluster.launch(1).await;
    for replica in 0..REPLICAS {
        cluster
            .clients
            .wait_for_responses(Some(replica), SOME)
            .await;
    }
    let resyncs = cluster.node(0).metric("gradestore_resyncs_total").await;
    assert_eq!(resyncs, Some(1.0));
    cluster.check().await;
}
