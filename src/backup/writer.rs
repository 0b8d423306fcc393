//! Writes backups, chunk by chunk: several may be in work at once, and none knows the others.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use xxhash_rust::xxh3::Xxh3Default;

use super::{End, Head, member, row};
use crate::grade::{Digest, UserGrade};
use crate::log::Position;
use crate::store::{RecordBatch, Scan, Store};

/// A chunk is cut when its text has reached this: large enough that the 32 KiB window of deflate is
/// warm for most of it, small enough that a few in work are nothing beside a store.
pub const CHUNK_TEXT_BYTES: usize = 256 * 1024;

const _: () = assert!(
    CHUNK_TEXT_BYTES + RecordBatch::RECORDS_MAX * row::ROW_BYTES_MAX <= member::TEXT_BYTES_MAX
);

/// libdeflate's level. It makes smaller files than `pigz -1` at twice the speed of one of its threads;
/// zlib-rs makes files of this size in twice the time. See ADR 0006.
const DEFLATE_LEVEL: i32 = 1;

/// Some rows as one gzip member.
pub struct Chunk {
    /// The member.
    pub bytes: Vec<u8>,
    rows: u32,
    digest: Digest,
}

impl Chunk {
    /// How many rows.
    #[must_use]
    pub fn rows(&self) -> u32 {
        self.rows
    }
}

/// Turns a store's records into chunks. Shared between the threads that do the work.
pub struct ChunkSource {
    scan: Mutex<Scan>,
    stored: AtomicBool,
    chunk_text_bytes: usize,
    /// What a chunk is made with, kept for the next one.
    tools: Mutex<Vec<Tools>>,
}

struct Tools {
    batch: RecordBatch,
    text: Vec<u8>,
    deflate: libdeflater::Compressor,
    store: libdeflater::Compressor,
}

impl ChunkSource {
    /// Starts a scan over `store`.
    #[must_use]
    pub fn new(store: &Store) -> Self {
        Self::with_chunk_text(store, CHUNK_TEXT_BYTES)
    }

    /// With chunks cut at `chunk_text_bytes`; more than [`CHUNK_TEXT_BYTES`] has no effect.
    #[must_use]
    pub fn with_chunk_text(store: &Store, chunk_text_bytes: usize) -> Self {
        Self {
            scan: Mutex::new(store.scan()),
            stored: AtomicBool::new(false),
            chunk_text_bytes: chunk_text_bytes.min(CHUNK_TEXT_BYTES),
            tools: Mutex::default(),
        }
    }

    /// Whether the chunks that are begun from now on are stored as they are: about three times as
    /// large, and cheaper to make.
    pub fn store_only(&self, stored: bool) {
        self.stored.store(stored, Ordering::Relaxed);
    }

    /// Makes the next chunk: some milliseconds of work, during which others may make the ones
    /// after it. `None` when all records have been handed out.
    pub fn next(&self) -> Option<Chunk> {
        let kept = self.tools.lock().pop();
        let mut tools = kept.unwrap_or_else(|| Tools::new(self.chunk_text_bytes));
        let Tools {
            batch,
            text,
            deflate,
            store,
        } = &mut tools;
        text.clear();
        let mut rows = 0;
        let mut digest = Digest::default();
        while text.len() < self.chunk_text_bytes && self.scan.lock().next_into(batch) {
            for (user_id, values) in batch.iter() {
                row::write(user_id, values, text);
                let values = *values;
                digest += UserGrade { user_id, values }.digest();
                rows += 1;
            }
        }
        let mut bytes = Vec::new();
        if rows > 0 {
            let compressor = match self.stored.load(Ordering::Relaxed) {
                true => store,
                false => deflate,
            };
            member::write_rows(&mut bytes, text, rows, compressor);
            // It may wait for a slow client: give back the room that compression did not need.
            bytes.shrink_to_fit();
        }
        self.tools.lock().push(tools);
        (rows > 0).then_some(Chunk {
            bytes,
            rows,
            digest,
        })
    }
}

impl Tools {
    #[expect(clippy::expect_used, reason = "both levels are constants")]
    fn new(chunk_text_bytes: usize) -> Self {
        let compressor = |level| {
            let level = libdeflater::CompressionLvl::new(level);
            libdeflater::Compressor::new(level.expect("both levels are in the library's range"))
        };
        Self {
            // A batch is taken whole: one that holds more than a chunk would make it larger.
            batch: RecordBatch::with_max(chunk_text_bytes / row::ROW_BYTES_MIN),
            text: Vec::with_capacity(chunk_text_bytes * 5 / 4),
            deflate: compressor(DEFLATE_LEVEL),
            store: compressor(0),
        }
    }
}

/// Counts what a backup is made of and closes it with the end record.
pub struct BackupWriter {
    rows: u64,
    digest: Digest,
    hash: Xxh3Default,
}

impl BackupWriter {
    /// Begins a backup; the bytes are its first member.
    #[must_use]
    pub fn begin(head: &Head) -> (Self, Vec<u8>) {
        let mut header_row = Vec::new();
        row::write_header(&mut header_row);
        let mut bytes = Vec::new();
        member::write_head(&mut bytes, head, &header_row);
        let mut hash = Xxh3Default::new();
        hash.update(&bytes);
        let writer = Self {
            rows: 0,
            digest: Digest::default(),
            hash,
        };
        (writer, bytes)
    }

    /// Counts `chunk`, whose bytes come next in the file.
    pub fn add(&mut self, chunk: &Chunk) {
        self.rows += u64::from(chunk.rows);
        self.digest += chunk.digest;
        self.hash.update(&chunk.bytes);
    }

    /// Rows so far.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Ends the backup; the bytes are its last member. `position` was taken after the last row was
    /// read.
    #[must_use]
    pub fn end(self, position: &Position) -> Vec<u8> {
        let end = End {
            position: position.seq,
            chain: position.chain,
            rows: self.rows,
            digest: self.digest.to_string(),
            checksum: format!("{:032x}", self.hash.digest128()),
        };
        let mut bytes = Vec::new();
        member::write_end(&mut bytes, &end);
        bytes
    }
}
