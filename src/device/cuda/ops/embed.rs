//! Rows of a table by their numbers: the embedding, and rows whose logits are wanted.
#![allow(unsafe_code)] // kernel launches

use super::emit::row_threads;
use crate::device::Tensor;
use crate::device::cuda::context::CudaDevice;
use crate::device::cuda::embedded::abi::{EmbedArgs, GatherRowsArgs};
use crate::device::cuda::kernel::u32_of;
use crate::device::cuda::op_kernel::OpKernel;
use crate::dtype::DType;
use crate::error::{Error, Result};

pub(crate) fn embed(
    device: &CudaDevice,
    out: &mut Tensor,
    table: &Tensor,
    ids: &Tensor,
    width: usize,
    m: usize,
) -> Result<()> {
    if m == 0 {
        return Ok(());
    }
    let kernel = match table.dtype() {
        DType::F32 => OpKernel::EmbedF32,
        DType::F16 => OpKernel::EmbedF16,
        DType::BF16 => OpKernel::EmbedBf16,
        got => {
            let (expected, got) = ("a table of f32, f16 or bf16".into(), got.to_string());
            return Err(Error::Shape { op: "embed", expected, got });
        }
    };
    let args = EmbedArgs {
        out: out.cuda_mut()?.ptr(),
        table: table.cuda()?.ptr(),
        ids: ids.cuda()?.ptr(),
        width: u32_of(width)?,
    };
    // SAFETY: the op table checked `out` and `ids`; ids are below the rows of the table by its contract.
    unsafe { device.launch_op(kernel, [u32_of(m)?, 1, 1], row_threads(width, 512), 0, &args) }
}

pub(crate) fn gather_rows(
    device: &CudaDevice,
    out: &mut Tensor,
    x: &Tensor,
    rows: &Tensor,
    width: usize,
    m: usize,
) -> Result<()> {
    if m == 0 {
        return Ok(());
    }
    let args = GatherRowsArgs {
        out: out.cuda_mut()?.ptr(),
        x: x.cuda()?.ptr(),
        rows: rows.cuda()?.ptr(),
        width: u32_of(width)?,
    };
    // SAFETY: the op table checked `out` and `rows`; entries of `rows` are rows of `x` by its contract.
    unsafe { device.launch_op(OpKernel::GatherRows, [u32_of(m)?, 1, 1], row_threads(width, 512), 0, &args) }
}
