//! What the JetStream log needs of NATS, as a trait: the real client implements it, and so does the
//! simulator's broker.

use std::fmt;
use std::sync::Arc;

use async_nats::HeaderMap;
use async_nats::jetstream::stream::Config;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;

pub use super::raw_message::RawMessage;
use crate::log::{Announce, Announcement, RandomId, Seq};

/// Why the broker did not do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// No answer came in time, or the connection ended. The broker may have done it.
    #[error("{0}")]
    NoAnswer(Arc<str>),
    /// Nobody is there to answer, as while a stream has no leader. It was not done.
    #[error("{0}")]
    NoResponders(Arc<str>),
    /// The server is there, but the cluster's JetStream has no leader. It was not done.
    #[error("{0}")]
    NoLeader(Arc<str>),
    /// There is no stream of this name.
    #[error("there is no stream of this name")]
    NoStream,
    /// There is no consumer of this name.
    #[error("there is no consumer of this name")]
    NoConsumer,
    /// The stream's end is not the expected one. It was not done.
    #[error("the stream ends at {end:?}, not at {expected}")]
    WrongLastSequence {
        /// What the request expected.
        expected: Seq,
        /// Where the stream ends, if the broker said so.
        end: Option<Seq>,
    },
    /// The broker refused, in its own words. It was not done.
    #[error("{0}")]
    Refused(Arc<str>),
}

/// Why there is no connection.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectError {
    /// No server answers.
    #[error("{0}")]
    Unreachable(Arc<str>),
    /// The server refuses this client.
    #[error("{0}")]
    NotAllowed(Arc<str>),
}

/// NATS servers that hold the stream.
pub trait Broker: Send + Sync + 'static {
    /// Connects to any of the servers.
    fn connect(&self) -> BoxFuture<'_, Result<Arc<dyn Connection>, ConnectError>>;

    /// The servers, for messages.
    fn servers(&self) -> String;

    /// A new identity of a log or a writer.
    ///
    /// # Errors
    /// The system has no random bytes to give.
    fn random_id(&self) -> Result<RandomId, getrandom::Error> {
        RandomId::random()
    }
}

/// A message on its way to the stream.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// Its headers; a condition comes on top.
    pub headers: HeaderMap,
    /// Its payload.
    pub payload: Bytes,
    /// The broker is to take it only if the stream ends here.
    pub expected_last: Option<Seq>,
}

/// The broker has stored a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Where.
    pub seq: Seq,
    /// Whether it was there before, under the same message id.
    pub duplicate: bool,
}

/// A message as a consumer delivers it.
#[derive(Debug, Clone)]
pub struct Delivered {
    /// Its place in the stream.
    pub seq: Seq,
    /// When the broker stored it, in nanoseconds since 1970.
    pub time_ns: u64,
    /// How many messages after it the broker held then.
    pub pending: u64,
    /// Its headers.
    pub headers: Option<HeaderMap>,
    /// Its payload.
    pub payload: Bytes,
}

/// What the broker says of the stream.
#[derive(Debug, Clone)]
pub struct StreamInfo {
    /// How it is set up.
    pub config: Config,
    /// Its oldest message; one past the last when there is none.
    pub first: Seq,
    /// Its last message.
    pub last: Seq,
    /// Who says so.
    pub source: InfoSource,
}

/// Who answered a question about the stream. A server that lost its routes answers with old numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InfoSource {
    /// The only server: there is nobody who could know better.
    Unclustered,
    /// The server that says that it leads the stream.
    Leader,
    /// Another one.
    Follower,
}

/// Which replicas are asked for their announcements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// All.
    All,
    /// Every process that runs as this replica.
    Replica(RandomId),
}

/// One connection, from its start to its end. Whatever is in doubt ends it.
pub trait Connection: Send + Sync + 'static {
    /// Cancelled when the connection has ended. Cancelling it ends the connection.
    fn ended(&self) -> &CancellationToken;

    /// The largest message that the server takes, in bytes, with its headers.
    fn message_bytes_max(&self) -> usize;

    /// Whether the server is a member of a cluster.
    fn is_clustered(&self) -> bool;

    /// Asks about the stream.
    fn stream_info(&self) -> BoxFuture<'_, Result<StreamInfo, BrokerError>>;

    /// Creates the stream. A stream of this name with another configuration is a refusal.
    fn create_stream(&self, config: Config) -> BoxFuture<'_, Result<StreamInfo, BrokerError>>;

    /// Appends a message to the stream.
    fn publish(&self, message: Outgoing) -> BoxFuture<'_, Result<Stored, BrokerError>>;

    /// Replaces this replica's consumer by one that starts at `from`. A start below the stream's
    /// first message is raised, one beyond its end waits.
    fn consume(&self, from: Seq) -> BoxFuture<'_, Result<Box<dyn Consumer>, BrokerError>>;

    /// The message at `seq`, as it is stored; `None` if the stream does not hold it.
    fn message(&self, seq: Seq) -> BoxFuture<'_, Result<Option<RawMessage>, BrokerError>>;

    /// Answers questions of replicas by `announce` until `stop`, or until the connection ends. The error is for
    /// a log line.
    fn announce(
        &self,
        announce: Announce,
        stop: CancellationToken,
    ) -> BoxFuture<'_, Result<(), String>>;

    /// Asks replicas for their announcements, signed for `nonce`; this one answers as well, if it is
    /// asked and announces itself. Anybody may have sent them. The error is for a log line.
    fn ask_peers(
        &self,
        to: Asked,
        nonce: RandomId,
    ) -> BoxFuture<'_, Result<Vec<Announcement>, String>>;

    /// Ends the connection without sending what waits.
    fn close(&self) -> BoxFuture<'_, ()>;
}

/// Deliveries of a stream's messages, in order.
pub trait Consumer: Send {
    /// The next message; waits for it. Cancel-safe.
    ///
    /// # Errors
    /// The consumer has ended.
    fn next(&mut self) -> BoxFuture<'_, Result<Delivered, BrokerError>>;

    /// The next message if it is here already.
    fn try_next(&mut self) -> Option<Result<Delivered, BrokerError>>;
}

impl fmt::Display for InfoSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unclustered => "the only server",
            Self::Leader => "the stream's leader",
            Self::Follower => "a server that does not lead the stream",
        })
    }
}
