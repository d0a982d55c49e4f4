//! Fast ops on rows: those that emit a linear layer's input, rotary embedding, head norms, statistics of logits.

use rayon::prelude::*;

use super::Level;
use super::activation::sigmoid_times;
use super::reference::{self, LogitsStats};
use super::simd::{Kernel, Simd, exp, largest, load_part, store_part, sum_of_products};
use crate::device::AttentionShape;
use crate::quant::ActQuant;

/// Work below this many elements is not worth waking a thread for.
const SERIAL: usize = 1 << 15;

/// What a row is computed from.
pub(super) enum Producer<'a> {
    RmsNorm {
        x: &'a [f32],
        weight: &'a [f32],
        eps: f32,
    },
    /// `[m, k]`, or gated `[m, 2 * k]`, gate first.
    SubNorm {
        x: &'a [f32],
        gated: bool,
        weight: &'a [f32],
        eps: f32,
    },
    /// `[m, 2 * k]`, gate first.
    SiluMul {
        gate_up: &'a [f32],
    },
    Copy {
        x: &'a [f32],
    },
}

/// Where a row goes.
pub(super) enum Emitted<'a> {
    /// `[m, k]`
    Floats(&'a mut [f32]),
    /// `[m, k]` codes, `[m]` scales and zero points.
    Codes { codes: &'a mut [i8], scales: &'a mut [f32], zeros: &'a mut [i32], quant: ActQuant },
}

/// Computes rows of `k`, gathers their columns by `order` and writes them out.
pub(super) fn emit(level: Level, producer: &Producer<'_>, order: Option<&[u32]>, out: Emitted<'_>, k: usize) {
    let row = |row: usize, scratch: &mut Vec<f32>, to: RowTo<'_>| {
        level.run(EmitRow { producer, row, order, k, scratch, to });
    };
    match out {
        Emitted::Floats(y) if y.len() < SERIAL => {
            let mut scratch = Vec::new();
            y.chunks_exact_mut(k).enumerate().for_each(|(r, y)| row(r, &mut scratch, RowTo::Floats(y)));
        }
        Emitted::Floats(y) => {
            let rows = y.par_chunks_exact_mut(k).enumerate();
            rows.for_each_init(Vec::new, |scratch, (r, y)| row(r, scratch, RowTo::Floats(y)));
        }
        Emitted::Codes { codes, scales, zeros, quant } if codes.len() < SERIAL => {
            let mut scratch = Vec::new();
            for (r, ((codes, scale), zero)) in codes.chunks_exact_mut(k).zip(scales).zip(zeros).enumerate() {
                row(r, &mut scratch, RowTo::Codes { codes, scale, zero, quant });
            }
        }
        Emitted::Codes { codes, scales, zeros, quant } => {
            let rows = codes.par_chunks_exact_mut(k).zip(scales).zip(zeros).enumerate();
            rows.for_each_init(Vec::new, |scratch, (r, ((codes, scale), zero))| {
                row(r, scratch, RowTo::Codes { codes, scale, zero, quant });
            });
        }
    }
}

enum RowTo<'a> {
    Floats(&'a mut [f32]),
    Codes { codes: &'a mut [i8], scale: &'a mut f32, zero: &'a mut i32, quant: ActQuant },
}

struct EmitRow<'a> {
    producer: &'a Producer<'a>,
    row: usize,
    order: Option<&'a [u32]>,
    k: usize,
    scratch: &'a mut Vec<f32>,
    to: RowTo<'a>,
}

impl Kernel for EmitRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (k, r) = (self.k, self.row);
        match (self.to, self.order) {
            (RowTo::Floats(y), None) => produce(s, self.producer, r, y),
            (RowTo::Floats(y), Some(order)) => {
                self.scratch.resize(k, 0.0);
                produce(s, self.producer, r, self.scratch);
                y.iter_mut().zip(order).for_each(|(y, &c)| *y = self.scratch[c as usize]);
            }
            (RowTo::Codes { codes, scale, zero, quant }, order) => {
                self.scratch.resize(2 * k, 0.0);
                let (row, gathered) = self.scratch.split_at_mut(k);
                produce(s, self.producer, r, row);
                let row = match order {
                    None => row,
                    Some(order) => {
                        gathered.iter_mut().zip(order).for_each(|(y, &c)| *y = row[c as usize]);
                        gathered
                    }
                };
                (*scale, *zero) = quantize(s, row, quant, codes);
            }
        }
    }
}

#[inline(always)]
fn produce<S: Simd>(s: S, producer: &Producer<'_>, r: usize, y: &mut [f32]) {
    let k = y.len();
    match producer {
        Producer::Copy { x } => y.copy_from_slice(&x[r * k..][..k]),
        Producer::RmsNorm { x, weight, eps } => {
            y.copy_from_slice(&x[r * k..][..k]);
            rms_norm(s, y, weight, *eps);
        }
        Producer::SubNorm { x, gated: false, weight, eps } => {
            y.copy_from_slice(&x[r * k..][..k]);
            rms_norm(s, y, weight, *eps);
        }
        Producer::SubNorm { x, gated: true, weight, eps } => {
            let (gate, up) = x[r * 2 * k..][..2 * k].split_at(k);
            for ((y, &g), u) in y.iter_mut().zip(gate).zip(up) {
                let g = if 0.0 > g { 0.0 } else { g };
                *y = g * g * u;
            }
            rms_norm(s, y, weight, *eps);
        }
        Producer::SiluMul { gate_up } => {
            let (gate, up) = gate_up[r * 2 * k..][..2 * k].split_at(k);
            for ((gate, up), y) in gate.chunks(16).zip(up.chunks(16)).zip(y.chunks_mut(16)) {
                let (g, u) = (load_part(s, gate), load_part(s, up));
                store_part(s, s.mul(sigmoid_times(s, g, g), u), y);
            }
        }
    }
}

#[inline(always)]
fn rms_norm<S: Simd>(s: S, row: &mut [f32], weight: &[f32], eps: f32) {
    // In f64 as in the reference: rounding each of these four operations to f32 would double the error of a row.
    let mean = f64::from(sum_of_products(s, row, row)) / row.len() as f64;
    let inverse = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
    row.iter_mut().zip(weight).for_each(|(x, w)| *x = *x * inverse * w);
}

/// `reference::quantize_rows` of one row: the same bits. Returns the scale and the zero point.
#[inline(always)]
pub(super) fn quantize<S: Simd>(s: S, x: &[f32], quant: ActQuant, codes: &mut [i8]) -> (f32, i32) {
    let (amax, poison) = largest(s, x);
    let (scale, zero_point, lowest) = match quant {
        ActQuant::StaticPerTensor { scale, zero_point } => (scale, zero_point as f32, -128.0),
        ActQuant::DynamicAsymmetric => {
            let (min, max) = range(s, x);
            let (scale, zero_point) = reference::asymmetric(min, max);
            (scale, zero_point, -128.0)
        }
        _ => (if amax / 127.0 == 0.0 { 1.0 } else { amax / 127.0 }, 0.0, -127.0),
    };
    if poison.is_nan() || !scale.is_finite() {
        codes.fill(0);
        return (f32::NAN, if quant == ActQuant::DynamicAsymmetric { 0 } else { zero_point as i32 });
    }
    for (x, codes) in x.chunks(16).zip(codes.chunks_mut(16)) {
        // Beyond 1024 a quotient saturates whatever the zero point; within, it converts to an integer.
        let quotient = s.max(s.min(s.div(load_part(s, x), s.splat(scale)), s.splat(1024.0)), s.splat(-1024.0));
        let code = s.add(s.to_float(s.to_int(quotient)), s.splat(zero_point));
        let code = s.max(s.min(code, s.splat(127.0)), s.splat(lowest));
        let mut bytes = [0; 16];
        s.store_low_bytes(s.to_int(code), &mut bytes);
        codes.copy_from_slice(&bytes[..codes.len()]);
    }
    (scale, zero_point as i32)
}

/// Smallest and largest of `x` and 0.
#[inline(always)]
fn range<S: Simd>(s: S, x: &[f32]) -> (f32, f32) {
    let zero = s.splat(0.0);
    let (mut low, mut high) = (zero, zero);
    for x in x.chunks(16) {
        let x = load_part(s, x);
        low = s.max(s.sub(zero, x), low);
        high = s.max(x, high);
    }
    (-s.max_lane(low), s.max_lane(high))
}

/// Calls `each` with every row of `width` and its number, on several threads when there is enough to do.
fn for_each_row(x: &mut [f32], width: usize, each: impl Fn(usize, &mut [f32]) + Sync + Send) {
    if x.len() < SERIAL {
        x.chunks_exact_mut(width).enumerate().for_each(|(r, row)| each(r, row));
    } else {
        x.par_chunks_exact_mut(width).enumerate().for_each(|(r, row)| each(r, row));
    }
}

/// `reference::qk_norm` in place, in f32.
pub(super) fn qk_norm(level: Level, qkv: &mut [f32], q: &[f32], k: &[f32], eps: f32, shape: &AttentionShape) {
    for_each_row(qkv, shape.qkv_width(), |_, row| level.run(HeadNorms { row, q, k, eps, shape }));
}

struct HeadNorms<'a> {
    row: &'a mut [f32],
    q: &'a [f32],
    k: &'a [f32],
    eps: f32,
    shape: &'a AttentionShape,
}

impl Kernel for HeadNorms<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (heads, all) = (self.shape.num_heads, self.shape.num_heads + self.shape.num_kv_heads);
        for (i, head) in self.row.chunks_exact_mut(self.shape.head_dim).take(all).enumerate() {
            rms_norm(s, head, if i < heads { self.q } else { self.k }, self.eps);
        }
    }
}

/// `reference::rope` in place, in f32.
pub(super) fn rope(qkv: &mut [f32], table: &[f32], positions: &[u32], shape: &AttentionShape) {
    let (d, half) = (shape.head_dim, shape.head_dim / 2);
    let rotated = (shape.num_heads + shape.num_kv_heads) * d;
    for_each_row(qkv, shape.qkv_width(), |r, row| {
        let (cos, sin) = table[positions[r] as usize * d..][..d].split_at(half);
        for head in row[..rotated].chunks_exact_mut(d) {
            let (low, high) = head.split_at_mut(half);
            for (((x, y), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
            }
        }
    });
}

/// `reference::logits_stats` with exponentials in f32, summed in blocks in f64.
pub(super) fn logits_stats(level: Level, logits: &[f32], targets: &[u32], vocab: usize) -> Vec<LogitsStats> {
    let rows = logits.par_chunks_exact(vocab).zip(targets);
    rows.map(|(row, &target)| level.run(Stats { row, target })).collect()
}

struct Stats<'a> {
    row: &'a [f32],
    target: u32,
}

impl Kernel for Stats<'_> {
    type Output = LogitsStats;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> LogitsStats {
        let (chunks, rest) = self.row.as_chunks::<16>();
        let mut lanes = s.splat(f32::NEG_INFINITY);
        for x in chunks {
            lanes = s.max(s.load(x), lanes);
        }
        let max = rest.iter().fold(s.max_lane(lanes), |max, &x| if x > max { x } else { max });
        if max.is_infinite() || self.row.iter().fold(false, |nan, x| nan | x.is_nan()) {
            return reference::logits_stats(self.row, &[self.target], self.row.len())[0];
        }
        let mut sum = 0.0;
        for block in self.row.chunks(1024) {
            let (chunks, rest) = block.as_chunks::<16>();
            let mut lanes = s.splat(0.0);
            for x in chunks {
                lanes = s.add(lanes, exp(s, s.sub(s.load(x), s.splat(max))));
            }
            let rest: f32 = rest.iter().map(|x| (x - max).exp()).sum();
            sum += f64::from(s.sum(lanes)) + f64::from(rest);
        }
        let target = self.row.get(self.target as usize).map_or(f64::NAN, |&x| f64::from(x));
        let argmax = self.row.iter().position(|&x| x == max).unwrap_or(0) as u32;
        LogitsStats { argmax, max: f64::from(max), log_sum_exp: f64::from(max) + sum.ln(), target }
    }
}
