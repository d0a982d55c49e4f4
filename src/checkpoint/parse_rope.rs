//! Rotary position settings: `rope_theta` with `rope_scaling` (transformers 4) or `rope_parameters` (5), with the
//! defaults of transformers' `modeling_rope_utils`.

use crate::error::{Error, Result};

use super::config::{MAX_POSITIONS, RopeConfig, RopeScaling};
use super::json::Object;

/// Reads the rotary settings of a `config.json`.
pub(super) fn rope(o: &Object, max_position_embeddings: usize, default_theta: f32) -> Result<RopeConfig> {
    let scaling = o.object("rope_scaling")?;
    let parameters = o.object("rope_parameters")?;
    let mut thetas = Vec::new();
    for holder in [Some(o), scaling.as_ref(), parameters.as_ref()].into_iter().flatten() {
        thetas.extend(holder.number("rope_theta", 1.0, 1e12)?.map(|t| t as f32));
    }
    if thetas.windows(2).any(|t| t[0] != t[1]) {
        return Err(o.error("rope_theta", format!("written more than once with different values: {thetas:?}")));
    }
    let max = max_position_embeddings;
    let read = |s: Option<&Object>| s.map_or(Ok(RopeScaling::None), |s| scaling_of(o, s, max));
    let (old, new) = (read(scaling.as_ref())?, read(parameters.as_ref())?);
    if scaling.is_some() && parameters.is_some() && old != new {
        return Err(o.error("rope_scaling", "contradicts rope_parameters"));
    }
    let scaling = if parameters.is_some() { new } else { old };
    Ok(RopeConfig { theta: thetas.first().copied().unwrap_or(default_theta), scaling })
}

fn scaling_of(config: &Object, s: &Object, max_position_embeddings: usize) -> Result<RopeScaling> {
    let (new_name, old_name) = (s.str("rope_type")?, s.str("type")?);
    if let (Some(new), Some(old)) = (new_name, old_name)
        && new != old
    {
        return Err(s.error("rope_type", format!("`{new}` contradicts type `{old}`")));
    }
    if s.get("partial_rotary_factor").is_some_and(|v| v.as_f64() != Some(1.0)) {
        return Err(s.error("partial_rotary_factor", "rotating a part of each head is not supported"));
    }
    let need = |field: &str, low, high| {
        let value = s.number(field, low, high)?;
        value
            .map(|v| v as f32)
            .ok_or_else(|| s.error(field, format!("missing; expected a number from {low} to {high}")))
    };
    let factor = || need("factor", 1.0, 1e6);
    let given_original = match s.size("original_max_position_embeddings", MAX_POSITIONS)? {
        Some(n) => Some(n),
        None => config.size("original_max_position_embeddings", MAX_POSITIONS)?,
    };
    let original_max_position_embeddings = given_original.unwrap_or(max_position_embeddings);
    match new_name.or(old_name) {
        // `{"full_attention": {...}, ...}`: settings per kind of layer.
        None if s.keys().any(|k| k.ends_with("_attention")) => {
            Err(s.error("full_attention", "rotary settings that differ between layers are not supported"))
        }
        None if s.get("factor").is_some() => Err(s.error("rope_type", "missing")),
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: factor()? }),
        Some("dynamic") => Ok(RopeScaling::Dynamic { factor: factor()? }),
        Some("llama3") => {
            let (low_freq_factor, high_freq_factor) =
                (need("low_freq_factor", 1e-6, 1e6)?, need("high_freq_factor", 1e-6, 1e6)?);
            if low_freq_factor >= high_freq_factor {
                return Err(
                    s.error("high_freq_factor", format!("expected more than low_freq_factor = {low_freq_factor}"))
                );
            }
            Ok(RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            })
        }
        Some("yarn") => yarn(s, max_position_embeddings, original_max_position_embeddings),
        Some(other) => Err(Error::unsupported(
            format!("{}: field `{}`: rope type `{other}`", s.file().display(), s.field_path("rope_type")),
            "default, linear, dynamic, llama3 and yarn are supported",
        )),
    }
}

/// YaRN (arXiv 2309.00071).
fn yarn(s: &Object, max_position_embeddings: usize, original_max_position_embeddings: usize) -> Result<RopeScaling> {
    let stretch = max_position_embeddings as f64 / original_max_position_embeddings as f64;
    let factor = match s.number("factor", 1.0, 1e6)? {
        Some(factor) => factor,
        None if stretch >= 1.0 => stretch,
        None => return Err(s.error("factor", "missing; expected a number of at least 1")),
    };
    let mscale = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    let positive = |field| s.number(field, 1e-6, 1e6);
    let attention_factor =
        match (positive("attention_factor")?, s.number("mscale", 0.0, 1e3)?, s.number("mscale_all_dim", 0.0, 1e3)?) {
            (Some(given), ..) => given,
            // transformers takes the ratio only when both are given and not zero.
            (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => mscale(m) / mscale(all),
            (None, ..) => mscale(1.0),
        };
    let (beta_fast, beta_slow) = (positive("beta_fast")?.unwrap_or(32.0), positive("beta_slow")?.unwrap_or(1.0));
    if beta_fast < beta_slow {
        return Err(s.error("beta_fast", format!("expected at least beta_slow = {beta_slow}, got {beta_fast}")));
    }
    Ok(RopeScaling::Yarn {
        factor: factor as f32,
        original_max_position_embeddings,
        beta_fast: beta_fast as f32,
        beta_slow: beta_slow as f32,
        attention_factor: attention_factor as f32,
        truncate: s.bool("truncate")?.unwrap_or(true),
    })
}
