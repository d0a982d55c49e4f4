//! GPTQ (Frantar et al. 2022): columns are rounded in order, and each takes up the error of those before it.
//!
//! With `H = (I + U) D (I + U)^T` the error `tr(E H E^T)` of a weight is `sum_i D_i |E (I + U)|_i^2`, so column `i` is
//! rounded from `w_i + sum_{j<i} E_j U_ji`, `E_j = w_j - q_j` being errors of the original weights. This is the form that
//! QuIP (Chee et al. 2023, theorem 6) shows equal to GPTQ's, which updates all columns to come by the inverse of `H`;
//! it needs no inverse. What GPTQ calls the current value of the columns still to come, from which groups take their
//! parameters, is `W + G (I + U)^-1` over those columns, with `G` the feedback so far.

use std::cmp::Reverse;

use rayon::prelude::*;

use super::QuantWeight;
use super::affine::Affine;
use super::gemm::{LANES, Lanes, add_product};
use super::grid::{Grid, round_to_nearest};
use super::hessian::{Factor, Hessian, Panel, factor};

/// In which order columns are rounded, and what their groups are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ActOrder {
    /// As they are.
    None,
    /// By falling mean square of their inputs, scales fixed beforehand for groups of neighbours: the file needs no
    /// `g_idx` (`static_groups`, compressed-tensors' `actorder: static`).
    Static,
    /// By falling mean square within each group, and groups by their largest: the file needs no `g_idx` (GPTQModel's
    /// `act_group_aware`).
    GroupAware,
    /// By falling mean square, groups of columns that follow each other in that order: the file has a `g_idx`
    /// (`desc_act`).
    Dynamic,
}

/// Settings of [`gptq`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GptqOptions {
    /// Order of columns.
    pub act_order: ActOrder,
    /// Added to the diagonal of the Hessian, in units of its mean; 0.01 in the paper's code.
    pub damp: f64,
}

/// What [`gptq`] made.
#[derive(Debug, Clone, PartialEq)]
pub struct GptqResult {
    /// The weight.
    pub weight: QuantWeight,
    /// `tr(E H E^T)` with the damped Hessian: the mean over tokens of the squared error of all outputs, and a bit more.
    pub loss: f64,
    /// Damping that made the Hessian positive definite; `None` when nothing did, and the weight was rounded to nearest.
    pub damp: Option<f64>,
    /// Inputs that were always zero; their weights became zero.
    pub dead: usize,
}

/// Rows rounded together by one thread.
const ROWS: usize = 24;

/// Quantizes a weight `[n, k]` for inputs of second moments `h` `[k, k]`.
///
/// A Hessian that is not positive definite gets twice the damping until that exceeds its mean, then floors of up to a tenth of its
/// largest diagonal element; when nothing helps the weight is rounded to nearest, and the result says so.
///
/// `None` when a weight is not finite or a scale does not fit its type.
pub fn gptq(w: &[f32], h: &Hessian, grid: &Grid, options: &GptqOptions) -> Option<GptqResult> {
    let k = h.k;
    let mut w = w.to_vec();
    let mut h = h.clone();
    let dead: Vec<usize> = (0..k).filter(|&c| h.values[c * k + c] == 0.0).collect();
    for &c in &dead {
        h.values[c * k + c] = 1.0;
        w.iter_mut().skip(c).step_by(k).for_each(|w| *w = 0.0);
    }
    let plan = Plan::new(&h.diagonal(), grid.columns(k), options.act_order);
    let starts: Vec<usize> = plan.segments.iter().map(|s| s.start).collect();
    let diagonal = h.diagonal();
    let mean = diagonal.iter().map(|&d| f64::from(d)).sum::<f64>() / k as f64;
    let most = diagonal.iter().fold(0.0, |most: f64, &d| most.max(f64::from(d)));
    let doubled = std::iter::successors(Some(options.damp), |d| Some(d.max(1e-3) * 2.0)).take_while(|&d| d < 1.0);
    let floors = (0..6).map(|i| most * 1e-6 * 10f64.powi(i) / mean);
    let factored = doubled.chain(floors).find_map(|damp| Some((factor(&h, &plan.order, damp * mean, &starts)?, damp)));
    let Some((factor, damp)) = factored else {
        let weight = round_to_nearest(&w, k, grid)?;
        let errors: Vec<f32> = w.iter().zip(weight.dequantize()).map(|(a, b)| a - b).collect();
        return Some(GptqResult { loss: h.weigh(&errors), weight, damp: None, dead: dead.len() });
    };
    let (weight, loss) = round_columns(&w, k, grid, &plan, &factor)?;
    Some(GptqResult { weight, loss, damp: Some(damp), dead: dead.len() })
}

/// Consecutive columns, in the order of rounding, of one group.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Segment {
    start: usize,
    end: usize,
    group: usize,
}

/// The order of rounding.
#[derive(Debug, PartialEq)]
struct Plan {
    /// Column rounded at each place.
    order: Vec<usize>,
    /// Groups whose parameters are found when their first column is reached; one segment of all columns when they are
    /// known before.
    segments: Vec<Segment>,
    /// Parameters are found from the original weights, group by group of neighbours.
    known_before: bool,
    /// The result keeps this order of columns.
    keep_order: bool,
}

impl Plan {
    fn new(diagonal: &[f32], group: usize, act_order: ActOrder) -> Plan {
        let k = diagonal.len();
        let key = |&c: &usize| Reverse(Ordered(diagonal[c]));
        let mut order: Vec<usize> = (0..k).collect();
        let in_turn =
            || (0..k).step_by(group).map(|start| Segment { start, end: k.min(start + group), group: start / group });
        let mut segments: Vec<Segment> = in_turn().collect();
        match act_order {
            ActOrder::None => {}
            ActOrder::Static => {
                order.sort_by_key(key);
                segments = vec![Segment { start: 0, end: k, group: 0 }];
            }
            ActOrder::Dynamic => order.sort_by_key(key),
            ActOrder::GroupAware => {
                let mut groups: Vec<Vec<usize>> =
                    (0..k).step_by(group).map(|s| (s..k.min(s + group)).collect()).collect();
                groups.iter_mut().for_each(|columns| columns.sort_by_key(key));
                groups.sort_by_key(|columns| key(&columns[0]));
                segments.clear();
                for columns in &groups {
                    let start = segments.last().map_or(0, |s: &Segment| s.end);
                    segments.push(Segment { start, end: start + columns.len(), group: columns[0] / group });
                }
                order = groups.concat();
            }
        }
        // With one group for all columns their order says nothing.
        let keep_order = act_order == ActOrder::Dynamic && group < k && !order.is_sorted();
        Plan { order, segments, known_before: act_order == ActOrder::Static, keep_order }
    }
}

/// Total order of floats, for sorting.
#[derive(PartialEq)]
struct Ordered(f32);

impl Eq for Ordered {}

impl PartialOrd for Ordered {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ordered {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// Rounds all columns of all rows; the loss is `sum_i D_i |rounding error of column i|^2`.
fn round_columns(w: &[f32], k: usize, grid: &Grid, plan: &Plan, factor: &Factor) -> Option<(QuantWeight, f64)> {
    let mut weight = match plan.known_before {
        true => round_to_nearest(w, k, grid)?, // for its scales
        false => QuantWeight::empty(w.len() / k, k, grid.bits, grid.columns(k)),
    };
    let groups = weight.groups();
    let codes = weight.codes.par_chunks_mut(ROWS * k);
    let parameters = weight.scales.par_chunks_mut(ROWS * groups).zip(weight.zeros.par_chunks_mut(ROWS * groups));
    let losses: Option<Vec<f64>> = w
        .par_chunks(ROWS * k)
        .zip(codes)
        .zip(parameters)
        .map(|((w, codes), (scales, zeros))| Rows { w, k, groups, grid, plan, factor, codes, scales, zeros }.round())
        .collect();
    if plan.keep_order {
        weight.order = Some(plan.order.iter().map(|&c| c as u32).collect());
    }
    Some((weight, losses?.iter().sum()))
}

/// Some rows of a weight on their way.
struct Rows<'a> {
    w: &'a [f32],
    k: usize,
    groups: usize,
    grid: &'a Grid,
    plan: &'a Plan,
    factor: &'a Factor,
    codes: &'a mut [u8],
    scales: &'a mut [f32],
    zeros: &'a mut [f32],
}

impl Rows<'_> {
    fn round(mut self) -> Option<f64> {
        let (k, rows) = (self.k, self.w.len() / self.k);
        let order = &self.plan.order;
        let w: Vec<f32> = self.w.chunks_exact(k).flat_map(|row| order.iter().map(|&c| row[c])).collect();
        let mut errors = vec![0f32; rows * k];
        let mut loss = 0.0;
        let mut panels = self.factor.panels.iter();
        for segment in &self.plan.segments {
            let width = segment.end - segment.start;
            let count = panels.as_slice().iter().take_while(|p| p.start < segment.end).count();
            let (own, rest) = panels.as_slice().split_at(count);
            panels = rest.iter();
            // Feedback of everything before this segment.
            let mut feedback: Vec<Vec<Lanes<f32>>> = own
                .iter()
                .map(|panel| {
                    let mut c = vec![[0f32; LANES]; rows];
                    add_product(&errors, k, &panel.rows[..segment.start], &mut c);
                    c
                })
                .collect();
            if !self.plan.known_before {
                let current = current_values(&w, k, segment, own, &feedback);
                for (r, current) in current.chunks_exact(width).enumerate() {
                    let params = self.grid.of_row(&self.w[r * k..][..k]).params(current)?;
                    self.scales[r * self.groups + segment.group] = params.scale;
                    self.zeros[r * self.groups + segment.group] = params.zero_point as f32;
                }
            }
            for (panel, c) in own.iter().zip(&mut feedback) {
                add_product(&errors[segment.start..], k, &panel.rows[segment.start..panel.start], c);
                for (r, c) in c.iter_mut().enumerate() {
                    loss += self.round_panel(r, segment, panel, &w[r * k..][..k], c, &mut errors[r * k..][..k]);
                }
            }
        }
        Some(loss)
    }

    /// Rounds a panel's columns of row `r`, given the feedback of all columns before them.
    fn round_panel(
        &mut self,
        r: usize,
        segment: &Segment,
        panel: &Panel,
        w: &[f32],
        feedback: &mut Lanes<f32>,
        errors: &mut [f32],
    ) -> f64 {
        let range = self.grid.mapping.clamp_range(super::affine::CodeRange::unsigned(self.grid.bits));
        let mut loss = 0.0;
        for i in 0..panel.width {
            let at = panel.start + i;
            let column = self.plan.order[at];
            let group = if self.plan.known_before { column / self.grid.columns(self.k) } else { segment.group };
            let g = r * self.groups + group;
            let params = Affine { scale: self.scales[g], zero_point: self.zeros[g] as i32, range };
            let value = w[at] + feedback[i];
            let code = params.quantize(value);
            let rounded = params.dequantize(code);
            self.codes[r * self.k + if self.plan.keep_order { at } else { column }] = code as u8;
            loss += f64::from(self.factor.d[at]) * f64::from(value - rounded).powi(2);
            errors[at] = w[at] - rounded;
            for (f, u) in feedback.iter_mut().zip(&panel.rows[at]).skip(i + 1) {
                *f += errors[at] * u;
            }
        }
        loss
    }
}

/// The weights of a segment as GPTQ has them when it gets there: `W + G (I + U)^-1`, `[rows, width]`.
fn current_values(w: &[f32], k: usize, segment: &Segment, panels: &[Panel], feedback: &[Vec<Lanes<f32>>]) -> Vec<f32> {
    let width = segment.end - segment.start;
    let rows = w.len() / k;
    let mut solved = vec![0f32; rows * width]; // negated, so that products are added
    if segment.start > 0 {
        for (panel, feedback) in panels.iter().zip(feedback) {
            let mut c = feedback.clone();
            add_product(&solved, width, &panel.rows[segment.start..panel.start], &mut c);
            for (c, solved) in c.iter_mut().zip(solved.chunks_exact_mut(width)) {
                for i in 0..panel.width {
                    let x = -c[i];
                    solved[panel.start + i - segment.start] = x;
                    for (c, u) in c.iter_mut().zip(&panel.rows[panel.start + i]).skip(i + 1) {
                        *c += x * u;
                    }
                }
            }
        }
    }
    for (solved, w) in solved.chunks_exact_mut(width).zip(w.chunks_exact(k)) {
        solved.iter_mut().zip(&w[segment.start..]).for_each(|(x, w)| *x = w - *x);
    }
    solved
}

#[cfg(test)]
mod tests {
    use super::super::affine::Mapping;
    use super::super::grid::Search;
    use super::super::hessian::Gram;
    use super::super::rounding::uniform;
    use super::*;
    use crate::dtype::DType;

    fn grid(bits: u8, group_size: Option<usize>, mapping: Mapping) -> Grid {
        Grid { bits, group_size, mapping, search: Search::MinMax, scale_type: DType::F16, smallest_zero: 0 }
    }

    fn normal(len: usize, seed: u64) -> Vec<f32> {
        (0..len).map(|i| (0..6).map(|j| uniform(seed, (i * 6 + j) as u64) - 0.5).sum::<f32>()).collect()
    }

    /// Correlated inputs with a few large channels, as language models have them.
    fn hessian(k: usize) -> Hessian {
        let tokens = 3 * k + 7;
        let noise = normal(tokens * k, 11);
        let common = normal(tokens * 4, 12);
        let x = |t: usize, c: usize| {
            let shared: f32 = (0..4).map(|j| common[t * 4 + j] * ((c * (j + 3)) as f32).sin()).sum();
            (noise[t * k + c] + shared) * if c % 29 == 5 { 8.0 } else { 1.0 }
        };
        let mut gram = Gram::new(k);
        gram.add(&(0..tokens * k).map(|i| x(i / k, i % k)).collect::<Vec<_>>());
        gram.finish()
    }

    /// GPTQ as its paper's algorithm 1 states it, one column at a time in f64: the update of all columns to come by the
    /// rows of the upper Cholesky factor of the inverse.
    fn textbook(w: &[f32], h: &Hessian, grid: &Grid, damp: f64, order: &[usize]) -> Vec<f64> {
        let k = h.k;
        let mean = (0..k).map(|i| f64::from(h.values[i * k + i])).sum::<f64>() / k as f64;
        // Gauss-Jordan inverse, then its Cholesky factor, upper.
        let mut a: Vec<Vec<f64>> = (0..k)
            .map(|i| {
                let left = (0..k)
                    .map(|j| f64::from(h.values[order[i] * k + order[j]]) + if i == j { damp * mean } else { 0.0 });
                left.chain((0..k).map(|j| f64::from(i == j))).collect()
            })
            .collect();
        for i in 0..k {
            let pivot = a[i][i];
            a[i].iter_mut().for_each(|x| *x /= pivot);
            let row = a[i].clone();
            for (r, other) in a.iter_mut().enumerate().filter(|(r, _)| *r != i) {
                let _ = r;
                let f = other[i];
                other.iter_mut().zip(&row).for_each(|(x, y)| *x -= f * y);
            }
        }
        let mut u = vec![vec![0f64; k]; k]; // inverse = u^T u
        for i in 0..k {
            for j in i..k {
                let s: f64 = a[i][k + j] - (0..i).map(|p| u[p][i] * u[p][j]).sum::<f64>();
                u[i][j] = if i == j { s.sqrt() } else { s / u[i][i] };
            }
        }
        let g = grid.columns(k);
        let mut out = vec![0f64; w.len()];
        for (row, out) in w.chunks_exact(k).zip(out.chunks_exact_mut(k)) {
            let mut w: Vec<f64> = order.iter().map(|&c| f64::from(row[c])).collect();
            let mut params = None;
            for i in 0..k {
                if i % g == 0 {
                    let group: Vec<f32> = w[i..k.min(i + g)].iter().map(|&x| x as f32).collect();
                    params = grid.of_row(row).params(&group);
                }
                let p = params.expect("finite");
                let q = f64::from(p.dequantize(p.quantize(w[i] as f32)));
                let e = (w[i] - q) / u[i][i];
                (i..k).for_each(|j| w[j] -= e * u[i][j]);
                out[order[i]] = q;
            }
        }
        out
    }

    fn proxy(w: &[f32], q: &QuantWeight, h: &Hessian) -> f64 {
        h.weigh(&w.iter().zip(q.dequantize()).map(|(a, b)| a - b).collect::<Vec<_>>())
    }

    /// The same values as the textbook form, but for weights at a rounding boundary, and the loss is the Hessian's.
    #[test]
    fn equals_the_textbook() {
        for (n, k, group, act_order) in [
            (5, 48, Some(16), ActOrder::None),
            (7, 70, Some(24), ActOrder::None),
            (3, 64, None, ActOrder::None),
            (4, 96, Some(32), ActOrder::Dynamic),
        ] {
            let (w, h) = (normal(n * k, 1), hessian(k));
            for mapping in [Mapping::Centered, Mapping::Asymmetric] {
                let grid = grid(4, group, mapping);
                let got = gptq(&w, &h, &grid, &GptqOptions { act_order, damp: 0.01 }).expect("finite");
                let mut order: Vec<usize> = (0..k).collect();
                if act_order == ActOrder::Dynamic {
                    order.sort_by(|&a, &b| h.diagonal()[b].total_cmp(&h.diagonal()[a]));
                }
                let want = textbook(&w, &h, &grid, 0.01, &order);
                let values = got.weight.dequantize();
                let differ = values.iter().zip(&want).filter(|(a, b)| (f64::from(**a) - **b).abs() > 1e-4).count();
                assert!(differ * 50 <= n * k, "{differ} of {} differ: {n} {k} {group:?} {act_order:?}", n * k);
                let ours = proxy(&w, &got.weight, &h);
                let theirs = h.weigh(&w.iter().zip(&want).map(|(a, b)| a - *b as f32).collect::<Vec<_>>());
                assert!((ours / theirs - 1.0).abs() < 0.01, "{ours} {theirs}");
                let mean = h.diagonal().iter().sum::<f32>() / k as f32;
                let norm: f64 = w.iter().zip(&values).map(|(a, b)| f64::from(a - b).powi(2)).sum();
                let damped = ours + 0.01 * f64::from(mean) * norm;
                assert!((got.loss / damped - 1.0).abs() < 1e-3, "{} {damped}", got.loss);
            }
        }
    }

    /// Every order beats rounding to nearest, and the sorted ones keep their promises about columns.
    #[test]
    fn orders() {
        let (n, k) = (40, 200);
        let (w, h) = (normal(n * k, 2), hessian(k));
        for (group, bits) in [(Some(32), 4), (Some(64), 3), (None, 4), (Some(500), 2)] {
            let grid = grid(bits, group, Mapping::Centered);
            let plain = proxy(&w, &round_to_nearest(&w, k, &grid).expect("finite"), &h);
            for act_order in [ActOrder::None, ActOrder::Static, ActOrder::GroupAware, ActOrder::Dynamic] {
                let got = gptq(&w, &h, &grid, &GptqOptions { act_order, damp: 0.01 }).expect("finite");
                let loss = proxy(&w, &got.weight, &h);
                assert!(loss < 0.7 * plain, "{group:?} {bits} {act_order:?}: {loss} {plain}");
                let has_order = act_order == ActOrder::Dynamic && got.weight.groups() > 1;
                assert_eq!(got.weight.order.is_some(), has_order);
                if let Some(order) = &got.weight.order {
                    let mut sorted = order.clone();
                    sorted.sort_unstable();
                    assert_eq!(sorted, (0..k as u32).collect::<Vec<_>>());
                }
                if act_order == ActOrder::Static {
                    let plain = round_to_nearest(&w, k, &grid).expect("finite");
                    assert_eq!(got.weight.scales, plain.scales);
                }
            }
        }
    }

    /// Uncorrelated inputs of one size leave nothing to make up for.
    #[test]
    fn identity_is_rounding() {
        let (n, k) = (9, 75);
        let w = normal(n * k, 3);
        let values = (0..k * k).map(|i| if i % (k + 1) == 0 { 1.0 } else { 0.0 }).collect();
        let h = Hessian { k, values };
        for act_order in [ActOrder::None, ActOrder::Static, ActOrder::GroupAware] {
            let grid = grid(3, Some(25), Mapping::Asymmetric);
            let got = gptq(&w, &h, &grid, &GptqOptions { act_order, damp: 0.01 }).expect("finite");
            assert_eq!(got.weight, round_to_nearest(&w, k, &grid).expect("finite"), "{act_order:?}");
        }
    }

    /// Weights on the grid stay where they are.
    #[test]
    fn a_fixed_point() {
        let (n, k) = (6, 64);
        let grid = grid(4, Some(32), Mapping::SignedFull);
        let on_grid = round_to_nearest(&normal(n * k, 4), k, &grid).expect("finite").dequantize();
        let got = gptq(&on_grid, &hessian(k), &grid, &GptqOptions { act_order: ActOrder::Static, damp: 0.01 });
        let got = got.expect("finite");
        assert_eq!(got.weight.dequantize(), on_grid);
        assert_eq!(got.loss, 0.0);
    }

    #[test]
    fn hessians_that_hurt() {
        let k = 40;
        let w = normal(4 * k, 5);
        let options = GptqOptions { act_order: ActOrder::GroupAware, damp: 0.01 };
        let grid = grid(4, Some(16), Mapping::Centered);
        // Fewer tokens than inputs, and an input that is never used.
        let mut gram = Gram::new(k);
        gram.add(&(0..3 * k).map(|i| if i % k == 7 { 0.0 } else { uniform(6, i as u64) }).collect::<Vec<_>>());
        let got = gptq(&w, &gram.finish(), &grid, &options).expect("finite");
        assert_eq!((got.damp, got.dead), (Some(0.01), 1));
        assert!(got.weight.dequantize().iter().skip(7).step_by(k).all(|&w| w == 0.0));
        // Indefinite: damping grows until it holds.
        let mut values = vec![0.9f32; k * k];
        (0..k).for_each(|i| values[i * k + i] = if i == 0 { 0.7 } else { 1.0 });
        let got = gptq(&w, &Hessian { k, values }, &grid, &options).expect("finite");
        assert!(got.damp.is_some_and(|d| d > 0.01 && d < 1.0), "{:?}", got.damp);
        // Hopeless: rounded to nearest, and said so.
        let values = (0..k * k).map(|i| if i % (k + 1) == 0 { 1.0 } else { 50.0 }).collect();
        let got = gptq(&w, &Hessian { k, values }, &grid, &options).expect("finite");
        assert_eq!((got.damp, got.weight), (None, round_to_nearest(&w, k, &grid).expect("finite")));
        let mut bad = w;
        bad[3] = f32::INFINITY;
        assert_eq!(gptq(&bad, &gram.finish(), &grid, &options), None);
    }
}
