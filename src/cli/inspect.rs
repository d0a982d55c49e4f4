//! `inspect`: what a model is, from its headers alone: no weight is read.

use std::process::ExitCode;

use clap::builder::FalseyValueParser;
use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, Expected, ModelConfig, RopeScaling};
use crate::device::Device;
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::models::{Limits, MemoryPlan, ModelSpec};
use crate::quant::{LinearWeight, QuantWeight, Scheme, Weight};

use super::generate::MAX_BATCH_TOKENS;
use super::options::{DeviceArgs, HeadArgs, model_dtype};
use super::{Outcome, output};

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: lowbit inspect assets/books-6m-gptq")]
pub(super) struct Args {
    /// Model directory or hub id (`org/name[@revision]`).
    model: String,

    /// Longest sequence that the memory plan is for; without it what the model was made for.
    #[arg(long, env = "LOWBIT_MAX_MODEL_LEN", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    max_model_len: Option<u32>,

    /// Sequences at once that the memory plan is for.
    #[arg(long, env = "LOWBIT_MAX_NUM_SEQS", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    max_num_seqs: u32,

    /// Print one JSON object instead of text.
    #[arg(long, env = "LOWBIT_JSON", value_parser = FalseyValueParser::new())]
    json: bool,

    #[command(flatten)]
    head: HeadArgs,

    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &Args) -> Outcome {
    let checkpoint = args.head.open(&args.model)?;
    let config = checkpoint.config();
    let mut notes: Vec<String> =
        checkpoint.check(&ModelSpec::new(config).expected())?.into_iter().map(|note| note.text).collect();
    let device = args.device.open(model_dtype(&checkpoint)?)?;
    let max_model_len = args.max_model_len.map_or(config.max_position_embeddings, |len| len as usize);
    let seqs = args.max_num_seqs as usize;
    let limits = Limits::new(max_model_len, max_model_len.min(MAX_BATCH_TOKENS).max(seqs), seqs);
    let mut linears = linears(&checkpoint)?;
    let linear_bits = bits_per_weight(&linears);
    let head = checkpoint.linear_scheme("lm_head")?;
    let is_tied = config.tie_word_embeddings;
    notes.extend(MemoryPlan::tied_head(config, (&device).into(), &head));
    if is_tied && !head.is_dense() {
        linears.push(LinearHeader {
            name: "lm_head".into(),
            n: config.vocab_size,
            k: config.hidden_size,
            scheme: head,
        });
    }
    let report = Report {
        args,
        config,
        notes,
        layers: layer_groups(config, &linears),
        head: match (is_tied, head.is_dense()) {
            (true, true) => "the embedding, transposed".into(),
            (true, false) => format!("{head}, of the embedding"),
            (false, _) => head.to_string(),
        },
        kernels: kernels(&device, &linears)?,
        plan: MemoryPlan::of_checkpoint(&checkpoint, &limits, (&device).into())?,
        limits,
        memory: device.memory()?,
        device: &device,
        file_bytes: checkpoint.bytes(),
        linear_bits,
    };
    if args.json {
        output::write_json(&report.json())?
    } else {
        output::write(&report.text())?
    }
    Ok(ExitCode::SUCCESS)
}

/// A linear layer by its headers.
struct LinearHeader {
    name: String,
    n: usize,
    k: usize,
    scheme: Scheme,
}

fn linears(checkpoint: &Checkpoint) -> Result<Vec<LinearHeader>> {
    let mut found = Vec::new();
    for expected in ModelSpec::new(checkpoint.config()).expected() {
        if let Expected::Linear { name, n, k, .. } = expected {
            found.push(LinearHeader { scheme: checkpoint.linear_scheme(&name)?, name, n, k });
        }
    }
    Ok(found)
}

/// Consecutive layers whose linears are quantized alike, and how: `("0-5", ["q,k,v,o: w4a16 g128 sym", ...])`.
fn layer_groups(config: &ModelConfig, linears: &[LinearHeader]) -> Vec<(String, Vec<String>)> {
    let scheme = |name: &str| linears.iter().find(|l| l.name == name).map_or(String::new(), |l| l.scheme.to_string());
    let mut groups: Vec<(usize, usize, Vec<String>)> = Vec::new();
    for (i, layer) in ModelSpec::new(config).layers.iter().enumerate() {
        let mut by_scheme: Vec<(Vec<&str>, String)> = Vec::new();
        for (role, linear) in layer.parts.linears() {
            let scheme = scheme(&linear.name);
            match by_scheme.iter_mut().find(|(_, s)| *s == scheme) {
                Some((roles, _)) => roles.push(role.name()),
                None => by_scheme.push((vec![role.name()], scheme)),
            }
        }
        let lines: Vec<String> =
            by_scheme.iter().map(|(roles, scheme)| format!("{}: {scheme}", roles.join(","))).collect();
        match groups.last_mut() {
            Some((_, last, same)) if *same == lines => *last = i,
            _ => groups.push((i, i, lines)),
        }
    }
    let range = |first: usize, last: usize| if first == last { first.to_string() } else { format!("{first}-{last}") };
    groups.into_iter().map(|(first, last, lines)| (range(first, last), lines)).collect()
}

/// For each scheme in the model the kernel that runs one row and the one that runs a long prompt, asked of a small
/// weight of that scheme on the device itself.
fn kernels(device: &Device, linears: &[LinearHeader]) -> Result<Vec<(String, String, String)>> {
    let mut kernels: Vec<(String, String, String)> = Vec::new();
    for linear in linears {
        let scheme = linear.scheme.to_string();
        if kernels.iter().all(|(known, ..)| *known != scheme) {
            let packed = device.pack(blank(&linear.scheme, linear.n.min(1024), linear.k))?;
            kernels.push((scheme, packed.kernel(1), packed.kernel(512)));
        }
    }
    Ok(kernels)
}

/// A weight of zeros.
fn blank(scheme: &Scheme, n: usize, k: usize) -> LinearWeight {
    let weight = if scheme.is_dense() {
        let dtype = if scheme.weight_bits == 16 { DType::BF16 } else { DType::F32 };
        Weight::Dense { n, k, data: HostData::zeros(dtype, n * k) }
    } else {
        let group_size = scheme.group_size.unwrap_or(k).min(k);
        let groups = n * k.div_ceil(group_size);
        let has_middle = scheme.symmetric && scheme.encoding.is_affine();
        let zero = if has_middle { f32::from(1u16 << (scheme.weight_bits - 1)) } else { 0.0 };
        Weight::Quant(QuantWeight {
            n,
            k,
            bits: scheme.weight_bits,
            group_size,
            codes: vec![0; n * k].into(),
            scales: vec![1.0; groups],
            zeros: vec![zero; groups],
            order: scheme.act_order.then(|| (0..k as u32).collect()),
            encoding: scheme.encoding,
        })
    };
    LinearWeight { weight, bias: None, activation: scheme.activation }
}

/// Bits of code, scale and zero point for each weight of the linear layers, scales counted as 16 bits.
fn bits_per_weight(linears: &[LinearHeader]) -> f64 {
    let bits = |l: &LinearHeader| {
        let weights = (l.n * l.k) as f64;
        let bits = f64::from(l.scheme.weight_bits);
        let group = 16.0 + if l.scheme.symmetric { 0.0 } else { bits };
        let groups = if l.scheme.is_dense() { 0 } else { l.n * l.scheme.group_size.map_or(1, |g| l.k.div_ceil(g)) };
        weights * bits + groups as f64 * group
    };
    let weights: f64 = linears.iter().map(|l| (l.n * l.k) as f64).sum();
    linears.iter().map(bits).sum::<f64>() / weights
}

struct Report<'a> {
    args: &'a Args,
    config: &'a ModelConfig,
    notes: Vec<String>,
    layers: Vec<(String, Vec<String>)>,
    head: String,
    kernels: Vec<(String, String, String)>,
    plan: MemoryPlan,
    limits: Limits,
    memory: (u64, u64),
    device: &'a Device,
    file_bytes: u64,
    linear_bits: f64,
}

impl Report<'_> {
    fn parameters(&self) -> u64 {
        super::bench::parameters(self.config)
    }

    fn fits(&self) -> bool {
        self.plan.total() <= self.memory.0
    }

    fn json(&self) -> Value {
        let c = self.config;
        let layers = self.layers.iter().map(|(range, lines)| json!({ "layers": range, "linears": lines }));
        let kernels = self
            .kernels
            .iter()
            .map(|(scheme, one, many)| json!({ "scheme": scheme, "one_row": one, "many_rows": many }));
        json!({
            "model": self.args.model,
            "architecture": format!("{:?}", c.architecture),
            "parameters": self.parameters(),
            "vocab_size": c.vocab_size,
            "hidden_size": c.hidden_size,
            "intermediate_size": c.intermediate_size,
            "num_layers": c.num_layers,
            "num_heads": c.num_heads,
            "num_kv_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "tie_word_embeddings": c.tie_word_embeddings,
            "max_position_embeddings": c.max_position_embeddings,
            "rope": rope(c),
            "sliding_window": c.windows.iter().flatten().max(),
            "file_bytes": self.file_bytes,
            "linear_bits_per_weight": output::rounded(self.linear_bits),
            "layers": layers.collect::<Value>(),
            "head": self.head,
            "notes": self.notes,
            "device": self.device.name(),
            "kernels": kernels.collect::<Value>(),
            "memory": {
                "max_model_len": self.limits.max_model_len,
                "max_num_seqs": self.limits.max_seqs,
                "weights_bytes": self.plan.weights,
                "kv_cache_bytes": self.plan.kv_cache,
                "scratch_bytes": self.plan.scratch,
                "total_bytes": self.plan.total(),
                "device_free_bytes": self.memory.0,
                "device_total_bytes": self.memory.1,
                "fits": self.fits(),
            },
        })
    }

    fn text(&self) -> String {
        let c = self.config;
        let mut lines = Lines::default();
        lines.add("model", self.args.model.clone());
        lines.add("architecture", format!("{:?}, {} parameters", c.architecture, output::count(self.parameters())));
        lines.add(
            "shape",
            format!(
                "{} layers, hidden {}, intermediate {}, vocabulary {}",
                c.num_layers, c.hidden_size, c.intermediate_size, c.vocab_size
            ),
        );
        let window = c.windows.iter().flatten().max().map_or(String::new(), |w| format!(", sliding window {w}"));
        lines.add(
            "attention",
            format!("{} query heads, {} key and value heads of {}{window}", c.num_heads, c.num_kv_heads, c.head_dim),
        );
        lines.add("context", format!("{} positions, {}", c.max_position_embeddings, rope(c)));
        lines.add(
            "on disk",
            format!("{}, linear layers {:.2} bits a weight", output::bytes(self.file_bytes), self.linear_bits),
        );
        for (range, schemes) in &self.layers {
            schemes.iter().for_each(|scheme| lines.add(&format!("layers {range}"), scheme.clone()));
        }
        lines.add("head", self.head.clone());
        self.notes.iter().for_each(|note| lines.add("note", note.clone()));
        lines.add(
            "device",
            format!(
                "{}, {} of {} free",
                self.device.name(),
                output::bytes(self.memory.0),
                output::bytes(self.memory.1)
            ),
        );
        for (scheme, one, many) in &self.kernels {
            let names = if one == many { one.clone() } else { format!("{one}; for many rows {many}") };
            lines.add("kernel", format!("{scheme}: {names}"));
        }
        let plan = &self.plan;
        lines.add(
            "memory",
            format!(
                "{} in all for {} x {} tokens: weights {}, KV cache {}, scratch {}: {}",
                output::bytes(plan.total()),
                self.limits.max_seqs,
                self.limits.max_model_len,
                output::bytes(plan.weights),
                output::bytes(plan.kv_cache),
                output::bytes(plan.scratch),
                if self.fits() { "fits" } else { "does not fit; lower --max-model-len or --max-num-seqs" }
            ),
        );
        lines.text
    }
}

/// Lines of `label  text`, a repeated label left out.
#[derive(Default)]
pub(super) struct Lines {
    pub(super) text: String,
    last: String,
}

impl Lines {
    pub(super) fn add(&mut self, label: &str, text: String) {
        let shown = if label == self.last { "" } else { label };
        self.text.push_str(&format!("{shown:<14}{text}\n"));
        self.last = label.to_owned();
    }
}

fn rope(config: &ModelConfig) -> String {
    let theta = format!("rotary base {}", config.rope.theta);
    match config.rope.scaling {
        RopeScaling::None => theta,
        RopeScaling::Linear { factor } => format!("{theta}, linear scaling by {factor}"),
        RopeScaling::Dynamic { factor } => format!("{theta}, dynamic scaling by {factor}"),
        RopeScaling::Llama3 { factor, .. } => format!("{theta}, llama3 scaling by {factor}"),
        RopeScaling::Yarn { factor, .. } => format!("{theta}, yarn scaling by {factor}"),
    }
}
