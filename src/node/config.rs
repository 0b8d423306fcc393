//! The configuration of a node.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::backup::CHUNK_TEXT_BYTES;
use crate::http::Credentials;
use crate::http::listener::ListenerLimits;
use crate::replication::WriterLimits;
use crate::replication::memory::MemoryMax;

/// The configuration of a node.
#[derive(Debug, Clone)]
pub struct Config {
    /// The address of the write port.
    pub write_addr: SocketAddr,
    /// The address of the read port.
    pub read_addr: SocketAddr,
    /// The address of the ops port.
    pub ops_addr: SocketAddr,
    /// The credentials for writes and backups.
    pub credentials: Credentials,
    /// Limits of requests and connections.
    pub http: HttpConfig,
    /// Limits of the write path.
    pub writer: WriterLimits,
    /// The memory in use above which writes for new users are rejected.
    pub memory_max: MemoryMax,
    /// A backup to start from.
    pub restore_from: Option<PathBuf>,
    /// How the nodes of a cluster find each other and compare their data.
    pub cluster: ClusterConfig,
}

/// How the nodes of a cluster find each other and compare their data.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// The URL of this node's write port for other nodes; `None`: its address on the route to
    /// `broker`.
    pub advertise_url: Option<String>,
    /// Host and port of a NATS server.
    pub broker: Option<(String, u16)>,
    /// The write ports of other nodes, from `--peer`.
    pub peers: Vec<String>,
    /// How often nodes exchange digests.
    pub checkpoint_interval: Duration,
    /// How many bytes of the log are buffered while a backup is being restored.
    pub restore_buffer_bytes_max: u64,
}

impl ClusterConfig {
    /// The configuration of a single node.
    #[must_use]
    pub fn single_node() -> Self {
        Self {
            advertise_url: None,
            broker: None,
            peers: Vec::new(),
            checkpoint_interval: Duration::from_secs(60),
            restore_buffer_bytes_max: 32 << 20,
        }
    }
}

/// Limits of requests and connections.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// The limits of the read and of the write port.
    pub data: ListenerLimits,
    /// The limits of the ops port, which has few clients.
    pub ops: ListenerLimits,
    /// The names other than `localhost` that a port on a loopback address answers for.
    pub allowed_hosts: Vec<String>,
    /// How long a body may take to arrive.
    pub body_wait_max: Duration,
    /// How long a read with `Grade-Position` may wait.
    pub position_wait_max: Duration,
    /// The maximum number of reads that wait for a `Grade-Position` at once. Less than
    /// `connections_max`: each holds a connection of the read port, and other reads need some too.
    pub position_waits_max: usize,
    /// The maximum number of backups that are sent at once.
    pub backups_max: usize,
    /// The maximum number of requests that wait to start a backup.
    pub backups_waiting_max: usize,
    /// How long a request may wait to start a backup.
    pub backup_wait_max: Duration,
    /// The approximate size of a backup's chunks before compression.
    pub backup_chunk_text_bytes: usize,
    /// Whether metrics of requests are recorded.
    pub metrics: bool,
    /// Whether the fast path answers requests.
    pub fast_path: bool,
    /// How long running requests may take to finish when the node stops.
    pub drain_max: Duration,
}

impl Default for HttpConfig {
    fn default() -> Self {
        let data = ListenerLimits {
            connections_max: 8192,
            header_wait_max: Duration::from_secs(10),
            idle_max: Duration::from_secs(75),
        };
        Self {
            data,
            ops: ListenerLimits {
                connections_max: 256,
                ..data
            },
            allowed_hosts: Vec::new(),
            body_wait_max: Duration::from_secs(10),
            position_wait_max: Duration::from_secs(5),
            position_waits_max: 8000,
            backups_max: 2,
            backups_waiting_max: 16,
            backup_wait_max: Duration::from_secs(2),
            backup_chunk_text_bytes: CHUNK_TEXT_BYTES,
            metrics: true,
            fast_path: true,
            drain_max: Duration::from_secs(10),
        }
    }
}

/// The default limits of the write path.
#[must_use]
pub fn default_writer_limits() -> WriterLimits {
    WriterLimits {
        queue_requests_max: 8192,
        queue_bytes_max: 64 << 20,
        batch_writes_max: 1024,
        wait_max: Duration::from_secs(10),
        bulks_max: 32,
    }
}
