//! Sequences of one query row: kernels/attention/decode.cu.
#![allow(unsafe_code)] // kernel launches

use super::HeadTemplate;
use crate::device::cuda::context::{COUNTERS, CudaDevice, WORKSPACE_BYTES};
use crate::device::cuda::embedded::abi::{self, AttentionArgs};
use crate::device::cuda::op_kernel::OpKernel;
use crate::device::{AttentionShape, DecodeGrid};
use crate::error::Result;

/// Query heads of one KV head that a block takes.
const HEADS_PER_BLOCK: usize = 16;
/// Blocks that an SM holds at once.
const BLOCKS_PER_SM: usize = 3;

/// How the keys of sequences that decode are to be cut. `None` where rows may not depend on what else is in their batch: how many keys a
/// block takes does.
pub(crate) fn decode_grid(device: &CudaDevice, shape: &AttentionShape) -> Option<DecodeGrid> {
    let groups = shape.num_kv_heads * (shape.num_heads / shape.num_kv_heads).div_ceil(HEADS_PER_BLOCK);
    let part_bytes = shape.num_heads * (shape.head_dim + abi::LOWBIT_DECODE_PARTIAL_PAD as usize) * size_of::<f32>();
    (!device.is_batch_invariant()).then(|| DecodeGrid {
        blocks: device.sm_count() as usize * BLOCKS_PER_SM,
        groups,
        most_parts: WORKSPACE_BYTES / part_bytes,
        most_cut: COUNTERS / groups,
    })
}

/// As many blocks as run at once, whatever there is to do: a graph serves batches of every context.
pub(super) fn launch(
    device: &CudaDevice,
    template: HeadTemplate,
    shape: &AttentionShape,
    args: &AttentionArgs,
) -> Result<()> {
    let (kernel, threads, shared_bytes) = match template {
        HeadTemplate::D64 => (OpKernel::Decode64, 128, abi::LOWBIT_DECODE_SHARED_64),
        HeadTemplate::D128 => (OpKernel::Decode128, 128, abi::LOWBIT_DECODE_SHARED_128),
        HeadTemplate::D256 => (OpKernel::Decode256, 64, abi::LOWBIT_DECODE_SHARED_256),
    };
    let Some(grid) = decode_grid(device, shape) else { return Ok(()) };
    // SAFETY: the op table checked `out` and `qkv`; the metadata describes them and the cache by its contract. Parts and counters are no
    // more than `decode_grid` has room for.
    unsafe { device.launch_op(kernel, [grid.blocks as u32, 1, 1], threads, shared_bytes, args) }
}
