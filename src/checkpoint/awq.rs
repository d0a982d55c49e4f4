//! AWQ checkpoints (AutoAWQ, llm-awq v2, GPTQModel): 4 bits in three layouts, docs/formats.md section 3.

use rayon::prelude::*;
use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::quant::pack::Packing;
use crate::quant::{ActQuant, Encoding, LinearWeight, QuantWeight, Scheme, Storage, Stored, Weight};

use super::json::Object;
use super::module::{FLOATS, Module, Sizes, WORDS};
use super::order::transpose;
use super::tool_fields::{self, TOOL_FIELDS};

const UNDERSTOOD: &[&str] = &[
    "bits",
    "checkpoint_format",
    "desc_act",
    "format",
    "group_size",
    "lm_head",
    "method",
    "modules_to_not_convert",
    "pack_dtype",
    "q_group_size",
    "quant_method",
    "sym",
    "version",
    "w_bit",
    "zero_point",
];
const HARMLESS: &[&str] = &["do_fuse", "fuse_max_seq_len", "modules_to_fuse"];
const BITS: u8 = 4;
/// Codes of gemv.
const NATURAL: Storage = Storage::Rows(Packing::Dense);
/// The zero point of files without zero points.
const MIDDLE: f32 = 8.0;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    /// `qweight` `[k, n/8]`, nibbles in [`AWQ_ORDER`].
    Gemm,
    /// `qweight` `[n, k/8]`, natural order, zero points padded.
    Gemv,
    /// `qweight` int16 `[n/4, k]`, interleaved; zero points as floats `-s*z`.
    GemvFast,
}

/// An AWQ configuration.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Awq {
    version: Version,
    /// `None` is one group for all inputs.
    group_size: Option<usize>,
    zero_point: bool,
    not_converted: Vec<String>,
}

impl Awq {
    pub(super) fn parse(o: &Object) -> Result<Awq> {
        o.refuse_unknown(&[UNDERSTOOD, HARMLESS, TOOL_FIELDS])?;
        tool_fields::check(o)?;
        for field in ["bits", "w_bit"] {
            if let Some(bits) = o.integer(field, 0..=64)?.filter(|&b| b != i64::from(BITS)) {
                return Err(o.error(field, format!("expected 4 for AWQ, got {bits}")));
            }
        }
        if o.bool("desc_act")? == Some(true) {
            return Err(o.error("desc_act", "AWQ has no act-order"));
        }
        if o.str("pack_dtype")?.is_some_and(|d| d != "int32") {
            return Err(o.error("pack_dtype", "expected `int32`"));
        }
        let labels = ["version", "checkpoint_format", "format"];
        let mut found = Vec::new();
        for label in labels {
            found.extend(o.str(label)?.map(|v| (label, v.to_lowercase())));
        }
        if let Some((label, other)) = found.iter().find(|(_, v)| *v != found[0].1) {
            return Err(o.error(label, format!("`{other}` contradicts {} `{}`", found[0].0, found[0].1)));
        }
        let version = match found.first().map_or("gemm", |(_, v)| v.as_str()) {
            "gemm" => Version::Gemm,
            "gemv" => Version::Gemv,
            "gemv_fast" | "llm-awq" => Version::GemvFast,
            other => {
                let what = format!(
                    "{}: field `{}`: AWQ weights in the layout `{other}`",
                    o.file().display(),
                    o.field_path(found[0].0)
                );
                return Err(Error::unsupported(what, "Use a checkpoint in the layout `gemm`, `gemv` or `gemv_fast`"));
            }
        };
        let group_size = match o.group_size("group_size")? {
            Some(g) => g,
            None => o.group_size("q_group_size")?.unwrap_or(Some(128)),
        };
        if version != Version::Gemm && !matches!(group_size, Some(g) if g >= 32) {
            return Err(o.error("group_size", "this AWQ layout has groups of 32, 64, 128 or more"));
        }
        // GPTQModel writes `sym`; AWQ's own name for its opposite is `zero_point`.
        let zero_point = o.bool("zero_point")?.unwrap_or(true);
        let not_converted = o.strings("modules_to_not_convert")?.unwrap_or_default();
        Ok(Awq { version, group_size, zero_point, not_converted })
    }

    /// Whether a module is quantized: as the file has it, but for those that the configuration excludes by any part
    /// of their name.
    fn is_quantized(&self, m: &Module) -> bool {
        let excluded = self.not_converted.iter().any(|part| m.name.contains(part.as_str()));
        !excluded && (m.has("qweight") || !m.has("weight"))
    }

    pub(super) fn check(&self, m: &mut Module) -> Result<Option<Sizes>> {
        if !self.is_quantized(m) {
            return Ok(m.check_dense());
        }
        let words: &[Dtype] = if self.version == Version::GemvFast { &[Dtype::I16] } else { WORDS };
        let Some((rows, columns)) = m.matrix("qweight", words) else { return Ok(None) };
        let (n, k) = match self.version {
            Version::Gemm => (columns * 8, rows),
            Version::Gemv => (rows, columns * 8),
            Version::GemvFast => (rows * 4, columns),
        };
        let groups = self.group_size.map_or(1, |g| k.div_ceil(g));
        let padded = self.padded_groups(k);
        let natural: (&[Dtype], &[usize], &[usize]) = match self.version {
            Version::Gemm => (WORDS, &[groups, n / 8], &[groups, n]),
            Version::Gemv => (WORDS, &[n, padded / 8], &[n, padded]),
            Version::GemvFast => (FLOATS, &[padded, n], &[padded, n]),
        };
        let (zero_type, zero_shape, scale_shape) = natural;
        m.need("scales", FLOATS, &[scale_shape]);
        if self.zero_point {
            m.need("qzeros", zero_type, &[zero_shape]);
        } else {
            m.optional("qzeros", zero_type, &[zero_shape]);
        }
        m.optional("bias", FLOATS, &[&[n]]);
        if self.version == Version::GemvFast && k % 64 != 0 {
            m.problem("qweight", format!("{k} inputs; this layout holds multiples of 64"));
        }
        if m.has("weight") {
            m.problem("weight", "there beside qweight; expected one of them");
        }
        Ok(Some(Sizes { n, k }))
    }

    pub(super) fn scheme(&self, m: &Module, Sizes { k, .. }: Sizes) -> Scheme {
        if !self.is_quantized(m) {
            return m.dense_scheme();
        }
        Scheme {
            weight_bits: BITS,
            group_size: self.group_size.filter(|&g| g < k),
            symmetric: !self.zero_point,
            encoding: Encoding::Affine,
            act_order: false,
            activation: ActQuant::None,
        }
    }

    pub(super) fn read(&self, m: &Module, sizes: Sizes) -> Result<LinearWeight> {
        if !self.is_quantized(m) {
            return m.read_dense(sizes);
        }
        let Sizes { n, k } = sizes;
        let group_size = self.group_size.map_or(k, |g| g.min(k));
        let groups = k.div_ceil(group_size);
        let padded = self.padded_groups(k);
        let scales = m.scales("scales")?;
        let scales = match self.version {
            Version::Gemm => transpose(&scales, groups, n),
            Version::Gemv => scales.chunks_exact(padded).flat_map(|row| row[..groups].to_vec()).collect(),
            Version::GemvFast => transpose(&scales[..groups * n], groups, n),
        };
        let codes = match self.version {
            Version::Gemm => Stored::new(m.shared("qweight")?, n, k, BITS, Storage::Awq).into(),
            Version::Gemv => Stored::new(m.shared("qweight")?, n, k, BITS, NATURAL).into(),
            Version::GemvFast => fast_codes(&m.integers("qweight")?, n, k).into(),
        };
        let zeros =
            if self.zero_point { self.zeros(m, n, groups, padded, &scales)? } else { self.no_zeros(m, n, groups)? };
        let weight =
            QuantWeight { n, k, bits: BITS, group_size, codes, scales, zeros, order: None, encoding: Encoding::Affine };
        Ok(LinearWeight { weight: Weight::Quant(weight), bias: m.bias()?, activation: ActQuant::None })
    }

    /// `[n, groups]` zero points.
    fn zeros(&self, m: &Module, n: usize, groups: usize, padded: usize, scales: &[f32]) -> Result<Vec<f32>> {
        match self.version {
            // Packed as the weight's rows are, so that they come out as `[n, groups]` too.
            Version::Gemm => {
                Ok(Storage::Awq.unpack(m.bytes("qzeros"), n, groups, BITS).iter().map(|&z| f32::from(z)).collect())
            }
            Version::Gemv => {
                let fields = NATURAL.unpack(m.bytes("qzeros"), n, padded, BITS);
                Ok(fields.chunks_exact(padded).flat_map(|row| &row[..groups]).map(|&z| f32::from(z)).collect())
            }
            Version::GemvFast => {
                let scaled = transpose(&m.scales("qzeros")?[..groups * n], groups, n);
                let zero = |(i, (&szero, &scale)): (usize, (&f32, &f32))| {
                    // Stored rounded to 16 bits, at most 15 * 2^-8 away in units of codes for bf16.
                    let z = (-szero / scale).round();
                    let near = (0.0..=16.0).contains(&z) && (szero + scale * z).abs() <= 0.125 * scale.abs();
                    match (scale == 0.0, near) {
                        (true, _) => Ok(MIDDLE),
                        (false, true) => Ok(z),
                        (false, false) => {
                            let reason = format!(
                                "channel {}, group {}: {szero} is not minus the scale {scale} times a whole number from 0 to 15",
                                i / groups,
                                i % groups
                            );
                            Err(m.error("qzeros", reason))
                        }
                    }
                };
                scaled.iter().zip(scales).enumerate().map(zero).collect()
            }
        }
    }

    /// The zero points of a file that says it has none.
    fn no_zeros(&self, m: &Module, n: usize, groups: usize) -> Result<Vec<f32>> {
        let word = MIDDLE as u32 * 0x1111_1111;
        if self.version != Version::GemvFast
            && m.has("qzeros")
            && m.words("qzeros")?.iter().any(|&w| w != 0 && w != word)
        {
            return Err(
                m.error("qzeros", "the configuration says zero_point false, but there are zero points other than 8")
            );
        }
        Ok(vec![MIDDLE; n * groups])
    }

    /// Groups that gemv layouts make room for: whole words, and a multiple of 1, 2 or 4 words by group size.
    fn padded_groups(&self, k: usize) -> usize {
        let group_size = self.group_size.unwrap_or(k);
        let multiple = match group_size {
            128.. => 1,
            64..128 => 2,
            _ => 4,
        };
        k.div_ceil(group_size).div_ceil(8).next_multiple_of(multiple) * 8
    }
}

/// `[n, k]` codes of the `[n/4, k]` halfwords of llm-awq's second layout.
///
/// Rows come in fours. Within 64 columns of four rows, 256 codes lie one row after the other, four to a halfword.
/// Within 32 columns, position `8 a + 4 b + c` (a < 4, b < 2, c < 4) holds column `2 a + 8 c + b`.
fn fast_codes(halfwords: &[i64], n: usize, k: usize) -> Vec<u8> {
    let mut codes = vec![0u8; n * k];
    codes.par_chunks_mut(4 * k).enumerate().for_each(|(block, out)| {
        let words = &halfwords[block * k..(block + 1) * k];
        for (i, &word) in words.iter().enumerate() {
            for nibble in 0..4 {
                let place = i % 64 * 4 + nibble; // among the 256 codes of these 64 columns
                let (row, p) = (place / 64, place % 64);
                let (a, b, c) = (p % 32 / 8, p % 8 / 4, p % 4);
                let column = i / 64 * 64 + p / 32 * 32 + 2 * a + 8 * c + b;
                out[row * k + column] = (word >> (4 * nibble) & 15) as u8;
            }
        }
    });
    debug_assert_eq!(codes.len(), n * k);
    codes
}
