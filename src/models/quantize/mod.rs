//! Quantizing a model: decoder layer by decoder layer, each read, calibrated, rounded, written and forgotten.
//!
//! Memory holds one layer and the residual stream of the calibration text. The stream that reaches a layer comes from the
//! quantized layers before it, and is stored beside every finished layer, so that an interrupted run goes on where it
//! was and ends with the same bytes.

mod check;
mod estimate;
mod finish;
mod head;
mod histograms;
mod inputs;
mod kv;
mod layer;
mod mixed;
mod page;
#[cfg(feature = "qat")]
pub mod qat;
mod recipe;
mod rules;
mod runner;
mod sizes;
mod sketch;

pub use check::{check, check_values};
pub use estimate::Estimate;
pub use recipe::{Activation, LayerScheme, Observer, Recipe, Target, Transform, WeightRounding};
pub use rules::{Rule, overrides};
pub use sketch::Sketch;

use std::ops::ControlFlow;
use std::time::Instant;

use serde_json::{Value, json};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::write::Output;
use crate::device::Device;
use crate::dtype::HostData;
use crate::error::{Error, Result};
use crate::quant::ActQuant;
use crate::quant::awq::{clip, output_energy, search_scales};
use crate::quant::distortion::{Distortion, outlier_channels};
use crate::quant::gptq::gptq;
use crate::quant::grid::{Grid, round_to_nearest};
use crate::quant::hessian::Hessian;
use crate::quant::hqq::hqq;
use crate::quant::smooth::smoothing_scales;
use crate::quant::table::{learn_table, round_to_table};
use crate::quant::ternary::ternary;

use super::forward::Step;
use super::role::{LinearRole, Slot};
use super::spec::ModelSpec;
use finish::finish;
use inputs::Inputs;
use kv::KvRanges;
use layer::{HostLayer, HostLinear};
use runner::Runner;

/// Text that shows a model at work: windows of tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// Token ids, a multiple of `context`.
    pub ids: Vec<u32>,
    /// Tokens of a window.
    pub context: usize,
    /// SHA-256 of the whole text, in hexadecimal, for the report.
    pub text_sha256: String,
}

/// At most `most` disjoint pieces of `len` tokens each, spread evenly over `ids`; none where these are fewer.
pub fn spread(ids: &[u32], len: usize, most: usize) -> impl Iterator<Item = &[u32]> {
    let pieces = ids.len() / len;
    let used = pieces.min(most);
    (0..used).map(move |i| &ids[i * pieces / used * len..][..len])
}

/// A step of [`quantize`].
#[derive(Debug, Clone, Copy)]
pub enum Progress<'a> {
    /// So many layers have been tried at each width, for mixed precision.
    Measured(usize),
    /// Widths are chosen: this part of the report.
    Chosen(&'a Value),
    /// The layer of this index is done (the head comes after the decoder layers): its part of the report.
    Layer(usize, &'a Value),
}

impl Calibration {
    /// What the report says of it.
    fn json(&self) -> Value {
        let sketch = Sketch::of_windows(self.ids.chunks_exact(self.context));
        json!({
            "tokens": self.ids.len(),
            "context": self.context,
            "text_sha256": self.text_sha256,
            "sketch": sketch.json(),
        })
    }
}

/// Windows computed at once.
const WINDOWS: usize = 4;
/// Input channels this many times the median count as outliers.
const OUTLIER: f32 = 20.0;

/// Quantizes the decoder layers of `source` into `output`, and finishes it. `progress` is told of every
/// step; returns the whole report. `device` is where calibration runs.
///
/// # Errors
/// [`Error::Unsupported`] for a source or recipe that cannot be; [`Error::Checkpoint`] for weights that are not finite;
/// [`Error::Input`] for calibration that is missing or makes a layer's inputs infinite; [`Error::Io`] from writing.
pub fn quantize(
    source: &Checkpoint,
    recipe: &Recipe,
    calibration: Option<&Calibration>,
    device: &Device,
    mut output: Output,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Value> {
    let config = source.config();
    let spec = ModelSpec::new(config);
    check(source, recipe)?;
    for note in source.check(&spec.expected())? {
        note.log();
    }
    let calibration = match (recipe.needs_calibration(), calibration) {
        (true, None) => return Err(Error::input("--calib", "missing; this method looks at the inputs of layers")),
        (true, some) => some,
        (false, _) => None,
    };
    let started = Instant::now();
    let embedding = source.tensor(&spec.embedding.name)?;
    let dtype = embedding.dtype();
    let (recipe, mixed) = match (recipe.target, calibration) {
        (Some(target), Some(calibration)) => {
            let measured = match output.recall("sensitivity")? {
                Some(measured) => measured,
                None => {
                    let mut measured = |layers| progress(Progress::Measured(layers));
                    let found = mixed::measure(source, &spec, recipe, calibration, device, &embedding, &mut measured)?;
                    output.remember("sensitivity", &found)?;
                    found
                }
            };
            let (recipe, chosen) = mixed::choose(recipe, &measured, target.bits_per_weight)?;
            progress(Progress::Chosen(&chosen));
            (recipe, Some(chosen))
        }
        _ => (recipe.clone(), None),
    };
    let recipe = &recipe;
    check(source, recipe)?;
    let head = recipe.head(dtype);
    let total = spec.layers.len() + usize::from(head.is_some());
    let mut walk = match calibration {
        Some(c) if output.parts() < total => Some(Walk::new(c, source, device, &embedding, &output)?),
        _ => None,
    };
    for (i, layer_spec) in spec.layers.iter().enumerate() {
        if i < output.parts() {
            continue;
        }
        let layer_started = Instant::now();
        let mut layer = HostLayer::read(source, layer_spec, |name| recipe.layer(name, dtype))?;
        let mut notes = Vec::new();
        let mut kv = recipe.kv_scales.map(|_| KvRanges::new(config));
        let linears = process(&mut layer, recipe, walk.as_mut(), kv.as_mut(), &mut notes)?;
        let mut note =
            json!({ "layer": i, "seconds": seconds(layer_started), "transforms": notes, "linears": linears });
        let mut tensors = layer.tensors(recipe.format, dtype)?;
        if let (Some(granularity), Some(kv)) = (recipe.kv_scales, kv) {
            note["kv_amax"] = kv.json();
            tensors.extend(kv.tensors(&layer_spec.prefix, granularity, dtype)?);
        }
        sizes::add(&mut note, &tensors, source);
        output.add(&tensors, &note, walk.as_ref().map_or(&[], |w| &w.residual))?;
        progress(Progress::Layer(i, &note));
    }
    if let (Some(scheme), true) = (head, output.parts() < total) {
        let (tensors, mut note) = head::quantize(source, recipe, scheme, dtype, walk.as_mut())?;
        sizes::add(&mut note, &tensors, source);
        output.add(&tensors, &note, &[])?;
        progress(Progress::Layer(spec.layers.len(), &note));
    }
    finish(output, source, recipe, dtype, calibration, started, ("mixed_precision", mixed.into()))
}

/// Name of the report beside the weights.
pub const REPORT: &str = "quantization_report.json";
/// Name of the same for people.
pub const PAGE: &str = "quantization_report.html";

fn seconds(since: Instant) -> f64 {
    (since.elapsed().as_secs_f64() * 1e3).round() / 1e3
}

/// The calibration text on its way through the layers.
struct Walk<'a> {
    device: &'a Device,
    runner: Runner,
    /// `[tokens, hidden]` input of the next layer.
    residual: Vec<f32>,
    tokens: usize,
}

impl<'a> Walk<'a> {
    /// Where `output` is.
    fn new(
        calibration: &Calibration,
        source: &Checkpoint,
        device: &'a Device,
        embedding: &HostData,
        output: &Output,
    ) -> Result<Walk<'a>> {
        let mut walk = Walk::begin(calibration, source, device, embedding)?;
        if output.parts() > 0 {
            walk.residual = output.state(walk.residual.len())?;
        }
        Ok(walk)
    }

    /// Before the first layer.
    fn begin(
        calibration: &Calibration,
        source: &Checkpoint,
        device: &'a Device,
        embedding: &HostData,
    ) -> Result<Walk<'a>> {
        let config = source.config();
        let tokens = calibration.ids.len();
        if tokens == 0 || !tokens.is_multiple_of(calibration.context) {
            return Err(Error::input(
                "--calib",
                format!("{tokens} tokens; expected windows of {}", calibration.context),
            ));
        }
        let runner = Runner::new(device, config, calibration.context, WINDOWS)?;
        let residual = runner.embed(&calibration.ids, embedding);
        Ok(Walk { device, runner, residual, tokens })
    }

    /// Statistics of the inputs of `slots`, with the layer as it is now.
    fn collect(&mut self, layer: &HostLayer, slots: &[Slot], moments: bool) -> Result<Vec<Inputs>> {
        let on_device = layer.to_device(self.device)?;
        let k = |slot: &Slot| layer.parts.slot(*slot).first().k;
        let mut inputs: Vec<Inputs> = slots.iter().map(|slot| Inputs::new(k(slot), self.tokens, moments)).collect();
        let (device, last) = (self.device, slots.iter().max().copied());
        self.runner.run(&on_device, &layer.attention, &mut self.residual, &mut |step| {
            let Step::Input { slot, input, rows } = step else { return Ok(ControlFlow::Continue(())) };
            if let Some(i) = slots.iter().position(|wanted| *wanted == slot) {
                // A slot is looked at before it is rounded: it still takes floats.
                let x = device.download(input.plain_floats()?, rows * inputs[i].k)?;
                inputs[i].add(&x.to_f32());
            }
            Ok(if last == Some(slot) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        for (slot, inputs) in slots.iter().zip(&inputs) {
            inputs.check(&layer.parts.slot(*slot).first().name)?;
        }
        Ok(inputs)
    }

    /// Moves the text behind the layer; `kv` sees keys and values.
    fn advance(&mut self, layer: &HostLayer, mut kv: Option<&mut KvRanges>) -> Result<()> {
        let (device, width) = (self.device, layer.attention.qkv_width());
        self.runner.run(&layer.to_device(device)?, &layer.attention, &mut self.residual, &mut |step| {
            if let (Step::Qkv { qkv, rows }, Some(kv)) = (step, &mut kv) {
                kv.add(&device.download(qkv, rows * width)?.to_f32());
            }
            Ok(ControlFlow::Continue(()))
        })
    }
}

/// Transforms and rounds one layer and moves the calibration text behind it. Returns the report of its linear layers.
fn process(
    layer: &mut HostLayer,
    recipe: &Recipe,
    mut walk: Option<&mut Walk>,
    kv: Option<&mut KvRanges>,
    notes: &mut Vec<Value>,
) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    let Some(walk) = walk.as_mut() else {
        for slot in Slot::ALL {
            round_slot(layer, slot, recipe, None, &mut rows)?;
        }
        return Ok(rows);
    };
    let moments = matches!(recipe.rounding, WeightRounding::Gptq(_));
    // AWQ folds into layers before: all must still be in floating point.
    if recipe.true_sequential && recipe.transform != Transform::Awq {
        for slot in Slot::ALL {
            let mut inputs = walk.collect(layer, &[slot], moments)?;
            handle_slot(layer, slot, recipe, &mut inputs[0], notes, &mut rows)?;
        }
    } else {
        let mut inputs = walk.collect(layer, &Slot::ALL, moments)?;
        let mut hessians = Vec::new();
        for (slot, inputs) in Slot::ALL.into_iter().zip(&mut inputs) {
            hessians.push(transform_slot(layer, slot, recipe, inputs, notes)?);
        }
        for ((slot, inputs), hessian) in Slot::ALL.into_iter().zip(&inputs).zip(hessians) {
            round_slot(layer, slot, recipe, Some((inputs, hessian)), &mut rows)?;
        }
    }
    walk.advance(layer, kv)?;
    Ok(rows)
}

fn handle_slot(
    layer: &mut HostLayer,
    slot: Slot,
    recipe: &Recipe,
    inputs: &mut Inputs,
    notes: &mut Vec<Value>,
    rows: &mut Vec<Value>,
) -> Result<()> {
    let hessian = transform_slot(layer, slot, recipe, inputs, notes)?;
    round_slot(layer, slot, recipe, Some((inputs, hessian)), rows)
}

/// Applies the recipe's transform to a slot: weights, what produces its inputs, and the statistics of these.
fn transform_slot(
    layer: &mut HostLayer,
    slot: Slot,
    recipe: &Recipe,
    inputs: &mut Inputs,
    notes: &mut Vec<Value>,
) -> Result<Option<Hessian>> {
    let mut hessian = inputs.take_hessian();
    let quantized = layer.parts.slot(slot).iter().filter_map(|l| Some((l.weight.as_slice(), l.scheme?.grid)));
    let weights: Vec<(&[f32], Grid)> = quantized.collect();
    if weights.is_empty() {
        return Ok(hessian);
    }
    let (wished, mut note) = match recipe.transform {
        Transform::Smooth { alpha } if matches!(slot, Slot::Qkv | Slot::GateUp) => {
            let weights: Vec<&[f32]> = weights.iter().map(|(w, _)| *w).collect();
            (smoothing_scales(&inputs.amax(), &weights, alpha), json!({}))
        }
        Transform::Awq => {
            let mut mean_abs = inputs.mean_abs();
            layer.tie(slot, &mut mean_abs);
            let found = search_scales(&weights, &mean_abs, &inputs.samples)
                .ok_or_else(|| no_scale(&layer.parts.slot(slot).first().name, &weights[0].1))?;
            let note = json!({ "ratio": found.ratio, "error": found.error, "unscaled_error": found.unscaled_error });
            (found.scales, note)
        }
        _ => return Ok(hessian),
    };
    let scales = layer.fold(slot, wished);
    inputs.divide(&scales);
    if let Some(h) = &mut hessian {
        h.divide_inputs(&scales);
    }
    note["inputs_of"] = json!(layer.parts.slot(slot).first().name);
    if recipe.transform == Transform::Awq {
        // Not q and k: their product is what counts, and clipping was found to harm it.
        let mut clipped = Vec::new();
        for (role, linear) in layer.parts.slot_mut(slot).iter_mut() {
            if matches!(role, LinearRole::Q | LinearRole::K) {
                continue;
            }
            let Some(LayerScheme { grid, .. }) = linear.scheme else { continue };
            let fraction = clip(&mut linear.weight, linear.k, &inputs.samples, &grid);
            clipped.push(fraction.ok_or_else(|| no_scale(&linear.name, &grid))?);
        }
        note["clipped_groups"] = json!(clipped);
    }
    notes.push(note);
    Ok(hessian)
}

/// Rounds the linear layers of a slot and reports each.
fn round_slot(
    layer: &mut HostLayer,
    slot: Slot,
    recipe: &Recipe,
    calibrated: Option<(&Inputs, Option<Hessian>)>,
    rows: &mut Vec<Value>,
) -> Result<()> {
    let first = rows.len();
    for (_, linear) in layer.parts.slot_mut(slot).iter_mut() {
        rows.push(round_linear(
            linear,
            recipe,
            calibrated.as_ref().map(|(inputs, hessian)| (*inputs, hessian.as_ref())),
        )?);
    }
    if let (Some((inputs, _)), Some(row)) = (&calibrated, rows.get_mut(first)) {
        let activation = layer.parts.slot(slot).first().quantized.as_ref().map(|(_, activation)| *activation);
        row["inputs"] = histograms::of_inputs(&inputs.samples, activation);
    }
    Ok(())
}

/// Rounds one linear layer and reports it.
fn round_linear(
    linear: &mut HostLinear,
    recipe: &Recipe,
    calibrated: Option<(&Inputs, Option<&Hessian>)>,
) -> Result<Value> {
    let started = Instant::now();
    let k = linear.k;
    let Some(scheme) = linear.scheme else {
        linear.keep();
        return Ok(json!({ "name": linear.name, "bits_per_weight": linear.bits() }));
    };
    let grid = &scheme.grid;
    let failed = || no_scale(&linear.name, grid);
    let mut row = json!({ "name": linear.name });
    let weight = match (recipe.rounding, calibrated) {
        (WeightRounding::Gptq(options), Some((_, Some(hessian)))) => {
            let result = gptq(&linear.weight, hessian, grid, &options).ok_or_else(failed)?;
            row["gptq_loss"] = json!(result.loss);
            row["damp"] = json!(result.damp);
            row["dead_inputs"] = json!(result.dead);
            if result.damp.is_none() {
                tracing::warn!("{}: its Hessian is not positive definite; rounded to nearest", linear.name);
            }
            result.weight
        }
        (WeightRounding::Hqq, _) => hqq(&linear.weight, k, grid).ok_or_else(failed)?,
        (WeightRounding::Ternary(threshold), _) => ternary(&linear.weight, k, grid, threshold).ok_or_else(failed)?,
        (WeightRounding::Table(table), _) => round_to_table(&linear.weight, k, grid, table).ok_or_else(failed)?,
        (WeightRounding::KMeans { sensitive }, _) => {
            let squares = calibrated.filter(|_| sensitive).map(|(inputs, _)| inputs.mean_squares());
            let table = learn_table(&linear.weight, k, grid, squares.as_deref()).ok_or_else(failed)?;
            round_to_table(&linear.weight, k, grid, table).ok_or_else(failed)?
        }
        (WeightRounding::Nearest | WeightRounding::Gptq(_), _) => {
            round_to_nearest(&linear.weight, k, grid).ok_or_else(failed)?
        }
    };
    let dequantized = recipe.format.as_read(&weight).dequantize();
    let distortion = Distortion::between(&linear.weight, &dequantized);
    row["weight_sqnr_db"] = json!(distortion.sqnr_db);
    if let Some((inputs, _)) = calibrated {
        let errors: Vec<f32> = linear.weight.iter().zip(&dequantized).map(|(a, b)| a - b).collect();
        let energy = output_energy(&linear.weight, k, &inputs.samples);
        let lost = output_energy(&errors, k, &inputs.samples);
        row["output_error"] = json!(if energy > 0.0 { lost / energy } else { 0.0 });
        row["outlier_inputs"] = json!(outlier_channels(&inputs.amax(), OUTLIER).len());
    }
    row["bits_per_weight"] = json!(scheme.bits_per_weight(k, recipe.format));
    row["seconds"] = json!(seconds(started));
    row["weights"] = histograms::of_weights(&linear.weight, &weight);
    linear.quantized = Some((weight, activation(&scheme, calibrated.map(|(inputs, _)| inputs))));
    Ok(row)
}

/// How the inputs of a linear layer will be quantized.
fn activation(scheme: &LayerScheme, inputs: Option<&Inputs>) -> ActQuant {
    match (scheme.activation, inputs) {
        (Activation::Dynamic { asymmetric: false }, _) => ActQuant::DynamicPerToken,
        (Activation::Dynamic { asymmetric: true }, _) => ActQuant::DynamicAsymmetric,
        (Activation::LlmInt8 { threshold }, _) => ActQuant::LlmInt8 { threshold },
        (Activation::Static { asymmetric, observer }, Some(inputs)) => {
            // Finite, as was checked; a range beyond the scale's type is that of a model that has failed already.
            inputs
                .static_range(asymmetric, observer, scheme.grid.scale_type)
                .map_or(ActQuant::None, |a| ActQuant::StaticPerTensor { scale: a.scale, zero_point: a.zero_point })
        }
        _ => ActQuant::None,
    }
}

fn no_scale(name: &str, grid: &Grid) -> Error {
    Error::unsupported(
        format!("`{name}`: a scale beyond the range of {}, in which the format stores scales", grid.scale_type),
        "Use --format compressed-tensors, which stores scales in the model's own type",
    )
}
