//! Reads the stream batch by batch, across failures of the connection and the consumer.
//!
//! Before it creates a consumer, a subscription compares the stream with the batches that it has
//! read: the stream must be the same log, end no earlier, and hold the same batch at the last
//! position. A single answer is not final, see [`history`](super::history).
//!
//! The leader of the servers' metadata creates consumers. It may be missing for some seconds longer
//! than the stream's leader. Until there is a consumer, messages are fetched one by one.
//!
//! Some messages the client library cannot read: the connection ends, or the message is not
//! delivered. If that happens twice at one position, the message is fetched as raw bytes and read
//! by the [rule for header blocks](super::header_block), which is the same for all replicas. Writes
//! share the connection, so after a message that is unreadable by the rule all messages are fetched
//! for some seconds: the next one may be unreadable too.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::HeaderMap;
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::broker::{BrokerConnection, BrokerError, Consumer, Delivered};
use super::history::HistoryCheck;
use super::message::{self, Unreadable};
use super::shared::JetStreamShared;
use super::{header_block, session};
use crate::log::{Batch, Entry, Message, Position, ReadError, Seq, Subscription};
use crate::sys::backoff::Backoff;

/// A call returns at most this many entries, and no more batches after this many writes: all of
/// them are decoded without yielding.
const ENTRIES_MAX: usize = 16;
const WRITES_MAX: usize = 1024;
/// A consumer that delivers nothing for this long is replaced if the stream has more messages.
const SILENCE_MAX: Duration = Duration::from_secs(1);
/// How often the stream's state is requested until its history can be compared.
const ASK_EVERY: Duration = Duration::from_millis(200);
/// How often the next message is fetched while there is no consumer.
const FETCH_EVERY: Duration = Duration::from_millis(200);
/// How often delivery may fail at one position before the message is fetched instead.
const FAILURES_MAX: u32 = 2;
/// For how long messages are fetched after an unreadable one.
const FETCH_FOR: Duration = Duration::from_secs(5);
/// How often the next message is requested during that time.
const FETCH_ALL_EVERY: Duration = Duration::from_millis(100);
/// How often the stream must report that it lacks the next message before that counts as a gap.
const MISSING_MAX: u32 = 2;

/// A subscription at its position in the stream.
pub(super) struct JetStreamSubscription {
    shared: Arc<JetStreamShared>,
    /// The last batch that was delivered.
    last: Position,
    consumer: Option<Box<dyn Consumer>>,
    /// The consumer that is being created.
    pending: Option<PendingConsumer>,
    /// The error that was logged last; cleared when a consumer delivers.
    problem: Option<String>,
    backoff: Backoff,
    /// How often delivery has failed since the last entry.
    failures: u32,
    /// Until when all messages are fetched, because a consumer might not deliver them.
    fetch_until: Option<Instant>,
    /// How often the stream lacked the next message and had later ones, since the last entry.
    missing: u32,
    /// The error that ended the subscription; returned after the entries before it.
    ended: Option<ReadError>,
}

/// A consumer that is being created, over a connection on which the stream's history was compared.
struct PendingConsumer {
    connection: Arc<dyn BrokerConnection>,
    /// The first message that it will deliver.
    from: Seq,
    consumer: BoxFuture<'static, Result<Box<dyn Consumer>, BrokerError>>,
    began: Instant,
    /// When the next message is fetched.
    fetch_at: Instant,
    /// When a fetch must compare the stream's history again first.
    compare_at: Instant,
}

/// The result of fetching the next message.
enum FetchOutcome {
    /// The message was added to the entries.
    Entry,
    /// The stream does not have it.
    Nothing,
    /// There was no answer, or the stream's history could not be compared.
    NoAnswer,
}

impl JetStreamSubscription {
    /// Starts after `last`.
    pub(super) async fn start(
        shared: Arc<JetStreamShared>,
        last: Position,
    ) -> Result<Self, ReadError> {
        let mut this = Self {
            shared,
            last,
            consumer: None,
            pending: None,
            problem: None,
            backoff: session::backoff(),
            failures: 0,
            fetch_until: None,
            missing: 0,
            ended: None,
        };
        // A server that is still starting may report an end before the stream's. It creates no
        // consumer yet, so the reported end can be trusted once there is a consumer.
        let mut pending = this.open().await?;
        loop {
            match (&mut pending.consumer).await {
                Ok(consumer) => {
                    this.consumer = Some(consumer);
                    this.shared.reads_stream.set(true);
                    return Ok(this);
                }
                Err(error) => pending = this.open_again(&error, pending.began).await?,
            }
        }
    }

    pub(super) async fn fill(&mut self, entries: &mut Vec<Entry>) -> Result<(), ReadError> {
        let before = entries.len();
        loop {
            if let Some(error) = &self.ended {
                return Err(error.clone());
            }
            let Some(consumer) = &mut self.consumer else {
                self.reopen(entries).await?;
                if entries.len() > before {
                    self.shared.delivered.set(self.last.seq);
                    return Ok(());
                }
                continue;
            };
            let mut next = tokio::select! {
                biased;
                next = consumer.next() => next,
                () = self.shared.replace_consumer.notified() => {
                    tracing::debug!("replacing a consumer that delivers nothing");
                    self.consumer = None;
                    continue;
                }
                () = tokio::time::sleep(SILENCE_MAX) => {
                    // The client library drops some messages silently. At the end of the stream no
                    // later message would reveal that.
                    if self.shared.end.load(Ordering::Acquire) > self.last.seq {
                        self.failures = FAILURES_MAX;
                        self.consumer = None;
                    }
                    continue;
                }
            };
            // Nothing awaits from here on, so dropping this future loses no message.
            loop {
                match next {
                    Ok(delivered) => self.accept(delivered, entries),
                    Err(error) => {
                        match error {
                            BrokerError::Rejected(_) => self.log(&error),
                            _ => tracing::debug!(%error, "consumer ended"),
                        }
                        self.consumer = None;
                        self.failures += 1;
                    }
                }
                let added = entries.iter().skip(before);
                let writes: usize = added.map(|entry| entry.batch.writes.len()).sum();
                let full = entries.len() - before >= ENTRIES_MAX || writes >= WRITES_MAX;
                let Some(consumer) = self.consumer.as_mut().filter(|_| !full) else {
                    break;
                };
                match consumer.try_next() {
                    Some(another) => next = another,
                    None => break,
                }
            }
            if entries.len() > before {
                self.shared.delivered.set(self.last.seq);
                return Ok(());
            }
        }
    }

    /// Creates a consumer. Fetches the next message while there is none yet, if deliveries keep
    /// failing, and for some seconds after an unreadable message. Does not await after it has added
    /// an entry, so dropping the future loses none.
    async fn reopen(&mut self, entries: &mut Vec<Entry>) -> Result<(), ReadError> {
        let fetches = self.fetches();
        let pending = match &mut self.pending {
            Some(pending) => pending,
            None => {
                self.backoff.pause().await;
                let mut pending = self.open().await?;
                if fetches {
                    pending.fetch_at = pending.began;
                }
                self.pending.insert(pending)
            }
        };
        let (connection, began) = (Arc::clone(&pending.connection), pending.began);
        if fetches {
            tokio::time::sleep_until(pending.fetch_at).await;
            pending.fetch_at = Instant::now() + FETCH_ALL_EVERY;
            return self.read_unreadable(&*connection, entries).await;
        }
        let created = tokio::select! {
            biased;
            created = &mut pending.consumer => created,
            () = tokio::time::sleep_until(pending.fetch_at) => {
                pending.fetch_at = Instant::now() + FETCH_EVERY;
                self.read_without_consumer(&*connection, entries).await?;
                return Ok(());
            }
        };
        self.pending = None;
        match created {
            Ok(consumer) => self.consumer = Some(consumer),
            Err(error) => {
                self.pending = Some(self.open_again(&error, began).await?);
                return Ok(());
            }
        }
        // A pending request to replace the consumer was about the previous one.
        let _ = self.shared.replace_consumer.notified().now_or_never();
        self.shared.counts.resumes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Whether messages are fetched although a consumer could be created.
    fn fetches(&self) -> bool {
        self.failures >= FAILURES_MAX || self.fetch_until.is_some()
    }

    /// Fetches the next message, which no consumer can deliver or which follows one that no
    /// consumer could. A consumer that is created later starts after it.
    async fn read_unreadable(
        &mut self,
        connection: &dyn BrokerConnection,
        entries: &mut Vec<Entry>,
    ) -> Result<(), ReadError> {
        match self.read_without_consumer(connection, entries).await? {
            FetchOutcome::Entry => {}
            // Deliveries did not fail because of a message.
            FetchOutcome::Nothing => self.failures = 0,
            // The connection may have ended. A consumer is tried before the next fetch.
            FetchOutcome::NoAnswer => {
                self.failures = self.failures.min(FAILURES_MAX - 1);
                self.pending = None;
            }
        }
        if self
            .fetch_until
            .is_some_and(|until| Instant::now() >= until)
        {
            self.fetch_until = None;
        }
        if !self.fetches() {
            // That consumer would deliver the unreadable message.
            self.pending
                .take_if(|pending| pending.from <= self.last.seq);
        }
        Ok(())
    }

    /// Fetches the next message while there is no consumer, if the stream has one. Compares the
    /// history first if that was some time ago: the stream may have been replaced meanwhile.
    async fn read_without_consumer(
        &mut self,
        connection: &dyn BrokerConnection,
        entries: &mut Vec<Entry>,
    ) -> Result<FetchOutcome, ReadError> {
        let is_due = |pending: &PendingConsumer| Instant::now() >= pending.compare_at;
        if self.pending.as_ref().is_none_or(is_due) {
            let HistoryCheck::Same = self.shared.compare(connection, &self.last).await? else {
                return Ok(FetchOutcome::NoAnswer);
            };
            if let Some(pending) = &mut self.pending {
                pending.compare_at = Instant::now() + FETCH_ALL_EVERY;
            }
        }
        let fetched = self.fetch_next(connection, entries).await?;
        if let (FetchOutcome::Entry, Some(pending)) = (&fetched, &mut self.pending) {
            pending.fetch_at = Instant::now();
        }
        Ok(fetched)
    }

    /// Tries again after an attempt that began at `began` and failed with `error`.
    async fn open_again(
        &mut self,
        error: &BrokerError,
        began: Instant,
    ) -> Result<PendingConsumer, ReadError> {
        self.log(error);
        self.backoff.pause_after(began).await;
        self.open().await
    }

    /// Logs why the stream can't be read, once.
    fn log(&mut self, error: &BrokerError) {
        let error = error.to_string();
        if self.problem.as_ref() != Some(&error) {
            tracing::warn!(error, "cannot read the stream, retrying");
        }
        self.problem = Some(error);
    }

    /// Fetches the message after the last one, if the stream has it, and decodes it by the rule for
    /// header blocks.
    async fn fetch_next(
        &mut self,
        connection: &dyn BrokerConnection,
        entries: &mut Vec<Entry>,
    ) -> Result<FetchOutcome, ReadError> {
        let seq = self.last.seq + 1;
        if self.shared.end.load(Ordering::Acquire) < seq {
            return Ok(FetchOutcome::Nothing);
        }
        let fetched = match connection.message(seq).await {
            Ok(Some(fetched)) => fetched,
            Ok(None) => {
                self.missing += 1;
                return Ok(FetchOutcome::Nothing);
            }
            Err(_) => return Ok(FetchOutcome::NoAnswer),
        };
        let headers = header_block::parse_optional(fetched.header_block.as_deref());
        let headers = headers.as_ref().map(Option::as_ref).map_err(|why| *why);
        if headers.is_err() {
            self.fetch_until = Some(Instant::now() + FETCH_FOR);
        }
        let payload = fetched.payload.into();
        entries.push(self.entry(seq, fetched.time_ns, headers, payload)?);
        Ok(FetchOutcome::Entry)
    }

    /// Adds the entry of `delivered`. A gap ends the consumer; a lasting gap, or a message that
    /// cannot be read, ends the subscription.
    fn accept(&mut self, delivered: Delivered, entries: &mut Vec<Entry>) {
        let (seq, wanted) = (delivered.seq, self.last.seq + 1);
        if seq < wanted {
            let redeliveries = &self.shared.counts.redeliveries;
            redeliveries.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if seq > wanted {
            self.failures += 1;
            // A message that is missing once may have been trimmed since the last comparison. The
            // next comparison reports that, so only a message that is missing again is a gap.
            match self.missing < MISSING_MAX {
                true => {
                    tracing::warn!(
                        expected_seq = wanted,
                        seq,
                        "gap in deliveries, recreating the consumer"
                    );
                    self.consumer = None;
                }
                false => self.ended = Some(ReadError::NotHeld { wanted }),
            }
            return;
        }
        let headers = Ok(delivered.headers.as_ref());
        match self.entry(seq, delivered.time_ns, headers, delivered.payload) {
            Ok(entry) => {
                self.problem = None;
                let end = seq + delivered.pending;
                self.shared.end.fetch_max(end, Ordering::AcqRel);
                entries.push(entry);
            }
            Err(error) => {
                self.ended = Some(error);
                self.consumer = None;
            }
        }
    }

    /// The entry of the next message, at `seq`. A message that is not a batch becomes an entry
    /// without writes, on all replicas.
    fn entry(
        &mut self,
        seq: Seq,
        stored_ns: u64,
        headers: Result<Option<&HeaderMap>, &'static str>,
        payload: Bytes,
    ) -> Result<Entry, ReadError> {
        let read = match headers {
            Ok(headers) => message::read(headers, &payload, &self.shared.in_flight),
            Err(why) => Err(Unreadable::Poisoned(why.into())),
        };
        let (position, batch, message) = match read {
            Ok((headers, batch)) => {
                // Before the first batch the time is the start of this process, which differs
                // between replicas.
                let previous_ns = match self.last.seq {
                    0 => 0,
                    _ => self.last.time_ns,
                };
                let time_ns = headers.time_at(previous_ns, stored_ns);
                if batch.ticket.is_some() {
                    self.shared.health.delivered(headers.id);
                }
                let message = headers.message(payload);
                (
                    self.last.next(time_ns, message.chain_entry()),
                    batch,
                    message,
                )
            }
            Err(Unreadable::Newer(format)) => {
                return Err(ReadError::NewerFormat { seq, format });
            }
            Err(Unreadable::Poisoned(why)) => {
                self.shared.counts.poisoned.fetch_add(1, Ordering::Relaxed);
                tracing::error!(seq, why, "skipped a message that is not a batch");
                let message = Message::Skipped;
                let position = self.last.next(stored_ns, message.chain_entry());
                (position, Batch::default(), message)
            }
        };
        self.last = position;
        self.failures = 0;
        self.missing = 0;
        // Batches also arrive while the stream is suspected of having lost others.
        if self.shared.same_history.get() {
            self.backoff.reset();
        }
        Ok(Entry {
            position,
            batch,
            message: self.shared.wal.is_some().then_some(message),
        })
    }

    /// Waits until the stream's history could be compared, then requests a consumer that starts
    /// after the last batch.
    async fn open(&mut self) -> Result<PendingConsumer, ReadError> {
        loop {
            let connection = self.shared.connection().await;
            let began = Instant::now();
            match self.shared.compare(&*connection, &self.last).await? {
                HistoryCheck::Same => {
                    let (creating, from) = (Arc::clone(&connection), self.last.seq + 1);
                    return Ok(PendingConsumer {
                        connection,
                        from,
                        consumer: async move { creating.consume(from).await }.boxed(),
                        began,
                        fetch_at: began + FETCH_EVERY,
                        compare_at: began + FETCH_EVERY,
                    });
                }
                HistoryCheck::Unknown(error) => self.log(&error),
            }
            tokio::time::sleep_until(began + ASK_EVERY).await;
        }
    }
}

impl Subscription for JetStreamSubscription {
    fn next<'a>(&'a mut self, entries: &'a mut Vec<Entry>) -> BoxFuture<'a, Result<(), ReadError>> {
        self.fill(entries).boxed()
    }
}
