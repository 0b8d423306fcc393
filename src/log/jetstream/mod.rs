//! The log of a cluster: a JetStream stream, whose sequence numbers are the order that all replicas
//! share.
//!
//! - `stream`: the stream's shape; made if it is not there, checked if it is.
//! - `servers`: where the broker is.
//! - `link`: one connection at a time. Whatever is doubtful ends it, and a new one is made.
//! - `publish`: a batch goes out under a name that the broker knows again, so it is stored once
//!   however often it is sent; it is sent again only for as long as that holds.
//! - `subscription`: an own pull consumer, made anew at the batch after the last one read, after the
//!   log has been seen to be the same one still and to hold that batch.
//! - `message`: a batch as a message; `under_way`: own batches between the broker and the reader.
//! - `header_block`: which header blocks can be read; `raw_message`: a message as it is stored.
//! - `discovery`: how the replicas on one stream find each other.
//!
//! What would make a replica follow another history than it began ends reading for good, with the
//! reason: the stream gone, made anew, cut beyond where this replica is, or shorter than it was.

mod discovery;
pub mod header_block;
mod link;
pub mod message;
mod publish;
pub mod raw_message;
mod servers;
mod stream;
mod subscription;
mod under_way;

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_nats::ConnectErrorKind;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::GetStreamErrorKind;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use self::link::{Backoff, Link, Session};
pub use self::servers::Servers;
use self::stream::Facts;
use self::subscription::JetStreamSubscription;
use self::under_way::UnderWay;
use super::{
    Announce, Announcement, AppendError, Batch, Counts, Extent, Log, LogId, Origin, ReadError, Seq,
    Subscription,
};

/// Where batches are sent.
const SUBJECT: &str = "grades.set";
/// While one batch is under way the next one fills. A second one under way only makes both small:
/// with `sync_interval: always` it costs 7 to 53 % of the writes a second (`load/README.md`).
const IN_FLIGHT_MAX: usize = 1;
/// How long the broker may be away at the start before the node gives up.
const START_WAIT_MAX: Duration = Duration::from_secs(30);

/// Where the broker is and what the stream is to be like.
#[derive(Debug, Clone)]
pub struct JetStreamConfig {
    /// The broker's servers, any of which will do.
    pub servers: Servers,
    /// A file with credentials.
    pub creds: Option<PathBuf>,
    /// The stream.
    pub stream: String,
    /// On how many servers it is kept.
    pub replicas: usize,
    /// How long a batch is kept.
    pub retention: Duration,
}

/// Why the stream can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The broker does not answer.
    #[error(
        "no answer from the broker at {servers}: {why}; is nats-server running there with \
         JetStream (nats-server -js), and is this its --nats-url?"
    )]
    Away {
        /// Where it should be.
        servers: Servers,
        /// What went wrong.
        why: Box<str>,
    },
    /// The broker does not let this process in.
    #[error(
        "the broker at {servers} refuses this process: {why}; give a name and password in \
         --nats-url, or a file in --nats-creds"
    )]
    NotAllowed {
        /// Where it is.
        servers: Servers,
        /// What it said.
        why: Box<str>,
    },
    /// The broker does not give the stream.
    #[error("the broker refuses stream {stream}: {why}")]
    Refused {
        /// The stream.
        stream: String,
        /// What it said.
        why: Box<str>,
    },
    /// A stream of this name has another shape.
    #[error("stream {stream} has {setting} {found} where {wanted} is needed; {fix}")]
    Shape {
        /// The stream.
        stream: String,
        /// Which setting.
        setting: &'static str,
        /// What it must be.
        wanted: String,
        /// What it is.
        found: String,
        /// What to do.
        fix: String,
    },
    /// Numbering was to begin anew in a stream that is there.
    #[error(
        "stream {stream} is there already and has come to batch {end}: --restore-from begins a new \
         one; remove it if nothing in it is needed (nats stream rm {stream}), or leave \
         --restore-from out"
    )]
    NotEmpty {
        /// The stream.
        stream: String,
        /// Its last batch.
        end: Seq,
    },
}

impl SetupError {
    fn away(config: &JetStreamConfig, why: &dyn Error) -> Self {
        Self::Away {
            servers: config.servers.clone(),
            why: why.to_string().into(),
        }
    }
}

/// A log in a stream.
pub struct JetStreamLog {
    shared: Arc<Shared>,
    /// Ends the connection, and what goes through it.
    stop: CancellationToken,
    /// Does so with the log.
    _guard: DropGuard,
}

/// What the log, its connection and its reader share.
struct Shared {
    config: JetStreamConfig,
    origin: Origin,
    id: LogId,
    first: AtomicU64,
    end: AtomicU64,
    link: watch::Sender<Link>,
    under_way: UnderWay,
    counts: SharedCounts,
}

#[derive(Default)]
struct SharedCounts {
    reconnects: AtomicU64,
    resumes: AtomicU64,
    resends: AtomicU64,
    redeliveries: AtomicU64,
    gaps: AtomicU64,
    poisoned: AtomicU64,
}

impl JetStreamLog {
    /// Connects and makes or checks the stream; waits a while for a broker that is away. With a
    /// `base` the stream must not be there, and its first batch will be `base` + 1.
    ///
    /// # Errors
    /// See [`SetupError`].
    pub async fn open(
        config: JetStreamConfig,
        origin: Origin,
        base: Option<Seq>,
    ) -> Result<Self, SetupError> {
        let begun = Instant::now();
        let mut backoff = Backoff::new();
        let mut told = false;
        let (session, facts) = loop {
            match Self::try_open(&config, base).await {
                Ok(opened) => break opened,
                Err(error @ SetupError::Away { .. }) if begun.elapsed() < START_WAIT_MAX => {
                    if !told {
                        tracing::warn!(%error, "waiting for the broker");
                        told = true;
                    }
                }
                Err(error) => return Err(error),
            }
            backoff.pause().await;
        };
        let shared = Arc::new(Shared {
            config,
            origin,
            id: facts.id.clone(),
            first: AtomicU64::new(facts.first),
            end: AtomicU64::new(facts.last),
            link: watch::Sender::new(Link::Up(session.clone())),
            under_way: UnderWay::default(),
            counts: SharedCounts::default(),
        });
        let stop = CancellationToken::new();
        tokio::spawn(link::keep(Arc::clone(&shared), session, stop.clone()));
        Ok(Self {
            shared,
            stop: stop.clone(),
            _guard: stop.drop_guard(),
        })
    }

    async fn try_open(
        config: &JetStreamConfig,
        base: Option<Seq>,
    ) -> Result<(Session, Facts), SetupError> {
        let session = Session::begin(config).await.map_err(|error| {
            use ConnectErrorKind::{Authentication, AuthorizationViolation};
            match error.kind() {
                Authentication | AuthorizationViolation => SetupError::NotAllowed {
                    servers: config.servers.clone(),
                    why: error.to_string().into(),
                },
                _ => SetupError::away(config, &error),
            }
        })?;
        let facts = stream::set_up(&session.context, config, base).await?;
        Ok((session, facts))
    }
}

/// Why something did not work this time.
enum Trouble {
    /// It may work the next time.
    Passing(Box<str>),
    /// It never will.
    Final(ReadError),
}

impl Trouble {
    fn passing(error: &dyn Error) -> Self {
        Self::Passing(error.to_string().into())
    }
}

impl Shared {
    /// A subscription that begins at `wanted`, after a batch that the log took at `before_time_ns`.
    async fn read_from(
        self: &Arc<Self>,
        wanted: Seq,
        before_time_ns: Option<u64>,
    ) -> Result<Box<dyn Subscription>, ReadError> {
        let shared = Arc::clone(self);
        let subscription = JetStreamSubscription::begin(shared, wanted, before_time_ns).await?;
        Ok(Box::new(subscription))
    }

    /// The connection, if there is one.
    fn session(&self) -> Result<Session, Arc<str>> {
        self.link.borrow().session().cloned()
    }

    /// The connection; waits for it.
    async fn next_session(&self) -> Result<Session, ReadError> {
        let mut link = self.link.subscribe();
        loop {
            match &*link.borrow_and_update() {
                Link::Up(session) if !session.ended.is_cancelled() => return Ok(session.clone()),
                Link::Lost(error) => return Err(error.clone()),
                Link::Up(_) | Link::Away(_) => {}
            }
            // The sender is in `self`.
            let _ = link.changed().await;
        }
    }

    /// There is a connection; `false` if that is of no use any more.
    fn up(&self, session: Session) -> bool {
        self.turn(Link::Up(session))
    }

    /// There is none; `false` if that does not matter any more.
    fn away(&self, why: &str) -> bool {
        self.turn(Link::Away(why.into()))
    }

    fn turn(&self, to: Link) -> bool {
        self.link.send_if_modified(|link| {
            let lost = matches!(link, Link::Lost(_));
            if !lost {
                *link = to;
            }
            !lost
        })
    }

    /// The log can't be followed any more, for good; unless it is only that a reader has fallen
    /// behind it, which may begin again with a newer backup.
    fn lose(&self, error: &ReadError) {
        if !matches!(error, ReadError::Trimmed { .. }) {
            self.link.send_replace(Link::Lost(error.clone()));
        }
    }

    /// Looks at the stream until it has been seen.
    async fn look_now(&self) -> Result<Extent, ReadError> {
        let mut backoff = Backoff::new();
        loop {
            let session = self.next_session().await?;
            match session.ask(self.look(&session)).await {
                Ok(facts) => {
                    return Ok(Extent {
                        first: facts.first,
                        end: facts.last,
                    });
                }
                Err(Trouble::Final(error)) => {
                    self.lose(&error);
                    return Err(error);
                }
                Err(Trouble::Passing(_)) => backoff.pause().await,
            }
        }
    }

    /// Looks at the stream: whether it is the one that this log began with, and how far it goes.
    async fn look(&self, session: &Session) -> Result<Facts, Trouble> {
        let name = &self.config.stream;
        let stream = session.context.get_stream(name).await;
        let stream = stream.map_err(|error| match error.kind() {
            GetStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                Trouble::Final(ReadError::Gone {
                    id: self.id.clone(),
                })
            }
            _ => Trouble::passing(&error),
        })?;
        let facts = Facts::of(stream.cached_info());
        if facts.id != self.id {
            return Err(Trouble::Final(ReadError::Replaced {
                was: self.id.clone(),
                is: facts.id,
            }));
        }
        self.first.fetch_max(facts.first, Ordering::AcqRel);
        self.end.fetch_max(facts.last, Ordering::AcqRel);
        Ok(facts)
    }
}

impl Log for JetStreamLog {
    fn kind(&self) -> &'static str {
        "jetstream"
    }

    fn id(&self) -> LogId {
        self.shared.id.clone()
    }

    fn first(&self) -> Seq {
        self.shared.first.load(Ordering::Acquire)
    }

    fn end(&self) -> Seq {
        self.shared.end.load(Ordering::Acquire)
    }

    fn in_flight_max(&self) -> usize {
        IN_FLIGHT_MAX
    }

    fn append(&self, batch: Batch) -> BoxFuture<'_, Result<(), AppendError>> {
        self.shared.publish(batch).boxed()
    }

    fn refusal(&self) -> Option<Arc<str>> {
        self.away()
    }

    fn away(&self) -> Option<Arc<str>> {
        // Asked for each write: nothing is cloned.
        self.shared.link.borrow().session().err()
    }

    fn subscribe(&self, after: Seq) -> BoxFuture<'_, Result<Box<dyn Subscription>, ReadError>> {
        self.shared.read_from(after + 1, None).boxed()
    }

    fn resume(
        &self,
        after: Seq,
        time_ns: u64,
    ) -> BoxFuture<'_, Result<Box<dyn Subscription>, ReadError>> {
        self.shared.read_from(after + 1, Some(time_ns)).boxed()
    }

    fn look(&self) -> BoxFuture<'_, Result<Extent, ReadError>> {
        self.shared.look_now().boxed()
    }

    fn announce(&self, announce: Announce) {
        let stop = self.stop.child_token();
        tokio::spawn(discovery::announce(
            Arc::clone(&self.shared),
            announce,
            stop,
        ));
    }

    fn peers(&self) -> BoxFuture<'_, Vec<Announcement>> {
        async {
            let Ok(session) = self.shared.session() else {
                return Vec::new();
            };
            match discovery::ask(&session).await {
                Ok(mut found) => {
                    let me = self.shared.origin.to_string();
                    found.retain(|said| *said.node != *me && said.log_id == self.shared.id.0);
                    found
                }
                Err(error) => {
                    tracing::debug!(error, "replicas not asked");
                    Vec::new()
                }
            }
        }
        .boxed()
    }

    fn shared(&self) -> bool {
        true
    }

    fn counts(&self) -> Counts {
        let counts = &self.shared.counts;
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counts {
            reconnects: load(&counts.reconnects),
            resumes: load(&counts.resumes),
            resends: load(&counts.resends),
            redeliveries: load(&counts.redeliveries),
            gaps: load(&counts.gaps),
            poisoned: load(&counts.poisoned),
        }
    }
}
