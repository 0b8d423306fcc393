//! Nodes to test: the program as a child process, or one in this process where a test needs its
//! own limits or its own log.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, mpsc};

use gradestore::http::Credentials;
use gradestore::log::{ClusterKey, Log, MemoryLog, RandomId};
use gradestore::node::config::{ClusterConfig, Config, HttpConfig, default_writer_limits};
use gradestore::node::data_dir::{Opening, Storage};
use gradestore::node::lifecycle::{self, AppError, Sockets};
use gradestore::replication::SILENCE_MAX;
use gradestore::replication::memory::MemoryMax;
use gradestore::replication::peer_client::{Client, Compression};
use parking_lot::Mutex;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::wire::{Answer, PATIENCE, Raw, eventually, in_time};

pub(crate) const PASSWORD: &str = "correct horse";
/// `admin` and [`PASSWORD`].
pub(crate) const AUTHORIZATION: &str = "Basic YWRtaW46Y29ycmVjdCBob3JzZQ==";
/// Each port anywhere.
pub(crate) const ANY_PORTS: [&str; 3] = [
    "--write-addr=127.0.0.1:0",
    "--read-addr=127.0.0.1:0",
    "--ops-addr=127.0.0.1:0",
];

/// A node's three ports, and a client for them.
#[derive(Clone)]
pub(crate) struct Ports {
    pub(crate) write: SocketAddr,
    pub(crate) read: SocketAddr,
    pub(crate) ops: SocketAddr,
    pub(crate) client: reqwest::Client,
}

impl Ports {
    pub(crate) fn new(write: SocketAddr, read: SocketAddr, ops: SocketAddr) -> Self {
        Self {
            write,
            read,
            ops,
            client: reqwest::Client::builder().no_proxy().build().unwrap(),
        }
    }

    /// `POST /set`, as it should be done.
    pub(crate) async fn set(&self, body: impl Into<reqwest::Body>) -> Answer {
        let request = self.client.post(format!("http://{}/set", self.write));
        let request = request
            .header("authorization", AUTHORIZATION)
            .header("content-type", "application/json")
            .body(body);
        Answer::of(in_time("POST /set", request.send()).await.unwrap()).await
    }

    /// `GET /get`, as it should be done.
    pub(crate) async fn get(&self, user_id: &str) -> Answer {
        let user_id = utf8_percent_encode(user_id, NON_ALPHANUMERIC);
        let url = format!("http://{}/get?user_id={user_id}", self.read);
        Answer::of(in_time(&url, self.client.get(&url).send()).await.unwrap()).await
    }

    /// `GET` on the ops port.
    pub(crate) async fn ops(&self, path: &str) -> Answer {
        let url = format!("http://{}{path}", self.ops);
        Answer::of(in_time(&url, self.client.get(&url).send()).await.unwrap()).await
    }

    /// The value of one line of `/metrics`, named with its labels.
    pub(crate) async fn metric(&self, name: &str) -> Option<f64> {
        let metrics = self.ops("/metrics").await.body;
        let mut lines = metrics.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        Some(value.parse().unwrap())
    }

    /// Waits until a line of `/metrics` has a value.
    pub(crate) async fn metric_reaches(&self, name: &str, value: f64) {
        eventually(&format!("{name} {value}"), async || {
            self.metric(name).await.filter(|now| *now == value)
        })
        .await;
    }
}

/// A request for `POST /set` in bytes; `framing` is the header lines that frame the body.
pub(crate) fn set_request(framing: &str, body: &str) -> String {
    format!(
        "POST /set HTTP/1.1\r\nhost: x\r\nauthorization: {AUTHORIZATION}\r\n\
         content-type: application/json\r\n{framing}\r\n\r\n{body}"
    )
}

/// The same with the length of `body`.
pub(crate) fn set_request_of(body: &str) -> String {
    set_request(&format!("content-length: {}", body.len()), body)
}

/// A request for `DELETE /set` in bytes.
pub(crate) fn delete_request(query: &str) -> String {
    format!("DELETE /set{query} HTTP/1.1\r\nhost: x\r\nauthorization: {AUTHORIZATION}\r\n\r\n")
}

/// A request for `GET /get` in bytes.
pub(crate) fn get_request(query: &str, headers: &str) -> String {
    format!("GET /get{query} HTTP/1.1\r\nhost: x\r\n{headers}\r\n")
}

/// The program, with an environment that holds nothing of ours.
pub(crate) fn program() -> Command {
    program_at(Path::new(env!("CARGO_BIN_EXE_gradestore")))
}

/// Another build of it.
pub(crate) fn program_at(path: &Path) -> Command {
    let mut command = Command::new(path);
    for (name, _) in std::env::vars_os() {
        let of_ours = name
            .to_str()
            .is_some_and(|name| name.starts_with("GRADESTORE_"));
        if of_ours || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    // A test that wants a disk says which.
    command.env("GRADESTORE_EPHEMERAL", "true");
    command
}

/// What `command` runs, run by `runner`, which takes a command line as its last arguments.
pub(crate) fn run_by(runner: &[&str], command: &Command) -> Command {
    let mut run = Command::new(runner[0]);
    run.args(&runner[1..])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => run.env(name, value),
            None => run.env_remove(name),
        };
    }
    run
}

/// Runs a command that must end by itself.
pub(crate) fn run(command: &mut Command) -> Output {
    let command = command.stdin(Stdio::null());
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = Pid::from_child(&child);
    let (ended, end) = mpsc::channel();
    std::thread::spawn(move || ended.send(child.wait_with_output()));
    match end.recv_timeout(PATIENCE) {
        Ok(output) => output.unwrap(),
        Err(_) => {
            kill_process(pid, Signal::KILL).unwrap();
            panic!("does not end: {command:?}");
        }
    }
}

/// A child process that is killed when dropped.
pub(crate) struct Process(pub(crate) Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The program as a child process.
pub(crate) struct Node {
    ports: Ports,
    process: Process,
    /// What it has said so far.
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
    /// One that is ready.
    pub(crate) async fn start() -> Self {
        Self::start_with(
            program()
                .env("GRADESTORE_PASSWORD", PASSWORD)
                .args(ANY_PORTS),
        )
        .await
    }

    /// One that `command` starts, ready.
    pub(crate) async fn start_with(command: &mut Command) -> Self {
        let node = Self::launch(command).await;
        eventually("ready for writes", async || {
            (node.ops("/readyz/write").await.status == 200).then_some(())
        })
        .await;
        node
    }

    /// One that `command` starts, listening.
    pub(crate) async fn launch(command: &mut Command) -> Self {
        let command = command.stdin(Stdio::null());
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Process(command.spawn().unwrap());
        let stdout = collected(process.0.stdout.take().unwrap());
        let stderr = collected(process.0.stderr.take().unwrap());
        let listening = eventually("the log line that names the ports", async || {
            let ended = process.0.try_wait().unwrap();
            let stderr = stderr.lock();
            let mut lines = stderr.lines();
            let listening = lines.find(|line| line.contains("listening"));
            assert!(listening.is_some() || ended.is_none(), "it ended: {stderr}");
            listening.map(str::to_owned)
        })
        .await;
        let address = |field: &str| {
            // As text or as JSON.
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

    /// Kills it as the system would: at once, with no chance to tidy up.
    pub(crate) fn kill(self) {
        drop(self.process);
    }

    /// Stops it as an operator would.
    pub(crate) async fn end(mut self) {
        self.signal(Signal::TERM);
        assert_eq!(self.exit().await.code(), Some(0));
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process.0), signal).unwrap();
    }

    /// Waits until it has ended by itself.
    pub(crate) async fn exit(&mut self) -> ExitStatus {
        eventually("the process's end", async || {
            self.process.0.try_wait().unwrap()
        })
        .await
    }
}

/// Collects what a child says, whole lines at a time.
pub(crate) fn collected(pipe: impl Read + Send + 'static) -> Arc<Mutex<String>> {
    let said = Arc::new(Mutex::new(String::new()));
    let lines = Arc::clone(&said);
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            lines.lock().push_str(&format!("{line}\n"));
        }
    });
    said
}

/// A node in this process.
pub(crate) struct Local {
    ports: Ports,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<Result<(), AppError>>,
}

impl Deref for Local {
    type Target = Ports;

    fn deref(&self) -> &Ports {
        &self.ports
    }
}

/// Asks other nodes.
pub(crate) fn client() -> Client {
    let account = Credentials::new("admin", PASSWORD).for_client();
    Client::new(account, SILENCE_MAX, Compression::IfSlow).unwrap()
}

/// What opening a log is told, for node `node`.
pub(crate) fn opening(node: RandomId, restore_from: Option<PathBuf>) -> Opening {
    Opening {
        node,
        url: String::new(),
        ask_node: Arc::new(client()),
        key: ClusterKey::derive(PASSWORD),
        restore_from,
        progress: Arc::new(|_| {}),
    }
}

impl Local {
    /// One with a memory log and the limits that `adjust` makes.
    pub(crate) async fn start(adjust: impl FnOnce(&mut Config)) -> Self {
        let origin = RandomId::random().unwrap();
        Self::run(Arc::new(MemoryLog::new(origin, 0)), origin, adjust).await
    }

    /// One on `log`.
    pub(crate) async fn run(
        log: Arc<dyn Log>,
        origin: RandomId,
        adjust: impl FnOnce(&mut Config),
    ) -> Self {
        Self::run_on(Storage::of(log, origin), origin, adjust).await
    }

    /// One on `storage`, ready.
    pub(crate) async fn run_on(
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

    /// One on `storage`, listening. All that knows how a node is put together is here.
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
            cluster: ClusterConfig::alone(),
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

    /// Tells it to stop, as a signal would.
    pub(crate) fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    /// Waits until it has stopped.
    pub(crate) async fn stopped(self) {
        in_time("the node's end", self.running)
            .await
            .unwrap()
            .unwrap();
    }

    /// Waits until it has ended by itself; why.
    pub(crate) async fn failed(self) -> String {
        let ended = in_time("the node's end", self.running).await.unwrap();
        ended.unwrap_err().to_string()
    }
}

/// A connection on which lines are to come, and none has yet.
pub(crate) async fn half_sent_lines(node: &Ports) -> Raw {
    let mut connection = Raw::connect(node.write).await;
    let framing = "transfer-encoding: chunked";
    let request = set_request(framing, "").replace("/json", "/x-ndjson");
    connection.send(request).await;
    node.metric_reaches("gradestore_http_requests_in_flight", 2.0)
        .await;
    connection
}

/// A connection on which a request's header has arrived and its body has not.
pub(crate) async fn half_sent_set(node: &Ports, body: &str) -> Raw {
    let mut connection = Raw::connect(node.write).await;
    connection
        .send(set_request_of(body).strip_suffix(body).unwrap())
        .await;
    node.metric_reaches("gradestore_http_requests_in_flight", 2.0)
        .await;
    connection
}
