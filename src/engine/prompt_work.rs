//! What is computed of a prompt beside its keys and values: log-probabilities of its tokens, its hidden state.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::models::HiddenStates;

use super::event::PromptOutput;
use super::request::{Pooling, Request};
use super::sampling::{Sampled, score};

/// A prompt's outputs, gathered over the passes that compute it.
#[derive(Debug)]
pub(super) struct PromptWork {
    prompt_len: usize,
    logprobs: Option<usize>,
    pooling: Option<Pooling>,
    submitted: Instant,
    /// When the request was first admitted, and how many of its tokens were in the cache then.
    admitted: Option<(Instant, usize)>,
    /// Tokens whose rows were seen. They may be computed again, but are not seen again.
    seen: usize,
    scores: Vec<Sampled>,
    /// The hidden state, or the sum of those seen.
    hidden: Vec<f64>,
}

impl PromptWork {
    /// What `request` asks for.
    pub(super) fn new(request: &Request) -> PromptWork {
        PromptWork {
            prompt_len: request.prompt_ids.len(),
            logprobs: request.prompt_logprobs,
            pooling: request.hidden_state,
            submitted: Instant::now(),
            admitted: None,
            seen: 0,
            scores: Vec::new(),
            hidden: Vec::new(),
        }
    }

    /// Records that the request was admitted, `cached_tokens` of it in the cache; true the first time.
    pub(super) fn admit(&mut self, cached_tokens: usize) -> bool {
        let is_first = self.admitted.is_none();
        self.admitted.get_or_insert((Instant::now(), cached_tokens));
        is_first
    }

    /// Until it was first admitted.
    pub(super) fn waited(&self) -> Duration {
        self.admitted.map_or(Duration::ZERO, |(at, _)| at - self.submitted)
    }

    /// Leading tokens whose rows are not needed; without end where none are.
    pub(super) fn reusable(&self) -> usize {
        match self.logprobs.is_some() || self.pooling == Some(Pooling::Mean) {
            true => self.seen,
            false => usize::MAX,
        }
    }

    /// Takes what is wanted from a pass that computed the tokens `part`, the first of them its row number `row`; `rows` at a time.
    ///
    /// # Errors
    /// `NotFinite` when the model computed what is no number; the device's failure.
    pub(super) fn observe(
        &mut self,
        pass: &mut HiddenStates<'_>,
        row: usize,
        part: Range<usize>,
        prompt_ids: &[u32],
        rows: usize,
    ) -> Result<()> {
        let new = self.seen.max(part.start)..part.end.min(self.prompt_len);
        let row_of = |token: usize| (row + token - part.start) as u32;
        let passes = |tokens: Range<usize>| {
            let end = tokens.end;
            tokens.step_by(rows.max(1)).map(move |first| first..end.min(first + rows))
        };
        if let Some(top) = self.logprobs {
            // The last token's row is about what is generated.
            for tokens in passes(new.start..new.end.min(self.prompt_len - 1)) {
                let wanted: Vec<u32> = tokens.clone().map(row_of).collect();
                let targets = &prompt_ids[tokens.start + 1..tokens.end + 1];
                self.scores.extend(score_rows(pass, &wanted, targets, top)?);
            }
        }
        let pooled = match self.pooling {
            Some(Pooling::Mean) => new.clone(),
            Some(Pooling::Last) => new.start.max(self.prompt_len - 1)..new.end,
            None => new.end..new.end,
        };
        for tokens in passes(pooled) {
            let wanted: Vec<u32> = tokens.map(row_of).collect();
            let states = pass.normed(&wanted)?;
            for state in states.chunks_exact(states.len() / wanted.len()) {
                if let Some(x) = state.iter().find(|x| !x.is_finite()) {
                    return Err(Error::not_finite("hidden state", x));
                }
                self.hidden.resize(state.len(), 0.0);
                self.hidden.iter_mut().zip(state).for_each(|(sum, &x)| *sum += f64::from(x));
            }
        }
        self.seen = self.seen.max(new.end);
        Ok(())
    }

    /// What came of it, when the whole prompt is computed.
    pub(super) fn finish(self) -> PromptOutput {
        let count = if self.pooling == Some(Pooling::Mean) { self.prompt_len as f64 } else { 1.0 };
        PromptOutput {
            cached_tokens: self.admitted.map_or(0, |(_, cached_tokens)| cached_tokens),
            logprobs: self.scores,
            hidden_state: self.hidden.into_iter().map(|sum| (sum / count) as f32).collect(),
        }
    }
}

/// The log-probability of each target in its row, with the `top` best. Up to one of these the device tells; for more the rows
/// are copied.
fn score_rows(pass: &mut HiddenStates<'_>, rows: &[u32], targets: &[u32], top: usize) -> Result<Vec<Sampled>> {
    let mut logits = pass.logits(rows)?;
    if top > 1 {
        let (vocab, logits) = (logits.vocab_size(), logits.read()?);
        return logits.chunks_exact(vocab).zip(targets).map(|(row, &id)| score(row, id, top)).collect();
    }
    let stats = logits.stats(targets)?.into_iter().zip(targets);
    let scored = stats.map(|(s, &id)| match s.target_logprob.is_nan() {
        true => Err(Error::not_finite("logits of the prompt", s.target_logprob)),
        false => {
            let best = std::iter::once((s.id, s.logprob)).take(top).collect();
            Ok(Sampled { id, logprob: s.target_logprob, top: best })
        }
    });
    scored.collect()
}
