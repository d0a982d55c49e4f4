//! Who uses which KV block: reference counts, the prefix cache over blocks that are full, and which block is given up next.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::layers::KvCache;

use super::block_events::BlockEvents;
use super::prefix_cache::{Parent, PrefixCache};

const BLOCK_SIZE: usize = KvCache::BLOCK_SIZE;

/// The blocks of one sequence in the order of its tokens. Only a [`BlockManager`] makes and changes one, and takes it back.
#[derive(Debug)]
pub(super) struct BlockTable {
    /// Block numbers; 0 for the first `released`.
    blocks: Vec<u32>,
    /// Leading blocks that were given back, being behind every layer's window.
    released: usize,
    /// Leading blocks that the prefix cache knows or was offered.
    offered: usize,
    /// What the block behind those follows.
    parent: Parent,
}

impl BlockTable {
    /// A table without blocks, of a sequence with this cache salt.
    pub(super) fn new(salt: &Arc<str>) -> BlockTable {
        BlockTable { blocks: Vec::new(), released: 0, offered: 0, parent: Parent::Root(Arc::clone(salt)) }
    }

    /// Block numbers; those of blocks behind every layer's window mean nothing.
    pub(super) fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Blocks that it uses.
    pub(super) fn held(&self) -> &[u32] {
        &self.blocks[self.released..]
    }
}

/// What becomes of the contents of blocks that a sequence gives back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Contents {
    /// What is cached can be found again.
    Keep,
    /// Nothing can.
    Forget,
}

/// Hands out blocks `0..num_blocks`, to several sequences at once where they start alike. A full block that nobody uses any
/// more keeps its contents until its place is needed, the least recently used first. Host-only: it moves no keys or values.
#[derive(Debug)]
pub(super) struct BlockManager {
    /// Sequences that use each block.
    refs: Vec<u32>,
    /// Blocks that nobody uses and that hold nothing of use.
    free: Vec<u32>,
    /// Cached blocks that nobody uses, by the time when that came about.
    idle: BTreeMap<u64, u32>,
    /// Of each block in `idle` its key there.
    idle_since: Vec<u64>,
    clock: u64,
    cache: Option<PrefixCache>,
    window: Option<usize>,
    evictions: u64,
}

impl BlockManager {
    /// All of `num_blocks` free; without `cache` no block outlives its sequences. `window` is the longest sliding window of
    /// all layers, `None` where one of them has none.
    pub(super) fn new(num_blocks: usize, window: Option<usize>, cache: Option<PrefixCache>) -> BlockManager {
        BlockManager {
            refs: vec![0; num_blocks],
            free: (0..num_blocks as u32).rev().collect(),
            idle: BTreeMap::new(),
            idle_since: vec![0; num_blocks],
            clock: 0,
            cache,
            window,
            evictions: 0,
        }
    }

    /// Blocks in all.
    pub(super) fn total(&self) -> usize {
        self.refs.len()
    }

    /// Blocks that can be had: those that hold nothing, and those that are cached and used by nobody.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks that are cached and used by nobody.
    pub(super) fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Cached blocks that were given up for others.
    pub(super) fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Most blocks that a sequence of `tokens` tokens holds at any time, where it is computed in parts of up to `part` tokens.
    pub(super) fn most_held(&self, tokens: usize, part: usize) -> usize {
        let all = tokens.div_ceil(BLOCK_SIZE);
        let Some(window) = self.window else { return all };
        // A part's first query sees `window` positions, itself included; those and the rest of the part start anywhere in a block.
        let seen = window.saturating_add(part).saturating_sub(1);
        all.min(seen.saturating_sub(1).div_ceil(BLOCK_SIZE).saturating_add(1))
    }

    /// The cached blocks that `token_ids` start with.
    pub(super) fn find_prefix(&self, salt: &Arc<str>, token_ids: &[u32]) -> Vec<u32> {
        self.cache.as_ref().map_or_else(Vec::new, |cache| cache.find(salt, token_ids))
    }

    /// Blocks that could be had beside those of `prefix`.
    pub(super) fn available_beside(&self, prefix: &[u32]) -> usize {
        self.available() - prefix.iter().filter(|&&block| self.refs[block as usize] == 0).count()
    }

    /// A table that starts with what [`BlockManager::find_prefix`] found.
    pub(super) fn open(&mut self, salt: &Arc<str>, prefix: Vec<u32>) -> BlockTable {
        let mut table = BlockTable::new(salt);
        if let Some((cache, &last)) = self.cache.as_ref().zip(prefix.last()) {
            table.parent = cache.parent(last).expect("found in the cache a moment ago");
        }
        table.offered = prefix.len();
        table.released = self.behind_window(prefix.len() * BLOCK_SIZE);
        table.blocks = prefix;
        table.blocks[..table.released].fill(0);
        table.held().iter().for_each(|&block| self.retain(block));
        table
    }

    /// Gives back the blocks that no query from position `next` on sees.
    pub(super) fn slide(&mut self, table: &mut BlockTable, next: usize) {
        let behind = self.behind_window(next).min(table.blocks.len());
        for at in table.released..behind {
            self.release(std::mem::take(&mut table.blocks[at]));
        }
        table.released = table.released.max(behind);
    }

    /// Leading blocks of a sequence that no query from position `next` on sees.
    fn behind_window(&self, next: usize) -> usize {
        self.window.map_or(0, |window| (next + 1).saturating_sub(window) / BLOCK_SIZE)
    }

    /// Makes room for `tokens` tokens in all; false, and nothing changed, when there are too few blocks.
    pub(super) fn grow(&mut self, table: &mut BlockTable, tokens: usize) -> bool {
        let missing = tokens.div_ceil(BLOCK_SIZE).saturating_sub(table.blocks.len());
        if missing > self.available() {
            return false;
        }
        for _ in 0..missing {
            let block = self.take().expect("counted before");
            self.retain(block);
            table.blocks.push(block);
        }
        true
    }

    /// Lets others find the blocks that the first `computed` of `token_ids` fill.
    pub(super) fn offer(&mut self, table: &mut BlockTable, token_ids: &[u32], computed: usize) {
        let Some(cache) = &mut self.cache else { return };
        for token_ids in &token_ids[..computed].as_chunks().0[table.offered..] {
            table.parent = cache.insert(&table.parent, token_ids, table.blocks[table.offered]);
            table.offered += 1;
        }
    }

    /// A second table over the full blocks of a sequence's first `tokens` tokens, all of them computed and offered, with the number of
    /// tokens in them; `None` where a window has moved past keys that computing the rest again would need.
    pub(super) fn fork(&mut self, table: &BlockTable, tokens: usize) -> Option<(BlockTable, usize)> {
        let full = tokens / BLOCK_SIZE;
        if table.released > self.behind_window(full * BLOCK_SIZE) {
            return None;
        }
        let blocks = table.blocks[..full].to_vec();
        let fork = BlockTable { blocks, parent: table.parent.clone(), ..*table };
        fork.held().iter().for_each(|&block| self.retain(block));
        Some((fork, full * BLOCK_SIZE))
    }

    /// Takes a sequence's blocks back. Its last block is given up first: what follows a block is of no use without it.
    pub(super) fn close(&mut self, table: BlockTable, contents: Contents) {
        if let (Contents::Forget, Some(cache)) = (contents, &mut self.cache) {
            table.held().iter().for_each(|&block| cache.remove(block));
        }
        table.held().iter().rev().for_each(|&block| self.release(block));
    }

    /// Changes of the cache since the last call.
    pub(super) fn take_events(&mut self) -> BlockEvents {
        self.cache.as_mut().map_or_else(BlockEvents::default, PrefixCache::take_events)
    }

    fn is_cached(&self, block: u32) -> bool {
        self.cache.as_ref().is_some_and(|cache| cache.contains(block))
    }

    /// A block that nobody uses: one that holds nothing, else the one idle for longest, whose contents are then forgotten.
    fn take(&mut self) -> Option<u32> {
        self.free.pop().or_else(|| {
            let (_, block) = self.idle.pop_first()?;
            self.cache.as_mut()?.remove(block);
            self.evictions += 1;
            Some(block)
        })
    }

    fn retain(&mut self, block: u32) {
        let refs = &mut self.refs[block as usize];
        if *refs == 0 {
            self.idle.remove(&self.idle_since[block as usize]);
        }
        *refs += 1;
    }

    fn release(&mut self, block: u32) {
        let refs = &mut self.refs[block as usize];
        *refs -= 1;
        if *refs > 0 {
            return;
        }
        if self.is_cached(block) {
            self.clock += 1;
            self.idle_since[block as usize] = self.clock;
            self.idle.insert(self.clock, block);
        } else {
            self.free.push(block);
        }
    }

    /// Fails unless every block is used by exactly the tables of `tables` that name it, and is free, idle or used.
    pub(super) fn audit<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) -> Result<(), String> {
        let mut refs = vec![0; self.total()];
        tables.flat_map(BlockTable::held).for_each(|&block| refs[block as usize] += 1);
        if let Some(block) = (0..self.total()).find(|&block| refs[block] != self.refs[block]) {
            return Err(format!("{} sequences hold block {block}, it counts {}", refs[block], self.refs[block]));
        }
        let mut unused: Vec<u32> = self.free.iter().chain(self.idle.values()).copied().collect();
        unused.sort_unstable();
        let expected: Vec<u32> = (0..).zip(&refs).filter(|&(_, &refs)| refs == 0).map(|(block, _)| block).collect();
        if unused != expected {
            return Err(format!("blocks {expected:?} are used by nobody, {unused:?} can be had"));
        }
        if self.free.iter().any(|&block| self.is_cached(block))
            || self.idle.values().any(|&block| !self.is_cached(block))
        {
            return Err("a free block is cached, or an idle one is not".into());
        }
        self.cache.as_ref().map_or(Ok(()), PrefixCache::audit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager(blocks: usize, window: Option<usize>) -> BlockManager {
        BlockManager::new(blocks, window, Some(PrefixCache::new(blocks, 0)))
    }

    fn salt() -> Arc<str> {
        Arc::from("")
    }

    /// A sequence of these tokens, all computed.
    fn computed(m: &mut BlockManager, token_ids: &[u32]) -> BlockTable {
        let mut table = m.open(&salt(), vec![]);
        assert!(m.grow(&mut table, token_ids.len()));
        m.offer(&mut table, token_ids, token_ids.len());
        table
    }

    #[test]
    fn growth_is_all_or_nothing() {
        let mut m = manager(3, None);
        let mut a = m.open(&salt(), vec![]);
        assert!(m.grow(&mut a, 17) && a.blocks() == [0, 1] && m.grow(&mut a, 32));
        let mut b = m.open(&salt(), vec![]);
        assert!(!m.grow(&mut b, 17) && b.blocks().is_empty() && m.available() == 1);
        assert!(m.grow(&mut b, 16) && !m.grow(&mut a, 33));
        m.audit([&a, &b].into_iter()).unwrap();
        m.close(a, Contents::Keep);
        m.close(b, Contents::Keep);
        assert_eq!(m.available(), 3);
        m.audit([].into_iter()).unwrap();
    }

    /// Blocks that nobody uses are found again until their place is needed; of a sequence the last goes first, of sequences
    /// the one whose end is longest ago.
    #[test]
    fn the_least_recently_used_goes_first() {
        let mut m = manager(5, None);
        let (first, second): (Vec<u32>, Vec<u32>) = ((0..40).collect(), (100..132).collect());
        let a = computed(&mut m, &first);
        let b = computed(&mut m, &second);
        m.close(a, Contents::Keep);
        m.close(b, Contents::Keep);
        assert_eq!((m.idle(), m.available()), (4, 5));
        let found = m.find_prefix(&salt(), &first);
        assert_eq!(found, [0, 1]);
        assert_eq!(m.available_beside(&found), 3);
        let again = m.open(&salt(), found);
        m.close(again, Contents::Keep); // now the second sequence is the older one
        let mut c = m.open(&salt(), vec![]);
        assert!(m.grow(&mut c, 32));
        assert_eq!(m.evictions(), 1, "one block held nothing");
        assert_eq!(m.find_prefix(&salt(), &second).len(), 1, "its last block went");
        assert_eq!(m.find_prefix(&salt(), &first).len(), 2);
        assert!(m.grow(&mut c, 64));
        assert_eq!((m.find_prefix(&salt(), &second).len(), m.find_prefix(&salt(), &first).len()), (0, 1));
        m.audit([&c].into_iter()).unwrap();
    }

    #[test]
    fn shared_blocks_stay_until_the_last_user_goes() {
        let mut m = manager(4, None);
        let tokens: Vec<u32> = (0..40).collect();
        let a = computed(&mut m, &tokens);
        let (b, shared) = m.fork(&a, 40).expect("no window");
        assert_eq!((b.blocks(), shared, m.available()), (&[0, 1][..], 32, 1));
        m.audit([&a, &b].into_iter()).unwrap();
        m.close(a, Contents::Keep);
        assert_eq!((m.available(), m.idle()), (2, 0));
        m.close(b, Contents::Forget);
        assert_eq!((m.available(), m.idle()), (4, 0), "what was discarded is not found again");
        m.audit([].into_iter()).unwrap();
    }

    #[test]
    fn blocks_behind_the_window_are_given_back() {
        let mut m = manager(8, Some(20));
        let tokens: Vec<u32> = (0..100).collect();
        let mut a = m.open(&salt(), vec![]);
        assert!(m.grow(&mut a, 64));
        m.offer(&mut a, &tokens, 64);
        // The query at 51 sees 32..=51, that at 50 one key more, which is in block 1.
        m.slide(&mut a, 50);
        assert_eq!(a.held(), [1, 2, 3]);
        m.slide(&mut a, 51);
        assert_eq!((a.held(), a.blocks()), (&[2, 3][..], &[0, 0, 2, 3][..]));
        assert_eq!(m.idle(), 2);
        m.audit([&a].into_iter()).unwrap();
        // Found again, only what the next query sees is held: at 64 that is 45..=64.
        let found = m.find_prefix(&salt(), &tokens);
        assert_eq!(found.len(), 4);
        let b = m.open(&salt(), found);
        assert_eq!(b.held(), [2, 3]);
        m.audit([&a, &b].into_iter()).unwrap();
        // 16 tokens at a time and 19 before them: at most 4 blocks, of a short sequence fewer.
        assert_eq!((m.most_held(1000, 16), m.most_held(33, 16)), (4, 3));
        // A fork would compute from 48 on, which sees 29: block 1 is gone.
        assert!(m.fork(&a, 60).is_none());
        assert!(m.fork(&b, 64).is_some());
    }
}
