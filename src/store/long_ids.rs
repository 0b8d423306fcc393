//! The bytes of ids that do not fit into a record.

use super::record::LongIdLocation;

const CHUNK_BYTES: usize = 16 * 1024;

/// An arena of ids, without a header or an allocation per id.
#[derive(Default)]
pub(super) struct LongIds {
    chunks: Vec<Vec<u8>>,
    /// Bytes of released ids.
    dead_bytes: usize,
}

impl LongIds {
    #[expect(clippy::indexing_slicing, reason = "each location is from `push`")]
    pub(super) fn get(&self, location: LongIdLocation) -> &[u8] {
        let at = usize::from(location.at);
        &self.chunks[location.chunk as usize][at..at + usize::from(location.len)]
    }

    pub(super) fn push(&mut self, id: &[u8]) -> LongIdLocation {
        let fits = |chunk: &&mut Vec<u8>| chunk.len() + id.len() <= CHUNK_BYTES;
        let at = match self.chunks.last_mut().filter(fits) {
            Some(chunk) => {
                let at = chunk.len();
                chunk.extend_from_slice(id);
                at
            }
            None => {
                // The first chunk grows with its content, so that a small store stays small.
                let capacity = if self.chunks.is_empty() {
                    id.len()
                } else {
                    CHUNK_BYTES
                };
                let mut chunk = Vec::with_capacity(capacity);
                chunk.extend_from_slice(id);
                self.chunks.push(chunk);
                0
            }
        };
        LongIdLocation {
            chunk: (self.chunks.len() - 1) as u32,
            at: at as u16,
            len: id.len() as u16,
        }
    }

    /// Releases the id at `location`. Its bytes stay until the ids are compacted.
    pub(super) fn release(&mut self, location: LongIdLocation) {
        self.dead_bytes += usize::from(location.len);
    }

    /// Whether more than half of the arena, and more than a chunk, is dead.
    pub(super) fn should_compact(&self) -> bool {
        self.dead_bytes > CHUNK_BYTES && self.dead_bytes > self.chunks.len() * CHUNK_BYTES / 2
    }

    /// Bytes of ids, including released ones.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.chunks.iter().map(Vec::len).sum()
    }
}
