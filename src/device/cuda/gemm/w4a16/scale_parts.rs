//! How gemm_w4a16/sm80 may multiply the scales of a weight in.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::dtype::DType;

/// What must be done so that a weight times its scale is rounded once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ScaleParts {
    /// Every scale is a float of the activation type.
    One,
    /// Scales are such a float and the rest as another.
    Two,
    /// Products are beyond the type, or all below its normal numbers: scales go on f32 sums.
    SumsOnly,
}

impl ScaleParts {
    /// For weights up to `largest` times their scale.
    pub(crate) fn of(scales: &[f32], largest: f32, dtype: DType) -> Self {
        // Small weights beside larger ones may be rounded in steps of the least number: their share of a sum is as small.
        let (least, most) = match dtype {
            DType::F16 => (6.2e-5, 65504.0),
            _ => (1e-25, 6e7),
        };
        let widest = scales.par_iter().map(|scale| scale.abs()).reduce(|| 0.0, f32::max);
        let fits = widest == 0.0 || (widest >= least && widest * largest.max(1.0) <= most);
        let exact = |scale: &f32| match dtype {
            DType::F16 => f16::from_f32(*scale).to_f32() == *scale,
            _ => bf16::from_f32(*scale).to_f32() == *scale,
        };
        match (fits, scales.par_iter().all(exact)) {
            (false, _) => ScaleParts::SumsOnly,
            (true, true) => ScaleParts::One,
            (true, false) => ScaleParts::Two,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_as_many_as_the_type_needs() {
        let of = |scales: &[f32], dtype| ScaleParts::of(scales, 16.0, dtype);
        assert_eq!(of(&[0.5, 0.0, -1.25], DType::BF16), ScaleParts::One);
        let eleven_bits = 1.0 + 1.0 / 1024.0;
        assert_eq!(of(&[eleven_bits], DType::F16), ScaleParts::One);
        assert_eq!(of(&[eleven_bits], DType::BF16), ScaleParts::Two);
        assert_eq!(of(&[0.1], DType::F16), ScaleParts::Two);
    }

    #[test]
    fn what_the_type_cannot_hold_stays_unrounded() {
        let of = |scales: &[f32], dtype| ScaleParts::of(scales, 16.0, dtype);
        assert_eq!(of(&[4096.0], DType::F16), ScaleParts::SumsOnly, "16 * 4096 is beyond f16");
        assert_eq!(of(&[2048.0], DType::F16), ScaleParts::One);
        assert_eq!(of(&[1e-6, 3e-5], DType::F16), ScaleParts::SumsOnly);
        assert_eq!(of(&[1e-6, 0.01], DType::F16), ScaleParts::Two, "small scales beside an ordinary one");
        assert_eq!(of(&[1e-6], DType::BF16), ScaleParts::Two);
        assert_eq!(of(&[0.0], DType::F16), ScaleParts::One);
    }
}
