//! Keeps one connection to the broker, and reconnects when it ends.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::broker::{BrokerConnection, ConnectError};
use super::config::MESSAGE_BYTES_NEEDED;
use super::shared::{ConnectionStatus, JetStreamShared};
use crate::sys::backoff::Backoff;

/// A connection that lasted this long, or delivered a batch, resets the backoff.
const STABLE_AFTER: Duration = Duration::from_secs(10);
/// The pauses between attempts to connect or to read the stream.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// How often a log line repeats that the broker is unreachable.
const REMIND_EVERY: Duration = Duration::from_secs(30);

pub(super) fn backoff() -> Backoff {
    Backoff::new(BACKOFF_MIN, BACKOFF_MAX)
}

/// Connects. Fails if the server's `max_payload` is less than the largest batch needs.
pub(super) async fn connect(
    shared: &JetStreamShared,
) -> Result<Arc<dyn BrokerConnection>, ConnectError> {
    let connection = shared.broker.connect().await?;
    match check_max_payload(&*connection) {
        Ok(()) => Ok(connection),
        Err(why) => {
            connection.close().await;
            Err(ConnectError::NotAllowed(why))
        }
    }
}

/// Checks that the server accepts the largest batch.
pub(super) fn check_max_payload(connection: &dyn BrokerConnection) -> Result<(), Arc<str>> {
    let max_payload = connection.message_bytes_max();
    match max_payload >= MESSAGE_BYTES_NEEDED {
        true => Ok(()),
        false => Err(format!(
            "max_payload of nats-server is {max_payload} bytes and a batch may need \
             {MESSAGE_BYTES_NEEDED}; set max_payload: 1MB or more in its configuration"
        )
        .into()),
    }
}

/// Keeps `shared` connected until `stop`.
pub(super) async fn keep_connected(
    shared: Arc<JetStreamShared>,
    mut connection: Arc<dyn BrokerConnection>,
    stop: CancellationToken,
) {
    let mut backoff = backoff();
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
        if connected_at.elapsed() >= STABLE_AFTER || shared.delivered.get() > delivered {
            backoff.reset();
        }
        let reconnecting = stop.run_until_cancelled(reconnect(&shared, &mut backoff, &servers));
        match reconnecting.await {
            Some(reconnected) => connection = reconnected,
            None => return,
        }
        shared.counts.reconnects.fetch_add(1, Ordering::Relaxed);
        shared
            .connection_status
            .set(ConnectionStatus::Up(Arc::clone(&connection)));
    }
}

/// Connects, with retries without limit.
async fn reconnect(
    shared: &JetStreamShared,
    backoff: &mut Backoff,
    servers: &str,
) -> Arc<dyn BrokerConnection> {
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
            let down_s = lost_at.elapsed().as_secs_f64();
            tracing::warn!(
                servers,
                down_s,
                %error,
                "no connection to NATS: writes wait, reads continue"
            );
            logged_at = Some(Instant::now());
        }
    }
}
