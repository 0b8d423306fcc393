//! The flags and their environment twins.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use super::error::ConfigError;
use super::password::{self, GeneratedPassword};
use super::values::{
    address, at_least, base_url, expect_peers, memory_max, replicas, servers, stream_name, threads,
    username, yes_or_no,
};
use crate::http::Credentials;
use crate::log::{JetStreamConfig, Servers};
use crate::node::config::{ClusterConfig, Config, HttpConfig, default_writer_limits};
use crate::node::data_dir::{DataDir, StorageConfig};
use crate::replication::WriterLimits;
use crate::replication::memory::MemoryMax;
use crate::telemetry::LogFormat;

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "gradestore",
    version,
    about = "A replicated in-memory store of user grades",
    after_help = "Without a command, `serve` runs. `gradestore serve --help` shows its flags."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a node
    Serve(Box<ServeArgs>),
    /// Fetch a backup from a node, verify it, and keep it
    Backup(BackupArgs),
    /// Load a backup, or another gzip CSV, into a node that runs
    Import(ImportArgs),
    /// Check that a backup file is whole and unchanged; exit code 0 if so, else 1
    Verify(VerifyArgs),
    /// Ask a node on this machine whether it is ready; exit code 0 if so, else 1
    Health(HealthArgs),
}

/// A part that a node leaves out to measure its cost.
#[cfg(feature = "measure")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum MeasuredPart {
    /// Credentials: every client may write.
    Auth,
    /// Metrics of requests.
    Metrics,
    /// The fast path.
    FastPath,
}

/// Flags of `gradestore serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Where POST /set is taken
    #[arg(long, env = "GRADESTORE_WRITE_ADDR", value_name = "IP:PORT", default_value = "127.0.0.1:8080",
        value_parser = address("--write-addr", "GRADESTORE_WRITE_ADDR", "127.0.0.1:8080"))]
    pub write_addr: SocketAddr,

    /// Where GET /get is answered
    #[arg(long, env = "GRADESTORE_READ_ADDR", value_name = "IP:PORT", default_value = "127.0.0.1:8081",
        value_parser = address("--read-addr", "GRADESTORE_READ_ADDR", "127.0.0.1:8081"))]
    pub read_addr: SocketAddr,

    /// Where /livez, /readyz, /metrics and /status are answered
    #[arg(long, env = "GRADESTORE_OPS_ADDR", value_name = "IP:PORT", default_value = "127.0.0.1:8082",
        value_parser = address("--ops-addr", "GRADESTORE_OPS_ADDR", "127.0.0.1:8082"))]
    pub ops_addr: SocketAddr,

    /// Name and password
    #[command(flatten)]
    pub credentials: CredentialArgs,

    /// Where the log and the snapshots are kept
    #[arg(
        long,
        env = "GRADESTORE_DATA_DIR",
        value_name = "DIR",
        default_value = "./gradestore-data"
    )]
    pub data_dir: PathBuf,

    /// Keep nothing on disk: what is written is gone when the process ends
    #[arg(long, env = "GRADESTORE_EPHEMERAL", value_parser = yes_or_no)]
    pub ephemeral: bool,

    /// How often a snapshot is written to the data directory
    #[arg(long, env = "GRADESTORE_SNAPSHOT_INTERVAL", value_name = "TIME", default_value = "5m",
        value_parser = at_least("1s", "--snapshot-interval", "GRADESTORE_SNAPSHOT_INTERVAL", "5m or 90s"))]
    pub snapshot_interval: Duration,

    /// A backup to begin from; only for a data directory that nothing has been written to
    #[arg(long, env = "GRADESTORE_RESTORE_FROM", value_name = "FILE")]
    pub restore_from: Option<PathBuf>,

    /// How long a write waits for its acknowledgement. A client's own timeout should be longer
    #[arg(long, env = "GRADESTORE_WRITE_TIMEOUT", value_name = "TIME", default_value = "10s",
        value_parser = at_least("1s", "--write-timeout", "GRADESTORE_WRITE_TIMEOUT", "10s or 30s"))]
    pub write_timeout: Duration,

    /// Threads that answer requests and follow the log; by default half as many as there are cores.
    /// Backups and restores have others
    #[arg(long, env = "GRADESTORE_THREADS", value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,

    /// Above so much memory in use the node refuses writes for new users, with 507: bytes with a
    /// unit, such as 900MB or 8GiB, or a share of what the control group or the machine has
    #[arg(long, env = "GRADESTORE_MEMORY_MAX", value_name = "SIZE", default_value = "80%",
        value_parser = memory_max)]
    pub memory_max: MemoryMax,

    /// How log lines are written, on standard error; RUST_LOG says which
    #[arg(
        long,
        env = "GRADESTORE_LOG_FORMAT",
        value_name = "FORMAT",
        default_value = "text"
    )]
    pub log_format: LogFormat,

    /// Leave parts out to measure their cost
    #[cfg(feature = "measure")]
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    pub measure_without: Vec<MeasuredPart>,

    /// NATS servers with JetStream, with a comma between two; all nodes that share them and
    /// --stream are one store. Without it a node is alone
    // Without `hide_env_values` the help shows the variable's value, and a password in it.
    #[arg(long, env = "GRADESTORE_NATS_URL", hide_env_values = true, value_name = "URL",
        value_parser = servers)]
    pub nats_url: Option<Servers>,

    /// A file with credentials for the NATS servers
    #[arg(
        long,
        env = "GRADESTORE_NATS_CREDS",
        value_name = "FILE",
        requires = "nats_url"
    )]
    pub nats_creds: Option<PathBuf>,

    /// The stream that holds the log; it is made if it is not there
    #[arg(long, env = "GRADESTORE_STREAM", value_name = "NAME", default_value = "GRADES",
        value_parser = stream_name, requires = "nats_url")]
    pub stream: String,

    /// On how many NATS servers the stream is kept, 1 to 5
    #[arg(long, env = "GRADESTORE_REPLICAS", value_name = "N", default_value = "1",
        value_parser = replicas, requires = "nats_url")]
    pub replicas: usize,

    /// How long the stream keeps a batch; a node that was away for longer can't follow it
    #[arg(long, env = "GRADESTORE_LOG_RETENTION", value_name = "TIME", default_value = "24h",
        value_parser = at_least("1m", "--log-retention", "GRADESTORE_LOG_RETENTION", "24h or 7d"),
        requires = "nats_url")]
    pub log_retention: Duration,

    /// Where other nodes reach this one's write port, for its backup; by default its address as
    /// the NATS servers see it
    #[arg(long, env = "GRADESTORE_ADVERTISE_URL", value_name = "URL",
        value_parser = base_url("--advertise-url", "GRADESTORE_ADVERTISE_URL"), requires = "nats_url")]
    pub advertise_url: Option<String>,

    /// Another node's write port, beside those that are found through NATS; may be given again. In
    /// the variable, with a comma between two
    #[arg(long, env = "GRADESTORE_PEER", value_name = "URL", value_delimiter = ',',
        value_parser = base_url("--peer", "GRADESTORE_PEER"), requires = "nats_url")]
    pub peer: Vec<String>,

    /// How many replicas, this one included, must have announced that they hold no data before one of
    /// them creates the stream
    #[arg(long, env = "GRADESTORE_EXPECT_PEERS", value_name = "N", default_value = "1",
        value_parser = expect_peers, requires = "nats_url")]
    pub expect_peers: usize,

    /// Discard this replica's data of this log, and follow the log that the stream holds; for once,
    /// after a stream was lost for good. The files are kept under another name
    #[arg(
        long,
        env = "GRADESTORE_ABANDON_LOG",
        value_name = "ID",
        requires = "nats_url"
    )]
    pub abandon_log: Option<String>,

    /// How often nodes exchange digests to detect divergence
    #[arg(long, env = "GRADESTORE_CHECKPOINT_INTERVAL", value_name = "TIME", default_value = "1m",
        value_parser = at_least("100ms", "--checkpoint-interval", "GRADESTORE_CHECKPOINT_INTERVAL", "1m or 10s"),
        requires = "nats_url")]
    pub checkpoint_interval: Duration,
}

/// Whom to ask or let in as.
#[derive(Debug, Clone, Args)]
pub struct CredentialArgs {
    /// The user name of the node
    #[arg(long, env = "GRADESTORE_USERNAME", value_name = "NAME", default_value = "admin",
        value_parser = username)]
    pub username: String,

    /// A file that holds the password; GRADESTORE_PASSWORD may hold the password itself. A node
    /// that is alone and has neither makes one and shows it at the start
    #[arg(long, env = "GRADESTORE_PASSWORD_FILE", value_name = "FILE")]
    pub password_file: Option<PathBuf>,
}

/// Flags of `gradestore backup`.
#[derive(Debug, Clone, Args)]
pub struct BackupArgs {
    /// The node's write port, such as http://127.0.0.1:8080
    #[arg(long, env = "GRADESTORE_FROM", value_name = "URL",
        value_parser = base_url("--from", "GRADESTORE_FROM"))]
    pub from: String,

    /// Where to put it; - for standard output
    #[arg(short, long, env = "GRADESTORE_OUTPUT", value_name = "FILE")]
    pub output: PathBuf,

    /// Name and password
    #[command(flatten)]
    pub credentials: CredentialArgs,
}

/// Flags of `gradestore import`.
#[derive(Debug, Clone, Args)]
pub struct ImportArgs {
    /// The backup, or any gzip CSV with a header row of the same columns; - for standard input
    pub file: PathBuf,

    /// The node's write port, such as http://127.0.0.1:8080
    #[arg(long, env = "GRADESTORE_TO", value_name = "URL",
        value_parser = base_url("--to", "GRADESTORE_TO"))]
    pub to: String,

    /// How long a node that takes nothing for now is waited for
    #[arg(long, env = "GRADESTORE_WAIT", value_name = "TIME", default_value = "1m",
        value_parser = at_least("0s", "--wait", "GRADESTORE_WAIT", "1m or 10s"))]
    pub wait: Duration,

    /// Name and password
    #[command(flatten)]
    pub credentials: CredentialArgs,
}

/// Flags of `gradestore verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The backup
    pub file: PathBuf,
}

/// Flags of `gradestore health`.
#[derive(Debug, Args)]
pub struct HealthArgs {
    /// The node's ops address
    #[arg(long, env = "GRADESTORE_OPS_ADDR", value_name = "IP:PORT", default_value = "127.0.0.1:8082",
        value_parser = address("--ops-addr", "GRADESTORE_OPS_ADDR", "127.0.0.1:8082"))]
    pub ops_addr: SocketAddr,
}

/// How much longer than a write appends may wait before the log counts as unwritable: an election
/// alone takes 4 to 9 s.
const WRITE_SILENCE_BEYOND_TIMEOUT: Duration = Duration::from_millis(1500);

impl ServeArgs {
    /// Checks what the flags say together and reads the password; makes one if none is given.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn config(&self) -> Result<(Config, Option<GeneratedPassword>), ConfigError> {
        let addresses = [
            ("--write-addr", self.write_addr),
            ("--read-addr", self.read_addr),
            ("--ops-addr", self.ops_addr),
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
        let given = password::given(self.credentials.password_file.as_deref())?;
        let made = match &given {
            Some(_) => None,
            // One made here would be another one on each node.
            None if self.nats_url.is_some() => return Err(ConfigError::NoSharedPassword),
            None => Some(GeneratedPassword(password::make()?)),
        };
        let password = given
            .as_deref()
            .or(made.as_ref().map(|made| made.0.as_str()))
            .unwrap_or_default();
        let credentials = Credentials::new(&self.credentials.username, password);
        #[cfg_attr(
            not(feature = "measure"),
            expect(unused_mut, reason = "changed to measure")
        )]
        let mut config = Config {
            write_addr: self.write_addr,
            read_addr: self.read_addr,
            ops_addr: self.ops_addr,
            credentials,
            http: HttpConfig::default(),
            writer: WriterLimits {
                wait_max: self.write_timeout,
                ..default_writer_limits()
            },
            memory_max: self.memory_max,
            restore_from: self.restore_from.clone(),
            cluster: ClusterConfig {
                advertise_url: self.advertise_url.clone(),
                broker: self.nats_url.as_ref().and_then(Servers::first),
                peers: self.peer.clone(),
                checkpoint_interval: self.checkpoint_interval,
                ..ClusterConfig::alone()
            },
        };
        #[cfg(feature = "measure")]
        self.leave_out(&mut config);
        Ok((config, made))
    }

    #[cfg(feature = "measure")]
    fn leave_out(&self, config: &mut Config) {
        for part in &self.measure_without {
            match part {
                MeasuredPart::Auth => config.credentials.accept_all(),
                MeasuredPart::Metrics => config.http.counted = false,
                MeasuredPart::FastPath => config.http.fast_path = false,
            }
        }
    }

    /// Where the log is kept.
    #[must_use]
    pub fn storage(&self) -> StorageConfig {
        let dir = (!self.ephemeral).then(|| DataDir {
            dir: self.data_dir.clone(),
            snapshot_interval: self.snapshot_interval,
        });
        match (&self.nats_url, dir) {
            (Some(servers), data_dir) => StorageConfig::JetStream {
                stream: JetStreamConfig {
                    servers: servers.clone(),
                    creds: self.nats_creds.clone(),
                    stream: self.stream.clone(),
                    replicas: self.replicas,
                    retention: self.log_retention,
                    expect_peers: self.expect_peers,
                    peers: self.peer.clone(),
                    write_silence_max: self.write_timeout + WRITE_SILENCE_BEYOND_TIMEOUT,
                },
                data_dir,
                abandon_log: self.abandon_log.clone(),
            },
            (None, Some(data_dir)) => StorageConfig::Disk(data_dir),
            (None, None) => StorageConfig::Ephemeral,
        }
    }
}

impl CredentialArgs {
    /// The password to ask a node with.
    ///
    /// # Errors
    /// None is given, or it can't be one.
    pub fn password(&self) -> Result<String, ConfigError> {
        password::given(self.password_file.as_deref())?.ok_or(ConfigError::NoPassword)
    }
}
