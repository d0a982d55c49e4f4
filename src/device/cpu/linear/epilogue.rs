//! What a linear layer does with rows of sums it has scaled: activations and codes, the bits of `reference::linear_fused`
//! and `reference::linear_codes`.

use rayon::prelude::*;

use super::super::Level;
use super::super::activation::{gelu_erf, gelu_tanh, sigmoid_times};
use super::super::reference::fixed_code;
use super::super::rows::quantize;
use super::super::simd::{Kernel, Simd, load_part, store_part};
use crate::device::{Activation, Columns, Epilogue, GROUP_OUTPUTS, Output, Write};
use crate::quant::ActQuant;

/// Rows `y` `[m, n]` through `epilogue`'s activation into `columns` of `out`.
pub(in crate::device::cpu) fn write_floats(
    level: Level,
    y: &mut [f32],
    n: usize,
    epilogue: Epilogue,
    out: &mut [f32],
    columns: Columns,
    write: Write,
) {
    let outputs = epilogue.outputs(n);
    y.par_chunks_exact_mut(n).zip(out.par_chunks_mut(columns.stride)).for_each(|(y, out)| {
        level.run(Activate { y, activation: epilogue.activation });
        let out = &mut out[columns.offset..columns.offset + outputs];
        match write {
            Write::Store => out.copy_from_slice(&y[..outputs]),
            Write::Add => out.iter_mut().zip(y).for_each(|(out, y)| *out += *y),
        }
    });
}

/// Rows `y` `[m, n]` as codes and their scales. For [`Output::FixedPoint`] `y` holds the bits of exact sums, and `fixed` what
/// [`Epilogue::fixed_point`] says.
pub(in crate::device::cpu) fn write_codes(
    level: Level,
    y: &mut [f32],
    n: usize,
    epilogue: Epilogue,
    fixed: &[i32],
    x_scales: &[f32],
    (codes, scales): (&mut [i8], &mut [f32]),
) {
    let outputs = epilogue.outputs(n);
    let row_scales = scales.len() / x_scales.len();
    let rows = y.par_chunks_exact_mut(n).zip(codes.par_chunks_exact_mut(outputs));
    rows.zip(scales.par_chunks_exact_mut(row_scales)).zip(x_scales).for_each(|(((y, codes), scales), x_scale)| {
        let row_scale = |scale: f32| if x_scale.is_finite() { scale } else { f32::NAN };
        match epilogue.output {
            Output::Floats => unreachable!("the op table takes epilogues that quantize"),
            Output::Static { scale, zero_point } => {
                level.run(Activate { y, activation: epilogue.activation });
                level.run(StaticCodes { y: &y[..outputs], scale, zero_point, codes });
                scales[0] = row_scale(scale);
            }
            Output::FixedPoint { scale, zero_point } => {
                let lowest = if epilogue.activation == Activation::Relu { zero_point } else { -128 };
                for (n, (code, y)) in codes.iter_mut().zip(y.iter()).enumerate() {
                    *code = fixed_code(y.to_bits() as i32, fixed, n, zero_point, lowest);
                }
                scales[0] = row_scale(scale);
            }
            Output::Groups => {
                level.run(Activate { y, activation: epilogue.activation });
                level.run(GroupCodes { y: &y[..outputs], codes, scales });
            }
        }
    });
}

/// The activation of a row in place; for SwiGLU of its first half with its second.
struct Activate<'a> {
    y: &'a mut [f32],
    activation: Activation,
}

impl Kernel for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.activation {
            Activation::None => {}
            Activation::Relu => each(s, self.y, |y| s.max(s.splat(0.0), y)),
            Activation::Silu => each(s, self.y, |y| sigmoid_times(s, y, y)),
            Activation::GeluTanh => each(s, self.y, |y| gelu_tanh(s, y)),
            Activation::GeluErf => each(s, self.y, |y| gelu_erf(s, y)),
            Activation::SwiGlu => {
                let (gate, up) = self.y.split_at_mut(self.y.len() / 2);
                for (gate, up) in gate.chunks_mut(16).zip(up.chunks(16)) {
                    let g = load_part(s, gate);
                    store_part(s, s.mul(sigmoid_times(s, g, g), load_part(s, up)), gate);
                }
            }
        }
    }
}

#[inline(always)]
fn each<S: Simd>(s: S, y: &mut [f32], f: impl Fn(S::F) -> S::F) {
    for y in y.chunks_mut(16) {
        store_part(s, f(load_part(s, y)), y);
    }
}

/// `reference::static_code` of each element.
struct StaticCodes<'a> {
    y: &'a [f32],
    scale: f32,
    zero_point: i32,
    codes: &'a mut [i8],
}

impl Kernel for StaticCodes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (y, codes) in self.y.chunks(16).zip(self.codes.chunks_mut(16)) {
            // Beyond 1024 a quotient saturates whatever the zero point. NaN becomes the lowest code.
            let quotient = s.div(load_part(s, y), s.splat(self.scale));
            let quotient = s.min(s.max(quotient, s.splat(-1024.0)), s.splat(1024.0));
            let code = s.add(s.to_float(s.to_int(quotient)), s.splat(self.zero_point as f32));
            let code = s.max(s.min(code, s.splat(127.0)), s.splat(-128.0));
            let mut bytes = [0; 16];
            s.store_low_bytes(s.to_int(code), &mut bytes);
            codes.copy_from_slice(&bytes[..codes.len()]);
        }
    }
}

/// Dynamic codes of each group of a row.
struct GroupCodes<'a> {
    y: &'a [f32],
    codes: &'a mut [i8],
    scales: &'a mut [f32],
}

impl Kernel for GroupCodes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let groups = self.y.chunks(GROUP_OUTPUTS).zip(self.codes.chunks_mut(GROUP_OUTPUTS));
        for ((y, codes), scale) in groups.zip(self.scales) {
            *scale = quantize(s, y, ActQuant::DynamicPerToken, codes).0;
        }
    }
}
