//! Items under numbers, in chunks, so that growing moves nothing.

/// Items a chunk.
const CHUNK: usize = 128;

/// Items that keep their number, and numbers that are given again.
pub(super) struct Slab<T> {
    chunks: Vec<Vec<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            chunks: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slab<T> {
    /// One more than the largest number ever given.
    pub(super) fn end(&self) -> usize {
        let last = self.chunks.last().map_or(0, Vec::len);
        self.chunks.len().saturating_sub(1) * CHUNK + last
    }

    /// How many items there are.
    pub(super) fn len(&self) -> usize {
        self.end() - self.free.len()
    }

    pub(super) fn get(&self, number: u32) -> Option<&T> {
        let number = number as usize;
        self.chunks.get(number / CHUNK)?.get(number % CHUNK)
    }

    pub(super) fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        let number = number as usize;
        self.chunks.get_mut(number / CHUNK)?.get_mut(number % CHUNK)
    }

    /// All items, and what is left where one was removed.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.chunks.iter_mut().flatten()
    }

    /// Adds `item`; its number.
    pub(super) fn insert(&mut self, item: T) -> u32 {
        while let Some(number) = self.free.pop() {
            if let Some(room) = self.get_mut(number) {
                *room = item;
                return number;
            }
        }
        // 2^32 items in a shard would be a store of 4 * 10^12: memory ends long before.
        let number = self.end() as u32;
        match self.chunks.last_mut() {
            Some(chunk) if chunk.len() < CHUNK => chunk.push(item),
            // The first one grows with what it holds, so that a small store is small.
            None => self.chunks.push(vec![item]),
            Some(_) => {
                let mut chunk = Vec::with_capacity(CHUNK);
                chunk.push(item);
                self.chunks.push(chunk);
            }
        }
        number
    }

    /// Gives `number` free for another item; what is there stays until then.
    pub(super) fn remove(&mut self, number: u32) {
        self.free.push(number);
    }
}
