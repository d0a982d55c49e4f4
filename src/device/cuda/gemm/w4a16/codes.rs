//! What codes of weights stand for, as the kernels of gemm_w4a16 know them.

use crate::quant::{Encoding, QuantWeight};

/// As `kernels/gemm_w4a16/dequant.cuh` names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codes {
    /// Integers of up to 4 bits.
    Uint4,
    /// Integers of up to 8 bits.
    Uint8,
    /// FP8 `e4m3fn`.
    E4m3,
    /// Sixteen values by 4-bit code.
    Codebook4,
}

impl Codes {
    /// Those of `q`.
    pub(super) fn of(q: &QuantWeight) -> Self {
        match q.encoding {
            Encoding::Affine if q.bits <= 4 => Codes::Uint4,
            Encoding::Affine => Codes::Uint8,
            Encoding::Codebook(_) => Codes::Codebook4,
            Encoding::E4m3 => Codes::E4m3,
        }
    }

    /// Of a code in the kernels' layouts.
    pub(super) fn bits(self) -> usize {
        match self {
            Codes::Uint4 | Codes::Codebook4 => 4,
            Codes::Uint8 | Codes::E4m3 => 8,
        }
    }

    /// What kernels are called by.
    pub(super) fn name(self) -> &'static str {
        match self {
            Codes::Uint4 => "w4",
            Codes::Uint8 => "w8",
            Codes::E4m3 => "e4m3",
            Codes::Codebook4 => "c4",
        }
    }

    /// What measured choices are filed under: FP8 has those of integers of 8 bits, since its kernels read as many bytes on the same way.
    pub(super) fn measured_as(self) -> &'static str {
        match self {
            Codes::E4m3 => Codes::Uint8.name(),
            _ => self.name(),
        }
    }

    /// The folder of a module of gemm_w4a16.
    pub(super) fn module(self, others: &'static str, e4m3: &'static str) -> &'static str {
        if self == Codes::E4m3 { e4m3 } else { others }
    }
}

/// No weight of `q` is more, times its scale.
pub(super) fn largest(q: &QuantWeight) -> f32 {
    match &q.encoding {
        Encoding::Affine => f32::from(1u16 << q.bits),
        Encoding::Codebook(codebook) => codebook.0.iter().fold(0.0, |max, value| value.abs().max(max)),
        Encoding::E4m3 => 448.0,
    }
}
