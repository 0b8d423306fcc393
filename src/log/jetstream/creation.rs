//! Opens the stream at the start, or creates it if this replica may.
//!
//! A missing stream may have been lost while replicas still hold its data. So a replica creates one
//! only if it holds no data of any log, and only after the expected number of replicas have
//! announced that they hold none either. Every other replica waits for the stream.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::announcements::Announcements;
use super::broker::{Broker, BrokerConnection, BrokerError, ConnectError, PeerQuery, StreamInfo};
use super::config::JetStreamConfig;
use super::setup_error::SetupError;
use super::{session, stream};
use crate::log::{Announcement, Chain, ClusterKey, LogId, RandomId, Seq};

/// The timeout of the start while requests for the stream are not answered.
const START_WAIT_MAX: Duration = Duration::from_secs(30);
/// How long a replica with --expect-peers 1 looks for others before it creates the stream.
const DISCOVERY: Duration = Duration::from_secs(3);
/// The timeout for the node id of a `--peer`.
const PEER_WAIT_MAX: Duration = Duration::from_secs(2);
/// How often a waiting replica requests the stream's info and the announcements of others.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// The log id that a replica without data announces.
const NO_LOG: &str = "none";
/// The log id that a replica announces if it holds a snapshot that it cannot read.
const UNKNOWN_LOG: &str = "unknown";

/// The replica that opens the log.
#[derive(Clone)]
pub struct ReplicaIdentity {
    /// This process.
    pub node: RandomId,
    /// This replica; the same as `node` without a data directory.
    pub replica: RandomId,
    /// Its data before it opens the log.
    pub existing_data: ExistingData,
    /// Whether the replica has a data directory.
    pub keeps_data: bool,
    /// The URL of its write port.
    pub url: String,
    /// Requests the node id of a `--peer`.
    pub ask_node: Arc<dyn AskNode>,
    /// Signs its announcements and verifies those of others.
    pub key: ClusterKey,
}

/// A request to another node over HTTP, without a password.
pub trait AskNode: Send + Sync + 'static {
    /// The node id of the process whose write port is at `node_url`; `None` if its answer
    /// has none. A starting node answers, too.
    ///
    /// # Errors
    /// Why the node did not answer.
    fn node<'a>(&'a self, node_url: &'a str) -> BoxFuture<'a, Result<Option<Box<str>>, Box<str>>>;
}

/// The data that a replica holds before it has opened the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExistingData {
    /// No data of any log.
    None,
    /// Data of this log.
    Of(LogId),
    /// A snapshot that cannot be read. It may be the only copy of the data.
    Unreadable {
        /// The snapshot.
        path: PathBuf,
        /// Why it cannot be read, and what to do.
        why: String,
    },
}

/// Called with the reason why opener the log waits.
pub type ReportWait = Arc<dyn Fn(&str) + Send + Sync>;

pub(super) struct OpenedStream {
    pub(super) connection: Arc<dyn BrokerConnection>,
    pub(super) id: LogId,
    pub(super) first: Seq,
    pub(super) last: Seq,
}

/// Connects, and opens or creates the stream.
pub(super) async fn open(
    broker: &dyn Broker,
    config: &JetStreamConfig,
    identity: &ReplicaIdentity,
    announcements: &Announcements,
    base: Option<Seq>,
    report_wait: &ReportWait,
) -> Result<OpenedStream, SetupError> {
    let mut opener = StreamOpener {
        broker,
        config,
        identity,
        announcements,
        base,
        report_wait,
        servers: broker.servers(),
        answered_at: Instant::now(),
        reported: String::new(),
    };
    let mut backoff = session::backoff();
    loop {
        let error = match broker.connect().await {
            Ok(connection) => match opener.on(&connection).await? {
                Ok(info) => return opener.opened(connection, &info),
                Err(error) => {
                    connection.close().await;
                    error
                }
            },
            Err(ConnectError::Unreachable(why)) => BrokerError::NoAnswer(why),
            Err(ConnectError::NotAllowed(why)) => {
                let servers = opener.servers;
                return Err(SetupError::NotAllowed { servers, why });
            }
        };
        if opener.answered_at.elapsed() >= START_WAIT_MAX {
            let servers = opener.servers;
            return Err(match error {
                BrokerError::NoLeader(why) => SetupError::NoLeader { servers, why },
                error => SetupError::Unreachable {
                    servers,
                    why: error.to_string().into(),
                },
            });
        }
        opener.report(format!("waiting for NATS at {}: {error}", opener.servers));
        backoff.pause().await;
    }
}

/// Opens or creates the stream, across connections.
struct StreamOpener<'a> {
    broker: &'a dyn Broker,
    config: &'a JetStreamConfig,
    identity: &'a ReplicaIdentity,
    announcements: &'a Announcements,
    base: Option<Seq>,
    report_wait: &'a ReportWait,
    servers: String,
    /// When the broker last answered whether the stream exists; initially the start.
    answered_at: Instant,
    /// The last reason that was reported.
    reported: String,
}

impl StreamOpener<'_> {
    /// Reports why opening waits, unless the last report was the same.
    fn report(&mut self, reason: String) {
        if reason != self.reported {
            tracing::warn!(%reason, "cannot open the stream yet");
            (self.report_wait)(&reason);
            self.reported = reason;
        }
    }

    /// Opens or creates the stream through `connection`. The inner error is transient.
    async fn on(
        &mut self,
        connection: &Arc<dyn BrokerConnection>,
    ) -> Result<Result<StreamInfo, BrokerError>, SetupError> {
        session::check_max_payload(&**connection).map_err(|why| SetupError::Unusable {
            servers: self.servers.clone(),
            why,
        })?;
        self.detect_copy(&**connection).await?;
        let stop = CancellationToken::new();
        let announcing = {
            let (connection, stop) = (Arc::clone(connection), stop.clone());
            let (me, key) = (self.announcement(), self.identity.key.clone());
            let announce = move |nonce: &str| Announcement {
                mac: Some(key.sign_announcement(&me, nonce)),
                ..me.clone()
            };
            tokio::spawn(async move { connection.announce(Arc::new(announce), stop).await })
        };
        let found = self.find_or_create(connection).await;
        stop.cancel();
        // The node announces itself from here on, and must not answer twice.
        match announcing.await {
            Ok(Ok(())) => found,
            Ok(Err(why)) => {
                tracing::debug!(why, "cannot announce this replica");
                found
            }
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        }
    }

    /// Fails if another process runs as this replica: each would delete the other's consumer.
    /// This process does not announce itself yet, so NATS answers "no responders" at once if there
    /// is no other.
    async fn detect_copy(&self, connection: &dyn BrokerConnection) -> Result<(), SetupError> {
        let asked = PeerQuery::Replica(self.identity.replica);
        match self.announcements.ask(self.broker, connection, asked).await {
            Ok(announced) => announced.iter().try_for_each(|peer| self.check_copy(peer)),
            Err(why) => {
                tracing::debug!(
                    why,
                    "cannot check whether another process runs as this replica"
                );
                Ok(())
            }
        }
    }

    /// Fails if `peer` is another process that runs as this replica.
    fn check_copy(&self, peer: &Announcement) -> Result<(), SetupError> {
        let ReplicaIdentity { node, replica, .. } = self.identity;
        let (same_node, same_replica) = (
            *peer.node == *node.to_string(),
            *peer.replica == *replica.to_string(),
        );
        match same_replica && !same_node {
            true => Err(SetupError::SameReplica {
                replica: peer.replica.clone(),
                node: peer.node.clone(),
                url: peer.url.clone(),
            }),
            false => Ok(()),
        }
    }

    /// Looks for the stream, and creates it once this replica may. The inner error is transient.
    async fn find_or_create(
        &mut self,
        connection: &Arc<dyn BrokerConnection>,
    ) -> Result<Result<StreamInfo, BrokerError>, SetupError> {
        let discovering_since = Instant::now();
        loop {
            match connection.stream_info().await {
                Ok(info) => return Ok(Ok(info)),
                Err(BrokerError::NoStream) => self.answered_at = Instant::now(),
                Err(BrokerError::Rejected(why)) => return Err(self.rejected(why)),
                Err(error) => return Ok(Err(error)),
            }
            match self.may_create(&**connection, discovering_since).await? {
                Ok(()) => {
                    let log = self.broker.random_id()?;
                    let wanted = stream::new_stream(self.config, log, self.base);
                    match connection.create_stream(wanted).await {
                        Ok(info) => {
                            let stream = &self.config.stream;
                            tracing::info!(stream, log_id = %log, "stream created");
                            return Ok(Ok(info));
                        }
                        // Another replica may have been first.
                        Err(BrokerError::Rejected(why)) => match connection.stream_info().await {
                            Ok(info) => return Ok(Ok(info)),
                            Err(_) => return Err(self.rejected(why)),
                        },
                        Err(error) => return Ok(Err(error)),
                    }
                }
                Err(why) => {
                    let stream = &self.config.stream;
                    self.report(format!("stream {stream} does not exist: {why}"));
                }
            }
            tokio::select! {
                biased;
                () = tokio::time::sleep(ASK_EVERY) => {}
                () = connection.ended().cancelled() => {
                    let why = "the connection to NATS ended".into();
                    return Ok(Err(BrokerError::NoAnswer(why)));
                }
            }
        }
    }

    /// Whether this replica may create the stream now. The inner error is the reason to wait.
    async fn may_create(
        &self,
        connection: &dyn BrokerConnection,
        since: Instant,
    ) -> Result<Result<(), String>, SetupError> {
        let ReplicaIdentity {
            node, keeps_data, ..
        } = self.identity;
        let expected = self.config.expect_peers;
        if let Err(why) = self.check_has_no_data() {
            return Ok(Err(why));
        }
        if !keeps_data && expected <= 1 {
            return Ok(Err(
                "an ephemeral replica creates a stream only with --expect-peers 2 or more; waiting \
                 for another replica to create it"
                    .to_owned(),
            ));
        }
        let asked = self
            .announcements
            .ask(self.broker, connection, PeerQuery::All);
        let announced = match asked.await {
            Ok(announced) => announced,
            Err(error) => return Ok(Err(format!("cannot discover other replicas: {error}"))),
        };
        let me = node.to_string();
        let mut others = BTreeMap::new();
        for peer in announced {
            if *peer.node == *me {
                continue;
            }
            self.check_copy(&peer)?;
            if *peer.log_id != *NO_LOG {
                return Ok(Err(format!(
                    "replica {} at {} holds data of log {}; waiting until the stream is restored",
                    peer.replica, peer.url, peer.log_id
                )));
            }
            others.insert(peer.replica.clone(), peer);
        }
        for url in &self.config.peers {
            if let Err(why) = self.find_peer(url, &others).await {
                return Ok(Err(why));
            }
        }
        let found = others.len() + 1;
        if found < expected {
            return Ok(Err(format!(
                "found {found} of {expected} replicas (--expect-peers)"
            )));
        }
        if expected <= 1 && since.elapsed() < DISCOVERY {
            return Ok(Err(
                "looking for other replicas before creating it".to_owned()
            ));
        }
        Ok(Ok(()))
    }

    /// Checks that this replica has no data of any log; if it has, a stream was lost.
    fn check_has_no_data(&self) -> Result<(), String> {
        match &self.identity.existing_data {
            ExistingData::None => Ok(()),
            ExistingData::Of(log) => Err(format!(
                "this replica holds data of log {log}; waiting until the stream is restored"
            )),
            ExistingData::Unreadable { path, why } => Err(format!(
                "this replica cannot read snapshot {} ({why}), which may be the only copy of the \
                 data; make the file readable and restart, restore the stream, or move the file out \
                 of the data directory if the data is not needed",
                path.display()
            )),
        }
    }

    /// Finds the `--peer` at `url` among the replicas that have announced themselves. The error is
    /// why it is missing. A peer may announce another URL; then it is found by the node id that
    /// `url` answers with. That answer alone is not enough: only an announcement is signed and says
    /// whether the replica holds data.
    async fn find_peer(
        &self,
        url: &str,
        others: &BTreeMap<Box<str>, Announcement>,
    ) -> Result<(), String> {
        if *url == self.identity.url || others.values().any(|other| *other.url == *url) {
            return Ok(());
        }
        let asked = tokio::time::timeout(PEER_WAIT_MAX, self.identity.ask_node.node(url));
        let why = match asked.await {
            Ok(Ok(Some(node))) => {
                let is_me = *node == *self.identity.node.to_string();
                if is_me || others.values().any(|other| other.node == node) {
                    return Ok(());
                }
                "answers, but has not announced itself on this NATS; check that its --nats-url and \
                 its password are the same"
                    .to_owned()
            }
            Ok(Ok(None)) => "does not answer as a gradestore node".to_owned(),
            Ok(Err(error)) => format!("does not answer ({error})"),
            Err(_elapsed) => "does not answer".to_owned(),
        };
        Err(format!(
            "waiting for --peer {url}, which may hold data: it {why}"
        ))
    }

    fn opened(
        &self,
        connection: Arc<dyn BrokerConnection>,
        info: &StreamInfo,
    ) -> Result<OpenedStream, SetupError> {
        let id = stream::check_start(self.config, &info.config)?;
        if let Some(base) = self.base
            && (info.first <= info.last || info.last != base)
        {
            return Err(SetupError::NotEmpty {
                stream: self.config.stream.clone(),
                end: info.last,
            });
        }
        let (first, last) = (info.first, info.last);
        Ok(OpenedStream {
            connection,
            id,
            first,
            last,
        })
    }

    fn rejected(&self, why: Arc<str>) -> SetupError {
        let stream = self.config.stream.clone();
        SetupError::Rejected { stream, why }
    }

    fn announcement(&self) -> Announcement {
        let log_id = match &self.identity.existing_data {
            ExistingData::None => NO_LOG.into(),
            ExistingData::Of(log) => log.0.clone(),
            ExistingData::Unreadable { .. } => UNKNOWN_LOG.into(),
        };
        Announcement {
            node: self.identity.node.to_string().into(),
            replica: self.identity.replica.to_string().into(),
            version: env!("CARGO_PKG_VERSION").into(),
            log_id,
            url: self.identity.url.as_str().into(),
            state: "starting".into(),
            position: 0,
            chain: Chain::default(),
            full: false,
            mac: None,
        }
    }
}
