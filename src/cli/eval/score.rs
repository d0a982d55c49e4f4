//! Scoring a text: a model over its windows, and its divergence from a reference on the same tokens.

use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::layers::KvCache;
use crate::models::{Batch, HiddenStates, Limits, Logits, ModelRunner};

use super::divergence::Divergence;
use super::perplexity::Perplexity;

/// Bytes of logits computed at once.
const LOGITS_BYTES: usize = 64 << 20;

/// Limits of a model that scores `batch` windows of `context` tokens together.
pub fn limits(context: usize, batch: usize, vocab: usize) -> Limits {
    let rows = LOGITS_BYTES / (4 * vocab);
    Limits { max_logit_rows: rows.clamp(1, batch * context), ..Limits::new(context, batch * context, batch) }
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

    /// Natural log-probabilities of all targets, those of a sequence after another's.
    pub(super) fn logprobs(&self, runner: &mut ModelRunner) -> Result<Vec<f64>> {
        let at_once = runner.limits().max_logit_rows;
        let mut states = runner.forward(&self.batch)?;
        let mut all = Vec::with_capacity(self.targets.len());
        for (rows, targets) in self.rows.chunks(at_once).zip(self.targets.chunks(at_once)) {
            for stats in states.logits(rows)?.stats(targets)? {
                all.push(-finite(stats.target_logprob)?);
            }
        }
        Ok(all)
    }
}

/// A model that others are held against, on the same passes: it runs once, and its residual streams are kept for the others.
pub struct Reference<'a> {
    runner: &'a mut ModelRunner,
    /// Behind the last layer, of each pass from the first on.
    streams: Vec<Vec<f32>>,
    /// Bytes of further ones.
    room: usize,
}

impl<'a> Reference<'a> {
    /// Keeps up to `room` bytes of residual streams; for passes after those it runs again.
    pub fn new(runner: &'a mut ModelRunner, room: usize) -> Reference<'a> {
        Reference { runner, streams: Vec::new(), room }
    }

    /// Hidden states of `pass`, which has this `number`, and how long its layers ran.
    fn forward(&mut self, pass: &Pass, number: usize) -> Result<(HiddenStates<'_>, Duration)> {
        if let Some(stream) = self.streams.get(number) {
            return Ok((self.runner.restore(stream.clone())?, Duration::ZERO));
        }
        let (device, hidden) = (self.runner.device().clone(), self.runner.config().hidden_size);
        let start = Instant::now();
        let states = self.runner.forward(&pass.batch)?;
        device.synchronize()?;
        let time = start.elapsed();
        let bytes = 4 * pass.batch.token_ids.len() * hidden;
        if number == self.streams.len() && bytes <= self.room {
            self.streams.push(states.read()?);
            self.room -= bytes;
        }
        Ok((states, time))
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
/// `Input` when the limits hold no window; [`Error::NotFinite`] when the model's logits are not numbers; a device's failure.
pub fn perplexity(
    runner: &mut ModelRunner,
    ids: &[u32],
    context: usize,
    progress: &mut dyn FnMut(&Perplexity),
) -> Result<Perplexity> {
    score(runner, None, ids, context, progress).map(|(perplexity, _)| perplexity)
}

/// [`perplexity`], and the divergence from a reference of the same vocabulary and limits, which is given the same `ids` each time.
pub fn score(
    runner: &mut ModelRunner,
    mut reference: Option<&mut Reference<'_>>,
    ids: &[u32],
    context: usize,
    progress: &mut dyn FnMut(&Perplexity),
) -> Result<(Perplexity, Option<Divergence>)> {
    let limits = *runner.limits();
    let at_once = windows_at_once(&limits, context)?;
    let device = runner.device().clone();
    let mut divergence = reference.as_ref().map(|_| Divergence::new(runner.config().vocab_size));
    let mut score = Perplexity::default();
    let windows: Vec<&[u32]> = ids.chunks_exact(context).collect();
    for (number, windows) in windows.chunks(at_once).enumerate() {
        let pass = Pass::of_windows(windows);
        let start = Instant::now();
        let mut states = runner.forward(&pass.batch)?;
        device.synchronize()?; // so that each model's time is its own
        score.time += start.elapsed();
        let mut other = None;
        if let (Some(reference), Some(divergence)) = (&mut reference, &mut divergence) {
            let (states, time) = reference.forward(&pass, number)?;
            divergence.reference.time += time;
            divergence.reference.windows += windows.len();
            other = Some(states);
        }
        let at_once = limits.max_logit_rows;
        for (rows, targets) in pass.rows.chunks(at_once).zip(pass.targets.chunks(at_once)) {
            let logits = add_rows(&mut states, rows, targets, &mut score)?;
            if let (Some(other), Some(divergence)) = (&mut other, &mut divergence) {
                let other = add_rows(other, rows, targets, &mut divergence.reference)?;
                divergence.add(&logits.read()?, &other.read()?);
            }
        }
        score.windows += windows.len();
        progress(&score);
    }
    Ok((score, divergence))
}

/// Adds what a model says of `targets` at `rows` of a pass. Returns the logits of these rows.
fn add_rows<'a>(
    states: &'a mut HiddenStates<'_>,
    rows: &[u32],
    targets: &[u32],
    sums: &mut Perplexity,
) -> Result<Logits<'a>> {
    let start = Instant::now();
    let mut logits = states.logits(rows)?;
    let stats = logits.stats(targets)?;
    sums.time += start.elapsed();
    stats.iter().try_for_each(|stats| finite(stats.target_logprob).map(|nll| sums.add(nll)))?;
    Ok(logits)
}

/// The negative log-likelihood of a log-probability that must be a number.
fn finite(logprob: f32) -> Result<f64> {
    if logprob.is_finite() {
        return Ok(-f64::from(logprob));
    }
    Err(Error::not_finite("log-probabilities", logprob))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::ModelConfig;
    use crate::device::Device;
    use crate::models::{DummyScheme, Model, dummy_config};

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
            let model = Model::dummy(config.clone(), scheme, DummyScheme::Bf16, &device, &limits, &mut |_, _| {});
            ModelRunner::new(model.expect("a model"), limits).expect("room")
        };
        let (mut model, mut exact) = (dummy(DummyScheme::WeightOnly(4, 32)), dummy(DummyScheme::Bf16));
        let ids: Vec<u32> = (0..40).map(|i| i * 7 % 96).collect();
        let stream_bytes = 4 * 16 * 64;
        for (room, kept) in [(0, 0), (2 * stream_bytes - 1, 1), (usize::MAX, 3)] {
            let mut reference = Reference::new(&mut exact, room);
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
