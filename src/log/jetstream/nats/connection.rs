//! One connection: requests to the JetStream API, and consumers.

use std::sync::Arc;
use std::time::Duration;

use async_nats::ServerAddr;
use async_nats::jetstream::Context;
use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy};
use async_nats::jetstream::context::{PublishErrorKind, RequestErrorKind};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{Config, Info};
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use super::super::broker::{
    BrokerConnection, BrokerError, Consumer, InfoSource, Outgoing, PeerQuery, RawMessage, Stored,
    StreamInfo,
};
use super::super::raw_message::{self, RawMessageError};
use super::consumer::NatsConsumer;
use super::errors::{broker_error, denial, no_answer, publish_error};
use super::service::{self, PeerService};
use crate::log::{Announce, Announcement, RandomId, Seq};

/// The timeout of a request.
pub(super) const ANSWER_WAIT_MAX: Duration = Duration::from_secs(2);
/// How often a request to the stream is repeated until it is answered. Requests to a stream without
/// a leader are lost, and its next leader does not see them.
const ASK_AGAIN_EVERY: Duration = Duration::from_millis(200);
/// How long to wait for the answer to the deletion of a consumer. The server that runs the consumer
/// answers. If it is down, there is no answer, but the consumer is deleted.
const DELETE_WAIT_MAX: Duration = Duration::from_millis(150);
/// The timeout for closing a connection.
const CLOSE_WAIT_MAX: Duration = Duration::from_secs(1);

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

pub(super) struct NatsConnection {
    pub(super) context: Context,
    pub(super) stream: String,
    /// The subject that batches are published to.
    pub(super) subject: String,
    pub(super) peers: PeerService,
    pub(super) consumer: String,
    pub(super) scheme: &'static str,
    pub(super) discovered: Arc<Mutex<Vec<ServerAddr>>>,
    /// Errors that the server sends outside of answers, such as for a missing permission.
    pub(super) denials: broadcast::Sender<Arc<str>>,
    pub(super) ended: CancellationToken,
}

impl NatsConnection {
    /// Learns the cluster's other servers, so that the next connection can go there.
    pub(super) fn remember_servers(&self) {
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
            text = denial(&mut denials, subject) => Err(BrokerError::Rejected(text)),
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
                Ok(Response::Err { error }) => Err(broker_error(&error)),
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
}

impl BrokerConnection for NatsConnection {
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
                let answer = self
                    .context
                    .send_publish(self.subject.clone(), publish)
                    .await;
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
                        // The client library's task has ended.
                        self.ended.cancel();
                    }
                    error
                })
            };
            let stored = self.answer(&self.subject, answer).await?;
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
                        RawMessageError::Api { .. } => BrokerError::Rejected(why),
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
            let announced = service::announce(&self.peers, announce, stop).await;
            announced.map_err(|error| error.to_string())
        }
        .boxed()
    }

    fn ask_peers(
        &self,
        query: PeerQuery,
        nonce: RandomId,
    ) -> BoxFuture<'_, Result<Vec<Announcement>, String>> {
        async move {
            let announcements = service::ask_peers(&self.peers, query, nonce).await;
            announcements.map_err(|error| error.to_string())
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
