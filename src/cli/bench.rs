//! `bench`: tokens a second of prompt processing (`pp`) and decoding (`tg`), in the shape of llama-bench's table.
//!
//! Only the model runs: tokens are random, nothing is tokenized or sampled.

use std::process::ExitCode;
use std::time::Instant;

use clap::builder::FalseyValueParser;
use serde_json::{Value, json};

use crate::checkpoint::{Expected, ModelConfig};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::layers::KvCache;
use crate::models::{Batch, Limits, ModelRunner, expected_tensors};

use super::options::{DeviceArgs, HeadArgs, scheme_summary};
use super::source::SourceArgs;
use super::{Outcome, bandwidth, bench_kernels, bench_serve, output};

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, disable_help_subcommand = true)]
#[command(after_help = "Example: lowbit bench --dummy llama-1.1b --scheme w4a16 -p 512 -n 64 --threads 2")]
pub(super) struct Args {
    #[command(subcommand)]
    what: Option<What>,

    #[command(flatten)]
    source: SourceArgs,

    /// Tokens of the prompt test; 0 leaves it out. Several with commas.
    #[arg(short = 'p', long, env = "LOWBIT_N_PROMPT", value_name = "N", value_delimiter = ',', default_value = "512")]
    n_prompt: Vec<usize>,

    /// Tokens of the decode test; 0 leaves it out. Several with commas.
    #[arg(short = 'n', long, env = "LOWBIT_N_GEN", value_name = "N", value_delimiter = ',', default_value = "128")]
    n_gen: Vec<usize>,

    /// Sequences that decode together. Several with commas.
    #[arg(short, long, env = "LOWBIT_BATCH", value_name = "N", value_delimiter = ',', default_value = "1")]
    batch: Vec<usize>,

    /// Tokens in the context before a test begins. Several with commas.
    #[arg(short, long, env = "LOWBIT_DEPTH", value_name = "N", value_delimiter = ',', default_value = "0")]
    depth: Vec<usize>,

    /// Timed runs of each test, after one that is not timed.
    #[arg(short, long, env = "LOWBIT_REPETITIONS", value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    repetitions: u16,

    /// Most tokens of one forward pass.
    #[arg(long, env = "LOWBIT_MAX_NUM_BATCHED_TOKENS", value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=65536))]
    max_num_batched_tokens: u32,

    /// Print a JSON array with one object for each test instead of a Markdown table.
    #[arg(long, env = "LOWBIT_JSON", value_parser = FalseyValueParser::new())]
    json: bool,

    #[command(flatten)]
    head: HeadArgs,

    #[command(flatten)]
    device: DeviceArgs,
}

/// What to measure instead of a model.
#[derive(Debug, clap::Subcommand)]
enum What {
    /// Measure every op on the GPU: time, bandwidth, operations a second, beside the GPU's ceilings and cuBLASLt.
    Kernels(bench_kernels::Args),
    /// Measure a server that speaks OpenAI's API: throughput, time to first token, latencies.
    Serve(Box<bench_serve::Args>),
}

/// One line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Test {
    /// Tokens of a prompt, or 0 for a decode test.
    prompt: usize,
    /// Tokens to decode in each sequence.
    generate: usize,
    batch: usize,
    depth: usize,
}

/// Largest product of sequences and their length that a test may ask for.
const MAX_TOKENS: usize = 1 << 24;

/// What makes a measurement take less memory.
const MEMORY_FLAGS: &str = "lower --batch, --depth, --n-prompt, --n-gen or --max-num-batched-tokens";

impl Test {
    fn len(self) -> usize {
        self.depth + self.prompt + self.generate
    }

    /// Tokens that its speed counts.
    fn tokens(self) -> usize {
        self.batch * (self.prompt + self.generate)
    }

    fn name(self) -> String {
        let mut name = if self.prompt > 0 { format!("pp{}", self.prompt) } else { format!("tg{}", self.generate) };
        if self.batch > 1 {
            name.push_str(&format!(" b{}", self.batch));
        }
        if self.depth > 0 {
            name.push_str(&format!(" @ d{}", self.depth));
        }
        name
    }
}

pub(super) fn run(args: &Args) -> Outcome {
    match &args.what {
        Some(What::Kernels(args)) => return bench_kernels::run(args),
        Some(What::Serve(args)) => return bench_serve::run(args),
        None => {}
    }
    let tests = args.tests()?;
    args.device.start_threads()?;
    let source = args.source.open(&args.head)?;
    let config = source.config();
    let len = tests.iter().map(|t| t.len()).max().unwrap_or(0);
    if len > config.max_position_embeddings {
        let reason = format!("{len} tokens in a context: the model has {} positions", config.max_position_embeddings);
        return Err(Error::input("--n-prompt, --n-gen, --depth", reason));
    }
    let device = args.device.open(source.dtype())?;
    // Before the model, which may leave no room for the measurement.
    let ceiling = bandwidth::bytes_per_second(&device)?;
    let limits = args.limits(&tests);
    let start = Instant::now();
    let mut model = source.load(&device, limits, MEMORY_FLAGS)?;
    device.synchronize()?;
    let load_seconds = start.elapsed().as_secs_f64();
    let bar = output::progress("tests");
    bar.set_length((tests.len() * (1 + usize::from(args.repetitions))) as u64);
    let mut results = Vec::new();
    for test in tests {
        time(&mut model, test)?;
        bar.inc(1);
        let mut speeds = Vec::new();
        for _ in 0..args.repetitions {
            speeds.push(time(&mut model, test)?);
            bar.inc(1);
        }
        results.push((test, speeds));
    }
    bar.finish_and_clear();
    let report = Report { load_seconds, ..Report::new(args, &model, &device, ceiling) };
    if args.json {
        output::write_json(&results.iter().map(|(test, speeds)| report.json(*test, speeds)).collect())?;
    } else {
        output::write(&report.table(&results))?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Args {
    /// The model's name without the folders it lies in.
    fn name(&self) -> String {
        let name = self.source.name();
        let last = std::path::Path::new(name).file_name().filter(|_| std::path::Path::new(name).is_dir());
        last.map_or(name.to_owned(), |last| last.to_string_lossy().into_owned())
    }

    fn tests(&self) -> Result<Vec<Test>> {
        let mut tests = Vec::new();
        for &depth in &self.depth {
            tests.extend(self.n_prompt.iter().map(|&prompt| Test { prompt, generate: 0, batch: 1, depth }));
            for &generate in &self.n_gen {
                tests.extend(self.batch.iter().map(|&batch| Test { prompt: 0, generate, batch, depth }));
            }
        }
        tests.retain(|t| t.prompt + t.generate > 0);
        let too_large = |t: &&Test| {
            let len = t.depth.checked_add(t.prompt.max(t.generate));
            t.batch == 0 || len.and_then(|len| len.checked_mul(t.batch)).is_none_or(|tokens| tokens > MAX_TOKENS)
        };
        if tests.is_empty() {
            return Err(Error::input("--n-prompt, --n-gen", "there is nothing to test: at least one must be above 0"));
        }
        match tests.iter().find(too_large) {
            Some(t) => Err(Error::input(
                "--batch",
                format!("{} sequences: expected at least 1, and at most {MAX_TOKENS} tokens in all", t.batch),
            )),
            None => Ok(tests),
        }
    }

    fn limits(&self, tests: &[Test]) -> Limits {
        let most = |f: fn(&Test) -> usize| tests.iter().map(f).max().unwrap_or(1);
        let batch = most(|t| t.batch);
        let rows = most(|t| t.batch * (t.depth + t.prompt)).min(self.max_num_batched_tokens as usize).max(batch);
        let blocks = most(|t| t.batch * t.len().div_ceil(KvCache::BLOCK_SIZE));
        Limits { kv_blocks: blocks, ..Limits::new(most(|t| t.len()), rows, batch) }
    }
}

/// Tokens a second when one sequence decodes `tokens` tokens from an empty context, after the same once untimed.
pub(super) fn decode_speed(model: &mut ModelRunner, tokens: usize) -> Result<f64> {
    let test = Test { prompt: 0, generate: tokens, batch: 1, depth: 0 };
    time(model, test)?;
    time(model, test)
}

/// Runs a test once; tokens a second, the context's filling excluded.
fn time(model: &mut ModelRunner, test: Test) -> Result<f64> {
    let blocks = test.len().div_ceil(KvCache::BLOCK_SIZE) as u32;
    let tables: Vec<Vec<u32>> = (0..test.batch as u32).map(|s| (s * blocks..(s + 1) * blocks).collect()).collect();
    let device = model.device().clone();
    for table in &tables {
        prefill(model, 0, test.depth, table)?;
    }
    device.synchronize()?;
    let start = Instant::now();
    if test.prompt > 0 {
        prefill(model, test.depth, test.prompt, &tables[0])?;
        device.synchronize()?;
    }
    for step in 0..test.generate {
        let mut batch = Batch::default();
        for (s, table) in tables.iter().enumerate() {
            batch.push(&[token(model, step + s)], test.depth + step, table, true);
        }
        model.run(&batch)?;
        // A server needs this step's token before the next, so the next may not be enqueued yet.
        device.synchronize()?;
    }
    Ok(test.tokens() as f64 / start.elapsed().as_secs_f64())
}

/// Computes `len` tokens from position `past` on, in passes as large as the limits allow; logits of the last.
fn prefill(model: &mut ModelRunner, past: usize, len: usize, table: &[u32]) -> Result<()> {
    let chunk = model.limits().max_batch_tokens;
    for start in (0..len).step_by(chunk) {
        let end = len.min(start + chunk);
        let tokens: Vec<u32> = (start..end).map(|i| token(model, i)).collect();
        let mut batch = Batch::default();
        batch.push(&tokens, past + start, table, end == len);
        model.run(&batch)?;
    }
    Ok(())
}

/// A token that looks random, the same for the same `i`.
fn token(model: &ModelRunner, i: usize) -> u32 {
    let mixed = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    (mixed % model.config().vocab_size as u64) as u32
}

/// Parameters of a model, from its shape.
pub(super) fn parameters(config: &ModelConfig) -> u64 {
    let count = |expected: Expected| match expected {
        Expected::Linear { n, k, bias, .. } => (n * k + if bias { n } else { 0 }) as u64,
        Expected::Tensor { shape, .. } => shape.iter().product::<usize>() as u64,
    };
    expected_tensors(config).into_iter().map(count).sum()
}

/// What all lines of the table share.
struct Report {
    model: String,
    scheme: String,
    device: &'static str,
    threads: usize,
    parameters: u64,
    /// Weights that one step of decoding reads.
    weight_bytes: u64,
    ceiling: f64,
    ceiling_method: &'static str,
    /// From opened files, or nothing, to a model that can run.
    load_seconds: f64,
}

fn mean_and_deviation(x: &[f64]) -> (f64, f64) {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    let squares: f64 = x.iter().map(|x| (x - mean).powi(2)).sum();
    (mean, if x.len() > 1 { (squares / (x.len() - 1) as f64).sqrt() } else { 0.0 })
}

impl Report {
    fn new(args: &Args, runner: &ModelRunner, device: &Device, ceiling: f64) -> Report {
        let model = runner.model();
        let quantized = model.head.schemes().find(|scheme| !scheme.is_dense());
        let head = quantized.map_or(String::new(), |scheme| format!(", head {scheme}"));
        Report {
            model: args.name(),
            scheme: scheme_summary(model) + &head,
            device: device.name(),
            threads: rayon::current_num_threads(),
            parameters: parameters(&model.config),
            weight_bytes: model.weight_bytes() as u64,
            ceiling,
            ceiling_method: bandwidth::method(device),
            load_seconds: 0.0,
        }
    }

    /// Bytes of weights read a second; a decoding step reads all of them once, a prompt's passes are not bound by it.
    fn bytes_per_second(&self, test: Test, speed: f64) -> Option<f64> {
        (test.generate > 0).then(|| self.weight_bytes as f64 * speed / test.batch as f64)
    }

    fn json(&self, test: Test, speeds: &[f64]) -> Value {
        let (mean, deviation) = mean_and_deviation(speeds);
        let read = self.bytes_per_second(test, mean);
        json!({
            "model": self.model,
            "size_bytes": self.weight_bytes,
            "params": self.parameters,
            "scheme": self.scheme,
            "device": self.device,
            "threads": self.threads,
            "test": test.name(),
            "n_prompt": test.prompt,
            "n_gen": test.generate,
            "batch": test.batch,
            "depth": test.depth,
            "tokens_per_s": mean,
            "tokens_per_s_stddev": deviation,
            "samples": speeds,
            "weight_bytes_per_s": read,
            "ceiling_bytes_per_s": self.ceiling,
            "load_s": self.load_seconds,
            "ceiling_fraction": read.map(|read| read / self.ceiling),
        })
    }

    fn table(&self, results: &[(Test, Vec<f64>)]) -> String {
        let header = ["model", "size", "params", "scheme", "device", "threads", "test", "t/s", "GB/s", "of ceiling"];
        let row = |(test, speeds): &(Test, Vec<f64>)| {
            let (mean, deviation) = mean_and_deviation(speeds);
            let read = self.bytes_per_second(*test, mean);
            let fraction = read.map(|read| format!("{:.0} %", 100.0 * read / self.ceiling));
            vec![
                self.model.clone(),
                output::bytes(self.weight_bytes),
                output::count(self.parameters),
                self.scheme.clone(),
                self.device.into(),
                self.threads.to_string(),
                test.name(),
                format!("{mean:.2} ± {deviation:.2}"),
                read.map_or("".into(), |read| format!("{:.1}", read / 1e9)),
                fraction.unwrap_or_default(),
            ]
        };
        let rows: Vec<_> = results.iter().map(row).collect();
        let mut text = output::table(&header, &rows, &["size", "params", "threads", "t/s", "GB/s", "of ceiling"]);
        text.push_str(&format!("\nceiling: {:.1} GB/s, {}\n", self.ceiling / 1e9, self.ceiling_method));
        text.push_str(&format!("loaded in {:.2} s\n", self.load_seconds));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics() {
        assert_eq!(mean_and_deviation(&[2.0]), (2.0, 0.0));
        assert_eq!(mean_and_deviation(&[1.0, 2.0, 3.0]), (2.0, 1.0));
    }

    #[test]
    fn names_are_those_of_llama_bench() {
        let test = Test { prompt: 512, generate: 0, batch: 1, depth: 0 };
        assert_eq!(test.name(), "pp512");
        assert_eq!(Test { prompt: 0, generate: 128, batch: 8, depth: 4096 }.name(), "tg128 b8 @ d4096");
    }
}
