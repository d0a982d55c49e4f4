//! AWQ (Lin et al. 2023): input channels that matter are scaled up before rounding, and ranges are clipped, both chosen
//! by the error of the layer's outputs on samples of its inputs.

use rayon::prelude::*;

use super::gemm::{LANES, add_product, columns};
use super::grid::{Grid, round_to_nearest};

/// Exponents tried: 0 (no scaling) to 1 in steps of 1/20. The original's grid leaves out 1.
const RATIOS: usize = 20;
/// Clipped ranges tried: 1, 0.95 .. 0.55 of the largest magnitude.
const CLIPS: usize = 10;

/// What a scale search found.
#[derive(Debug, Clone, PartialEq)]
pub struct Scaling {
    /// `[k]` factors: inputs are divided by them, weights multiplied. All 1 when nothing was better.
    pub scales: Vec<f32>,
    /// Exponent of the mean input magnitudes that won.
    pub ratio: f32,
    /// Squared error of all outputs on the samples, per token, with these scales.
    pub error: f64,
    /// The same without scaling.
    pub unscaled_error: f64,
}

/// Searches scales `s = a^r`, normalized so that `max s * min s = 1`, for weights `[n, k]` that share an input, each with
/// the grid it will be rounded on: `a` are the mean magnitudes of its channels, `samples` `[tokens, k]` some of its rows. The error of the rounded weights is taken at
/// the linear layers themselves (as ModelOpt's awq_lite does), not behind the attention or MLP they belong to.
///
/// `None` when a weight is not finite or a scale does not fit its type.
pub fn search_scales(weights: &[(&[f32], Grid)], mean_abs: &[f32], samples: &[f32]) -> Option<Scaling> {
    let k = mean_abs.len();
    let mut best: Option<Scaling> = None;
    for i in 0..=RATIOS {
        let ratio = i as f32 / RATIOS as f32;
        let scales = normalized(mean_abs.iter().map(|a| a.powf(ratio).max(1e-4)).collect());
        let mut error = 0.0;
        for (w, grid) in weights {
            let scaled: Vec<f32> =
                w.chunks_exact(k).flat_map(|row| row.iter().zip(&scales).map(|(w, s)| w * s)).collect();
            let mut errors = round_to_nearest(&scaled, k, grid)?.dequantize();
            errors.par_chunks_mut(k).zip(w.par_chunks(k)).for_each(|(q, w)| {
                q.iter_mut().zip(&scales).zip(w).for_each(|((q, s), w)| *q = *q / s - w);
            });
            error += output_energy(&errors, k, samples);
        }
        match &mut best {
            None => best = Some(Scaling { scales, ratio, error, unscaled_error: error }),
            Some(b) if error < b.error => *b = Scaling { scales, ratio, error, ..*b },
            Some(_) => {}
        }
    }
    best
}

/// Mean over the samples `[tokens, k]` of the squared length of their products with `weight` `[n, k]`.
pub fn output_energy(weight: &[f32], k: usize, samples: &[f32]) -> f64 {
    let tokens = samples.len() / k;
    if tokens == 0 {
        return 0.0;
    }
    let sums: Vec<f64> = weight
        .par_chunks(LANES * k)
        .map(|rows| {
            let n = rows.len() / k;
            let panel: Vec<[f32; LANES]> =
                (0..k).map(|i| std::array::from_fn(|l| if l < n { rows[l * k + i] } else { 0.0 })).collect();
            let mut c = vec![[0f32; LANES]; tokens];
            add_product(samples, k, &panel, &mut c);
            c.iter().flatten().map(|y| f64::from(*y) * f64::from(*y)).sum()
        })
        .collect();
    sums.iter().sum::<f64>() / tokens as f64
}

fn normalized(mut scales: Vec<f32>) -> Vec<f32> {
    let most = scales.iter().copied().fold(0.0, f32::max);
    let least = scales.iter().copied().fold(f32::INFINITY, f32::min);
    let norm = (most * least).sqrt();
    if norm.is_finite() && norm > 0.0 {
        scales.iter_mut().for_each(|s| *s /= norm);
    }
    scales
}

/// Clips each group of a weight `[n, k]` symmetrically to the fraction of its largest magnitude, 1 down to 0.55, that
/// gives the least squared error of the group's part of the outputs. Returns the fraction of groups clipped.
///
/// The error is `e G e^T` with the second moments `G` of the group's inputs in the samples.
///
/// `None` when a weight is not finite or a scale does not fit its type.
pub fn clip(weight: &mut [f32], k: usize, samples: &[f32], grid: &Grid) -> Option<f64> {
    let group = grid.columns(k);
    let moments: Vec<Vec<f32>> = (0..k)
        .step_by(group)
        .map(|start| {
            let width = group.min(k - start);
            let mut gram = super::hessian::Gram::new(width);
            let part: Vec<f32> = samples.chunks_exact(k).flat_map(|row| &row[start..start + width]).copied().collect();
            gram.add(&part);
            gram.finish().values
        })
        .collect();
    let rows = weight.par_chunks_mut(16 * k);
    let of_rows = |rows: &mut [f32]| -> Option<usize> {
        let count = rows.len() / k;
        let mut clipped = 0;
        for (g, moments) in moments.iter().enumerate() {
            let start = g * group;
            let width = group.min(k - start);
            let panels: Vec<_> = (0..width).step_by(LANES).map(|c| (c, columns(moments, width, c))).collect();
            let mut best = vec![(f64::INFINITY, 0usize); count];
            for i in 0..CLIPS {
                let fraction = 1.0 - i as f32 / 20.0;
                let mut errors = vec![0f32; count * width];
                for (row, errors) in rows.chunks_exact(k).zip(errors.chunks_exact_mut(width)) {
                    let w = &row[start..start + width];
                    let limit = super::observer::absmax(w) * fraction;
                    let cut: Vec<f32> = w.iter().map(|w| w.clamp(-limit, limit)).collect();
                    let params = grid.of_row(row).params(&cut)?;
                    for ((e, &cut), w) in errors.iter_mut().zip(&cut).zip(w) {
                        *e = params.dequantize(params.quantize(cut)) - w;
                    }
                }
                let mut energy = vec![0f64; count];
                let mut c = vec![[0f32; LANES]; count];
                for (first, panel) in &panels {
                    c.fill([0.0; LANES]);
                    add_product(&errors, width, panel, &mut c);
                    for ((energy, errors), c) in energy.iter_mut().zip(errors.chunks_exact(width)).zip(&c) {
                        *energy += errors[*first..].iter().zip(c).map(|(e, c)| f64::from(e * c)).sum::<f64>();
                    }
                }
                for (best, energy) in best.iter_mut().zip(energy) {
                    if energy < best.0 {
                        *best = (energy, i);
                    }
                }
            }
            for (row, (_, i)) in rows.chunks_exact_mut(k).zip(best) {
                if i > 0 {
                    clipped += 1;
                    let w = &mut row[start..start + width];
                    let limit = super::observer::absmax(w) * (1.0 - i as f32 / 20.0);
                    w.iter_mut().for_each(|w| *w = w.clamp(-limit, limit));
                }
            }
        }
        Some(clipped)
    };
    let clipped: Option<Vec<usize>> = rows.map(of_rows).collect();
    let groups = weight.len() / k * moments.len();
    Some(clipped?.iter().sum::<usize>() as f64 / groups.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::super::affine::Mapping;
    use super::super::grid::Search;
    use super::super::rounding::uniform;
    use super::*;
    use crate::dtype::DType;

    fn random(len: usize, seed: u64) -> Vec<f32> {
        (0..len).map(|i| (0..6).map(|j| uniform(seed, (i * 6 + j) as u64) - 0.5).sum::<f32>()).collect()
    }

    fn grid(bits: u8, group: usize) -> Grid {
        Grid {
            bits,
            group_size: Some(group),
            mapping: Mapping::Asymmetric,
            search: Search::MinMax,
            scale_type: DType::F16,
            smallest_zero: 0,
        }
    }

    /// Inputs with six channels 30 times the others.
    fn samples(tokens: usize, k: usize) -> Vec<f32> {
        let mut x = random(tokens * k, 21);
        x.iter_mut().enumerate().for_each(|(i, x)| *x *= if i % k % 11 == 3 { 30.0 } else { 1.0 });
        x
    }

    fn mean_abs(x: &[f32], k: usize) -> Vec<f32> {
        (0..k).map(|c| x.iter().skip(c).step_by(k).map(|x| x.abs()).sum::<f32>() / (x.len() / k) as f32).collect()
    }

    #[test]
    fn energy_equals_the_plain_sum() {
        let (n, k, tokens) = (19, 37, 13);
        let (w, x) = (random(n * k, 1), random(tokens * k, 2));
        let mut want = 0.0;
        for x in x.chunks(k) {
            for w in w.chunks(k) {
                want += x.iter().zip(w).map(|(a, b)| f64::from(a * b)).sum::<f64>().powi(2);
            }
        }
        assert!((output_energy(&w, k, &x) * tokens as f64 / want - 1.0).abs() < 1e-4);
        assert_eq!(output_energy(&w, k, &[]), 0.0);
    }

    /// Outlier channels make scaling pay; without them it may be no worse than nothing.
    #[test]
    fn scaling_pays_with_outliers() {
        let (n, k) = (48, 66);
        let (a, b) = (random(n * k, 3), random(n * k, 4));
        let x = samples(100, k);
        let found = search_scales(&[(&a, grid(3, 22)), (&b, grid(3, 22))], &mean_abs(&x, k), &x).expect("finite");
        assert!(found.ratio > 0.1 && found.error < 0.6 * found.unscaled_error, "{found:?}");
        let (most, least) =
            (found.scales.iter().fold(0f32, |m, s| m.max(*s)), found.scales.iter().fold(9f32, |m, s| m.min(*s)));
        assert!((most * least - 1.0).abs() < 1e-4);
        let flat = search_scales(&[(&a, grid(3, 22))], &vec![1.0; k], &random(100 * k, 5)).expect("finite");
        assert!(flat.error <= flat.unscaled_error && flat.scales.iter().all(|s| *s == 1.0));
        // A channel that is never used does no harm.
        let mut dead = x.clone();
        dead.iter_mut().skip(9).step_by(k).for_each(|x| *x = 0.0);
        let found = search_scales(&[(&a, grid(3, 22))], &mean_abs(&dead, k), &dead).expect("finite");
        assert!(found.scales.iter().all(|s| s.is_finite() && *s > 0.0));
        assert_eq!(search_scales(&[(&[f32::NAN; 66], grid(3, 22))], &vec![1.0; k], &x), None);
    }

    #[test]
    fn clipping_lowers_the_error() {
        let (n, k) = (20, 70);
        let x = random(200 * k, 6);
        let mut w = random(n * k, 7);
        w.iter_mut().step_by(35).for_each(|w| *w *= 2.5); // one large weight in each group
        for bits in [2, 4] {
            let grid = grid(bits, 32);
            let error = |rounded: &[f32]| {
                let q = round_to_nearest(rounded, k, &grid).expect("finite").dequantize();
                output_energy(&q.iter().zip(&w).map(|(q, w)| q - w).collect::<Vec<_>>(), k, &x)
            };
            let mut clipped = w.clone();
            let fraction = clip(&mut clipped, k, &x, &grid).expect("finite");
            assert!(
                fraction > 0.2 && error(&clipped) < error(&w),
                "{bits} {fraction} {} {}",
                error(&clipped),
                error(&w)
            );
        }
    }
}
