//! The bytes of ids that no record has room for.

use super::record::Place;

/// Bytes a chunk.
const CHUNK: usize = 16 * 1024;

/// Ids one behind the other, with no header and no allocation of their own.
#[derive(Default)]
pub(super) struct LongIds {
    chunks: Vec<Vec<u8>>,
    /// Bytes that belong to nobody any more.
    dead: usize,
}

impl LongIds {
    #[expect(clippy::indexing_slicing, reason = "each place is from `push`")]
    pub(super) fn get(&self, place: Place) -> &[u8] {
        let at = usize::from(place.at);
        &self.chunks[place.chunk as usize][at..at + usize::from(place.len)]
    }

    pub(super) fn push(&mut self, id: &[u8]) -> Place {
        let fits = |chunk: &&mut Vec<u8>| chunk.len() + id.len() <= CHUNK;
        let at = match self.chunks.last_mut().filter(fits) {
            Some(chunk) => {
                let at = chunk.len();
                chunk.extend_from_slice(id);
                at
            }
            None => {
                // The first one grows with what it holds, so that a small store is small.
                let room = if self.chunks.is_empty() {
                    id.len()
                } else {
                    CHUNK
                };
                let mut chunk = Vec::with_capacity(room);
                chunk.extend_from_slice(id);
                self.chunks.push(chunk);
                0
            }
        };
        Place {
            chunk: (self.chunks.len() - 1) as u32,
            at: at as u16,
            len: id.len() as u16,
        }
    }

    /// Says that nobody has the id at `place` any more.
    pub(super) fn forget(&mut self, place: Place) {
        self.dead += usize::from(place.len);
    }

    /// Whether so much is dead that moving the rest is worth it.
    pub(super) fn is_mostly_dead(&self) -> bool {
        self.dead > CHUNK && self.dead > self.chunks.len() * CHUNK / 2
    }

    /// Bytes of ids, in use or not.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.chunks.iter().map(Vec::len).sum()
    }
}
