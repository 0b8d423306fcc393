//! Three replicas on one broker or on a cluster of three. One replica is under test; clients use
//! all three.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use async_nats::jetstream::Context;
use parking_lot::Mutex;
use tempfile::TempDir;

use crate::clock::Clock;
use crate::fault::Fault;
use crate::harness::cluster::broker::{Broker, replica_with_data};
use crate::harness::cluster::nats::NatsCluster;
use crate::harness::cluster::proxy::{Proxy, Rules};
use crate::harness::cluster::seeded::{ReferenceState, seed};
use crate::harness::cluster::throttle::Throttle;
use crate::harness::small_disk::SmallDisk;
use crate::harness::{Node, Ports};
use crate::load::Load;
use crate::stage::{Hold, Stage};

/// The replica under test.
pub(crate) const A: usize = 0;
/// The first replica. It restores the seed and creates the stream.
pub(crate) const B: usize = 1;
/// Another replica.
pub(crate) const C: usize = 2;
/// The output of each process of a cell, by name.
pub(crate) type Logs = Arc<Mutex<Vec<(String, Arc<Mutex<String>>)>>>;

/// The servers that store the log.
pub(crate) enum Brokers {
    One(Broker),
    Three(Box<NatsCluster>),
}

/// Three replicas and their environment. Dropping it ends all processes.
pub(crate) struct Scene {
    pub(crate) brokers: Brokers,
    pub(crate) reference: ReferenceState,
    seed: PathBuf,
    /// The data directories of the replicas.
    data: TempDir,
    /// The proxy between the replica under test and the broker. With three servers it exists only
    /// if the fault needs it.
    pub(crate) proxy: Option<Proxy>,
    rules: Rules,
    /// Additional flags of each replica.
    pub(crate) flags: [Vec<String>; 3],
    /// The NATS URL of the replica under test, instead of the cluster's. A proxy takes precedence.
    pub(crate) nats_url: Option<String>,
    /// Proxies to the write ports of the other two, which serve backups.
    pub(crate) backup_proxies: [Throttle; 2],
    pub(crate) load: Load,
    /// Whether the clients send requests to the replicas.
    load_started: bool,
    nodes: [Option<Node>; 3],
    pub(crate) stage: Stage,
    pub(crate) hold: Hold,
    /// The replica under test needs no batch through this position.
    pub(crate) trimmable_through: u64,
    /// Whether the replica under test writes a snapshot each second.
    pub(crate) snapshots_often: bool,
    /// The backup that a client received; the inner value is `None` if it was aborted.
    pub(crate) backup: Option<Option<Vec<u8>>>,
    /// The disk of the replica under test, if the fault fills it.
    pub(crate) disk: Option<SmallDisk>,
    /// The clock of the replica under test, if the fault shifts it.
    pub(crate) clock: Option<Clock>,
    logs: Logs,
}

impl Scene {
    /// Starts the servers and two replicas, and waits until both are ready.
    pub(crate) async fn new(fault: Fault, stage: Stage, logs: Logs) -> Self {
        let (reference, seed, data) = seed(stage.rows());
        let (brokers, proxy) = match fault {
            Fault::Servers(fault) => {
                let cluster = NatsCluster::start_with(fault.gossip(), fault.config()).await;
                for (index, server) in cluster.servers.iter().enumerate() {
                    let log = Arc::clone(&server.log);
                    logs.lock().push((format!("server-{index}"), log));
                }
                (Brokers::Three(Box::new(cluster)), None)
            }
            _ => {
                let broker = Broker::start_with(&[]).await;
                let proxy = Proxy::to(broker.address).await;
                (Brokers::One(broker), Some(proxy))
            }
        };
        let backup_proxies = [
            Throttle::without_target(u64::MAX).await,
            Throttle::without_target(u64::MAX).await,
        ];
        let mut scene = Self {
            brokers,
            reference,
            seed,
            data,
            proxy,
            rules: Rules::default(),
            flags: Default::default(),
            nats_url: None,
            backup_proxies,
            load: Load::start(),
            load_started: false,
            nodes: [const { None }; 3],
            stage,
            hold: Hold::Nothing,
            trimmable_through: 0,
            snapshots_often: false,
            backup: None,
            disk: None,
            clock: None,
            logs,
        };
        if let Fault::Servers(fault) = fault {
            scene.flags = fault.flags();
        }
        let mut first = scene.command(B);
        first.arg("--restore-from").arg(&scene.seed);
        scene.launch(B, &mut first).await;
        scene.ready(B).await;
        scene.start(C).await;
        scene.ready(C).await;
        scene
    }

    fn command(&self, index: usize) -> Command {
        let nats_url = match (&self.brokers, &self.proxy, &self.nats_url) {
            (_, Some(proxy), _) if index == A => proxy.address.to_string(),
            (_, None, Some(nats_url)) if index == A => nats_url.clone(),
            (Brokers::One(broker), ..) => broker.address.to_string(),
            (Brokers::Three(cluster), ..) => cluster.url(),
        };
        let mut command = replica_with_data(nats_url, &self.dir(index));
        if matches!(self.brokers, Brokers::Three(_)) {
            command.args(["--replicas", "3"]);
        }
        command.args(&self.flags[index]);
        if index != A {
            command.args(["--advertise-url", &self.backup_proxies[index - 1].url()]);
            return command;
        }
        if self.snapshots_often {
            command.arg("--snapshot-interval=1s");
        }
        if let Some(clock) = &self.clock {
            clock.apply_to(&mut command);
        }
        command
    }

    /// The data directory of a replica.
    pub(crate) fn dir(&self, index: usize) -> PathBuf {
        match &self.disk {
            Some(disk) if index == A => disk.data_dir(),
            _ => self.data.path().join(["a", "b", "c"][index]),
        }
    }

    /// Starts a replica with its data directory.
    pub(crate) async fn start(&mut self, index: usize) {
        let mut command = self.command(index);
        self.launch(index, &mut command).await;
    }

    async fn launch(&mut self, index: usize, command: &mut Command) {
        let node = Node::launch(command).await;
        let mut logs = self.logs.lock();
        let name = format!("{}-{}", logs.len(), ["a", "b", "c"][index]);
        logs.push((name, Arc::clone(&node.stderr)));
        drop(logs);
        if index != A {
            self.backup_proxies[index - 1].set_target(node.write);
        }
        self.nodes[index] = Some(node);
        self.update_load(index);
    }

    /// Makes the clients send requests to the replicas, also to those that start later.
    pub(crate) fn start_load(&mut self) {
        self.load_started = true;
        for index in [A, B, C] {
            self.update_load(index);
        }
    }

    fn update_load(&self, index: usize) {
        if let Some(node) = self.nodes[index].as_ref().filter(|_| self.load_started) {
            self.load.set_replica(index, node);
        }
    }

    pub(crate) fn node(&self, index: usize) -> &Node {
        self.nodes[index].as_ref().expect("a running replica")
    }

    pub(crate) fn nodes(&self) -> [&Ports; 3] {
        [A, B, C].map(|index| &**self.node(index))
    }

    /// Waits until a replica is ready.
    pub(crate) async fn ready(&self, index: usize) {
        let description = format!("{} is ready", ["a", "b", "c"][index]);
        self.node(index)
            .status_where(&description, |status| status["state"] == "ready")
            .await;
    }

    pub(crate) async fn position(&self, index: usize) -> u64 {
        let status = self.node(index).status().await;
        status["position"].as_u64().unwrap()
    }

    /// Kills a replica.
    pub(crate) fn kill(&mut self, index: usize) {
        if let Some(node) = self.nodes[index].take() {
            node.kill();
        }
    }

    /// Waits until the replica under test has exited with code 0 after a SIGTERM.
    pub(crate) async fn wait_for_exit(&mut self) {
        let mut node = self.nodes[A].take().expect("a running replica");
        assert_eq!(node.wait_for_exit().await.code(), Some(0));
    }

    /// Releases the replica under test, restarts it if it has exited, and waits until it is ready.
    pub(crate) async fn resume(&mut self) {
        self.release().await;
        if self.stage == Stage::Stopping && self.nodes[A].is_some() {
            self.wait_for_exit().await;
        }
        if self.nodes[A].is_none() {
            self.start(A).await;
        }
        self.ready(A).await;
    }

    /// Releases the replica under test from its stage.
    pub(crate) async fn release(&mut self) {
        let hold = std::mem::replace(&mut self.hold, Hold::Nothing);
        hold.release(self).await;
    }

    pub(crate) fn open_backup_proxies(&self) {
        for proxy in &self.backup_proxies {
            proxy.remove_limit();
        }
    }

    /// Sets whether the proxy holds back the log's batches from the replica under test.
    pub(crate) fn hold_batches(&mut self, hold: bool) {
        self.rules.hold_batches = hold;
        self.proxy().set(self.rules);
    }

    /// Sets the fault of the link between the replica under test and the broker. Batches that are
    /// held back for the stage stay held back.
    pub(crate) fn set_link(&mut self, fault: Rules) {
        let hold_batches = self.rules.hold_batches;
        self.rules = Rules {
            hold_batches,
            ..fault
        };
        self.proxy().set(self.rules);
    }

    pub(crate) fn proxy(&self) -> &Proxy {
        self.proxy.as_ref().expect("a proxy")
    }

    /// The single server.
    pub(crate) fn broker(&mut self) -> &mut Broker {
        match &mut self.brokers {
            Brokers::One(broker) => broker,
            Brokers::Three(_) => panic!("there are three servers"),
        }
    }

    /// The three servers.
    pub(crate) fn servers(&mut self) -> &mut NatsCluster {
        match &mut self.brokers {
            Brokers::One(_) => panic!("there is one server"),
            Brokers::Three(cluster) => cluster,
        }
    }

    /// A NATS client of the test itself.
    pub(crate) async fn client(&self) -> Context {
        match &self.brokers {
            Brokers::One(broker) => broker.client().await,
            Brokers::Three(cluster) => cluster.client().await,
        }
    }

    /// Applies the log through its end to the reference state.
    pub(crate) async fn read_log(&mut self) {
        let client = self.client().await;
        self.reference.read(&client).await;
    }
}
