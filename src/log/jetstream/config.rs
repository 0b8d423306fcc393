//! The settings of the log.

use std::path::PathBuf;
use std::time::Duration;

use super::servers::Servers;
use crate::log::WalConfig;

/// The default stream, whose subjects do not contain its name.
const DEFAULT_STREAM: &str = "GRADES";
/// The least `max_payload` of a server: 1,024 writes of less than 800 bytes each, plus headers.
pub(super) const MESSAGE_BYTES_NEEDED: usize = 1 << 20;

/// The NATS servers and the settings of the stream.
#[derive(Debug, Clone)]
pub struct JetStreamConfig {
    /// The log connects to any one of these.
    pub servers: Servers,
    /// A file with credentials.
    pub creds: Option<PathBuf>,
    /// The name of the stream.
    pub stream: String,
    /// The number of servers that hold the stream.
    pub replicas: usize,
    /// How long a batch is kept.
    pub retention: Duration,
    /// How many replicas must have announced themselves before one creates the stream.
    pub expect_peers: usize,
    /// Write ports of other replicas: each must have answered before this one creates the stream.
    pub peers: Vec<String>,
    /// How long appends may wait before the log counts as unwritable.
    pub write_silence_max: Duration,
    /// The local copy of the log; `None` for a replica without a data directory.
    pub wal: Option<WalConfig>,
}

impl JetStreamConfig {
    /// The subject that batches are published to. Each stream has its own, because NATS rejects
    /// streams whose subjects overlap.
    pub(super) fn subject(&self) -> String {
        format!("grades.{}set", self.stream_token())
    }

    /// The prefix of the subjects on which replicas ask each other for announcements. Each stream
    /// has its own, because the replicas of another one are another cluster.
    pub(super) fn status_prefix(&self) -> String {
        format!("gradestore.{}status.", self.stream_token())
    }

    fn stream_token(&self) -> String {
        match &*self.stream {
            DEFAULT_STREAM => String::new(),
            stream => format!("{stream}."),
        }
    }
}
