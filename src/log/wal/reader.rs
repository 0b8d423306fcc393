//! Reading: from the disk while far behind, from memory while close.
//!
//! There is no hand-over to get wrong. A reader knows the one batch it wants; when that is among
//! the few newest it comes from memory, undecoded, else from the disk. The thread that writes
//! never waits for a reader: what a slow one misses in memory is on the disk.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::segment::{HEADER_BYTES, Heads, path, read_at};
use super::{Shared, format, record};
use crate::log::{Entry, Position, ReadError, Seq, Subscription};

/// Entries kept in memory: enough that a reader that keeps up never goes to the disk.
const RECENT_MAX: usize = 8;
/// What is read off the disk at once; a record that is larger is read alone.
const PIECE_BYTES: usize = 256 * 1024;

/// The newest entries, without a gap.
#[derive(Default)]
pub(super) struct Recent(VecDeque<Entry>);

impl Recent {
    /// Adds the entry after the last.
    pub(super) fn push(&mut self, entry: Entry) {
        if self.0.len() == RECENT_MAX {
            self.0.pop_front();
        }
        self.0.push_back(entry);
    }

    /// Copies the entries after `last`; `false` if the next one is not here.
    fn copy(&self, last: &Position, out: &mut Vec<Entry>) -> Result<bool, ReadError> {
        let mut newer = self
            .0
            .iter()
            .skip_while(|e| e.position.seq <= last.seq)
            .peekable();
        let Some(next) = newer.peek().filter(|e| e.position.seq == last.seq + 1) else {
            return Ok(false);
        };
        if next.position.previous != last.chain {
            return Err(ReadError::Rewritten { seq: last.seq });
        }
        out.extend(newer.cloned());
        Ok(true)
    }
}

/// A reader's place.
pub(super) struct DiskSubscription {
    pub(super) shared: Arc<Shared>,
    /// The last durable batch.
    pub(super) end: watch::Receiver<Seq>,
    /// The batch that was given last.
    pub(super) last: Position,
    /// Where it last stopped reading the disk.
    pub(super) place: Option<Place>,
}

/// A place in a segment: reading from front to back opens each file once and looks for nothing.
#[derive(Clone)]
pub(super) struct Place {
    file: Arc<File>,
    /// The segment's first batch.
    first: Seq,
    /// The batch whose record begins at `at`.
    seq: Seq,
    at: u64,
}

impl DiskSubscription {
    async fn give(&mut self, entries: &mut Vec<Entry>) -> Result<(), ReadError> {
        let wanted = self.last.seq + 1;
        let ended = self.end.wait_for(|end| *end >= wanted).await;
        let end = *ended.map_err(|_closed| ReadError::Closed)?;
        if !self.shared.recent.lock().copy(&self.last, entries)? {
            entries.append(&mut self.read(end).await?);
        }
        if let Some(last) = entries.last() {
            self.last = last.position;
        }
        Ok(())
    }

    /// Reads and decodes a piece off the disk, on a thread that may block.
    async fn read(&mut self, end: Seq) -> Result<Vec<Entry>, ReadError> {
        let (shared, last, place) = (Arc::clone(&self.shared), self.last, self.place.take());
        let read = tokio::task::spawn_blocking(move || shared.read(place, last, end));
        // A thread that panicked, or a runtime that is going away.
        let (entries, place) = read.await.map_err(|_| ReadError::Closed)??;
        self.place = Some(place);
        Ok(entries)
    }
}

impl Shared {
    /// Some entries after `last`, `end` at most; at least one. `place` is where it was stopped.
    fn read(
        &self,
        place: Option<Place>,
        last: Position,
        end: Seq,
    ) -> Result<(Vec<Entry>, Place), ReadError> {
        let wanted = last.seq + 1;
        let read = self.read_piece(place, last, end);
        // What could not be read because it is forgotten by now was not damaged.
        match wanted < self.first.load(Ordering::Acquire) {
            true => Err(ReadError::NotHeld { wanted }),
            false => read,
        }
    }

    fn read_piece(
        &self,
        place: Option<Place>,
        mut position: Position,
        end: Seq,
    ) -> Result<(Vec<Entry>, Place), ReadError> {
        let wanted = position.seq + 1;
        let failed = |error: io::Error| ReadError::Failed(error.to_string().into());
        let segment = self.segment_of(wanted);
        let (first, last) = segment.ok_or(ReadError::NotHeld { wanted })?;
        let mut place = match place {
            Some(place) if place.first == first && place.seq <= wanted => place,
            _ => Place {
                file: Arc::new(File::open(path(&self.dir, first)).map_err(failed)?),
                first,
                seq: first,
                at: HEADER_BYTES,
            },
        };
        let damaged = |why: &str| ReadError::Damaged {
            seq: wanted,
            why: why.into(),
        };
        let mut heads = Heads::of(&place.file);
        while place.seq < wanted {
            let head = heads.at(place.at).map_err(failed)?;
            let head = head.filter(|head| head.seq == place.seq);
            let head = head.ok_or_else(|| damaged("the records before it do not lead to it"))?;
            place.at += head.bytes_padded() as u64;
            place.seq += 1;
        }
        let mut bytes = Vec::new();
        read_at(&place.file, place.at, PIECE_BYTES, &mut bytes).map_err(failed)?;
        let head = record::Head::read(&bytes).filter(|head| head.seq == wanted);
        let head = head.ok_or_else(|| damaged("it is missing"))?;
        if head.bytes() > bytes.len() {
            // A length that is damaged must not be believed.
            let rest = place
                .file
                .metadata()
                .map_err(failed)?
                .len()
                .saturating_sub(place.at);
            let wanted = usize::try_from(rest).map_or(head.bytes(), |rest| rest.min(head.bytes()));
            read_at(&place.file, place.at, wanted, &mut bytes).map_err(failed)?;
        }
        let (mut entries, mut rest) = (Vec::new(), bytes.as_slice());
        while place.seq <= end.min(last)
            && let Some(record) = record::read(rest)
            && record.seq == place.seq
        {
            match format::read(&position, record.value) {
                Ok(entry) => {
                    position = entry.position;
                    entries.push(entry);
                }
                Err(error) if entries.is_empty() => return Err(error),
                Err(_) => break,
            }
            rest = rest.get(record.bytes..).unwrap_or_default();
            place.at += record.bytes as u64;
            place.seq += 1;
        }
        match entries.is_empty() {
            true => Err(damaged("its checksum is not that of what was written")),
            false => Ok((entries, place)),
        }
    }
}

impl Subscription for DiskSubscription {
    fn next<'a>(&'a mut self, entries: &'a mut Vec<Entry>) -> BoxFuture<'a, Result<(), ReadError>> {
        self.give(entries).boxed()
    }
}
