//! Flags, their environment twins, and what they make.
//!
//! Every flag has a twin `GRADESTORE_<FLAG>`; a flag beats it. What can't be right stops the start
//! with the key, the value and the fix.

mod args;
mod parse;
mod password;
mod values;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::backup::CHUNK_TEXT_BYTES;
use crate::http::Credentials;
use crate::http::listener::ListenerLimits;
use crate::log::Servers;
use crate::memory::MemoryMax;
use crate::replication::WriterLimits;

pub use args::{
    BackupArgs, Cli, Command, CredentialArgs, HealthArgs, ImportArgs, Part, ServeArgs, VerifyArgs,
};
pub use parse::{check_env, check_env_names, parse, parse_args};

/// Why the configuration can't be used. The text names the key, the value and the fix.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// An environment variable that begins like ours but is none.
    #[error("unknown environment variable {name}; remove it, or use one of {known}")]
    UnknownEnv {
        /// The variable.
        name: String,
        /// The ones there are.
        known: String,
    },
    /// Two ways to say the password.
    #[error("both GRADESTORE_PASSWORD and GRADESTORE_PASSWORD_FILE are set; remove one of them")]
    TwoPasswords,
    /// A password that can't be one.
    #[error("the password in {key} {why}; put one there of at least one character, on one line")]
    BadPassword {
        /// Where it came from.
        key: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The password's file can't be read.
    #[error(
        "cannot read the password from --password-file {path}: {error}; make the file, readable for this user, with the password in it"
    )]
    PasswordFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// Two listeners at one address.
    #[error("{first} and {second} are both {address}; give each its own port")]
    SameAddress {
        /// A flag.
        first: &'static str,
        /// Another.
        second: &'static str,
        /// What both say.
        address: SocketAddr,
    },
    /// Nodes of one store must have one password.
    #[error(
        "--nats-url needs a password, the same for all nodes of the store; set GRADESTORE_PASSWORD \
         or --password-file"
    )]
    NoSharedPassword,
    /// A node can't be asked without a password.
    #[error("no password; set GRADESTORE_PASSWORD or --password-file to the node's")]
    NoPassword,
    /// No random bytes for a password.
    #[error("the system gave no random bytes for a password: {0}; set GRADESTORE_PASSWORD")]
    Random(#[from] getrandom::Error),
}

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

/// A password that was made because none was given; to be shown once.
pub struct MadePassword(pub String);

impl Config {
    /// Checks what the flags say together and reads the password; makes one if none is given.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn from_args(args: &ServeArgs) -> Result<(Self, Option<MadePassword>), ConfigError> {
        let addresses = [
            ("--write-addr", args.write_addr),
            ("--read-addr", args.read_addr),
            ("--ops-addr", args.ops_addr),
        ];
        for (index, (first, address)) in addresses.iter().enumerate() {
            let same = |(_, other): &&(_, SocketAddr)| other == address && address.port() != 0;
            if let Some((second, _)) = addresses.iter().skip(index + 1).find(same) {
                return Err(ConfigError::SameAddress {
                    first,
                    second,
                    address: *address,
                });
            }
        }
        let given = password::given(args.credentials.password_file.as_deref())?;
        let made = match &given {
            Some(_) => None,
            // One made here would be another one on each node.
            None if args.nats_url.is_some() => return Err(ConfigError::NoSharedPassword),
            None => Some(MadePassword(password::make()?)),
        };
        let password = given
            .as_deref()
            .or(made.as_ref().map(|made| made.0.as_str()))
            .unwrap_or_default();
        let credentials = Credentials::new(&args.credentials.username, password);
        let config = Self {
            write_addr: args.write_addr,
            read_addr: args.read_addr,
            ops_addr: args.ops_addr,
            credentials: match args.measure_without.contains(&Part::Auth) {
                true => credentials.unchecked(),
                false => credentials,
            },
            http: HttpConfig {
                counted: !args.measure_without.contains(&Part::Metrics),
                past: if args.measure_without.contains(&Part::Direct) {
                    Past::Nothing
                } else if args.measure_without.contains(&Part::Plain) {
                    Past::Axum
                } else {
                    Past::Hyper
                },
                ..HttpConfig::default()
            },
            writer: WriterLimits {
                wait_max: args.write_timeout,
                ..default_writer_limits()
            },
            memory_max: args.memory_max,
            restore_from: args.restore_from.clone(),
            cluster: ClusterConfig {
                advertise_url: args.advertise_url.clone(),
                broker: args.nats_url.as_ref().and_then(Servers::first),
                peers: args.peer.clone(),
                checkpoint_interval: args.checkpoint_interval,
                ..ClusterConfig::alone()
            },
        };
        Ok((config, made))
    }
}
