//! Drives the appends that the log has not finished.

use std::future::{self, Future};
use std::pin::pin;
use std::task::Poll;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;

use crate::log::{AppendError, InFlight, Ticket};

/// The appends that the log has not finished.
pub(super) struct PendingAppends<'a> {
    pending: FuturesUnordered<BoxFuture<'a, (Ticket, Result<(), AppendError>)>>,
    in_flight: InFlight,
    /// Whether the last one failed: consecutive failures are logged once.
    failing: bool,
}

impl<'a> PendingAppends<'a> {
    pub(super) fn new(in_flight: &InFlight) -> Self {
        Self {
            pending: FuturesUnordered::new(),
            in_flight: in_flight.clone(),
            failing: false,
        }
    }

    /// Starts an append. The first poll, here, assigns its position before any later append. Most
    /// logs also finish it then.
    pub(super) async fn begin(
        &mut self,
        ticket: Ticket,
        mut append: BoxFuture<'a, Result<(), AppendError>>,
    ) {
        let polled = future::poll_fn(|context| Poll::Ready(append.as_mut().poll(context))).await;
        match polled {
            Poll::Ready(result) => self.finish(ticket, result),
            Poll::Pending => {
                let append = async move { (ticket, append.await) };
                self.pending.push(Box::pin(append));
            }
        }
    }

    /// Waits for `wait` and polls the appends meanwhile.
    pub(super) async fn drive_while<T>(&mut self, wait: impl Future<Output = T>) -> T {
        let mut wait = pin!(wait);
        // Skipped for a log that finishes its appends at once.
        while !self.pending.is_empty() {
            tokio::select! {
                biased;
                Some((ticket, result)) = self.pending.next() => self.finish(ticket, result),
                waited = &mut wait => return waited,
            }
        }
        wait.await
    }

    /// Answers the requests of a batch whose append failed or has an unknown outcome. Other batches
    /// are answered when they are applied.
    fn finish(&mut self, ticket: Ticket, result: Result<(), AppendError>) {
        match &result {
            Err(error) if !self.failing => {
                tracing::error!(%error, "cannot append a batch to the log")
            }
            Ok(()) if self.failing => tracing::info!("the log accepts batches again"),
            _ => {}
        }
        self.failing = result.is_err();
        if let Err(error) = result
            && let Some(batch) = self.in_flight.take(ticket)
        {
            batch.answer(&Err(error));
        }
    }
}
