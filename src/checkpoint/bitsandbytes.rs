//! bitsandbytes checkpoints: 4-bit codebooks (NF4, FP4) in blocks, with or without double quantization, and LLM.int8();
//! and lowbit's own, with a learned table for each layer; docs/formats.md sections 5 and 7.

use safetensors::Dtype;

use crate::error::Result;
use crate::quant::table::columns_of_block;
use crate::quant::{ActQuant, Codebook, Encoding, LinearWeight, QuantWeight, Scheme, Storage, Stored, Weight};

use super::json::{self, Object};
use super::module::{FLOATS, Module, Sizes};

/// Fields that say how to run it, which is for the device to choose, or repeat what the tensors say.
const HARMLESS: &[&str] =
    &["_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype", "llm_int8_enable_fp32_cpu_offload", "meta"];
const UNDERSTOOD: &[&str] = &[
    "bnb_4bit_quant_storage",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "llm_int8_has_fp16_weight",
    "llm_int8_skip_modules",
    "llm_int8_threshold",
    "load_in_4bit",
    "load_in_8bit",
    "quant_method",
];

/// What 4-bit codes lie in: their bytes under any element type.
const STORAGE: &[Dtype] =
    &[Dtype::U8, Dtype::I8, Dtype::F16, Dtype::BF16, Dtype::F32, Dtype::F64, Dtype::I16, Dtype::I32];
/// The state tensors, and the table that each stands for; `None` is the table that the file itself has.
const STATES: [(&str, Option<Codebook>); 3] = [
    ("weight.quant_state.bitsandbytes__nf4", Some(Codebook::NF4)),
    ("weight.quant_state.bitsandbytes__fp4", Some(Codebook::FP4)),
    ("weight.quant_state.lowbit__codebook", None),
];
/// `quant_method` of lowbit's own checkpoints with learned tables, a name that no other program takes for its own.
pub(super) const LEARNED_TABLES: &str = "lowbit-codebook";
/// Far above any quantization state, which has a handful of short fields.
const MAX_STATE_BYTES: usize = 4096;
const MAX_WIDTH: i64 = 1 << 24;
const MAX_BLOCK: usize = 1 << 20;
/// How far a file's table may be from the one its name stands for: f32 digits written by other programs.
const MAP_TOLERANCE: f32 = 1e-6;

/// A bitsandbytes configuration.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct BitsAndBytes {
    bits: u8,
    /// Activations of at least this size run in 16 bit (8-bit weights); 0: none do.
    threshold: f32,
}

/// Quantization state of one 4-bit weight.
#[derive(Debug, Clone, Copy)]
struct State {
    sizes: Sizes,
    /// The table; `None` is the file's own.
    codebook: Option<Codebook>,
    /// Elements of the flattened weight that share a scale.
    block: usize,
    /// Double quantization.
    nested: Option<Nested>,
}

/// Scales are themselves 8-bit codes: `map[code] * absmax[block of scales] + offset`.
#[derive(Debug, Clone, Copy)]
struct Nested {
    block: usize,
    offset: f32,
}

impl BitsAndBytes {
    pub(super) fn parse(o: &Object) -> Result<BitsAndBytes> {
        o.refuse_unknown(&[UNDERSTOOD, HARMLESS])?;
        let (four, eight) = (o.bool("load_in_4bit")?.unwrap_or(false), o.bool("load_in_8bit")?.unwrap_or(false));
        if four == eight {
            return Err(o.error("load_in_4bit", format!("{four}, and load_in_8bit {eight}; expected one of them")));
        }
        if o.bool("llm_int8_has_fp16_weight")? == Some(true) {
            let reason = "weights are 16-bit and quantized while running; use the unquantized model";
            return Err(o.error("llm_int8_has_fp16_weight", reason));
        }
        if let Some(other) = o.str("bnb_4bit_quant_type")?.filter(|t| !matches!(*t, "nf4" | "fp4")) {
            return Err(o.error("bnb_4bit_quant_type", format!("expected `nf4` or `fp4`, got `{other}`")));
        }
        // These the tensors themselves say, layer by layer; here only their types are checked.
        o.bool("bnb_4bit_use_double_quant")?;
        o.str("bnb_4bit_quant_storage")?;
        o.strings("llm_int8_skip_modules")?;
        let threshold = o.number("llm_int8_threshold", 0.0, 1e30)?.unwrap_or(6.0) as f32;
        Ok(BitsAndBytes { bits: if four { 4 } else { 8 }, threshold })
    }

    /// Of lowbit's own checkpoints, whose layers say everything themselves.
    pub(super) fn parse_learned(o: &Object) -> Result<BitsAndBytes> {
        o.refuse_unknown(&[&["quant_method", "modules_to_not_convert"]])?;
        o.strings("modules_to_not_convert")?;
        Ok(BitsAndBytes { bits: 4, threshold: 0.0 })
    }

    /// Whether the file has a module quantized; the others (heads, `llm_int8_skip_modules`) are floating-point.
    fn is_quantized(&self, m: &Module) -> bool {
        match self.bits {
            8 => m.has("SCB") || m.entry("weight").is_some_and(|w| w.dtype == Dtype::I8),
            _ => m.has("weight.absmax") || STATES.iter().any(|(suffix, _)| m.has(suffix)),
        }
    }

    fn activation(&self) -> ActQuant {
        match self.bits {
            4 => ActQuant::None,
            _ if self.threshold == 0.0 => ActQuant::DynamicPerToken,
            _ => ActQuant::LlmInt8 { threshold: self.threshold },
        }
    }

    pub(super) fn check(&self, m: &mut Module) -> Result<Option<Sizes>> {
        if !self.is_quantized(m) {
            return Ok(m.check_dense());
        }
        let sizes = if self.bits == 8 { check_int8(m) } else { check_4bit(m) };
        if let Some(Sizes { n, .. }) = sizes {
            m.optional("bias", FLOATS, &[&[n]]);
        }
        Ok(sizes)
    }

    pub(super) fn scheme(&self, m: &Module, sizes: Sizes) -> Result<Scheme> {
        if !self.is_quantized(m) {
            return Ok(m.dense_scheme());
        }
        let four = if self.bits == 4 { Some(state(m)?) } else { None };
        Ok(Scheme {
            weight_bits: self.bits,
            group_size: four.map(|s| s.group()).filter(|&g| g < sizes.k),
            symmetric: true,
            encoding: four.map_or(Ok(Encoding::Affine), |s| table(m, &s).map(Encoding::Codebook))?,
            act_order: false,
            activation: self.activation(),
        })
    }

    pub(super) fn read(&self, m: &Module, sizes: Sizes) -> Result<LinearWeight> {
        if !self.is_quantized(m) {
            return m.read_dense(sizes);
        }
        let weight = if self.bits == 8 { read_int8(m, sizes)? } else { read_4bit(m)? };
        Ok(LinearWeight { weight: Weight::Quant(weight), bias: m.bias()?, activation: self.activation() })
    }
}

fn check_int8(m: &mut Module) -> Option<Sizes> {
    let (n, k) = m.matrix("weight", &[Dtype::I8])?;
    m.need("SCB", FLOATS, &[&[n]]);
    if m.optional("weight_format", &[Dtype::U8], &[&[], &[1]]) && m.bytes("weight_format").iter().any(|&b| b != 0) {
        // 1 to 3 are tiles that versions before 0.45 wrote for Turing and Ampere.
        m.problem("weight_format", "the weight is not stored in rows; save it again with bitsandbytes 0.45 or newer");
    }
    Some(Sizes { n, k })
}

/// `w = code * SCB / 127`.
fn read_int8(m: &Module, Sizes { n, k }: Sizes) -> Result<QuantWeight> {
    let codes = Stored::new(m.shared("weight")?, n, k, 8, Storage::Bytes { offset: 128 }).into();
    let scales = m.scales("SCB")?.into_iter().map(|s| s / 127.0).collect();
    Ok(QuantWeight {
        n,
        k,
        bits: 8,
        group_size: k,
        codes,
        scales,
        zeros: vec![128.0; n],
        order: None,
        encoding: Encoding::Affine,
    })
}

impl State {
    fn blocks(&self) -> usize {
        (self.sizes.n * self.sizes.k).div_ceil(self.block)
    }

    /// Columns of a row that surely share a scale. Blocks run along the flattened weight, so where a row is no whole
    /// number of blocks, they start at another column in each row.
    fn group(&self) -> usize {
        columns_of_block(self.block, self.sizes.k)
    }
}

/// The state tensor of a module, read.
fn state(m: &Module) -> Result<State> {
    let present: Vec<_> = STATES.iter().filter(|(suffix, _)| m.has(suffix)).collect();
    let &[&(suffix, codebook)] = present.as_slice() else {
        let reason = format!("{} of them; expected one of {} and {}", present.len(), STATES[0].0, STATES[1].0);
        return Err(m.error("weight.quant_state", reason));
    };
    let bytes = m.bytes(suffix);
    if bytes.len() > MAX_STATE_BYTES {
        return Err(m.error(suffix, format!("{} bytes; expected at most {MAX_STATE_BYTES}", bytes.len())));
    }
    let parsed = json::parse(bytes).and_then(|value| parse_state(value, codebook));
    parsed.map_err(|reason| m.error(suffix, reason))
}

fn parse_state(value: serde_json::Value, codebook: Option<Codebook>) -> Result<State, String> {
    // The caller puts the tensor's name and file before every message.
    let o = Object::root(Default::default(), value).map_err(|_| "expected a JSON object".to_owned())?;
    let fields = |o: &Object| -> Result<State> {
        o.refuse_unknown(&[&[
            "quant_type",
            "blocksize",
            "dtype",
            "shape",
            "nested_blocksize",
            "nested_dtype",
            "nested_offset",
        ]])?;
        let name = codebook.map_or("codebook", |codebook| codebook.name());
        if o.str("quant_type")? != Some(name) {
            return Err(o.error("quant_type", format!("expected `{name}`, as the tensor's name says")));
        }
        if let Some(other) = o.str("nested_dtype")?.filter(|&d| d != "float32") {
            return Err(o.error("nested_dtype", format!("expected `float32`, got `{other}`")));
        }
        o.str("dtype")?;
        let side = |v: &serde_json::Value| v.as_i64().filter(|s| (1..=MAX_WIDTH).contains(s));
        let shape: Option<Vec<i64>> =
            o.get("shape").and_then(|v| v.as_array()).and_then(|a| a.iter().map(side).collect());
        let Some(&[n, k]) = shape.as_deref() else {
            return Err(o.error("shape", format!("expected two sizes from 1 to {MAX_WIDTH}")));
        };
        let nested = match o.size("nested_blocksize", MAX_BLOCK)? {
            None => None,
            Some(block) => {
                let offset = o.number("nested_offset", -1e30, 1e30)?;
                let offset = offset.ok_or_else(|| o.error("nested_offset", "missing"))? as f32;
                Some(Nested { block, offset })
            }
        };
        let sizes = Sizes { n: n as usize, k: k as usize };
        Ok(State { sizes, codebook, block: o.need_size("blocksize", MAX_BLOCK)?, nested })
    };
    fields(&o).map_err(|e| e.to_string().trim_start_matches(": ").to_owned())
}

fn check_4bit(m: &mut Module) -> Option<Sizes> {
    m.used.push("weight");
    m.used.extend(STATES.iter().map(|(suffix, _)| *suffix));
    let state = match state(m) {
        Ok(state) => state,
        Err(e) => {
            m.problems.push(e.to_string());
            return None;
        }
    };
    let Sizes { n, k } = state.sizes;
    match m.entry("weight").map(|w| (w.dtype, w.dtype.bitsize() / 8)) {
        None => m.problem("weight", "missing"),
        Some((dtype, _)) if !STORAGE.contains(&dtype) => m.problem("weight", format!("is {dtype:?}")),
        Some((_, size)) => {
            // Two codes to a byte, rounded up to whole elements of the type they are stored under.
            let (bytes, expected) = (m.bytes("weight").len(), (n * k).div_ceil(2));
            if bytes != expected.next_multiple_of(size) {
                m.problem("weight", format!("{bytes} bytes; [{n}, {k}] of 4 bits take {expected}"));
            }
        }
    }
    m.need("weight.quant_map", &[Dtype::F32], &[&[16]]);
    let blocks = state.blocks();
    match state.nested {
        None => m.need("weight.absmax", FLOATS, &[&[blocks]]),
        Some(nested) => {
            m.need("weight.absmax", &[Dtype::U8], &[&[blocks]]);
            m.need("weight.nested_absmax", &[Dtype::F32], &[&[blocks.div_ceil(nested.block)]]);
            m.need("weight.nested_quant_map", &[Dtype::F32], &[&[256]]);
        }
    }
    if m.problems.is_empty() {
        match m.scales("weight.quant_map") {
            Err(e) => m.problems.push(e.to_string()),
            Ok(map) => {
                let near = |(a, b): (&f32, &f32)| (a - b).abs() <= MAP_TOLERANCE;
                if let Some(table) = state.codebook.filter(|table| !map.iter().zip(&table.0).all(near)) {
                    m.problem("weight.quant_map", format!("is not the table of {}", table.name()));
                }
            }
        }
    }
    if !state.sizes.k.is_multiple_of(32) && state.group() < state.block {
        m.notes.push(format!(
            "blocks of {} do not divide rows of {k}: scales are kept for every {} columns, which is slow",
            state.block,
            state.group()
        ));
    }
    Some(state.sizes)
}

fn read_4bit(m: &Module) -> Result<QuantWeight> {
    let state = state(m)?;
    let Sizes { n, k } = state.sizes;
    let codes = Stored::new(m.shared("weight")?, n, k, Codebook::BITS, Storage::HighFirst).into();
    let absmax = absmax(m, &state)?;
    let group_size = state.group();
    let groups = k / group_size;
    let scales: Vec<f32> = (0..n * groups).map(|g| absmax[g * group_size / state.block]).collect();
    let zeros = vec![0.0; scales.len()];
    let encoding = Encoding::Codebook(table(m, &state)?);
    Ok(QuantWeight { n, k, bits: Codebook::BITS, group_size, codes, scales, zeros, order: None, encoding })
}

/// The table that codes point into.
fn table(m: &Module, state: &State) -> Result<Codebook> {
    let Some(table) = state.codebook else {
        let mut values = [0.0; 16];
        values.copy_from_slice(&m.scales("weight.quant_map")?); // 16, as was checked
        return Ok(Codebook(values));
    };
    Ok(table)
}

/// Scales of all blocks.
fn absmax(m: &Module, state: &State) -> Result<Vec<f32>> {
    let Some(Nested { block, offset }) = state.nested else { return m.scales("weight.absmax") };
    let (map, scales) = (m.scales("weight.nested_quant_map")?, m.scales("weight.nested_absmax")?);
    let codes = m.bytes("weight.absmax").iter().enumerate();
    Ok(codes.map(|(i, &code)| map[usize::from(code)] * scales[i / block] + offset).collect())
}
