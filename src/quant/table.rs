//! Weights as indices into a table of sixteen values: a given one (NF4, FP4), or one learned from the weight itself.

use rayon::prelude::*;

use super::affine::{bounds, smallest_normal};
use super::codebook::{Codebook, kmeans, nearest};
use super::grid::Grid;
use super::observer::absmax;
use super::{Encoding, QuantWeight};

/// Bins of the distribution that a table is learned from: a width of 2^-15, a thousandth of a table's usual gap.
const BINS: usize = 1 << 16;

/// Columns of a row of `k` that share a scale where blocks of `block` run along the flattened weight, as in bitsandbytes:
/// their greatest common divisor, since a block that ends within a row starts the next row elsewhere.
pub fn columns_of_block(block: usize, k: usize) -> usize {
    let (mut a, mut b) = (block, k);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Each weight of `[n, k]` as the nearest value of `table` times the largest magnitude of its group, which is
/// [`columns_of_block`] of the grid's group size. Of the grid only that and the scales' type are used.
///
/// `None` when a weight is not finite or a scale does not fit its type.
pub fn round_to_table(w: &[f32], k: usize, grid: &Grid, table: Codebook) -> Option<QuantWeight> {
    let (group_size, scales) = scales(w, k, grid)?;
    let mut codes = vec![0u8; w.len()];
    let groups = w.par_chunks(group_size).zip(codes.par_chunks_mut(group_size)).zip(&scales);
    groups.for_each(|((w, codes), &scale)| {
        let scale = divisor(scale);
        codes.iter_mut().zip(w).for_each(|(code, &w)| *code = nearest(&table.0, w / scale) as u8);
    });
    let (n, zeros) = (w.len() / k, vec![0.0; scales.len()]);
    Some(QuantWeight {
        n,
        k,
        bits: Codebook::BITS,
        group_size,
        codes: codes.into(),
        scales,
        zeros,
        order: None,
        encoding: Encoding::Codebook(table),
    })
}

/// The table of least squared error for a weight `[n, k]` whose groups are scaled by their largest magnitude: k-means over
/// the scaled weights, each counting as much as its error costs, `scale^2` times the mean square of its input
/// (SqueezeLLM, Kim et al. 2023, with a layer's outputs in the place of its loss gradient). Without `input_squares`
/// (`[k]`) all inputs count alike. `None` as for [`round_to_table`].
pub fn learn_table(w: &[f32], k: usize, grid: &Grid, input_squares: Option<&[f32]>) -> Option<Codebook> {
    let (group_size, scales) = scales(w, k, grid)?;
    // Sum of weights, and of weighted values, of each bin of [-1, 1].
    let mut bins = vec![(0f64, 0f64); BINS];
    for (i, (w, &scale)) in w.chunks(group_size).zip(&scales).enumerate() {
        let first = i * group_size % k;
        for (c, &w) in w.iter().enumerate() {
            let input = input_squares.map_or(1.0, |squares| f64::from(squares[first + c]));
            let x = w / divisor(scale);
            let bin = ((x + 1.0) * (BINS / 2) as f32).clamp(0.0, (BINS - 1) as f32) as usize;
            let weight = f64::from(scale) * f64::from(scale) * input;
            bins[bin].0 += weight;
            bins[bin].1 += weight * f64::from(x);
        }
    }
    let filled = bins.iter().filter(|(weight, _)| *weight > 0.0);
    let (values, weights): (Vec<f32>, Vec<f32>) =
        filled.map(|&(weight, sum)| ((sum / weight) as f32, weight as f32)).unzip();
    let mut table = [0.0; 16];
    table.copy_from_slice(&kmeans(&values, Some(&weights), 16));
    Some(Codebook(table))
}

/// Group size, and the largest magnitude of each group in the scales' type.
fn scales(w: &[f32], k: usize, grid: &Grid) -> Option<(usize, Vec<f32>)> {
    let group_size = columns_of_block(grid.columns(k), k);
    let scale = |w: &[f32]| {
        bounds(w)?;
        let (exact, least) = (absmax(w), smallest_normal(grid.scale_type));
        let rounded = if exact == 0.0 { 0.0 } else { grid.scale_type.round(exact).max(least) };
        rounded.is_finite().then_some(rounded)
    };
    Some((group_size, w.par_chunks(group_size).map(scale).collect::<Option<_>>()?))
}

fn divisor(scale: f32) -> f32 {
    if scale > 0.0 { scale } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::super::affine::Mapping;
    use super::super::codebook::Blockwise;
    use super::super::grid::Search;
    use super::super::rounding::uniform;
    use super::*;
    use crate::dtype::DType;

    fn grid(group_size: usize, scale_type: DType) -> Grid {
        Grid {
            bits: 4,
            group_size: Some(group_size),
            mapping: Mapping::Narrow,
            search: Search::MinMax,
            scale_type,
            smallest_zero: 0,
        }
    }

    fn bell(len: u64) -> Vec<f32> {
        (0..len).map(|i| (0..6).map(|j| uniform(3, i * 6 + j) - 0.5).sum::<f32>()).collect()
    }

    /// The same as blocks of the flattened weight where these divide rows; else groups of their common divisor.
    #[test]
    fn blocks_of_rows() {
        let w = bell(5 * 192);
        let q = round_to_table(&w, 192, &grid(64, DType::F32), Codebook::NF4).expect("finite");
        let blocks = Blockwise::quantize(&w, &Codebook::NF4.0, 64);
        assert_eq!(
            (q.codes.clone(), q.scales.clone(), q.dequantize()),
            (blocks.codes.clone().into(), blocks.absmax.clone(), blocks.dequantize(&Codebook::NF4.0))
        );
        for (block, k, want) in [(64, 96, 32), (64, 256, 64), (128, 64, 64), (64, 7, 7), (64, 1, 1), (64, 100, 4)] {
            assert_eq!(columns_of_block(block.min(k), k), want);
            let q = round_to_table(&bell(3 * k as u64), k, &grid(block, DType::F16), Codebook::FP4).expect("finite");
            assert_eq!((q.n, q.group_size, q.scales.len()), (3, want, 3 * k / want));
        }
        let zero = round_to_table(&[0.0; 4], 4, &grid(64, DType::F32), Codebook::NF4).expect("finite");
        assert_eq!((zero.scales[0], zero.dequantize()), (0.0, vec![0.0; 4]));
        assert_eq!(round_to_table(&[f32::NAN; 4], 4, &grid(64, DType::F32), Codebook::NF4), None);
        assert_eq!(round_to_table(&[1e9; 4], 4, &grid(64, DType::F16), Codebook::NF4), None, "beyond f16");
    }

    /// A learned table is better than NF4 on what it is learned for: squared error, and the error of outputs whose
    /// inputs differ in size.
    #[test]
    fn learned() {
        let (k, w) = (128, bell(64 * 128));
        let grid = grid(64, DType::F32);
        let squares: Vec<f32> = (0..k).map(|c| if c % 16 == 0 { 50.0 } else { 0.1 }).collect();
        let error = |table: Codebook, squares: Option<&[f32]>| -> f64 {
            let q = round_to_table(&w, k, &grid, table).expect("finite").dequantize();
            let of =
                |(i, (a, b)): (usize, (&f32, &f32))| f64::from((a - b).powi(2) * squares.map_or(1.0, |s| s[i % k]));
            q.iter().zip(&w).enumerate().map(of).sum()
        };
        let plain = learn_table(&w, k, &grid, None).expect("finite");
        let weighted = learn_table(&w, k, &grid, Some(&squares)).expect("finite");
        assert!(plain.0.is_sorted() && weighted.0.is_sorted());
        assert!(error(plain, None) < 0.95 * error(Codebook::NF4, None));
        assert!(error(weighted, Some(&squares)) < error(plain, Some(&squares)));
        assert_eq!(learn_table(&[0.0; 4], 4, &grid, None), Some(Codebook([0.0; 16])));
        assert_eq!(learn_table(&[f32::INFINITY; 4], 4, &grid, None), None);
    }
}
