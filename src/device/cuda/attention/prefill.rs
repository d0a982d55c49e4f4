//! Prompts: kernels/attention/prefill.cu.
#![allow(unsafe_code)] // kernel launches

use super::HeadTemplate;
use crate::device::BatchMeta;
use crate::device::cuda::context::CudaDevice;
use crate::device::cuda::embedded::abi::{self, AttentionArgs};
use crate::device::cuda::kernel::u32_of;
use crate::device::cuda::op_kernel::OpKernel;
use crate::error::Result;

/// Tiles of query rows of every head of every sequence that has enough of them.
pub(super) fn launch(
    device: &CudaDevice,
    template: HeadTemplate,
    meta: &BatchMeta,
    args: &AttentionArgs,
) -> Result<()> {
    let (kernel, shared_bytes) = match template {
        HeadTemplate::D64 => (OpKernel::Prefill64, abi::LOWBIT_PREFILL_SHARED_64),
        HeadTemplate::D128 => (OpKernel::Prefill128, abi::LOWBIT_PREFILL_SHARED_128),
        HeadTemplate::D256 => (OpKernel::Prefill256, abi::LOWBIT_PREFILL_SHARED_256),
    };
    let tiles = u32_of(meta.max_q_len.div_ceil(abi::LOWBIT_PREFILL_QUERIES as usize))?;
    let blocks = [tiles, args.num_heads, u32_of(meta.batch)?];
    // SAFETY: the op table checked `out` and `qkv`; the metadata describes them and the cache by its contract.
    unsafe { device.launch_op(kernel, blocks, 128, shared_bytes, args) }
}
