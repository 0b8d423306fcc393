//! Reading the stream, batch after batch, whatever happens to connection and consumer.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::consumer::pull::{Config, Stream};
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy};
use async_nats::jetstream::stream::LastRawMessageErrorKind;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};

use super::link::{Backoff, Session};
use super::message::{self, Unreadable};
use super::{Shared, Trouble};
use crate::log::{Batch, Entry, ReadError, Seq, Subscription};

/// What is asked of the broker at once. It bounds what waits in memory: twice this, as more is asked
/// for when half has come. The largest message that the stream takes is far smaller.
const PULL_MESSAGES_MAX: usize = 512;
const PULL_BYTES_MAX: usize = 8 << 20;
/// Entries handed out at once, or so many writes and the rest of a batch: all are decoded in one turn.
const GIVE_MAX: usize = 16;
const GIVE_WRITES_MAX: usize = 1024;
/// How often a broker that has nothing to send says so. After twice this much silence the consumer
/// is made anew.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(2);
/// How long a request for messages stands. One that reaches nobody is noticed after it.
const PULL_EXPIRES: Duration = Duration::from_secs(10);
/// When the broker forgets a consumer that nobody asks for messages.
const INACTIVE_MAX: Duration = Duration::from_secs(60);

/// A reader's place.
pub(super) struct JetStreamSubscription {
    shared: Arc<Shared>,
    /// The batch to give next.
    wanted: Seq,
    /// When the log took the batch before it, if that is known: what tells it from another one with
    /// the same number.
    before_time_ns: Option<u64>,
    source: Option<Source>,
    /// Whether the consumer was made anew because of a gap, and nothing has come since.
    after_gap: bool,
    /// Why nothing comes any more; told once what came before has been given.
    ended: Option<ReadError>,
}

struct Source {
    session: Session,
    messages: Stream,
}

/// What a message is to a reader.
enum Taken {
    Entry(Entry),
    /// It has been read before.
    Old,
    /// The consumer must be made anew.
    Gap,
}

impl JetStreamSubscription {
    /// Starts at `wanted`.
    pub(super) async fn begin(
        shared: Arc<Shared>,
        wanted: Seq,
        before_time_ns: Option<u64>,
    ) -> Result<Self, ReadError> {
        let mut this = Self {
            shared,
            wanted,
            before_time_ns,
            source: None,
            after_gap: false,
            ended: None,
        };
        this.source = Some(this.resume().await?);
        Ok(this)
    }

    async fn give(&mut self, entries: &mut Vec<Entry>) -> Result<(), ReadError> {
        let before = entries.len();
        loop {
            if let Some(error) = &self.ended {
                return Err(error.clone());
            }
            let Some(source) = &mut self.source else {
                // A place that was read is known to have been there; one to begin at may come from a
                // peer that is wrong, and takes nothing from the log.
                let resumed = self.resume().await;
                let resumed = resumed.inspect_err(|error| self.shared.lose(error))?;
                self.source = Some(resumed);
                self.shared.counts.resumes.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            let mut next = tokio::select! {
                biased;
                next = source.messages.next() => next,
                () = source.session.ended.cancelled() => None,
            };
            // From here on nothing waits, so nothing that was taken can be dropped.
            loop {
                match next {
                    Some(Ok(message)) => self.take(&message, entries),
                    Some(Err(error)) => {
                        tracing::info!(%error, "consumer ended");
                        self.source = None;
                    }
                    None => self.source = None,
                }
                let given = entries.iter().skip(before);
                let writes: usize = given.map(|entry| entry.batch.writes.len()).sum();
                let full = entries.len() - before >= GIVE_MAX || writes >= GIVE_WRITES_MAX;
                let Some(source) = self.source.as_mut().filter(|_| !full) else {
                    break;
                };
                match source.messages.next().now_or_never() {
                    Some(another) => next = another,
                    None => break,
                }
            }
            if entries.len() > before {
                return Ok(());
            }
        }
    }

    /// Adds what `message` holds; or ends the source, or reading.
    fn take(&mut self, message: &jetstream::Message, entries: &mut Vec<Entry>) {
        match self.read(message) {
            Ok(Taken::Entry(entry)) => entries.push(entry),
            Ok(Taken::Old) => {}
            Ok(Taken::Gap) => {
                self.after_gap = true;
                self.source = None;
            }
            Err(error) => {
                self.shared.lose(&error);
                self.ended = Some(error);
                self.source = None;
            }
        }
    }

    fn read(&mut self, message: &jetstream::Message) -> Result<Taken, ReadError> {
        let Ok(info) = message.info() else {
            // Nothing that a stream sends.
            return Ok(Taken::Old);
        };
        let seq = info.stream_sequence;
        if seq < self.wanted {
            let redeliveries = &self.shared.counts.redeliveries;
            redeliveries.fetch_add(1, Ordering::Relaxed);
            return Ok(Taken::Old);
        }
        if seq > self.wanted && !self.after_gap {
            self.shared.counts.gaps.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(wanted = self.wanted, got = seq, "gap, reading again");
            return Ok(Taken::Gap);
        }
        // A gap that stays is the reader's to refuse.
        self.after_gap = false;
        let time_ns = u64::try_from(info.published.unix_timestamp_nanos()).unwrap_or(0);
        let batch = self.batch(seq, message)?;
        self.wanted = seq + 1;
        self.before_time_ns = Some(time_ns);
        self.shared
            .end
            .fetch_max(seq + info.pending, Ordering::AcqRel);
        Ok(Taken::Entry(Entry {
            seq,
            time_ns,
            batch,
        }))
    }

    /// The batch in `message`; one that can't be read is empty, and so it is for all replicas.
    fn batch(&self, seq: Seq, message: &jetstream::Message) -> Result<Batch, ReadError> {
        let at_hand = |origin, number| match origin == self.shared.origin {
            true => self.shared.under_way.take(number),
            false => None,
        };
        match message::read(message.headers.as_ref(), &message.payload, at_hand) {
            Ok(batch) => Ok(batch),
            Err(Unreadable::Newer(format)) => Err(ReadError::NewerFormat { seq, format }),
            Err(Unreadable::Poisoned(why)) => {
                self.shared.counts.poisoned.fetch_add(1, Ordering::Relaxed);
                tracing::error!(seq, why, "message skipped");
                Ok(Batch::nothing())
            }
        }
    }

    /// A consumer that begins at the wanted batch; waits for the broker.
    async fn resume(&mut self) -> Result<Source, ReadError> {
        let mut backoff = Backoff::new();
        let mut told = false;
        loop {
            let session = self.shared.next_session().await?;
            match session.ask(self.consume(&session)).await {
                Ok(messages) => return Ok(Source { session, messages }),
                Err(Trouble::Final(error)) => return Err(error),
                Err(Trouble::Passing(why)) if !mem::replace(&mut told, true) => {
                    tracing::warn!(%why, "log not readable yet");
                }
                Err(Trouble::Passing(_)) => {}
            }
            backoff.pause().await;
        }
    }

    async fn consume(&self, session: &Session) -> Result<Stream, Trouble> {
        self.check(session).await?;
        let config = Config {
            deliver_policy: DeliverPolicy::ByStartSequence {
                start_sequence: self.wanted,
            },
            ack_policy: AckPolicy::None,
            inactive_threshold: INACTIVE_MAX,
            // It is made anew when it is lost; keeping it costs the broker a write now and then.
            memory_storage: true,
            num_replicas: 1,
            ..Config::default()
        };
        let stream = &self.shared.config.stream;
        let consumer = session.context.create_consumer_on_stream(config, stream);
        let consumer = consumer.await.map_err(|error| Trouble::passing(&error))?;
        let messages = consumer
            .stream()
            .max_messages_per_batch(PULL_MESSAGES_MAX)
            .max_bytes_per_batch(PULL_BYTES_MAX)
            .heartbeat(HEARTBEAT_EVERY)
            .expires(PULL_EXPIRES)
            .messages();
        messages.await.map_err(|error| Trouble::passing(&error))
    }

    /// Whether the log goes on from where this reader is. The broker would not say: a start below
    /// the first batch it has is raised, one above the last is waited for.
    async fn check(&self, session: &Session) -> Result<(), Trouble> {
        let facts = self.shared.look(session).await?;
        let wanted = self.wanted;
        let (first, end) = (facts.first, facts.last);
        if wanted < first {
            return Err(Trouble::Final(ReadError::Trimmed { first, wanted }));
        }
        if wanted > end + 1 {
            let applied = wanted - 1;
            return Err(Trouble::Final(ReadError::Shorter { end, applied }));
        }
        let Some(time_ns) = self.before_time_ns.filter(|_| wanted > first) else {
            return Ok(());
        };
        // A broker that lost its last batches and took others since is as long as before.
        let seq = wanted - 1;
        let stream = session
            .context
            .get_stream_no_info(&self.shared.config.stream);
        let stream = stream.await.map_err(|error| Trouble::passing(&error))?;
        let before = stream.get_raw_message(seq).await;
        let before = match before {
            Ok(before) => before,
            // Nobody can tell any more; that it is missing is the next reader's trouble.
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => return Ok(()),
            Err(error) => return Err(Trouble::passing(&error)),
        };
        match u64::try_from(before.time.unix_timestamp_nanos()) == Ok(time_ns) {
            true => Ok(()),
            false => Err(Trouble::Final(ReadError::Rewritten { seq })),
        }
    }
}

impl Subscription for JetStreamSubscription {
    fn next<'a>(&'a mut self, entries: &'a mut Vec<Entry>) -> BoxFuture<'a, Result<(), ReadError>> {
        self.give(entries).boxed()
    }
}
