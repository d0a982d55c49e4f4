//! Configurations of gemm_w4a8/sm90_persistent.cuh: tiles over which blocks walk, fed by TMA.

use super::blocks::NibbleShape;
use super::limits::{HEAD_BYTES, MOST_STAGES, Ring, SHARED_BYTES, stage_bytes};
use crate::device::cuda::embedded::abi;
use crate::device::cuda::embedded::configs::gemm_w4a8::{
    SM90_PERSISTENT, SM90_PERSISTENT_ONE_GROUP, SM90_U8, Sm90Persistent,
};
use crate::device::cuda::gemm::family::Problem;
use crate::device::cuda::gemm::layout::blocks::{COLUMNS, ROWS};
use crate::device::cuda::kernel::Grid;

/// Of a token of a tile, for its scale and zero point.
const TOKEN_BYTES: usize = abi::GEMM_W4A8_SM90_TOKEN_BYTES as usize;
/// Most rows of the tiles of one warpgroup.
pub(super) const NARROW_ROWS: usize = 64;

/// Kernels there are for a problem.
pub(super) fn kernels(p: &Problem, shape: NibbleShape) -> impl Iterator<Item = Sm90Persistent> {
    let one_group = SM90_PERSISTENT_ONE_GROUP.into_iter().filter(move |_| shape.one_group);
    let x_u8 = p.x_u8;
    SM90_PERSISTENT.into_iter().chain(one_group).filter(move |kernel| !x_u8 || SM90_U8.contains(kernel))
}

/// The kernel for `m` rows.
pub(super) fn choose(p: &Problem, shape: NibbleShape, m: usize) -> Sm90Persistent {
    let [narrow_u8, wide_u8] = SM90_U8;
    match m {
        ..=NARROW_ROWS if p.x_u8 => narrow_u8,
        _ if p.x_u8 => wide_u8,
        ..=NARROW_ROWS => {
            SM90_PERSISTENT.into_iter().find(|kernel| m <= kernel.tokens).expect("there is a tile of 64 tokens")
        }
        _ => best(p, shape, m),
    }
}

/// The kernel that ends first for many rows of int8.
pub(super) fn best(p: &Problem, shape: NibbleShape, m: usize) -> Sm90Persistent {
    let int8 = Problem { x_u8: false, ..*p };
    let many = kernels(&int8, shape).filter(|kernel| kernel.tokens >= NARROW_ROWS);
    many.min_by(|a, b| a.cost(p, shape, m).total_cmp(&b.cost(p, shape, m))).expect("there are such kernels")
}

impl Sm90Persistent {
    /// The kernel's name behind what its module's names begin with.
    pub(super) fn function(&self) -> String {
        format!("persistent_{}x{}", self.tokens, self.row_blocks)
    }

    fn threads(&self) -> usize {
        128 * self.row_blocks + if self.tokens > NARROW_ROWS { 128 } else { 32 * (1 + self.row_blocks) }
    }

    fn count(&self, p: &Problem, m: usize) -> usize {
        m.div_ceil(self.tokens) * p.n.div_ceil(self.row_blocks * ROWS)
    }

    /// Microseconds of a block of k, of as many tiles as share a multiprocessor, and what a tile takes beside.
    fn us(&self, shape: NibbleShape) -> (f64, f64) {
        match (self.tokens, self.row_blocks) {
            (64, _) if shape.one_group => (0.38, 1.0),
            (64, _) => (0.47, 0.0),
            (128, 2) if shape.one_group => (0.40, 1.8),
            (128, 2) => (0.69, 0.0),
            (128, _) if shape.one_group => (0.54, 1.6),
            (128, _) => (0.86, 0.0),
            _ => (0.62, 2.2),
        }
    }

    /// Microseconds, but for what all share: for weights in groups of a block of k.
    pub(super) fn cost(&self, p: &Problem, shape: NibbleShape, m: usize) -> f64 {
        let rounds = self.count(p, m).div_ceil(p.sm_count as usize * self.min_blocks_per_sm) as f64;
        let (block_us, tile_us) = self.us(shape);
        rounds * if shape.one_group { p.k.div_ceil(COLUMNS) as f64 * block_us + tile_us } else { block_us }
    }

    /// Behind the ring, for each warpgroup: sixteen tokens of sums, padded, and two words a token.
    fn tail_bytes(&self) -> usize {
        self.row_blocks * (abi::GEMM_W4A8_SM90_TRANSPOSE_BYTES as usize + TOKEN_BYTES * self.tokens)
    }

    /// Grid and ring for `m` rows.
    pub(super) fn grid(&self, p: &Problem, shape: NibbleShape, m: usize) -> (Grid, Ring) {
        let (count, sms) = (self.count(p, m), p.sm_count as usize);
        let resident = count.div_ceil(sms).min(self.min_blocks_per_sm);
        let room = SHARED_BYTES / resident - 1024 - HEAD_BYTES - self.tail_bytes();
        let stage_bytes = stage_bytes(self.tokens, self.row_blocks, shape);
        let stages = (room / stage_bytes).min(MOST_STAGES).min(p.k.div_ceil(COLUMNS).max(2));
        let grid = Grid {
            blocks: [count.min(sms * resident) as u32, 1, 1],
            threads: self.threads() as u32,
            shared_bytes: (HEAD_BYTES + stages * stage_bytes + self.tail_bytes()) as u32,
            cluster: 1,
            overlaps: true,
        };
        (grid, Ring { stages, stage_bytes })
    }
}
