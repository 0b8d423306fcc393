//! Three replicas on one broker or on a cluster of three, of which one is under test, and clients of
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
/// The first one, which is seeded and makes the stream.
pub(crate) const B: usize = 1;
/// One more.
pub(crate) const C: usize = 2;
/// What each process of a cell has said, by name.
pub(crate) type Logs = Arc<Mutex<Vec<(String, Arc<Mutex<String>>)>>>;

/// What keeps the log.
pub(crate) enum Brokers {
    One(Broker),
    Three(Box<NatsCluster>),
}

/// Three replicas and what is around them. All of it ends when it is dropped.
pub(crate) struct Scene {
    pub(crate) brokers: Brokers,
    pub(crate) reference: ReferenceState,
    seed: PathBuf,
    /// Where replicas keep their data.
    data: TempDir,
    /// Between the replica under test and the broker; with three servers only if a fault needs it.
    pub(crate) proxy: Option<Proxy>,
    rules: Rules,
    /// More flags for a replica.
    pub(crate) flags: [Vec<String>; 3],
    /// How the replica under test finds its servers where there are three and no proxy.
    pub(crate) nats_url: Option<String>,
    /// To the backups of the other two.
    pub(crate) ways: [Throttle; 2],
    pub(crate) load: Load,
    /// Whether the clients know of the replicas yet.
    loaded: bool,
    nodes: [Option<Node>; 3],
    pub(crate) stage: Stage,
    pub(crate) hold: Hold,
    /// A log position that the replica under test needs nothing before of.
    pub(crate) held_at: u64,
    /// Whether the replica under test writes one each second.
    pub(crate) snapshots_often: bool,
    /// What a client got that was being given a backup; nothing if that was broken off.
    pub(crate) backup: Option<Option<Vec<u8>>>,
    /// Where the replica under test keeps its data, if that may be filled.
    pub(crate) disk: Option<SmallDisk>,
    /// What the replica under test takes for the time, if that may be changed.
    pub(crate) clock: Option<Clock>,
    logs: Logs,
}

impl Scene {
    /// With two replicas that are ready.
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
                let broker = Broker::start().await;
                let proxy = Proxy::to(broker.address).await;
                (Brokers::One(broker), Some(proxy))
            }
        };
        let ways = [
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
            ways,
            load: Load::start(),
            loaded: false,
            nodes: [const { None }; 3],
            stage,
            hold: Hold::Nothing,
            held_at: 0,
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
            command.args(["--advertise-url", &self.ways[index - 1].url()]);
            return command;
        }
        if self.snapshots_often {
            command.arg("--snapshot-interval=1s");
        }
        if let Some(clock) = &self.clock {
            clock.show_to(&mut command);
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

    /// Starts a replica with what it has.
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
            self.ways[index - 1].set_target(node.write);
        }
        self.nodes[index] = Some(node);
        self.show(index);
    }

    /// From now on clients write and read.
    pub(crate) fn load_on(&mut self) {
        self.loaded = true;
        for index in [A, B, C] {
            self.show(index);
        }
    }

    fn show(&self, index: usize) {
        if let Some(node) = self.nodes[index].as_ref().filter(|_| self.loaded) {
            self.load.replica(index, node);
        }
    }

    pub(crate) fn node(&self, index: usize) -> &Node {
        self.nodes[index].as_ref().expect("a replica that runs")
    }

    pub(crate) fn nodes(&self) -> [&Ports; 3] {
        [A, B, C].map(|index| &**self.node(index))
    }

    /// Waits until a replica is ready.
    pub(crate) async fn ready(&self, index: usize) {
        let what = format!("{} is ready", ["a", "b", "c"][index]);
        self.node(index)
            .status_where(&what, |status| status["state"] == "ready")
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

    /// Waits until the replica under test, which was told to stop, has ended as it should.
    pub(crate) async fn wait_for_exit(&mut self) {
        let mut node = self.nodes[A].take().expect("a replica that runs");
        assert_eq!(node.wait_for_exit().await.code(), Some(0));
    }

    /// Lets the replica under test go on, and waits until it is ready, or one that has come in its
    /// place.
    pub(crate) async fn go_on(&mut self) {
        self.release().await;
        if self.stage == Stage::Stopping && self.nodes[A].is_some() {
            self.wait_for_exit().await;
        }
        if self.nodes[A].is_none() {
            self.start(A).await;
        }
        self.ready(A).await;
    }

    /// Lets the replica under test go on.
    pub(crate) async fn release(&mut self) {
        let hold = std::mem::replace(&mut self.hold, Hold::Nothing);
        hold.release(self).await;
    }

    pub(crate) fn open_ways(&self) {
        for way in &self.ways {
            way.remove_limit();
        }
    }

    /// Keeps the log's batches from the replica under test.
    pub(crate) fn hold_batches(&mut self, hold: bool) {
        self.rules.hold_batches = hold;
        self.proxy().set(self.rules);
    }

    /// What the fault does to the connection between the replica under test and the broker, beside
    /// what holds the replica in its stage.
    pub(crate) fn connection(&mut self, fault: Rules) {
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

    /// The one server.
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

    /// A client of the test's own.
    pub(crate) async fn client(&self) -> Context {
        match &self.brokers {
            Brokers::One(broker) => broker.client().await,
            Brokers::Three(cluster) => cluster.client().await,
        }
    }

    /// Reads the log to its end.
    pub(crate) async fn read(&mut self) {
        let client = self.client().await;
        self.reference.read(&client).await;
    }
}
