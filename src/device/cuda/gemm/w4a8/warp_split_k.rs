//! Configurations of gemm_w4a8/sm90_warp_split_k.cuh, for few rows: warps fetch their own weights, k split over them.

use super::blocks::NibbleShape;
use super::limits::{Ring, SHARED_BYTES};
use crate::device::cuda::embedded::abi;
use crate::device::cuda::embedded::configs::gemm_w4a8::{SM90_WARP_SPLIT_K, Sm90WarpSplitK};
use crate::device::cuda::gemm::family::Problem;
use crate::device::cuda::gemm::layout::blocks::COLUMNS;
use crate::device::cuda::kernel::Grid;

/// Sums that each of a kernel's warps keeps in a round, of weights in groups.
const EACH: usize = abi::GEMM_W4A8_SM90_WARP_SUMS as usize;

/// The kernel for few rows; `None` where a tile fed by TMA is faster.
pub(super) fn choose(p: &Problem, shape: NibbleShape, m: usize) -> Option<Sm90WarpSplitK> {
    let [eight, eight_wide, sixteen, sixteen_wide] = SM90_WARP_SPLIT_K;
    // Sixteen rows of w for each of two blocks a multiprocessor, and three of 64 rows.
    let (is_low, is_high) = (p.n <= 32 * p.sm_count as usize, p.n >= 192 * p.sm_count as usize);
    match m {
        // Two bits: few warps are bound by what they do for a block, not by its bytes.
        _ if is_high && !p.x_u8 && (shape.bits == 2 || shape.one_group && m > 4) => None,
        ..=8 if eight.ring(p, shape, m).stages == 1 => Some(eight),
        ..=8 => Some(eight_wide),
        ..=16 if is_low => Some(sixteen),
        ..=16 if p.x_u8 || !is_high => Some(sixteen_wide),
        ..=32 if is_low => Some(sixteen_wide),
        _ => None,
    }
}

impl Sm90WarpSplitK {
    /// The kernel's name behind what its module's names begin with.
    pub(super) fn function(&self) -> String {
        format!("warp_split_k_{}x{}x{}", self.tokens, self.row_tiles, self.warps_k)
    }

    /// Rows of w of a tile.
    pub(super) fn rows(&self) -> usize {
        16 * self.row_tiles
    }

    /// Columns that the block's warps share out at a time.
    fn round(&self, shape: NibbleShape) -> usize {
        EACH / shape.groups * self.warps_k * COLUMNS
    }

    /// The ring with all of x.
    fn whole(&self, shape: NibbleShape, k: usize) -> Ring {
        Ring { stages: 1, stage_bytes: k.next_multiple_of(self.round(shape)) + 16 }
    }

    /// The ring with two rounds of x, in turn.
    fn in_turn(&self, shape: NibbleShape) -> Ring {
        Ring { stages: 2, stage_bytes: self.round(shape) + 16 }
    }

    /// Sums, scales of two rounds, and `rows` rows of x. Where rows are made to be one group warps have one sum each, and no scales.
    fn shared_bytes(&self, shape: NibbleShape, ring: Ring, rows: usize) -> usize {
        let words = if shape.factors || shape.bits == 2 { self.tokens } else { EACH * (self.tokens + 2) };
        self.warps_k * self.rows() * words * 4 + ring.stages * ring.stage_bytes * rows
    }

    /// Tiles of w and of x, and blocks that share a multiprocessor.
    fn tiles(&self, p: &Problem, m: usize) -> (usize, usize, usize) {
        let (down, across) = (p.n.div_ceil(self.rows()), m.div_ceil(self.tokens));
        (down, across, (down * across).div_ceil(p.sm_count as usize).min(self.min_blocks_per_sm))
    }

    fn ring(&self, p: &Problem, shape: NibbleShape, m: usize) -> Ring {
        let room = SHARED_BYTES / self.tiles(p, m).2 - 1024;
        let whole = self.whole(shape, p.k);
        if self.shared_bytes(shape, whole, m.min(self.tokens)) <= room { whole } else { self.in_turn(shape) }
    }

    /// Grid and ring for `m` rows.
    pub(super) fn grid(&self, p: &Problem, shape: NibbleShape, m: usize) -> (Grid, Ring) {
        let (down, across, resident) = self.tiles(p, m);
        let ring = self.ring(p, shape, m);
        let rows = if ring.stages == 1 { m.min(self.tokens) } else { self.tokens };
        let grid = Grid {
            blocks: [down.min((p.sm_count as usize * resident / across).max(1)) as u32, across as u32, 1],
            threads: (32 * self.row_tiles * self.warps_k) as u32,
            shared_bytes: self.shared_bytes(shape, ring, rows) as u32,
            cluster: 1,
            overlaps: true,
        };
        (grid, ring)
    }
}
