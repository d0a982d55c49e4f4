//! FP8 weights: `e4m3fn` codes under scales of a tensor, of rows or of blocks; docs/formats.md section 9. And checkpoints of
//! Hugging Face's `quant_method: fp8` (DeepSeek, Qwen, Mistral).
//!
//! Weights alone are run in FP8: what such a file says of activations is noted, and they stay in 16 bit.

use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::quant::encoding::find_e4m3_nan;
use crate::quant::{ActQuant, Encoding, LinearWeight, QuantWeight, Scheme, Storage, Stored, Weight};

use super::json::Object;
use super::module::{FLOATS, Module, Sizes};

const UNDERSTOOD: &[&str] = &[
    "activation_scheme",
    "fmt",
    "ignored_layers",
    "modules_to_not_convert",
    "quant_method",
    "scale_fmt",
    "weight_block_size",
];
/// What a program is to make of the file, which tool made it, and the KV cache, which is kept in 16 bit.
const HARMLESS: &[&str] = &[
    "_commit_hash",
    "autoround_version",
    "dequantize",
    "kv_cache_quant_targets",
    "kv_cache_scheme",
    "meta",
    "provider",
];
const MAX_BLOCK: i64 = 1 << 20;
const CODES: &[Dtype] = &[Dtype::F8_E4M3];
/// One value for a whole tensor.
const ONE: &[&[usize]] = &[&[1], &[], &[1, 1]];
const SCALES: [&str; 2] = ["weight_scale_inv", "weight_scale"];
const INPUT_SCALES: [&str; 2] = ["activation_scale", "input_scale"];

/// Output channels and inputs that share a scale; the last block of either may be short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl Block {
    /// One scale for the whole tensor.
    pub(super) const TENSOR: Block = Block { rows: usize::MAX, columns: usize::MAX };
    /// One for each output channel.
    pub(super) const CHANNEL: Block = Block { rows: 1, columns: usize::MAX };

    /// Two sizes, or nothing.
    pub(super) fn parse(o: &Object, field: &str) -> Result<Option<Block>> {
        let Some(value) = o.get(field).filter(|value| !value.is_null()) else { return Ok(None) };
        let side = |value: &serde_json::Value| value.as_i64().filter(|side| (1..=MAX_BLOCK).contains(side));
        match value.as_array().map(Vec::as_slice) {
            Some([rows, columns]) if let (Some(rows), Some(columns)) = (side(rows), side(columns)) => {
                Ok(Some(Block { rows: rows as usize, columns: columns as usize }))
            }
            _ => Err(o.error(field, format!("expected two sizes from 1 to {MAX_BLOCK}, got {value}"))),
        }
    }

    /// Checks a layer's codes and scales.
    pub(super) fn check(self, m: &mut Module, scale: &'static str) -> Option<Sizes> {
        let (n, k) = m.matrix("weight", CODES)?;
        match self {
            Block::TENSOR => m.need(scale, FLOATS, ONE),
            Block::CHANNEL => m.need(scale, FLOATS, &[&[n, 1], &[n]]),
            Block { rows, columns } => m.need(scale, FLOATS, &[&[n.div_ceil(rows), k.div_ceil(columns)]]),
        }
        m.optional("bias", FLOATS, &[&[n]]);
        Some(Sizes { n, k })
    }

    pub(super) fn scheme(self, Sizes { k, .. }: Sizes) -> Scheme {
        Scheme {
            weight_bits: 8,
            group_size: Some(self.columns).filter(|&columns| columns < k),
            symmetric: true,
            encoding: Encoding::E4m3,
            act_order: false,
            activation: ActQuant::None,
        }
    }

    /// Reads a layer that was checked: each row has the scales of its blocks as those of its groups.
    pub(super) fn read(self, m: &Module, Sizes { n, k }: Sizes, scale: &str) -> Result<LinearWeight> {
        let bytes = m.shared("weight")?;
        if let Some(at) = find_e4m3_nan(&bytes) {
            let (row, column) = (at / k, at % k);
            let reason =
                format!("row {row}, column {column} is NaN ({:#04x}); expected finite e4m3fn values", bytes[at]);
            return Err(m.error("weight", reason));
        }
        let group_size = self.columns.min(k);
        let groups = k.div_ceil(group_size);
        let of_blocks = m.scales(scale)?;
        let scales: Vec<f32> = (0..n).flat_map(|r| &of_blocks[r / self.rows * groups..][..groups]).copied().collect();
        let zeros = vec![0.0; scales.len()];
        let codes = Stored::new(bytes, n, k, 8, Storage::Bytes { offset: 0 }).into();
        let encoding = Encoding::E4m3;
        let weight = QuantWeight { n, k, bits: 8, group_size, codes, scales, zeros, order: None, encoding };
        Ok(LinearWeight { weight: Weight::Quant(weight), bias: m.bias()?, activation: ActQuant::None })
    }
}

/// Checks the scale of inputs under one of `names`, which nothing uses, and says so.
pub(super) fn note_activations(m: &mut Module, is_static: bool, names: &[&'static str]) {
    let how = if is_static { "static" } else { "dynamic" };
    m.notes.push(format!("activations in FP8 ({how}): not quantized here, weights alone are; they stay in 16 bit"));
    if !is_static {
        return;
    }
    let name = names.iter().find(|name| m.has(name)).unwrap_or(&names[0]);
    m.need(name, FLOATS, ONE);
    if m.problems.is_empty()
        && let Err(error) = m.scales(name)
    {
        m.problems.push(error.to_string());
    }
}

/// A configuration of `quant_method: fp8`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Fp8 {
    block: Block,
    static_activations: bool,
}

impl Fp8 {
    pub(super) fn parse(o: &Object) -> Result<Fp8> {
        o.refuse_unknown(&[UNDERSTOOD, HARMLESS])?;
        if let Some(other) = o.str("fmt")?.filter(|format| *format != "e4m3") {
            return Err(Error::unsupported(
                format!("{}: field `{}`: FP8 weights in `{other}`", o.file().display(), o.field_path("fmt")),
                "`e4m3` is supported",
            ));
        }
        let static_activations = match o.str("activation_scheme")?.unwrap_or("dynamic") {
            "dynamic" => false,
            "static" => true,
            other => {
                return Err(o.error("activation_scheme", format!("expected `dynamic` or `static`, got `{other}`")));
            }
        };
        // How the writer rounded scales, which are floats here whatever it says.
        if let Some(other) = o.str("scale_fmt")?.filter(|format| !matches!(*format, "float" | "ue8m0")) {
            return Err(o.error("scale_fmt", format!("expected `float` or `ue8m0`, got `{other}`")));
        }
        // Which layers these are the file says itself, by the type of their weights; older ones list none.
        o.strings("modules_to_not_convert")?;
        o.strings("ignored_layers")?;
        Ok(Fp8 { block: Block::parse(o, "weight_block_size")?.unwrap_or(Block::TENSOR), static_activations })
    }

    /// Codes without a scale, or a scale without codes, are a fault of the file and no unquantized layer.
    fn is_quantized(m: &Module) -> bool {
        SCALES.iter().any(|scale| m.has(scale)) || m.entry("weight").is_some_and(|w| !FLOATS.contains(&w.dtype))
    }

    /// The name of the scales, which are factors under either.
    fn scale(m: &Module) -> &'static str {
        if m.has(SCALES[1]) { SCALES[1] } else { SCALES[0] }
    }

    pub(super) fn check(&self, m: &mut Module) -> Option<Sizes> {
        if !Fp8::is_quantized(m) {
            return m.check_dense();
        }
        let sizes = self.block.check(m, Fp8::scale(m));
        if sizes.is_some() {
            note_activations(m, self.static_activations, &INPUT_SCALES);
        }
        sizes
    }

    pub(super) fn scheme(&self, m: &Module, sizes: Sizes) -> Scheme {
        if Fp8::is_quantized(m) { self.block.scheme(sizes) } else { m.dense_scheme() }
    }

    pub(super) fn read(&self, m: &Module, sizes: Sizes) -> Result<LinearWeight> {
        if Fp8::is_quantized(m) { self.block.read(m, sizes, Fp8::scale(m)) } else { m.read_dense(sizes) }
    }
}
