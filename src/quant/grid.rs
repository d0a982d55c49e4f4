//! The grid of a weight: how each group of columns gets its scale and zero point; and round-to-nearest on it.

use rayon::prelude::*;

use crate::dtype::DType;

use super::QuantWeight;
use super::affine::{Affine, CodeRange, Mapping, bounds};
use super::factored;
use super::observer::absmax;

/// How the range of a group is found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Search {
    /// Smallest to largest weight.
    MinMax,
    /// Of ranges shrunk by `1 - i / 100` for `i < 80`, the one with the least `sum |w' - w|^norm` (GPTQ's quantizer with
    /// `mse`, norm 2.4).
    Shrink {
        /// Exponent of the error.
        norm: f32,
    },
}

/// Steps of [`Search::Shrink`] and how many of them are tried.
const SHRINK_STEPS: usize = 100;
const SHRINK_TRIED: usize = 80;

/// What codes a weight may have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grid {
    /// Bits of a code, 2 to 8.
    pub bits: u8,
    /// Columns that share a scale; `None` is one scale a row.
    pub group_size: Option<usize>,
    /// How a range becomes a scale.
    pub mapping: Mapping,
    /// How the range is found.
    pub search: Search,
    /// Type that scales are stored in; they are rounded to it before codes are computed.
    pub scale_type: DType,
    /// Smallest zero point of an asymmetric group: 1 where a format stores the zero point less one.
    pub smallest_zero: u8,
}

/// Scale and zero point of one group; codes are unsigned.
pub type GroupParams = Affine;

impl Grid {
    /// Columns of a group of a row of `k`.
    pub fn columns(&self, k: usize) -> usize {
        self.group_size.map_or(k, |g| g.min(k))
    }

    /// The grid of a row of these weights, which parameters of its groups may depend on.
    pub fn of_row(&self, w: &[f32]) -> RowGrid<'_> {
        let unit = (self.mapping == Mapping::Progressive).then(|| factored::unit(absmax(w)));
        RowGrid { grid: self, unit }
    }
}

/// A [`Grid`] for the groups of one row.
#[derive(Debug, Clone, Copy)]
pub struct RowGrid<'a> {
    grid: &'a Grid,
    /// What scales are multiples of.
    unit: Option<f32>,
}

impl RowGrid<'_> {
    /// Parameters for one group's weights. `None` when one is not finite or the scale does not fit its type.
    pub fn params(&self, w: &[f32]) -> Option<GroupParams> {
        let (lo, hi) = bounds(w)?;
        let full = self.of_range(lo, hi)?;
        let Search::Shrink { norm } = self.grid.search else { return Some(full) };
        let mut best = (f32::INFINITY, full);
        for i in 0..SHRINK_TRIED {
            let p = 1.0 - i as f32 / SHRINK_STEPS as f32;
            let Some(params) = self.of_range(lo * p, hi * p) else { continue };
            let error = error(&params, w, norm, best.0);
            if error < best.0 {
                best = (error, params);
            }
        }
        Some(best.1)
    }

    fn of_range(&self, lo: f32, hi: f32) -> Option<GroupParams> {
        let Grid { bits, mapping, scale_type, smallest_zero, .. } = *self.grid;
        let range = CodeRange::unsigned(bits);
        let params = mapping.affine(lo, hi, range, scale_type)?;
        if let Some(unit) = self.unit {
            return Some(factored::snap(params, unit, range));
        }
        let smallest = i32::from(smallest_zero);
        if mapping.is_symmetric() || params.zero_point >= smallest {
            return Some(params);
        }
        // The codes below the zero point are given up: the range must fit above it.
        let above = hi * range.qmax as f32 / (range.qmax - smallest) as f32;
        let mut params = mapping.affine(0.0, above, range, scale_type)?;
        params.zero_point = smallest;
        Some(params)
    }
}

/// `sum |w' - w|^norm`, given up once it exceeds `enough`.
fn error(params: &GroupParams, w: &[f32], norm: f32, enough: f32) -> f32 {
    let mut sum = 0.0;
    for w in w.chunks(32) {
        sum += w
            .iter()
            .map(|&w| {
                let e = (params.dequantize(params.quantize(w)) - w).abs();
                if norm == 2.0 { e * e } else { e.powf(norm) }
            })
            .sum::<f32>();
        if sum >= enough {
            break;
        }
    }
    sum
}

/// Round to nearest: each weight of `[n, k]` to the nearest code of its group. `None` as for [`RowGrid::params`].
pub fn round_to_nearest(w: &[f32], k: usize, grid: &Grid) -> Option<QuantWeight> {
    let mut q = QuantWeight::empty(w.len() / k, k, grid.bits, grid.columns(k));
    let (group_size, groups) = (q.group_size, q.groups());
    let rows = w.par_chunks(k).zip(q.codes.par_chunks_mut(k));
    let parameters = q.scales.par_chunks_mut(groups).zip(q.zeros.par_chunks_mut(groups));
    rows.zip(parameters)
        .map(|((w, codes), (scales, zeros))| {
            let grid = grid.of_row(w);
            let groups = w.chunks(group_size).zip(codes.chunks_mut(group_size)).zip(scales.iter_mut().zip(zeros));
            for ((w, codes), (scale, zero)) in groups {
                let params = grid.params(w)?;
                (*scale, *zero) = (params.scale, params.zero_point as f32);
                codes.iter_mut().zip(w).for_each(|(code, &w)| *code = params.quantize(w) as u8);
            }
            Some(())
        })
        .collect::<Option<()>>()?;
    Some(q)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::rounding::uniform;

    pub(in crate::quant) fn grid(bits: u8, group_size: Option<usize>, mapping: Mapping) -> Grid {
        Grid { bits, group_size, mapping, search: Search::MinMax, scale_type: DType::F32, smallest_zero: 0 }
    }

    /// A bell: sums of uniform numbers.
    fn bell(len: usize) -> Vec<f32> {
        (0..len).map(|i| (0..8).map(|j| uniform(1, (i * 8 + j) as u64) - 0.5).sum::<f32>() * 1.2247).collect()
    }

    fn relative_mse(w: &[f32], q: &QuantWeight) -> f64 {
        let d = super::super::distortion::Distortion::between(w, &q.dequantize());
        d.mse / (w.iter().map(|w| f64::from(w * w)).sum::<f64>() / w.len() as f64)
    }

    /// Relative error on a normal distribution in groups of 128 at 4 bits: 0.0138 narrow, 0.0122 centered, 0.0106
    /// signed-full, 0.0100 asymmetric, 0.0103 centered with the search, by an independent program; an approximate bell
    /// has thinner tails, so the order is asserted and the values within a quarter.
    #[test]
    fn conventions_by_their_error() {
        let w = bell(128 * 400);
        let mse = |mapping, search| {
            let grid = Grid { search, ..grid(4, Some(128), mapping) };
            relative_mse(&w, &round_to_nearest(&w, 1280, &grid).expect("finite"))
        };
        let narrow = mse(Mapping::Narrow, Search::MinMax);
        let centered = mse(Mapping::Centered, Search::MinMax);
        let full = mse(Mapping::SignedFull, Search::MinMax);
        let asymmetric = mse(Mapping::Asymmetric, Search::MinMax);
        let searched = mse(Mapping::Centered, Search::Shrink { norm: 2.4 });
        assert!(narrow > centered && centered > full && full > asymmetric && centered > searched);
        for (got, normal) in [(narrow, 0.0138), (centered, 0.0122), (full, 0.0106), (asymmetric, 0.0100)] {
            assert!((got / normal - 1.0).abs() < 0.25, "{got} {normal}");
        }
    }

    #[test]
    fn shapes_that_hurt() {
        for (n, k, group) in [(1, 1, None), (3, 5, Some(4)), (2, 129, Some(128)), (5, 7, Some(100)), (0, 4, Some(2))] {
            let w = bell(n * k);
            for mapping in [Mapping::Centered, Mapping::SignedFull, Mapping::Asymmetric, Mapping::Narrow] {
                let q = round_to_nearest(&w, k, &grid(4, group, mapping)).expect("finite");
                assert_eq!((q.n, q.k, q.scales.len()), (n, k, n * q.groups()));
                assert!(q.codes.iter().all(|&c| c < 16));
                for (i, (a, b)) in w.iter().zip(q.dequantize()).enumerate() {
                    let step = q.scales[i / k * q.groups() + i % k / q.group_size].abs();
                    // Half a step of rounding, and half a step (signed-full: one) that the range may lack.
                    let most = if mapping == Mapping::SignedFull { 1.01 } else { 0.76 };
                    assert!((a - b).abs() <= most * step, "{mapping:?} {n} {k} {a} {b} {step}");
                }
            }
        }
        let bad = round_to_nearest(&[1.0, f32::NAN], 2, &grid(4, None, Mapping::Centered));
        assert_eq!(bad, None);
    }

    /// Where zero points are stored less one, a group of no negative weight keeps its largest one in range.
    #[test]
    fn zero_point_of_at_least_one() {
        let grid = Grid { smallest_zero: 1, ..grid(4, None, Mapping::Asymmetric) };
        let p = grid.of_row(&[]).params(&[0.0, 0.5, 3.0]).expect("finite");
        assert_eq!((p.zero_point, p.quantize(3.0), p.quantize(0.0)), (1, 15, 1));
        assert!((p.dequantize(15) - 3.0).abs() < 1e-6);
        assert_eq!(grid.of_row(&[]).params(&[-1.0, 3.0]).expect("finite").zero_point, 4);
    }
}
