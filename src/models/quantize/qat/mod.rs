//! Quantization-aware training: the weights, the steps of their grids, norms and biases learn, under fake quantization, to
//! give the logits of the model as it was (self-distillation).
//!
//! LSQ (Esser et al. 2020, arXiv 1902.08153) for the steps; the model as its own teacher: LLM-QAT (Liu et al. 2023, arXiv
//! 2305.17888). Everything trains at once, so all of it is in memory: for small models. Autograd and products are candle's.

mod estimate;
mod network;
mod ops;
mod optimizer;
mod train;

#[cfg(test)]
mod tests;

pub use estimate::estimate;

use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device as CandleDevice, Tensor};
use serde_json::{Value, json};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::write::Output;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::quant::distortion::Distortion;

use super::super::role::LinearRole;
use super::super::spec::ModelSpec;
use super::finish::finish;
use super::layer::{HostLayer, HostNorm};
use super::{Activation, Calibration, LayerScheme, Recipe, Transform, WeightRounding};
use super::{histograms, process, sizes};
use network::{Frame, Network, bias_name, steps_name, weight_name};
use optimizer::Parameter;
use train::Trained;

/// How to train.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QatOptions {
    /// Updates of the weights.
    pub steps: usize,
    /// Windows of an update.
    pub batch: usize,
    /// Largest learning rate of weights, norms and biases.
    pub rate: f32,
    /// Largest learning rate of steps, in units of their first sizes.
    pub step_rate: f32,
    /// Seed of the order of windows.
    pub seed: u64,
    /// Updates between snapshots.
    pub save_every: usize,
}

impl QatOptions {
    /// What decides the result.
    pub fn json(&self) -> Value {
        json!({
            "steps": self.steps,
            "batch": self.batch,
            "learning_rate": self.rate,
            "step_learning_rate": self.step_rate,
            "seed": self.seed,
        })
    }
}

/// Windows at the end of the text that only judge: an eighth of them, at most this many.
const MAX_HELD_OUT: usize = 16;

/// What training has come to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Updates done.
    pub step: usize,
    /// Mean divergence of the last update's windows, in nats a token.
    pub loss: f32,
    /// The same of the windows held out, when it was just measured.
    pub held_out: Option<f32>,
}

/// Rounds `source` by `recipe`, trains it on `text` from there, and writes it into `output`.
///
/// # Errors
/// As [`super::quantize`]; [`Error::Input`] naming the update when the loss stops being a number; [`Error::OutOfMemory`]
/// before anything is allocated.
pub fn qat(
    source: &Checkpoint,
    recipe: &Recipe,
    options: &QatOptions,
    text: &Calibration,
    mut output: Output,
    progress: &mut dyn FnMut(Progress),
) -> Result<Value> {
    let started = Instant::now();
    let config = source.config();
    let spec = ModelSpec::new(config);
    super::check(source, recipe)?;
    check(recipe)?;
    for note in source.check(&spec.expected())? {
        note.log();
    }
    let (training, held_out) = split(text)?;
    let needed = estimate(source, recipe, options, text.context).memory_bytes;
    let free = Device::cpu().memory()?.0;
    if needed > free {
        return Err(Error::OutOfMemory {
            what: "training".into(),
            needed_bytes: needed,
            free_bytes: free,
            advice: "Lower --batch or --seq-len; weights alone take about 40 bytes each".into(),
            grows_with_sequences: false,
        });
    }
    let embedding = source.tensor(&spec.embedding.name)?;
    let dtype = embedding.dtype();
    let mut layers = Vec::new();
    for layer_spec in &spec.layers {
        let mut layer = HostLayer::read(source, layer_spec, |name| recipe.layer(name, dtype))?;
        process(&mut layer, recipe, None, None, &mut Vec::new())?;
        layers.push(layer);
    }
    let norm = HostNorm::read(source, &spec.norm)?;
    let embedding = Arc::new(embedding.to_f32());
    let shape = (config.vocab_size, config.hidden_size);
    let head = match config.tie_word_embeddings {
        true => Tensor::from_slice(&embedding, shape, &CandleDevice::Cpu),
        false => Tensor::from_vec(head_of(source)?, shape, &CandleDevice::Cpu),
    };
    let head = head.map_err(failed)?;
    let frame = Frame { config, embedding, head, norm: &norm, context: text.context };
    let teacher = Network::teacher(&frame, &layers).map_err(failed)?;
    let (student, parameters) = Network::student(&frame, &layers).map_err(failed)?;
    let trained = train::Trainer {
        teacher: &teacher,
        student: &student,
        parameters,
        options,
        training,
        held_out,
        context: text.context,
    }
    .run(&output, progress)?;

    for (i, layer) in layers.iter_mut().enumerate().skip(output.parts()) {
        let rows = settle(layer, i, recipe, &student, &trained.parameters);
        let mut tensors = layer.tensors(recipe.format, dtype)?;
        if i + 1 == spec.layers.len() {
            let weight = best(&trained.parameters, &norm.name).to_vec();
            tensors.push(HostNorm { weight, name: norm.name.clone(), dtype: norm.dtype }.tensor());
        }
        let mut note = json!({ "layer": i, "linears": rows });
        sizes::add(&mut note, &tensors, source);
        output.add(&tensors, &note, &[])?;
    }
    finish(output, source, recipe, dtype, Some(text), started, ("qat", report(options, &trained, text)))
}

/// Fails for recipes whose rounding training does not imitate.
fn check(recipe: &Recipe) -> Result<()> {
    let ok =
        |layer: &LayerScheme| matches!(layer.activation, Activation::None | Activation::Dynamic { asymmetric: false });
    let what = if !recipe.overrides.values().flatten().chain([&recipe.base]).all(ok) {
        "activations other than 16-bit and symmetric int8 per token"
    } else if recipe.head.is_some() {
        "a quantized head"
    } else if recipe.target.is_some() {
        "--target-bpw"
    } else if recipe.kv_scales.is_some() {
        "scales of an int8 KV cache"
    } else if recipe.transform != Transform::None || recipe.rounding != WeightRounding::Nearest {
        "a start other than rounding to nearest"
    } else {
        return Ok(());
    };
    Err(Error::unsupported(format!("{what} with --method qat"), "Leave it out, or use another method"))
}

/// Windows to train on, and to judge by.
fn split(text: &Calibration) -> Result<(&[u32], &[u32])> {
    let windows = text.ids.len() / text.context;
    let held_out = (windows / 8).clamp(1, MAX_HELD_OUT);
    if windows < 2 || text.context < 2 {
        let reason = format!(
            "{windows} windows of {} tokens; qat needs two of two or more: one to train on, one to judge by",
            text.context
        );
        return Err(Error::input("--calib", reason));
    }
    Ok(text.ids.split_at((windows - held_out) * text.context))
}

fn head_of(source: &Checkpoint) -> Result<Vec<f32>> {
    match ModelSpec::new(source.config()).head.read(source)?.weight {
        crate::quant::Weight::Dense { data, .. } => Ok(data.to_f32()),
        crate::quant::Weight::Quant(q) => Ok(q.dequantize()),
    }
}

fn best<'a>(parameters: &'a [Parameter], name: &str) -> &'a [f32] {
    parameters.iter().find(|p| p.name == name).map_or(&[], |p| &p.best)
}

/// Puts the best values found into a layer, its weights on their grids. Returns the report of its linear layers.
fn settle(
    layer: &mut HostLayer,
    index: usize,
    recipe: &Recipe,
    student: &Network,
    parameters: &[Parameter],
) -> Vec<Value> {
    for norm in layer.parts.norms_mut() {
        norm.weight = best(parameters, &norm.name).to_vec();
    }
    let mut rows = Vec::new();
    for role in LinearRole::ALL {
        let linear = layer.parts.linear_mut(role);
        let (Some(quantizer), Some((before, _)), Some(scheme)) =
            (student.quantizer(index, role), &linear.quantized, &linear.scheme)
        else {
            continue;
        };
        let (weight, factors) = (best(parameters, &weight_name(linear)), best(parameters, &steps_name(linear)));
        let q = quantizer.quantize(weight, factors);
        let changed = q.codes.iter().zip(before.codes.iter()).filter(|(a, b)| a != b).count();
        let change = factors.iter().map(|f| f64::from((f - 1.0).abs())).sum::<f64>() / factors.len() as f64;
        rows.push(json!({
            "name": linear.name,
            "weight_sqnr_db": Distortion::between(&linear.weight, &q.dequantize()).sqnr_db,
            "weights": histograms::of_weights(&linear.weight, &q),
            "bits_per_weight": scheme.bits_per_weight(linear.k, recipe.format),
            "codes_changed": changed as f64 / q.codes.len() as f64,
            "mean_step_change": change,
        }));
        if linear.bias.is_some() {
            linear.bias = Some(best(parameters, &bias_name(linear)).to_vec());
        }
        if let Some((old, _)) = &mut linear.quantized {
            *old = q;
        }
    }
    rows
}

fn report(options: &QatOptions, trained: &Trained, text: &Calibration) -> Value {
    let mut all = options.json();
    all["loss"] = json!(trained.losses);
    all["held_out"] = json!(trained.held_out);
    all["best_step"] = json!(trained.best_step);
    all["trained_tokens"] = json!(options.steps * options.batch * text.context);
    all
}

fn failed(error: candle_core::Error) -> Error {
    Error::Shape { op: "qat", expected: "tensors that fit".into(), got: error.to_string() }
}
