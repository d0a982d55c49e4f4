//! Which full blocks hold keys and values of which tokens, so that a later prompt that starts alike need not compute them.
//!
//! A block is found by the block before it and its own tokens, both compared in full: what is found is what was asked for,
//! whatever hashes collide. The hashes of [`BlockEvent`] are names for routers alone.

use std::collections::HashMap;
use std::sync::Arc;

use crate::layers::KvCache;

use super::block_events::{BlockEvent, BlockEventLog, BlockEvents, block_hash};

/// Tokens of a full block.
type BlockTokens = [u32; KvCache::BLOCK_SIZE];

/// What a block follows. Equal parents mean equal tokens, positions and salt before it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Parent {
    /// Nothing: it is the first of a sequence with this cache salt.
    Root(Arc<str>),
    /// A block that is or was in the cache.
    Block {
        /// Never given twice.
        id: u64,
        /// Its name in events.
        hash: u64,
    },
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    parent: Parent,
    token_ids: BlockTokens,
}

#[derive(Debug)]
struct Node {
    key: Arc<Key>,
    /// This block as the parent of others.
    as_parent: Parent,
    hash: u64,
}

/// An index of cached blocks by content. Who uses a block and when it is given up, others decide.
#[derive(Debug)]
pub(super) struct PrefixCache {
    by_content: HashMap<Arc<Key>, u32>,
    /// By block number; `None` where it is not cached.
    nodes: Vec<Option<Node>>,
    next_id: u64,
    log: BlockEventLog,
}

impl PrefixCache {
    /// Nothing cached of `num_blocks` blocks; a log of up to `events` events.
    pub(super) fn new(num_blocks: usize, events: usize) -> PrefixCache {
        let nodes = std::iter::repeat_with(|| None).take(num_blocks).collect();
        PrefixCache { by_content: HashMap::new(), nodes, next_id: 0, log: BlockEventLog::new(events) }
    }

    /// The cached blocks that `token_ids` start with, as many as there are without a gap.
    pub(super) fn find(&self, salt: &Arc<str>, token_ids: &[u32]) -> Vec<u32> {
        let mut parent = Parent::Root(Arc::clone(salt));
        let mut found = Vec::new();
        for token_ids in token_ids.as_chunks().0 {
            let Some(&block) = self.by_content.get(&Key { parent, token_ids: *token_ids }) else { break };
            parent = self.parent(block).expect("what the index names is cached");
            found.push(block);
        }
        found
    }

    /// A block as the parent of those that follow it; `None` where it is not cached.
    pub(super) fn parent(&self, block: u32) -> Option<Parent> {
        self.nodes[block as usize].as_ref().map(|node| node.as_parent.clone())
    }

    /// Enters `block`, which holds `token_ids` behind `parent`, unless another block that holds the same is there already.
    /// What is there then is the parent of the blocks that follow.
    pub(super) fn insert(&mut self, parent: &Parent, token_ids: &BlockTokens, block: u32) -> Parent {
        let key = Key { parent: parent.clone(), token_ids: *token_ids };
        if let Some(&known) = self.by_content.get(&key) {
            return self.parent(known).expect("what the index names is cached");
        }
        let (before, salt) = match parent {
            Parent::Root(salt) => (None, &**salt),
            Parent::Block { hash, .. } => (Some(*hash), ""),
        };
        let hash = block_hash(before, salt, token_ids);
        let as_parent = Parent::Block { id: self.next_id, hash };
        self.next_id += 1;
        let key = Arc::new(key);
        self.by_content.insert(Arc::clone(&key), block);
        self.nodes[block as usize] = Some(Node { key, as_parent: as_parent.clone(), hash });
        self.log.record(|| BlockEvent::Stored {
            hash,
            parent: before,
            token_ids: token_ids.to_vec(),
            block_size: KvCache::BLOCK_SIZE,
        });
        as_parent
    }

    /// True where `block` can be found.
    pub(super) fn contains(&self, block: u32) -> bool {
        self.nodes[block as usize].is_some()
    }

    /// Forgets what `block` holds.
    pub(super) fn remove(&mut self, block: u32) {
        if let Some(node) = self.nodes[block as usize].take() {
            self.by_content.remove(&node.key);
            self.log.record(|| BlockEvent::Removed { hash: node.hash });
        }
    }

    /// Events since the last call.
    pub(super) fn take_events(&mut self) -> BlockEvents {
        self.log.take()
    }

    /// Fails unless index and blocks say the same.
    pub(super) fn audit(&self) -> Result<(), String> {
        let cached = self.nodes.iter().flatten().count();
        if cached != self.by_content.len() {
            return Err(format!("{cached} blocks are cached, the index has {}", self.by_content.len()));
        }
        let right = |(key, &block): (&Arc<Key>, &u32)| {
            self.nodes.get(block as usize).and_then(Option::as_ref).is_some_and(|node| node.key == *key)
        };
        if self.by_content.iter().all(right) {
            Ok(())
        } else {
            Err("the index names a block that holds other tokens".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = KvCache::BLOCK_SIZE;

    fn tokens(first: u32, blocks: usize) -> Vec<u32> {
        (first..first + (blocks * SIZE) as u32).collect()
    }

    /// Puts `token_ids` into blocks from `first` on.
    fn insert(cache: &mut PrefixCache, salt: &Arc<str>, token_ids: &[u32], first: u32) {
        let mut parent = Parent::Root(Arc::clone(salt));
        for (block, token_ids) in (first..).zip(token_ids.as_chunks().0) {
            parent = cache.insert(&parent, token_ids, block);
        }
    }

    #[test]
    fn finds_whole_blocks_of_the_same_start_alone() {
        let (mut cache, salt) = (PrefixCache::new(8, 0), Arc::from(""));
        insert(&mut cache, &salt, &tokens(0, 3), 4);
        assert_eq!(cache.find(&salt, &tokens(0, 4)), [4, 5, 6]);
        assert_eq!(cache.find(&salt, &tokens(0, 3)[..2 * SIZE + 15]), [4, 5]);
        assert!(cache.find(&salt, &tokens(16, 2)).is_empty(), "the same tokens elsewhere in a sequence");
        assert!(cache.find(&Arc::from("other"), &tokens(0, 3)).is_empty(), "another salt");
        let mut forked = tokens(0, 3);
        forked[SIZE + 3] = 999;
        assert_eq!(cache.find(&salt, &forked), [4]);
        cache.remove(5);
        assert_eq!(cache.find(&salt, &tokens(0, 3)), [4], "a gap ends the prefix");
        cache.audit().unwrap();
    }

    #[test]
    fn a_second_copy_is_not_entered_and_what_follows_it_is_found() {
        let (mut cache, salt) = (PrefixCache::new(8, 8), Arc::from("s"));
        insert(&mut cache, &salt, &tokens(0, 1), 0);
        insert(&mut cache, &salt, &tokens(0, 2), 2);
        assert!(!cache.contains(2) && cache.contains(3));
        assert_eq!(cache.find(&salt, &tokens(0, 2)), [0, 3]);
        let first = block_hash(None, "s", &tokens(0, 1));
        let second = block_hash(Some(first), "", &tokens(16, 1));
        let stored =
            |hash, parent, first| BlockEvent::Stored { hash, parent, token_ids: tokens(first, 1), block_size: SIZE };
        cache.remove(0);
        let expected =
            vec![stored(first, None, 0), stored(second, Some(first), 16), BlockEvent::Removed { hash: first }];
        assert_eq!(cache.take_events(), BlockEvents { events: expected, lost: 0 });
        // The parent comes back as another block: what followed the old one is not taken for its child.
        insert(&mut cache, &salt, &tokens(0, 1), 5);
        assert_eq!(cache.find(&salt, &tokens(0, 2)), [5]);
        cache.audit().unwrap();
    }
}
