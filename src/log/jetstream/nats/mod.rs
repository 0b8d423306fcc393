//! The broker: NATS servers, accessed with async-nats.
//!
//! The client library would reconnect by itself, but it buffers unsent messages and sends them
//! after the reconnect. A late batch could then overwrite newer writes. So reconnecting is disabled
//! here: when a connection ends, its unsent messages are dropped and its users get an error at
//! once.

mod consumer;
mod errors;

use std::collections::HashMap;
use std::panic;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_nats::jetstream::Context;
use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy};
use async_nats::jetstream::context::{ContextBuilder, PublishErrorKind, RequestErrorKind};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{Config, Info};
use async_nats::service::{Service, ServiceExt};
use async_nats::{ConnectErrorKind, ConnectOptions, Event, ServerAddr, StatusCode, Subscriber};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, FuturesUnordered};
use futures_util::{FutureExt, StreamExt};
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use self::consumer::NatsConsumer;
use self::errors::{no_answer, publish_error, refusal};
use super::broker::{
    Asked, Broker, BrokerError, ConnectError, Connection, Consumer, InfoSource, Outgoing,
    RawMessage, Stored, StreamInfo,
};
use super::raw_message::{self, RawMessageError};
use super::{JetStreamConfig, SUBJECT};
use crate::log::{Announce, Announcement, RandomId, Seq};

/// How long connecting may take.
const CONNECT_WAIT_MAX: Duration = Duration::from_secs(3);
/// How long the broker may take to answer.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(2);
/// How often a request to the stream is repeated until it is answered. Requests to a stream without a
/// leader are lost, and its next leader does not see them.
const ASK_AGAIN_EVERY: Duration = Duration::from_millis(200);
/// How long to wait for the answer to the deletion of a consumer. The server that runs the consumer
/// answers. If it is down, there is no answer, but the consumer is deleted.
const DELETE_WAIT_MAX: Duration = Duration::from_millis(150);
/// How long a connection may be silent before it is probed; the third probe without an answer ends
/// it.
const PING_EVERY: Duration = Duration::from_secs(2);
/// How long ending a connection may take.
const CLOSE_WAIT_MAX: Duration = Duration::from_secs(1);

/// The start of the server's error if this client may not subscribe to the answers to its requests.
const INBOX_DENIED: &str = "Subscription to \"_INBOX.";

/// Messages and bytes of one pull request. They bound the buffered messages to twice this, because
/// the next request is sent when half of the last one has arrived. The largest message of the
/// stream is far smaller.
const PULL_MESSAGES_MAX: usize = 512;
const PULL_BYTES_MAX: usize = 8 << 20;
/// How often the broker sends a heartbeat if it has no messages. A consumer that is silent for
/// twice as long has ended.
const HEARTBEAT_EVERY: Duration = Duration::from_millis(500);
/// When a pull request expires. A request that was lost is noticed by then.
const PULL_EXPIRES: Duration = Duration::from_secs(10);
/// When the broker removes a consumer without pull requests.
const INACTIVE_MAX: Duration = Duration::from_secs(60);

/// The service by which replicas find each other, so that `nats micro ls` and
/// `nats micro stats gradestore` show them too.
const SERVICE: &str = "gradestore";
/// The subject on which all replicas answer with their announcements, and the prefix of the subject
/// of one replica, which ends in its id. The service's own subjects have no place for a nonce.
const ASK_ALL: &str = "gradestore.status.all";
const ASK_REPLICA: &str = "gradestore.status.";
/// How long to wait for the first announcement, and for another one after each.
const FIRST_WAIT_MAX: Duration = Duration::from_millis(300);
const NEXT_WAIT_MAX: Duration = Duration::from_millis(100);
/// How long to wait for the answer of one replica. Without a subscriber NATS answers "no
/// responders" at once.
const REPLICA_WAIT_MAX: Duration = Duration::from_secs(1);
/// How long announcements are collected at most.
const COLLECT_MAX: Duration = Duration::from_secs(2);
/// How many announcements are collected at most: any client of the broker may send any number.
const ANNOUNCEMENTS_MAX: usize = 4096;

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

    async fn connect(&self) -> Result<Arc<dyn Connection>, async_nats::ConnectError> {
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
            context: ContextBuilder::new().timeout(ANSWER_WAIT_MAX).build(client),
            stream: self.config.stream.clone(),
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

/// Waits until the server denies publishing to `subject` or subscribing to the answers, and returns
/// its error.
async fn denial(denials: &mut broadcast::Receiver<Arc<str>>, subject: &str) -> Arc<str> {
    let publish = format!("\"{subject}\"");
    loop {
        match denials.recv().await {
            Ok(text) if text.contains(&publish) || text.contains(INBOX_DENIED) => return text,
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        }
    }
}

impl Broker for Nats {
    fn connect(&self) -> BoxFuture<'_, Result<Arc<dyn Connection>, ConnectError>> {
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

struct NatsConnection {
    context: Context,
    stream: String,
    consumer: String,
    scheme: &'static str,
    discovered: Arc<Mutex<Vec<ServerAddr>>>,
    /// Errors that the server sends outside of answers, such as for a missing permission.
    denials: broadcast::Sender<Arc<str>>,
    ended: CancellationToken,
}

impl NatsConnection {
    /// Learns the cluster's other servers, so that the next connection can go there.
    fn remember_servers(&self) {
        let info = self.context.client().server_info();
        let mut known = self.discovered.lock();
        for url in info.connect_urls {
            if let Ok(address) = format!("{}://{url}", self.scheme).parse::<ServerAddr>()
                && !known.contains(&address)
            {
                known.push(address);
            }
        }
    }

    /// Waits for the answer to a message that was sent to `subject`. Fails if the connection ends
    /// or the server denies publishing there.
    async fn answer<T>(
        &self,
        subject: &str,
        answer: impl Future<Output = Result<T, BrokerError>>,
    ) -> Result<T, BrokerError> {
        let mut denials = self.denials.subscribe();
        tokio::select! {
            biased;
            answer = answer => answer,
            text = denial(&mut denials, subject) => Err(BrokerError::Refused(text)),
            () = self.ended.cancelled() => Err(no_answer("the connection to NATS ended")),
        }
    }

    /// Sends a request to the JetStream API.
    async fn request<T: DeserializeOwned>(
        &self,
        subject: &str,
        request: &(impl Serialize + ?Sized + Sync),
    ) -> Result<T, BrokerError> {
        let answer = async {
            let answer = self.context.request(subject.to_owned(), request).await;
            match answer {
                Ok(Response::Ok(answer)) => Ok(answer),
                Ok(Response::Err { error }) => Err(refusal(&error)),
                Err(error) => Err(match error.kind() {
                    RequestErrorKind::NoResponders => {
                        BrokerError::NoResponders("JetStream does not answer".into())
                    }
                    _ => no_answer(&error.to_string()),
                }),
            }
        };
        self.answer(&format!("$JS.API.{subject}"), answer).await
    }

    fn info(info: Info) -> StreamInfo {
        let source = match &info.cluster {
            None => InfoSource::Unclustered,
            // The answering server leaves itself out of the list of replicas.
            Some(cluster) => match &cluster.leader {
                Some(leader) if cluster.replicas.iter().all(|peer| peer.name != *leader) => {
                    match cluster.name {
                        Some(_) => InfoSource::Leader,
                        None => InfoSource::Unclustered,
                    }
                }
                _ => InfoSource::Follower,
            },
        };
        StreamInfo {
            first: match info.state.messages {
                0 => info.state.last_sequence + 1,
                _ => info.state.first_sequence,
            },
            last: info.state.last_sequence,
            config: info.config,
            source,
        }
    }

    async fn create_consumer(&self, from: Seq) -> Result<Box<dyn Consumer>, BrokerError> {
        // The previous consumer may still exist, and its start cannot be changed.
        let delete = format!("CONSUMER.DELETE.{}.{}", self.stream, self.consumer);
        let request = json!({});
        let deleted = self.request::<serde_json::Value>(&delete, &request);
        match tokio::time::timeout(DELETE_WAIT_MAX, deleted).await {
            Ok(Ok(_) | Err(BrokerError::NoConsumer)) | Err(_) => {}
            Ok(Err(error)) => return Err(error),
        }
        let config = pull::Config {
            name: Some(self.consumer.clone()),
            deliver_policy: DeliverPolicy::ByStartSequence {
                start_sequence: from,
            },
            ack_policy: AckPolicy::None,
            inactive_threshold: INACTIVE_MAX,
            // A lost consumer is created again; storing it on disk would cost the broker writes.
            memory_storage: true,
            num_replicas: 1,
            ..pull::Config::default()
        };
        let created = async {
            let consumer = self
                .context
                .create_consumer_on_stream(config, &self.stream)
                .await
                .map_err(|error| no_answer(&error.to_string()))?;
            consumer
                .stream()
                .max_messages_per_batch(PULL_MESSAGES_MAX)
                .max_bytes_per_batch(PULL_BYTES_MAX)
                .heartbeat(HEARTBEAT_EVERY)
                .expires(PULL_EXPIRES)
                .messages()
                .await
                .map_err(|error| no_answer(&error.to_string()))
        };
        let subject = format!("$JS.API.CONSUMER.CREATE.{}.{}", self.stream, self.consumer);
        let messages = self.answer(&subject, created).await?;
        Ok(Box::new(NatsConsumer {
            messages,
            denials: self.denials.subscribe(),
            pull: format!(
                "$JS.API.CONSUMER.MSG.NEXT.{}.{}",
                self.stream, self.consumer
            ),
            ended: self.ended.clone(),
        }))
    }

    #[expect(clippy::expect_used, reason = "it can't fail")]
    async fn announce(
        &self,
        announce: Announce,
        stop: CancellationToken,
    ) -> Result<(), async_nats::Error> {
        let me = announce("");
        let metadata = [
            ("node", &me.node),
            ("replica", &me.replica),
            ("url", &me.url),
            ("log", &me.log_id),
        ];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_string()));
        let current = Arc::clone(&announce);
        let service = self
            .context
            .client()
            .service_builder()
            .description("a replicated in-memory store of user grades")
            .metadata(HashMap::from(metadata))
            .stats_handler(move |_, _| {
                // For people. Their request has no nonce, so this is not signed.
                let mut announcement = current("");
                announcement.mac = None;
                serde_json::to_value(announcement).expect("an announcement is JSON")
            })
            .start(SERVICE, &me.version)
            .await?;
        let endpoint = |name: &str| {
            // A separate queue group for each process, so that every process answers.
            let endpoint = service.endpoint_builder().name(name);
            endpoint.queue_group(&me.node)
        };
        let to_all = endpoint("status").add(ASK_ALL).await?;
        let to_me = format!("{ASK_REPLICA}{}", me.replica);
        let to_me = endpoint("replica").add(to_me).await?;
        let mut requests = stream::select(to_all, to_me);
        loop {
            tokio::select! {
                Some(request) = requests.next() => {
                    // If the payload is not a nonce, no replica accepts the answer.
                    let nonce = str::from_utf8(&request.message.payload).unwrap_or_default();
                    let answer = serde_json::to_vec(&announce(nonce))?;
                    request.respond(Ok(answer.into())).await?;
                }
                () = self.ended.cancelled() => break,
                () = stop.cancelled() => break,
            }
        }
        Service::stop(service).await
    }

    async fn ask_peers(
        &self,
        to: Asked,
        nonce: RandomId,
    ) -> Result<Vec<Announcement>, async_nats::Error> {
        let (subject, first_wait_max) = match to {
            Asked::All => (ASK_ALL.to_owned(), FIRST_WAIT_MAX),
            Asked::Replica(replica) => (format!("{ASK_REPLICA}{replica}"), REPLICA_WAIT_MAX),
        };
        let client = self.context.client();
        let inbox = client.new_inbox();
        let mut answers: Subscriber = client.subscribe(inbox.clone()).await?;
        client
            .publish_with_reply(subject, inbox, nonce.to_string().into())
            .await?;
        // Not one per process: a forged announcement must not hide the authentic one.
        let mut found = Vec::new();
        let collect = async {
            let mut wait_max = first_wait_max;
            while let Ok(Some(answer)) = tokio::time::timeout(wait_max, answers.next()).await {
                if answer.status == Some(StatusCode::NO_RESPONDERS) {
                    break;
                }
                wait_max = NEXT_WAIT_MAX;
                if let Ok(peer) = serde_json::from_slice::<Announcement>(&answer.payload)
                    && found.len() < ANNOUNCEMENTS_MAX
                {
                    found.push(peer);
                }
            }
        };
        let _ = tokio::time::timeout(COLLECT_MAX, collect).await;
        Ok(found)
    }
}

impl Connection for NatsConnection {
    fn ended(&self) -> &CancellationToken {
        &self.ended
    }

    fn message_bytes_max(&self) -> usize {
        self.context.client().server_info().max_payload
    }

    fn is_clustered(&self) -> bool {
        self.context.client().server_info().cluster.is_some()
    }

    fn stream_info(&self) -> BoxFuture<'_, Result<StreamInfo, BrokerError>> {
        async {
            let subject = format!("STREAM.INFO.{}", self.stream);
            let request = json!({});
            let answer = ask_until_answered(|| self.request(&subject, &request));
            answer.await.map(Self::info)
        }
        .boxed()
    }

    fn create_stream(&self, config: Config) -> BoxFuture<'_, Result<StreamInfo, BrokerError>> {
        async move {
            let subject = format!("STREAM.CREATE.{}", self.stream);
            self.request(&subject, &config).await.map(Self::info)
        }
        .boxed()
    }

    fn publish(&self, message: Outgoing) -> BoxFuture<'_, Result<Stored, BrokerError>> {
        async move {
            let expected = message.expected_last;
            let mut publish = PublishMessage::build()
                .payload(message.payload)
                .headers(message.headers);
            if let Some(expected) = expected {
                publish = publish.expected_last_sequence(expected);
            }
            let answer = async {
                let answer = self.context.send_publish(SUBJECT, publish).await;
                let stored = match answer {
                    Ok(answer) => answer.await,
                    Err(error) => Err(error),
                };
                stored.map_err(|error| {
                    let kind = error.kind();
                    let error = publish_error(&error, expected);
                    if kind != PublishErrorKind::TimedOut
                        && matches!(error, BrokerError::NoAnswer(_))
                    {
                        // The client library's task is gone.
                        self.ended.cancel();
                    }
                    error
                })
            };
            let stored = self.answer(SUBJECT, answer).await?;
            Ok(Stored {
                seq: stored.sequence,
                duplicate: stored.duplicate,
            })
        }
        .boxed()
    }

    fn consume(&self, from: Seq) -> BoxFuture<'_, Result<Box<dyn Consumer>, BrokerError>> {
        self.create_consumer(from).boxed()
    }

    fn message(&self, seq: Seq) -> BoxFuture<'_, Result<Option<RawMessage>, BrokerError>> {
        async move {
            let subject = format!("$JS.API.STREAM.MSG.GET.{}", self.stream);
            let client = self.context.client();
            let answer = ask_until_answered(|| async {
                let got = raw_message::get(&client, &self.stream, seq, ANSWER_WAIT_MAX).await;
                got.map_err(|error| {
                    let why = error.to_string().into();
                    match error {
                        RawMessageError::NoResponders => BrokerError::NoResponders(why),
                        RawMessageError::Api { .. } => BrokerError::Refused(why),
                        _ => BrokerError::NoAnswer(why),
                    }
                })
            });
            self.answer(&subject, answer).await
        }
        .boxed()
    }

    fn announce(
        &self,
        announce: Announce,
        stop: CancellationToken,
    ) -> BoxFuture<'_, Result<(), String>> {
        async {
            let announced = self.announce(announce, stop).await;
            announced.map_err(|error| error.to_string())
        }
        .boxed()
    }

    fn ask_peers(
        &self,
        to: Asked,
        nonce: RandomId,
    ) -> BoxFuture<'_, Result<Vec<Announcement>, String>> {
        async move {
            let asked = self.ask_peers(to, nonce).await;
            asked.map_err(|error| error.to_string())
        }
        .boxed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async {
            self.remember_servers();
            let client = self.context.client();
            // Closes the connection at once. Dropping it would first send the buffered messages.
            let _ = tokio::time::timeout(CLOSE_WAIT_MAX, client.force_reconnect()).await;
        }
        .boxed()
    }
}

/// Repeats a request until one of them is answered or the first one times out.
async fn ask_until_answered<T, F>(ask: impl Fn() -> F) -> Result<T, BrokerError>
where
    F: Future<Output = Result<T, BrokerError>>,
{
    let mut asked = FuturesUnordered::new();
    loop {
        asked.push(ask());
        if let Ok(Some(answer)) = tokio::time::timeout(ASK_AGAIN_EVERY, asked.next()).await {
            return answer;
        }
    }
}
