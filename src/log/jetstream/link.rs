//! One connection to the broker at a time, and a new one when there is any doubt about it.
//!
//! The client library would reconnect by itself, but keeps what was not sent yet and sends it then,
//! however late: a batch sent again could so come after the broker has forgotten that it knows it,
//! and overwrite what others set since. And it leaves waiting for their deadline all who wait for an
//! answer that went down with a connection. Here a connection that ends takes everything along, and
//! whoever used it knows at once.

use std::panic;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_nats::jetstream::Context;
use async_nats::jetstream::context::ContextBuilder;
use async_nats::{ConnectError, ConnectErrorKind, ConnectOptions};
use tokio_util::sync::CancellationToken;

use super::{JetStreamConfig, Shared, Trouble};
use crate::log::ReadError;

/// How long a connection may take to be made.
const CONNECT_WAIT_MAX: Duration = Duration::from_secs(3);
/// How long the broker may take to answer. A second and a third try fit into the time that a write
/// may wait.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(2);
/// How long a connection may be silent before it is asked whether it is there; the third question
/// without an answer ends it.
const PING_EVERY: Duration = Duration::from_secs(2);
/// How long a connection may take to be ended.
const HANG_UP_WAIT_MAX: Duration = Duration::from_secs(1);

/// How this process stands with the broker.
#[derive(Clone)]
pub(super) enum Link {
    /// Connected.
    Up(Session),
    /// Not connected, and trying to; says why.
    Away(Arc<str>),
    /// The log can't be followed any more, for good.
    Lost(ReadError),
}

impl Link {
    /// The connection; why there is none.
    pub(super) fn session(&self) -> Result<&Session, Arc<str>> {
        match self {
            Self::Up(session) => Ok(session),
            Self::Away(why) => Err(Arc::clone(why)),
            Self::Lost(error) => Err(error.to_string().into()),
        }
    }
}

/// One connection, from its beginning to its end.
#[derive(Clone)]
pub(super) struct Session {
    /// What is asked of the broker goes through here.
    pub(super) context: Context,
    /// Cancelled when the connection is no more, and to end it.
    pub(super) ended: CancellationToken,
}

/// Pauses between tries: short at first, a second at most.
pub(super) struct Backoff(Duration);

impl Backoff {
    const FIRST: Duration = Duration::from_millis(20);
    const MAX: Duration = Duration::from_secs(1);

    pub(super) fn new() -> Self {
        Self(Self::FIRST)
    }

    pub(super) async fn pause(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (self.0 * 2).min(Self::MAX);
    }
}

impl Session {
    /// Connects.
    pub(super) async fn begin(config: &JetStreamConfig) -> Result<Self, ConnectError> {
        let ended = CancellationToken::new();
        let of_this_one = ended.clone();
        let attempts = AtomicUsize::new(0);
        let mut options = ConnectOptions::new()
            .name("gradestore")
            .connection_timeout(CONNECT_WAIT_MAX)
            .ping_interval(PING_EVERY)
            .ignore_discovered_servers()
            .reconnect_delay_callback(move |attempt| {
                // Attempts count up while the first connection is made, and from 1 again after it
                // has broken. There is no option for "never again", but ending the library's task
                // is one: unwinding so says nothing and drops all that it holds.
                if attempt <= attempts.swap(attempt, Ordering::Relaxed) {
                    of_this_one.cancel();
                    panic::resume_unwind(Box::new("the connection has ended"));
                }
                Duration::ZERO
            });
        // The library does not look for them in the URL.
        if let Some((user, password)) = config.servers.user() {
            options = options.user_and_password(user, password);
        }
        if let Some(creds) = &config.creds {
            let with_creds = options.credentials_file(creds).await;
            options = with_creds.map_err(|error| {
                ConnectError::with_source(ConnectErrorKind::Authentication, error)
            })?;
        }
        let client = options.connect(config.servers.addresses()).await?;
        let context = ContextBuilder::new().timeout(ANSWER_WAIT_MAX).build(client);
        Ok(Self { context, ended })
    }

    /// Waits for `answer`, or until the connection ends, and ends one that was silent: it would swallow
    /// the next question too.
    pub(super) async fn ask<T>(
        &self,
        answer: impl Future<Output = Result<T, Trouble>>,
    ) -> Result<T, Trouble> {
        let begun = Instant::now();
        let answered = tokio::select! {
            answered = answer => answered,
            () = self.ended.cancelled() => Err(Trouble::Passing("the connection ended".into())),
        };
        if let Err(Trouble::Passing(_)) = &answered
            && begun.elapsed() >= ANSWER_WAIT_MAX
        {
            self.ended.cancel();
        }
        answered
    }

    async fn hang_up(self) {
        let client = self.context.client();
        // Breaks the connection now; merely letting go of it would send what waits first.
        let _ = tokio::time::timeout(HANG_UP_WAIT_MAX, client.force_reconnect()).await;
    }
}

/// Keeps `shared` connected until `stop`, or until the log is lost.
pub(super) async fn keep(shared: Arc<Shared>, mut session: Session, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = session.ended.cancelled() => {}
            () = stop.cancelled() => return session.hang_up().await,
        }
        if !shared.away("the connection to the broker has ended") {
            return session.hang_up().await;
        }
        tracing::warn!("broker away");
        session.hang_up().await;
        let Some(again) = stop.run_until_cancelled(connect_again(&shared)).await else {
            return;
        };
        session = again;
        shared.counts.reconnects.fetch_add(1, Ordering::Relaxed);
        if !shared.up(session.clone()) {
            return session.hang_up().await;
        }
        tracing::info!("broker back");
    }
}

async fn connect_again(shared: &Shared) -> Session {
    let mut backoff = Backoff::new();
    loop {
        match Session::begin(&shared.config).await {
            Ok(session) => return session,
            Err(error) => {
                let servers = &shared.config.servers;
                shared.away(&format!(
                    "no connection to the broker at {servers}: {error}"
                ));
            }
        }
        backoff.pause().await;
    }
}
