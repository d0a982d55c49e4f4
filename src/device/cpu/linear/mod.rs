//! Fast linear layers: `int_*` for quantized weights, which stay packed in memory and meet activations as integers;
//! `float_codes` for those whose codes stand for floating-point values; `dense` for unquantized ones.

mod check;
mod dense;
mod destination;
mod epilogue;
mod float_codes;
mod int_input;
mod int_kernel;
mod int_weight;
mod memory_hints;

pub(in crate::device) use check::check;
pub(super) use destination::Destination;
pub(super) use epilogue::{write_codes, write_floats};

use memory_hints::use_huge_pages;

use super::Level;
use crate::dtype::HostData;
use crate::quant::{ActQuant, LinearWeight, Scheme, Weight};

/// A linear layer's weight in the layout of the fast paths.
#[derive(Debug)]
pub(crate) enum FastWeight {
    Dense(dense::DenseWeight),
    FloatCodes(float_codes::FloatCodeWeight),
    Int(int_weight::IntWeight),
}

/// The part of an `LinearInput` that a layer reads.
pub(super) enum Input<'a> {
    Floats(&'a [f32]),
    /// `outliers` is `[m, k]` with LLM.int8(), 0 where there is none; else empty.
    Codes {
        codes: &'a [i8],
        scales: &'a [f32],
        zeros: &'a [i32],
        outliers: &'a [f32],
    },
}

impl FastWeight {
    /// Packs a weight that has passed [`check`], its order already taken.
    pub(super) fn pack(weight: LinearWeight) -> Self {
        match weight.weight {
            Weight::Dense { n, k, data } => {
                match &data {
                    HostData::F32(data) => use_huge_pages(data),
                    HostData::F16(data) => use_huge_pages(data),
                    HostData::BF16(data) => use_huge_pages(data),
                    _ => {}
                }
                FastWeight::Dense(dense::DenseWeight { n, k, data, bias: weight.bias })
            }
            Weight::Quant(q) if !q.encoding.is_affine() => {
                let packed = float_codes::FloatCodeWeight::pack(&q, weight.bias);
                use_huge_pages(&packed.lines);
                FastWeight::FloatCodes(packed)
            }
            Weight::Quant(q) => {
                let packed = int_weight::IntWeight::pack(&q, weight.bias, weight.activation);
                use_huge_pages(&packed.lines);
                FastWeight::Int(packed)
            }
        }
    }

    /// The bits of exact sums over int8 activations, in place of floats: for a weight of one group.
    pub(super) fn run_sums(&self, level: Level, x: &Input<'_>, to: Destination<'_>, m: usize) {
        if let FastWeight::Int(w) = self {
            int_kernel::run(level, w, &int_input::IntInput::new(level, w, x, m), to, true);
        }
    }

    /// `x * w^T + bias` into `to`, `m` rows.
    pub(super) fn run(&self, level: Level, x: &Input<'_>, to: Destination<'_>, m: usize) {
        match (self, x) {
            (FastWeight::Dense(w), Input::Floats(x)) => dense::run(level, w, x, to, m),
            (FastWeight::FloatCodes(w), Input::Floats(x)) => float_codes::run(level, w, x, to, m),
            (FastWeight::Int(w), x) => {
                let input = int_input::IntInput::new(level, w, x, m);
                int_kernel::run(level, w, &input, to, false);
            }
            (FastWeight::Dense(_) | FastWeight::FloatCodes(_), Input::Codes { .. }) => {
                unreachable!("`check` lets no such weight have int8 activations")
            }
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            FastWeight::Dense(w) => w.bytes(),
            FastWeight::FloatCodes(w) => w.bytes(),
            FastWeight::Int(w) => w.bytes(),
        }
    }

    /// Name of the kernel: weight as stored, activations as multiplied, instructions.
    pub(super) fn kernel(&self, level: Level) -> String {
        match self {
            FastWeight::Dense(w) => format!("{} x f32, {}", w.data.dtype(), level.name()),
            FastWeight::FloatCodes(w) => format!("{} x f32, {}", w.name(), level.name()),
            FastWeight::Int(w) => {
                let activations = if w.activation == ActQuant::None { "int16 blocks" } else { "int8" };
                format!("{}-bit codes x {activations}, {}", w.stored_bits(), level.name())
            }
        }
    }
}

/// Bytes of [`FastWeight`] for a weight `[n, k]` of `scheme`, its scales of 16 bits (of floating-point codes: f32).
pub(crate) fn packed_bytes(scheme: &Scheme, n: usize, k: usize, bias: bool) -> usize {
    if scheme.is_dense() {
        return n * k * usize::from(scheme.weight_bits / 8) + if bias { 4 * n } else { 0 };
    }
    if scheme.encoding.is_affine() {
        return int_weight::packed_bytes(scheme, n, k, bias);
    }
    float_codes::FloatCodeWeight::packed_bytes(&scheme.encoding, n, k, scheme.group_size.unwrap_or(k), bias)
}

/// `0..count` in pieces for threads: a few for each, so that a slow one does not hold up the rest.
fn pieces(count: usize) -> impl rayon::iter::ParallelIterator<Item = std::ops::Range<usize>> {
    use rayon::prelude::*;
    let pieces = (4 * rayon::current_num_threads()).min(count);
    (0..pieces).into_par_iter().map(move |i| i * count / pieces..(i + 1) * count / pieces)
}
