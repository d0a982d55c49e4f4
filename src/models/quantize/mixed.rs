//! Mixed precision: what each linear layer loses at each width, and the widths that lose least within a number of bits.
//!
//! The loss is that of the residual stream behind the decoder layer: the mean over tokens of the squared length of its
//! error, relative to its own, when one linear layer alone is rounded to nearest. Layers are thus compared in one unit,
//! whatever lies between a weight and the stream.

use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, Expected};
use crate::device::Device;
use crate::dtype::{DType, HostData};
use crate::error::{Error, Result};
use crate::quant::ActQuant;
use crate::quant::allocate::{Choice, allocate};
use crate::quant::grid::round_to_nearest;

use super::super::role::{LinearRole, Slot};
use super::super::spec::{ModelSpec, expected_tensors};
use super::layer::HostLayer;
use super::{Activation, Calibration, LayerScheme, Recipe, Target, Walk, WeightRounding, no_scale, spread};

/// Windows of the calibration text that widths are compared on.
pub(super) const WINDOWS: usize = 8;

/// Measures every linear layer (or those that share an input together) at each of the recipe's widths, in full precision
/// otherwise. Returns `{"weights",
/// "fixed_bits", "units"}`: the number of weights of all linear layers, the bits of those that rules decide, and of the
/// others for each unit `{"modules": [...], "choices": [{"width", "bits", "loss"}, ...]}`, the last choice being that all
/// stays as it is. `progress` is told of the layers done.
pub(super) fn measure(
    source: &Checkpoint,
    spec: &ModelSpec,
    recipe: &Recipe,
    calibration: &Calibration,
    device: &Device,
    embedding: &HostData,
    progress: &mut dyn FnMut(usize),
) -> Result<Value> {
    let mut walk = Walk::begin(&some_windows(calibration), source, device, embedding)?;
    let (mut found, mut weights, mut fixed_bits) = (Vec::new(), 0.0, 0.0);
    for (index, layer_spec) in spec.layers.iter().enumerate() {
        let scheme = |name: &str| recipe.layer(name, embedding.dtype());
        let mut layer = HostLayer::read(source, layer_spec, scheme)?;
        for role in LinearRole::ALL {
            let linear = layer.parts.linear_mut(role);
            weights += linear.weights();
            if recipe.overrides.contains_key(&linear.name) {
                fixed_bits += linear.weights()
                    * linear.scheme.map_or(linear.bits(), |s| s.bits_per_weight(linear.k, recipe.format));
                linear.scheme = None;
            }
        }
        let before = walk.residual.clone();
        walk.advance(&layer, None)?;
        let whole = walk.residual.clone();
        let units: Vec<Vec<LinearRole>> = match recipe.target {
            Some(Target { fused: true, .. }) => Slot::ALL.map(|slot| slot.roles().to_vec()).into(),
            _ => LinearRole::ALL.map(|role| vec![role]).into(),
        };
        for unit in units {
            let roles: Vec<LinearRole> =
                unit.into_iter().filter(|&role| layer.parts.linear(role).scheme.is_some()).collect();
            if roles.is_empty() {
                continue;
            }
            let mut choices = Vec::new();
            for width in recipe.widths() {
                let mut bits = 0.0;
                for &role in &roles {
                    let linear = layer.parts.linear_mut(role);
                    let Some(scheme) = linear.scheme.map(|scheme| at_width(scheme, width)) else { continue };
                    let rounded = round_to_nearest(&linear.weight, linear.k, &scheme.grid);
                    let rounded = rounded.ok_or_else(|| no_scale(&linear.name, &scheme.grid))?;
                    // Of static ranges nothing is known yet.
                    let activation = match scheme.activation {
                        Activation::None => ActQuant::None,
                        Activation::Dynamic { asymmetric: true } | Activation::Static { asymmetric: true, .. } => {
                            ActQuant::DynamicAsymmetric
                        }
                        _ => ActQuant::DynamicPerToken,
                    };
                    bits += linear.weights() * scheme.bits_per_weight(linear.k, recipe.format);
                    linear.quantized = Some((rounded, activation));
                }
                walk.residual.clone_from(&before);
                walk.advance(&layer, None)?;
                let loss = relative_error(&whole, &walk.residual, source.config().hidden_size);
                choices.push(json!({ "width": width, "bits": bits, "loss": loss }));
            }
            roles.iter().for_each(|&role| layer.parts.linear_mut(role).quantized = None);
            let linears = || roles.iter().map(|&role| layer.parts.linear(role));
            let unquantized: f64 = linears().map(|linear| linear.weights() * linear.bits()).sum();
            choices.push(json!({ "width": null, "bits": unquantized, "loss": 0.0 }));
            let modules: Vec<&str> = linears().map(|linear| linear.name.as_str()).collect();
            found.push(json!({ "modules": modules, "choices": choices }));
        }
        walk.residual = whole;
        progress(index + 1);
    }
    Ok(json!({ "weights": weights, "fixed_bits": fixed_bits, "units": found }))
}

/// Chooses among what [`measure`] found so that all linear layers, those that rules decide among them, take no more than
/// `target` bits a weight. Returns the recipe with its choices, and what to report: bits a weight reached, and for
/// every unit its width and what each width would lose.
pub(super) fn choose(recipe: &Recipe, measured: &Value, target: f64) -> Result<(Recipe, Value)> {
    let broken =
        || Error::input("DST", "what the interrupted run measured is damaged; remove DST.partial and start again");
    let mut found: Vec<Value> = measured["units"].as_array().cloned().ok_or_else(broken)?;
    let number = |value: &Value, field: &str| value[field].as_f64().ok_or_else(broken);
    let (weights, fixed) = (number(measured, "weights")?, number(measured, "fixed_bits")?);
    let choices = |one: &Value| -> Result<Vec<Choice>> {
        let all = one["choices"].as_array().ok_or_else(broken)?;
        all.iter().map(|c| Ok(Choice { bits: number(c, "bits")?, loss: number(c, "loss")? })).collect()
    };
    let units = found.iter().map(choices).collect::<Result<Vec<_>>>()?;
    let chosen = allocate(&units, target * weights - fixed).ok_or_else(|| {
        let fewest: f64 = units.iter().map(|u| u.iter().map(|c| c.bits).fold(f64::INFINITY, f64::min)).sum();
        unreachable_target(target, (fewest + fixed) / weights)
    })?;
    let mut recipe = recipe.clone();
    let (mut bits, mut loss) = (fixed, 0.0);
    for ((one, unit), &c) in found.iter_mut().zip(&units).zip(&chosen) {
        let width = one["choices"][c]["width"].as_u64();
        bits += unit[c].bits;
        loss += unit[c].loss;
        let scheme = width.and_then(|w| u8::try_from(w).ok()).map(|width| at_width(recipe.base, width));
        for name in one["modules"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            recipe.overrides.insert(name.to_owned(), scheme);
        }
        one["width"] = json!(width);
    }
    let report = json!({ "target": target, "bits_per_weight": bits / weights, "loss": loss, "units": found });
    Ok((recipe, report))
}

/// Fails, before anything is measured, when the recipe's target is below the fewest bits that the layers can have.
///
/// # Errors
/// [`Error::Input`] with that number.
pub(super) fn check_target(source: &Checkpoint, recipe: &Recipe) -> Result<()> {
    let Some(target) = recipe.target else { return Ok(()) };
    if !matches!(recipe.rounding, WeightRounding::Nearest | WeightRounding::Gptq(_)) {
        let reason = "not with this method; only those that end with rounding to nearest or gptq choose among widths";
        return Err(Error::input("--target-bpw", reason));
    }
    let least = recipe.widths().into_iter().min().unwrap_or(16);
    let (mut weights, mut bits) = (0.0, 0.0);
    for expected in expected_tensors(source.config()) {
        let Expected::Linear { name, n, k, .. } = expected else { continue };
        if name == "lm_head" {
            continue;
        }
        let fixed = recipe.overrides.contains_key(&name);
        let width = |scheme| if fixed { scheme } else { at_width(scheme, least) };
        let scheme = recipe.layer(&name, DType::BF16).map(width);
        weights += (n * k) as f64;
        bits += (n * k) as f64 * scheme.map_or(16.0, |scheme| scheme.bits_per_weight(k, recipe.format));
    }
    let fewest = bits / weights;
    if fewest > target.bits_per_weight * (1.0 + 1e-9) {
        return Err(unreachable_target(target.bits_per_weight, fewest));
    }
    Ok(())
}

fn unreachable_target(target: f64, fewest: f64) -> Error {
    let reason = format!(
        "{target}: these layers take at least {fewest:.4} bits a weight, scales counted; larger groups or fewer rules lower that"
    );
    Error::input("--target-bpw", reason)
}

fn at_width(mut scheme: LayerScheme, bits: u8) -> LayerScheme {
    scheme.grid.bits = bits;
    scheme
}

/// Some of the windows, evenly spaced.
fn some_windows(calibration: &Calibration) -> Calibration {
    let ids = spread(&calibration.ids, calibration.context, WINDOWS).flatten().copied().collect();
    Calibration { ids, ..calibration.clone() }
}

/// Mean over rows of the squared length of their difference, relative to the row's own.
fn relative_error(rows: &[f32], other: &[f32], width: usize) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let of_row = |(a, b): (&[f32], &[f32])| {
        let energy: f64 = a.iter().map(|&a| square(a)).sum();
        let error: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
        error / energy.max(f64::MIN_POSITIVE)
    };
    rows.chunks_exact(width).zip(other.chunks_exact(width)).map(of_row).sum::<f64>()
        / (rows.len() / width).max(1) as f64
}
