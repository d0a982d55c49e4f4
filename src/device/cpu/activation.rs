//! Activation functions of vectors, operation by operation those of `reference`, so that their bits are equal.

use super::reference::{ERFC, EXP, GELU_TANH, LN_2, TO_WHOLE};
use super::simd::Simd;

/// `reference::exp`.
#[inline(always)]
fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.min(s.max(x, s.splat(-87.0)), s.splat(87.0));
    let whole = s.splat(TO_WHOLE);
    let n = s.sub(s.fma(x, s.splat(std::f32::consts::LOG2_E), whole), whole);
    let r = s.fma(n, s.splat(LN_2[1]), s.fma(n, s.splat(LN_2[0]), x));
    s.mul(polynomial(s, &EXP, r), s.power_of_two(s.to_int(n)))
}

#[inline(always)]
fn polynomial<S: Simd>(s: S, coefficients: &[f32], x: S::F) -> S::F {
    let mut sum = s.splat(coefficients[0]);
    for &c in &coefficients[1..] {
        sum = s.fma(sum, x, s.splat(c));
    }
    sum
}

/// `y / (1 + exp(-t))`, `silu(y)` where `t` is `y`.
#[inline(always)]
pub(super) fn sigmoid_times<S: Simd>(s: S, y: S::F, t: S::F) -> S::F {
    let one = s.splat(1.0);
    s.mul(y, s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), t)))))
}

/// `reference::activate` of GELU by its tanh approximation.
#[inline(always)]
pub(super) fn gelu_tanh<S: Simd>(s: S, y: S::F) -> S::F {
    let t = s.mul(s.fma(s.mul(y, y), s.splat(GELU_TANH[0]), s.splat(GELU_TANH[1])), y);
    sigmoid_times(s, y, t)
}

/// `reference::activate` of GELU by erf.
#[inline(always)]
pub(super) fn gelu_erf<S: Simd>(s: S, y: S::F) -> S::F {
    let zero = s.splat(0.0);
    let size = s.max(y, s.sub(zero, y));
    let z = s.mul(size, s.splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = s.div(s.splat(1.0), s.fma(z, s.splat(0.5), s.splat(1.0)));
    let exponent = s.fma(s.sub(zero, z), z, polynomial(s, &ERFC, t));
    let half = s.mul(s.mul(s.splat(0.5), t), exp(s, exponent));
    s.fma(s.sub(zero, size), half, s.max(zero, y))
}
