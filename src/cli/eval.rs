//! `eval`: perplexity of a model on a text.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::FalseyValueParser;
use serde_json::json;

use crate::error::{Error, Result};
use crate::layers::KvCache;
use crate::models::{Batch, Limits, Model};
use crate::text::tokenizer::Tokenizer;

use super::options::{DeviceArgs, load_model, model_dtype, open_checkpoint};
use super::{Outcome, output};

/// The protocol in words; part of the JSON, so that figures are never compared across protocols.
const PROTOCOL: &str = "whole file encoded once, no BOS, disjoint windows of `context` tokens, the last partial window \
                        dropped, each window predicts its own tokens 2..n, exp of the mean NLL";

/// Bytes of logits computed at once.
const LOGITS_BYTES: usize = 64 << 20;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: lowbit eval assets/books-6m-gptq --text README.md --context 128")]
pub(super) struct Args {
    /// Model directory or hub id (`org/name[@revision]`).
    model: String,

    /// UTF-8 text to predict.
    #[arg(long, env = "LOWBIT_TEXT", value_name = "FILE")]
    text: PathBuf,

    /// Tokens of a window.
    #[arg(short, long, env = "LOWBIT_CONTEXT", value_name = "N", default_value_t = 512)]
    context: usize,

    /// Stop after this many windows.
    #[arg(short, long, env = "LOWBIT_WINDOWS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    windows: Option<u32>,

    /// Windows computed together.
    #[arg(short, long, env = "LOWBIT_BATCH", value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: u16,

    /// Print one JSON object: `perplexity`, `nll` (mean, natural log), their standard errors, `tokens` predicted,
    /// `windows`, `context`, `protocol`.
    #[arg(long, env = "LOWBIT_JSON", value_parser = FalseyValueParser::new())]
    json: bool,

    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &Args) -> Outcome {
    let text = std::fs::read_to_string(&args.text).map_err(Error::io(&args.text))?;
    let checkpoint = open_checkpoint(&args.model)?;
    let config = checkpoint.config();
    let context = args.context;
    if !(2..=config.max_position_embeddings).contains(&context) {
        let reason = format!("{context}: expected 2 to the model's {} positions", config.max_position_embeddings);
        return Err(Error::input("--context", reason));
    }
    let ids = Tokenizer::load(checkpoint.dir(), config.vocab_size)?.encode(&text, false)?;
    let windows = (ids.len() / context).min(args.windows.map_or(usize::MAX, |n| n as usize));
    if windows == 0 {
        let reason = format!(
            "{} has {} tokens, less than one window of {context}; lower --context",
            args.text.display(),
            ids.len()
        );
        return Err(Error::input("--text", reason));
    }
    let batch = usize::from(args.batch).min(windows);
    let device = args.device.open(model_dtype(&checkpoint)?)?;
    let mut model = load_model(&checkpoint, &device, limits(context, batch, config.vocab_size))?;

    let bar = output::progress("windows");
    let score = perplexity(&mut model, &ids[..windows * context], context, &mut |score| {
        bar.set_length(windows as u64);
        bar.set_position(score.windows as u64);
        bar.set_message(format!("perplexity {:.4}", score.perplexity()));
    })?;
    bar.finish_and_clear();
    if args.json {
        output::write_json(&json!({
            "perplexity": score.perplexity(),
            "perplexity_stderr": score.perplexity() * score.nll_stderr(),
            "nll": score.nll(),
            "nll_stderr": score.nll_stderr(),
            "tokens": score.tokens,
            "windows": score.windows,
            "context": context,
            "protocol": PROTOCOL,
        }))?;
    } else {
        let error = score.perplexity() * score.nll_stderr();
        output::write(&format!(
            "perplexity {:.4} +- {error:.4} over {} tokens in {} windows of {context}\n",
            score.perplexity(),
            score.tokens,
            score.windows
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

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
}

impl Perplexity {
    fn add(&mut self, nll: f64) {
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
    let limits = *model.limits();
    let at_once = limits.max_seqs.min(limits.max_batch_tokens / context.max(1));
    if context < 2 || limits.max_model_len < context || at_once == 0 {
        return Err(Error::input("context", format!("{context}: expected 2 to what the model was loaded for")));
    }
    let mut cache = model.new_cache()?;
    let mut score = Perplexity::default();
    let windows: Vec<&[u32]> = ids.chunks_exact(context).collect();
    for windows in windows.chunks(at_once) {
        let mut batch = Batch::default();
        let mut rows = Vec::new();
        let mut targets = Vec::new();
        let blocks = context.div_ceil(KvCache::BLOCK_SIZE) as u32;
        for (w, window) in (0..).zip(windows) {
            let first_row = batch.token_ids.len() as u32;
            batch.push(window, 0, &(w * blocks..(w + 1) * blocks).collect::<Vec<_>>(), false);
            rows.extend(first_row..first_row + context as u32 - 1);
            targets.extend(&window[1..]);
        }
        model.begin(&batch)?;
        for layer in 0..model.layers().len() {
            model.layer(layer, &mut cache)?;
        }
        for (rows, targets) in rows.chunks(limits.max_logit_rows).zip(targets.chunks(limits.max_logit_rows)) {
            model.compute_logits(rows)?;
            for stats in model.logits_stats(targets)? {
                if !stats.target_logprob.is_finite() {
                    let got = stats.target_logprob.to_string();
                    return Err(Error::Shape { op: "eval", expected: "finite log-probabilities".into(), got });
                }
                score.add(-f64::from(stats.target_logprob));
            }
        }
        score.windows += windows.len();
        progress(&score);
    }
    Ok(score)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// NLLs 1, 2, 3: mean 2, variance 1, standard error 1 / sqrt(3).
    #[test]
    fn mean_and_error() {
        let mut score = Perplexity::default();
        assert_eq!(score.nll_stderr(), 0.0);
        [1.0, 2.0, 3.0].into_iter().for_each(|nll| score.add(nll));
        assert_eq!(score.perplexity(), 2.0f64.exp());
        assert!((score.nll_stderr() - 3f64.sqrt().recip()).abs() < 1e-12);
    }
}
