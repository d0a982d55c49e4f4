//! Perplexity of a model on a text, in windows, and its divergence from a reference on the same tokens.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::layers::KvCache;
use crate::models::{Batch, Limits, Model};

use super::super::output;
use super::divergence::Divergence;

/// The protocol in words; part of the JSON, so that figures are never compared across protocols.
pub const PROTOCOL: &str = "whole file encoded once, no BOS, disjoint windows of `context` tokens, the last partial window \
                            dropped, each window predicts its own tokens 2..n, exp of the mean NLL";

/// Bytes of logits computed at once.
const LOGITS_BYTES: usize = 64 << 20;

/// Limits of a model that scores `batch` windows of `context` tokens together.
pub fn limits(context: usize, batch: usize, vocab: usize) -> Limits {
    let rows = LOGITS_BYTES / (4 * vocab);
    Limits { max_logit_rows: rows.clamp(1, batch * context), ..Limits::new(context, batch * context, batch) }
}

/// Sums over the tokens predicted so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Perplexity {
    /// Tokens predicted.
    pub tokens: usize,
    /// Windows done.
    pub windows: usize,
    /// Sum of negative log-likelihoods, natural log.
    pub sum: f64,
    /// Sum of their squares.
    pub sum_of_squares: f64,
    /// Spent in the model: layers, head and statistics of all rows.
    pub time: Duration,
}

impl Perplexity {
    pub(super) fn add(&mut self, nll: f64) {
        self.tokens += 1;
        self.sum += nll;
        self.sum_of_squares += nll * nll;
    }

    /// Mean negative log-likelihood.
    pub fn nll(&self) -> f64 {
        self.sum / self.tokens as f64
    }

    /// `exp` of the mean negative log-likelihood.
    pub fn perplexity(&self) -> f64 {
        self.nll().exp()
    }

    /// Standard error of the mean, tokens taken as independent; 0 for less than two. Times the perplexity it is the
    /// perplexity's, to first order.
    pub fn nll_stderr(&self) -> f64 {
        let n = self.tokens as f64;
        if self.tokens < 2 {
            return 0.0;
        }
        let variance = (self.sum_of_squares - self.sum * self.sum / n) / (n - 1.0);
        (variance.max(0.0) / n).sqrt()
    }

    /// Standard error of the perplexity, to first order.
    pub fn stderr(&self) -> f64 {
        self.perplexity() * self.nll_stderr()
    }

    pub(super) fn json(&self, context: usize) -> Value {
        json!({
            "perplexity": self.perplexity(),
            "perplexity_stderr": self.stderr(),
            "nll": self.nll(),
            "nll_stderr": self.nll_stderr(),
            "tokens": self.tokens,
            "windows": self.windows,
            "context": context,
            "prefill_tokens_per_s": output::rounded(output::per_second(self.windows * context, self.time)),
            "protocol": PROTOCOL,
        })
    }

    pub(super) fn text(&self, context: usize) -> String {
        format!(
            "perplexity {:.4} +- {:.4} over {} tokens in {} windows of {context}\n",
            self.perplexity(),
            self.stderr(),
            self.tokens,
            self.windows
        )
    }
}

/// Sequences of one forward pass, each in blocks of its own, and the tokens that they predict.
#[derive(Debug, Default)]
pub(super) struct Pass {
    pub(super) batch: Batch,
    /// Rows whose next token is asked for.
    rows: Vec<u32>,
    targets: Vec<u32>,
    blocks: u32,
}

impl Pass {
    /// Adds a sequence that predicts its tokens from number `start` (at least 1) on.
    pub(super) fn push(&mut self, ids: &[u32], start: usize) {
        let first_row = self.batch.token_ids.len() as u32;
        let blocks = ids.len().div_ceil(KvCache::BLOCK_SIZE) as u32;
        let table: Vec<u32> = (self.blocks..self.blocks + blocks).collect();
        self.blocks += blocks;
        self.batch.push(ids, 0, &table, false);
        self.rows.extend(first_row + start as u32 - 1..first_row + ids.len() as u32 - 1);
        self.targets.extend(&ids[start..]);
    }

    /// Windows that predict all their tokens but the first.
    pub(super) fn of_windows(windows: &[&[u32]]) -> Pass {
        let mut pass = Pass::default();
        windows.iter().for_each(|window| pass.push(window, 1));
        pass
    }

    /// Runs the layers over it.
    fn through_layers(&self, model: &mut Model, cache: &mut KvCache) -> Result<()> {
        model.begin(&self.batch)?;
        (0..model.layers().len()).try_for_each(|layer| model.layer(layer, cache))
    }

    /// Natural log-probabilities of all targets, those of a sequence after another's.
    pub(super) fn logprobs(&self, model: &mut Model, cache: &mut KvCache) -> Result<Vec<f64>> {
        self.through_layers(model, cache)?;
        let at_once = model.limits().max_logit_rows;
        let mut all = Vec::with_capacity(self.targets.len());
        for (rows, targets) in self.rows.chunks(at_once).zip(self.targets.chunks(at_once)) {
            model.compute_logits(rows)?;
            for stats in model.logits_stats(targets)? {
                all.push(-finite(stats.target_logprob)?);
            }
        }
        Ok(all)
    }
}

/// A model that others are held against, on the same passes: it runs once, and its residual streams are kept for the others.
pub struct Reference<'a> {
    model: &'a mut Model,
    cache: KvCache,
    /// Behind the last layer, of each pass from the first on.
    streams: Vec<Vec<f32>>,
    /// Bytes of further ones.
    room: usize,
}

impl<'a> Reference<'a> {
    /// Keeps up to `room` bytes of residual streams; for passes after those it runs again.
    ///
    /// # Errors
    /// `OutOfMemory` for its KV cache.
    pub fn new(model: &'a mut Model, room: usize) -> Result<Reference<'a>> {
        let cache = model.new_cache()?;
        Ok(Reference { model, cache, streams: Vec::new(), room })
    }

    /// Leaves the residual stream of `pass`, which has this `number`, in the model. How long its layers ran.
    fn through_layers(&mut self, pass: &Pass, number: usize) -> Result<Duration> {
        if let Some(stream) = self.streams.get(number) {
            self.model.begin(&pass.batch)?;
            self.model.set_residual(stream.clone())?;
            return Ok(Duration::ZERO);
        }
        let start = Instant::now();
        pass.through_layers(self.model, &mut self.cache)?;
        self.model.device().synchronize()?;
        let time = start.elapsed();
        let bytes = 4 * pass.batch.token_ids.len() * self.model.config().hidden_size;
        if number == self.streams.len() && bytes <= self.room {
            self.streams.push(self.model.residual()?);
            self.room -= bytes;
        }
        Ok(time)
    }
}

/// Windows of `context` tokens that fit in one pass of a model with these limits.
pub(super) fn windows_at_once(limits: &Limits, context: usize) -> Result<usize> {
    let at_once = limits.max_seqs.min(limits.max_batch_tokens / context.max(1));
    if context < 2 || limits.max_model_len < context || at_once == 0 {
        return Err(Error::input("context", format!("{context}: expected 2 to what the model was loaded for")));
    }
    Ok(at_once)
}

/// Perplexity of `ids` in disjoint windows of `context` tokens (at least 2), a last partial one dropped; each window
/// predicts its own tokens from the second on. As many windows at a time as the model's limits (see [`limits`])
/// hold; `progress` sees the sums after each batch of them.
///
/// # Errors
/// `Input` when the limits hold no window; [`Error::Shape`] when the model's logits are not numbers; a device's failure.
pub fn perplexity(
    model: &mut Model,
    ids: &[u32],
    context: usize,
    progress: &mut dyn FnMut(&Perplexity),
) -> Result<Perplexity> {
    score(model, None, ids, context, progress).map(|(perplexity, _)| perplexity)
}

/// [`perplexity`], and the divergence from a reference of the same vocabulary and limits, which is given the same `ids` each time.
pub fn score(
    model: &mut Model,
    mut reference: Option<&mut Reference<'_>>,
    ids: &[u32],
    context: usize,
    progress: &mut dyn FnMut(&Perplexity),
) -> Result<(Perplexity, Option<Divergence>)> {
    let limits = *model.limits();
    let at_once = windows_at_once(&limits, context)?;
    let device = model.device().clone();
    let mut cache = model.new_cache()?;
    let mut divergence = reference.as_ref().map(|_| Divergence::new(model.config().vocab_size));
    let mut score = Perplexity::default();
    let windows: Vec<&[u32]> = ids.chunks_exact(context).collect();
    for (number, windows) in windows.chunks(at_once).enumerate() {
        let pass = Pass::of_windows(windows);
        let start = Instant::now();
        pass.through_layers(model, &mut cache)?;
        device.synchronize()?; // so that each model's time is its own
        score.time += start.elapsed();
        if let (Some(reference), Some(divergence)) = (&mut reference, &mut divergence) {
            divergence.reference.time += reference.through_layers(&pass, number)?;
            divergence.reference.windows += windows.len();
        }
        let at_once = limits.max_logit_rows;
        for (rows, targets) in pass.rows.chunks(at_once).zip(pass.targets.chunks(at_once)) {
            add_rows(model, rows, targets, &mut score)?;
            if let (Some(reference), Some(divergence)) = (&mut reference, &mut divergence) {
                add_rows(reference.model, rows, targets, &mut divergence.reference)?;
                divergence.add(&model.logits()?, &reference.model.logits()?);
            }
        }
        score.windows += windows.len();
        progress(&score);
    }
    Ok((score, divergence))
}

/// Adds what a model says of `targets` at `rows` of the pass that went through its layers.
fn add_rows(model: &mut Model, rows: &[u32], targets: &[u32], sums: &mut Perplexity) -> Result<()> {
    let start = Instant::now();
    model.compute_logits(rows)?;
    let stats = model.logits_stats(targets)?;
    sums.time += start.elapsed();
    stats.iter().try_for_each(|stats| finite(stats.target_logprob).map(|nll| sums.add(nll)))
}

/// The negative log-likelihood of a log-probability that must be a number.
fn finite(logprob: f32) -> Result<f64> {
    if logprob.is_finite() {
        return Ok(-f64::from(logprob));
    }
    Err(Error::Shape { op: "eval", expected: "finite log-probabilities".into(), got: logprob.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::ModelConfig;
    use crate::device::Device;
    use crate::models::{DummyScheme, dummy_config};

    /// NLLs 1, 2, 3: mean 2, variance 1, standard error 1 / sqrt(3).
    #[test]
    fn mean_and_error() {
        let mut score = Perplexity::default();
        assert_eq!(score.nll_stderr(), 0.0);
        [1.0, 2.0, 3.0].into_iter().for_each(|nll| score.add(nll));
        assert_eq!(score.perplexity(), 2.0f64.exp());
        assert!((score.nll_stderr() - 3f64.sqrt().recip()).abs() < 1e-12);
    }

    /// Whether the reference runs again or not, a model is as far from it; what it keeps stays within its room.
    #[test]
    fn a_reference_runs_once() {
        let shape = dummy_config("llama-1.1b").expect("a shape");
        let config = ModelConfig {
            vocab_size: 96,
            hidden_size: 64,
            intermediate_size: 64,
            num_layers: 2,
            num_heads: 2,
            num_kv_heads: 1,
            head_dim: 32,
            windows: vec![None; 2],
            ..shape
        };
        let dummy = |scheme| {
            let limits = limits(8, 2, config.vocab_size);
            let device = Device::cpu();
            Model::dummy(config.clone(), scheme, DummyScheme::Bf16, &device, limits, &mut |_, _| {}).expect("a model")
        };
        let (mut model, mut exact) = (dummy(DummyScheme::WeightOnly(4, 32)), dummy(DummyScheme::Bf16));
        let ids: Vec<u32> = (0..40).map(|i| i * 7 % 96).collect();
        let stream_bytes = 4 * 16 * 64;
        for (room, kept) in [(0, 0), (2 * stream_bytes - 1, 1), (usize::MAX, 3)] {
            let mut reference = Reference::new(&mut exact, room).expect("a cache");
            let mut divergence = || {
                let (_, found) = score(&mut model, Some(&mut reference), &ids, 8, &mut |_| {}).expect("finite");
                let found = found.expect("a divergence");
                let own = Perplexity { time: Duration::ZERO, ..found.reference };
                assert!(found.mean() > 0.0);
                (found.mean(), found.quantile(1.0), found.top1_agreement(), own)
            };
            assert_eq!(divergence(), divergence());
            assert_eq!(reference.streams.len(), kept, "passes of 16, 16 and 8 tokens in {room} bytes");
        }
    }

    /// A window of 17 tokens takes two blocks; a choice of two tokens is predicted from the row before it.
    #[test]
    fn rows_and_blocks() {
        let mut pass = Pass::of_windows(&[&[7; 17]]);
        pass.push(&[1, 2, 3, 4], 2);
        assert_eq!(pass.batch.block_tables, [vec![0, 1], vec![2]]);
        assert_eq!((pass.rows.len(), pass.rows[15], &pass.rows[16..]), (18, 15, &[18, 19][..]));
        assert_eq!(pass.targets[16..], [3, 4]);
    }
}
