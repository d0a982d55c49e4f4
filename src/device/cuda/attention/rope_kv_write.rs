//! Norms of query and key heads, rotation, and keys and values into the cache: kernels/attention/rope_kv_write.cu.
#![allow(unsafe_code)] // kernel launches

use crate::device::cuda::context::CudaDevice;
use crate::device::cuda::embedded::abi::{self, RopeKvWriteArgs};
use crate::device::cuda::kernel::u32_of;
use crate::device::cuda::op_kernel::OpKernel;
use crate::device::{AttentionShape, HeadNorms, KvLayer, RopeRows, Tensor};
use crate::error::Result;

pub(crate) fn rope_kv_write(
    device: &CudaDevice,
    cache: &mut KvLayer,
    qkv: &mut Tensor,
    norm: Option<HeadNorms<'_>>,
    rows: RopeRows<'_>,
    shape: &AttentionShape,
    m: usize,
) -> Result<()> {
    super::check(device, "rope_kv_write", cache, shape)?;
    if m == 0 {
        return Ok(());
    }
    let weight = |of: Option<&Tensor>| match of {
        Some(weight) => weight.cuda().map(|weight| weight.ptr::<f32>().cast_const()),
        None => Ok(std::ptr::null()),
    };
    let args = RopeKvWriteArgs {
        qkv: qkv.cuda_mut()?.ptr(),
        k_cache: cache.k.cuda_mut()?.ptr(),
        v_cache: cache.v.cuda_mut()?.ptr(),
        table: rows.table.cuda()?.ptr(),
        positions: rows.positions.cuda()?.ptr(),
        slot_mapping: rows.slot_mapping.cuda()?.ptr(),
        q_weight: weight(norm.map(|norm| norm.q))?,
        k_weight: weight(norm.map(|norm| norm.k))?,
        eps: norm.map_or(0.0, |norm| norm.eps),
        num_heads: u32_of(shape.num_heads)?,
        num_kv_heads: u32_of(shape.num_kv_heads)?,
        head_dim: u32_of(shape.head_dim)?,
    };
    let heads = u32_of(shape.num_heads + 2 * shape.num_kv_heads)?;
    let blocks = [u32_of(m)?, heads.div_ceil(abi::LOWBIT_ROPE_WARPS), 1];
    // SAFETY: the op table checked qkv, positions, slots and weights for m rows; positions are rows of the table and slots inside the
    // cache by the op's contract.
    unsafe { device.launch_op(OpKernel::RopeKvWrite, blocks, 32 * abi::LOWBIT_ROPE_WARPS, 0, &args) }
}
