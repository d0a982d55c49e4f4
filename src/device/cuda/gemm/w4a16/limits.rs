//! What blocks of gemm_w4a16/sm90 may have, and need.

use crate::device::cuda::embedded::abi;

/// Stages without which a kernel's ring stands still: one is filled again only after the next has come.
pub(super) const LEAST_STAGES: usize = 2;
/// Shared memory of a block: barriers, and a warp's place to transpose its tile.
pub(super) const HEAD_BYTES: usize = abi::LOWBIT_RING_HEAD_BYTES as usize;
pub(super) const TRANSPOSE_BYTES: usize = abi::GEMM_W4A16_SM90_TRANSPOSE_BYTES as usize;
/// Shared memory of a multiprocessor that blocks may have.
pub(super) const SHARED_BYTES: usize = 227 << 10;
