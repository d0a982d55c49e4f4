//! `verify`: every op and every layer of a model on a device, against the CPU's executable specification.

mod ops;
mod report;

use std::ops::Range;
use std::process::ExitCode;

use clap::builder::FalseyValueParser;

use crate::checkpoint::{Checkpoint, ModelConfig};
use crate::device::cpu::reference;
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::layers::KvCache;
use crate::models::reference::{Arithmetic, ReferenceHead, ReferenceLayer, Rows};
use crate::models::{Batch, Limits, ModelRunner, rope_table};

use self::ops::OpChecks;
use self::report::{Report, print};
use super::options::{DeviceArgs, HeadArgs, load_model, model_dtype};
use super::{Outcome, output};

/// Lengths of the sequences that are run: one past two KV blocks and one within a block.
const LENS: [usize; 2] = [33, 7];

/// Unit roundoff of int8 activations: a code may fall on either side of a tie, as far as whole layers are concerned.
const INT8_ROUNDOFF: f64 = 1.0 / 256.0;

/// Error of a logarithm of a sum of up to some 100,000 exponentials in f32.
const LOG_SUM_ERROR: f64 = 4e-6;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: lowbit verify assets/books-6m-gptq --device cpu")]
pub(super) struct Args {
    /// Model directory or hub id (`org/name[@revision]`).
    model: String,

    /// Check only this many layers, from the first.
    #[arg(long, env = "LOWBIT_LAYERS", value_name = "N")]
    layers: Option<usize>,

    /// Print one JSON object with all checks instead of a line for each.
    #[arg(long, env = "LOWBIT_JSON", value_parser = FalseyValueParser::new())]
    json: bool,

    #[command(flatten)]
    head: HeadArgs,

    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &Args) -> Outcome {
    let checkpoint = args.head.open(&args.model)?;
    let device = args.device.open(model_dtype(&checkpoint)?)?;
    let rows = rows(checkpoint.config());
    let limits = Limits { max_logit_rows: LENS.len(), ..Limits::new(LENS[0], rows.token_ids.len(), LENS.len()) };
    let runner = load_model(&checkpoint, &device, limits, "")?;
    let mut verifier = Verifier { checkpoint: &checkpoint, runner, rows, report: Report::default() };
    verifier.run(args)?;
    let report = verifier.report;
    if args.json {
        output::write_json(&report.json(&args.model, device.name()))?;
    }
    report.verdict()?;
    if !args.json {
        output::write(&report.summary(device.name()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The sequences: tokens from all over the vocabulary, blocks in descending order.
fn rows(config: &ModelConfig) -> Rows {
    let block_size = KvCache::BLOCK_SIZE;
    let max_blocks = LENS[0].div_ceil(block_size);
    let mut rows = Rows {
        token_ids: Vec::new(),
        positions: Vec::new(),
        slots: Vec::new(),
        block_tables: (0..(LENS.len() * max_blocks) as u32).rev().collect(),
        max_blocks,
        lens: LENS.iter().map(|&len| len as u32).collect(),
        starts: vec![0],
    };
    for (s, len) in LENS.into_iter().enumerate() {
        for position in 0..len {
            let mixed = (rows.token_ids.len() as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            let block = rows.block_tables[s * max_blocks + position / block_size] as usize;
            rows.token_ids.push((mixed % config.vocab_size as u64) as u32);
            rows.positions.push(position as u32);
            rows.slots.push((block * block_size + position % block_size) as u32);
        }
        rows.starts.push(rows.token_ids.len() as u32);
    }
    rows
}

struct Verifier<'a> {
    checkpoint: &'a Checkpoint,
    runner: ModelRunner,
    rows: Rows,
    report: Report,
}

impl Verifier<'_> {
    fn run(&mut self, args: &Args) -> Result<()> {
        let config = self.checkpoint.config();
        let device = self.runner.device().clone();
        let dtype = device.activation_dtype();
        let spec = self.runner.model().spec.clone();
        let embedding = self.checkpoint.tensor(&spec.embedding.name)?;
        let mut x = self.embed(config, &embedding, args)?;
        let rope = rope_table(&config.rope, config.head_dim, config.max_position_embeddings, LENS[0]);
        let num_blocks = self.runner.cache().num_blocks;
        for (i, layer) in spec.layers.iter().enumerate().take(args.layers.unwrap_or(usize::MAX)) {
            self.report.enter(format!("layer {i}"));
            let host = ReferenceLayer::read(self.checkpoint, layer)?;
            let exact = host.forward(&x, &self.rows, &rope, num_blocks, Arithmetic::EXACT);
            let mut checks =
                OpChecks { device: &device, rows: &self.rows, rope: &rope, num_blocks, report: &mut self.report };
            checks.layer(&self.runner.model().layers[i], &host, &x, &exact)?;

            let twin = host.forward(&x, &self.rows, &rope, num_blocks, Arithmetic::twin(dtype));
            let got = self.layer(i, &x)?;
            let u = if host.has_int8_activations() { INT8_ROUNDOFF } else { dtype.unit_roundoff() };
            self.report.close("whole layer", &x, &got, &exact.out, &twin.out, u);
            print(&self.report, args.json)?;
            x = exact.out;
        }
        self.head(&x, &ReferenceHead::read(self.checkpoint, &spec)?, args)
    }

    /// Embeds all rows on the device; the specification's residual stream.
    fn embed(&mut self, config: &ModelConfig, embedding: &HostData, args: &Args) -> Result<Vec<f32>> {
        self.report.enter("model".into());
        let expected = reference::embed(embedding, &self.rows.token_ids, config.hidden_size);
        let batch = self.batch(|len| 0..len);
        self.report.exact("embed", "", &self.runner.embed(&batch)?.read()?, &expected);
        print(&self.report, args.json)?;
        Ok(expected)
    }

    /// The rows of each sequence that `part` takes of its length.
    fn batch(&self, part: impl Fn(usize) -> Range<usize>) -> Batch {
        let mut batch = Batch::default();
        let tables = self.rows.block_tables.chunks_exact(self.rows.max_blocks);
        for ((&first, len), table) in self.rows.starts.iter().zip(LENS).zip(tables) {
            let part = part(len);
            let tokens = &self.rows.token_ids[first as usize + part.start..first as usize + part.end];
            batch.push(tokens, part.start, table, false);
        }
        batch
    }

    /// One layer on the device as generation runs it: prompts without their last token, then that token by decoding.
    fn layer(&mut self, index: usize, x: &[f32]) -> Result<Vec<f32>> {
        let width = self.runner.config().hidden_size;
        let last: Vec<usize> = self.rows.starts[1..].iter().map(|&end| end as usize - 1).collect();
        let mut out = vec![0.0; x.len()];
        for (decode, batch) in [(false, self.batch(|len| 0..len - 1)), (true, self.batch(|len| len - 1..len))] {
            let rows: Vec<usize> = (0..self.rows.token_ids.len()).filter(|r| last.contains(r) == decode).collect();
            let before = rows.iter().flat_map(|r| &x[r * width..(r + 1) * width]).copied().collect();
            let after = self.runner.layer(index, &batch, before)?.read()?;
            for (r, row) in rows.into_iter().zip(after.chunks_exact(width)) {
                out[r * width..(r + 1) * width].copy_from_slice(row);
            }
        }
        Ok(out)
    }

    /// Final norm, output head and statistics, for the last row of each sequence.
    fn head(&mut self, x: &[f32], host: &ReferenceHead, args: &Args) -> Result<()> {
        self.report.enter("head".into());
        let (dtype, vocab) = (self.runner.device().activation_dtype(), self.runner.config().vocab_size);
        let width = self.runner.config().hidden_size;
        let last: Vec<u32> = self.rows.starts[1..].iter().map(|&end| end - 1).collect();
        let targets = &self.rows.token_ids[..last.len()];
        let mut computed = self.runner.restore(x.to_vec()).and_then(|states| states.into_logits(&last))?;
        let (logits, got) = (computed.read()?, computed.stats(targets)?);
        let x: Vec<f32> =
            last.iter().flat_map(|&r| &x[r as usize * width..(r as usize + 1) * width]).copied().collect();
        let (exact, twin) = (host.forward(&x, Arithmetic::EXACT), host.forward(&x, Arithmetic::twin(dtype)));
        let kernels: Vec<String> =
            self.runner.model().head.parts().iter().map(|part| part.kernel(last.len())).collect();
        let detail = format!("{}; {}", host.head.weight.scheme(), kernels.join(" + "));
        self.report.bounded("norm and lm_head", &detail, &logits, &exact, &twin, dtype);

        let expected = reference::logits_stats(&logits, targets, vocab);
        let ids = |id: u32| id as f32;
        let best: Vec<f32> = expected.iter().map(|row| ids(row.argmax)).collect();
        self.report.exact("best token", "", &got.iter().map(|row| ids(row.id)).collect::<Vec<_>>(), &best);
        for (got, expected) in got.iter().zip(&expected) {
            let error = (f64::from(got.target_logprob) - (expected.target - expected.log_sum_exp)).abs();
            let largest = expected.log_sum_exp.abs().max(expected.target.abs());
            self.report.within("log-probability", error, LOG_SUM_ERROR + 4.0 * DType::F32.unit_roundoff() * largest);
        }
        print(&self.report, args.json)
    }
}
