//! What rings of gemm_w4a8/sm90 have room for.

use super::blocks::NibbleShape;
use crate::device::cuda::embedded::abi;
use crate::device::cuda::gemm::layout::blocks::COLUMNS;

/// Barriers before the ring of a block fed by TMA.
pub(super) const HEAD_BYTES: usize = abi::LOWBIT_RING_HEAD_BYTES as usize;
/// Shared memory of a multiprocessor: what blocks may have, a kilobyte of each being the system's.
pub(super) const SHARED_BYTES: usize = 228 << 10;
/// Most stages of a ring.
pub(super) const MOST_STAGES: usize = abi::LOWBIT_RING_MAX_STAGES as usize;

/// What a block's shared memory has in stages: of kernels fed by TMA x and w of 128 columns; of those whose warps fetch their own w
/// one, all of x, or two, of a round in turn, and `stage_bytes` is the distance of rows of x.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ring {
    pub(super) stages: usize,
    pub(super) stage_bytes: usize,
}

/// Of a ring fed by TMA: 128 columns of x, and a block for each of `row_blocks`.
pub(super) fn stage_bytes(tokens: usize, row_blocks: usize, shape: NibbleShape) -> usize {
    (tokens * COLUMNS + row_blocks * shape.bytes()).next_multiple_of(1024)
}
