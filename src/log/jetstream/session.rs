//! Keeps one connection to the broker, and reconnects when it ends.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::broker::{ConnectError, Connection};
use super::{MESSAGE_BYTES_NEEDED, Shared};

/// A connection that lasted this long, or delivered a batch, resets the backoff.
const GOOD_AFTER: Duration = Duration::from_secs(10);
/// How often the log repeats that the broker is unreachable.
const REMIND_EVERY: Duration = Duration::from_secs(30);

/// The state of the connection.
#[derive(Clone)]
pub(super) enum Link {
    /// Connected.
    Up(Arc<dyn Connection>),
    /// Not connected; says why.
    Down(Arc<str>),
}

/// Pauses between attempts: short at first, two seconds at most.
pub(super) struct Backoff(Duration);

impl Backoff {
    const FIRST: Duration = Duration::from_millis(50);
    const MAX: Duration = Duration::from_secs(2);

    pub(super) fn new() -> Self {
        Self(Self::FIRST)
    }

    pub(super) fn reset(&mut self) {
        self.0 = Self::FIRST;
    }

    pub(super) async fn pause(&mut self) {
        self.pause_after(Instant::now()).await;
    }

    /// Pauses until the backoff time has passed since `began`, when the failed attempt began.
    pub(super) async fn pause_after(&mut self, began: Instant) {
        tokio::time::sleep_until(began + self.0).await;
        self.0 = (self.0 * 2).min(Self::MAX);
    }
}

/// Connects. Fails if the server's `max_payload` is less than the largest batch needs.
pub(super) async fn connect(shared: &Shared) -> Result<Arc<dyn Connection>, ConnectError> {
    let connection = shared.broker.connect().await?;
    let bytes_max = connection.message_bytes_max();
    if bytes_max < MESSAGE_BYTES_NEEDED {
        connection.close().await;
        let why = format!(
            "nats-server takes messages of up to {bytes_max} bytes and a batch may need \
             {MESSAGE_BYTES_NEEDED}; set max_payload: 1MB in its configuration"
        );
        return Err(ConnectError::NotAllowed(why.into()));
    }
    Ok(connection)
}

/// Keeps `shared` connected until `stop`.
pub(super) async fn keep_connected(
    shared: Arc<Shared>,
    mut connection: Arc<dyn Connection>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::new();
    loop {
        let (connected_at, delivered) = (Instant::now(), shared.delivered.get());
        tokio::select! {
            biased;
            () = connection.ended().cancelled() => {}
            () = stop.cancelled() => return connection.close().await,
        }
        let servers = shared.broker.servers();
        shared.set_down("the connection to NATS ended");
        connection.close().await;
        if connected_at.elapsed() >= GOOD_AFTER || shared.delivered.get() > delivered {
            backoff.reset();
        }
        let again = stop.run_until_cancelled(connect_again(&shared, &mut backoff, &servers));
        match again.await {
            Some(again) => connection = again,
            None => return,
        }
        shared.counts.reconnects.fetch_add(1, Ordering::Relaxed);
        shared.link.set(Link::Up(Arc::clone(&connection)));
    }
}

async fn connect_again(
    shared: &Shared,
    backoff: &mut Backoff,
    servers: &str,
) -> Arc<dyn Connection> {
    let lost_at = Instant::now();
    let mut logged_at: Option<Instant> = None;
    loop {
        backoff.pause().await;
        let error = match connect(shared).await {
            Ok(connection) => {
                if logged_at.is_some() {
                    let down_s = lost_at.elapsed().as_secs_f64();
                    tracing::info!(servers, down_s, "reconnected to NATS");
                }
                return connection;
            }
            Err(error) => error,
        };
        let why: Arc<str> = format!("no connection to NATS at {servers}: {error}").into();
        shared.set_down(&why);
        match error {
            ConnectError::NotAllowed(_) => shared.health.not_allowed(why),
            ConnectError::Unreachable(_) => shared.health.unreachable(why),
        }
        if logged_at.is_none_or(|at| at.elapsed() >= REMIND_EVERY) {
            tracing::warn!(servers, %error, "no connection to NATS; reads continue, writes wait");
            logged_at = Some(Instant::now());
        }
    }
}
