//! The broker: NATS servers, accessed with async-nats.
//!
//! The client library would reconnect by itself, but it buffers unsent messages and sends them
//! after the reconnect. A late batch could then overwrite newer writes. So reconnecting is disabled
//! here: when a connection ends, its unsent messages are dropped and its users get an error at
//! once.

mod connection;
mod consumer;
mod errors;
mod service;

use std::panic;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_nats::jetstream::context::ContextBuilder;
use async_nats::{ConnectErrorKind, ConnectOptions, Event, ServerAddr};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use self::connection::{ANSWER_WAIT_MAX, NatsConnection};
use self::service::{PeerService, SERVICE};
use super::broker::{Broker, BrokerConnection, ConnectError};
use super::config::JetStreamConfig;
use crate::log::RandomId;

/// The timeout for connecting.
const CONNECT_WAIT_MAX: Duration = Duration::from_secs(3);
/// How long a connection may be silent before it is pinged. The third ping without an answer ends
/// the connection.
const PING_EVERY: Duration = Duration::from_secs(2);

/// NATS servers.
pub(super) struct Nats {
    config: JetStreamConfig,
    /// Names the consumer: there is one per replica.
    replica: RandomId,
    /// Servers of the NATS cluster, as the servers report them.
    discovered: Arc<Mutex<Vec<ServerAddr>>>,
}

impl Nats {
    pub(super) fn new(config: JetStreamConfig, replica: RandomId) -> Self {
        Self {
            config,
            replica,
            discovered: Arc::default(),
        }
    }

    async fn connect(&self) -> Result<Arc<dyn BrokerConnection>, async_nats::ConnectError> {
        let ended = CancellationToken::new();
        let of_this_one = ended.clone();
        let attempts = AtomicUsize::new(0);
        let (denials, _) = broadcast::channel(16);
        let denied = denials.clone();
        let mut options = ConnectOptions::new()
            .name(SERVICE)
            .connection_timeout(CONNECT_WAIT_MAX)
            .ping_interval(PING_EVERY)
            .ignore_discovered_servers()
            .event_callback(move |event| {
                if let Event::ServerError(error) = event {
                    // There may be no receiver.
                    let _ = denied.send(Arc::from(error.to_string()));
                }
                std::future::ready(())
            })
            .reconnect_delay_callback(move |attempt| {
                // The attempt number rises until the first connection is made, and starts at 1
                // again when that breaks. The library has no option to never reconnect, so this
                // ends its task: the unwinding prints nothing and drops everything that the task
                // holds.
                if attempt <= attempts.swap(attempt, Ordering::Relaxed) {
                    of_this_one.cancel();
                    panic::resume_unwind(Box::new("the connection has ended"));
                }
                Duration::ZERO
            });
        // The library does not read them from the URL.
        if let Some((user, password)) = self.config.servers.user() {
            options = options.user_and_password(user, password);
        }
        if let Some(creds) = &self.config.creds {
            let with_creds = options.credentials_file(creds).await;
            options = with_creds.map_err(|error| {
                async_nats::ConnectError::with_source(ConnectErrorKind::Authentication, error)
            })?;
        }
        let mut addresses = self.config.servers.addresses().to_vec();
        addresses.extend(self.discovered.lock().iter().cloned());
        let client = options.connect(addresses.as_slice()).await?;
        let connection = NatsConnection {
            context: ContextBuilder::new()
                .timeout(ANSWER_WAIT_MAX)
                .build(client.clone()),
            stream: self.config.stream.clone(),
            subject: self.config.subject(),
            peers: PeerService {
                client,
                ended: ended.clone(),
                stream: self.config.stream.clone(),
                prefix: self.config.status_prefix(),
            },
            consumer: format!("gradestore-{}", self.replica),
            scheme: self.config.servers.scheme(),
            discovered: Arc::clone(&self.discovered),
            denials,
            ended,
        };
        connection.remember_servers();
        Ok(Arc::new(connection))
    }
}

impl Broker for Nats {
    fn connect(&self) -> BoxFuture<'_, Result<Arc<dyn BrokerConnection>, ConnectError>> {
        async {
            self.connect().await.map_err(|error| {
                use ConnectErrorKind::{Authentication, AuthorizationViolation};
                let why = Arc::from(error.to_string());
                match error.kind() {
                    Authentication | AuthorizationViolation => ConnectError::NotAllowed(why),
                    _ => ConnectError::Unreachable(why),
                }
            })
        }
        .boxed()
    }

    fn servers(&self) -> String {
        self.config.servers.to_string()
    }
}
