//! What routers are told of the prefix cache: which blocks it holds, by hash, so that a request can be sent where most of
//! its prompt is computed already.

use std::collections::VecDeque;

use ring::digest::{Context, SHA256};

/// A change of the prefix cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockEvent {
    /// The keys and values of a full block can now be found.
    Stored {
        /// The block's name: the first 8 bytes, little endian, of SHA-256 over a byte 1 and the parent's hash (little endian),
        /// or without a parent a byte 0 and the cache salt (UTF-8), then over the token ids (little endian, 4 bytes each).
        hash: u64,
        /// Hash of the block before it; `None` of a sequence's first block.
        parent: Option<u64>,
        /// Its tokens.
        token_ids: Vec<u32>,
        /// Tokens in a block.
        block_size: usize,
    },
    /// It cannot any more.
    Removed {
        /// The block's name.
        hash: u64,
    },
}

/// Events since the last call, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockEvents {
    /// What happened.
    pub events: Vec<BlockEvent>,
    /// Older events that the buffer had no room for: whoever follows the cache must start anew.
    pub lost: u64,
}

/// The name of a block, the same in every process.
pub(super) fn block_hash(parent: Option<u64>, salt: &str, token_ids: &[u32]) -> u64 {
    let mut context = Context::new(&SHA256);
    match parent {
        Some(hash) => {
            context.update(&[1]);
            context.update(&hash.to_le_bytes());
        }
        None => {
            context.update(&[0]);
            context.update(salt.as_bytes());
        }
    }
    token_ids.iter().for_each(|id| context.update(&id.to_le_bytes()));
    let digest = context.finish();
    u64::from_le_bytes(digest.as_ref()[..8].try_into().expect("a digest has 32 bytes"))
}

/// The last events, as many as were asked for; none unless they were.
#[derive(Debug, Default)]
pub(super) struct BlockEventLog {
    events: VecDeque<BlockEvent>,
    capacity: usize,
    lost: u64,
}

impl BlockEventLog {
    /// Keeps at most `capacity` events; with 0 nothing is recorded.
    pub(super) fn new(capacity: usize) -> BlockEventLog {
        BlockEventLog { events: VecDeque::new(), capacity, lost: 0 }
    }

    /// Records what `event` makes, where somebody asked.
    pub(super) fn record(&mut self, event: impl FnOnce() -> BlockEvent) {
        if self.capacity == 0 {
            return;
        }
        if self.events.len() == self.capacity {
            self.events.pop_front();
            self.lost += 1;
        }
        self.events.push_back(event());
    }

    /// Hands over what was recorded.
    pub(super) fn take(&mut self) -> BlockEvents {
        BlockEvents { events: self.events.drain(..).collect(), lost: std::mem::take(&mut self.lost) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `hashlib.sha256(b"\0" + b"salt" + struct.pack("<2I", 7, 300)).digest()[:8]`, then a child of it, in Python.
    #[test]
    fn hashes_are_those_of_sha256() {
        let first = block_hash(None, "salt", &[7, 300]);
        assert_eq!(first, 0xbac7a84fcaf4480f);
        assert_eq!(block_hash(Some(first), "unused", &[1, 2]), 0x60ea9bbcbd8a43ff);
    }

    #[test]
    fn a_full_log_loses_the_oldest() {
        let mut log = BlockEventLog::new(2);
        (0..5).for_each(|hash| log.record(|| BlockEvent::Removed { hash }));
        let events = [3, 4].map(|hash| BlockEvent::Removed { hash }).to_vec();
        assert_eq!(log.take(), BlockEvents { events, lost: 3 });
        assert_eq!(log.take(), BlockEvents::default());
        let mut off = BlockEventLog::new(0);
        off.record(|| panic!("nobody asked"));
    }
}
