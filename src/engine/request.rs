//! What is asked of an engine.

use crate::checkpoint::ModelConfig;
use crate::error::{Error, Result};

use super::constraint::Matcher;
use super::sampling::SamplingParams;

/// Most choices of one request.
pub const MAX_CHOICES: usize = 128;

/// Most alternatives that are told of each token of a prompt: of a long one they take memory.
pub const MAX_PROMPT_LOGPROBS: usize = 128;

/// Identity of a request, unique within its engine; later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Which hidden states of a prompt are wanted, after the final norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// That of the last token.
    Last,
    /// The mean over all tokens.
    Mean,
}

/// One request.
#[derive(Debug, Clone)]
pub struct Request {
    /// The prompt; at least one token, each below the vocabulary size.
    pub prompt_ids: Vec<u32>,
    /// How to choose tokens, and the ids that end a sequence.
    pub params: SamplingParams,
    /// Most tokens to generate. 0 where only `prompt_logprobs` or `hidden_state` is wanted.
    pub max_tokens: usize,
    /// Continuations to generate, each with a sampler of its own: number `i` is what a request for one with `i` added to its seed
    /// gets. They share the prompt's keys and values. 1 to [`MAX_CHOICES`].
    pub n: usize,
    /// Lower runs first; among equals the earlier request does.
    pub priority: i32,
    /// Keys and values are shared only among requests with the same salt. Empty for all who have none.
    pub cache_salt: String,
    /// The log-probability that the model gave each token of the prompt but the first, and this many of the most probable
    /// tokens in its place, up to [`MAX_PROMPT_LOGPROBS`]. The whole prompt is then computed, whatever is cached.
    pub prompt_logprobs: Option<usize>,
    /// A hidden state of the prompt, as an embedding. [`Pooling::Mean`] computes the whole prompt, whatever is cached.
    pub hidden_state: Option<Pooling>,
    /// A grammar that the output follows, each choice from its start: tokens are chosen among those that it allows, and a text that can
    /// only end has ended, with [`super::FinishReason::Stop`].
    pub constraint: Option<Matcher>,
}

impl Request {
    /// A request for one continuation, and nothing else.
    pub fn new(prompt_ids: Vec<u32>, params: SamplingParams, max_tokens: usize) -> Request {
        Request {
            prompt_ids,
            params,
            max_tokens,
            n: 1,
            priority: 0,
            cache_salt: String::new(),
            prompt_logprobs: None,
            hidden_state: None,
            constraint: None,
        }
    }

    /// Checks it against a model and the longest sequence, `max_model_len`.
    ///
    /// # Errors
    /// `Input`, naming the field that is out of range.
    pub(super) fn check(&self, config: &ModelConfig, max_model_len: usize) -> Result<()> {
        let vocab = config.vocab_size;
        self.params.validate(vocab)?;
        if let Some(constraint) = self.constraint.as_ref().filter(|constraint| constraint.vocab_size() != vocab) {
            let reason = format!("is of a vocabulary of {}, the model's has {vocab}", constraint.vocab_size());
            return Err(Error::input(constraint.field(), reason));
        }
        if self.prompt_ids.is_empty() {
            return Err(Error::input("prompt", "is empty after tokenization; give at least one token"));
        }
        if let Some(id) = self.prompt_ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::input("prompt", format!("token id {id} is outside the vocabulary of {vocab}")));
        }
        let most = MAX_PROMPT_LOGPROBS.min(vocab);
        if let Some(k) = self.prompt_logprobs.filter(|&k| k > most) {
            return Err(Error::input("prompt_logprobs", format!("expected at most {most}, got {k}")));
        }
        if self.n == 0 || self.n > MAX_CHOICES {
            return Err(Error::input("n", format!("expected 1 to {MAX_CHOICES}, got {}", self.n)));
        }
        let prompt = self.prompt_ids.len();
        let is_prompt_wanted = self.prompt_logprobs.is_some() || self.hidden_state.is_some();
        if self.max_tokens == 0 && is_prompt_wanted && prompt <= max_model_len {
            return match self.n {
                1 => Ok(()),
                n => Err(Error::input("n", format!("expected 1 where max_tokens is 0, got {n}"))),
            };
        }
        if self.max_tokens == 0 || prompt.saturating_add(self.max_tokens) > max_model_len {
            let reason = format!(
                "the prompt has {prompt} tokens and {} are to be generated; between 1 and {} fit in --max-model-len {max_model_len}",
                self.max_tokens,
                max_model_len.saturating_sub(prompt)
            );
            return Err(Error::input("max_tokens", reason));
        }
        Ok(())
    }
}
