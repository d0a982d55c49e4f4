//! What runs in the next step: one token of every sequence that decodes, then prompts in chunks, by priority and then by arrival.
//!
//! Blocks are taken as sequences grow. When there are none left the sequence that is served last gives up its own, waits, and is
//! computed again later from its tokens. Nobody who waits holds blocks, and no request is taken that could not run alone, so the first
//! in the order always goes on: there is no deadlock, and what is computed again is bounded by what those before it finish.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::layers::KvCache;
use crate::models::Limits;

use super::block_events::BlockEvents;
use super::block_manager::{BlockManager, Contents};
use super::event::Load;
use super::request::RequestId;
use super::sequence::{Sequence, SequenceId};

/// A part of a sequence that the next forward pass computes: tokens `start..end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    /// Which sequence.
    pub(super) id: SequenceId,
    /// First token.
    pub(super) start: usize,
    /// One past the last.
    pub(super) end: usize,
    /// Whether the last one's logits choose the next token.
    pub(super) is_sampled: bool,
}

impl Part {
    fn new(sequence: &Sequence, end: usize) -> Part {
        let is_sampled = end == sequence.token_ids().len() && sequence.generates();
        Part { id: sequence.id(), start: sequence.computed, end, is_sampled }
    }
}

/// Queues of sequences, each in the order in which it is served, and the policy that picks from them.
#[derive(Debug)]
pub(super) struct Scheduler {
    waiting: BTreeMap<SequenceId, Sequence>,
    running: BTreeMap<SequenceId, Sequence>,
    blocks: BlockManager,
    max_seqs: usize,
    max_batch_tokens: usize,
    preemptions: u64,
    prefix_cache_queries: u64,
    prefix_cache_hits: u64,
}

impl Scheduler {
    /// Nothing queued.
    pub(super) fn new(limits: &Limits, blocks: BlockManager) -> Scheduler {
        Scheduler {
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            blocks,
            max_seqs: limits.max_seqs.min(limits.max_logit_rows),
            max_batch_tokens: limits.max_batch_tokens,
            preemptions: 0,
            prefix_cache_queries: 0,
            prefix_cache_hits: 0,
        }
    }

    /// Queues a sequence.
    ///
    /// # Errors
    /// `Input` when it needs more blocks than there are.
    pub(super) fn add(&mut self, sequence: Sequence) -> Result<()> {
        // The last token that is generated is never computed.
        let tokens = sequence.max_len().saturating_sub(1).max(sequence.prompt_ids().len());
        let needed = self.blocks.most_held(tokens, self.max_batch_tokens);
        if needed > self.blocks.total() {
            let reason = format!("{tokens} tokens need {needed} KV blocks, there are {}", self.blocks.total());
            return Err(Error::input("max_tokens", reason));
        }
        self.waiting.insert(sequence.id(), sequence);
        Ok(())
    }

    /// Picks the next step's work and takes the blocks that it needs. Empty only when nothing is queued or running.
    pub(super) fn schedule(&mut self) -> Vec<Part> {
        let decoding = self.running.values().filter(|s| s.remaining() == 1).count();
        // Decoding sequences first: a long prompt must not stall those that already stream.
        let mut decodes = decoding.min(self.max_batch_tokens);
        let mut prompts = self.max_batch_tokens - decodes;
        let preemptions = self.preemptions;
        let mut picked = Vec::new();
        let ids: Vec<SequenceId> = self.running.keys().copied().collect();
        for id in ids {
            // Those that are served last were preempted meanwhile.
            let Some(sequence) = self.running.get(&id) else { break };
            let (start, left) = (sequence.computed, sequence.remaining());
            let budget = if left == 1 { &mut decodes } else { &mut prompts };
            let end = start + left.min(*budget);
            let part = Part::new(sequence, end);
            if end > start && self.make_room(id, end) {
                *budget -= end - start;
                picked.push(part);
            }
        }
        // Who was just preempted would only come back for the same to happen again.
        if self.preemptions == preemptions {
            self.admit(prompts, &mut picked);
        }
        picked
    }

    /// Blocks for the first `end` tokens of a running sequence, whoever must give them up; false when it had to itself.
    fn make_room(&mut self, id: SequenceId, end: usize) -> bool {
        while let Some(sequence) = self.running.get_mut(&id) {
            self.blocks.slide(&mut sequence.table, sequence.computed);
            if self.blocks.grow(&mut sequence.table, end) {
                return true;
            }
            if let Some((_, last)) = self.running.pop_last() {
                self.preemptions += 1;
                self.give_up(last);
            }
        }
        false
    }

    /// Back to those who wait. Its tokens and its sampler's state stay, so that it goes on as if nothing had happened.
    fn give_up(&mut self, mut sequence: Sequence) {
        self.blocks.close(sequence.take_table(), Contents::Keep);
        sequence.computed = 0;
        self.waiting.insert(sequence.id(), sequence);
    }

    /// Starts sequences that wait, in order, while places, tokens and blocks last.
    fn admit(&mut self, mut budget: usize, picked: &mut Vec<Part>) {
        while budget > 0 && self.running.len() < self.max_seqs {
            let Some(next) = self.waiting.first_entry() else { break };
            let sequence = next.get();
            let len = sequence.token_ids().len();
            let prefix = self.blocks.find_prefix(sequence.salt(), &sequence.token_ids()[..sequence.reusable()]);
            let most_held = |len| self.blocks.most_held(len, self.max_batch_tokens);
            // Room for all its tokens, for those of the others that are still to be computed, and for the next block of each:
            // otherwise it would soon be preempted again. Where nobody else runs, its place was made sure of when it was added.
            let outstanding = |s: &Sequence| most_held(s.token_ids().len()).saturating_sub(s.table.held().len()) + 1;
            let needed = most_held(len).saturating_sub(prefix.len());
            let reserved: usize = self.running.values().map(outstanding).sum();
            if !self.running.is_empty() && needed + reserved > self.blocks.available_beside(&prefix) {
                break;
            }
            let mut sequence = next.remove();
            let start = prefix.len() * KvCache::BLOCK_SIZE;
            let end = len.min(start + budget);
            sequence.table = self.blocks.open(sequence.salt(), prefix);
            sequence.computed = start;
            if !self.blocks.grow(&mut sequence.table, end) {
                self.give_up(sequence);
                break;
            }
            if sequence.prompt.as_mut().is_some_and(|work| work.admit(start)) {
                self.prefix_cache_queries += len as u64;
                self.prefix_cache_hits += start as u64;
            }
            budget -= end - start;
            picked.push(Part::new(&sequence, end));
            self.running.insert(sequence.id(), sequence);
        }
    }

    /// True until a scheduled sequence has ended.
    pub(super) fn is_running(&self, id: SequenceId) -> bool {
        self.running.contains_key(&id)
    }

    /// A running sequence.
    ///
    /// # Panics
    /// If it is not running: ids come from [`Scheduler::schedule`].
    pub(super) fn running(&mut self, id: SequenceId) -> &mut Sequence {
        self.running.get_mut(&id).expect("a scheduled sequence is running")
    }

    /// Records that the cache holds the keys and values of `part`, of a running sequence.
    pub(super) fn computed(&mut self, part: &Part) -> &mut Sequence {
        let sequence = self.running.get_mut(&part.id).expect("a scheduled sequence is running");
        sequence.computed_to(part.end, &mut self.blocks);
        sequence
    }

    /// Queues another choice of a sequence whose prompt is computed. Where there is a place it runs at once, over the prompt's full blocks,
    /// and computes again what is behind these; else it waits, without blocks.
    pub(super) fn add_choice(&mut self, of: SequenceId, mut choice: Sequence) {
        let first = self.running.get(&of).filter(|_| self.running.len() < self.max_seqs);
        match first.and_then(|first| self.blocks.fork(&first.table, first.prompt_ids().len())) {
            Some((table, computed)) => {
                choice.table = table;
                choice.computed = computed;
                self.running.insert(choice.id(), choice);
            }
            None => {
                self.waiting.insert(choice.id(), choice);
            }
        }
    }

    /// Ends a running sequence and takes its blocks back.
    pub(super) fn finish(&mut self, id: SequenceId) {
        if let Some(sequence) = self.running.remove(&id) {
            self.blocks.close(sequence.table, Contents::Keep);
        }
    }

    /// Ends all of a request, running or waiting.
    pub(super) fn remove(&mut self, request: RequestId, contents: Contents) {
        self.waiting.retain(|id, _| id.request != request);
        let ids: Vec<SequenceId> = self.running.keys().filter(|id| id.request == request).copied().collect();
        for sequence in ids.iter().filter_map(|id| self.running.remove(id)).collect::<Vec<_>>() {
            self.blocks.close(sequence.table, contents);
        }
    }

    /// Ends one choice of a request, running or waiting.
    pub(super) fn remove_choice(&mut self, request: RequestId, choice: usize) {
        self.waiting.retain(|id, _| (id.request, id.choice) != (request, choice));
        let id = self.running.keys().find(|id| (id.request, id.choice) == (request, choice)).copied();
        if let Some(id) = id {
            self.finish(id);
        }
    }

    /// All requests that have not ended, in order of arrival.
    pub(super) fn requests(&self) -> Vec<RequestId> {
        let mut all: Vec<RequestId> = self.running.keys().chain(self.waiting.keys()).map(|id| id.request).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// True when nothing is queued or running.
    pub(super) fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// How busy it is.
    pub(super) fn load(&self) -> Load {
        Load {
            running: self.running.len(),
            waiting: self.waiting.len(),
            preemptions: self.preemptions,
            used_blocks: self.blocks.total() - self.blocks.available(),
            cached_blocks: self.blocks.idle(),
            total_blocks: self.blocks.total(),
            evicted_blocks: self.blocks.evictions(),
            prefix_cache_queries: self.prefix_cache_queries,
            prefix_cache_hits: self.prefix_cache_hits,
        }
    }

    /// Changes of the prefix cache since the last call.
    pub(super) fn take_block_events(&mut self) -> BlockEvents {
        self.blocks.take_events()
    }

    /// Fails unless blocks are counted as running sequences hold them, and those who wait hold none.
    pub(super) fn audit(&self) -> Result<(), String> {
        if let Some(id) = self.waiting.values().find(|s| !s.table.blocks().is_empty()).map(Sequence::id) {
            return Err(format!("{id:?} waits and holds blocks"));
        }
        self.blocks.audit(self.running.values().map(|s| &s.table))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::prefix_cache::PrefixCache;
    use crate::engine::request::Request;
    use crate::engine::sampling::SamplingParams;

    fn sequence(id: u64, priority: i32, prompt: usize, max_tokens: usize) -> Sequence {
        // Prompts that share nothing.
        let prompt_ids = (0..prompt as u32).map(|i| 100 * id as u32 + i).collect();
        let request = Request { priority, ..Request::new(prompt_ids, SamplingParams::greedy(), max_tokens) };
        Sequence::new(RequestId(id), request)
    }

    fn scheduler(blocks: usize, max_batch_tokens: usize, window: Option<usize>) -> Scheduler {
        let limits = Limits { max_model_len: 99, max_batch_tokens, max_seqs: 4, max_logit_rows: 4, kv_blocks: blocks };
        Scheduler::new(&limits, BlockManager::new(blocks, window, Some(PrefixCache::new(blocks, 0))))
    }

    /// Schedules a step and plays it: `(request, start, end)` of its parts. Sampled tokens are all alike.
    fn step(s: &mut Scheduler) -> Vec<(u64, usize, usize)> {
        let parts = s.schedule();
        s.audit().expect("the books are right");
        for part in &parts {
            s.computed(part);
            if part.is_sampled && s.running(part.id).push(7).expect("no constraint").is_some() {
                s.finish(part.id);
            }
        }
        s.audit().expect("the books are right");
        parts.iter().map(|part| (part.id.request.0, part.start, part.end)).collect()
    }

    #[test]
    fn prompts_in_chunks_beside_decodes() {
        let mut s = scheduler(8, 10, None);
        s.add(sequence(0, 0, 5, 3)).expect("fits");
        s.add(sequence(1, 0, 12, 3)).expect("fits");
        assert_eq!(step(&mut s), [(0, 0, 5), (1, 0, 5)]);
        assert_eq!(step(&mut s), [(0, 5, 6), (1, 5, 12)]);
        assert_eq!(step(&mut s), [(0, 6, 7), (1, 12, 13)]);
        assert_eq!(step(&mut s), [(1, 13, 14)]);
        assert!(s.is_idle() && step(&mut s).is_empty());
    }

    #[test]
    fn lower_priority_values_go_first() {
        let mut s = scheduler(8, 10, None);
        s.add(sequence(0, 1, 8, 2)).expect("fits");
        s.add(sequence(1, 0, 8, 2)).expect("fits");
        s.add(sequence(2, -1, 1, 2)).expect("fits");
        assert_eq!(step(&mut s), [(2, 0, 1), (1, 0, 8), (0, 0, 1)]);
    }

    /// Four blocks for two sequences that grow into three each: the later gives way, and goes on from its tokens when the
    /// other has ended, what is cached of them not computed again.
    #[test]
    fn who_is_last_gives_its_blocks_up() {
        let mut s = scheduler(4, 64, None);
        s.add(sequence(0, 0, 15, 20)).expect("34 tokens are computed");
        assert_eq!(step(&mut s), [(0, 0, 15)]);
        s.add(sequence(1, 0, 14, 30)).expect("43 are");
        assert_eq!(step(&mut s), [(0, 15, 16), (1, 0, 14)]);
        let mut steps = vec![];
        while s.load().preemptions == 0 {
            steps = step(&mut s);
        }
        assert_eq!(steps, [(0, 32, 33)], "a third block for the first");
        assert_eq!((s.load().running, s.load().waiting, s.load().cached_blocks), (1, 1, 1));
        assert_eq!(step(&mut s), [(0, 33, 34)], "no place for the second yet");
        // It had 30 tokens computed and 31 in all; of its two blocks the one that was not full was taken.
        assert_eq!(step(&mut s), [(1, 16, 31)]);
        while !s.is_idle() {
            step(&mut s);
        }
        assert_eq!(s.load().preemptions, 1);
    }

    #[test]
    fn what_can_never_run_is_refused() {
        let mut s = scheduler(2, 64, None);
        assert!(s.add(sequence(0, 0, 30, 3)).is_ok(), "32 tokens are computed, the 33rd never is");
        let error = s.add(sequence(1, 0, 30, 4)).expect_err("33 tokens take three blocks");
        assert!(error.to_string().contains("33 tokens need 3 KV blocks, there are 2"), "{error}");
    }

    /// A prompt that starts as an earlier one did is computed from there on, but for its last token.
    #[test]
    fn what_is_cached_is_not_computed() {
        let mut s = scheduler(8, 64, None);
        s.add(sequence(0, 0, 32, 2)).expect("fits");
        assert_eq!([step(&mut s), step(&mut s)], [[(0, 0, 32)], [(0, 32, 33)]]);
        let same = |id: u64, salt: &str| {
            let request = Request::new((0..32).collect(), SamplingParams::greedy(), 2);
            Sequence::new(RequestId(id), Request { cache_salt: salt.into(), ..request })
        };
        s.add(same(1, "")).expect("fits");
        s.add(same(2, "mine")).expect("fits");
        assert_eq!(step(&mut s), [(1, 16, 32), (2, 0, 32)]);
        assert_eq!((s.load().prefix_cache_queries, s.load().prefix_cache_hits), (96, 16));
    }

    /// Behind a window of 20 in parts of up to 8 a sequence holds 3 blocks, however long it grows.
    #[test]
    fn a_window_bounds_what_a_sequence_holds() {
        let mut s = scheduler(3, 8, Some(20));
        s.add(sequence(0, 0, 60, 30)).expect("a window's worth fits");
        assert!(scheduler(2, 8, Some(20)).add(sequence(0, 0, 60, 30)).is_err());
        let mut tokens = 0;
        while !s.is_idle() {
            tokens += step(&mut s).iter().map(|(_, start, end)| end - start).sum::<usize>();
        }
        assert_eq!((tokens, s.load().preemptions), (89, 0));
    }
}
