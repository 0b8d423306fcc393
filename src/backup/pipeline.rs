//! Makes chunks on other threads, a bounded number at a time.
//!
//! The one scheduler for all that send a whole store somewhere: a snapshot to its file, a backup to
//! its client.

use std::io;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};

use super::{Chunk, ChunkSource};
use crate::sys::exec::Blocking;

/// The chunks of one scan, in the order in which they are finished.
///
/// New chunks start only within [`next`](Self::next), so a slow consumer bounds the memory: at most
/// the chunks in flight and the one that it has. Dropping the pipeline drops the chunks in flight
/// once they are finished.
pub struct ChunkPipeline {
    source: Arc<ChunkSource>,
    pool: Blocking,
    in_flight: FuturesUnordered<BoxFuture<'static, io::Result<Option<Chunk>>>>,
    /// Whether the scan has ended.
    exhausted: bool,
}

impl ChunkPipeline {
    /// A pipeline that runs `source` on the threads of `pool`.
    #[must_use]
    pub fn new(source: ChunkSource, pool: Blocking) -> Self {
        Self {
            source: Arc::new(source),
            pool,
            in_flight: FuturesUnordered::new(),
            exhausted: false,
        }
    }

    /// See [`ChunkSource::store_only`].
    pub fn store_only(&self, store_only: bool) {
        self.source.store_only(store_only);
    }

    /// Starts chunks until `in_flight_max` are in flight, and waits for one of them. `None` after
    /// the last chunk.
    ///
    /// # Errors
    /// Making a chunk panicked, or the runtime is stopping. There are no more chunks then.
    pub async fn next(&mut self, in_flight_max: usize) -> io::Result<Option<Chunk>> {
        while !self.exhausted && self.in_flight.len() < in_flight_max {
            let source = Arc::clone(&self.source);
            let chunk = self.pool.run(move || source.next());
            self.in_flight.push(chunk.boxed());
        }
        while let Some(finished) = self.in_flight.next().await {
            match finished {
                Ok(Some(chunk)) => return Ok(Some(chunk)),
                // Other threads may still be making the last chunks.
                Ok(None) => self.exhausted = true,
                Err(error) => {
                    self.exhausted = true;
                    self.in_flight.clear();
                    return Err(error);
                }
            }
        }
        Ok(None)
    }
}
