//! The fields by which every API says how tokens are chosen and what ends a text; OpenAI's and vLLM's.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::engine::sampling::SamplingParams;
use crate::server::error::ApiError;
use crate::server::generation::TextOptions;
use crate::text::Tokenizer;

use super::fields::OneOrMany;

/// Most words that one request may ban, and tokens that it may name in one field: each takes time at every step.
const MAX_NAMED: usize = 1024;
/// Longest word that may be banned, in bytes.
const MAX_WORD: usize = 256;

/// Fails for a list that is longer than anyone needs.
fn check_count(param: &str, count: usize) -> Result<(), ApiError> {
    match count <= MAX_NAMED {
        true => Ok(()),
        false => Err(ApiError::invalid(param, format!("expected at most {MAX_NAMED} entries, got {count}"))),
    }
}

/// Fields of a request that generates.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(in crate::server) struct SamplingFields {
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    seed: Option<i64>,
    stop: Option<OneOrMany<String>>,
    stop_token_ids: Option<Vec<u32>>,
    include_stop_str_in_output: bool,
    ignore_eos: bool,
    min_tokens: Option<usize>,
    skip_special_tokens: Option<bool>,
    bad_words: Option<Vec<String>>,
    /// Choices; 1 without it.
    pub(in crate::server) n: Option<usize>,
    best_of: Option<usize>,
    use_beam_search: bool,
    /// Lower runs first.
    pub(in crate::server) priority: i32,
    /// With whom cached prompts are shared.
    pub(in crate::server) cache_salt: Option<String>,
    /// Log-probabilities of the prompt's tokens, and this many alternatives to each.
    pub(in crate::server) prompt_logprobs: Option<usize>,
}

impl SamplingFields {
    /// Parameters and text options over a model's `defaults`.
    ///
    /// # Errors
    /// 400 naming the field that is out of range.
    pub(in crate::server) fn resolve(
        &self,
        defaults: &SamplingParams,
        default_stop: &[String],
        tokenizer: &Tokenizer,
    ) -> Result<(SamplingParams, TextOptions), ApiError> {
        if self.use_beam_search {
            return Err(ApiError::invalid("use_beam_search", "is not supported"));
        }
        if self.best_of.is_some_and(|best_of| best_of != self.n.unwrap_or(1)) {
            return Err(ApiError::invalid("best_of", "is not supported where it differs from n"));
        }
        let top_k = match self.top_k {
            None => defaults.top_k,
            Some(-1 | 0) => 0,
            Some(k) => u32::try_from(k).map_err(|_| {
                ApiError::invalid("top_k", format!("expected a number of tokens, 0 or -1 for all, got {k}"))
            })?,
        };
        let mut params = SamplingParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k,
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            // Any 64 bits will do.
            seed: self.seed.map(|seed| seed as u64),
            min_tokens: self.min_tokens.unwrap_or(defaults.min_tokens),
            ignore_eos: self.ignore_eos,
            ..defaults.clone()
        };
        check_count("logit_bias", self.logit_bias.as_ref().map_or(0, BTreeMap::len))?;
        check_count("stop_token_ids", self.stop_token_ids.as_ref().map_or(0, Vec::len))?;
        check_count("bad_words", self.bad_words.as_ref().map_or(0, Vec::len))?;
        for (id, bias) in self.logit_bias.iter().flatten() {
            let id: u32 =
                id.trim().parse().map_err(|_| ApiError::invalid("logit_bias", format!("`{id}` is not a token id")))?;
            if !(-100.0..=100.0).contains(bias) {
                return Err(ApiError::invalid("logit_bias", format!("token {id}: expected -100 to 100, got {bias}")));
            }
            *params.logit_bias.entry(id).or_default() += bias;
        }
        for &id in self.stop_token_ids.iter().flatten() {
            if !params.stop_token_ids.contains(&id) {
                params.stop_token_ids.push(id);
            }
        }
        self.ban_words(&mut params, tokenizer)?;
        let stop = self.stop.clone().map_or_else(|| default_stop.to_vec(), OneOrMany::into_vec);
        let text = TextOptions {
            stop,
            include_stop_str_in_output: self.include_stop_str_in_output,
            skip_special_tokens: self.skip_special_tokens.unwrap_or(true),
            keep: Vec::new(),
            continuing: false,
        };
        Ok((params, text))
    }

    /// Bans words as vLLM does: as tokens at the start of a text, and after a blank.
    fn ban_words(&self, params: &mut SamplingParams, tokenizer: &Tokenizer) -> Result<(), ApiError> {
        let words = self.bad_words.as_deref().unwrap_or_default();
        for word in words {
            if word.trim().is_empty() || word.len() > MAX_WORD {
                return Err(ApiError::invalid("bad_words", format!("expected words of 1 to {MAX_WORD} bytes")));
            }
            let bare = word.trim_start();
            let mut variants = vec![tokenizer.encode(bare, false)?];
            let spaced = tokenizer.encode(&format!(" {bare}"), false)?;
            if !variants.contains(&spaced) {
                variants.push(spaced);
            }
            for ids in variants {
                match ids[..] {
                    [] => {}
                    [id] => *params.logit_bias.entry(id).or_default() = f32::NEG_INFINITY,
                    _ => params.sequence_bias.push((ids, f32::NEG_INFINITY)),
                }
            }
        }
        Ok(())
    }
}
