//! What calibration keeps of a linear layer's inputs.

use rayon::prelude::*;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::affine::{Affine, CodeRange, Mapping};
use crate::quant::hessian::{Gram, Hessian};
use crate::quant::histogram::Histogram;
use crate::quant::observer::{MinMax, MovingAverage};

use super::Observer;

/// Rows kept for searches that need inputs themselves.
pub(super) const SAMPLES: usize = 1024;

/// Statistics of the inputs `[tokens, k]` that some linear layers share.
#[derive(Debug)]
pub(super) struct Inputs {
    pub(super) k: usize,
    tokens: usize,
    every: usize,
    gram: Option<Gram>,
    abs_sum: Vec<f64>,
    square_sum: Vec<f64>,
    /// Range of each channel.
    ranges: Vec<MinMax>,
    /// Some rows, evenly spaced.
    pub(super) samples: Vec<f32>,
    finite: bool,
}

impl Inputs {
    /// For `tokens` rows of `k`, with second moments or without.
    pub(super) fn new(k: usize, tokens: usize, moments: bool) -> Inputs {
        Inputs {
            k,
            tokens: 0,
            every: tokens.div_ceil(SAMPLES).max(1),
            gram: moments.then(|| Gram::new(k)),
            abs_sum: vec![0.0; k],
            square_sum: vec![0.0; k],
            ranges: vec![MinMax::default(); k],
            samples: Vec::new(),
            finite: true,
        }
    }

    pub(super) fn add(&mut self, x: &[f32]) {
        for row in x.chunks_exact(self.k) {
            if self.tokens.is_multiple_of(self.every) {
                self.samples.extend(row);
            }
            self.tokens += 1;
            let sums = self.abs_sum.iter_mut().zip(&mut self.square_sum).zip(&mut self.ranges);
            for (x, ((sum, squares), range)) in row.iter().zip(sums) {
                *sum += f64::from(x.abs());
                *squares += f64::from(*x) * f64::from(*x);
                range.lo = range.lo.min(*x);
                range.hi = range.hi.max(*x);
            }
        }
        self.finite &= self.abs_sum.iter().all(|sum| sum.is_finite());
        if let Some(gram) = &mut self.gram {
            gram.add(x);
        }
    }

    /// Fails when an input of the linear layer `name` was NaN or infinite.
    pub(super) fn check(&self, name: &str) -> Result<()> {
        if self.finite {
            return Ok(());
        }
        Err(Error::input("--calib", format!("the inputs of `{name}` became infinite on this text")))
    }

    /// `[k]` mean magnitudes.
    pub(super) fn mean_abs(&self) -> Vec<f32> {
        self.abs_sum.iter().map(|sum| (sum / self.tokens.max(1) as f64) as f32).collect()
    }

    /// `[k]` mean squares.
    pub(super) fn mean_squares(&self) -> Vec<f32> {
        self.square_sum.iter().map(|sum| (sum / self.tokens.max(1) as f64) as f32).collect()
    }

    /// `[k]` largest magnitudes.
    pub(super) fn amax(&self) -> Vec<f32> {
        self.ranges.iter().map(MinMax::amax).collect()
    }

    /// The int8 map for all channels together over the range that `observer` chooses. `None` when no scale fits `scale_type`.
    pub(super) fn static_range(&self, asymmetric: bool, observer: Observer, scale_type: DType) -> Option<Affine> {
        let merge = |a: MinMax, b: &MinMax| MinMax { lo: a.lo.min(b.lo), hi: a.hi.max(b.hi) };
        let range = self.ranges.iter().fold(MinMax::default(), merge);
        let mapping = if asymmetric { Mapping::Asymmetric } else { Mapping::Narrow };
        let affine = |lo: f32, hi: f32| mapping.affine(lo, hi, CodeRange::signed(8), scale_type);
        let within = |most: f32| affine(range.lo.max(-most), range.hi.min(most));
        let histogram = || {
            let mut histogram = Histogram::new(2048);
            histogram.observe(&self.samples).then_some(histogram)
        };
        match observer {
            Observer::MinMax => affine(range.lo, range.hi),
            Observer::Mse => self.least_squares(range, affine),
            Observer::Percentile(percent) => within(histogram()?.percentile(percent)),
            Observer::Entropy => within(histogram()?.entropy(128)),
            Observer::MovingAverage => {
                let mut average = MovingAverage::new(0.01);
                self.samples.chunks(8 * self.k).all(|rows| average.observe(rows)).then_some(())?;
                let (lo, hi) = average.range();
                affine(lo, hi)
            }
        }
    }

    /// Of `range` and of what is left when it shrinks by hundredths, down to a fifth, the one with the least squared error on
    /// the samples.
    fn least_squares(&self, range: MinMax, affine: impl Fn(f32, f32) -> Option<Affine>) -> Option<Affine> {
        let candidate = |i: usize| {
            let p = 1.0 - i as f32 / 100.0;
            let affine = affine(range.lo * p, range.hi * p)?;
            let error = |x: &f32| f64::from(affine.dequantize(affine.quantize(*x)) - x).powi(2);
            let rows: Vec<f64> =
                self.samples.par_chunks(self.k).map(|row| row.iter().map(error).sum::<f64>()).collect();
            Some((rows.iter().sum::<f64>(), affine))
        };
        let best = (0..80).filter_map(candidate).min_by(|a, b| a.0.total_cmp(&b.0));
        best.map(|(_, affine)| affine)
    }

    /// The second moments, which end here.
    pub(super) fn take_hessian(&mut self) -> Option<Hessian> {
        self.gram.take().map(|gram| gram.finish())
    }

    /// The statistics of inputs divided by `scales`, but for second moments, which divide by themselves.
    pub(super) fn divide(&mut self, scales: &[f32]) {
        let sums = self.abs_sum.iter_mut().zip(&mut self.square_sum).zip(&mut self.ranges);
        for (((sum, squares), range), s) in sums.zip(scales) {
            *sum /= f64::from(*s);
            *squares /= f64::from(*s).powi(2);
            *range = MinMax { lo: range.lo / s, hi: range.hi / s };
        }
        for row in self.samples.chunks_exact_mut(self.k) {
            row.iter_mut().zip(scales).for_each(|(x, s)| *x /= s);
        }
    }
}
