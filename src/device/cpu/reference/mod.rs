//! The executable specification: every op as plainly as it can be written, on host slices.
//!
//! Ops on floating point take a [`Rounding`]. [`Rounding::Exact`] computes in f64 from inputs to result: the `ref` of
//! the tolerance rule in docs/numerics.md. [`Rounding::As`] computes in f32 and rounds to a type wherever a kernel of
//! that type must: the `twin`. INT8 ops take none: their results are exact, and every device gives the same bits.
//!
//! Matrices are row-major; `m` rows is always the length of the input divided by its width.

mod attention;
mod epilogue;
mod linear;
mod rows;
mod sample;

pub use attention::{PagedKv, attention, kv_write, qk_norm, rope};
pub(in crate::device::cpu) use epilogue::fixed_code;
pub use epilogue::{
    ERFC, EXP, GELU_TANH, LN_2, TO_WHOLE, activate, activate_rows, exp, linear_codes, linear_fused, static_code, swiglu,
};
pub use linear::{linear_dense, linear_int8, linear_of_codes, linear_quant};
pub(in crate::device::cpu) use rows::asymmetric;
pub use rows::{
    Codes, INT16_BLOCK, INT16_MAX, INT16_SMALLEST, LogitsStats, embed, gather_columns, gather_rows, logits_stats,
    quantize_rows, rms_norm, round_int16, silu_mul, split_outliers, sub_norm,
};

pub use sample::{SampleRow, mass, sample};

use half::{bf16, f16};

use crate::dtype::DType;

/// Where a floating-point op rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// Nowhere: f64 from the inputs to the result.
    Exact,
    /// Inputs, dequantized weights and results rounded to this floating type, sums and everything between in f32.
    As(DType),
}

impl Rounding {
    /// `x` rounded half to even to the type, or unchanged.
    pub fn round(self, x: f64) -> f64 {
        match self {
            Rounding::As(DType::F32) => f64::from(x as f32),
            Rounding::As(DType::F16) => f16::from_f64(x).to_f64(),
            Rounding::As(DType::BF16) => bf16::from_f64(x).to_f64(),
            _ => x,
        }
    }

    /// The value between two operations of an op: f32, or unchanged.
    fn carry(self, x: f64) -> f64 {
        match self {
            Rounding::Exact => x,
            Rounding::As(_) => f64::from(x as f32),
        }
    }

    /// `sum(a[i] * b[i])`, in ascending order.
    fn dot(self, a: &[f64], b: &[f64]) -> f64 {
        match self {
            Rounding::Exact => a.iter().zip(b).map(|(a, b)| a * b).sum(),
            Rounding::As(_) => f64::from(a.iter().zip(b).fold(0.0f32, |sum, (&a, &b)| sum + a as f32 * b as f32)),
        }
    }
}
