//! Rotary position embedding.
#![allow(unsafe_code)] // kernel launches

use super::emit::row_threads;
use crate::device::cuda::context::CudaDevice;
use crate::device::cuda::embedded::abi::RopeArgs;
use crate::device::cuda::kernel::u32_of;
use crate::device::cuda::op_kernel::OpKernel;
use crate::device::{AttentionShape, Tensor};
use crate::error::Result;

pub(crate) fn rope(
    device: &CudaDevice,
    qkv: &mut Tensor,
    table: &Tensor,
    positions: &Tensor,
    shape: &AttentionShape,
    m: usize,
) -> Result<()> {
    if m == 0 {
        return Ok(());
    }
    let args = RopeArgs {
        qkv: qkv.cuda_mut()?.ptr(),
        table: table.cuda()?.ptr(),
        positions: positions.cuda()?.ptr(),
        num_heads: u32_of(shape.num_heads)?,
        num_kv_heads: u32_of(shape.num_kv_heads)?,
        head_dim: u32_of(shape.head_dim)?,
    };
    let pairs = (shape.num_heads + shape.num_kv_heads) * shape.head_dim / 2;
    // SAFETY: the op table checked qkv and positions for m rows; positions are rows of the table by its contract.
    unsafe { device.launch_op(OpKernel::Rope, [u32_of(m)?, 1, 1], row_threads(pairs, 256), 0, &args) }
}
