//! The settings of the log.

use std::path::PathBuf;
use std::time::Duration;

use super::servers::Servers;

/// The subject that batches are published to.
pub(super) const SUBJECT: &str = "grades.set";
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
}
