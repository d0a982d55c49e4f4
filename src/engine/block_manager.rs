//! Which KV blocks are free.

/// Hands out and takes back block numbers `0..num_blocks`. Host-only; knows nothing of their contents.
#[derive(Debug)]
pub struct BlockManager {
    free: Vec<u32>,
    total: usize,
}

impl BlockManager {
    /// All of `num_blocks` free.
    pub fn new(num_blocks: usize) -> BlockManager {
        BlockManager { free: (0..num_blocks as u32).rev().collect(), total: num_blocks }
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Blocks that nobody owns.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// `count` blocks, or `None` (and none taken) when there are fewer.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<u32>> {
        let rest = self.free.len().checked_sub(count)?;
        Some(self.free.split_off(rest).into_iter().rev().collect())
    }

    /// Takes blocks back.
    pub fn free(&mut self, blocks: Vec<u32>) {
        self.free.extend(blocks.into_iter().rev());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_or_nothing() {
        let mut m = BlockManager::new(3);
        assert_eq!(m.allocate(2), Some(vec![0, 1]));
        assert_eq!(m.allocate(2), None);
        assert_eq!(m.num_free(), 1);
        m.free(vec![0, 1]);
        assert_eq!(m.allocate(0), Some(vec![]));
        let mut all = m.allocate(3).expect("three are free");
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2]);
    }
}
