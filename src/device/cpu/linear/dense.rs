//! Floating-point weights, row-major as found: each row is streamed once for every few rows of activations, widened in
//! registers, multiplied and summed in f32.
#![allow(unsafe_code)] // threads write disjoint columns

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use super::super::Level;
use super::super::simd::{Kernel, Simd};
use super::memory_hints::prefetch;
use super::{Destination, pieces};
use crate::dtype::HostData;

#[derive(Debug)]
pub(crate) struct DenseWeight {
    pub(super) n: usize,
    pub(super) k: usize,
    /// `[n, k]` of a floating type.
    pub(super) data: HostData,
    pub(super) bias: Option<Vec<f32>>,
}

impl DenseWeight {
    pub(super) fn bytes(&self) -> usize {
        self.data.len() * self.data.dtype().size_bytes() + self.bias.as_ref().map_or(0, |b| 4 * b.len())
    }
}

/// Weight rows and activation rows of one call of the kernel: 16 sums in registers.
const OUTPUTS: usize = 4;
const ROWS: usize = 4;

/// `x * w^T + bias` into `to`, `m` rows.
pub(super) fn run(level: Level, w: &DenseWeight, x: &[f32], to: Destination<'_>, m: usize) {
    let run = |outputs: Range<usize>| match &w.data {
        HostData::F32(data) => level.run(Outputs { w, data, x, to, m, outputs }),
        HostData::F16(data) => level.run(Outputs { w, data, x, to, m, outputs }),
        HostData::BF16(data) => level.run(Outputs { w, data, x, to, m, outputs }),
        _ => unreachable!("pack takes no other type"),
    };
    if w.n * w.k * m < 1 << 15 {
        return run(0..w.n);
    }
    pieces(w.n.div_ceil(OUTPUTS)).for_each(|quads| run(quads.start * OUTPUTS..(quads.end * OUTPUTS).min(w.n)));
}

/// A stored floating type.
trait Element: Copy + Sync {
    fn load<S: Simd>(s: S, x: &[Self; 16]) -> S::F;
    fn widen(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; 16]) -> S::F {
        s.load(x)
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for f16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; 16]) -> S::F {
        s.load_f16(x)
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; 16]) -> S::F {
        s.load_bf16(x)
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// All rows of some outputs.
struct Outputs<'a, E> {
    w: &'a DenseWeight,
    data: &'a [E],
    x: &'a [f32],
    to: Destination<'a>,
    m: usize,
    outputs: Range<usize>,
}

impl<E: Element> Kernel for Outputs<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for output in self.outputs.clone().step_by(OUTPUTS) {
            let mut row = 0;
            while row < self.m {
                row += if self.m - row >= ROWS {
                    self.block::<S, ROWS>(s, output, row)
                } else {
                    self.block::<S, 1>(s, output, row)
                };
            }
        }
    }
}

impl<E: Element> Outputs<'_, E> {
    /// Up to 4 outputs of `M` rows; returns `M`. Outputs behind the last repeat it and are dropped.
    #[inline(always)]
    fn block<S: Simd, const M: usize>(&self, s: S, output: usize, row: usize) -> usize {
        let (k, whole) = (self.w.k, self.w.k / 16 * 16);
        let w: [&[E]; OUTPUTS] = std::array::from_fn(|o| &self.data[(output + o).min(self.w.n - 1) * k..][..k]);
        let x: [&[f32]; M] = std::array::from_fn(|r| &self.x[(row + r) * k..][..k]);
        let mut sums = [[s.splat(0.0); OUTPUTS]; M];
        for c in (0..whole).step_by(16) {
            for o in 0..OUTPUTS {
                if M == 1 {
                    // The same columns of the next outputs: a row is too short for the hardware to look ahead.
                    prefetch(w[o].as_ptr().wrapping_add(OUTPUTS * k + c));
                }
                let weights = E::load(s, chunk(w[o], c));
                for r in 0..M {
                    sums[r][o] = s.mul_add(weights, s.load(chunk(x[r], c)), sums[r][o]);
                }
            }
        }
        let outputs = output..(output + OUTPUTS).min(self.outputs.end);
        for r in 0..M {
            let mut values = [0.0; OUTPUTS];
            for o in 0..OUTPUTS {
                let rest = (whole..k).fold(0.0, |sum, c| sum + w[o][c].widen() * x[r][c]);
                values[o] = s.sum(sums[r][o]) + rest;
            }
            for (value, o) in values.iter_mut().zip(outputs.clone()) {
                *value += self.w.bias.as_ref().map_or(0.0, |bias| bias[o]);
            }
            // SAFETY: `row + r` is below `m`; these outputs belong to this thread.
            unsafe { self.to.write(row + r, output, &values[..outputs.len()]) };
        }
        M
    }
}

/// 16 elements from `start` on.
#[inline(always)]
fn chunk<E>(x: &[E], start: usize) -> &[E; 16] {
    debug_assert!(start + 16 <= x.len());
    // SAFETY: callers step through whole chunks of `x`.
    unsafe { &*x.as_ptr().add(start).cast::<[E; 16]>() }
}
