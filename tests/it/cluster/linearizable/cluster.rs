//! Three replicas, a proxy between each and NATS, and clients that record their operations.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::process::Command;

use async_nats::jetstream::stream::Config;
use futures_util::future::join_all;
use tempfile::TempDir;

use super::checker::{ChainEntry, Op, linearizable, minimal_history};
use super::history::{Operation, Outcome, REPLICAS, Record, Recorder, USERS, user_id};
use super::order::Order;
use crate::harness::Node;
use crate::harness::cluster::broker::{Broker, STREAM, replica_at, replica_with_data};
use crate::harness::cluster::proxy::Proxy;
use crate::harness::cluster::seeded::ReferenceState;
use crate::harness::wire::eventually;

/// The replica with a data directory.
pub(super) const DURABLE: usize = 2;

pub(super) struct RecordedCluster {
    pub(super) broker: Broker,
    pub(super) proxies: Vec<Proxy>,
    pub(super) clients: Recorder,
    nodes: Vec<Option<Node>>,
    reference: ReferenceState,
    dir: TempDir,
}

/// Responses between two faults.
const RESPONSES_BETWEEN_FAULTS: usize = 100;

impl RecordedCluster {
    /// Waits until one replica, or all of them, have returned enough successful responses for the
    /// next fault.
    pub(super) async fn wait_for_responses(&self, replica: Option<usize>) {
        self.clients
            .wait_for_responses(replica, RESPONSES_BETWEEN_FAULTS)
            .await;
    }

    pub(super) async fn start() -> Self {
        let (broker, dir) = (Broker::start().await, tempfile::tempdir().unwrap());
        let proxies = join_all((0..REPLICAS).map(|_| Proxy::to(broker.address))).await;
        let start =
            async |index: usize| Node::start_with(&mut command(&dir, &proxies, index)).await;
        let nodes = join_all((0..REPLICAS).map(start)).await;
        let clients = Recorder::start(nodes.iter().map(|node| (**node).clone()).collect());
        Self {
            broker,
            proxies,
            clients,
            nodes: nodes.into_iter().map(Some).collect(),
            reference: ReferenceState::new(),
            dir,
        }
    }

    pub(super) fn node(&self, index: usize) -> &Node {
        self.nodes[index].as_ref().expect("it was killed")
    }

    pub(super) fn kill(&mut self, index: usize) {
        self.nodes[index].take().expect("it was killed").kill();
    }

    /// Starts a replica again. Clients use it as soon as it listens, long before it is ready.
    pub(super) async fn launch(&mut self, index: usize) {
        let node = Node::launch(&mut command(&self.dir, &self.proxies, index)).await;
        self.clients.set_replica(index, &node);
        self.nodes[index] = Some(node);
    }

    /// Waits until each replica has acknowledged another write.
    pub(super) async fn wait_for_writes_of_all(&self) {
        for node in self.nodes.iter().flatten() {
            let patches = "gradestore_batch_duration_seconds_count";
            let before = node.metric(patches).await.unwrap_or(0.0);
            eventually("another acknowledged write", async || {
                (node.metric(patches).await? > before).then_some(())
            })
            .await;
        }
    }

    /// Trims the batches that a disconnected replica needs next.
    pub(super) async fn trim_beyond(&mut self, index: usize) {
        let status = self.node(index).status().await;
        let position = status["position"].as_u64().unwrap();
        self.reference.read(&self.broker.client().await).await;
        let context = self.broker.client().await;
        let mut stream = context.get_stream(STREAM).await.unwrap();
        let last = stream.info().await.unwrap().state.last_sequence;
        let config = stream.cached_info().config.clone();
        let kept = (last - position - 1) as i64;
        for max_messages in [kept, config.max_messages] {
            let changed = Config {
                max_messages,
                ..config.clone()
            };
            context.update_stream(changed).await.unwrap();
        }
        let first = stream.info().await.unwrap().state.first_sequence;
        assert!(first > position + 1, "{first}");
    }

    /// Stops the clients and checks the recorded history.
    pub(super) async fn check(mut self) {
        for node in self.nodes.iter().flatten() {
            eventually("ready", async || {
                (node.ops("/readyz/write").await.status == 200).then_some(())
            })
            .await;
        }
        let records = self.clients.stop().await;
        let nodes: Vec<_> = self.nodes.iter().flatten().map(|node| &**node).collect();
        let client = self.broker.client().await;
        self.reference.check(&client, &nodes, &[]).await;
        print_summary(&records);
        for replica in 0..REPLICAS {
            for user in 0..USERS {
                let history = history_of(&records, replica, user);
                if !linearizable(&history) {
                    panic!("{}", describe(&history, replica, user));
                }
            }
        }
        Order::new(&records, &self.reference.log).check();
    }
}

fn command(dir: &TempDir, proxies: &[Proxy], index: usize) -> Command {
    let address = proxies[index].address;
    if index != DURABLE {
        return replica_at(address);
    }
    let mut command = replica_with_data(address, dir.path());
    command.args(["--snapshot-interval", "1s"]);
    command
}

/// Prints how much was recorded.
fn print_summary(records: &[Record]) {
    let count = |of: fn(&Operation) -> bool| {
        records
            .iter()
            .filter(|record| of(&record.operation))
            .count()
    };
    let outcome = |is: fn(&Outcome) -> bool| {
        let of = |record: &&Record| {
            record
                .operation
                .outcome()
                .is_some_and(|outcome| is(&outcome))
        };
        records.iter().filter(of).count()
    };
    let reads = count(|operation| matches!(operation, Operation::Get { .. }));
    let written = outcome(|outcome| matches!(outcome, Outcome::Written(_)));
    let refused = outcome(|outcome| *outcome == Outcome::NotWritten);
    let unknown = outcome(|outcome| *outcome == Outcome::Unknown);
    let deletions = count(
        |operation| matches!(operation, Operation::Delete { outcome } if matches!(outcome, Outcome::Written(_))),
    );
    let absent = count(|operation| matches!(operation, Operation::Get { found: None, .. }));
    println!(
        "{reads} reads, {absent} of them of no record, {written} writes, {deletions} of them \
         deletions, {refused} refused, {unknown} without an answer"
    );
    // A history without these would prove nothing.
    assert!(reads > 100 && written > 100 && deletions > 10 && absent > 10);
    let users: BTreeSet<usize> = records.iter().map(|record| record.user).collect();
    assert_eq!(users.len(), USERS);
}

/// The operations of one replica on one user, and the writes to the other replicas with an open
/// end.
fn history_of(records: &[Record], replica: usize, user: usize) -> Vec<Op> {
    let of_user = records.iter().filter(|record| record.user == user);
    let op = |record: &Record| {
        let here = record.replica == replica;
        // `None` for a rejected write.
        let returned = |outcome| match outcome {
            Outcome::NotWritten => None,
            Outcome::Written(_) if here => Some(Some(record.returned)),
            Outcome::Written(_) | Outcome::Unknown => Some(None),
        };
        let (returned, effect) = match &record.operation {
            Operation::Set { fields, outcome } => (returned(*outcome)?, ChainEntry::Set(*fields)),
            Operation::Delete { outcome } => (returned(*outcome)?, ChainEntry::Delete),
            Operation::Get { found, .. } if here => {
                (Some(record.returned), ChainEntry::Get(*found))
            }
            Operation::Get { .. } => return None,
        };
        Some(Op {
            invoked: record.invoked,
            returned,
            effect,
            label: format!("client {:2}, replica {}", record.client, record.replica),
        })
    };
    of_user.filter_map(op).collect()
}

/// The report of a failure, with a minimal history.
fn describe(history: &[Op], replica: usize, user: usize) -> String {
    let minimal = minimal_history(history);
    let mut describe = format!(
        "replica {replica} is not linearizable for {}; of {} operations these {} are enough to see it:\n",
        user_id(user),
        history.len(),
        minimal.len()
    );
    for op in minimal {
        let _ = writeln!(describe, "{op}");
    }
    describe
}
