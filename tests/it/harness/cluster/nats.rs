//! nats-server as a child process, and a cluster of three whose routes can be cut.

use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use async_nats::ConnectOptions;
use async_nats::jetstream::context::ContextBuilder;
use async_nats::jetstream::stream::Info;
use async_nats::jetstream::{self, Context};
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::harness::cluster::broker::{NATS_SERVER, STREAM, SUBJECT, replica_with_data};
use crate::harness::cluster::throttle::Throttle;
use crate::harness::wire::{eventually, with_timeout};
use crate::harness::{Process, ReservedPort, collect_output};

/// The timeout of a request to a server.
const RESPONSE_WAIT_MAX: Duration = Duration::from_secs(1);

/// nats-server with JetStream. Its port, store and configuration outlive the process.
pub(crate) struct NatsServer {
    pub(crate) address: SocketAddr,
    /// Its log since the last start.
    pub(crate) log: Arc<Mutex<String>>,
    process: Process,
    args: Vec<OsString>,
    /// The constant first part of the configuration.
    config_prefix: String,
    config: PathBuf,
    dir: TempDir,
    port: ReservedPort,
}

impl NatsServer {
    /// Starts a server with this configuration file.
    pub(crate) async fn start(config: &str) -> Self {
        Self::start_with(config, &[]).await
    }

    /// The same with more arguments.
    pub(crate) async fn start_with(config: &str, args: &[&str]) -> Self {
        let server = Self::launch(String::new(), config, args);
        server.wait_until_ready().await;
        server
    }

    /// The same without waiting for readiness, which a server of a cluster reaches only with the
    /// others.
    fn launch(config_prefix: String, config: &str, args: &[&str]) -> Self {
        let (dir, port) = (tempfile::tempdir().unwrap(), ReservedPort::new());
        let path = dir.path().join("nats.conf");
        fs::write(&path, config_prefix.clone() + config).unwrap();
        let mut all: Vec<OsString> = args.iter().map(OsString::from).collect();
        if !args.contains(&"-sd") {
            all.extend(["-sd".into(), dir.path().join("store").into()]);
        }
        let (process, log) = spawn(&path, &port, &all);
        Self {
            address: port.address(),
            log,
            process,
            args: all,
            config_prefix,
            config: path,
            dir,
            port,
        }
    }

    async fn wait_until_ready(&self) {
        eventually("nats-server is ready", async || {
            self.log.lock().contains("Server is ready").then_some(())
        })
        .await;
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://{}", self.address)
    }

    /// The directory of its store.
    pub(crate) fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process.0), signal).unwrap();
    }

    /// kill -9; the page cache survives.
    pub(crate) fn kill(&mut self) {
        self.process.0.kill().unwrap();
        self.process.0.wait().unwrap();
    }

    /// Waits for the process to exit.
    pub(crate) async fn wait_for_exit(&mut self) {
        eventually("the exit of nats-server", async || {
            self.process.0.try_wait().unwrap()
        })
        .await;
    }

    /// Restarts it with the same ports and store.
    pub(crate) async fn restart(&mut self) {
        (self.process, self.log) = spawn(&self.config, &self.port, &self.args);
        self.wait_until_ready().await;
    }

    /// Reloads another configuration without a restart.
    pub(crate) async fn reload(&self, config: &str) {
        let reloads = || {
            self.log
                .lock()
                .matches("Reloaded server configuration")
                .count()
        };
        let before = reloads();
        self.configure(config);
        self.signal(Signal::HUP);
        eventually("a reloaded configuration", async || {
            (reloads() > before).then_some(())
        })
        .await;
    }

    /// Replaces the configuration for the next start; the part for the cluster stays.
    pub(crate) fn configure(&self, config: &str) {
        fs::write(&self.config, self.config_prefix.clone() + config).unwrap();
    }

    /// A client that uses this server only, and reconnects.
    pub(crate) async fn client(&self, options: ConnectOptions) -> Context {
        let options = options.ignore_discovered_servers();
        let options = options.request_timeout(Some(RESPONSE_WAIT_MAX));
        let client = with_timeout("a client", options.connect(self.url())).await;
        let builder = ContextBuilder::new().timeout(RESPONSE_WAIT_MAX);
        builder.build(client.unwrap())
    }
}

fn spawn(config: &Path, port: &ReservedPort, args: &[OsString]) -> (Process, Arc<Mutex<String>>) {
    let spawned = Command::new(NATS_SERVER)
        .args([
            "-js",
            "-a",
            "127.0.0.1",
            "-p",
            &port.address().port().to_string(),
        ])
        .arg("-c")
        .arg(config)
        .args(args)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let missing = |error| panic!("{NATS_SERVER}: {error}; tests/install-nats.sh gets it");
    let mut process = Process(spawned.unwrap_or_else(missing));
    let log = collect_output(process.0.stderr.take().unwrap());
    (process, log)
}

/// What servers tell clients about other servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gossip {
    /// The client URLs of the others.
    Clients,
    /// Nothing, so that a client with one URL stays with that server.
    Nothing,
}

/// The number of servers of a [`NatsCluster`].
pub(crate) const SERVERS: usize = 3;

/// Three servers. Each route between two of them has a proxy, so that a server can be isolated from
/// the others while clients still reach it.
pub(crate) struct NatsCluster {
    pub(crate) servers: [NatsServer; SERVERS],
    routes: Vec<Route>,
    clients: [Context; SERVERS],
    down: [bool; SERVERS],
    isolated: [bool; SERVERS],
    _ports: ([ReservedPort; SERVERS], ReservedPort),
    /// The parent of the replicas' data directories.
    pub(crate) dir: TempDir,
}

struct Route {
    from: usize,
    to: usize,
    proxy: Throttle,
    target: SocketAddr,
}

impl NatsCluster {
    pub(crate) async fn start() -> Self {
        Self::start_with(Gossip::Clients, "").await
    }

    /// The same with more configuration for each server.
    pub(crate) async fn start_with(gossip: Gossip, config: &str) -> Self {
        let ports = [(); SERVERS].map(|()| ReservedPort::new());
        // Gossip would bypass the proxies, so each server advertises an address without a listener.
        let nowhere = ReservedPort::new();
        let mut routes = Vec::new();
        for (from, to) in (0..SERVERS).flat_map(|from| (0..SERVERS).map(move |to| (from, to))) {
            if from != to {
                let (proxy, target) = (
                    Throttle::without_target(u64::MAX).await,
                    ports[to].address(),
                );
                proxy.set_target(target);
                routes.push(Route {
                    from,
                    to,
                    proxy,
                    target,
                });
            }
        }
        let servers = [0, 1, 2].map(|index| {
            let others = routes.iter().filter(|route| route.from == index);
            let others = others.map(|route| format!("nats://{}", route.proxy.address));
            let config_prefix = format!(
                "server_name: server-{index}\n\
                 cluster {{\n  name: three\n  listen: \"{}\"\n  advertise: \"{}\"\n  \
                 no_advertise: {}\n  routes: {:?}\n}}\n\
                 lame_duck_duration: \"30s\"\nlame_duck_grace_period: \"1s\"\n",
                ports[index].address(),
                nowhere.address(),
                gossip == Gossip::Nothing,
                others.collect::<Vec<_>>(),
            );
            NatsServer::launch(config_prefix, config, &[])
        });
        for server in &servers {
            server.wait_until_ready().await;
        }
        let client = async |index: usize| servers[index].client(ConnectOptions::new()).await;
        let clients = [client(0).await, client(1).await, client(2).await];
        Self {
            servers,
            routes,
            _ports: (ports, nowhere),
            clients,
            down: [false; SERVERS],
            isolated: [false; SERVERS],
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// A client of the server at `index`.
    pub(crate) fn client_of(&self, index: usize) -> &Context {
        &self.clients[index]
    }

    /// The URLs of all servers.
    pub(crate) fn url(&self) -> String {
        let urls = self.servers.each_ref().map(NatsServer::url);
        urls.join(",")
    }

    /// The command of a replica with the data directory `name` and this `--nats-url`.
    pub(crate) fn replica_at(&self, name: &str, nats_url: &str) -> Command {
        let mut command = replica_with_data(nats_url, &self.dir.path().join(name));
        command.args(["--replicas", "3"]);
        command
    }

    /// The same with the URLs of all servers.
    pub(crate) fn replica(&self, name: &str) -> Command {
        self.replica_at(name, &self.url())
    }

    /// A client with the URLs of all servers.
    pub(crate) async fn client(&self) -> Context {
        let urls = self.servers.each_ref().map(NatsServer::url);
        jetstream::new(
            with_timeout("a client", async_nats::connect(&urls[..]))
                .await
                .unwrap(),
        )
    }

    /// What the server at `index` reports about the stream.
    async fn info_from(&self, index: usize) -> Option<Info> {
        let stream = self.clients[index].get_stream(STREAM).await.ok()?;
        Some(stream.cached_info().clone())
    }

    /// The first report about the stream of a server that is neither down nor isolated.
    async fn info(&self) -> Option<Info> {
        for index in 0..SERVERS {
            if !self.down[index] && !self.isolated[index] {
                let info = self.info_from(index).await;
                if info.is_some() {
                    return info;
                }
            }
        }
        None
    }

    /// The server of the stream leader, once there is one that is neither down nor isolated.
    pub(crate) async fn leader(&self) -> usize {
        eventually("a stream leader", async || {
            let leader = self.info().await?.cluster?.leader?;
            let leader = leader.strip_prefix("server-")?.parse::<usize>().unwrap();
            (!self.down[leader] && !self.isolated[leader]).then_some(leader)
        })
        .await
    }

    /// The same once both followers are current.
    pub(crate) async fn leader_with_current_followers(&self) -> usize {
        eventually("a stream leader and two current followers", async || {
            let cluster = self.info().await?.cluster?;
            let current = cluster
                .replicas
                .iter()
                .filter(|peer| peer.current && !peer.offline);
            let leader = cluster.leader.filter(|_| current.count() == SERVERS - 1)?;
            Some(leader.strip_prefix("server-")?.parse().unwrap())
        })
        .await
    }

    /// Waits until the stream stores a message, because a reported leader may be about to change.
    pub(crate) async fn wait_until_writable(&self) {
        let client = self.client().await;
        eventually("a stored message", async || {
            client.publish(SUBJECT, "[]".into()).await.ok()?.await.ok()
        })
        .await;
    }

    /// A server that is not in `servers`.
    pub(crate) fn other_than(&self, servers: &[usize]) -> usize {
        (0..SERVERS).find(|index| !servers.contains(index)).unwrap()
    }

    /// Cuts all routes of a server. Clients still reach it.
    pub(crate) fn isolate(&mut self, index: usize) {
        self.isolated[index] = true;
        for route in self.routes_of(index) {
            route.proxy.cut();
        }
    }

    /// Restores the routes of a server.
    pub(crate) fn heal(&mut self, index: usize) {
        self.isolated[index] = false;
        for route in self.routes_of(index) {
            route.proxy.set_target(route.target);
        }
    }

    fn routes_of(&self, index: usize) -> impl Iterator<Item = &Route> {
        self.routes
            .iter()
            .filter(move |route| route.from == index || route.to == index)
    }

    /// kill -9.
    pub(crate) fn kill(&mut self, index: usize) {
        self.down[index] = true;
        self.servers[index].kill();
    }

    /// Restarts a server that has exited.
    pub(crate) async fn restart(&mut self, index: usize) {
        self.servers[index].restart().await;
        self.down[index] = false;
    }

    /// SIGTERM.
    pub(crate) async fn end(&mut self, index: usize) {
        self.down[index] = true;
        self.servers[index].signal(Signal::TERM);
        self.servers[index].wait_for_exit().await;
    }

    /// SIGUSR2: lame duck mode; the server transfers its leadership and then disconnects its
    /// clients.
    pub(crate) fn lame_duck(&mut self, index: usize) {
        self.down[index] = true;
        self.servers[index].signal(Signal::USR2);
    }

    /// SIGSTOP.
    pub(crate) fn freeze(&mut self, index: usize) {
        self.down[index] = true;
        self.servers[index].signal(Signal::STOP);
    }

    /// SIGCONT.
    pub(crate) fn thaw(&mut self, index: usize) {
        self.servers[index].signal(Signal::CONT);
        self.down[index] = false;
    }
}
