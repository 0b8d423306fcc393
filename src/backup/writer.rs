//! Writes backups in chunks, which several threads can make independently.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use xxhash_rust::xxh3::Xxh3Default;

use super::format::{EndRecord, HeadRecord};
use super::{member, row};
use crate::grade::{Digest, UserGrade};
use crate::log::Position;
use crate::store::{RecordBatch, Scan, Store};

/// A chunk ends when its text reaches this length: much more than the 32 KiB window of deflate, so
/// that chunks compress well; little compared with a store, so that a few in flight do not matter.
pub const CHUNK_TEXT_BYTES: usize = 256 * 1024;

const _: () = assert!(
    CHUNK_TEXT_BYTES + RecordBatch::RECORDS_MAX * row::ROW_BYTES_MAX <= member::TEXT_BYTES_MAX
);

/// libdeflate's level. Twice as fast as zlib-rs at the same size: ADR 0006.
const DEFLATE_LEVEL: i32 = 1;

/// Some rows as one gzip member.
pub struct Chunk {
    /// The bytes of the member.
    pub bytes: Vec<u8>,
    rows: u32,
    digest: Digest,
}

impl Chunk {
    /// The number of rows.
    #[must_use]
    pub fn rows(&self) -> u32 {
        self.rows
    }
}

/// Makes chunks from a store's records. Shared between the threads that make them.
pub struct ChunkSource {
    scan: Mutex<Scan>,
    store_only: AtomicBool,
    chunk_text_bytes: usize,
    /// Buffers for later chunks, one per thread.
    buffers: Mutex<Vec<ChunkBuffers>>,
}

struct ChunkBuffers {
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

    /// The same, with chunks of `chunk_text_bytes`, at most [`CHUNK_TEXT_BYTES`].
    #[must_use]
    pub fn with_chunk_text(store: &Store, chunk_text_bytes: usize) -> Self {
        Self {
            scan: Mutex::new(store.scan()),
            store_only: AtomicBool::new(false),
            chunk_text_bytes: chunk_text_bytes.min(CHUNK_TEXT_BYTES),
            buffers: Mutex::default(),
        }
    }

    /// Whether later chunks are stored without compression: about three times as large, and cheaper
    /// to make.
    pub fn store_only(&self, store_only: bool) {
        self.store_only.store(store_only, Ordering::Relaxed);
    }

    /// Makes the next chunk, which takes some milliseconds. Other threads may make the following
    /// ones meanwhile. `None` at the end of the scan.
    pub fn next(&self) -> Option<Chunk> {
        let reused = self.buffers.lock().pop();
        let mut buffers = reused.unwrap_or_else(|| ChunkBuffers::new(self.chunk_text_bytes));
        let ChunkBuffers {
            batch,
            text,
            deflate,
            store,
        } = &mut buffers;
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
            let compressor = match self.store_only.load(Ordering::Relaxed) {
                true => store,
                false => deflate,
            };
            member::write_rows(&mut bytes, text, rows, compressor);
            // The chunk may wait for a slow client, so free the unused capacity.
            bytes.shrink_to_fit();
        }
        self.buffers.lock().push(buffers);
        (rows > 0).then_some(Chunk {
            bytes,
            rows,
            digest,
        })
    }
}

impl ChunkBuffers {
    #[expect(clippy::expect_used, reason = "both levels are constants")]
    fn new(chunk_text_bytes: usize) -> Self {
        let compressor = |level| {
            let level = libdeflater::CompressionLvl::new(level);
            libdeflater::Compressor::new(level.expect("both levels are in the library's range"))
        };
        Self {
            // A chunk has whole batches, so a batch must not be larger than a chunk.
            batch: RecordBatch::with_max(chunk_text_bytes / row::ROW_BYTES_MIN),
            text: Vec::with_capacity(chunk_text_bytes * 5 / 4),
            deflate: compressor(DEFLATE_LEVEL),
            store: compressor(0),
        }
    }
}

/// Computes the end record of a backup from its members.
pub struct BackupWriter {
    rows: u64,
    digest: Digest,
    hash: Xxh3Default,
}

impl BackupWriter {
    /// Starts a backup. Returns the bytes of its first member.
    #[must_use]
    pub fn start(head: &HeadRecord) -> (Self, Vec<u8>) {
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

    /// Adds `chunk`, whose bytes follow in the file.
    pub fn add(&mut self, chunk: &Chunk) {
        self.rows += u64::from(chunk.rows);
        self.digest += chunk.digest;
        self.hash.update(&chunk.bytes);
    }

    /// The number of rows so far.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Ends the backup. Returns the bytes of its last member. `position` must be from after the
    /// scan.
    #[must_use]
    pub fn end(self, position: &Position) -> Vec<u8> {
        let end = EndRecord {
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
