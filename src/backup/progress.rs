//! What a reader reports: its progress, the rows and a summary.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use tokio::sync::watch;

use super::format::{EndRecord, HeadRecord};
use crate::grade::{Digest, FIELD_COUNT};
use crate::store::RecordBatch;

/// Consumes rows and returns the sum of their digests.
pub type RowSink<'a> = dyn Fn(&RecordBatch) -> Digest + Sync + 'a;

/// The progress of a reader. Other threads may read it meanwhile.
#[derive(Debug, Default)]
pub struct ReadProgress {
    rows: AtomicU64,
    bytes: AtomicU64,
    head: watch::Sender<Option<HeadRecord>>,
    /// One bit per field.
    fields: AtomicU32,
    line: AtomicU64,
}

impl ReadProgress {
    /// Rows passed to the sink.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    /// Bytes read.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// About how many rows the file has; 0 while unknown.
    #[must_use]
    pub fn rows_expected(&self) -> u64 {
        let head = self.head.borrow();
        head.as_ref().map_or(0, |head| head.rows_expected)
    }

    /// The seed of the shards in whose order the rows are; `None` while unknown.
    #[must_use]
    pub fn shard_seed(&self) -> Option<u64> {
        self.head.borrow().as_ref()?.shard_seed
    }

    /// Waits for the head record. Never resolves for a third-party file.
    pub async fn head(&self) -> HeadRecord {
        let mut heads = self.head.subscribe();
        loop {
            if let Some(head) = &*heads.borrow_and_update() {
                return head.clone();
            }
            // The sender is in `self`.
            let _ = heads.changed().await;
        }
    }

    /// Whether the file has a column for the field at `index` of [`FIELDS`](crate::grade::FIELDS);
    /// known before the first row.
    #[must_use]
    pub fn has_field(&self, index: usize) -> bool {
        index < FIELD_COUNT && self.fields.load(Ordering::Relaxed) >> index & 1 == 1
    }

    /// The line of the first row that the sink gets now; the header row is line 1. The other rows
    /// are on the lines after it. Only for the sink of [`read_in_order`](super::read_in_order).
    #[must_use]
    pub fn line(&self) -> u64 {
        self.line.load(Ordering::Relaxed)
    }

    pub(super) fn set_head(&self, head: HeadRecord) {
        self.head.send_replace(Some(head));
    }

    pub(super) fn set_fields(&self, fields: impl Iterator<Item = usize>) {
        let bits = fields.fold(0, |bits, index| bits | 1 << index);
        self.fields.store(bits, Ordering::Relaxed);
    }

    pub(super) fn set_line(&self, line: u64) {
        self.line.store(line, Ordering::Relaxed);
    }

    pub(super) fn set_bytes(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn add_rows(&self, rows: u64) {
        self.rows.fetch_add(rows, Ordering::Relaxed);
    }
}

/// The content of a complete backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// The head and end record; `None` for a third-party file.
    pub records: Option<(HeadRecord, EndRecord)>,
    /// The number of rows.
    pub rows: u64,
    /// The sum of the rows' digests.
    pub digest: Digest,
    /// The size of the file.
    pub bytes: u64,
}
