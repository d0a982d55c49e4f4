//! Configurations of gemm_w4a8/sm90_split_k.cuh, for weights whose rows are one group: where tiles do not fill the GPU.

use super::blocks::NibbleShape;
use super::limits::{HEAD_BYTES, MOST_STAGES, Ring, SHARED_BYTES, stage_bytes};
use crate::device::cuda::embedded::abi;
use crate::device::cuda::embedded::configs::gemm_w4a8::{SM90_SPLIT_K, Sm90SplitK};
use crate::device::cuda::gemm::family::{Problem, is_plausible};
use crate::device::cuda::gemm::layout::blocks::{COLUMNS, ROWS};
use crate::device::cuda::kernel::Grid;

/// Blocks of a cluster that may be the best.
const CLUSTERS: [usize; 6] = [1, 2, 3, 4, 6, 8];
/// Of the kernel for the most tokens: microseconds of a block of k, and what a tile takes beside.
const US: (f64, f64) = (0.23, 3.5);

/// The kernel for `m` rows and the blocks of its clusters where persistent tiles do not fill the GPU, or end later: in `tile_us`
/// microseconds, asked for where that counts. `None` where they are faster.
pub(super) fn choose(
    p: &Problem,
    shape: NibbleShape,
    m: usize,
    tile_us: impl Fn() -> f64,
) -> Option<(Sm90SplitK, usize)> {
    let sms = p.sm_count as usize;
    if !shape.one_group || m <= 4 {
        return None;
    }
    let kernel = SM90_SPLIT_K.into_iter().find(|kernel| m <= kernel.tokens).unwrap_or(SM90_SPLIT_K[3]);
    let splits = kernel.splits(p, m);
    let us = p.k.div_ceil(COLUMNS).div_ceil(splits) as f64 * US.0 + US.1;
    let is_fast = m <= kernel.tokens || us < tile_us();
    let fits = kernel.count(p, m) <= kernel.min_blocks_per_sm * sms;
    (is_fast && fits).then_some((kernel, splits))
}

/// Kernels and clusters among which the fastest for `m` rows should be.
pub(super) fn configs(p: &Problem, shape: NibbleShape, m: usize) -> impl Iterator<Item = (Sm90SplitK, usize)> {
    SM90_SPLIT_K.into_iter().filter(move |_| shape.one_group).flat_map(move |kernel| {
        let (size, blocks) = ([kernel.row_blocks * ROWS, kernel.tokens], p.k.div_ceil(COLUMNS));
        let splits = CLUSTERS.into_iter().filter(move |&splits| is_plausible(p, m, size, blocks, splits));
        splits.map(move |splits| (kernel, splits))
    })
}

impl Sm90SplitK {
    /// The kernel's name behind what its module's names begin with.
    pub(super) fn function(&self) -> String {
        format!("split_k_{}x{}x{}", self.tokens, self.row_blocks, self.warpgroups_k)
    }

    /// Rings for which a multiprocessor has room where it has more than one block.
    fn rings(&self) -> usize {
        match self.tokens {
            16 => 4,
            32 => 3,
            64 => 2,
            _ => 1,
        }
    }

    fn count(&self, p: &Problem, m: usize) -> usize {
        p.n.div_ceil(self.row_blocks * ROWS) * m.div_ceil(self.tokens)
    }

    /// Parts of k: two where a multiprocessor has room for more or both of all tiles fill the GPU, and more while each has one
    /// of its own.
    fn splits(&self, p: &Problem, m: usize) -> usize {
        let (tiles, sms) = (self.count(p, m), p.sm_count as usize);
        let most = CLUSTERS[CLUSTERS.len() - 1].min(p.k.div_ceil(COLUMNS));
        let shares = self.rings() > 2 || self.rings() == 2 && 4 * tiles > 3 * sms;
        let mut splits = if shares && tiles <= sms { most.min(2) } else { 1 };
        while 2 * splits <= most && tiles * 2 * splits <= sms {
            splits *= 2;
        }
        splits
    }

    /// Grid and ring for `m` rows.
    pub(super) fn grid(&self, p: &Problem, shape: NibbleShape, m: usize, splits: usize) -> (Grid, Ring) {
        let Sm90SplitK { tokens, row_blocks, warpgroups_k, .. } = *self;
        let rings = if self.count(p, m) * splits <= p.sm_count as usize { 1 } else { self.rings() };
        let stage_bytes = stage_bytes(tokens, row_blocks, shape);
        // Of a block's part of k as many stages as there is room for, a multiple of `warpgroups_k`. In the end sums are there, of
        // each token the rows and some words more.
        let most = (SHARED_BYTES / rings - 1024 - HEAD_BYTES) / stage_bytes;
        let sum_pitch = row_blocks * ROWS + abi::GEMM_W4A8_SM90_SUM_PADDING as usize;
        let fewest = (warpgroups_k * tokens * sum_pitch * 4).div_ceil(stage_bytes).max(2);
        let stages = p.k.div_ceil(COLUMNS).div_ceil(splits).max(fewest).next_multiple_of(warpgroups_k);
        let stages = stages.min(most.min(MOST_STAGES) / warpgroups_k * warpgroups_k);
        let grid = Grid {
            blocks: [(p.n.div_ceil(row_blocks * ROWS) * splits) as u32, m.div_ceil(tokens) as u32, 1],
            threads: (128 * row_blocks * warpgroups_k + 64) as u32,
            shared_bytes: (HEAD_BYTES + stages * stage_bytes) as u32,
            cluster: splits as u32,
            overlaps: true,
        };
        (grid, Ring { stages, stage_bytes })
    }
}
