//! Checks whether the stream's history is the one that this replica has read.
//!
//! The stream's info is not a quorum read: a server that lost its routes returns outdated numbers,
//! and a server that starts may truncate the stream and restore it. So "shorter", "gone", "another
//! log" and "another batch" are only suspicions until they are confirmed: the stream's leader has
//! reported the same for [`CONFIRM_AFTER`](super::suspicion::CONFIRM_AFTER) (an isolated leader
//! steps down within 21 s), or the only server has rejected an append that was conditional on the
//! known end. Until then the replica keeps its state.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::time::Instant;

use super::broker::{BrokerConnection, BrokerError, InfoSource, Outgoing, RawMessage, StreamInfo};
use super::message::{self, Unreadable};
use super::probe::PROBE_EVERY;
use super::shared::JetStreamShared;
use super::{header_block, session, stream};
use crate::log::{Bounds, ChainEntry, InFlight, Position, ReadError, Seq};

/// The result of comparing the stream with a position.
pub(super) enum HistoryCheck {
    /// The stream's history includes the position.
    Same,
    /// The comparison is not possible now.
    Unknown(BrokerError),
}

impl JetStreamShared {
    /// Waits for a connection over which the stream was found to have the same history.
    pub(super) async fn connection_to_append(&self) -> Arc<dyn BrokerConnection> {
        loop {
            let connection = self.connection().await;
            if self.same_history.get() {
                return connection;
            }
            let same = self.same_history.wait_for(|same| same.then_some(()));
            if tokio::time::timeout(PROBE_EVERY, same).await.is_err() {
                // After a suspicion no other task may be checking whether it still holds.
                let _ = self.fetch_info(&*connection).await;
            }
        }
    }

    /// Compares the stream with `last`, the last batch that was read.
    ///
    /// # Errors
    /// The stream has trimmed the next batch, or a suspicion is confirmed.
    pub(super) async fn compare(
        &self,
        connection: &dyn BrokerConnection,
        last: &Position,
    ) -> Result<HistoryCheck, ReadError> {
        let info = match self.fetch_info(connection).await? {
            Ok(info) => info,
            Err(error) => return Ok(HistoryCheck::Unknown(error)),
        };
        if last.seq > info.last {
            let (end, applied) = (info.last, last.seq);
            let error = ReadError::Shorter { end, applied };
            return self.suspect(connection, &info.source, error).await;
        }
        let wanted = last.seq + 1;
        if wanted < info.first {
            let first = info.first;
            return Err(ReadError::Trimmed { first, wanted });
        }
        if last.seq >= info.first {
            match connection.message(last.seq).await {
                Ok(Some(stored)) if !is_batch_at(&stored, last) => {
                    let error = ReadError::Rewritten { seq: last.seq };
                    return self.suspect(connection, &info.source, error).await;
                }
                Ok(Some(_)) => self.verified.store(true, Ordering::Relaxed),
                // It was trimmed since, or is missing. Reading the next batch will show which.
                Ok(None) => {}
                Err(error) => return Ok(HistoryCheck::Unknown(error)),
            }
        }
        if last.seq == 0 {
            // There is nothing to compare.
            self.verified.store(true, Ordering::Relaxed);
        }
        let known = self.end.load(Ordering::Acquire);
        if info.last < known {
            // This replica has not read the missing batches. Nothing is appended in their place
            // until their loss is confirmed.
            let (end, applied) = (info.last, known);
            let error = ReadError::Shorter { end, applied };
            match self.suspect(connection, &info.source, error).await {
                Ok(unknown) => return Ok(unknown),
                Err(_confirmed) => self.end.store(end, Ordering::Release),
            }
        }
        self.suspicion.lock().clear();
        self.compared.store(true, Ordering::Release);
        self.same_history.set(true);
        Ok(HistoryCheck::Same)
    }

    /// Waits for the broker and returns the stream's bounds. An end below the known one is returned
    /// only once it is confirmed.
    pub(super) async fn bounds(&self) -> Result<Bounds, ReadError> {
        let mut backoff = session::backoff();
        loop {
            let connection = self.connection().await;
            let began = Instant::now();
            if let Ok(info) = self.fetch_info(&*connection).await? {
                let known = self.end.load(Ordering::Acquire);
                let (first, end) = (info.first, info.last);
                let error = ReadError::Shorter {
                    end,
                    applied: known,
                };
                if end >= known {
                    return Ok(Bounds { first, end });
                }
                match self.suspect(&*connection, &info.source, error).await {
                    Ok(_) => {}
                    Err(_confirmed) => {
                        self.end.store(end, Ordering::Release);
                        return Ok(Bounds { first, end });
                    }
                }
            }
            backoff.pause_after(began).await;
        }
    }

    /// Requests the stream's info and checks that the stream holds this log.
    pub(super) async fn fetch_info(
        &self,
        connection: &dyn BrokerConnection,
    ) -> Result<Result<StreamInfo, BrokerError>, ReadError> {
        let info = match connection.stream_info().await {
            Ok(info) => info,
            Err(BrokerError::NoStream) => {
                let error = ReadError::Gone {
                    stream: self.config.stream.as_str().into(),
                    id: self.id.clone(),
                };
                let source = match connection.is_clustered() {
                    true => InfoSource::Leader,
                    false => InfoSource::Unclustered,
                };
                self.suspect(connection, &source, error).await?;
                return Ok(Err(BrokerError::NoStream));
            }
            Err(error) => return Ok(Err(error)),
        };
        if let Some(is) = stream::log_id(&info.config).filter(|is| *is != self.id) {
            let was = self.id.clone();
            let error = ReadError::Replaced { was, is };
            let why = error.to_string();
            self.suspect(connection, &info.source, error).await?;
            return Ok(Err(BrokerError::Rejected(why.into())));
        }
        if let Err(error) = stream::check_running(&self.config, &info.config) {
            return Ok(Err(BrokerError::Rejected(error.to_string().into())));
        }
        self.first.fetch_max(info.first, Ordering::AcqRel);
        let known = self.end.fetch_max(info.last, Ordering::AcqRel);
        if info.last >= known && self.compared.load(Ordering::Acquire) {
            self.same_history.set(true);
        }
        Ok(Ok(info))
    }

    /// Handles an answer that contradicts this replica's history.
    ///
    /// # Errors
    /// `error`, once it is confirmed.
    async fn suspect(
        &self,
        connection: &dyn BrokerConnection,
        source: &InfoSource,
        error: ReadError,
    ) -> Result<HistoryCheck, ReadError> {
        self.same_history.set(false);
        let why: Arc<str> = error.to_string().into();
        let confirmed = match source {
            InfoSource::Follower => false,
            InfoSource::Leader => self.suspicion.lock().confirm(&error),
            // The only server has the only copy of a batch.
            InfoSource::Unclustered if matches!(error, ReadError::Rewritten { .. }) => true,
            InfoSource::Unclustered => {
                self.suspicion.lock().confirm(&error)
                    || match error {
                        ReadError::Shorter { applied, .. } => {
                            self.is_shorter(connection, applied).await
                        }
                        // Another log might accept the append.
                        _ => false,
                    }
            }
        };
        match confirmed {
            true => Err(error),
            false => {
                self.health.unreachable(Arc::clone(&why));
                Ok(HistoryCheck::Unknown(BrokerError::Rejected(why)))
            }
        }
    }

    /// Whether the broker rejects an append that is conditional on `end`, because the stream is
    /// shorter. If it accepts the append, the stream is complete and now ends with an empty batch.
    async fn is_shorter(&self, connection: &dyn BrokerConnection, end: Seq) -> bool {
        let id = self.next_batch_id();
        let empty = Outgoing {
            headers: message::headers(id),
            payload: Bytes::from_static(b"[]"),
            expected_last: Some(end),
        };
        match connection.publish(empty).await {
            Err(BrokerError::WrongLastSequence {
                end: Some(actual), ..
            }) => actual < end,
            Err(BrokerError::Rejected(why)) => {
                self.health.rejected(id, why);
                false
            }
            _ => false,
        }
    }
}

/// Whether `stored` is the batch at `position`.
fn is_batch_at(stored: &RawMessage, position: &Position) -> bool {
    let payload = stored.payload.as_slice();
    let read = header_block::parse_optional(stored.header_block.as_deref())
        .map_err(|why| Unreadable::Poisoned(why.into()))
        .and_then(|headers| message::read(headers.as_ref(), payload, &InFlight::default()));
    match read {
        Ok((headers, _)) => {
            let times = [Some(stored.time_ns), headers.time_ns];
            times.contains(&Some(position.time_ns))
                && position.matches(headers.chain_entry(payload))
        }
        // The time tells it from another skipped message in its place.
        Err(Unreadable::Poisoned(_)) => {
            stored.time_ns == position.time_ns && position.matches(ChainEntry::Skipped)
        }
        Err(Unreadable::Newer(_)) => false,
    }
}
