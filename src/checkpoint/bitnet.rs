//! BitNet b1.58 checkpoints: ternary weights with one scale a matrix, int8 activations; docs/formats.md section 8.

use rayon::prelude::*;
use safetensors::Dtype;

use crate::error::Result;
use crate::quant::ternary::Ternary;
use crate::quant::{ActQuant, Encoding, LinearWeight, QuantWeight, Scheme, Weight};

use super::json::Object;
use super::module::{FLOATS, Module, Sizes};
use super::pattern::Pattern;

const UNDERSTOOD: &[&str] =
    &["quant_method", "linear_class", "quantization_mode", "modules_to_not_convert", "use_rms_norm", "rms_norm_eps"];
const HARMLESS: &[&str] = &["_commit_hash"];

/// Codes in a byte.
const PER_BYTE: usize = 4;

/// A BitNet configuration.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct BitNet {
    form: Form,
    /// Modules that stay floating-point, by the end of their name or by pattern; `None` is the head alone.
    not_converted: Option<Vec<(String, Pattern)>>,
}

/// What a layer's tensors mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// `bitlinear`: codes over `weight_scale`.
    Divided,
    /// `autobitlinear`, offline: codes times `weight_scale`.
    Multiplied,
    /// `autobitlinear`, online: weights as trained, to be made ternary by their mean magnitude.
    Online,
}

impl BitNet {
    pub(super) fn parse(o: &Object) -> Result<BitNet> {
        o.refuse_unknown(&[UNDERSTOOD, HARMLESS])?;
        if o.bool("use_rms_norm")? == Some(true) {
            let reason = "every linear layer has a norm of its own; expected false, other models are not supported";
            return Err(o.error("use_rms_norm", reason));
        }
        o.number("rms_norm_eps", 0.0, 1.0)?; // of the norms that are not there
        let form = match (o.str("linear_class")?.unwrap_or("bitlinear"), o.str("quantization_mode")?) {
            ("bitlinear" | "autobitlinear", Some(mode)) if !matches!(mode, "offline" | "online") => {
                return Err(o.error("quantization_mode", format!("expected `offline` or `online`, got `{mode}`")));
            }
            ("bitlinear", _) => Form::Divided,
            ("autobitlinear", Some("online")) => Form::Online,
            ("autobitlinear", _) => Form::Multiplied,
            (other, _) => {
                let reason = format!("expected `bitlinear` or `autobitlinear`, got `{other}`");
                return Err(o.error("linear_class", reason));
            }
        };
        let pattern = |key: String| match Pattern::new(&format!(r"(?:{key})(?:(?<=\.)|(?=\.|$))")) {
            Ok(pattern) => Ok((key, pattern)),
            Err(reason) => Err(o.error("modules_to_not_convert", reason)),
        };
        let not_converted = o.strings("modules_to_not_convert")?;
        let not_converted = not_converted.map(|keys| keys.into_iter().map(pattern).collect()).transpose()?;
        Ok(BitNet { form, not_converted })
    }

    /// The file tells, where it can: only quantized layers have a scale or bytes. Of weights as trained only their name
    /// tells, and a layer that should have a scale is not taken for an unquantized one.
    fn is_quantized(&self, m: &Module) -> Result<bool> {
        if m.has("weight_scale") || m.entry("weight").is_some_and(|w| w.dtype == Dtype::U8) {
            return Ok(true);
        }
        let Some(keys) = &self.not_converted else { return Ok(m.name != "lm_head") };
        for (key, pattern) in keys {
            if m.name.ends_with(key) || pattern.matches(m.name).map_err(|reason| m.error("weight", reason))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) fn check(&self, m: &mut Module) -> Result<Option<Sizes>> {
        if !self.is_quantized(m)? {
            return Ok(m.check_dense());
        }
        let types: &[Dtype] = match self.form {
            Form::Divided => &[Dtype::U8],
            Form::Multiplied => &[Dtype::U8, Dtype::F16, Dtype::BF16, Dtype::F32],
            Form::Online => FLOATS,
        };
        let Some((rows, k)) = m.matrix("weight", types) else { return Ok(None) };
        let packed = m.entry("weight").is_some_and(|w| w.dtype == Dtype::U8);
        let n = if packed { rows * PER_BYTE } else { rows };
        match self.form {
            Form::Online if m.has("weight_scale") => {
                m.problem("weight_scale", "there, though quantization_mode is `online`");
            }
            Form::Online => {}
            _ => m.need("weight_scale", FLOATS, &[&[1], &[]]),
        }
        m.optional("bias", FLOATS, &[&[n]]);
        Ok(Some(Sizes { n, k }))
    }

    pub(super) fn scheme(&self, m: &Module) -> Result<Scheme> {
        if !self.is_quantized(m)? {
            return Ok(m.dense_scheme());
        }
        Ok(Scheme {
            weight_bits: 2,
            group_size: None,
            symmetric: true,
            encoding: Encoding::Affine,
            act_order: false,
            activation: ActQuant::DynamicPerToken,
        })
    }

    pub(super) fn read(&self, m: &Module, sizes: Sizes) -> Result<LinearWeight> {
        if !self.is_quantized(m)? {
            return m.read_dense(sizes);
        }
        let Sizes { n, k } = sizes;
        let (codes, scale) = match (self.form, m.entry("weight").map(|w| w.dtype)) {
            (Form::Online, _) => {
                let ternary = Ternary::b158(&m.scales("weight")?);
                (ternary.codes.par_iter().map(|&q| (q + 2) as u8).collect(), ternary.scale)
            }
            (form, Some(Dtype::U8)) => (unpack(m)?, weight_scale(m, form)?),
            (form, _) => {
                let (codes, magnitude) = equal_magnitudes(m)?;
                (codes, magnitude * weight_scale(m, form)?)
            }
        };
        let mut weight = QuantWeight::empty(n, k, 2, k);
        weight.codes = codes.into();
        weight.scales.fill(scale);
        weight.zeros.fill(2.0);
        Ok(LinearWeight { weight: Weight::Quant(weight), bias: m.bias()?, activation: ActQuant::DynamicPerToken })
    }
}

/// What a code of 1 stands for.
fn weight_scale(m: &Module, form: Form) -> Result<f32> {
    let stored = m.scales("weight_scale")?[0];
    let scale = if form == Form::Divided { 1.0 / stored } else { stored };
    if scale.is_finite() && scale != 0.0 {
        return Ok(scale);
    }
    Err(m.error("weight_scale", format!("is {stored}; expected a number that is not 0")))
}

/// Codes 1, 2, 3 for -1, 0, 1. A byte has four rows, a quarter of all rows apart, the first in the lowest bits, 0 for -1.
fn unpack(m: &Module) -> Result<Vec<u8>> {
    let bytes = m.bytes("weight");
    if bytes.par_iter().any(|&b| b & (b >> 1) & 0x55 != 0) {
        return Err(m.error("weight", "has a field of 3; expected 0, 1 and 2, for -1, 0 and 1"));
    }
    let mut codes = vec![0u8; bytes.len() * PER_BYTE];
    codes.par_chunks_mut(bytes.len().max(1)).enumerate().for_each(|(field, codes)| {
        codes.iter_mut().zip(bytes).for_each(|(code, byte)| *code = (byte >> (2 * field) & 3) + 1);
    });
    Ok(codes)
}

/// Codes of floating-point weights that are ternary already, and their magnitude.
fn equal_magnitudes(m: &Module) -> Result<(Vec<u8>, f32)> {
    let values = m.scales("weight")?;
    let magnitude = values.iter().fold(0f32, |most, w| most.max(w.abs()));
    let magnitude = if magnitude == 0.0 { 1.0 } else { magnitude };
    if let Some(i) = values.iter().position(|&w| w != 0.0 && w.abs() != magnitude) {
        let reason = format!(
            "element {i} is {}; expected -{magnitude}, 0 and {magnitude} (weights as trained: quantization_mode `online`)",
            values[i]
        );
        return Err(m.error("weight", reason));
    }
    Ok((values.par_iter().map(|&w| (w / magnitude + 2.0) as u8).collect(), magnitude))
}
