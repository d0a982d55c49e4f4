//! What fused linear layers do with their sums: activation functions as fixed sequences of f32 operations, and the ways
//! to int8. Every device gives these bits (docs/numerics.md).

use super::{Codes, linear_of_codes};
use crate::device::{Activation, Epilogue, GROUP_OUTPUTS, Output};
use crate::error::Result;
use crate::quant::requantize::Q31;
use crate::quant::{LinearWeight, Weight};

/// Coefficients of `exp(r)` for `|r| <= ln 2 / 2`, highest degree first: Chebyshev interpolation of degree 6, off by at
/// most 2e-8 of the value.
pub const EXP: [f32; 7] = [0.001_394_864, 0.008_375_17, 0.041_666_217, 0.166_664_15, 0.5, 1.0, 1.0];
/// Adding and subtracting it rounds an f32 below 2^22 to a whole number, half to even.
pub const TO_WHOLE: f32 = 12_582_912.0; // 1.5 * 2^23
/// `ln 2` in two parts, negated; the first has 9 significant bits (Cody and Waite 1980).
pub const LN_2: [f32; 2] = [-355.0 / 512.0, 2.121_944_4e-4];
/// `2 sqrt(2 / pi)` times 0.044715 and times 1.
pub const GELU_TANH: [f32; 2] = [0.071_354_814, 1.595_769_2];
/// `erfc(z) = t exp(-z^2 + P(t))`, `t = 1 / (1 + z / 2)`; P's coefficients, highest degree first. Relative error 1.1e-7
/// for all `z >= 0`. Press et al., Numerical Recipes, section 6.2 (`erfcc`).
pub const ERFC: [f32; 10] = [
    0.170_872_77,
    -0.822_152_2,
    1.488_515_9,
    -1.135_204,
    0.278_868_07,
    -0.186_288_06,
    0.096_784_18,
    0.374_091_96,
    1.000_023_7,
    -1.265_512_2,
];

/// `e^x` with `x` held to -87..=87, so that nothing is subnormal; NaN counts as -87.
#[allow(clippy::manual_clamp)] // which would keep NaN
pub fn exp(x: f32) -> f32 {
    let x = x.max(-87.0).min(87.0);
    let n = x.mul_add(std::f32::consts::LOG2_E, TO_WHOLE) - TO_WHOLE;
    let r = n.mul_add(LN_2[1], n.mul_add(LN_2[0], x));
    polynomial(&EXP, r) * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

fn polynomial(coefficients: &[f32], x: f32) -> f32 {
    coefficients[1..].iter().fold(coefficients[0], |sum, &c| sum.mul_add(x, c))
}

/// `y / (1 + exp(-t))` as `y` times a rounded reciprocal.
fn sigmoid_times(y: f32, t: f32) -> f32 {
    y * (1.0 / (1.0 + exp(-t)))
}

/// `max(y, 0)`; NaN stays.
fn relu(y: f32) -> f32 {
    if 0.0 > y { 0.0 } else { y }
}

/// One output's activation; [`Activation::SwiGlu`] pairs outputs and is [`swiglu`].
pub fn activate(y: f32, activation: Activation) -> f32 {
    match activation {
        Activation::None | Activation::SwiGlu => y,
        Activation::Relu => relu(y),
        Activation::Silu => sigmoid_times(y, y),
        Activation::GeluTanh => sigmoid_times(y, (y * y).mul_add(GELU_TANH[0], GELU_TANH[1]) * y),
        Activation::GeluErf => {
            // max(y, 0) - |y| erfc(|y| / sqrt(2)) / 2
            let z = y.abs() * std::f32::consts::FRAC_1_SQRT_2;
            let t = 1.0 / z.mul_add(0.5, 1.0);
            let half = (0.5 * t) * exp((-z).mul_add(z, polynomial(&ERFC, t)));
            (-y.abs()).mul_add(half, relu(y))
        }
    }
}

/// `silu(gate) * up`.
pub fn swiglu(gate: f32, up: f32) -> f32 {
    sigmoid_times(gate, gate) * up
}

/// `clamp(rne(y / scale) + zero_point, -128, 127)`; NaN takes the lowest code.
#[allow(clippy::manual_clamp)] // which would keep NaN
pub fn static_code(y: f32, scale: f32, zero_point: i32) -> i8 {
    ((y / scale).round_ties_even() + zero_point as f32).max(-128.0).min(127.0) as i8
}

/// A linear layer with int8 activations and an epilogue, as floats: `[m, outputs]`. `weight` is in canonical form; its
/// output must be [`Output::Floats`].
///
/// # Panics
/// If the weight is not quantized: a bug of the caller.
pub fn linear_fused(x: &Codes, weight: &LinearWeight, activation: Activation) -> Vec<f32> {
    let Weight::Quant(q) = &weight.weight else { panic!("linear_fused: the weight is not quantized") };
    activate_rows(linear_of_codes(x, q, weight.bias.as_deref()), q.n, activation)
}

/// `activation` of rows `y` of `n` columns; [`Activation::SwiGlu`], gate in a row's first half, halves them.
pub fn activate_rows(y: Vec<f32>, n: usize, activation: Activation) -> Vec<f32> {
    if activation != Activation::SwiGlu {
        return y.into_iter().map(|y| activate(y, activation)).collect();
    }
    let row = |row: &[f32]| {
        let (gate, up) = row.split_at(n / 2);
        gate.iter().zip(up).map(|(&gate, &up)| swiglu(gate, up)).collect::<Vec<_>>()
    };
    y.chunks_exact(n).flat_map(row).collect()
}

/// The same as codes. Scales are one a row, or `[m, ceil(outputs / 128)]` for [`Output::Groups`].
///
/// # Errors
/// Those of [`Epilogue::check`].
///
/// # Panics
/// As [`linear_fused`], and if the epilogue does not quantize.
pub fn linear_codes(x: &Codes, weight: &LinearWeight, epilogue: Epilogue) -> Result<Codes> {
    let outputs = epilogue.outputs(weight.n());
    let row_scales = |scale: f32| x.scales.iter().map(|s| if s.is_finite() { scale } else { f32::NAN }).collect();
    let floats = || linear_fused(x, weight, epilogue.activation);
    Ok(match epilogue.output {
        Output::Floats => panic!("linear_codes: the epilogue does not quantize"),
        Output::Static { scale, zero_point } => Codes {
            codes: floats().into_iter().map(|y| static_code(y, scale, zero_point)).collect(),
            scales: row_scales(scale),
            zeros: vec![zero_point; x.scales.len()],
            outliers: Vec::new(),
        },
        Output::FixedPoint { scale, zero_point } => {
            let columns = epilogue.fixed_point(weight)?;
            let lowest = if epilogue.activation == Activation::Relu { zero_point } else { -128 };
            let code = |(i, sum): (usize, i32)| fixed_code(sum, &columns, i % outputs, zero_point, lowest);
            Codes {
                codes: int8_sums(x, weight).into_iter().enumerate().map(code).collect(),
                scales: row_scales(scale),
                zeros: vec![zero_point; x.scales.len()],
                outliers: Vec::new(),
            }
        }
        Output::Groups => {
            let y = floats();
            let groups = y.chunks(outputs).flat_map(|row| row.chunks(GROUP_OUTPUTS));
            let groups: Vec<Codes> = groups
                .map(|group| super::quantize_rows(group, group.len(), crate::quant::ActQuant::DynamicPerToken))
                .collect();
            Codes {
                codes: groups.iter().flat_map(|g| &g.codes).copied().collect(),
                scales: groups.iter().map(|g| g.scales[0]).collect(),
                zeros: vec![0; x.scales.len()],
                outliers: Vec::new(),
            }
        }
    })
}

/// The code of column `n` from its exact sum; `columns` are [`Epilogue::fixed_point`]'s.
pub(in crate::device::cpu) fn fixed_code(sum: i32, columns: &[i32], n: usize, zero_point: i32, lowest: i32) -> i8 {
    let width = columns.len() / 3;
    let multiplier = Q31 { mantissa: columns[width + n], shift: columns[2 * width + n] };
    multiplier.requantize(sum.wrapping_add(columns[n]), zero_point, lowest, 127) as i8
}

/// Exact sums `[m, n]` of a weight of one group.
fn int8_sums(x: &Codes, weight: &LinearWeight) -> Vec<i32> {
    let Weight::Quant(q) = &weight.weight else { panic!("int8_sums: the weight is not quantized") };
    let sum = |codes: &[i8], zero: i32, r: usize| -> i32 {
        let steps = |c: usize| i32::from(q.codes[r * q.k + c]) - q.zeros[r] as i32;
        codes.iter().enumerate().map(|(c, &code)| (i32::from(code) - zero) * steps(c)).sum()
    };
    let rows = x.codes.chunks_exact(q.k).zip(&x.zeros);
    rows.flat_map(|(codes, &zero)| (0..q.n).map(move |r| sum(codes, zero, r))).collect()
}
