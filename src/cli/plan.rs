//! `plan`: whether a model fits a GPU that need not be here, and what it would reach at best.

use std::process::ExitCode;

use clap::builder::FalseyValueParser;
use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, ModelConfig};
use crate::dtype::DType;
use crate::error::Result;
use crate::models::{DummyScheme, GPUS, Gpu, Limits, MemoryPlan, Work, dummy_config, dummy_linear, expected_tensors};
use crate::quant::Scheme;

use super::generate::MAX_BATCH_TOKENS;
use super::inspect::Lines;
use super::options::{HeadArgs, model_dtype, parse_number};
use super::{Outcome, output};

/// Tokens of the prompt that times are given for, where sequences may be so long.
const PROMPT: usize = 2048;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: lowbit plan assets/books-6m-gptq --gpu a100-80gb --max-num-seqs 64\n\n\
    Without the model: lowbit plan --dummy llama-3.1-70b --scheme w4a16 --gpu a100-80gb --max-num-seqs 16 --max-model-len 8192")]
pub(super) struct Args {
    /// Model directory or hub id (`org/name[@revision]`).
    #[arg(required_unless_present = "dummy", conflicts_with = "dummy")]
    model: Option<String>,

    /// Plan for a known shape instead of a model, such as `llama-3.1-8b`; an unknown name lists them.
    #[arg(long, env = "LOWBIT_DUMMY", value_name = "SHAPE")]
    dummy: Option<String>,

    /// Scheme of --dummy: `bf16`, `fp8a16`, `w2a16` to `w8a16`, `w2a8` to `w8a8`; embedding and head in 16 bit, but for --lm-head.
    #[arg(long, env = "LOWBIT_SCHEME", default_value = "w4a16")]
    scheme: String,

    /// Weights of --dummy that share a scale; 0 is one scale an output channel. Without it 0 at 8 bits, else 128.
    #[arg(long, env = "LOWBIT_GROUP_SIZE", value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1 << 20))]
    group_size: Option<u32>,

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

fn parse_part(text: &str) -> Result<f64, String> {
    parse_number(text, "a number above 0, at most 1", |x| *x > 0.0 && *x <= 1.0)
}

/// What is planned for: a checkpoint's headers, or a shape.
enum Subject {
    Checkpoint(Box<Checkpoint>, DType),
    Dummy(Box<Shape>),
}

/// A known shape, the scheme of its decoder's linear layers, and that of its head.
struct Shape {
    config: ModelConfig,
    decoder: Scheme,
    head: Scheme,
}

impl Subject {
    fn open(args: &Args) -> Result<Subject> {
        let Some(shape) = &args.dummy else {
            let checkpoint = args.head.open(args.model.as_deref().unwrap_or_default())?;
            checkpoint.check(&expected_tensors(checkpoint.config()))?;
            let dtype = model_dtype(&checkpoint)?;
            return Ok(Subject::Checkpoint(Box::new(checkpoint), dtype));
        };
        let config = dummy_config(shape)?;
        let decoder = DummyScheme::parse(&args.scheme, args.group_size.map(|size| size as usize))?;
        // A few rows of as many columns as make a group one of several.
        let columns = 2 * args.group_size.unwrap_or(0).max(128) as usize;
        let scheme = |scheme| dummy_linear(scheme, 8, columns, false, 0).scheme();
        let decoder = scheme(decoder);
        Ok(Subject::Dummy(Box::new(Shape { config, decoder, head: scheme(args.head.dummy()) })))
    }

    fn config(&self) -> &ModelConfig {
        match self {
            Subject::Checkpoint(checkpoint, _) => checkpoint.config(),
            Subject::Dummy(shape) => &shape.config,
        }
    }

    fn dtype(&self) -> DType {
        match self {
            Subject::Checkpoint(_, dtype) => *dtype,
            Subject::Dummy(..) => DType::BF16,
        }
    }

    fn scheme(&self, name: &str) -> Result<Scheme> {
        match self {
            Subject::Checkpoint(checkpoint, _) => checkpoint.linear_scheme(name),
            Subject::Dummy(shape) => Ok(if name == "lm_head" { shape.head } else { shape.decoder }),
        }
    }
}

pub(super) fn run(args: &Args) -> Outcome {
    let subject = Subject::open(args)?;
    let config = subject.config();
    let (len, seqs) =
        (args.max_model_len.map_or(config.max_position_embeddings, |n| n as usize), args.max_num_seqs as usize);
    let limits = Limits::new(len, len.min(MAX_BATCH_TOKENS).max(seqs), seqs);
    let target = args.gpu.target(subject.dtype());
    let plan = match &subject {
        Subject::Checkpoint(checkpoint, _) => MemoryPlan::of_checkpoint(checkpoint, &limits, target)?,
        Subject::Dummy(_) => MemoryPlan::new(config, &limits, target, DType::BF16, |name| subject.scheme(name))?,
    };
    let work = Work::new(config, target, |name| subject.scheme(name))?;
    let tied_head = MemoryPlan::tied_head(config, target, &subject.scheme("lm_head")?);
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
            "model": self.args.model.as_ref().or(self.args.dummy.as_ref()),
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
        let name = self.args.model.as_ref().or(self.args.dummy.as_ref()).cloned().unwrap_or_default();
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
