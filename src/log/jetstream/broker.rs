//! The NATS operations that the JetStream log uses, as traits. The real client implements them, and
//! so does the simulator's broker.

use std::fmt;
use std::sync::Arc;

use async_nats::HeaderMap;
use async_nats::jetstream::stream::Config;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;

pub use super::raw_message::RawMessage;
use crate::log::{Announce, Announcement, RandomId, Seq};

/// Why a request to the broker failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// No answer came in time, or the connection ended. The request may have taken effect.
    #[error("{0}")]
    NoAnswer(Arc<str>),
    /// NATS reports "no responders", as while a stream has no leader. The request had no effect.
    #[error("{0}")]
    NoResponders(Arc<str>),
    /// The server answers, but the cluster's JetStream has no leader. The request had no effect.
    #[error("{0}")]
    NoLeader(Arc<str>),
    /// No stream has this name.
    #[error("stream not found")]
    NoStream,
    /// No consumer has this name.
    #[error("consumer not found")]
    NoConsumer,
    /// The stream's end is not the expected one. The message was not stored.
    #[error("wrong last sequence: expected {expected}, the stream ends at {end:?}")]
    WrongLastSequence {
        /// What the request expected.
        expected: Seq,
        /// The end of the stream, if the answer contains it.
        end: Option<Seq>,
    },
    /// The broker rejected the request with this error. The request had no effect.
    #[error("{0}")]
    Rejected(Arc<str>),
}

/// Why connecting failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectError {
    /// No server answers.
    #[error("{0}")]
    Unreachable(Arc<str>),
    /// The server rejects this client's credentials or settings.
    #[error("{0}")]
    NotAllowed(Arc<str>),
}

/// NATS servers that hold the stream.
pub trait Broker: Send + Sync + 'static {
    /// Connects to any of the servers.
    fn connect(&self) -> BoxFuture<'_, Result<Arc<dyn BrokerConnection>, ConnectError>>;

    /// The servers, for messages.
    fn servers(&self) -> String;

    /// A new identity of a log or a writer.
    ///
    /// # Errors
    /// The system returned no random bytes.
    fn random_id(&self) -> Result<RandomId, getrandom::Error> {
        RandomId::random()
    }
}

/// A message to publish to the stream.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// Its headers, except the one for `expected_last`.
    pub headers: HeaderMap,
    /// The batch as JSON.
    pub payload: Bytes,
    /// If set, the broker stores the message only if the stream ends at this position.
    pub expected_last: Option<Seq>,
}

/// The broker's acknowledgement of a stored message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// The message's sequence number.
    pub seq: Seq,
    /// Whether the stream already had a message with this id.
    pub duplicate: bool,
}

/// A message as a consumer delivers it.
#[derive(Debug, Clone)]
pub struct Delivered {
    /// The message's sequence number.
    pub seq: Seq,
    /// When the broker stored it, in nanoseconds since 1970.
    pub time_ns: u64,
    /// How many messages followed it in the stream when it was delivered.
    pub pending: u64,
    /// Its headers, if it has any.
    pub headers: Option<HeaderMap>,
    /// The batch as JSON.
    pub payload: Bytes,
}

/// The broker's information about the stream.
#[derive(Debug, Clone)]
pub struct StreamInfo {
    /// The stream's configuration.
    pub config: Config,
    /// Its oldest message; one past the last when there is none.
    pub first: Seq,
    /// Its last message.
    pub last: Seq,
    /// Which server answered.
    pub source: InfoSource,
}

/// Which server answered a request about the stream. A server that lost its routes answers with
/// outdated numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InfoSource {
    /// The only server.
    Unclustered,
    /// A server that reports itself as the stream's leader.
    Leader,
    /// Any other server of the cluster.
    Follower,
}

/// The replicas whose announcements are requested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerQuery {
    /// All replicas.
    All,
    /// Every process that runs as this replica.
    Replica(RandomId),
}

/// One connection. It does not reconnect: once it has ended, the log opens another one.
pub trait BrokerConnection: Send + Sync + 'static {
    /// Cancelled when the connection has ended. Cancelling it ends the connection.
    fn ended(&self) -> &CancellationToken;

    /// The largest message that the server accepts, in bytes, including headers.
    fn message_bytes_max(&self) -> usize;

    /// Whether the server is a member of a cluster.
    fn is_clustered(&self) -> bool;

    /// Requests the stream's configuration and bounds.
    fn stream_info(&self) -> BoxFuture<'_, Result<StreamInfo, BrokerError>>;

    /// Creates the stream. The broker rejects this if a stream of this name has another
    /// configuration.
    fn create_stream(&self, config: Config) -> BoxFuture<'_, Result<StreamInfo, BrokerError>>;

    /// Appends a message to the stream.
    fn publish(&self, message: Outgoing) -> BoxFuture<'_, Result<Stored, BrokerError>>;

    /// Replaces this replica's consumer with one that starts at `from`. If `from` is below the
    /// stream's first message, it starts there; if `from` is beyond the end, it waits.
    fn consume(&self, from: Seq) -> BoxFuture<'_, Result<Box<dyn Consumer>, BrokerError>>;

    /// The message at `seq`, as it is stored; `None` if the stream does not hold it.
    fn message(&self, seq: Seq) -> BoxFuture<'_, Result<Option<RawMessage>, BrokerError>>;

    /// Answers requests for this replica's announcement, which `announce` makes, until `stop` or
    /// until the connection ends. The error is for a log line.
    fn announce(
        &self,
        announce: Announce,
        stop: CancellationToken,
    ) -> BoxFuture<'_, Result<(), String>>;

    /// Requests announcements that are signed for `nonce`. The result may include this replica's
    /// own. The answers are not verified: any client may have sent them. The error is for a log
    /// line.
    fn ask_peers(
        &self,
        query: PeerQuery,
        nonce: RandomId,
    ) -> BoxFuture<'_, Result<Vec<Announcement>, String>>;

    /// Ends the connection and drops messages that were not sent yet.
    fn close(&self) -> BoxFuture<'_, ()>;
}

/// Delivers a stream's messages in order.
pub trait Consumer: Send {
    /// Waits for the next message. Cancel-safe.
    ///
    /// # Errors
    /// The consumer has ended.
    fn next(&mut self) -> BoxFuture<'_, Result<Delivered, BrokerError>>;

    /// The next message, if it has already arrived.
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
