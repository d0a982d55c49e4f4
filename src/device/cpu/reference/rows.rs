//! Ops on rows: embedding, normalization, activation function, quantization of activations, statistics of logits.

use rayon::prelude::*;

use super::Rounding;
use crate::dtype::HostData;
use crate::quant::ActQuant;

/// Rows `ids` of `table` `[vocab, width]`, exactly.
pub fn embed(table: &HostData, ids: &[u32], width: usize) -> Vec<f32> {
    let row = |id: u32| id as usize * width..(id as usize + 1) * width;
    match table {
        HostData::F32(t) => ids.iter().flat_map(|&id| t[row(id)].iter().copied()).collect(),
        HostData::F16(t) => ids.iter().flat_map(|&id| t[row(id)].iter().map(|x| x.to_f32())).collect(),
        HostData::BF16(t) => ids.iter().flat_map(|&id| t[row(id)].iter().map(|x| x.to_f32())).collect(),
        other => panic!("embed: {} is not a floating type", other.dtype()),
    }
}

/// Rows `rows` of `x` `[_, width]`.
pub fn gather_rows(x: &[f32], rows: &[u32], width: usize) -> Vec<f32> {
    rows.iter().flat_map(|&r| x[r as usize * width..(r as usize + 1) * width].iter().copied()).collect()
}

/// Each row of `x` with its columns in `order`: `y[r, c] = x[r, order[c]]`.
pub fn gather_columns<T: Copy>(x: &[T], order: &[u32]) -> Vec<T> {
    x.chunks_exact(order.len()).flat_map(|row| order.iter().map(|&c| row[c as usize])).collect()
}

/// RMSNorm: `x / sqrt(mean(x^2) + eps) * weight` per row. Source: Zhang and Sennrich 2019, arXiv 1910.07467.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, rounding: Rounding) -> Vec<f64> {
    let norm = |row: &[f32]| norm_row(row.iter().map(|&x| f64::from(x)).collect(), weight, eps, rounding);
    x.par_chunks(weight.len()).flat_map_iter(norm).collect()
}

fn norm_row(row: Vec<f64>, weight: &[f32], eps: f32, rounding: Rounding) -> Vec<f64> {
    let mean = rounding.carry(rounding.dot(&row, &row) / row.len() as f64);
    let inverse = rounding.carry(1.0 / (mean + f64::from(eps)).sqrt());
    row.iter().zip(weight).map(|(x, &w)| rounding.round(rounding.carry(x * inverse) * f64::from(w))).collect()
}

/// RMSNorm of the rows of `x`, or where `gated` of `relu(gate)^2 * up` with rows of gate, then up. Source: the norms inside attention
/// and MLP of BitNet b1.58 2B4T, Ma et al. 2025, arXiv 2504.12285.
pub fn sub_norm(x: &[f32], gated: bool, weight: &[f32], eps: f32, rounding: Rounding) -> Vec<f64> {
    let k = weight.len();
    let gate = |g: f32, u: f32| {
        let g = f64::from(if 0.0 > g { 0.0 } else { g });
        rounding.carry(rounding.carry(g * g) * f64::from(u))
    };
    let norm = |row: &[f32]| {
        let (x, up) = row.split_at(k);
        let row = match gated {
            true => x.iter().zip(up).map(|(&g, &u)| gate(g, u)).collect(),
            false => x.iter().map(|&x| f64::from(x)).collect(),
        };
        norm_row(row, weight, eps, rounding)
    };
    x.par_chunks(if gated { 2 * k } else { k }).flat_map_iter(norm).collect()
}

/// `silu(gate) * up` per row of `[m, 2 * k]`, gate first; `silu(g) = g / (1 + exp(-g))`.
pub fn silu_mul(gate_up: &[f32], k: usize, rounding: Rounding) -> Vec<f64> {
    let row = |row: &[f32]| -> Vec<f64> {
        let (gate, up) = row.split_at(k);
        let silu = |g: f64| rounding.carry(g / rounding.carry(1.0 + rounding.carry((-g).exp())));
        gate.iter().zip(up).map(|(&g, &u)| rounding.round(silu(f64::from(g)) * f64::from(u))).collect()
    };
    gate_up.par_chunks(2 * k).flat_map_iter(row).collect()
}

/// Quantized rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Codes {
    /// `[m, k]` codes.
    pub codes: Vec<i8>,
    /// `[m]` real values of one step.
    pub scales: Vec<f32>,
    /// `[m]` codes of real zero.
    pub zeros: Vec<i32>,
    /// LLM.int8(): `[m, k]` outliers, 0 elsewhere; else empty.
    pub outliers: Vec<f32>,
}

/// Rows of `x` `[m, k]` as int8, bit for bit the same on every device:
/// - dynamic: `s = max|x| / 127`, `q = rne(x / s)` (in [-127, 127] by construction); `s = 1` where it would be 0;
/// - dynamic and asymmetric: `s = (max - min) / 255` of the range extended to hold 0, `s = 1` where it would be 0,
///   `z = clamp(rne(-128 - min / s), -128, 127)`, `q = clamp(rne(x / s) + z, -128, 127)`;
/// - static: `q = clamp(rne(x / s) + z, -128, 127)`;
/// - LLM.int8(): the outliers apart, dynamic for what is left ([`split_outliers`]);
/// - a row that holds a NaN or an infinity (or whose range passes f32) gets scale NaN and zero codes, so that whatever
///   reads it becomes NaN; its own zero point, where rows have one, is 0.
///
/// # Panics
/// If `quant` is [`ActQuant::None`]: a bug of the caller.
pub fn quantize_rows(x: &[f32], k: usize, quant: ActQuant) -> Codes {
    if let ActQuant::LlmInt8 { threshold } = quant {
        let (inner, outliers) = split_outliers(x, k, threshold);
        return Codes { outliers, ..quantize_rows(&inner, k, ActQuant::DynamicPerToken) };
    }
    let rows: Vec<(Vec<i8>, f32, i32)> = x
        .par_chunks(k)
        .map(|row| {
            let (scale, zero, lowest) = match quant {
                ActQuant::None => panic!("quantize_rows: no quantization was asked for"),
                ActQuant::DynamicPerToken | ActQuant::LlmInt8 { .. } => {
                    let scale = row.iter().fold(0.0f32, |amax, x| amax.max(x.abs())) / 127.0;
                    (if scale == 0.0 { 1.0 } else { scale }, 0.0, -127.0)
                }
                ActQuant::DynamicAsymmetric => {
                    let (min, max) = row.iter().fold((0.0f32, 0.0f32), |(min, max), &x| (min.min(x), max.max(x)));
                    let (scale, zero) = asymmetric(min, max);
                    (scale, zero, -128.0)
                }
                ActQuant::StaticPerTensor { scale, zero_point } => (scale, zero_point as f32, -128.0),
            };
            if !row.iter().all(|x| x.is_finite()) || !scale.is_finite() {
                let own_zero = quant == ActQuant::DynamicAsymmetric;
                return (vec![0; k], f32::NAN, if own_zero { 0 } else { zero as i32 });
            }
            let code = |x: &f32| ((x / scale).round_ties_even() + zero).clamp(lowest, 127.0) as i8;
            (row.iter().map(code).collect(), scale, zero as i32)
        })
        .collect();
    Codes {
        codes: rows.iter().flat_map(|row| &row.0).copied().collect(),
        scales: rows.iter().map(|row| row.1).collect(),
        zeros: rows.iter().map(|row| row.2).collect(),
        outliers: Vec::new(),
    }
}

/// Rows of `x` `[m, k]` in two: what is below `threshold` in magnitude, and the outliers; 0 in the place of the other. A row
/// that holds a NaN or an infinity has no outliers.
pub fn split_outliers(x: &[f32], k: usize, threshold: f32) -> (Vec<f32>, Vec<f32>) {
    let (mut inner, mut outliers) = (x.to_vec(), vec![0.0; x.len()]);
    inner.par_chunks_mut(k).zip(outliers.par_chunks_mut(k)).for_each(|(inner, outliers)| {
        if inner.iter().all(|x| x.is_finite()) {
            for (inner, outlier) in inner.iter_mut().zip(outliers).filter(|(x, _)| x.abs() >= threshold) {
                std::mem::swap(inner, outlier);
            }
        }
    });
    (inner, outliers)
}

/// Scale and zero point of signed codes for values from `min` to `max`, `min <= 0 <= max`.
pub(in crate::device::cpu) fn asymmetric(min: f32, max: f32) -> (f32, f32) {
    let scale = (max - min) / 255.0;
    let scale = if scale == 0.0 { 1.0 } else { scale };
    (scale, (-128.0 - min / scale).round_ties_even().clamp(-128.0, 127.0))
}

/// Longest run of columns that share a scale in [`round_int16`].
pub const INT16_BLOCK: usize = 128;

/// Largest 16-bit code: `127 * 256 + 127`, so that a code splits into two signed bytes.
pub const INT16_MAX: f32 = 32639.0;

/// Blocks whose largest value is below this count as zero in [`round_int16`]: `32639 / amax` must be finite.
pub const INT16_SMALLEST: f32 = 1e-30;

/// Rows of `x` `[m, k]` rounded to 16-bit integers, `q = rne(x * (32639 / amax))`, `x' = q * (amax / 32639)`, with one
/// `amax` per block: what the CPU's fast path does to the activations of a weight-only quantized layer. A block is a
/// weight's group, or 128 columns of it where it is longer. Returns real values.
pub fn round_int16(x: &[f32], k: usize, group_size: usize) -> Vec<f32> {
    let block = |x: &[f32]| -> Vec<f32> {
        let amax = x.iter().fold(0.0f32, |amax, x| amax.max(x.abs()));
        let (step, inverse) = (amax / INT16_MAX, if amax >= INT16_SMALLEST { INT16_MAX / amax } else { 0.0 });
        x.iter().map(|x| (x * inverse).round_ties_even() * step).collect()
    };
    let group = |x: &[f32]| -> Vec<f32> { x.chunks(INT16_BLOCK).flat_map(block).collect() };
    x.par_chunks(k).flat_map_iter(|row| row.chunks(group_size).flat_map(group)).collect()
}

/// What sampling and scoring need of one row of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitsStats {
    /// Lowest id of the largest logit; 0 where every logit is NaN.
    pub argmax: u32,
    /// Largest logit.
    pub max: f64,
    /// Natural log of the sum of exponentials.
    pub log_sum_exp: f64,
    /// Logit of the target; NaN where the target is not below the vocabulary size.
    pub target: f64,
}

/// Statistics of each row of `logits` `[m, vocab]`. A NaN among them makes `log_sum_exp` NaN.
pub fn logits_stats(logits: &[f32], targets: &[u32], vocab: usize) -> Vec<LogitsStats> {
    let row = |(row, &target): (&[f32], &u32)| -> LogitsStats {
        let (argmax, max) = row
            .iter()
            .enumerate()
            .fold((0, f32::NEG_INFINITY), |(id, max), (i, &x)| if x > max { (i, x) } else { (id, max) });
        let max = f64::from(max);
        let sum: f64 = row.iter().map(|&x| (f64::from(x) - max).exp()).sum();
        let log_sum_exp = if max.is_infinite() && !row.iter().any(|x| x.is_nan()) { max } else { max + sum.ln() };
        let target = row.get(target as usize).map_or(f64::NAN, |&x| f64::from(x));
        LogitsStats { argmax: argmax as u32, max, log_sum_exp, target }
    };
    logits.par_chunks(vocab).zip(targets).map(row).collect()
}
