//! Nodes to test: the program as a child process, or a node in this process if a test needs other
//! limits or another log.

use std::net::SocketAddr;
use std::ops::Deref;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;

use gradestore::http::Credentials;
use gradestore::log::{ClusterKey, Log, MemoryLog, RandomId};
use gradestore::node::config::{ClusterConfig, Config, HttpConfig, default_writer_limits};
use gradestore::node::data_dir::{Storage, StorageOptions};
use gradestore::node::lifecycle::{self, LifecycleError, Sockets};
use gradestore::replication::SILENCE_MAX;
use gradestore::replication::memory::MemoryMax;
use gradestore::replication::peer_client::{Client, Compression};
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::{ANY_PORTS, PASSWORD, Ports, Process, collect_output, program, run};

use crate::harness::wire::{eventually, with_timeout};

/// The program as a child process.
pub(crate) struct Node {
    ports: Ports,
    process: Process,
    /// The output so far.
    pub(crate) stdout: Arc<Mutex<String>>,
    pub(crate) stderr: Arc<Mutex<String>>,
}

impl Deref for Node {
    type Target = Ports;

    fn deref(&self) -> &Ports {
        &self.ports
    }
}

impl Node {
    /// Starts a node and waits until it is ready for writes.
    pub(crate) async fn start() -> Self {
        Self::start_with(
            program()
                .env("GRADESTORE_PASSWORD", PASSWORD)
                .args(ANY_PORTS),
        )
        .await
    }

    /// The same with another command.
    pub(crate) async fn start_with(command: &mut Command) -> Self {
        let node = Self::launch(command).await;
        eventually("ready for writes", async || {
            (node.ops("/readyz/write").await.status == 200).then_some(())
        })
        .await;
        node
    }

    /// Runs `command` and waits until the node listens.
    pub(crate) async fn launch(command: &mut Command) -> Self {
        let command = command.stdin(Stdio::null());
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Process(command.spawn().unwrap());
        let stdout = collect_output(process.0.stdout.take().unwrap());
        let stderr = collect_output(process.0.stderr.take().unwrap());
        let listening = eventually("the log line that names the ports", async || {
            let ended = process.0.try_wait().unwrap();
            let stderr = stderr.lock();
            let mut lines = stderr.lines();
            let listening = lines.find(|line| line.contains("listening"));
            assert!(
                listening.is_some() || ended.is_none(),
                "it exited: {stderr}"
            );
            listening.map(str::to_owned)
        })
        .await;
        let address = |field: &str| {
            // In a text or a JSON log line.
            let (_, rest) = listening
                .split_once(&format!("{field}=\"http://"))
                .or_else(|| listening.split_once(&format!("\"{field}\":\"http://")))
                .unwrap();
            rest.split('"').next().unwrap().parse().unwrap()
        };
        let ports = Ports::new(address("write"), address("read"), address("ops"));
        Self {
            ports,
            process,
            stdout,
            stderr,
        }
    }

    /// kill -9.
    pub(crate) fn kill(self) {
        drop(self.process);
    }

    /// SIGTERM; the exit code must be 0.
    pub(crate) async fn stop(mut self) {
        self.signal(Signal::TERM);
        assert_eq!(self.wait_for_exit().await.code(), Some(0));
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Sends SIGRTMIN+`n`, which the library for the other signals does not offer.
    pub(crate) fn real_time_signal(&self, n: i32) {
        let pid = self.pid().as_raw_pid();
        let kill = format!("kill -{} {pid}", 34 + n);
        assert!(run(Command::new("sh").args(["-c", &kill])).status.success());
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.process.0)
    }

    /// Waits for the process to exit.
    pub(crate) async fn wait_for_exit(&mut self) -> ExitStatus {
        eventually("the exit of the process", async || {
            self.process.0.try_wait().unwrap()
        })
        .await
    }
}

/// A node in this process.
pub(crate) struct InProcessNode {
    ports: Ports,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<Result<(), LifecycleError>>,
}

impl Deref for InProcessNode {
    type Target = Ports;

    fn deref(&self) -> &Ports {
        &self.ports
    }
}

/// The client with which nodes use their peers.
pub(crate) fn client() -> Client {
    let account = Credentials::new("admin", PASSWORD).for_client();
    Client::new(account, SILENCE_MAX, Compression::IfSlow).unwrap()
}

/// The parameters for opening a log.
pub(crate) fn opening(node: RandomId, restore_from: Option<PathBuf>) -> StorageOptions {
    StorageOptions {
        node,
        url: String::new(),
        ask_node: Arc::new(client()),
        key: ClusterKey::derive(PASSWORD),
        restore_from,
        progress: Arc::new(|_| {}),
    }
}

impl InProcessNode {
    /// Starts a node on a memory log, with the configuration that `adjust` makes.
    pub(crate) async fn start(adjust: impl FnOnce(&mut Config)) -> Self {
        let origin = RandomId::random().unwrap();
        Self::start_on_log(Arc::new(MemoryLog::new(origin, 0)), origin, adjust).await
    }

    /// Starts a node on `log`.
    pub(crate) async fn start_on_log(
        log: Arc<dyn Log>,
        origin: RandomId,
        adjust: impl FnOnce(&mut Config),
    ) -> Self {
        Self::start_on_storage(Storage::of(log, origin), origin, adjust).await
    }

    /// Starts a node on `storage` and waits until it is ready.
    pub(crate) async fn start_on_storage(
        storage: Storage,
        origin: RandomId,
        adjust: impl FnOnce(&mut Config),
    ) -> Self {
        let node = Self::launch(storage, origin, adjust);
        eventually("ready", async || {
            (node.ops("/readyz").await.status == 200).then_some(())
        })
        .await;
        node
    }

    /// Starts a node on `storage`.
    pub(crate) fn launch(
        storage: Storage,
        origin: RandomId,
        adjust: impl FnOnce(&mut Config),
    ) -> Self {
        let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut config = Config {
            write_addr: anywhere,
            read_addr: anywhere,
            ops_addr: anywhere,
            credentials: Credentials::new("admin", PASSWORD),
            http: HttpConfig::default(),
            writer: default_writer_limits(),
            memory_max: MemoryMax::Percent(80),
            restore_from: None,
            cluster: ClusterConfig::single_node(),
        };
        adjust(&mut config);
        let sockets = Sockets::bind(&config).unwrap();
        let ports = Ports::new(
            sockets.write.local_addr().unwrap(),
            sockets.read.local_addr().unwrap(),
            sockets.ops.local_addr().unwrap(),
        );
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(async move {
            let shutdown = async {
                let _ = stopped.await;
            };
            lifecycle::run(config, origin, storage, sockets, shutdown).await
        });
        Self {
            ports,
            stop: Some(stop),
            running,
        }
    }

    /// Requests a shutdown, like a signal.
    pub(crate) fn request_stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    /// Waits until the shutdown has finished.
    pub(crate) async fn wait_until_stopped(self) {
        with_timeout("the shutdown of the node", self.running)
            .await
            .unwrap()
            .unwrap();
    }

    /// Waits until the node fails; returns the error.
    pub(crate) async fn wait_for_error(self) -> String {
        let ended = with_timeout("the shutdown of the node", self.running)
            .await
            .unwrap();
        ended.unwrap_err().to_string()
    }
}
