//! RMSNorm: of the residual stream, and inside attention and MLP.
#![allow(unsafe_code)] // kernel launches

use super::emit::{EmitKernels, code_threads, emit_args, is_held, staged_bytes};
use crate::device::cuda::context::CudaDevice;
use crate::device::cuda::embedded::abi::{self, EmitArgs, RmsNormArgs, SubNormArgs};
use crate::device::cuda::kernel::u32_of;
use crate::device::cuda::op_kernel::OpKernel;
use crate::device::{InputFormat, LinearInput, Tensor};
use crate::error::Result;

const RMS_NORM: EmitKernels =
    EmitKernels { floats: OpKernel::RmsNormFloats, int8: OpKernel::RmsNormInt8, outliers: OpKernel::RmsNormOutliers };
const SUB_NORM: EmitKernels =
    EmitKernels { floats: OpKernel::SubNormFloats, int8: OpKernel::SubNormInt8, outliers: OpKernel::SubNormOutliers };

pub(crate) fn rms_norm(
    device: &CudaDevice,
    out: &mut LinearInput,
    x: &Tensor,
    weight: &Tensor,
    eps: f32,
    emit: InputFormat<'_>,
    m: usize,
) -> Result<()> {
    if m == 0 || weight.is_empty() {
        return Ok(());
    }
    let k = weight.len();
    let out = emit_args(device, out, emit, k)?;
    let args = RmsNormArgs { out, x: x.cuda()?.ptr(), weight: weight.cuda()?.ptr(), eps };
    // SAFETY: the op table checked every buffer for m rows of k.
    unsafe { launch_norm(device, RMS_NORM, &args.out, m, &args) }
}

#[allow(clippy::too_many_arguments)] // those of the op
pub(crate) fn sub_norm(
    device: &CudaDevice,
    out: &mut LinearInput,
    x: &Tensor,
    gated: bool,
    weight: &Tensor,
    eps: f32,
    emit: InputFormat<'_>,
    m: usize,
) -> Result<()> {
    if m == 0 || weight.is_empty() {
        return Ok(());
    }
    let out = emit_args(device, out, emit, weight.len())?;
    let args = SubNormArgs { out, x: x.cuda()?.ptr(), weight: weight.cuda()?.ptr(), eps, gated: gated.into() };
    // SAFETY: the op table checked every buffer for m rows of k.
    unsafe { launch_norm(device, SUB_NORM, &args.out, m, &args) }
}

/// Launches an op, one block a row, as its kernel of `kernels` for what it emits.
///
/// # Safety
/// As [`CudaDevice::launch`].
unsafe fn launch_norm<A: Copy>(
    device: &CudaDevice,
    kernels: EmitKernels,
    out: &EmitArgs,
    m: usize,
    args: &A,
) -> Result<()> {
    let (grid, threads) = ([u32_of(m)?, 1, 1], code_threads(device, m, out));
    let shared = match out.mode {
        // A gather of a row in registers goes through shared memory.
        abi::LOWBIT_EMIT_FLOATS if !out.order.is_null() && is_held(out, threads) => 2 * out.k,
        abi::LOWBIT_EMIT_FLOATS => 0,
        _ => staged_bytes(out, threads),
    };
    // SAFETY: the caller's promise.
    unsafe { device.launch_op(kernels.of(out), grid, threads, shared, args) }
}
