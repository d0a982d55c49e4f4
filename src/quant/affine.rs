//! Affine maps between reals and integer codes: `q = clamp(rne(x / s) + z, qmin, qmax)`, `x' = s * (q - z)`.
//!
//! Jacob et al. 2017 (equation 1), ONNX `QuantizeLinear`. The several conventions called "symmetric" are told apart by
//! [`Mapping`]; checkpoint formats differ in which they mean.

use crate::dtype::DType;

use super::rounding::Rounding;

/// The integers that codes may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodeRange {
    /// Smallest code.
    pub qmin: i32,
    /// Largest code.
    pub qmax: i32,
}

impl CodeRange {
    /// `[-2^(bits-1), 2^(bits-1) - 1]`, for 1 to 31 bits.
    pub const fn signed(bits: u8) -> CodeRange {
        CodeRange { qmin: -(1 << (bits - 1)), qmax: ((1i64 << (bits - 1)) - 1) as i32 }
    }

    /// `[0, 2^bits - 1]`, for 1 to 30 bits.
    pub const fn unsigned(bits: u8) -> CodeRange {
        CodeRange { qmin: 0, qmax: (1 << bits) - 1 }
    }

    /// The code of zero in a symmetric map: 0 of a signed range, `2^(bits-1)` of an unsigned one.
    pub const fn middle(self) -> i32 {
        ((self.qmin as i64 + self.qmax as i64 + 1) / 2) as i32
    }

    /// Number of codes less one.
    pub const fn steps(self) -> i32 {
        (self.qmax as i64 - self.qmin as i64) as i32
    }
}

/// How a range of reals is laid on a range of codes. `b` is the width in bits, `amax` the largest magnitude.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mapping {
    /// `s = amax / (2^(b-1) - 1)`, the lowest code never used (TensorRT, SmoothQuant, bitsandbytes).
    Narrow,
    /// `s = 2 amax / (2^b - 1)`: the largest value is clipped by half a step (PyTorch, compressed-tensors, GPTQ).
    Centered,
    /// `s = amax / (2^(b-1) - 1)` with the lowest code allowed, though min-max never reaches it (AutoAWQ).
    MaxClip,
    /// `s = -m / 2^(b-1)` where `m` is the element of largest magnitude: it gets the lowest code exactly, and the scale
    /// is negative where it is positive (llama.cpp's `make_qx_quants`, AutoRound).
    SignedFull,
    /// As [`Mapping::Centered`], then the nearest whole multiple of one scale a row, of which a row's weights are int8
    /// (QServe's progressive group quantization; [`super::factored`]).
    Progressive,
    /// `s = (hi - lo) / (2^b - 1)` over the range extended to hold 0, and `z = clamp(rne(qmin - lo / s))`.
    Asymmetric,
}

impl Mapping {
    /// True for those whose zero point is the middle code.
    pub fn is_symmetric(self) -> bool {
        self != Mapping::Asymmetric
    }

    /// The codes of `range` that this map uses.
    pub fn clamp_range(self, range: CodeRange) -> CodeRange {
        match self {
            Mapping::Narrow => CodeRange { qmin: range.qmin + 1, ..range },
            _ => range,
        }
    }

    /// The map of reals `lo..=hi` (extended to hold 0), its scale rounded to `scale_type` before the zero point is
    /// computed from it. A range of nothing but zero has scale 1; a scale that underflows becomes the type's smallest
    /// normal number.
    ///
    /// `None` when a bound is not finite or the scale overflows its type.
    pub fn affine(self, lo: f32, hi: f32, range: CodeRange, scale_type: DType) -> Option<Affine> {
        let (lo, hi) = (lo.min(0.0), hi.max(0.0));
        if !lo.is_finite() || !hi.is_finite() {
            return None;
        }
        let amax = hi.max(-lo);
        let steps = range.steps() as f32;
        let half = (range.qmax - range.middle()) as f32; // 2^(b-1) - 1
        let exact = match self {
            _ if amax == 0.0 => 1.0,
            Mapping::Narrow | Mapping::MaxClip => amax / half.max(1.0),
            Mapping::Centered | Mapping::Progressive => amax / (steps / 2.0),
            Mapping::SignedFull => (if -lo >= hi { amax } else { -amax }) / (half + 1.0),
            // Each bound by itself: their difference may overflow.
            Mapping::Asymmetric => hi / steps - lo / steps,
        };
        let mut scale = scale_type.round(exact);
        if scale.abs() < smallest_normal(scale_type) {
            scale = smallest_normal(scale_type).copysign(exact);
        }
        if !scale.is_finite() {
            return None;
        }
        let zero_point = match self {
            Mapping::Asymmetric => {
                let z = range.qmin as f32 - lo / scale;
                (z.round_ties_even() as i32).clamp(range.qmin, range.qmax)
            }
            _ => range.middle(),
        };
        Some(Affine { scale, zero_point, range: self.clamp_range(range) })
    }

    /// [`Mapping::affine`] of the smallest and largest of `values`.
    pub fn fit(self, values: &[f32], range: CodeRange, scale_type: DType) -> Option<Affine> {
        let (lo, hi) = bounds(values)?;
        self.affine(lo, hi, range, scale_type)
    }
}

/// Smallest and largest element, 0 included; `None` when one is not finite.
pub fn bounds(values: &[f32]) -> Option<(f32, f32)> {
    let (mut lo, mut hi, mut sum) = (0f32, 0f32, 0f32);
    for &x in values {
        lo = lo.min(x);
        hi = hi.max(x);
        sum += x * 0.0; // NaN as soon as one is NaN or infinite, which min and max would pass over
    }
    (sum == 0.0).then_some((lo, hi))
}

/// Smallest positive normal number of a floating type.
pub(super) fn smallest_normal(dtype: DType) -> f32 {
    if dtype == DType::F16 { 6.103_515_6e-5 } else { f32::MIN_POSITIVE }
}

/// An affine map with the codes it may use.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Affine {
    /// Real value of one step; finite, not zero, negative only for [`Mapping::SignedFull`].
    pub scale: f32,
    /// Code of real zero.
    pub zero_point: i32,
    /// Codes, both ends included.
    pub range: CodeRange,
}

impl Affine {
    /// `clamp(rne(x / s) + z)`. NaN gets the code of zero.
    pub fn quantize(&self, x: f32) -> i32 {
        ((x / self.scale).round_ties_even() as i32)
            .saturating_add(self.zero_point)
            .clamp(self.range.qmin, self.range.qmax)
    }

    /// [`Affine::quantize`] in another rounding mode; `index` is the element's position.
    pub fn quantize_by(&self, x: f32, rounding: Rounding, index: u64) -> i32 {
        (rounding.round(x / self.scale, index) as i32)
            .saturating_add(self.zero_point)
            .clamp(self.range.qmin, self.range.qmax)
    }

    /// `s * (q - z)`.
    pub fn dequantize(&self, q: i32) -> f32 {
        self.scale * (q - self.zero_point) as f32
    }

    /// Smallest and largest real that is not clipped.
    pub fn limits(&self) -> (f32, f32) {
        let (a, b) = (self.dequantize(self.range.qmin), self.dequantize(self.range.qmax));
        (a.min(b), a.max(b))
    }
}

/// The map with a real offset: `q = clamp(rne((x - min) / s), 0, 2^b - 1)`, `x' = s * q + min` (GGUF's Q4_1 family). Zero
/// need not be representable.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MinOffset {
    /// Real value of one step, positive.
    pub scale: f32,
    /// Real value of code 0.
    pub min: f32,
    /// Largest code.
    pub qmax: i32,
}

impl MinOffset {
    /// The map of `lo..=hi` on `bits` bits; scale 1 where they are equal. `None` when one is not finite.
    pub fn new(lo: f32, hi: f32, bits: u8) -> Option<MinOffset> {
        let qmax = CodeRange::unsigned(bits).qmax;
        let scale = hi / qmax as f32 - lo / qmax as f32;
        let scale = if scale > 0.0 { scale } else { 1.0 };
        (lo.is_finite() && hi.is_finite()).then_some(MinOffset { scale, min: lo, qmax })
    }

    /// The nearest code.
    pub fn quantize(&self, x: f32) -> i32 {
        (((x - self.min) / self.scale).round_ties_even() as i32).clamp(0, self.qmax)
    }

    /// `s * q + min`.
    pub fn dequantize(&self, q: i32) -> f32 {
        self.scale * q as f32 + self.min
    }
}

/// The bias of an integer layer: `rne(b / (s_x * s_w))`, zero point 0, saturated to `bits` (32, or 16 where an encoding
/// stores it so). Jacob et al. 2017, section 2.4: it joins the accumulator as it is.
pub fn quantize_bias(bias: f32, input_scale: f32, weight_scale: f32, bits: u8) -> i32 {
    let limit = 2f64.powi(i32::from(bits) - 1);
    let q = (f64::from(bias) / (f64::from(input_scale) * f64::from(weight_scale))).round_ties_even();
    q.clamp(-limit, limit - 1.0) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    const F32: DType = DType::F32;

    fn fit(mapping: Mapping, values: &[f32], bits: u8) -> Affine {
        mapping.fit(values, CodeRange::signed(bits), F32).expect("finite")
    }

    #[test]
    fn ranges() {
        assert_eq!(CodeRange::signed(8), CodeRange { qmin: -128, qmax: 127 });
        assert_eq!(CodeRange::unsigned(4), CodeRange { qmin: 0, qmax: 15 });
        assert_eq!([CodeRange::signed(8).middle(), CodeRange::unsigned(4).middle()], [0, 8]);
        assert_eq!(CodeRange::signed(1), CodeRange { qmin: -1, qmax: 0 });
    }

    /// amax 10.8: the well-known example 10.8 / 127 = 0.08504, and its siblings.
    #[test]
    fn symmetric_conventions() {
        let x = [-7.59, 0.0, 4.57, 10.8];
        assert_eq!(fit(Mapping::Narrow, &x, 8).scale, 10.8 / 127.0);
        assert_eq!(fit(Mapping::MaxClip, &x, 8).scale, 10.8 / 127.0);
        assert_eq!(fit(Mapping::Centered, &x, 8).scale, 10.8 / 127.5);
        assert_eq!(fit(Mapping::SignedFull, &x, 8).scale, -10.8 / 128.0);
        let codes = |m: Mapping| x.map(|x| fit(m, &[-7.59, 0.0, 4.57, 10.8], 4).quantize(x));
        assert_eq!(codes(Mapping::Narrow), [-5, 0, 3, 7]);
        assert_eq!(codes(Mapping::Centered), [-5, 0, 3, 7]);
        assert_eq!(codes(Mapping::SignedFull), [6, 0, -3, -8]);
        assert_eq!(fit(Mapping::SignedFull, &x, 4).dequantize(-8), 10.8);
        assert_eq!(fit(Mapping::Narrow, &[-1.0], 4).range.qmin, -7);
    }

    /// Zero is always inside, so the zero point is always a code: [5, 10] would otherwise give -383.
    #[test]
    fn asymmetric() {
        let a = Mapping::Asymmetric.affine(5.0, 10.0, CodeRange::signed(8), F32).expect("finite");
        assert_eq!((a.scale, a.zero_point), (10.0 / 255.0, -128));
        let a = Mapping::Asymmetric.affine(-1.0, 3.0, CodeRange::unsigned(4), F32).expect("finite");
        assert_eq!((a.zero_point, a.quantize(-1.0), a.quantize(3.0), a.quantize(99.0)), (4, 0, 15, 15));
        for lo in -20..=0 {
            for hi in 0..=20 {
                let a = Mapping::Asymmetric.affine(lo as f32 * 0.37, hi as f32 * 0.41, CodeRange::unsigned(3), F32);
                let a = a.expect("finite");
                assert_eq!(a.dequantize(a.quantize(0.0)), 0.0, "{lo} {hi}");
            }
        }
    }

    #[test]
    fn degenerate_ranges() {
        for mapping in [Mapping::Narrow, Mapping::Centered, Mapping::MaxClip, Mapping::SignedFull, Mapping::Asymmetric]
        {
            let zero = fit(mapping, &[0.0; 4], 4);
            assert_eq!((zero.scale, zero.dequantize(zero.quantize(0.0))), (1.0, 0.0), "{mapping:?}");
            assert_eq!(mapping.fit(&[1.0, f32::NAN], CodeRange::signed(4), F32), None);
            assert_eq!(mapping.fit(&[1.0, f32::INFINITY], CodeRange::signed(4), F32), None);
            let tiny = mapping.fit(&[1e-12], CodeRange::signed(4), DType::F16).expect("clamped to a normal scale");
            assert_eq!(tiny.scale.abs(), 6.103_515_6e-5);
            assert_eq!(mapping.fit(&[f32::MAX], CodeRange::signed(4), DType::F16), None, "{mapping:?}");
            let wide = mapping.fit(&[-f32::MAX, f32::MAX], CodeRange::signed(4), F32).expect("fits f32");
            assert!(wide.scale.is_finite() && wide.quantize(f32::MAX).abs() >= 7);
        }
    }

    /// GPTQ's own quantizer, given a group without a negative weight, halves its range and clips 1.0 to 0.467; here the
    /// range of a symmetric map is always +-amax.
    #[test]
    fn one_sided_group() {
        let a = Mapping::Centered.fit(&[0.25, 1.0], CodeRange::unsigned(4), F32).expect("finite");
        assert_eq!((a.zero_point, a.quantize(1.0)), (8, 15));
        assert!((a.dequantize(15) - 1.0).abs() <= 0.5 * a.scale + 1e-6);
    }

    #[test]
    fn error_is_at_most_half_a_step_inside() {
        let x: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        for mapping in [Mapping::Narrow, Mapping::Centered, Mapping::MaxClip, Mapping::SignedFull, Mapping::Asymmetric]
        {
            for bits in [2, 3, 4, 8] {
                let a = fit(mapping, &x, bits);
                let (lo, hi) = a.limits();
                let half = 0.5 * a.scale.abs() * 1.00001;
                for &x in x.iter().filter(|x| (lo..=hi).contains(*x)) {
                    assert!((a.dequantize(a.quantize(x)) - x).abs() <= half, "{mapping:?} {bits} {x}");
                }
            }
        }
    }

    #[test]
    fn offsets_and_bias() {
        let m = MinOffset::new(5.0, 10.0, 4).expect("finite");
        assert_eq!((m.quantize(5.0), m.quantize(10.0), m.dequantize(15)), (0, 15, 10.0));
        assert_eq!(MinOffset::new(2.0, 2.0, 4).expect("finite").scale, 1.0);
        assert_eq!(MinOffset::new(f32::NAN, 2.0, 4), None);
        assert_eq!(quantize_bias(1.0, 0.5, 0.25, 32), 8);
        assert_eq!([quantize_bias(1e9, 0.5, 0.25, 32), quantize_bias(-1e9, 0.5, 0.25, 16)], [i32::MAX, -32768]);
    }

    #[test]
    fn rounding_modes() {
        let a = Affine { scale: 1.0, zero_point: 3, range: CodeRange::signed(8) };
        let q = |mode| a.quantize_by(4.5, mode, 0);
        assert_eq!([q(Rounding::HalfEven), q(Rounding::HalfAway), q(Rounding::Floor)], [7, 8, 7]);
        assert_eq!(a.quantize(-8.5), -5, "rounded before the zero point is added");
    }
}
