//! Which quantization a checkpoint says it has, and reading a layer by it.

use crate::error::{Error, Result};
use crate::quant::{LinearWeight, Scheme};

use super::awq::Awq;
use super::bitnet::BitNet;
use super::bitsandbytes::{BitsAndBytes, LEARNED_TABLES};
use super::compressed::CompressedTensors;
use super::files::ModelDir;
use super::fp8::Fp8;
use super::gptq::Gptq;
use super::hqq::Hqq;
use super::json::Object;
use super::module::{Module, Sizes};

/// What other tools put beside config.json; used when that has no `quantization_config`.
const SIDECARS: [&str; 2] = ["quantize_config.json", "quant_config.json"];
pub(super) const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// How the linear layers of a checkpoint are stored.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Quantization {
    None,
    Gptq(Gptq),
    Awq(Awq),
    BitNet(BitNet),
    BitsAndBytes(BitsAndBytes),
    CompressedTensors(CompressedTensors),
    Fp8(Fp8),
    Hqq(Hqq),
}

impl Quantization {
    /// Reads `quantization_config` of config.json, or a sidecar; the two must agree.
    pub(super) fn read(dir: &ModelDir, config: &Object) -> Result<Quantization> {
        let mut found: Option<(String, Quantization)> = None;
        for field in ["quantization_config", "compression_config"] {
            if let Some(o) = config.object(field)? {
                found = Some((format!("config.json: {field}"), Quantization::parse(&o, None)?));
                break;
            }
        }
        for name in SIDECARS {
            let Some(o) = dir.json(name, MAX_CONFIG_BYTES)? else { continue };
            let guess = if o.get("w_bit").is_some() || o.get("zero_point").is_some() { "awq" } else { "gptq" };
            let sidecar = Quantization::parse(&o, Some(guess))?;
            match &found {
                None => found = Some((name.to_owned(), sidecar)),
                Some((_, q)) if *q == sidecar => {}
                Some((place, _)) => {
                    let reason = format!("contradicts {place}; remove the one that is wrong");
                    return Err(Error::file(o.file(), reason));
                }
            }
        }
        Ok(found.map_or(Quantization::None, |(_, q)| q))
    }

    fn parse(o: &Object, default_method: Option<&str>) -> Result<Quantization> {
        let method = match (o.str("quant_method")?, o.str("method")?) {
            (Some(a), Some(b)) if a != b => {
                return Err(o.error("method", format!("`{b}` contradicts quant_method `{a}`")));
            }
            (a, b) => match a.or(b).or(default_method) {
                Some(method) => method,
                None if o.keys().all(|key| ["bits", "group_size", "mode", "quant_method"].contains(&key)) => {
                    return Err(Error::unsupported(
                        format!("{}: field `{}`: a model quantized by MLX", o.file().display(), o.field_path("bits")),
                        "Use the full-precision model that it was made from, or a GPTQ or AWQ checkpoint of it",
                    ));
                }
                None => return Err(o.error("quant_method", "missing")),
            },
        };
        let advice = match method {
            "gptq" => return Gptq::parse(o).map(Quantization::Gptq),
            "awq" => return Awq::parse(o).map(Quantization::Awq),
            "compressed-tensors" => return CompressedTensors::parse(o).map(Quantization::CompressedTensors),
            "bitsandbytes" => return BitsAndBytes::parse(o).map(Quantization::BitsAndBytes),
            LEARNED_TABLES => return BitsAndBytes::parse_learned(o).map(Quantization::BitsAndBytes),
            "fp8" => return Fp8::parse(o).map(Quantization::Fp8),
            "bitnet" => return BitNet::parse(o).map(Quantization::BitNet),
            "hqq" => return Hqq::parse(o).map(Quantization::Hqq),
            "marlin" => "Use the GPTQ checkpoint that it was made from",
            "auto-round" | "intel/auto-round" => {
                "Export the model from AutoRound in the format auto_gptq, auto_awq or llm_compressor, which are supported"
            }
            _ => "GPTQ, AWQ, compressed-tensors, fp8, bitsandbytes, HQQ, BitNet and unquantized models are supported",
        };
        Err(Error::unsupported(
            format!("{}: field `{}`: `{method}`", o.file().display(), o.field_path("quant_method")),
            advice,
        ))
    }

    /// Examines one layer: headers and, where they decide what the file means, zero points and column groups.
    /// `None` when its size cannot be told; the module then has a problem.
    pub(super) fn check(&self, m: &mut Module) -> Result<Option<Sizes>> {
        match self {
            Quantization::None => Ok(m.check_dense()),
            Quantization::Gptq(q) => q.check(m),
            Quantization::Awq(q) => q.check(m),
            Quantization::BitNet(q) => q.check(m),
            Quantization::BitsAndBytes(q) => q.check(m),
            Quantization::CompressedTensors(q) => q.check(m),
            Quantization::Fp8(q) => Ok(q.check(m)),
            Quantization::Hqq(_) => Hqq::check(m),
        }
    }

    /// Checks one layer and tells its scheme.
    pub(super) fn scheme(&self, m: &mut Module) -> Result<Scheme> {
        let sizes = self.sizes(m)?;
        match self {
            Quantization::None => Ok(m.dense_scheme()),
            Quantization::Gptq(q) => q.scheme(m, sizes),
            Quantization::Awq(q) => Ok(q.scheme(m, sizes)),
            Quantization::BitNet(q) => q.scheme(m),
            Quantization::BitsAndBytes(q) => q.scheme(m, sizes),
            Quantization::CompressedTensors(q) => q.scheme(m, sizes),
            Quantization::Fp8(q) => Ok(q.scheme(m, sizes)),
            Quantization::Hqq(_) => Hqq::scheme(m, sizes),
        }
    }

    /// Checks one layer and reads it.
    pub(super) fn linear(&self, m: &mut Module) -> Result<LinearWeight> {
        let sizes = self.sizes(m)?;
        match self {
            Quantization::None => m.read_dense(sizes),
            Quantization::Gptq(q) => q.read(m, sizes),
            Quantization::Awq(q) => q.read(m, sizes),
            Quantization::BitNet(q) => q.read(m, sizes),
            Quantization::BitsAndBytes(q) => q.read(m, sizes),
            Quantization::CompressedTensors(q) => q.read(m, sizes),
            Quantization::Fp8(q) => q.read(m, sizes),
            Quantization::Hqq(_) => Hqq::read(m, sizes),
        }
    }

    fn sizes(&self, m: &mut Module) -> Result<Sizes> {
        let sizes = self.check(m)?;
        m.finish()?;
        sizes.ok_or_else(|| m.error("weight", "missing"))
    }
}
