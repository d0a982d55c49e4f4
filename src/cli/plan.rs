//! `plan`: whether a model fits a GPU that need not be here, and what it would reach at best.

use std::process::ExitCode;

use clap::builder::FalseyValueParser;
use serde_json::{Value, json};

use crate::error::Result;
use crate::models::{GPUS, Gpu, Limits, MemoryPlan, Work};

use super::engine_limits::parse_part;
use super::generate::MAX_BATCH_TOKENS;
use super::inspect::Lines;
use super::options::HeadArgs;
use super::source::SourceArgs;
use super::{Outcome, output};

/// Tokens of the prompt that times are given for, where sequences may be so long.
const PROMPT: usize = 2048;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: lowbit plan assets/books-6m-gptq --gpu a100-80gb --max-num-seqs 64\n\n\
    Without the model: lowbit plan --dummy llama-3.1-70b --scheme w4a16 --gpu a100-80gb --max-num-seqs 16 --max-model-len 8192")]
pub(super) struct Args {
    #[command(flatten)]
    source: SourceArgs,

    /// The GPU, by its name and memory; an unknown name lists them.
    #[arg(long, env = "LOWBIT_GPU", value_name = "NAME", default_value = "a100-80gb", value_parser = parse_gpu)]
    gpu: &'static Gpu,

    /// Longest sequence; without it what the model was made for.
    #[arg(long, env = "LOWBIT_MAX_MODEL_LEN", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    max_model_len: Option<u32>,

    /// Sequences at once, each as long as that.
    #[arg(long, env = "LOWBIT_MAX_NUM_SEQS", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    max_num_seqs: u32,

    /// Part of the memory that may be used.
    #[arg(long, env = "LOWBIT_GPU_MEMORY_UTILIZATION", value_name = "X", default_value_t = 0.9, value_parser = parse_part)]
    gpu_memory_utilization: f64,

    #[command(flatten)]
    head: HeadArgs,

    /// Print one JSON object instead of text.
    #[arg(long, env = "LOWBIT_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

fn parse_gpu(text: &str) -> Result<&'static Gpu, String> {
    let known = || GPUS.iter().map(|gpu| gpu.name).collect::<Vec<_>>().join(", ");
    GPUS.iter().find(|gpu| gpu.name == text).ok_or_else(|| format!("`{text}` is not known; there are {}", known()))
}

pub(super) fn run(args: &Args) -> Outcome {
    let source = args.source.open(&args.head)?;
    let config = source.config();
    let (len, seqs) =
        (args.max_model_len.map_or(config.max_position_embeddings, |n| n as usize), args.max_num_seqs as usize);
    let limits = Limits::new(len, len.min(MAX_BATCH_TOKENS).max(seqs), seqs);
    let target = args.gpu.target(source.dtype());
    let plan = source.plan(&limits, target)?;
    let work = Work::new(config, target, |name| source.scheme(name))?;
    let tied_head = MemoryPlan::tied_head(config, target, &source.scheme("lm_head")?);
    let parameters = super::bench::parameters(config);
    let report = Report { gpu: args.gpu, args, plan, tied_head, work, len, seqs, parameters };
    if args.json {
        output::write_json(&report.json())?
    } else {
        output::write(&report.text())?
    }
    Ok(ExitCode::SUCCESS)
}

struct Report<'a> {
    gpu: &'a Gpu,
    args: &'a Args,
    plan: MemoryPlan,
    /// What to say of a head that is tied.
    tied_head: Option<String>,
    work: Work,
    len: usize,
    seqs: usize,
    parameters: u64,
}

impl Report<'_> {
    /// Memory that may be used.
    fn usable(&self) -> u64 {
        (self.gpu.memory_bytes as f64 * self.args.gpu_memory_utilization) as u64
    }

    fn fits(&self) -> bool {
        self.plan.total() <= self.usable()
    }

    /// Tokens whose keys and values fit beside the weights.
    fn kv_tokens(&self) -> u64 {
        let room = self.usable().saturating_sub(self.plan.weights).saturating_sub(self.plan.scratch);
        room / self.work.kv_bytes_per_token().max(1)
    }

    /// Tokens a second of `seqs` sequences that each have `context` tokens.
    fn decode(&self, seqs: usize, context: usize) -> f64 {
        seqs as f64 / self.work.decode_seconds(self.gpu, seqs, context)
    }

    fn prompt(&self) -> usize {
        self.len.min(PROMPT)
    }

    fn json(&self) -> Value {
        let decode = |seqs: usize, context: usize| json!({ "seqs": seqs, "context": context, "tokens_per_s": output::rounded(self.decode(seqs, context)) });
        json!({
            "model": self.args.source.name(),
            "gpu": self.gpu.name,
            "parameters": self.parameters,
            "max_model_len": self.len,
            "max_num_seqs": self.seqs,
            "memory": {
                "weights_bytes": self.plan.weights,
                "kv_cache_bytes": self.plan.kv_cache,
                "scratch_bytes": self.plan.scratch,
                "total_bytes": self.plan.total(),
                "usable_bytes": self.usable(),
                "fits": self.fits(),
                "kv_tokens_that_fit": self.kv_tokens(),
            },
            "note": self.tied_head,
            "at_best": {
                "decode": [decode(1, 0), decode(1, self.len), decode(self.seqs, self.len)],
                "prefill": {
                    "tokens": self.prompt(),
                    "seconds": output::rounded(self.work.prefill_seconds(self.gpu, self.prompt())),
                },
            },
        })
    }

    fn text(&self) -> String {
        let (gpu, plan) = (self.gpu, &self.plan);
        let mut lines = Lines::default();
        let name = self.args.source.name();
        lines.add("model", format!("{name}, {} parameters", output::count(self.parameters)));
        lines.add(
            "gpu",
            format!(
                "{}: {} of {} may be used, {:.0} GB/s, {:.0} TFLOPS in 16 bit, {:.0} TOPS in int8",
                gpu.name,
                output::bytes(self.usable()),
                output::bytes(gpu.memory_bytes),
                gpu.bandwidth / 1e9,
                gpu.f16 / 1e12,
                gpu.int8 / 1e12
            ),
        );
        lines.add(
            "memory",
            format!(
                "{} in all for {} x {} tokens: weights {}, KV cache {}, scratch {}: {}",
                output::bytes(plan.total()),
                self.seqs,
                self.len,
                output::bytes(plan.weights),
                output::bytes(plan.kv_cache),
                output::bytes(plan.scratch),
                if self.fits() { "fits" } else { "does not fit" }
            ),
        );
        if let Some(note) = &self.tied_head {
            lines.add("", note.clone());
        }
        let tokens = self.kv_tokens();
        lines.add(
            "",
            match tokens / self.len as u64 {
                0 if tokens == 0 => "no room for a KV cache: fewer bits a weight, or a larger GPU".to_owned(),
                0 => format!("room for {tokens} tokens of KV cache: lower --max-model-len"),
                most => format!("room for {tokens} tokens of KV cache, {most} sequences of {}", self.len),
            },
        );
        let mut decode = |seqs: usize, context: usize| {
            let plural = if seqs == 1 { "sequence" } else { "sequences" };
            let rate = self.decode(seqs, context);
            lines.add("at best", format!("{rate:.0} tokens/s decoding, {seqs} {plural} behind {context} tokens"));
        };
        decode(1, 0);
        decode(self.seqs, self.len);
        let (prompt, seconds) = (self.prompt(), self.work.prefill_seconds(gpu, self.prompt()));
        lines.add(
            "",
            format!("{:.4} s for a prompt of {prompt} tokens, {:.0} tokens/s", seconds, prompt as f64 / seconds),
        );
        lines.text.push_str("\nAt best: bytes at the memory's and operations at the tensor cores' peak rate (data sheets); no program gets there.\n");
        lines.text
    }
}
