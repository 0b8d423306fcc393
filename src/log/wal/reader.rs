//! Reads the log: recent batches from memory, older ones from the disk.
//!
//! A reader takes the next batch from memory if it is there, which needs no decoding, and otherwise
//! from the disk. The writer never waits for a reader: a slow reader finds on the disk what it missed
//! in memory.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::segment::{HEADER_BYTES, RecordHeaders, path, read_at};
use super::{WalShared, format, record};
use crate::log::{Entry, Position, ReadError, Seq, Subscription};

/// Entries kept in memory: enough that a reader that keeps up never reads the disk.
const RECENT_MAX: usize = 8;
/// Bytes read from the disk at once; a larger record is read alone.
const READ_BYTES: usize = 256 * 1024;

/// The newest entries, without a gap.
#[derive(Default)]
pub(super) struct RecentEntries(VecDeque<Entry>);

impl RecentEntries {
    /// Adds the entry after the last.
    pub(super) fn push(&mut self, entry: Entry) {
        if self.0.len() == RECENT_MAX {
            self.0.pop_front();
        }
        self.0.push_back(entry);
    }

    /// Copies the entries after `last`. Returns `false` if the next one is not in memory.
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

/// A reader of the log.
pub(super) struct DiskSubscription {
    pub(super) shared: Arc<WalShared>,
    /// The last durable batch.
    pub(super) end: watch::Receiver<Seq>,
    /// The last batch that was returned.
    pub(super) last: Position,
    /// Where the last read from the disk ended.
    pub(super) cursor: Option<ReadCursor>,
}

/// A position in a segment, so that sequential reads open each file once and skip no records.
#[derive(Clone)]
pub(super) struct ReadCursor {
    file: Arc<File>,
    /// The segment's first batch.
    first: Seq,
    /// The batch whose record is at `at`.
    seq: Seq,
    at: u64,
}

impl DiskSubscription {
    async fn read_next(&mut self, entries: &mut Vec<Entry>) -> Result<(), ReadError> {
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

    /// Reads and decodes some entries from the disk, on a blocking thread.
    async fn read(&mut self, end: Seq) -> Result<Vec<Entry>, ReadError> {
        let (shared, last, cursor) = (Arc::clone(&self.shared), self.last, self.cursor.take());
        let read = tokio::task::spawn_blocking(move || shared.read(cursor, last, end));
        // The thread panicked, or the runtime is stopping.
        let (entries, cursor) = read.await.map_err(|_| ReadError::Closed)??;
        self.cursor = Some(cursor);
        Ok(entries)
    }
}

impl WalShared {
    /// Reads at least one entry after `last`, up to `end`. Continues at `cursor` if it can.
    fn read(
        &self,
        cursor: Option<ReadCursor>,
        last: Position,
        end: Seq,
    ) -> Result<(Vec<Entry>, ReadCursor), ReadError> {
        let wanted = last.seq + 1;
        let read = self.read_at_cursor(cursor, last, end);
        // A batch that was trimmed meanwhile is not damaged.
        match wanted < self.first.load(Ordering::Acquire) {
            true => Err(ReadError::NotHeld { wanted }),
            false => read,
        }
    }

    fn read_at_cursor(
        &self,
        cursor: Option<ReadCursor>,
        mut position: Position,
        end: Seq,
    ) -> Result<(Vec<Entry>, ReadCursor), ReadError> {
        let wanted = position.seq + 1;
        let failed = |error: io::Error| ReadError::Failed(error.to_string().into());
        let segment = self.segment_of(wanted);
        let (first, last) = segment.ok_or(ReadError::NotHeld { wanted })?;
        let mut cursor = match cursor {
            Some(cursor) if cursor.first == first && cursor.seq <= wanted => cursor,
            _ => ReadCursor {
                file: Arc::new(File::open(path(&self.dir, first)).map_err(failed)?),
                first,
                seq: first,
                at: HEADER_BYTES,
            },
        };
        let damaged = |why: &str| ReadError::damaged(wanted, why);
        let mut headers = RecordHeaders::of(&cursor.file);
        while cursor.seq < wanted {
            let header = headers.at(cursor.at).map_err(failed)?;
            let header = header.filter(|header| header.seq == cursor.seq);
            let header = header.ok_or_else(|| damaged("a record before it is damaged"))?;
            cursor.at += header.bytes_padded() as u64;
            cursor.seq += 1;
        }
        let mut bytes = Vec::new();
        read_at(&cursor.file, cursor.at, READ_BYTES, &mut bytes).map_err(failed)?;
        let header = record::RecordHeader::read(&bytes).filter(|header| header.seq == wanted);
        let header = header.ok_or_else(|| damaged("its record is missing"))?;
        if header.bytes() > bytes.len() {
            // A damaged length may be larger than the file.
            let rest = cursor
                .file
                .metadata()
                .map_err(failed)?
                .len()
                .saturating_sub(cursor.at);
            let wanted =
                usize::try_from(rest).map_or(header.bytes(), |rest| rest.min(header.bytes()));
            read_at(&cursor.file, cursor.at, wanted, &mut bytes).map_err(failed)?;
        }
        let (mut entries, mut rest) = (Vec::new(), bytes.as_slice());
        while cursor.seq <= end.min(last)
            && let Some(record) = record::read(rest)
            && record.seq == cursor.seq
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
            cursor.at += record.bytes as u64;
            cursor.seq += 1;
        }
        match entries.is_empty() {
            true => Err(damaged("its checksum does not match")),
            false => Ok((entries, cursor)),
        }
    }
}

impl Subscription for DiskSubscription {
    fn next<'a>(&'a mut self, entries: &'a mut Vec<Entry>) -> BoxFuture<'a, Result<(), ReadError>> {
        self.read_next(entries).boxed()
    }
}
