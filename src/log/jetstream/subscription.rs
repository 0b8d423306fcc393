//! Reading the stream, batch after batch, whatever happens to connection and consumer.
//!
//! Before each new consumer the stream is compared with what was read: whether it is the same log,
//! reaches as far, and holds the same batch at the last position. No single answer is final there, see
//! [`history`](super::history).
//!
//! A message can be such that the client cannot read it: the connection ends, or the message does not
//! come. When that happens twice at one position, the message is fetched as raw bytes and judged by
//! the [rule for header blocks](super::header_block), by all replicas alike.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::HeaderMap;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::broker::{BrokerError, Connection, Consumer, Delivered};
use super::history::Verdict;
use super::message::{self, Unreadable};
use super::session::Backoff;
use super::{Shared, header_block};
use crate::log::{Batch, Effect, Entry, Position, ReadError, Seq, Subscription};

/// Entries handed out at once, or so many writes and the rest of a batch: all are decoded in one
/// turn.
const ENTRIES_MAX: usize = 16;
const WRITES_MAX: usize = 1024;
/// A consumer that delivers nothing for so long although the stream goes on is replaced.
const SILENCE_MAX: Duration = Duration::from_secs(1);
/// So often a delivery may fail at one position before the message is fetched instead.
const FAILURES_MAX: u32 = 2;

/// A reader's place.
pub(super) struct JetStreamSubscription {
    shared: Arc<Shared>,
    /// The last batch that was handed out.
    last: Position,
    source: Option<Source>,
    backoff: Backoff,
    /// How often the source has ended since the last delivery.
    failures: u32,
    /// Whether a later batch came in place of the next one since the last delivery.
    gap: bool,
    /// Whether the source delivered nothing although the stream goes on.
    silent: bool,
    /// Why nothing comes any more; returned once what came before has been handed out.
    ended: Option<ReadError>,
}

struct Source {
    connection: Arc<dyn Connection>,
    consumer: Box<dyn Consumer>,
}

impl JetStreamSubscription {
    /// Starts after `last`.
    pub(super) async fn start(shared: Arc<Shared>, last: Position) -> Result<Self, ReadError> {
        let mut this = Self {
            shared,
            last,
            source: None,
            backoff: Backoff::new(),
            failures: 0,
            gap: false,
            silent: false,
            ended: None,
        };
        this.source = Some(this.open().await?);
        Ok(this)
    }

    async fn fill(&mut self, entries: &mut Vec<Entry>) -> Result<(), ReadError> {
        let before = entries.len();
        loop {
            if let Some(error) = &self.ended {
                return Err(error.clone());
            }
            let Some(source) = &mut self.source else {
                self.reopen(entries).await?;
                if entries.len() > before {
                    self.shared.delivered.set(self.last.seq);
                    return Ok(());
                }
                continue;
            };
            let mut next = tokio::select! {
                biased;
                next = source.consumer.next() => next,
                () = self.shared.replace_consumer.notified() => {
                    tracing::debug!("consumer delivers nothing, replacing it");
                    self.source = None;
                    continue;
                }
                () = tokio::time::sleep(SILENCE_MAX) => {
                    // The client passes over some messages silently. At the stream's end no later
                    // one would show it.
                    if self.shared.end.load(Ordering::Acquire) > self.last.seq {
                        self.silent = true;
                        self.source = None;
                    }
                    continue;
                }
            };
            // From here on nothing waits, so nothing that was taken can be dropped.
            loop {
                match next {
                    Ok(delivered) => self.take(delivered, entries),
                    Err(error) => {
                        tracing::debug!(%error, "consumer ended");
                        self.source = None;
                        self.failures += 1;
                    }
                }
                let given = entries.iter().skip(before);
                let writes: usize = given.map(|entry| entry.batch.writes.len()).sum();
                let full = entries.len() - before >= ENTRIES_MAX || writes >= WRITES_MAX;
                let Some(source) = self.source.as_mut().filter(|_| !full) else {
                    break;
                };
                match source.consumer.try_next() {
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

    /// A new source; or, where deliveries fail again and again, the next message itself.
    async fn reopen(&mut self, entries: &mut Vec<Entry>) -> Result<(), ReadError> {
        self.backoff.pause().await;
        let source = self.open().await?;
        // A request from before it is about the consumer before it.
        let _ = self.shared.replace_consumer.notified().now_or_never();
        let failed = self.failures >= FAILURES_MAX;
        if failed || std::mem::take(&mut self.silent) {
            self.fetch_next(&*source.connection, failed, entries)
                .await?;
        }
        self.source = Some(source);
        self.shared.counts.resumes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Fetches the message after the last one, if the stream has it, and judges it by the rule. One
    /// that can be read is left to the consumer, unless its deliveries have `failed`.
    async fn fetch_next(
        &mut self,
        connection: &dyn Connection,
        failed: bool,
        entries: &mut Vec<Entry>,
    ) -> Result<(), ReadError> {
        let seq = self.last.seq + 1;
        let fetched = match connection.message(seq).await {
            Ok(Some(fetched)) => fetched,
            // There is none, or no answer: the consumer is to deliver it.
            Ok(None) | Err(_) => return Ok(()),
        };
        let headers = header_block::parse_optional(fetched.header_block.as_deref());
        let headers = headers.as_ref().map(Option::as_ref).map_err(|why| *why);
        if headers.is_ok() && !failed {
            return Ok(());
        }
        entries.push(self.entry(seq, fetched.time_ns, headers, &fetched.payload)?);
        Ok(())
    }

    /// Adds what `delivered` holds; or ends the source, or reading.
    fn take(&mut self, delivered: Delivered, entries: &mut Vec<Entry>) {
        let (seq, wanted) = (delivered.seq, self.last.seq + 1);
        if seq < wanted {
            let redeliveries = &self.shared.counts.redeliveries;
            redeliveries.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if seq > wanted {
            self.failures += 1;
            self.shared.counts.gaps.fetch_add(1, Ordering::Relaxed);
            // The stream may have trimmed the batch since it was compared: the next comparison says
            // so. A gap that stays after the message was fetched is the caller's to handle.
            let stays = std::mem::replace(&mut self.gap, true) && self.failures > FAILURES_MAX;
            match stays {
                true => self.ended = Some(ReadError::NotHeld { wanted }),
                false => {
                    tracing::warn!(wanted, got = seq, "gap in deliveries, reading again");
                    self.source = None;
                }
            }
            return;
        }
        let headers = Ok(delivered.headers.as_ref());
        match self.entry(seq, delivered.time_ns, headers, &delivered.payload) {
            Ok(entry) => {
                let end = seq + delivered.pending;
                self.shared.end.fetch_max(end, Ordering::AcqRel);
                entries.push(entry);
            }
            Err(error) => {
                self.ended = Some(error);
                self.source = None;
            }
        }
    }

    /// The entry of the message at `seq`, the next one. A message that is no batch is skipped, by
    /// all replicas alike.
    fn entry(
        &mut self,
        seq: Seq,
        stored_ns: u64,
        headers: Result<Option<&HeaderMap>, &'static str>,
        payload: &[u8],
    ) -> Result<Entry, ReadError> {
        let read = match headers {
            Ok(headers) => message::read(headers, payload, &self.shared.in_flight),
            Err(why) => Err(Unreadable::Poisoned(why.into())),
        };
        let (position, batch) = match read {
            Ok((label, batch)) => {
                // Before the first batch the time is that of the process, and not the same for all.
                let previous_ns = match self.last.seq {
                    0 => 0,
                    _ => self.last.time_ns,
                };
                let time_ns = label.time_at(previous_ns, stored_ns);
                let (id, ticket) = (label.id, batch.ticket);
                if ticket.is_some() {
                    self.shared.health.delivered();
                }
                (
                    self.last.next(time_ns, Effect::Batch { id, payload }),
                    batch,
                )
            }
            Err(Unreadable::Newer(format)) => {
                return Err(ReadError::NewerFormat { seq, format });
            }
            Err(Unreadable::Poisoned(why)) => {
                self.shared.counts.poisoned.fetch_add(1, Ordering::Relaxed);
                tracing::error!(seq, why, "skipped a message that is no batch");
                (self.last.next(stored_ns, Effect::Skipped), Batch::default())
            }
        };
        self.last = position;
        self.failures = 0;
        self.gap = false;
        // Batches also arrive while the stream is suspected of having lost others.
        if self.shared.same_history.get() {
            self.backoff.reset();
        }
        Ok(Entry { position, batch })
    }

    /// A consumer that starts after the last batch; waits for the broker.
    async fn open(&mut self) -> Result<Source, ReadError> {
        let mut problem = None;
        loop {
            let connection = self.shared.connection().await;
            let opened = try_open(&self.shared, &connection, self.last).await?;
            match opened {
                Ok(consumer) => {
                    return Ok(Source {
                        connection,
                        consumer,
                    });
                }
                Err(error) => {
                    let error = error.to_string();
                    if problem.as_ref() != Some(&error) {
                        tracing::warn!(error, "cannot read the stream, trying again");
                    }
                    problem = Some(error);
                }
            }
            self.backoff.pause().await;
        }
    }
}

/// The inner error may pass, the outer one does not.
async fn try_open(
    shared: &Shared,
    connection: &Arc<dyn Connection>,
    last: Position,
) -> Result<Result<Box<dyn Consumer>, BrokerError>, ReadError> {
    match shared.compare(&**connection, &last).await? {
        Verdict::Same => Ok(connection.consume(last.seq + 1).await),
        Verdict::Unknown(error) => Ok(Err(error)),
    }
}

impl Subscription for JetStreamSubscription {
    fn next<'a>(&'a mut self, entries: &'a mut Vec<Entry>) -> BoxFuture<'a, Result<(), ReadError>> {
        self.fill(entries).boxed()
    }
}
