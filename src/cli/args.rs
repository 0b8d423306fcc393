//! The flags and their environment variables.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use super::error::ConfigError;
use super::password::{self, PasswordSource};
use super::values::{
    address, at_least, base_url, count, host_name, memory_max, servers, stream_name, username,
    wal_keep, wal_sync, yes_or_no,
};
use crate::http::Credentials;
use crate::log::{JetStreamConfig, Servers, WalSync};
use crate::node::config::{ClusterConfig, Config, HttpConfig, default_writer_limits};
use crate::node::data_dir::{DataDir, StorageConfig, WalSettings};
use crate::replication::WriterLimits;
use crate::replication::memory::MemoryMax;
use crate::telemetry::LogFormat;

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "gradestore",
    version,
    about = "A replicated in-memory store of user grades",
    after_help = "Without a command, gradestore runs `serve`. `gradestore serve --help` lists its flags."
)]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a node
    Serve(Box<ServeArgs>),
    /// Download a backup from a node and verify it
    Backup(BackupArgs),
    /// Import a backup, or another gzip CSV, into a running node
    Import(ImportArgs),
    /// Check that a backup file is complete and undamaged. Prints OK and exits with 0 if it is;
    /// otherwise prints CORRUPT and the reason, or why it cannot read the file, and exits with 1
    Verify(VerifyArgs),
    /// Check whether a node on this machine is ready; exit code 0 if so, otherwise 1
    Health(HealthArgs),
}

/// A part of a node that can be disabled to measure its cost.
#[cfg(feature = "measure")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum MeasuredPart {
    /// The check of credentials: every client may write.
    Auth,
    /// The metrics of requests.
    Metrics,
    /// The fast path.
    FastPath,
    /// The local copy of a cluster's log.
    Wal,
}

/// Flags of `gradestore serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Address of the write port: POST /set, DELETE /set, GET /backup, GET /readyz
    #[arg(long, env = "GRADESTORE_WRITE_ADDR", value_name = "IP:PORT", default_value = "127.0.0.1:8080",
        value_parser = address("--write-addr", "127.0.0.1:8080"))]
    pub write_addr: SocketAddr,

    /// Address of the read port: GET /get, POST /get, GET /readyz
    #[arg(long, env = "GRADESTORE_READ_ADDR", value_name = "IP:PORT", default_value = "127.0.0.1:8081",
        value_parser = address("--read-addr", "127.0.0.1:8081"))]
    pub read_addr: SocketAddr,

    /// Address of the ops port
    #[command(flatten)]
    pub ops: OpsAddrArgs,

    /// Name for which a port on a loopback address answers, besides localhost, such as the name of a
    /// proxy on this machine; repeatable, and separated by commas in the variable
    #[arg(long, env = "GRADESTORE_ALLOWED_HOST", value_name = "NAME", value_delimiter = ',',
        value_parser = host_name)]
    pub allowed_host: Vec<String>,

    /// Name and password
    #[command(flatten)]
    pub credentials: CredentialArgs,

    /// Directory of the log and the snapshots
    #[arg(
        long,
        env = "GRADESTORE_DATA_DIR",
        value_name = "DIR",
        default_value = "./gradestore-data"
    )]
    pub data_dir: PathBuf,

    /// Store nothing on disk: all data is lost when the process ends
    #[arg(long, env = "GRADESTORE_EPHEMERAL", value_parser = yes_or_no)]
    pub ephemeral: bool,

    /// How often to write a snapshot to the data directory
    #[arg(long, env = "GRADESTORE_SNAPSHOT_INTERVAL", value_name = "TIME", default_value = "5m",
        value_parser = at_least("1s", "--snapshot-interval", "5m or 90s"))]
    pub snapshot_interval: Duration,

    /// Backup to start from, a regular file; only for an empty data directory or a new stream. Ignored
    /// if the data directory was restored from this very file
    #[arg(long, env = "GRADESTORE_RESTORE_FROM", value_name = "FILE")]
    pub restore_from: Option<PathBuf>,

    /// How long a write waits for its acknowledgement. Clients need a longer timeout
    #[arg(long, env = "GRADESTORE_WRITE_TIMEOUT", value_name = "TIME", default_value = "10s",
        value_parser = at_least("1s", "--write-timeout", "10s or 30s"))]
    pub write_timeout: Duration,

    /// Worker threads for requests and replication; half of the cores by default. Backups and restores
    /// use other threads
    #[arg(long, env = "GRADESTORE_THREADS", value_name = "N", value_parser = count(1..=1024, "--threads", "4"))]
    pub threads: Option<usize>,

    /// Memory in use above which the node rejects writes for new users with 507: a size such as 900MB
    /// or 8GiB, or a percentage of the memory of the control group or machine
    #[arg(long, env = "GRADESTORE_MEMORY_MAX", value_name = "SIZE", default_value = "80%",
        value_parser = memory_max)]
    pub memory_max: MemoryMax,

    /// Format of log lines on standard error; RUST_LOG selects them
    #[arg(
        long,
        env = "GRADESTORE_LOG_FORMAT",
        value_name = "FORMAT",
        default_value = "text"
    )]
    pub log_format: LogFormat,

    /// Disable parts to measure their cost
    #[cfg(feature = "measure")]
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    pub measure_without: Vec<MeasuredPart>,

    /// NATS servers with JetStream, separated by commas; all nodes with the same servers and --stream
    /// form one cluster. Without it the node is a single node
    // Otherwise the help would show the value of the variable, which may contain a password.
    #[arg(long, env = "GRADESTORE_NATS_URL", hide_env_values = true, value_name = "URL",
        value_parser = servers)]
    pub nats_url: Option<Servers>,

    /// Credentials file for the NATS servers
    #[arg(
        long,
        env = "GRADESTORE_NATS_CREDS",
        value_name = "FILE",
        requires = "nats_url"
    )]
    pub nats_creds: Option<PathBuf>,

    /// Stream of the log; created if it does not exist. Nodes with different streams are different
    /// clusters
    #[arg(long, env = "GRADESTORE_STREAM", value_name = "NAME", default_value = "GRADES",
        value_parser = stream_name, requires = "nats_url")]
    pub stream: String,

    /// Number of NATS servers that store a copy of the stream, 1 to 5
    #[arg(long, env = "GRADESTORE_REPLICAS", value_name = "N", default_value = "1",
        value_parser = count(1..=5, "--replicas", "3"), requires = "nats_url")]
    pub replicas: usize,

    /// How long the stream keeps a batch; a node that was down for longer copies the data of another node
    #[arg(long, env = "GRADESTORE_LOG_RETENTION", value_name = "TIME", default_value = "24h",
        value_parser = at_least("1m", "--log-retention", "24h or 7d"),
        requires = "nats_url")]
    pub log_retention: Duration,

    /// When this node's copy of the log is synced: at this interval, or always, before a write is
    /// acknowledged
    #[arg(long, env = "GRADESTORE_WAL_SYNC", value_name = "TIME", default_value = "100ms",
        value_parser = wal_sync, requires = "nats_url")]
    pub wal_sync: WalSync,

    /// How much of the log the node keeps on disk beyond what its next start needs
    #[arg(long, env = "GRADESTORE_WAL_KEEP", value_name = "SIZE", default_value = "1GiB",
        value_parser = wal_keep, requires = "nats_url")]
    pub wal_keep: u64,

    /// URL of this node's write port for other nodes, which download backups from it; by default its
    /// address on the route to NATS
    #[arg(long, env = "GRADESTORE_ADVERTISE_URL", value_name = "URL",
        value_parser = base_url("--advertise-url"), requires = "nats_url")]
    pub advertise_url: Option<String>,

    /// Write port of another node, in addition to those found through NATS; repeatable, and separated
    /// by commas in the variable
    #[arg(long, env = "GRADESTORE_PEER", value_name = "URL", value_delimiter = ',',
        value_parser = base_url("--peer"), requires = "nats_url")]
    pub peer: Vec<String>,

    /// How many replicas, including this one, must announce that they have no data before one of them
    /// creates the stream
    #[arg(long, env = "GRADESTORE_EXPECT_PEERS", value_name = "N", default_value = "1",
        value_parser = count(1..=100, "--expect-peers", "3"), requires = "nats_url")]
    pub expect_peers: usize,

    /// Discard this replica's data of the log ID and follow the log of the stream; for one start, after
    /// the old stream is lost for good. The snapshots are renamed, not deleted
    #[arg(
        long,
        env = "GRADESTORE_ABANDON_LOG",
        value_name = "ID",
        requires = "nats_url"
    )]
    pub abandon_log: Option<String>,

    /// How often nodes exchange digests to detect divergence
    #[arg(long, env = "GRADESTORE_CHECKPOINT_INTERVAL", value_name = "TIME", default_value = "1m",
        value_parser = at_least("100ms", "--checkpoint-interval", "1m or 10s"),
        requires = "nats_url")]
    pub checkpoint_interval: Duration,
}

/// The user name and the password.
#[derive(Debug, Clone, Args)]
pub struct CredentialArgs {
    /// User name
    #[arg(long, env = "GRADESTORE_USERNAME", value_name = "NAME", default_value = "admin",
        value_parser = username)]
    pub username: String,

    /// File with the password; or set GRADESTORE_PASSWORD to the password itself. A single node without
    /// either generates a password and keeps it in the file `password` of its data directory
    #[arg(long, env = "GRADESTORE_PASSWORD_FILE", value_name = "FILE")]
    pub password_file: Option<PathBuf>,
}

/// Flags of `gradestore backup`.
#[derive(Debug, Clone, Args)]
pub struct BackupArgs {
    /// Write port of the node, such as http://127.0.0.1:8080
    #[arg(long, env = "GRADESTORE_FROM", value_name = "URL",
        value_parser = base_url("--from"))]
    pub from: String,

    /// File to write; - for standard output
    #[arg(short, long, env = "GRADESTORE_OUTPUT", value_name = "FILE")]
    pub output: PathBuf,

    /// Name and password
    #[command(flatten)]
    pub credentials: CredentialArgs,
}

/// Flags of `gradestore import`.
#[derive(Debug, Clone, Args)]
pub struct ImportArgs {
    /// Backup, or another gzip CSV with a header row of the same columns; - for standard input
    pub file: PathBuf,

    /// Write port of the node, such as http://127.0.0.1:8080
    #[arg(long, env = "GRADESTORE_TO", value_name = "URL",
        value_parser = base_url("--to"))]
    pub to: String,

    /// How long to retry while the node rejects writes
    #[arg(long, env = "GRADESTORE_WAIT", value_name = "TIME", default_value = "1m",
        value_parser = at_least("0s", "--wait", "1m or 10s"))]
    pub wait: Duration,

    /// Name and password
    #[command(flatten)]
    pub credentials: CredentialArgs,
}

/// Flags of `gradestore verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Backup, or another gzip CSV; - for standard input
    pub file: PathBuf,
}

/// Flags of `gradestore health`.
#[derive(Debug, Args)]
pub struct HealthArgs {
    /// Address of the ops port
    #[command(flatten)]
    pub ops: OpsAddrArgs,
}

/// The address of the ops port.
#[derive(Debug, Clone, Args)]
pub struct OpsAddrArgs {
    /// Address of the ops port: status page, /livez, /readyz, /metrics, /status
    #[arg(long, env = "GRADESTORE_OPS_ADDR", value_name = "IP:PORT", default_value = "127.0.0.1:8082",
        value_parser = address("--ops-addr", "127.0.0.1:8082"))]
    pub ops_addr: SocketAddr,
}

/// How much longer than a write an append may take before the log counts as unwritable: an election
/// alone takes 4 to 9 s.
const WRITE_SILENCE_BEYOND_TIMEOUT: Duration = Duration::from_millis(1500);

impl ServeArgs {
    /// Checks combinations of flags and reads the password, or generates one, which
    /// [`PasswordSource::keep`] keeps.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn config(&self) -> Result<(Config, PasswordSource), ConfigError> {
        let addresses = [
            ("--write-addr", self.write_addr),
            ("--read-addr", self.read_addr),
            ("--ops-addr", self.ops.ops_addr),
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
        let (password, source) = match given {
            Some(given) => given,
            // A generated one would differ between nodes.
            None if self.nats_url.is_some() => return Err(ConfigError::NoSharedPassword),
            None => {
                let data_dir = (!self.ephemeral).then_some(&*self.data_dir);
                (
                    password::generate()?,
                    PasswordSource::of_generated(data_dir),
                )
            }
        };
        let credentials = Credentials::new(&self.credentials.username, &password);
        #[cfg_attr(
            not(feature = "measure"),
            expect(unused_mut, reason = "changed to measure")
        )]
        let mut config = Config {
            write_addr: self.write_addr,
            read_addr: self.read_addr,
            ops_addr: self.ops.ops_addr,
            credentials,
            http: HttpConfig {
                allowed_hosts: self.allowed_host.clone(),
                ..HttpConfig::default()
            },
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
                ..ClusterConfig::single_node()
            },
        };
        #[cfg(feature = "measure")]
        self.disable_parts(&mut config);
        Ok((config, source))
    }

    #[cfg(feature = "measure")]
    fn disable_parts(&self, config: &mut Config) {
        for part in &self.measure_without {
            match part {
                MeasuredPart::Auth => config.credentials.accept_all(),
                MeasuredPart::Metrics => config.http.metrics = false,
                MeasuredPart::FastPath => config.http.fast_path = false,
                // See `wal`.
                MeasuredPart::Wal => {}
            }
        }
    }

    /// The settings of a replica's WAL.
    fn wal(&self) -> Option<WalSettings> {
        #[cfg(feature = "measure")]
        if self.measure_without.contains(&MeasuredPart::Wal) {
            return None;
        }
        Some(WalSettings {
            sync: self.wal_sync,
            keep_bytes: self.wal_keep,
        })
    }

    /// Where the log is stored.
    #[must_use]
    pub fn storage(&self) -> StorageConfig {
        let dir = (!self.ephemeral).then(|| DataDir {
            dir: self.data_dir.clone(),
            snapshot_interval: self.snapshot_interval,
            wal: self.wal(),
        });
        match (&self.nats_url, dir) {
            (Some(servers), data_dir) => StorageConfig::JetStream {
                stream: Box::new(JetStreamConfig {
                    servers: servers.clone(),
                    creds: self.nats_creds.clone(),
                    stream: self.stream.clone(),
                    replicas: self.replicas,
                    retention: self.log_retention,
                    expect_peers: self.expect_peers,
                    peers: self.peer.clone(),
                    write_silence_max: self.write_timeout + WRITE_SILENCE_BEYOND_TIMEOUT,
                    // In the data directory.
                    wal: None,
                }),
                data_dir,
                abandon_log: self.abandon_log.clone(),
            },
            (None, Some(data_dir)) => StorageConfig::Disk(data_dir),
            (None, None) => StorageConfig::Ephemeral,
        }
    }
}

impl CredentialArgs {
    /// The password for requests to a node.
    ///
    /// # Errors
    /// No password is given, or it is invalid.
    pub fn password(&self) -> Result<String, ConfigError> {
        let given = password::given(self.password_file.as_deref())?;
        let (password, _) = given.ok_or(ConfigError::NoPassword)?;
        Ok(password)
    }
}
