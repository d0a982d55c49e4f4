//! One request in flight: its tokens, its KV blocks and its counters.

use crate::error::Result;

use super::Request;
use super::sampling::{Sampled, Sampler};

/// Identity of a request, unique within its engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Why a request ended; names as the OpenAI API has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence or stop id was generated, or (told by the caller) a stop string.
    Stop,
    /// `max_tokens` were generated.
    Length,
}

impl std::fmt::Display for FinishReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        })
    }
}

/// A request and how far it has come.
#[derive(Debug)]
pub struct Sequence {
    id: RequestId,
    token_ids: Vec<u32>,
    prompt_len: usize,
    max_tokens: usize,
    /// Tokens whose keys and values are in the cache.
    computed: usize,
    blocks: Vec<u32>,
    sampler: Sampler,
}

impl Sequence {
    /// A sequence that has its prompt and no blocks.
    pub fn new(id: RequestId, request: Request) -> Sequence {
        Sequence {
            id,
            prompt_len: request.prompt_ids.len(),
            max_tokens: request.max_tokens,
            computed: 0,
            blocks: Vec::new(),
            sampler: Sampler::new(request.params, &request.prompt_ids),
            token_ids: request.prompt_ids,
        }
    }

    /// Its identity.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// Prompt and output.
    pub fn token_ids(&self) -> &[u32] {
        &self.token_ids
    }

    /// Tokens of the prompt.
    pub fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    /// Tokens whose keys and values are in the cache.
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// Records that the cache now holds the first `computed` tokens.
    pub fn set_computed(&mut self, computed: usize) {
        self.computed = computed;
    }

    /// Most tokens it can ever have.
    pub fn max_len(&self) -> usize {
        self.prompt_len + self.max_tokens
    }

    /// Its KV blocks.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Gives it its blocks.
    pub fn set_blocks(&mut self, blocks: Vec<u32>) {
        self.blocks = blocks;
    }

    /// Takes its blocks back.
    pub fn take_blocks(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.blocks)
    }

    /// The best logit is the answer and nothing else is asked: no penalty, bias, ban or list of alternatives.
    pub fn is_plain_greedy(&self) -> bool {
        self.sampler.params().is_plain_greedy()
    }

    /// Chooses the next token from its row of logits.
    pub fn sample(&mut self, logits: &[f32]) -> Result<Sampled> {
        self.sampler.sample(logits)
    }

    /// Appends a generated token; the reason when it is the last one.
    pub fn push(&mut self, token: u32) -> Option<FinishReason> {
        self.token_ids.push(token);
        let params = self.sampler.params();
        if !params.ignore_eos && params.stop_token_ids.contains(&token) {
            return Some(FinishReason::Stop);
        }
        (self.token_ids.len() == self.max_len()).then_some(FinishReason::Length)
    }
}
