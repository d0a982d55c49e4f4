//! Configurations of gemm_w4a16/sm90_warp_split_k.cuh, for up to sixteen rows: each warp has rows of w and a part of k for itself.

use super::blocks::BlockShape;
use super::limits::{HEAD_BYTES, LEAST_STAGES, SHARED_BYTES, TRANSPOSE_BYTES};
use crate::device::cuda::embedded::abi;
use crate::device::cuda::embedded::configs::gemm_w4a16::{SM90_WARP_SPLIT_K, Sm90WarpSplitK};
use crate::device::cuda::gemm::family::Problem;
use crate::device::cuda::gemm::layout::blocks::{COLUMNS, ROWS};
use crate::device::cuda::kernel::Grid;

/// A kernel, and how many blocks of a launch share a multiprocessor at the most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WarpSplitK {
    pub(super) kernel: Sm90WarpSplitK,
    blocks_per_sm: usize,
}

/// Slices of k, by which the kernel divides with shifts.
const SLICES: [usize; 4] = [1, 2, 4, 8];
/// Most stages of x.
const MAX_STAGES: usize = abi::GEMM_W4A16_SM90_WARP_SPLIT_K_MAX_STAGES as usize;
/// Rows of x that there is a configuration for.
pub(super) const MOST_ROWS: usize = 16;

/// All of them: two of the kernels run beside another block of theirs, and one in either way.
pub(super) fn all() -> impl Iterator<Item = WarpSplitK> {
    SM90_WARP_SPLIT_K.into_iter().flat_map(|kernel| {
        let blocks_per_sm: &[usize] = match (kernel.tokens, kernel.row_blocks, kernel.warps_k) {
            (8, 1, 8) => &[1, 2],
            (8, 2, 4) | (8, 1, 4) => &[2],
            _ => &[1],
        };
        blocks_per_sm.iter().map(move |&blocks_per_sm| WarpSplitK { kernel, blocks_per_sm })
    })
}

/// The one of these tokens, blocks of rows and warps along k, with the fewest blocks a multiprocessor.
fn find(wanted: (usize, usize, usize)) -> WarpSplitK {
    let of = |c: &WarpSplitK| (c.kernel.tokens, c.kernel.row_blocks, c.kernel.warps_k) == wanted;
    all().find(of).expect("a configuration of the list")
}

/// The configuration for `m` rows, 1 to [`MOST_ROWS`], and its slices of k; `None` where a kernel with another split of the work is
/// faster, or x has no room.
pub(super) fn choose(p: &Problem, shape: BlockShape, m: usize) -> Option<(WarpSplitK, usize)> {
    let sms = p.sm_count as usize;
    let blocks = p.n.div_ceil(ROWS);
    let many = 2 * blocks >= 5 * sms;
    let wanted = match (m, many) {
        // Tiles of 128 rows, two beside each other, spread 28672 outputs more evenly; they are too large to matter above.
        (..=8, true) if blocks < 6 * sms => [(8, 2, 4), (8, 1, 8)],
        (..=8, _) => [(8, 1, 8), (8, 1, 4)],
        (_, true) if shape.codes.bits() == 4 => return None,
        _ => [(16, 1, 8), (16, 2, 4)],
    };
    let with_slices = |wanted| {
        let config = find(wanted);
        let tiles = config.tiles(p) * m.div_ceil(config.kernel.tokens);
        let fits = |&slices: &usize| tiles * slices <= sms * config.blocks_per_sm;
        let slices = SLICES.into_iter().rev().filter(|&slices| config.allows(p, slices)).find(fits).unwrap_or(1);
        config.grid(p, shape, m, slices).map(|_| (config, slices))
    };
    wanted.into_iter().find_map(with_slices)
}

/// Configurations among which the fastest for `m` rows should be, and slices of k.
pub(super) fn configs(p: &Problem, shape: BlockShape, m: usize) -> Vec<(WarpSplitK, usize)> {
    let fits = |tokens: usize| m <= tokens && tokens <= m.next_power_of_two().max(8);
    let with_slices = all().filter(|config| fits(config.kernel.tokens)).flat_map(|config| {
        let at_once = move |slices: usize| config.tiles(p) * slices <= 2 * p.sm_count as usize;
        let slices = SLICES.into_iter().filter(move |&slices| slices <= 2 || at_once(slices));
        slices.map(move |slices| (config, slices))
    });
    let has_room = |(config, slices): &(WarpSplitK, usize)| {
        config.allows(p, *slices) && config.grid(p, shape, m, *slices).is_some()
    };
    with_slices.filter(has_room).collect()
}

impl WarpSplitK {
    /// The kernel's name between op and type.
    pub(super) fn function(&self) -> String {
        let Sm90WarpSplitK { tokens, row_blocks, warps_k, .. } = self.kernel;
        format!("warp_split_k_{tokens}x{row_blocks}x{warps_k}")
    }

    /// As tables and reports name it.
    pub(super) fn name(&self, slices: usize) -> String {
        let Sm90WarpSplitK { tokens, row_blocks, warps_k, .. } = self.kernel;
        let beside = if self.blocks_per_sm == 1 { String::new() } else { format!(" by {}", self.blocks_per_sm) };
        format!("{}x{tokens}/{warps_k} split {slices}{beside}", row_blocks * ROWS)
    }

    /// Tiles of w.
    fn tiles(&self, p: &Problem) -> usize {
        p.n.div_ceil(ROWS * self.kernel.row_blocks)
    }

    /// Every block of a cluster has a part of k, and sums to add up.
    fn allows(&self, p: &Problem, slices: usize) -> bool {
        slices <= p.k.div_ceil(COLUMNS) && slices <= 4 * self.kernel.row_blocks
    }

    /// Clusters that run at once. Processing clusters have room for all multiprocessors' blocks in pairs only.
    fn clusters(&self, p: &Problem, m: usize, slices: usize) -> usize {
        let sms = p.sm_count as usize;
        let sms = if slices > 2 { sms * 10 / 11 } else { sms };
        (sms * self.blocks_per_sm / slices / m.div_ceil(self.kernel.tokens)).clamp(1, self.tiles(p))
    }

    /// Shared memory; `None` where there is not enough.
    fn shared_bytes(&self, p: &Problem, shape: BlockShape, m: usize, slices: usize) -> Option<usize> {
        let Sm90WarpSplitK { tokens, row_blocks, warps_k, depth } = self.kernel;
        let (warps, token_tiles) = (row_blocks * warps_k, tokens / 8);
        let pairs = 4 * row_blocks * token_tiles;
        let has_one_tile = self.clusters(p, m, slices) >= self.tiles(p);
        let rounds = p.k.div_ceil(COLUMNS).div_ceil(slices).div_ceil(warps_k);
        let gathered = if slices == 1 { 0 } else { 2 * 512 * pairs.next_multiple_of(slices) };
        let (depth, sums) = if has_one_tile { (depth.min(rounds), 0) } else { (depth, 4 * token_tiles * 512) };
        let slots = warps * (depth * shape.bytes() + sums);
        let fixed = (HEAD_BYTES + gathered + pairs.min(warps) * TRANSPOSE_BYTES + slots).next_multiple_of(1024);
        let room = ((SHARED_BYTES + 1024) / self.blocks_per_sm - 1024).checked_sub(fixed)?;
        let stage = |rows: usize| warps_k * 2 * rows * 128;
        let whole = rounds * stage(m.min(tokens));
        if rounds <= MAX_STAGES && whole <= room {
            return Some(fixed + whole);
        }
        let stages = (room / stage(tokens)).min(MAX_STAGES).min(rounds);
        (stages >= LEAST_STAGES).then_some(fixed + stages * stage(tokens))
    }

    /// The launch's grid for `m` rows; `None` where a block has not enough shared memory.
    pub(super) fn grid(&self, p: &Problem, shape: BlockShape, m: usize, slices: usize) -> Option<Grid> {
        let Sm90WarpSplitK { tokens, row_blocks, warps_k, .. } = self.kernel;
        Some(Grid {
            blocks: [(self.clusters(p, m, slices) * slices) as u32, m.div_ceil(tokens) as u32, 1],
            threads: (32 * row_blocks * warps_k + 32) as u32,
            shared_bytes: self.shared_bytes(p, shape, m, slices)? as u32,
            cluster: slices as u32,
            overlaps: true,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::gemm::family::h200_problem;
    use crate::device::cuda::gemm::w4a16::codes::Codes;

    const SHAPE: BlockShape = BlockShape { codes: Codes::Uint4, groups: 1, low_scales: false, zero_points: false };

    #[test]
    fn every_launch_is_one_that_the_gpu_takes() {
        let full = |codes| BlockShape { codes, groups: 4, low_scales: true, zero_points: true };
        for shape in [SHAPE, full(Codes::Uint4), BlockShape { codes: Codes::Uint8, ..SHAPE }, full(Codes::Uint8)] {
            for m in [1, 2, 7, 8, 9, 16] {
                for (n, k) in
                    [(1, 8), (64, 128), (520, 1040), (4096, 4096), (4096, 14336), (57344, 8192), (8192, 28672)]
                {
                    let p = h200_problem(n, k);
                    let configs = configs(&p, shape, m);
                    assert!(!configs.is_empty(), "{n}x{k}, {m} rows");
                    for (config, slices) in configs.into_iter().chain(choose(&p, shape, m)) {
                        let grid = config.grid(&p, shape, m, slices).expect("has room");
                        let Grid { blocks, threads, shared_bytes, cluster, .. } = grid;
                        let beside = (blocks[0] * blocks[1]).div_ceil(p.sm_count);
                        assert!((shared_bytes + 1024) * beside <= 228 << 10, "{grid:?}");
                        assert!(blocks[0] > 0 && blocks[0].is_multiple_of(cluster) && cluster <= 8, "{grid:?}");
                        assert!(threads <= 544 && cluster as usize <= k.div_ceil(COLUMNS), "{grid:?}");
                    }
                }
            }
        }
    }

    /// What was fastest, or nearly, when measured.
    #[test]
    fn choices_are_the_measured_ones() {
        let config = |n, k, m| {
            let choice = choose(&h200_problem(n, k), SHAPE, m);
            choice.map(|(config, slices)| config.name(slices)).unwrap_or_default()
        };
        assert_eq!(config(4096, 4096, 1), "64x8/8 split 2");
        assert_eq!(config(4096, 14336, 8), "64x8/8 split 2");
        assert_eq!(config(6144, 4096, 4), "64x8/8 split 1");
        assert_eq!(config(28672, 4096, 8), "128x8/4 split 1 by 2");
        assert_eq!(config(57344, 8192, 1), "64x8/8 split 1");
        assert_eq!(config(4096, 14336, 16), "64x16/8 split 2");
        assert_eq!(config(8192, 28672, 16), "64x16/8 split 1");
        assert_eq!(config(28672, 4096, 16), "");
    }
}
