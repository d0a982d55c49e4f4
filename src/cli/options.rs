//! Flags that several verbs share, and what they open: device, checkpoint, model, sampling.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::builder::FalseyValueParser;
use signal_hook::consts::SIGINT;

use crate::checkpoint::{Checkpoint, GenerationConfig, HEAD_GROUP_SIZE, hub};
use crate::device::Device;
use crate::dtype::DType;
use crate::engine::sampling::SamplingParams;
use crate::engine::{Engine, EngineOptions};
use crate::error::{Error, Result};
use crate::layers::Linear;
use crate::models::{DecoderLayer, DummyScheme, Limits, Model, ModelRunner};
use crate::text::stop::StopStrings;

use super::output;

/// Where and how to compute.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Device")]
pub(super) struct DeviceArgs {
    /// `auto`, `cpu`, `cuda` or `cuda:N`. `auto` is the first GPU where this binary has CUDA kernels and the driver
    /// works, else the CPU.
    #[arg(long, env = "LOWBIT_DEVICE", default_value = "auto", value_parser = DeviceChoice::parse)]
    device: DeviceChoice,

    /// Type of activations on the GPU: `auto`, `f16` or `bf16`. `auto` is the type that config.json names. `f16` is
    /// more precise, but values beyond 65504 overflow, which models trained in bf16 may reach. The CPU computes in
    /// f32 whatever this says.
    #[arg(long, env = "LOWBIT_DTYPE", default_value = "auto", value_parser = parse_dtype)]
    dtype: DtypeChoice,

    /// Compute every row so that its result has the same bits whatever else is in its batch: choose GPU kernels by the shapes
    /// of weights alone. Costs speed, most where few sequences decode behind long contexts. The CPU always computes so.
    #[arg(long, env = "LOWBIT_BATCH_INVARIANT", value_parser = FalseyValueParser::new())]
    batch_invariant: bool,

    /// Choose GPU kernels by this table of measured choices before the built-in one; `lowbit bench kernels --tune` makes it.
    #[arg(long, env = "LOWBIT_TUNED", value_name = "FILE")]
    tuned: Option<PathBuf>,

    /// CPU threads; without it one for every core that this process may use.
    #[arg(short, long, env = "LOWBIT_THREADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DeviceChoice {
    Auto,
    Cpu,
    Cuda(usize),
}

impl DeviceChoice {
    fn parse(text: &str) -> Result<DeviceChoice, String> {
        let bad = || format!("`{text}`: expected auto, cpu, cuda or cuda:N");
        match text.split_once(':') {
            None if text == "auto" => Ok(DeviceChoice::Auto),
            None if text == "cpu" => Ok(DeviceChoice::Cpu),
            None if text == "cuda" => Ok(DeviceChoice::Cuda(0)),
            Some(("cuda", ordinal)) => ordinal.parse().map(DeviceChoice::Cuda).map_err(|_| bad()),
            _ => Err(bad()),
        }
    }
}

/// `None` is the model's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DtypeChoice(Option<DType>);

/// A number that passes `ok`, or what was `expected` instead.
pub(super) fn parse_number<T: std::str::FromStr>(
    text: &str,
    expected: &str,
    ok: impl FnOnce(&T) -> bool,
) -> Result<T, String> {
    text.parse().ok().filter(ok).ok_or_else(|| format!("`{text}`: expected {expected}"))
}

fn parse_dtype(text: &str) -> Result<DtypeChoice, String> {
    match text {
        "auto" => Ok(DtypeChoice(None)),
        "f16" | "float16" | "half" => Ok(DtypeChoice(Some(DType::F16))),
        "bf16" | "bfloat16" => Ok(DtypeChoice(Some(DType::BF16))),
        _ => Err(format!("`{text}`: expected auto, f16 or bf16")),
    }
}

impl DeviceArgs {
    /// Sizes the thread pool and opens the device; `auto` for dtype is `model_dtype`.
    pub(super) fn open(&self, model_dtype: DType) -> Result<Device> {
        self.start_threads()?;
        let dtype = self.dtype.0.unwrap_or(model_dtype);
        let device = match self.device {
            DeviceChoice::Cpu => Device::cpu(),
            DeviceChoice::Cuda(ordinal) => Device::cuda(ordinal, dtype)?,
            DeviceChoice::Auto => Device::cuda(0, dtype).unwrap_or_else(|reason| {
                tracing::info!("running on the CPU: {reason}");
                Device::cpu()
            }),
        };
        self.in_mode(device)
    }

    /// Sizes the thread pool and opens the GPU, also for `auto`; `dtype` is what `auto` means there.
    pub(super) fn open_gpu(&self, dtype: DType) -> Result<Device> {
        match self.device {
            DeviceChoice::Auto => {
                self.start_threads()?;
                self.in_mode(Device::cuda(0, self.dtype.0.unwrap_or(dtype))?)
            }
            _ => self.open(dtype),
        }
    }

    fn in_mode(&self, device: Device) -> Result<Device> {
        let device = self.tuned.iter().try_fold(device, |device, file| device.tuned_by(file))?;
        Ok(if self.batch_invariant { device.batch_invariant() } else { device })
    }

    /// Sizes the thread pool of this process, before anything uses it.
    pub(super) fn start_threads(&self) -> Result<()> {
        let Some(threads) = self.threads.map(usize::from) else { return Ok(()) };
        match rayon::ThreadPoolBuilder::new().num_threads(threads).build_global() {
            Err(e) if rayon::current_num_threads() != threads => Err(Error::input("--threads", e.to_string())),
            _ => Ok(()),
        }
    }
}

/// The model of `generate` and `chat`.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct ModelFlag {
    /// Model directory or hub id (`org/name[@revision]`).
    #[arg(short, long, env = "LOWBIT_MODEL", value_name = "MODEL")]
    model: Option<String>,
}

impl ModelFlag {
    /// The model's name, or an error that shows what to write after `lowbit verb`.
    pub(super) fn name(&self, verb: &str) -> Result<&str> {
        let example =
            || format!("is required: a model directory or a hub id, as in `lowbit {verb} -m assets/books-6m-gptq`");
        self.model.as_deref().filter(|name| !name.is_empty()).ok_or_else(|| Error::input("--model", example()))
    }
}

/// How the engine works.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Engine")]
pub(super) struct EngineArgs {
    /// Keep keys and values of prompts and answers for later prompts that start alike. So it is without this flag too.
    #[arg(long, env = "LOWBIT_ENABLE_PREFIX_CACHING", value_parser = FalseyValueParser::new(), overrides_with = "no_enable_prefix_caching")]
    enable_prefix_caching: bool,

    /// Compute every prompt from its first token on.
    #[arg(long, env = "LOWBIT_NO_ENABLE_PREFIX_CACHING", value_parser = FalseyValueParser::new(), overrides_with = "enable_prefix_caching")]
    no_enable_prefix_caching: bool,
}

impl EngineArgs {
    /// Whether prompts that start alike share keys and values.
    pub(super) fn prefix_caching(&self) -> bool {
        self.enable_prefix_caching || !self.no_enable_prefix_caching
    }

    /// The engine of a loaded model.
    pub(super) fn start(&self, runner: ModelRunner) -> Engine {
        Engine::with_options(
            runner,
            EngineOptions { prefix_caching: self.prefix_caching(), ..EngineOptions::default() },
        )
    }
}

/// How to hold the output head.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Device")]
pub(super) struct HeadArgs {
    /// Hold a 16-bit output head in 8 or 4 bits, rounded to nearest in groups of 128 while loading; activations stay in
    /// 16 bit. Without it the head is held as the file has it. A head that is quantized already stays as it is, and so does
    /// the embedding where it is the head too: only its copy is rounded.
    #[arg(long, env = "LOWBIT_LM_HEAD", value_name = "SCHEME", value_parser = parse_head)]
    lm_head: Option<HeadBits>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct HeadBits(u8);

fn parse_head(text: &str) -> Result<HeadBits, String> {
    match text {
        "w8a16" => Ok(HeadBits(8)),
        "w4a16" => Ok(HeadBits(4)),
        _ => Err(format!("`{text}`: expected w8a16 or w4a16")),
    }
}

impl HeadArgs {
    /// Opens a model by directory or hub id, its head to be held as asked.
    pub(super) fn open(&self, model: &str) -> Result<Checkpoint> {
        let mut checkpoint = open_checkpoint(model)?;
        if let Some(HeadBits(bits)) = self.lm_head {
            checkpoint.round_head(bits);
        }
        Ok(checkpoint)
    }

    /// The head of a model with random weights.
    pub(super) fn dummy(&self) -> DummyScheme {
        self.lm_head.map_or(DummyScheme::Bf16, |HeadBits(bits)| DummyScheme::WeightOnly(bits, HEAD_GROUP_SIZE))
    }
}

/// Opens a model by directory or hub id, fetching it first where needed.
pub(super) fn open_checkpoint(model: &str) -> Result<Checkpoint> {
    Checkpoint::open(&hub::resolve(model)?)
}

/// Type of activations that suits a model on the GPU: bf16 for a model that config.json calls bf16, else f16, as vLLM
/// decides it.
pub(super) fn model_dtype(checkpoint: &Checkpoint) -> Result<DType> {
    let config = checkpoint.raw_config()?;
    let named = config.get("dtype").or_else(|| config.get("torch_dtype")).and_then(serde_json::Value::as_str);
    Ok(if named.is_some_and(|name| name.ends_with("bfloat16")) { DType::BF16 } else { DType::F16 })
}

/// Schemes of a model's decoder layers in words, most weights first: `w4a16 g128 sym`.
pub(super) fn scheme_summary(model: &Model) -> String {
    let mut schemes: Vec<(String, usize)> = Vec::new();
    for part in model.layers.iter().flat_map(DecoderLayer::slots).flat_map(Linear::parts) {
        let name = part.scheme.to_string();
        match schemes.iter_mut().find(|(known, _)| *known == name) {
            Some((_, weights)) => *weights += part.n * part.k,
            None => schemes.push((name, part.n * part.k)),
        }
    }
    schemes.sort_by_key(|&(_, weights)| std::cmp::Reverse(weights));
    schemes.into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(" + ")
}

/// Loads a model onto `device` with progress. `memory_flags` says which flags of the verb make it take less memory.
pub(super) fn load_model(
    checkpoint: &Checkpoint,
    device: &Device,
    limits: Limits,
    memory_flags: &str,
) -> Result<ModelRunner> {
    let bar = output::progress("loading");
    let runner = ModelRunner::load(checkpoint, device, limits, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let runner = runner.map_err(|error| error.with_memory_advice(memory_flags))?;
    log_kernels(runner.model());
    Ok(runner)
}

/// Says which kernel runs each scheme, for one row and for many.
fn log_kernels(model: &Model) {
    let layers = model.layers.iter().flat_map(DecoderLayer::slots);
    let mut known = Vec::new();
    for part in layers.chain([&model.head]).flat_map(Linear::parts) {
        let line = format!("{}: {} for one row, {} for many", part.scheme, part.kernel(1), part.kernel(512));
        if !known.contains(&line) {
            tracing::info!("kernels of {line}");
            known.push(line);
        }
    }
}

/// How to choose tokens. What is not given comes from the model's generation_config.json.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub(super) struct SamplingArgs {
    /// Softmax temperature; 0 always takes the most likely token.
    #[arg(long, env = "LOWBIT_TEMPERATURE", value_name = "T")]
    temperature: Option<f32>,

    /// Keep the fewest tokens whose probabilities reach this sum; 1 keeps all.
    #[arg(long, env = "LOWBIT_TOP_P", value_name = "P")]
    top_p: Option<f32>,

    /// Keep this many of the most likely tokens; 0 or -1 keeps all.
    #[arg(long, env = "LOWBIT_TOP_K", value_name = "K", value_parser = parse_top_k)]
    top_k: Option<u32>,

    /// Keep tokens at least this fraction as likely as the best; 0 keeps all.
    #[arg(long, env = "LOWBIT_MIN_P", value_name = "P")]
    min_p: Option<f32>,

    /// Divide the logits of tokens already in prompt or output by this where positive, multiply where negative.
    #[arg(long, env = "LOWBIT_REPETITION_PENALTY", value_name = "X")]
    repetition_penalty: Option<f32>,

    /// Take this off the logits of tokens already in the output.
    #[arg(long, env = "LOWBIT_PRESENCE_PENALTY", value_name = "X")]
    presence_penalty: Option<f32>,

    /// Take this off the logits of tokens for every time they are in the output.
    #[arg(long, env = "LOWBIT_FREQUENCY_PENALTY", value_name = "X")]
    frequency_penalty: Option<f32>,

    /// Add to the logit of one token id: `--logit-bias 42=-5`; `42=-inf` bans it. May be repeated.
    #[arg(long, env = "LOWBIT_LOGIT_BIAS", value_name = "ID=BIAS", value_delimiter = ',', value_parser = parse_bias, allow_hyphen_values = true)]
    logit_bias: Vec<(u32, f32)>,

    /// Seed that makes sampling repeatable.
    #[arg(long, env = "LOWBIT_SEED", value_name = "N", value_parser = parse_count::<u64>)]
    seed: Option<u64>,

    /// Tokens to generate before the model may end.
    #[arg(long, env = "LOWBIT_MIN_TOKENS", value_name = "N", value_parser = parse_count::<usize>)]
    min_tokens: Option<usize>,

    /// End the text before this string. May be repeated.
    #[arg(long, env = "LOWBIT_STOP", value_name = "TEXT")]
    stop: Vec<String>,

    /// Go on when the model ends the text.
    #[arg(long, env = "LOWBIT_IGNORE_EOS", value_parser = FalseyValueParser::new())]
    ignore_eos: bool,

    /// Defaults of sampling: `auto` takes those of the model's generation_config.json, `none` neutral ones
    /// (temperature 1, no filter).
    #[arg(long, env = "LOWBIT_GENERATION_CONFIG", value_name = "WHICH", default_value = "auto", value_parser = ["auto", "none"])]
    generation_config: String,
}

/// A number of things, or a seed.
pub(super) fn parse_count<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    parse_number(text, "a whole number, 0 or more", |_| true)
}

/// -1 is how other programs write that all are kept.
fn parse_top_k(text: &str) -> Result<u32, String> {
    if text == "-1" { Ok(0) } else { parse_number(text, "a number of tokens, 0 or -1 for all", |_| true) }
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let parts = text.split_once('=').and_then(|(id, bias)| Some((id.trim().parse().ok()?, bias.trim().parse().ok()?)));
    parts.ok_or_else(|| format!("`{text}`: expected a token id and a number, as in 42=-5"))
}

impl SamplingArgs {
    /// The defaults of a model that are to be taken.
    pub(super) fn defaults(&self, generation: &GenerationConfig) -> GenerationConfig {
        match self.generation_config.as_str() {
            "none" => {
                GenerationConfig { eos_token_ids: generation.eos_token_ids.clone(), ..GenerationConfig::default() }
            }
            _ => generation.clone(),
        }
    }

    /// The texts that end an answer.
    pub(super) fn stop_texts(&self, defaults: &GenerationConfig) -> Vec<String> {
        [&self.stop[..], &defaults.stop_strings[..]].concat()
    }

    /// A matcher of these.
    pub(super) fn stop_strings(&self, defaults: &GenerationConfig) -> Result<StopStrings> {
        StopStrings::new(&self.stop_texts(defaults), false)
    }

    /// The parameters with these defaults and an end-of-sequence id.
    pub(super) fn params(&self, defaults: &GenerationConfig, eos: Option<u32>) -> SamplingParams {
        let mut defaults = SamplingParams::from_generation(defaults);
        defaults.logit_bias.extend(self.logit_bias.iter().copied());
        let mut stop_token_ids = std::mem::take(&mut defaults.stop_token_ids);
        stop_token_ids.extend(eos.filter(|id| !stop_token_ids.contains(id)));
        SamplingParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            seed: self.seed,
            min_tokens: self.min_tokens.unwrap_or(defaults.min_tokens),
            stop_token_ids,
            ignore_eos: self.ignore_eos,
            ..defaults
        }
    }
}

/// A flag that Ctrl-C sets. While it is set already, Ctrl-C ends the process at once with code 130: the second press
/// always works, and a caller that waits for input sets it to give the first press that meaning.
pub(super) fn interrupt_flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register_conditional_shutdown(SIGINT, super::INTERRUPTED.into(), Arc::clone(&flag))
        .and_then(|_| signal_hook::flag::register(SIGINT, Arc::clone(&flag)))
        .map_err(Error::io("SIGINT"))?;
    Ok(flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices() {
        assert_eq!(DeviceChoice::parse("auto"), Ok(DeviceChoice::Auto));
        assert_eq!(DeviceChoice::parse("cuda"), Ok(DeviceChoice::Cuda(0)));
        assert_eq!(DeviceChoice::parse("cuda:3"), Ok(DeviceChoice::Cuda(3)));
        for bad in ["", "gpu", "cuda:", "cuda:x", "cpu:0", "cuda:-1"] {
            assert!(DeviceChoice::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn biases() {
        assert_eq!(parse_bias("42=-5"), Ok((42, -5.0)));
        assert_eq!(parse_bias("7=-inf"), Ok((7, f32::NEG_INFINITY)));
        for bad in ["", "42", "42=", "=1", "-1=2", "a=b"] {
            assert!(parse_bias(bad).is_err(), "{bad}");
        }
    }
}
