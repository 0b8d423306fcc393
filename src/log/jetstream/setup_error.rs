//! The errors of opening the stream.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::log::Seq;

/// Why the stream can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The replica's copy of the log can't be opened.
    #[error("cannot open the WAL in {dir}: {error}; check the disk and the permissions", dir = dir.display())]
    Wal {
        /// Its directory.
        dir: PathBuf,
        /// The system's error.
        error: io::Error,
    },
    /// The broker does not answer.
    #[error(
        "no answer from NATS at {servers}: {why}; check --nats-url, and that nats-server runs there \
         with JetStream (nats-server -js)"
    )]
    Unreachable {
        /// The servers.
        servers: String,
        /// What went wrong.
        why: Arc<str>,
    },
    /// The broker answers, but its JetStream has no leader.
    #[error(
        "NATS at {servers} answers, but JetStream has no leader: {why}; start the missing servers or \
         repair the routes, so that a majority is connected (nats server report jetstream)"
    )]
    NoLeader {
        /// The servers.
        servers: String,
        /// What went wrong.
        why: Arc<str>,
    },
    /// The broker rejects the credentials of this process.
    #[error(
        "NATS at {servers} rejects this replica: {why}; check the name and password in --nats-url, \
         or the file in --nats-creds"
    )]
    NotAllowed {
        /// The servers.
        servers: String,
        /// The server's error.
        why: Arc<str>,
    },
    /// The servers' configuration does not allow the log.
    #[error("NATS at {servers} cannot be used: {why}")]
    Unusable {
        /// The servers.
        servers: String,
        /// Why not.
        why: Arc<str>,
    },
    /// The broker rejects a request for the stream.
    #[error("NATS rejected the request for stream {stream}: {why}")]
    Rejected {
        /// The stream.
        stream: String,
        /// The server's error.
        why: Arc<str>,
    },
    /// A stream of this name has another configuration.
    #[error("stream {stream} has {setting} {found}, expected {wanted}; {fix}")]
    WrongSetting {
        /// The stream.
        stream: String,
        /// Which setting.
        setting: &'static str,
        /// The required value.
        wanted: String,
        /// The actual value.
        found: String,
        /// The fix.
        fix: String,
    },
    /// A stream of this name was not created by gradestore.
    #[error(
        "stream {stream} is not a gradestore log: its metadata has no {key}; choose another \
         --stream, or set an id to use this one: nats stream edit {stream} --metadata \
         {key}=$(openssl rand -hex 16)"
    )]
    NoLogId {
        /// The stream.
        stream: String,
        /// The metadata key of the id.
        key: &'static str,
    },
    /// `--restore-from` needs a new stream, and this one exists.
    #[error(
        "refusing to restore: stream {stream} already exists and ends at batch {end}; remove \
         --restore-from to start normally, or delete the stream if it is not needed (nats stream \
         rm {stream})"
    )]
    NotEmpty {
        /// The stream.
        stream: String,
        /// Its last batch.
        end: Seq,
    },
    /// Another process runs as this replica: its data directory was copied.
    #[error(
        "another process at {url} (node {node}) is running as replica {replica}: one of the two data \
         directories is a copy of the other; stop that process, or remove the file replica-id from \
         the copy"
    )]
    SameReplica {
        /// The replica's id.
        replica: Box<str>,
        /// The other process.
        node: Box<str>,
        /// The URL of its write port.
        url: Box<str>,
    },
    /// The system returned no random bytes for the log's id.
    #[error("cannot get random bytes from the system: {0}")]
    Random(#[from] getrandom::Error),
}
