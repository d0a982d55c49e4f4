//! Linear layers: `y[m, n] = x[m, k] * w[n, k]^T + bias[n]`.
//!
//! Inputs are in the weight's stored column order: the producer of `x` has applied an act-order already.

use rayon::prelude::*;

use super::{Codes, Rounding};
use crate::dtype::HostData;
use crate::quant::{Factored, QuantWeight};

/// Floating-point weight `[n, k]`.
pub fn linear_dense(x: &[f32], w: &HostData, k: usize, bias: Option<&[f32]>, rounding: Rounding) -> Vec<f64> {
    let n = w.len() / k;
    let row = |r: usize| -> Vec<f64> {
        let columns = r * k..(r + 1) * k;
        match w {
            HostData::F32(w) => w[columns].iter().map(|&w| rounding.round(f64::from(w))).collect(),
            HostData::F16(w) => w[columns].iter().map(|w| rounding.round(w.to_f64())).collect(),
            HostData::BF16(w) => w[columns].iter().map(|w| rounding.round(w.to_f64())).collect(),
            other => panic!("linear_dense: {} is not a floating type", other.dtype()),
        }
    };
    linear(x, n, k, bias, rounding, row)
}

/// Quantized weight and floating-point activations (W4A16 and its relatives): the dense product with
/// `w[r, c] = scales[r, c / g] * (level(codes[r, c]) - zeros[r, c / g])`, a level being the code itself or its codebook's
/// value.
pub fn linear_quant(x: &[f32], w: &QuantWeight, bias: Option<&[f32]>, rounding: Rounding) -> Vec<f64> {
    let (groups, levels) = (w.groups(), w.levels());
    let codes: &[u8] = &w.codes; // before cores share the work
    let row = |r: usize| -> Vec<f64> {
        (0..w.k)
            .map(|c| {
                let g = r * groups + c / w.group_size;
                let steps = f64::from(levels[usize::from(codes[r * w.k + c])]) - f64::from(w.zeros[g]);
                rounding.round(f64::from(w.scales[g]) * steps)
            })
            .collect()
    };
    linear(x, w.n, w.k, bias, rounding, row)
}

fn linear<R>(x: &[f32], n: usize, k: usize, bias: Option<&[f32]>, rounding: Rounding, weight_row: R) -> Vec<f64>
where
    R: Fn(usize) -> Vec<f64> + Sync,
{
    let m = x.len() / k;
    let x: Vec<f64> = x.iter().map(|&x| rounding.round(f64::from(x))).collect();
    let columns: Vec<Vec<f64>> = (0..n)
        .into_par_iter()
        .map(|r| {
            let w = weight_row(r);
            let bias = bias.map_or(0.0, |b| f64::from(b[r]));
            x.chunks_exact(k).map(|x| rounding.round(rounding.carry(rounding.dot(x, &w)) + bias)).collect()
        })
        .collect();
    let mut y = vec![0.0; m * n];
    for (r, column) in columns.iter().enumerate() {
        for (i, &value) in column.iter().enumerate() {
            y[i * n + r] = value;
        }
    }
    y
}

/// INT8 activations (W8A8, W4A8): exact integer sums and a fixed sequence of f32 operations, so that every device
/// gives these bits (docs/numerics.md).
///
/// With `a[g] = sum over group g of (codes[c] - zero_point) * (w.codes[r, c] - w.zeros[r, g])`, an exact integer:
/// - one group: `y = (f32(a) * scale) * w.scale`, two rounded multiplies;
/// - several: `y = 0`, then `y = fma(f32(a[g]), w.scales[r, g], y)` in ascending order of groups, then `y * scale`.
///
/// Then `+ bias`, rounded once more. `codes` is `[m, k]` with `scales` and `zeros` `[m]`; zero points of the weight must
/// be integral.
pub fn linear_int8(codes: &[i8], scales: &[f32], zeros: &[i32], w: &QuantWeight, bias: Option<&[f32]>) -> Vec<f32> {
    let groups = w.groups();
    let mut y = vec![0.0; scales.len() * w.n];
    let w_codes: &[u8] = &w.codes; // before cores share the work
    y.par_chunks_mut(w.n).zip(codes.par_chunks(w.k)).zip(scales).zip(zeros).for_each(
        |(((y, x), &scale), &zero_point)| {
            for (r, y) in y.iter_mut().enumerate() {
                let row = &w_codes[r * w.k..(r + 1) * w.k];
                let group = |g: usize| -> f32 {
                    let zero = w.zeros[r * groups + g] as i64;
                    let columns = g * w.group_size..((g + 1) * w.group_size).min(w.k);
                    let sum: i64 =
                        columns.map(|c| (i64::from(x[c]) - i64::from(zero_point)) * (i64::from(row[c]) - zero)).sum();
                    sum as f32
                };
                let sum = if groups == 1 {
                    (group(0) * scale) * w.scales[r]
                } else {
                    (0..groups).fold(0.0f32, |sum, g| group(g).mul_add(w.scales[r * groups + g], sum)) * scale
                };
                *y = bias.map_or(sum, |b| sum + b[r]);
            }
        },
    );
    y
}

/// [`linear_int8`] of quantized rows, of a weight that is [`Factored`] in its int8 form. LLM.int8(): with one group, then for every outlier `c` of the row in ascending order
/// `y = fma(outliers[c], f32(w.codes[r, c] - w.zeros[r]) * w.scales[r], y)`, then `+ bias`.
pub fn linear_of_codes(x: &Codes, w: &QuantWeight, bias: Option<&[f32]>) -> Vec<f32> {
    if x.outliers.is_empty() {
        if let Some(factored) = Factored::of(w) {
            return linear_int8(&x.codes, &x.scales, &x.zeros, &factored.int8_rows(w), bias);
        }
        return linear_int8(&x.codes, &x.scales, &x.zeros, w, bias);
    }
    let mut y = linear_int8(&x.codes, &x.scales, &x.zeros, w, None);
    let w_codes: &[u8] = &w.codes; // before cores share the work
    y.par_chunks_mut(w.n).zip(x.outliers.par_chunks(w.k)).for_each(|(y, outliers)| {
        for (r, y) in y.iter_mut().enumerate() {
            for (c, &x) in outliers.iter().enumerate().filter(|(_, x)| **x != 0.0) {
                let weight = (f32::from(w_codes[r * w.k + c]) - w.zeros[r]) * w.scales[r];
                *y = x.mul_add(weight, *y);
            }
            *y = bias.map_or(*y, |b| *y + b[r]);
        }
    });
    y
}
