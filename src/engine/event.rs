//! What an engine tells of its requests, and of itself.

use std::time::Duration;

use crate::error::Error;

use super::request::RequestId;
use super::sampling::Sampled;

/// Why a sequence ended; names as the OpenAI API has them.
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

/// What was learnt of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptOutput {
    /// Tokens of it whose keys and values were in the cache.
    pub cached_tokens: usize,
    /// Each token but the first with its log-probability and the most probable ones in its place; empty unless asked for.
    pub logprobs: Vec<Sampled>,
    /// `[hidden_size]`, after the final norm; empty unless asked for.
    pub hidden_state: Vec<f32>,
}

/// What a step did to one request.
#[derive(Debug)]
pub enum Event {
    /// The prompt is computed. Comes once, before the first token.
    Prompt {
        /// Whose.
        id: RequestId,
        /// From [`super::Engine::submit`] until it was first scheduled.
        waited: Duration,
        /// What was learnt of it.
        output: PromptOutput,
    },
    /// A token was generated. End-of-sequence ids are reported too, followed by `Finished`.
    Token {
        /// Whose.
        id: RequestId,
        /// Which of its choices, from 0 on.
        choice: usize,
        /// Which, and how likely.
        token: Sampled,
    },
    /// A choice is done and its memory free. The request is when all of its choices are.
    Finished {
        /// Which request.
        id: RequestId,
        /// Which of its choices.
        choice: usize,
        /// Why.
        reason: FinishReason,
    },
    /// The request failed, all of its choices that were not finished with it. Others go on, unless the error is
    /// [`Error::Engine`]: then all have failed, and the engine takes no more.
    Failed {
        /// Which.
        id: RequestId,
        /// Why.
        error: Error,
    },
}

/// A snapshot of how busy an engine is, for routers and metrics. What is counted "so far" only grows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Sequences being computed.
    pub running: usize,
    /// Sequences that wait to be, preempted ones too.
    pub waiting: usize,
    /// Times so far that a sequence gave its blocks up for another.
    pub preemptions: u64,
    /// KV blocks that sequences use.
    pub used_blocks: usize,
    /// KV blocks that no sequence uses, kept for later prompts that start alike.
    pub cached_blocks: usize,
    /// KV blocks in all.
    pub total_blocks: usize,
    /// Cached blocks so far that were given up for others.
    pub evicted_blocks: u64,
    /// Prompt tokens so far that were looked up in the prefix cache.
    pub prefix_cache_queries: u64,
    /// Those of them that were there.
    pub prefix_cache_hits: u64,
}
