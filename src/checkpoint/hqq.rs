//! HQQ checkpoints: groups of unsigned codes with real zero points, docs/formats.md section 6.
//!
//! The weight is cut into rows of one group each, and these rows lie side by side in words: a word's fields are not
//! neighbours in the weight but a part of its rows apart.

use rayon::prelude::*;
use safetensors::Dtype;

use crate::error::Result;
use crate::quant::table::columns_of_block;
use crate::quant::{ActQuant, Encoding, LinearWeight, QuantWeight, Scheme, Weight};

use super::json::Object;
use super::module::{FLOATS, Module, Sizes};

/// Fields that say how codes were found or which the tensors repeat.
const TOP: &[&str] = &["quant_config", "quant_method", "skip_modules", "_commit_hash"];
const MAX_GROUP: i64 = 1 << 20;
const MAX_WIDTH: i64 = 1 << 24;
const INTS: &[Dtype] = &[Dtype::I32, Dtype::I64];
/// What a word's bytes may be viewed as (`view_as_float`).
const STORAGE: &[Dtype] = &[Dtype::U8, Dtype::I32, Dtype::F16, Dtype::BF16, Dtype::F32];
/// Everything a layer may have.
const STATE: [&str; 13] = [
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
    "unpack_view_dtype",
    "compute_dtype",
    "packing",
    "axis",
];

/// An HQQ configuration: which layers are quantized, and how, the tensors say.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Hqq;

/// How codes lie in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Storage {
    /// `8bit_u8`: 5 to 8 bits, one code in a byte.
    Bytes,
    /// `4bit_u8`: two in a byte.
    Nibbles,
    /// `3bit_32`: ten in 32 bits, the highest two unused.
    Tens,
    /// `2bit_u8`: four in a byte.
    Quarters,
}

impl Storage {
    const ALL: [Storage; 4] = [Storage::Bytes, Storage::Nibbles, Storage::Tens, Storage::Quarters];

    /// The library's choice; `None` for bits that it has not.
    pub(super) fn of_bits(bits: u8) -> Option<Storage> {
        match bits {
            5 | 6 | 8 => Some(Storage::Bytes),
            4 => Some(Storage::Nibbles),
            3 => Some(Storage::Tens),
            2 => Some(Storage::Quarters),
            _ => None,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Storage::Bytes => "8bit_u8",
            Storage::Nibbles => "4bit_u8",
            Storage::Tens => "3bit_32",
            Storage::Quarters => "2bit_u8",
        }
    }

    /// Codes in a word.
    pub(super) fn per_word(self) -> usize {
        match self {
            Storage::Bytes => 1,
            Storage::Nibbles => 2,
            Storage::Tens => 10,
            Storage::Quarters => 4,
        }
    }

    /// Rows are filled up to whole words.
    pub(super) fn pads(self) -> bool {
        self == Storage::Tens
    }

    fn word_bytes(self) -> usize {
        if self == Storage::Tens { 4 } else { 1 }
    }

    fn field_bits(self) -> usize {
        match self {
            Storage::Bytes => 8,
            Storage::Nibbles => 4,
            Storage::Tens => 3,
            Storage::Quarters => 2,
        }
    }

    /// Words of rows of `group` codes: field `f` of word `(r, c)`, from the highest, is the code at `(f * step + r, c)`
    /// with `step` rows of words.
    pub(super) fn pack(self, codes: &[u8], group: usize) -> (Dtype, Vec<u8>) {
        let rows = codes.len() / group;
        let step = rows.div_ceil(self.per_word());
        let word = |i: usize| {
            (0..self.per_word()).fold(0u32, |word, f| {
                let code = codes.get(f * step * group + i).copied().unwrap_or(0);
                word << self.field_bits() | u32::from(code)
            })
        };
        let words = (0..step * group).map(word);
        match self {
            Storage::Tens => (Dtype::I32, words.flat_map(u32::to_le_bytes).collect()),
            _ => (Dtype::U8, words.map(|word| word as u8).collect()),
        }
    }

    /// The first `len` codes of words.
    fn unpack(self, bytes: &[u8], len: usize) -> Vec<u8> {
        let words = bytes.len() / self.word_bytes();
        let word = |i: usize| match self {
            Storage::Tens => u32::from_le_bytes([0, 1, 2, 3].map(|b| bytes[4 * i + b])),
            _ => u32::from(bytes[i]),
        };
        let mask = (1u32 << self.field_bits()) - 1;
        let mut codes = vec![0u8; len];
        codes.par_chunks_mut(words.max(1)).enumerate().for_each(|(f, codes)| {
            let shift = self.field_bits() * (self.per_word() - 1 - f);
            codes.iter_mut().enumerate().for_each(|(i, code)| *code = (word(i) >> shift & mask) as u8);
        });
        codes
    }
}

/// What a layer's small tensors say.
#[derive(Debug, Clone, Copy)]
struct State {
    sizes: Sizes,
    bits: u8,
    /// Elements of the flattened weight that share a scale.
    block: usize,
    storage: Storage,
}

impl Hqq {
    pub(super) fn parse(o: &Object) -> Result<Hqq> {
        o.refuse_unknown(&[TOP])?;
        o.strings("skip_modules")?;
        if o.object("quant_config")?.is_none() {
            return Err(o.error("quant_config", "missing"));
        }
        Ok(Hqq)
    }

    /// Layers without `W_q` (heads, `skip_modules`) are floating-point.
    fn is_quantized(m: &Module) -> bool {
        m.has("W_q")
    }

    pub(super) fn check(m: &mut Module) -> Result<Option<Sizes>> {
        if !Hqq::is_quantized(m) {
            return Ok(m.check_dense());
        }
        m.used.extend(["W_q", "nbits", "group_size", "shape", "scale", "zero", "bias"].iter().chain(&STATE));
        let state = match state(m) {
            Ok(state) => state,
            Err(e) => {
                m.problems.push(e.to_string());
                return Ok(None);
            }
        };
        let Sizes { n, k } = state.sizes;
        let rows = n * k / state.block;
        let bytes = rows.div_ceil(state.storage.per_word()) * state.block * state.storage.word_bytes();
        match m.entry("W_q").map(|w| w.dtype) {
            Some(dtype) if STORAGE.contains(&dtype) && m.bytes("W_q").len() == bytes => {}
            Some(dtype) => {
                let found = m.bytes("W_q").len();
                let bits = state.bits;
                m.problem("W_q", format!("{found} bytes of {dtype:?}; [{n}, {k}] of {bits} bits take {bytes}"));
            }
            None => {}
        }
        m.need("scale", FLOATS, &[&[rows, 1]]);
        m.need("zero", FLOATS, &[&[rows, 1]]);
        m.optional("bias", FLOATS, &[&[n]]);
        Ok(Some(state.sizes))
    }

    pub(super) fn scheme(m: &Module, sizes: Sizes) -> Result<Scheme> {
        if !Hqq::is_quantized(m) {
            return Ok(m.dense_scheme());
        }
        let state = state(m)?;
        Ok(Scheme {
            weight_bits: state.bits,
            group_size: Some(columns_of_block(state.block, sizes.k)).filter(|&g| g < sizes.k),
            symmetric: false,
            encoding: Encoding::Affine,
            act_order: false,
            activation: ActQuant::None,
        })
    }

    pub(super) fn read(m: &Module, sizes: Sizes) -> Result<LinearWeight> {
        if !Hqq::is_quantized(m) {
            return m.read_dense(sizes);
        }
        let state = state(m)?;
        let Sizes { n, k } = sizes;
        let codes = state.storage.unpack(m.bytes("W_q"), n * k);
        if codes.par_iter().any(|&code| u32::from(code) >> state.bits != 0) {
            return Err(m.error(
                "W_q",
                format!("a code above {}, the largest of {} bits", (1u32 << state.bits) - 1, state.bits),
            ));
        }
        let group_size = columns_of_block(state.block, k);
        let spread = |values: Vec<f32>| (0..n * k / group_size).map(|g| values[g * group_size / state.block]).collect();
        let (scales, zeros) = (spread(m.scales("scale")?), spread(m.scales("zero")?));
        let weight = QuantWeight {
            n,
            k,
            bits: state.bits,
            group_size,
            codes: codes.into(),
            scales,
            zeros,
            order: None,
            encoding: Encoding::Affine,
        };
        Ok(LinearWeight { weight: Weight::Quant(weight), bias: m.bias()?, activation: ActQuant::None })
    }
}

/// Reads and checks the small tensors.
fn state(m: &Module) -> Result<State> {
    let number = |suffix: &str, least: i64, most: i64| -> Result<i64> {
        match m.entry(suffix).map(|e| e.dtype) {
            Some(dtype) if INTS.contains(&dtype) => {}
            Some(dtype) => return Err(m.error(suffix, format!("is {dtype:?}; expected a whole number"))),
            None => return Err(m.error(suffix, "missing")),
        }
        match m.integers(suffix)?.as_slice() {
            &[value] if (least..=most).contains(&value) => Ok(value),
            other => Err(m.error(suffix, format!("is {other:?}; expected one number from {least} to {most}"))),
        }
    };
    let bits = number("nbits", 1, 8)? as u8;
    if !(2..=8).contains(&bits) || Storage::of_bits(bits).is_none() {
        return Err(m.error("nbits", format!("is {bits}; expected 2, 3, 4, 5, 6 or 8")));
    }
    if number("axis", 0, 1)? != 1 {
        let reason = "is 0: groups run along the outputs; quantize again with axis=1";
        return Err(m.error("axis", reason));
    }
    let name = m.bytes("packing");
    let Some(storage) = Storage::ALL.into_iter().find(|s| s.name().as_bytes() == name) else {
        let reason = format!(
            "is `{}`; expected 8bit_u8, 4bit_u8, 3bit_32 or 2bit_u8",
            String::from_utf8_lossy(&name[..name.len().min(32)])
        );
        return Err(m.error("packing", reason));
    };
    if storage.field_bits() < usize::from(bits) {
        return Err(m.error("packing", format!("is {}, too narrow for {bits} bits", storage.name())));
    }
    for suffix in ["quant_scale", "quant_zero"] {
        if m.bytes(suffix).iter().any(|&b| b != 0) {
            return Err(m.error(
                suffix,
                "scales or zero points are quantized; quantize again with quant_scale and quant_zero off",
            ));
        }
    }
    let shape = match m.entry("shape").map(|e| e.dtype) {
        Some(dtype) if INTS.contains(&dtype) => m.integers("shape")?,
        _ => return Err(m.error("shape", "missing; it holds the two sizes of the weight")),
    };
    let &[n, k] = shape.as_slice() else { return Err(m.error("shape", format!("is {shape:?}; expected two sizes"))) };
    let block = number("group_size", 1, MAX_GROUP)?;
    let sizes = [n, k].iter().all(|side| (1..=MAX_WIDTH).contains(side)) && n * k % block == 0;
    let whole = storage.pads() || sizes && n * k / block % storage.per_word() as i64 == 0;
    if !sizes || !whole {
        let reason = format!(
            "is {shape:?}, in groups of {block}: expected sizes from 1 to {MAX_WIDTH} that make whole groups and words"
        );
        return Err(m.error("shape", reason));
    }
    Ok(State { sizes: Sizes { n: n as usize, k: k as usize }, bits, block: block as usize, storage })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words from the library's own packing of codes `i mod 2^bits` in rows of 3.
    #[test]
    fn words() {
        let codes = |rows: usize, bits: u32| -> Vec<u8> { (0..rows * 3).map(|i| (i % (1 << bits)) as u8).collect() };
        let bytes = |s: Storage, codes: &[u8]| s.pack(codes, 3).1;
        assert_eq!(bytes(Storage::Bytes, &codes(2, 8)), [0, 1, 2, 3, 4, 5]);
        assert_eq!(bytes(Storage::Nibbles, &codes(4, 4)), [0x06, 0x17, 0x28, 0x39, 0x4a, 0x5b]);
        assert_eq!(bytes(Storage::Quarters, &codes(4, 2)), [0b00_11_10_01, 0b01_00_11_10, 0b10_01_00_11]);
        // Eleven rows are filled up to twenty: two rows of words, fields two rows apart.
        let tens = bytes(Storage::Tens, &codes(11, 3));
        let tens: Vec<u32> = tens.chunks(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]])).collect();
        assert_eq!(tens, [0o642060000, 0o1753170000, 0o2064200000, 0o3175300000, 0o4206400000, 0o5317500000]);
        for storage in Storage::ALL {
            for rows in [1, 2, 4, 11, 40].into_iter().filter(|r| storage.pads() || r % storage.per_word() == 0) {
                let codes = codes(rows, storage.field_bits() as u32);
                assert_eq!(storage.unpack(&bytes(storage, &codes), codes.len()), codes, "{storage:?} {rows}");
            }
        }
    }
}
