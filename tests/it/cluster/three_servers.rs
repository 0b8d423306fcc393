//! A stream with three replicas on three servers: writes, reads and readiness while servers die,
//! freeze or are isolated.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_nats::jetstream::Context;
use futures_util::TryStreamExt;
use tokio::task::{JoinHandle, JoinSet};

use crate::cluster::write_health::{wait_until_not_writable, wait_until_writable};
use crate::harness::cluster::broker::{AckedWrite, Load, STREAM, Write, check};
use crate::harness::cluster::nats::{Gossip, NatsCluster};
use crate::harness::cluster::throttle::Throttle;
use crate::harness::wire::{Response, eventually, with_timeout};
use crate::harness::{Node, Ports};

const RECONNECTS: &str = "gradestore_log_reconnects_total";
/// Of one replica for one leader change.
const RECONNECTS_MAX: f64 = 10.0;
const LOG_LINES_MAX: usize = 30;
/// After the stream has a leader again.
const PROGRESS_MAX: Duration = Duration::from_secs(20);
/// From when an isolated server is back until every replica is ready.
const RECOVERED_MAX: Duration = Duration::from_secs(60);

/// One write every 5 ms, round robin over the replicas, whether or not earlier writes were
/// acknowledged.
struct SteadyLoad {
    stop: Arc<AtomicBool>,
    /// Stops when dropped.
    writing: JoinSet<Vec<Sent>>,
}

/// A write and its response.
struct Sent {
    at: Instant,
    took: Duration,
    write: Write,
    response: Response,
}

const WRITE_EVERY: Duration = Duration::from_millis(5);

impl SteadyLoad {
    fn start(nodes: &[&Node]) -> Self {
        let ports: Vec<Ports> = nodes.iter().map(|node| (**node).clone()).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let mut writing = JoinSet::new();
        writing.spawn(write_steadily(ports, Arc::clone(&stop)));
        Self { stop, writing }
    }

    async fn stop(mut self) -> Vec<Sent> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = with_timeout("the end of the writers", self.writing.join_next()).await;
        ended.unwrap().unwrap()
    }
}

async fn write_steadily(ports: Vec<Ports>, stop: Arc<AtomicBool>) -> Vec<Sent> {
    let mut writes = JoinSet::new();
    let mut interval = tokio::time::interval(WRITE_EVERY);
    for count in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        interval.tick().await;
        let node = ports[count % ports.len()].clone();
        let write = Write {
            user: format!("user-{}", count % 50),
            field: count % 4,
            value: count as i64,
        };
        writes.spawn(async move {
            let at = Instant::now();
            let response = node.set(write.json()).await;
            Sent {
                at,
                took: at.elapsed(),
                write,
                response,
            }
        });
    }
    writes.join_all().await
}

/// Polls the largest number of consumers that the stream has at one time.
struct ConsumersWatch(JoinHandle<usize>, Arc<AtomicBool>);

impl ConsumersWatch {
    fn start(client: Context) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let watch = async move {
            let mut max = 0;
            while !stopped.load(Ordering::Relaxed) {
                if let Ok(stream) = client.get_stream_no_info(STREAM).await
                    && let Ok(names) = stream.consumer_names().try_collect::<Vec<_>>().await
                {
                    max = max.max(names.len());
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            max
        };
        Self(tokio::spawn(watch), stop)
    }

    async fn max(self) -> usize {
        self.1.store(true, Ordering::Relaxed);
        with_timeout("the consumers' names", self.0).await.unwrap()
    }
}

/// Waits until each node has applied this many more batches.
async fn wait_for_batches(nodes: &[&Node], more: f64) {
    for node in nodes {
        let position = "gradestore_log_position";
        let before = node.metric(position).await.unwrap_or(0.0);
        eventually("batches applied", async || {
            (node.metric(position).await? >= before + more).then_some(())
        })
        .await;
    }
}

async fn wait_until_all_ready(nodes: &[&Node]) {
    for node in nodes {
        node.in_state("ready").await;
    }
}

/// How the stream leader's server goes away.
#[derive(Debug, Clone, Copy)]
enum ServerExit {
    Killed,
    Terminated,
    LameDuck,
}

/// Stops the server of the stream leader and starts it again; returns what the replicas did wrong.
async fn fail_over(cluster: &mut NatsCluster, nodes: &[&Node], exit: ServerExit) -> Vec<String> {
    let mut wrong = Vec::new();
    let leader = cluster.leader_with_current_followers().await;
    let before = reconnects_and_log_lines(nodes).await;
    let survivor = cluster.other_than(&[leader]);
    let consumers = ConsumersWatch::start(cluster.client_of(survivor).clone());
    match exit {
        ServerExit::Killed => cluster.kill(leader),
        ServerExit::Terminated => cluster.end(leader).await,
        ServerExit::LameDuck => cluster.lame_duck(leader),
    }
    cluster.leader().await;
    if tokio::time::timeout(PROGRESS_MAX, wait_for_batches(nodes, 20.0))
        .await
        .is_err()
    {
        wrong.push(format!("{exit:?}: writes do not continue at every replica"));
    }
    let after = reconnects_and_log_lines(nodes).await;
    for (index, (before, after)) in before.into_iter().zip(after).enumerate() {
        let (reconnects, lines) = (after.0 - before.0, after.1 - before.1);
        if reconnects > RECONNECTS_MAX || lines > LOG_LINES_MAX {
            wrong.push(format!(
                "{exit:?}: replica {index}: {reconnects} reconnects, {lines} log lines"
            ));
        }
    }
    let consumers = consumers.max().await;
    if consumers > nodes.len() {
        wrong.push(format!("{exit:?}: {consumers} consumers at one time"));
    }
    if matches!(exit, ServerExit::LameDuck) {
        cluster.kill(leader);
    }
    cluster.restart(leader).await;
    wrong
}

/// The failed writes after each exit of a server.
fn failed_writes(sent: &[Sent], exits: &[(ServerExit, Instant)]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (index, (exit, since)) in exits.iter().enumerate() {
        let until = exits.get(index + 1).map(|(_, until)| *until);
        let during = |sent: &&Sent| sent.at >= *since && until.is_none_or(|until| sent.at < until);
        let sent = sent.iter().filter(during);
        let failed = sent.clone().filter(|sent| sent.response.status != 204);
        if let Some(first) = failed.clone().next() {
            let longest = sent.clone().map(|sent| sent.took).max();
            let (count, all, body) = (failed.count(), sent.count(), &first.response.body);
            wrong.push(format!(
                "{exit:?}: {count} of {all} writes failed, longest {longest:?}, first: {body}"
            ));
        }
    }
    wrong
}

/// A failover delays writes and fails none. Two of the replicas know only the first server that
/// dies.
#[tokio::test(flavor = "multi_thread")]
async fn writes_wait_during_a_leader_election_and_are_stored_after_it() {
    let mut cluster = NatsCluster::start().await;
    let replica = async |cluster: &NatsCluster, name, url: &str| {
        let mut command = cluster.replica_at(name, url);
        // Longer than an election on a busy machine.
        Node::start_with(command.args(["--write-timeout", "60s"])).await
    };
    let a = replica(&cluster, "a", &cluster.url()).await;
    let leader = cluster.leader_with_current_followers().await;
    let only_leader = cluster.servers[leader].url();
    let b = replica(&cluster, "b", &only_leader).await;
    let c = replica(&cluster, "c", &only_leader).await;
    let nodes = [&a, &b, &c];
    let load = SteadyLoad::start(&nodes);
    wait_for_batches(&nodes, 20.0).await;

    // All failures, so that the report is complete.
    let mut wrong = Vec::new();
    let mut exits = Vec::new();
    for exit in [
        ServerExit::Killed,
        ServerExit::Terminated,
        ServerExit::LameDuck,
    ] {
        exits.push((exit, Instant::now()));
        wrong.extend(fail_over(&mut cluster, &nodes, exit).await);
    }
    let sent = load.stop().await;
    wrong.extend(failed_writes(&sent, &exits));
    assert!(wrong.is_empty(), "{wrong:#?}");

    let answered = sent.into_iter().map(|sent| AckedWrite {
        position: sent.response.position(),
        write: sent.write.into(),
    });
    let answered: Vec<AckedWrite> = answered.collect();
    cluster.leader_with_current_followers().await;
    wait_until_all_ready(&nodes).await;
    check(&cluster.client().await, &nodes, &answered).await;
}

/// Reconnects and log lines of each replica.
async fn reconnects_and_log_lines(nodes: &[&Node]) -> Vec<(f64, usize)> {
    let mut all = Vec::new();
    for node in nodes {
        let reconnects = node.metric(RECONNECTS).await.unwrap();
        all.push((reconnects, node.stderr.lock().lines().count()));
    }
    all
}

/// An isolated server answers with its old state. No replica may take its end for the end of the
/// log, neither a running nor a starting one.
#[tokio::test(flavor = "multi_thread")]
async fn replicas_reading_from_an_isolated_server_recover_once_it_is_back() {
    let mut cluster = NatsCluster::start_with(Gossip::Nothing, "").await;
    let ways = [
        Throttle::without_target(u64::MAX).await,
        Throttle::without_target(u64::MAX).await,
    ];
    let set_target = |index: usize, cluster: &NatsCluster| {
        for way in &ways {
            way.cut();
            way.set_target(cluster.servers[index].address);
        }
    };
    set_target(0, &cluster);
    let through = |way: &Throttle| format!("nats://{}", way.address);
    let a = Node::start_with(&mut cluster.replica_at("a", &cluster.servers[0].url())).await;
    let b = Node::start_with(&mut cluster.replica_at("b", &through(&ways[0]))).await;
    let mut third = cluster.replica_at("c", &through(&ways[1]));
    let c = Node::start_with(&mut third).await;
    let load = Load::start(&[&a], 20, usize::MAX);
    wait_for_batches(&[&a, &b, &c], 20.0).await;

    let leader = cluster.leader_with_current_followers().await;
    let isolated = cluster.other_than(&[0, leader]);
    cluster.isolate(isolated);
    wait_for_batches(&[&a, &b, &c], 100.0).await;
    c.stop().await;
    let connections = ways.each_ref().map(Throttle::connections);
    set_target(isolated, &cluster);
    let mut printed = serde_json::Value::Null;
    let seen_and_healed = async {
        b.status_where("not ready for writes", |status| status["state"] != "ready")
            .await;
        for (way, before) in ways.iter().zip(connections) {
            eventually("a connection to the isolated server", async || {
                (way.connections() > before).then_some(())
            })
            .await;
        }
        wait_for_batches(&[&a], 200.0).await;
        printed = b.status().await;
        cluster.heal(isolated);
    };
    let (c, ()) = tokio::join!(Node::launch(&mut third), seen_and_healed);
    let mut states = Vec::new();
    let wait_until_all_ready = async {
        loop {
            states.clear();
            for node in [&a, &b, &c] {
                states.push(node.status().await);
            }
            if states.iter().all(|status| status["state"] == "ready") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(RECOVERED_MAX, wait_until_all_ready)
        .await
        .is_err()
    {
        panic!("not all ready again: {states:#?}; while the server was isolated: {printed}");
    }
    let answered = load.stop().await;
    check(&cluster.client().await, &[&a, &b, &c], &answered).await;
}

/// With two of three servers dead or frozen no batch is stored, and the replica reports it.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_not_writable_without_a_quorum() {
    const WRITE_TIMEOUT: Duration = Duration::from_secs(3);
    let mut cluster = NatsCluster::start().await;
    let mut command = cluster.replica("a");
    let a = Node::start_with(command.args(["--write-timeout", "3s"])).await;
    a.set(r#"{"user_id":"x","spp":1}"#).await.position();
    let leader = cluster.leader_with_current_followers().await;
    let lost = [0, 1, 2].map(|index| (leader + index) % 3);

    // The leader and a follower die.
    for index in &lost[..2] {
        cluster.kill(*index);
    }
    let reason = wait_until_not_writable(&a, WRITE_TIMEOUT + Duration::from_secs(2)).await;
    assert!(reason.contains("no leader"), "{reason}");
    assert_eq!(a.get("x").await.status, 200);
    for index in &lost[..2] {
        cluster.restart(*index).await;
    }
    cluster.wait_until_writable().await;
    wait_until_writable(&a).await;

    // Both followers freeze.
    let leader = cluster.leader_with_current_followers().await;
    let lost = [1, 2].map(|index| (leader + index) % 3);
    for index in lost {
        cluster.freeze(index);
    }
    let reason = wait_until_not_writable(&a, WRITE_TIMEOUT + Duration::from_secs(2)).await;
    assert!(reason.contains("leader"), "{reason}");
    for index in lost {
        cluster.thaw(index);
    }
    cluster.wait_until_writable().await;
    wait_until_writable(&a).await;
    a.set(r#"{"user_id":"x","spp":2}"#).await.position();
}
