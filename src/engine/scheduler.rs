//! What runs in the next step: one token of every running sequence, then prompts in chunks, first come first served.
//!
//! A request is admitted when the blocks of its whole life are free, so that nothing that runs can run out of memory.

use std::collections::VecDeque;

use crate::error::{Error, Result};
use crate::layers::KvCache;
use crate::models::Limits;

use super::Load;
use super::block_manager::BlockManager;
use super::sequence::{RequestId, Sequence};

/// A part of a sequence that the next forward pass computes: tokens `start..end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduled {
    /// Which sequence.
    pub id: RequestId,
    /// First token.
    pub start: usize,
    /// One past the last.
    pub end: usize,
}

/// Queues of sequences and the policy that picks from them.
#[derive(Debug)]
pub struct Scheduler {
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    blocks: BlockManager,
    max_seqs: usize,
    max_batch_tokens: usize,
}

impl Scheduler {
    /// Nothing queued.
    pub fn new(limits: &Limits, blocks: BlockManager) -> Scheduler {
        Scheduler {
            waiting: VecDeque::new(),
            running: Vec::new(),
            blocks,
            max_seqs: limits.max_seqs.min(limits.max_logit_rows),
            max_batch_tokens: limits.max_batch_tokens,
        }
    }

    /// Queues a sequence.
    ///
    /// # Errors
    /// `Input` when it needs more blocks than there are.
    pub fn add(&mut self, sequence: Sequence) -> Result<()> {
        let needed = sequence.max_len().div_ceil(KvCache::BLOCK_SIZE);
        if needed > self.blocks.total() {
            let reason =
                format!("{} tokens need {needed} KV blocks, there are {}", sequence.max_len(), self.blocks.total());
            return Err(Error::input("max_tokens", reason));
        }
        self.waiting.push_back(sequence);
        Ok(())
    }

    /// Picks the next step's work. Empty only when nothing is queued or running.
    pub fn schedule(&mut self) -> Vec<Scheduled> {
        while self.running.len() < self.max_seqs {
            let Some(next) = self.waiting.front() else { break };
            let Some(blocks) = self.blocks.allocate(next.max_len().div_ceil(KvCache::BLOCK_SIZE)) else { break };
            let Some(mut sequence) = self.waiting.pop_front() else { break };
            sequence.set_blocks(blocks);
            self.running.push(sequence);
        }
        let mut budget = self.max_batch_tokens;
        let mut picked = Vec::new();
        // Decoding sequences first: a long prompt must not stall those that already stream.
        for decoding in [true, false] {
            for s in &self.running {
                let (start, len) = (s.computed(), s.token_ids().len());
                if (len - start == 1) == decoding && budget > 0 {
                    let end = len.min(start + budget);
                    budget -= end - start;
                    picked.push(Scheduled { id: s.id(), start, end });
                }
            }
        }
        picked
    }

    /// A running sequence.
    ///
    /// # Panics
    /// If `id` is not running: ids come from [`Scheduler::schedule`].
    pub fn get(&self, id: RequestId) -> &Sequence {
        self.running.iter().find(|s| s.id() == id).expect("a scheduled sequence is running")
    }

    /// A running sequence, to change.
    ///
    /// # Panics
    /// As [`Scheduler::get`].
    pub fn get_mut(&mut self, id: RequestId) -> &mut Sequence {
        self.running.iter_mut().find(|s| s.id() == id).expect("a scheduled sequence is running")
    }

    /// Drops a sequence and frees its blocks.
    pub fn remove(&mut self, id: RequestId) {
        self.waiting.retain(|s| s.id() != id);
        if let Some(at) = self.running.iter().position(|s| s.id() == id) {
            let blocks = self.running.remove(at).take_blocks();
            self.blocks.free(blocks);
        }
    }

    /// How busy it is.
    pub fn load(&self) -> Load {
        Load {
            running: self.running.len(),
            waiting: self.waiting.len(),
            used_blocks: self.blocks.total() - self.blocks.num_free(),
            total_blocks: self.blocks.total(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Request;
    use crate::engine::sampling::SamplingParams;

    fn sequence(id: u64, prompt: usize, max_tokens: usize) -> Sequence {
        let request = Request { prompt_ids: vec![1; prompt], params: SamplingParams::greedy(), max_tokens };
        Sequence::new(RequestId(id), request)
    }

    fn scheduler(blocks: usize, max_batch_tokens: usize) -> Scheduler {
        let limits = Limits { max_model_len: 64, max_batch_tokens, max_seqs: 4, max_logit_rows: 4, kv_blocks: blocks };
        Scheduler::new(&limits, BlockManager::new(blocks))
    }

    fn work(id: u64, start: usize, end: usize) -> Scheduled {
        Scheduled { id: RequestId(id), start, end }
    }

    #[test]
    fn prompts_in_chunks_after_decodes() {
        let mut s = scheduler(8, 10);
        s.add(sequence(0, 5, 3)).expect("fits");
        s.add(sequence(1, 12, 3)).expect("fits");
        assert_eq!(s.schedule(), [work(0, 0, 5), work(1, 0, 5)]);
        s.get_mut(RequestId(0)).set_computed(5);
        s.get_mut(RequestId(0)).push(7);
        s.get_mut(RequestId(1)).set_computed(5);
        assert_eq!(s.schedule(), [work(0, 5, 6), work(1, 5, 12)]);
    }

    #[test]
    fn admits_when_the_whole_life_fits() {
        let mut s = scheduler(2, 64);
        s.add(sequence(0, 16, 1)).expect("17 tokens are two blocks");
        s.add(sequence(1, 1, 1)).expect("fits later");
        assert_eq!(s.schedule(), [work(0, 0, 16)]);
        assert_eq!(s.load(), Load { running: 1, waiting: 1, used_blocks: 2, total_blocks: 2 });
        s.remove(RequestId(0));
        assert_eq!(s.schedule(), [work(1, 0, 1)]);
        assert!(s.add(sequence(2, 30, 3)).is_err(), "33 tokens can never fit in two blocks");
    }
}
