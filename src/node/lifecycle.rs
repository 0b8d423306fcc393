//! The life of a node: build, spawn, wait, drain.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpSocket};
use tokio::runtime::{self, Runtime};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::http::backup::{self, BackupMetrics};
use crate::http::host::Hosts;
use crate::http::listener::{ConnectionMetrics, Listener, ListenerLimits};
use crate::http::ops::traffic::RecentTraffic;
use crate::http::ops::{self, Port, StartupProgress};
use crate::http::{self, HttpMetrics};
use crate::log::{RandomId, now_ns};
use crate::node::config::{ClusterConfig, Config};
use crate::node::data_dir::Storage;
use crate::node::{Node, NodeResources, NodeTasks, StartError};
use crate::node::{restore_report, sd_notify};
use crate::replication::SILENCE_MAX;
use crate::replication::peer_client::{Client, Compression};
use crate::store::Store;
use crate::sys::exec::Blocking;
use crate::sys::tasks::CriticalTasks;
use crate::telemetry::Telemetry;

/// Connections that may wait to be accepted; the system may allow fewer.
const BACKLOG: u32 = 4096;
/// File descriptors reserved for other uses than connections.
const SPARE_FILES: u64 = 256;
/// How long responses of the ops port may take after everything else has stopped.
const OPS_DRAIN_MAX: Duration = Duration::from_secs(1);
/// The send buffer of a connection (the kernel doubles this, and may allow less). Only backups are
/// larger. A small buffer shows sooner whether a client reads slowly or has stopped.
const SEND_BUFFER_BYTES: u32 = 512 * 1024;

/// Why a node did not start, or stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    /// The address is in use or cannot be assigned.
    #[error(
        "cannot listen on {flag} {address}: {error}; stop the process that listens there, or choose \
         another address"
    )]
    Bind {
        /// The flag of the address.
        flag: &'static str,
        /// The address.
        address: SocketAddr,
        /// The system's error.
        error: io::Error,
    },
    /// The store can't be restored, or a critical task has ended.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A necessary system call failed.
    #[error("cannot start: {0}")]
    System(#[from] io::Error),
    /// The HTTP client for other nodes can't be set up.
    #[error("cannot set up the HTTP client for other nodes: {0}")]
    Client(#[from] reqwest::Error),
    /// The metrics can't be set up.
    #[error("cannot set up metrics: {0}")]
    Metrics(#[from] metrics_exporter_prometheus::BuildError),
}

/// The three ports, listening.
pub struct Sockets {
    /// For `POST /set`.
    pub write: TcpListener,
    /// For `GET /get`.
    pub read: TcpListener,
    /// For operators.
    pub ops: TcpListener,
}

impl Sockets {
    /// Listens on the addresses of `config`.
    ///
    /// # Errors
    /// An address is in use or does not belong to this machine.
    pub fn bind(config: &Config) -> Result<Self, LifecycleError> {
        let bind = |flag, address| {
            listen(address).map_err(|error| LifecycleError::Bind {
                flag,
                address,
                error,
            })
        };
        Ok(Self {
            write: bind("--write-addr", config.write_addr)?,
            read: bind("--read-addr", config.read_addr)?,
            ops: bind("--ops-addr", config.ops_addr)?,
        })
    }

    /// The ports, with new metrics: write, read, ops.
    fn ports(&self, limits: &ConnectionLimits, telemetry: &Telemetry) -> io::Result<[Port; 3]> {
        let port = |name, socket: &TcpListener, limits: ListenerLimits| {
            Ok::<_, io::Error>(Port {
                name,
                address: socket.local_addr()?,
                connections_max: limits.connections_max,
                metrics: telemetry.register(|| ConnectionMetrics::new(name)),
            })
        };
        Ok([
            port("write", &self.write, limits.data)?,
            port("read", &self.read, limits.data)?,
            port("ops", &self.ops, limits.ops)?,
        ])
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// The runtime of a node's tasks. By default it has half as many threads as there are cores.
///
/// The other cores are left to the kernel, which does more than half of the work of a request, and
/// to NATS. If these share two cores with the node, two threads keep waking each other
/// (ADR 0008 has the measurements). One thread also needs no scheduler that moves tasks
/// between threads.
///
/// # Errors
/// The runtime can't be created.
pub fn runtime(threads: Option<usize>) -> io::Result<Runtime> {
    let half = || thread::available_parallelism().map_or(1, |cores| cores.get() / 2);
    match threads.unwrap_or_else(half) {
        0 | 1 => runtime::Builder::new_current_thread(),
        threads => {
            let mut builder = runtime::Builder::new_multi_thread();
            builder.worker_threads(threads);
            builder
        }
    }
    .enable_all()
    .build()
}

/// The HTTP client for other nodes.
///
/// # Errors
/// The client can't be set up.
pub fn peer_client(config: &Config) -> Result<Client, LifecycleError> {
    let account = config.credentials.for_client();
    Ok(Client::new(account, SILENCE_MAX, Compression::IfSlow)?)
}

/// Serves the ops port while `opening` runs, which may wait for a disk or NATS. The read and the
/// write port reject all requests; the responses have the node id, which other starting nodes
/// request.
///
/// # Errors
/// The sockets can't be used.
pub async fn serve_while_opening<T>(
    config: &Config,
    node: RandomId,
    sockets: &Sockets,
    progress: StartupProgress,
    opening: impl Future<Output = T>,
) -> io::Result<T> {
    let stop = CancellationToken::new();
    let serving = TaskTracker::new();
    let status = progress.clone();
    let data_router = backup::routes_while_opening(progress.clone(), node);
    let ops_router = ops::routes_while_opening(progress);
    let (data, ops) = (config.http.data, config.http.ops);
    let [read_addr, write_addr] = [config.read_addr, config.write_addr];
    for (name, socket, address, router, limits) in [
        ("read", &sockets.read, read_addr, data_router.clone(), data),
        ("write", &sockets.write, write_addr, data_router, data),
        ("ops", &sockets.ops, config.ops_addr, ops_router, ops),
    ] {
        // A duplicate of the descriptor: closing this listener leaves the socket open.
        let socket = socket.as_fd().try_clone_to_owned()?;
        let listener = Listener {
            name,
            socket: TcpListener::from_std(socket.into())?,
            router,
            fast_route: None,
            limits,
            hosts: Hosts::of(address.ip(), &config.http.allowed_hosts),
            metrics: Arc::new(HttpMetrics::disabled()),
            connection_metrics: ConnectionMetrics::new(name),
        };
        serving.spawn(listener.serve(stop.clone()));
    }
    serving.close();
    let opened = tokio::select! {
        opened = opening => opened,
        never = sd_notify::report_opening(&status) => match never {},
    };
    stop.cancel();
    let _ = tokio::time::timeout(OPS_DRAIN_MAX, serving.wait()).await;
    Ok(opened)
}

/// Runs a node until `shutdown` resolves, and then until its work has finished or the deadlines
/// have passed.
///
/// # Errors
/// The node could not start, or a critical task has ended.
pub async fn run(
    config: Config,
    node: RandomId,
    storage: Storage,
    sockets: Sockets,
    shutdown: impl Future<Output = ()>,
) -> Result<(), LifecycleError> {
    let telemetry = Arc::new(Telemetry::new(&http::BUCKETS)?);
    let recorder = Arc::clone(&telemetry);
    let counter_of =
        move |route, status| recorder.register(|| HttpMetrics::requests_counter(route, status));
    let http_metrics = Arc::new(match config.http.metrics {
        true => telemetry.register(|| HttpMetrics::new(counter_of)),
        false => HttpMetrics::disabled(),
    });
    let background = Blocking::background()?;
    let critical = CriticalTasks::default();
    let seed = config.restore_from.as_deref();
    let seed = seed.filter(|_| !storage.was_restored);
    let resources = NodeResources {
        node,
        started_ns: now_ns(),
        critical: critical.clone(),
        store: Store::new(),
        storage,
        peers: Arc::new(peer_client(&config)?),
        blocking: Blocking::threads(),
        idle: Blocking::idle(background.clone())?,
        background,
        backup_metrics: telemetry.register(BackupMetrics::new),
        request_count: http_metrics.request_count(),
    };
    let (node, mut tasks) = Node::new(&config, resources, &telemetry.replication);
    let url = advertised(&config.cluster, sockets.write.local_addr()?);
    let services = Services::start(&config, &node, sockets, critical, telemetry, http_metrics)?;
    node.announce(url);

    tokio::select! {
        failed = tasks.run(seed) => failed?,
        () = shutdown => {}
    }
    services.stop(&node, tasks, config.http.drain_max).await;
    Ok(())
}

/// The ports of a node and the tasks around it.
struct Services {
    /// The listeners of the read and write port.
    data: TaskTracker,
    stop_data: CancellationToken,
    /// The ops port, and tasks that report the node's state until the end.
    rest: TaskTracker,
    stop_rest: CancellationToken,
}

impl Services {
    fn start(
        config: &Config,
        node: &Node,
        sockets: Sockets,
        critical: CriticalTasks,
        telemetry: Arc<Telemetry>,
        http_metrics: Arc<HttpMetrics>,
    ) -> io::Result<Self> {
        let services = Self {
            data: TaskTracker::new(),
            stop_data: CancellationToken::new(),
            rest: TaskTracker::new(),
            stop_rest: CancellationToken::new(),
        };
        let limits = connection_limits(config);
        let ports = Arc::new(sockets.ports(&limits, &telemetry)?);
        let listener = |port: &Port, socket, router, fast_route, limits| Listener {
            name: port.name,
            socket,
            router,
            fast_route,
            limits,
            hosts: Hosts::of(port.address.ip(), &config.http.allowed_hosts),
            metrics: Arc::clone(&http_metrics),
            connection_metrics: port.metrics.clone(),
        };
        let traffic = RecentTraffic::default();
        let ops_state = node.ops(
            Arc::clone(&telemetry),
            Arc::clone(&http_metrics),
            traffic.clone(),
            Arc::clone(&ports) as Arc<[Port]>,
        );
        let [write, read, ops] = &*ports;
        let ops = listener(ops, sockets.ops, ops::routes(ops_state), None, limits.ops);
        let serving = ops.serve(services.stop_rest.child_token());
        services.rest.spawn(critical.guard("ops listener", serving));
        for (port, socket, (router, fast_route)) in [
            (write, sockets.write, node.write()),
            (read, sockets.read, node.read()),
        ] {
            let fast_route = config.http.fast_path.then_some(fast_route);
            let port = listener(port, socket, router, fast_route, limits.data);
            let serving = port.serve(services.stop_data.child_token());
            services.data.spawn(critical.guard("listener", serving));
        }
        let upkeep = async move { telemetry.upkeep().await };
        services.spawn(&critical, "metrics upkeep", upkeep);
        let watch = async move { traffic.watch(&http_metrics).await };
        services.spawn(&critical, "traffic watch", watch);
        let report = restore_report::report(node.restore.clone());
        services.spawn(&critical, "restore report", report);
        let report = sd_notify::report(node.readiness.clone(), node.restore.clone());
        services.spawn(&critical, "service manager report", report);
        services.spawn(&critical, "memory watch", node.watch_memory());
        Ok(services)
    }

    /// Spawns a task that runs until `stop_rest` is cancelled. A panic in it ends the process.
    fn spawn(
        &self,
        critical: &CriticalTasks,
        task: &'static str,
        run: impl Future<Output = ()> + Send + 'static,
    ) {
        let (stop, guarded) = (self.stop_rest.child_token(), critical.guard(task, run));
        self.rest.spawn(async move {
            stop.run_until_cancelled(guarded).await;
        });
    }

    /// Drains the read and write port, writes the last snapshot, then stops the rest.
    async fn stop(self, node: &Node, mut tasks: NodeTasks, drain_max: Duration) {
        // Unready first, so that load balancers send requests elsewhere.
        tracing::info!("shutting down");
        sd_notify::stopping();
        let snapshot = node.stop_serving();
        self.stop_data.cancel();
        self.data.close();
        let drained = async {
            self.data.wait().await;
            tasks.finish_writing().await;
        };
        if tokio::time::timeout(drain_max, drained).await.is_err() {
            let waited_s = drain_max.as_secs();
            tracing::warn!(waited_s, "requests are still running; shutting down anyway");
        }
        snapshot.write().await;
        self.stop_rest.cancel();
        self.rest.close();
        let position = node.applied.seq();
        match tokio::time::timeout(OPS_DRAIN_MAX, self.rest.wait()).await {
            Ok(()) => tracing::info!(position, "shut down cleanly"),
            Err(_elapsed) => tracing::warn!(position, "shut down with requests still running"),
        }
    }
}

/// The URL at which other nodes reach the write port on `local`. If the port listens on all
/// addresses, this is the address of the route to NATS.
#[must_use]
pub fn advertised(cluster: &ClusterConfig, local: SocketAddr) -> String {
    if let Some(url) = &cluster.advertise_url {
        return url.clone();
    }
    let mut address = local;
    if let Some((host, port)) = cluster
        .broker
        .as_ref()
        .filter(|_| local.ip().is_unspecified())
    {
        // This sends nothing: the system only chooses a route.
        let route = UdpSocket::bind((local.ip(), 0)).and_then(|socket| {
            socket.connect((host.as_str(), *port))?;
            socket.local_addr()
        });
        match route {
            Ok(route) => address.set_ip(route.ip()),
            Err(error) => tracing::warn!(
                %error,
                "no route to NATS, so other nodes cannot reach this one; set --advertise-url"
            ),
        }
    }
    format!("http://{address}")
}

struct ConnectionLimits {
    data: ListenerLimits,
    ops: ListenerLimits,
}

/// Raises the limit of open files as far as the system allows, and lowers the limits of connections
/// to fit: without a free descriptor a connection can't even be rejected.
fn connection_limits(config: &Config) -> ConnectionLimits {
    let (mut data, mut ops) = (config.http.data, config.http.ops);
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    let _ = setrlimit(Resource::Nofile, raised);
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let for_ops = usize::try_from(files / 16).unwrap_or(usize::MAX).max(8);
    ops.connections_max = ops.connections_max.min(for_ops);
    let for_data = files.saturating_sub(SPARE_FILES + ops.connections_max as u64) / 2;
    let fitting = usize::try_from(for_data).unwrap_or(usize::MAX).max(16);
    if fitting < data.connections_max {
        tracing::warn!(
            open_files_max = files,
            wanted = data.connections_max,
            connections_max = fitting,
            "limit of open files is too low for the connections of each port; raise it (ulimit -n)"
        );
        data.connections_max = fitting;
    }
    ConnectionLimits { data, ops }
}
