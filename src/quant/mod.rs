//! Quantization on host slices: schemes, the canonical quantized weight, packing of codes; and the mathematics that
//! makes one: what codes mean ([`encoding`]), affine maps, observers, codebooks ([`affine`], [`observer`], [`histogram`],
//! [`codebook`]), grids and the methods over them ([`grid`], [`hqq`], [`gptq`], [`awq`], [`smooth`]).
//!
//! Nothing here knows files or devices. `checkpoint` reads every format into [`LinearWeight`]; a device's
//! `pack` turns that into bytes in its own kernels' layout.
//!
//! Affine convention everywhere (docs/numerics.md): `q = clamp(rne(x / s) + z, qmin, qmax)`, `x' = s * (q - z)`.

pub mod affine;
pub mod allocate;
pub mod awq;
pub mod codebook;
pub mod codes;
pub mod distortion;
pub mod encoding;
pub mod factored;
pub mod fake;
mod gemm;
pub mod gptq;
pub mod granularity;
pub mod grid;
pub mod hessian;
pub mod histogram;
pub mod hqq;
pub mod integer;
pub mod observer;
pub mod pack;
pub mod requantize;
pub mod rounding;
pub mod smooth;
pub mod table;
pub mod ternary;

pub use codebook::Codebook;
pub use codes::{Codes, SharedBytes, Storage, Stored};
pub use encoding::Encoding;
pub use factored::Factored;

use rayon::prelude::*;

use crate::dtype::{DType, HostData};

/// How the activations of a linear layer are quantized on their way in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ActQuant {
    /// Not quantized: 16-bit (CPU: 32-bit) activations.
    None,
    /// Symmetric int8 with one scale per token, `s = amax / 127`, computed from the live row; codes in [-127, 127].
    DynamicPerToken,
    /// Asymmetric int8 with a scale and a zero point per token, from the live row's range extended to hold 0:
    /// `s = (max - min) / 255`, `z = clamp(rne(-128 - min / s), -128, 127)`; codes in [-128, 127].
    DynamicAsymmetric,
    /// LLM.int8(): a row's values of at least this magnitude stay in 16 bit and meet dequantized weights, the rest is as
    /// [`ActQuant::DynamicPerToken`]. Source: Dettmers et al. 2022, arXiv 2208.07339, with outliers found by value and row.
    LlmInt8 {
        /// Smallest magnitude of an outlier, positive.
        threshold: f32,
    },
    /// int8 with one scale and zero point for the whole tensor, from calibration; codes in [-128, 127].
    StaticPerTensor {
        /// Real value of one step.
        scale: f32,
        /// Code of real zero; 0 when symmetric.
        zero_point: i32,
    },
}

impl ActQuant {
    /// Code of real zero; 0 for everything symmetric, and where every row has its own.
    pub fn zero_point(self) -> i32 {
        match self {
            ActQuant::StaticPerTensor { zero_point, .. } => zero_point,
            _ => 0,
        }
    }
}

/// How a linear layer is quantized, in the field's words: `w4a16 g128 asym act-order`, `w8a8 per-channel dynamic`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scheme {
    /// Bits of a weight code, 2 to 8; 16 or 32 for an unquantized weight.
    pub weight_bits: u8,
    /// Consecutive inputs (after act-order sorting) that share a scale; `None` is one scale per output channel.
    pub group_size: Option<usize>,
    /// Every zero point is the middle code `2^(bits-1)`; always true of codes that are no integers.
    pub symmetric: bool,
    /// What codes stand for.
    pub encoding: Encoding,
    /// Columns are stored in another order than the layer's inputs.
    pub act_order: bool,
    /// Activation side.
    pub activation: ActQuant,
}

impl Scheme {
    /// Of an unquantized weight.
    pub fn dense(dtype: DType) -> Scheme {
        Scheme {
            weight_bits: 8 * dtype.size_bytes() as u8,
            group_size: None,
            symmetric: true,
            encoding: Encoding::Affine,
            act_order: false,
            activation: ActQuant::None,
        }
    }

    /// True for a weight held as 16- or 32-bit floating point.
    pub fn is_dense(&self) -> bool {
        self.weight_bits >= 16
    }
}

impl std::fmt::Display for Scheme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.is_dense() {
            return f.write_str(if self.weight_bits == 16 { "16-bit" } else { "32-bit" });
        }
        let activation_bits = if self.activation == ActQuant::None { 16 } else { 8 };
        write!(f, "{}a{activation_bits}", self.encoding.name(self.weight_bits))?;
        match self.group_size {
            Some(g) => write!(f, " g{g}")?,
            None => f.write_str(" per-channel")?,
        }
        if self.encoding.is_affine() {
            f.write_str(if self.symmetric { " sym" } else { " asym" })?;
        }
        if self.act_order {
            f.write_str(" act-order")?;
        }
        match self.activation {
            ActQuant::None => Ok(()),
            ActQuant::DynamicPerToken => f.write_str(", activations int8 dynamic per token"),
            ActQuant::DynamicAsymmetric => f.write_str(", activations int8 dynamic per token, asymmetric"),
            ActQuant::LlmInt8 { threshold } => {
                write!(f, ", activations int8 dynamic per token, 16-bit from {threshold} (LLM.int8)")
            }
            ActQuant::StaticPerTensor { zero_point: 0, .. } => f.write_str(", activations int8 static per tensor"),
            ActQuant::StaticPerTensor { .. } => f.write_str(", activations int8 static per tensor, asymmetric"),
        }
    }
}

/// A quantized weight in canonical form: what every format reads into and every method writes.
///
/// `w[r, order[c]] = scales[r, c / g] * (codes[r, c] - zeros[r, c / g])`, with `g = group_size` and
/// `order` the identity when absent. Codes are unsigned whatever the file held (a signed code plus `2^(bits-1)`).
/// With another [`Encoding`] than the affine one the value of the code takes its place, and zero points are 0.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantWeight {
    /// Output channels.
    pub n: usize,
    /// Inputs (reduction length).
    pub k: usize,
    /// Bits of a code, 2 to 8.
    pub bits: u8,
    /// Columns that share a scale, 1 to `k`; the last group may be short. `k` itself means per channel.
    pub group_size: usize,
    /// `[n, k]` codes, each below `2^bits`.
    pub codes: Codes,
    /// `[n, groups]` scales, finite; exactly the values of the file.
    pub scales: Vec<f32>,
    /// `[n, groups]` zero points in units of codes; integral for every integer format, and may be `2^bits`
    /// (GPTQ v1 files store `z - 1` in `bits` bits).
    pub zeros: Vec<f32>,
    /// Act-order: stored column `c` multiplies input `order[c]`. A permutation of `0..k`.
    pub order: Option<Vec<u32>>,
    /// What codes stand for.
    pub encoding: Encoding,
}

impl QuantWeight {
    /// A weight `[n, k]` of codes, scales and zero points 0, to be filled in; `group_size` is cut to `k`.
    pub(crate) fn empty(n: usize, k: usize, bits: u8, group_size: usize) -> QuantWeight {
        let group_size = group_size.min(k);
        let groups = n * k.div_ceil(group_size);
        QuantWeight {
            n,
            k,
            bits,
            group_size,
            codes: vec![0; n * k].into(),
            scales: vec![0.0; groups],
            zeros: vec![0.0; groups],
            order: None,
            encoding: Encoding::Affine,
        }
    }

    /// Number of groups in a row: `ceil(k / group_size)`.
    pub fn groups(&self) -> usize {
        self.k.div_ceil(self.group_size)
    }

    /// The scheme in words' form, beside this activation.
    pub fn scheme(&self, activation: ActQuant) -> Scheme {
        Scheme {
            weight_bits: self.bits,
            group_size: (self.group_size < self.k).then_some(self.group_size),
            symmetric: self.is_symmetric(),
            encoding: self.encoding,
            act_order: self.order.is_some(),
            activation,
        }
    }

    /// True when every zero point is the middle code, and of every weight whose codes are no integers.
    pub fn is_symmetric(&self) -> bool {
        if !self.encoding.is_affine() {
            return true;
        }
        let middle = f32::from(1u16 << (self.bits - 1));
        self.zeros.par_iter().all(|&z| z == middle)
    }

    /// What each code stands for, before zero point and scale: `2^bits` values.
    pub fn levels(&self) -> Vec<f32> {
        self.encoding.values(self.bits)
    }

    /// The weight as `[n, k]` f32 in the layer's own input order: `s * (q - z)`, each one rounding.
    pub fn dequantize(&self) -> Vec<f32> {
        let (k, groups, levels) = (self.k, self.groups(), self.levels());
        let mut w = vec![0.0; self.n * k];
        for r in 0..self.n {
            for c in 0..k {
                let g = r * groups + c / self.group_size;
                let column = self.order.as_ref().map_or(c, |o| o[c] as usize);
                w[r * k + column] = self.scales[g] * (levels[usize::from(self.codes[r * k + c])] - self.zeros[g]);
            }
        }
        w
    }
}

/// Weight values of a linear layer.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant)] // there is one a layer
pub enum Weight {
    /// `[n, k]` floating point, in the file's type.
    Dense {
        /// Output channels.
        n: usize,
        /// Inputs.
        k: usize,
        /// `n * k` elements, row-major.
        data: HostData,
    },
    /// Codes and scales.
    Quant(QuantWeight),
}

/// One linear layer as a checkpoint holds it: `y[m, n] = x[m, k] * w[n, k]^T + bias[n]`.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearWeight {
    /// The weight.
    pub weight: Weight,
    /// `[n]` bias.
    pub bias: Option<Vec<f32>>,
    /// How its input is quantized.
    pub activation: ActQuant,
}

impl LinearWeight {
    /// Output channels.
    pub fn n(&self) -> usize {
        match &self.weight {
            Weight::Dense { n, .. } => *n,
            Weight::Quant(q) => q.n,
        }
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        match &self.weight {
            Weight::Dense { k, .. } => *k,
            Weight::Quant(q) => q.k,
        }
    }

    /// The quantized weight and the factors of its groups, where with int8 activations these make it int8 with one scale a row.
    pub fn factored(&self) -> Option<(&QuantWeight, Factored)> {
        match (&self.weight, self.activation) {
            (Weight::Dense { .. }, _) | (_, ActQuant::None | ActQuant::LlmInt8 { .. }) => None,
            (Weight::Quant(q), _) => Some((q, Factored::of(q)?)),
        }
    }

    /// The scheme in words' form.
    pub fn scheme(&self) -> Scheme {
        match &self.weight {
            Weight::Dense { data, .. } => Scheme { activation: self.activation, ..Scheme::dense(data.dtype()) },
            Weight::Quant(q) => q.scheme(self.activation),
        }
    }
}
