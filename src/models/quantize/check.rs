//! What is wrong with a model and a recipe together, found before any work.

use crate::checkpoint::Checkpoint;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::Weight;
use crate::quant::grid::round_to_nearest;

use super::super::spec::ModelSpec;
use super::mixed::check_target;
use super::{Recipe, no_scale};

/// Fails when `recipe` cannot be carried out on `source`: what its format has no place for, layers that no program could
/// load in it, a target out of reach, a source that is quantized already or lacks tensors. Reads no weights.
///
/// # Errors
/// [`Error::Unsupported`] and [`Error::Input`] naming the flag or the layer, [`Error::Checkpoint`] as
/// [`Checkpoint::check`].
pub fn check(source: &Checkpoint, recipe: &Recipe) -> Result<()> {
    let spec = ModelSpec::new(source.config());
    let names: Vec<String> = spec.linears().map(|linear| linear.name.clone()).collect();
    recipe.format.check(&recipe.written(&names))?;
    check_target(source, recipe)?;
    source.check(&spec.expected())?;
    // What is quantized already is told by whoever reads it.
    for linear in spec.linears().chain([&spec.head]) {
        let scheme = recipe.becomes(&linear.name, &spec);
        if let Some(layer) = scheme {
            recipe.format.check_sizes(&linear.name, linear.n, linear.k, &recipe.scheme(&layer))?;
        }
        if !source.linear_scheme(&linear.name)?.is_dense() {
            return Err(Error::unsupported(
                format!("`{}`: quantizing what is quantized already", linear.name),
                "Use the full-precision model that it was made from",
            ));
        }
    }
    Ok(())
}

/// Reads every weight that `recipe` quantizes, once, and fails where one is not finite or its scales will not fit the type
/// that the format has for them.
///
/// # Errors
/// [`Error::Checkpoint`] naming tensor and element, [`Error::Unsupported`] naming the layer.
pub fn check_values(source: &Checkpoint, recipe: &Recipe) -> Result<()> {
    let spec = ModelSpec::new(source.config());
    let dtype = source.tensor(&spec.embedding.name)?.dtype();
    for norm in spec.norms() {
        source.tensor(&norm.name)?;
    }
    for linear in spec.linears() {
        let weight = linear.read(source)?.weight;
        let (Some(layer), Weight::Dense { k, data, .. }) = (recipe.layer(&linear.name, dtype), weight) else {
            continue;
        };
        // Scales are smaller than what they scale, so those of most layers need no look.
        let (grid, w) = (layer.grid, data.to_f32());
        let amax = w.iter().fold(0f32, |max, x| max.max(x.abs()));
        if grid.scale_type == DType::F16 && amax > f32::from(half::f16::MAX) && round_to_nearest(&w, k, &grid).is_none()
        {
            return Err(no_scale(&linear.name, &grid));
        }
    }
    Ok(())
}
