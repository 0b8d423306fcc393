//! What a node is built from.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::backup::CHUNK_TEXT_BYTES;
use crate::http::Credentials;
use crate::http::listener::ListenerLimits;
use crate::replication::WriterLimits;
use crate::replication::memory::MemoryMax;

/// Everything a node is built from.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the write port listens.
    pub write_addr: SocketAddr,
    /// Where the read port listens.
    pub read_addr: SocketAddr,
    /// Where the ops port listens.
    pub ops_addr: SocketAddr,
    /// What writes need.
    pub credentials: Credentials,
    /// Bounds of requests and connections.
    pub http: HttpConfig,
    /// Bounds of the write path.
    pub writer: WriterLimits,
    /// Above so much memory in use writes for new users are refused.
    pub memory_max: MemoryMax,
    /// A backup to begin from.
    pub restore_from: Option<PathBuf>,
    /// How nodes of one store find and compare each other.
    pub cluster: ClusterConfig,
}

/// How nodes of one store find and compare each other.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// Where the others reach this one's write port; `None`: as `broker` sees it.
    pub advertise_url: Option<String>,
    /// A server of the broker: host and port.
    pub broker: Option<(String, u16)>,
    /// Write ports of others, given by hand.
    pub peers: Vec<String>,
    /// How often this one tells the others what it holds.
    pub checkpoint_interval: Duration,
    /// How many bytes of the log may be read ahead while a backup is being restored.
    pub restore_buffer_bytes_max: u64,
}

impl ClusterConfig {
    /// For a node that is alone.
    #[must_use]
    pub fn alone() -> Self {
        Self {
            advertise_url: None,
            broker: None,
            peers: Vec::new(),
            checkpoint_interval: Duration::from_secs(60),
            restore_buffer_bytes_max: 32 << 20,
        }
    }
}

/// What the requests that come most often go past; each has all before it in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Past {
    /// They go through hyper and the router of axum.
    Nothing,
    /// Past the router.
    Axum,
    /// Plain ones past hyper as well.
    Hyper,
}

/// Bounds of requests and connections.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// The read and the write port.
    pub data: ListenerLimits,
    /// The ops port, whose clients are few.
    pub ops: ListenerLimits,
    /// How long a body may take to arrive.
    pub body_wait_max: Duration,
    /// How long a read with `Grade-Position` may wait.
    pub position_wait_max: Duration,
    /// The maximum number of reads that wait for a `Grade-Position` at once. Less than
    /// `connections_max`: each holds a connection of the read port, and other reads need some too.
    pub position_waits_max: usize,
    /// Backups that may be sent at once.
    pub backups_max: usize,
    /// Requests for one that may wait for their turn.
    pub backups_waiting_max: usize,
    /// How long a request for a backup may wait for its turn.
    pub backup_wait_max: Duration,
    /// Rows of a backup go in chunks of about so many bytes, before compression.
    pub backup_chunk_text_bytes: usize,
    /// Whether requests are counted.
    pub counted: bool,
    /// What `GET /get` and `POST /set` go past.
    pub past: Past,
    /// How long running requests may take to finish once the node stops.
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
            body_wait_max: Duration::from_secs(10),
            position_wait_max: Duration::from_secs(5),
            position_waits_max: 8000,
            backups_max: 2,
            backups_waiting_max: 16,
            backup_wait_max: Duration::from_secs(2),
            backup_chunk_text_bytes: CHUNK_TEXT_BYTES,
            counted: true,
            past: Past::Hyper,
            drain_max: Duration::from_secs(10),
        }
    }
}

/// The write path's bounds where nothing else is said.
#[must_use]
pub fn default_writer_limits() -> WriterLimits {
    WriterLimits {
        queue_requests_max: 8192,
        queue_bytes_max: 64 << 20,
        batch_patches_max: 1024,
        wait_max: Duration::from_secs(10),
        bulks_max: 32,
    }
}
