//! Reads a run of a replica's WAL. All calls block.

use std::fs::File;
use std::sync::Arc;

use parking_lot::Mutex;

use super::super::segment::{self, HEADER_BYTES};
use super::super::{format, record};
use super::WalConfig;
use super::files::{SegmentInfo, WalFiles};
use crate::log::{Entry, Position, ReadError};

/// A call returns at most this many entries, and no more after this many writes.
const ENTRIES_MAX: usize = 64;
const WRITES_MAX: usize = 1024;

/// Reads the newest run up to the end that it had when it was last looked up.
pub(in crate::log) struct WalReader {
    config: WalConfig,
    files: Arc<Mutex<WalFiles>>,
    /// The last entry that was returned.
    last: Position,
    /// The content of the segment that is being read, and the offset of the next record.
    bytes: Vec<u8>,
    at: usize,
}

impl WalReader {
    /// A reader of the entries after `after`; `None` if the WAL does not have the next one, or has
    /// another history.
    pub(super) fn after(
        config: WalConfig,
        files: Arc<Mutex<WalFiles>>,
        after: &Position,
    ) -> Option<Self> {
        let segment = {
            let files = files.lock();
            let next = files
                .segments
                .partition_point(|segment| segment.start.seq <= after.seq);
            let segment = *files.segments.get(next.checked_sub(1)?)?;
            (files.last?.seq > after.seq).then_some(segment)?
        };
        let mut reader = Self {
            config,
            files,
            last: segment.start,
            bytes: Vec::new(),
            at: 0,
        };
        reader.load(&segment).ok()?;
        while reader.last.seq < after.seq {
            reader.last = reader.step(format::position).ok()??;
        }
        reader.last.is_same(after).then_some(reader)
    }

    /// The next entries; none at the end of the run. A record that cannot be read also ends it.
    pub(in crate::log) fn next(&mut self) -> Vec<Entry> {
        let (mut entries, mut writes) = (Vec::new(), 0);
        while entries.len() < ENTRIES_MAX && writes < WRITES_MAX {
            match self.step(format::read) {
                Ok(Some(entry)) => {
                    self.last = entry.position;
                    writes += entry.batch.writes.len();
                    entries.push(entry);
                }
                Ok(None) => match self.next_segment() {
                    Some(segment) if self.load(&segment).is_ok() => {}
                    _ => break,
                },
                // The stream has the batch, or reports what is wrong with it.
                Err(_) => {
                    let seq = self.last.seq + 1;
                    tracing::warn!(
                        seq,
                        "the WAL ends before a damaged record; reading the stream"
                    );
                    break;
                }
            }
        }
        entries
    }

    /// Reads the next record of this segment with `read`; `None` at its end.
    fn step<T>(
        &mut self,
        read: impl FnOnce(&Position, &[u8]) -> Result<T, ReadError>,
    ) -> Result<Option<T>, ReadError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(None);
        }
        let record = record::read(rest).filter(|record| record.seq == self.last.seq + 1);
        let record = record.ok_or_else(|| super::files::damaged(&self.last))?;
        let read = read(&self.last, record.value)?;
        self.at += record.bytes;
        Ok(Some(read))
    }

    /// The segment that continues at the last entry.
    fn next_segment(&self) -> Option<SegmentInfo> {
        let files = self.files.lock();
        let continues = |segment: &&SegmentInfo| {
            segment.continues && segment.start.is_same(&self.last) && segment.bytes > HEADER_BYTES
        };
        files.segments.iter().find(continues).copied()
    }

    /// Reads the written part of `segment`.
    fn load(&mut self, segment: &SegmentInfo) -> std::io::Result<()> {
        let file = File::open(segment::path(&self.config.dir, segment.start.seq + 1))?;
        let written = segment.bytes.saturating_sub(HEADER_BYTES) as usize;
        segment::read_at(&file, HEADER_BYTES, written, &mut self.bytes)?;
        self.at = 0;
        Ok(())
    }
}
