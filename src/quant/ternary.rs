//! Weights of two and three values.

use rayon::prelude::*;

use super::affine::{bounds, smallest_normal};
use super::grid::Grid;
use super::observer::absmean;
use super::{Encoding, QuantWeight};

/// Which weights become 0, and what the others stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threshold {
    /// [`Ternary::twn`].
    Twn,
    /// [`Ternary::b158`].
    AbsMean,
}

/// A weight `[n, k]` of codes -1, 0 and 1 with a scale for each of the grid's groups: codes 1, 2 and 3 of 2 bits around the
/// zero point 2, so that any format of 2 bits holds it. Of the grid only groups and the scales' type are used.
///
/// `None` when a weight is not finite or a scale does not fit its type.
pub fn ternary(w: &[f32], k: usize, grid: &Grid, threshold: Threshold) -> Option<QuantWeight> {
    let group_size = grid.columns(k);
    let (n, groups) = (w.len() / k, k.div_ceil(group_size));
    let (mut codes, mut scales) = (vec![0u8; n * k], vec![0f32; n * groups]);
    let rows = w.par_chunks(k).zip(codes.par_chunks_mut(k)).zip(scales.par_chunks_mut(groups));
    rows.map(|((w, codes), scales)| {
        for ((w, codes), scale) in w.chunks(group_size).zip(codes.chunks_mut(group_size)).zip(scales) {
            bounds(w)?;
            let group = match threshold {
                Threshold::Twn => Ternary::twn(w),
                Threshold::AbsMean => Ternary::b158(w),
            };
            let rounded = grid.scale_type.round(group.scale).max(smallest_normal(grid.scale_type));
            *scale = if group.scale == 0.0 { 1.0 } else { rounded };
            codes.iter_mut().zip(group.codes).for_each(|(code, q)| *code = (q + 2) as u8);
        }
        Some(())
    })
    .collect::<Option<()>>()?;
    let zeros = vec![2.0; scales.len()];
    scales.iter().all(|s| s.is_finite()).then_some(())?;
    Some(QuantWeight {
        n,
        k,
        bits: 2,
        group_size,
        codes: codes.into(),
        scales,
        zeros,
        order: None,
        encoding: Encoding::Affine,
    })
}

/// Codes of -1, 0 and 1 with one scale: `w' = scale * code`.
#[derive(Debug, Clone, PartialEq)]
pub struct Ternary {
    /// One code an element.
    pub codes: Vec<i8>,
    /// Magnitude of the codes that are not 0.
    pub scale: f32,
}

impl Ternary {
    /// Ternary weight networks (Li and Liu 2016): 0 below `0.7 mean|w|`, and the scale is the mean magnitude of the
    /// others, which is the least-squares scale for that threshold.
    pub fn twn(weights: &[f32]) -> Ternary {
        let threshold = 0.7 * absmean(weights);
        let codes = weights.iter().map(|&w| if w.abs() > threshold { sign(w) } else { 0 });
        let kept: Vec<f32> = weights.iter().copied().filter(|w| w.abs() > threshold).collect();
        Ternary { codes: codes.collect(), scale: absmean(&kept) }
    }

    /// BitNet b1.58 (Ma et al. 2024): `clamp(rne(w / mean|w|), -1, 1)`, scale `mean|w|` (at least 1e-5).
    pub fn b158(weights: &[f32]) -> Ternary {
        let scale = absmean(weights).max(1e-5);
        let codes = weights.iter().map(|w| (w / scale).round_ties_even().clamp(-1.0, 1.0) as i8);
        Ternary { codes: codes.collect(), scale }
    }

    /// XNOR-Net (Rastegari et al. 2016): the sign (of zero: +1), and the mean magnitude, the least-squares scale.
    pub fn binary(weights: &[f32]) -> Ternary {
        Ternary { codes: weights.iter().map(|&w| sign(w)).collect(), scale: absmean(weights) }
    }

    /// The weights that the codes stand for.
    pub fn dequantize(&self) -> Vec<f32> {
        self.codes.iter().map(|&q| f32::from(q) * self.scale).collect()
    }
}

fn sign(w: f32) -> i8 {
    if w < 0.0 { -1 } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes() {
        let w = [0.9, -0.1, 0.35, -1.2, 0.0, 0.5]; // mean magnitude 0.508333
        let t = Ternary::twn(&w); // threshold 0.355833
        assert_eq!(t.codes, [1, 0, 0, -1, 0, 1]);
        assert!((t.scale - 2.6 / 3.0).abs() < 1e-6);
        let b = Ternary::b158(&w);
        assert_eq!(b.codes, [1, 0, 1, -1, 0, 1]);
        assert!((b.scale - 3.05 / 6.0).abs() < 1e-6);
        let x = Ternary::binary(&w);
        assert_eq!(x.codes, [1, -1, 1, -1, 1, 1]);
        assert_eq!(x.dequantize()[1], -x.scale);
        for empty in [Ternary::twn(&[]), Ternary::binary(&[]), Ternary::twn(&[0.0; 3])] {
            assert_eq!(empty.scale, 0.0);
        }
        assert_eq!(Ternary::b158(&[0.0; 2]).codes, [0, 0]);
    }

    /// Groups of a row by themselves, a short one at its end, an empty one, all in 2 bits around 2.
    #[test]
    fn groups() {
        let w = [0.9, -0.1, 0.35, -1.2, 0.0, 0.0, 4.0, /* row */ -1.0, 1.0, 1.0, 1.0, 8.0, 0.0, -3.0];
        let grid = Grid {
            bits: 2,
            group_size: Some(4),
            mapping: crate::quant::affine::Mapping::Centered,
            search: crate::quant::grid::Search::MinMax,
            scale_type: crate::dtype::DType::F16,
            smallest_zero: 0,
        };
        let q = ternary(&w, 7, &grid, Threshold::Twn).expect("finite");
        assert_eq!((q.n, q.groups(), q.is_symmetric()), (2, 2, true));
        assert_eq!(*q.codes, [3, 2, 2, 1, 2, 2, 3, 1, 3, 3, 3, 3, 2, 1]);
        // 1.05 in f16; the mean of 8 and 3.
        assert_eq!(q.scales, [1.049_804_7, 4.0, 1.0, 5.5]);
        assert_eq!(q.dequantize()[3], -1.049_804_7);
        let zero = ternary(&[0.0; 3], 3, &grid, Threshold::Twn).expect("finite");
        assert_eq!((zero.scales[0], zero.dequantize()), (1.0, vec![0.0; 3]));
        let mean = ternary(&w, 7, &Grid { group_size: None, ..grid }, Threshold::AbsMean).expect("finite");
        assert_eq!(mean.scales, [0.935_546_9, 2.142_578_1]); // 6.55 / 7 and 15 / 7 in f16
        assert_eq!(mean.codes[7..], [2, 2, 2, 2, 3, 2, 1]);
        assert_eq!(ternary(&[f32::NAN; 4], 4, &grid, Threshold::Twn), None);
        assert_eq!(ternary(&[1e9; 4], 4, &grid, Threshold::Twn), None, "beyond f16");
    }

    /// For its codes, no other scale is better.
    #[test]
    fn scales_are_least_squares() {
        let w: Vec<f32> = (0..301).map(|i| ((i * 7919 % 1000) as f32 / 500.0 - 1.0).powi(3)).collect();
        for mut t in [Ternary::twn(&w), Ternary::binary(&w)] {
            let error = |t: &Ternary| t.dequantize().iter().zip(&w).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
            let best = error(&t);
            for factor in [0.98, 1.02] {
                t.scale *= factor;
                assert!(error(&t) > best);
                t.scale /= factor;
            }
        }
    }
}
