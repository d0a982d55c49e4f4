//! RMSNorm: of the residual stream, inside attention and MLP, and of query and key heads.
#![allow(unsafe_code)] // kernel launches

use super::emit::{EmitKernels, code_threads, emit_args, is_held, staged_bytes};
use crate::device::cuda::context::CudaDevice;
use crate::device::cuda::embedded::abi::{self, EmitArgs, QkNormArgs, RmsNormArgs, SubNormArgs};
use crate::device::cuda::kernel::u32_of;
use crate::device::cuda::op_kernel::OpKernel;
use crate::device::{AttentionShape, InputFormat, LinearInput, Tensor};
use crate::dtype::DType;
use crate::error::{Error, Result};

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

pub(crate) fn qk_norm(
    device: &CudaDevice,
    qkv: &mut Tensor,
    q_weight: &Tensor,
    k_weight: &Tensor,
    eps: f32,
    shape: &AttentionShape,
    m: usize,
) -> Result<()> {
    if m == 0 {
        return Ok(());
    }
    for (name, weight) in [("q", q_weight), ("k", k_weight)] {
        if weight.dtype() != DType::F32 || weight.len() < shape.head_dim {
            let expected = format!("a {name} weight of {} f32", shape.head_dim);
            let got = format!("{} of {}", weight.len(), weight.dtype());
            return Err(Error::Shape { op: "qk_norm", expected, got });
        }
    }
    let args = QkNormArgs {
        qkv: qkv.cuda_mut()?.ptr(),
        q_weight: q_weight.cuda()?.ptr(),
        k_weight: k_weight.cuda()?.ptr(),
        eps,
        m: u32_of(m)?,
        num_heads: u32_of(shape.num_heads)?,
        num_kv_heads: u32_of(shape.num_kv_heads)?,
        head_dim: u32_of(shape.head_dim)?,
    };
    let heads = m * (shape.num_heads + shape.num_kv_heads);
    let blocks = u32_of(heads.div_ceil(abi::LOWBIT_QK_NORM_WARPS as usize))?;
    // SAFETY: the op table checked qkv for m rows; the weights were checked above.
    unsafe { device.launch_op(OpKernel::QkNorm, [blocks, 1, 1], 32 * abi::LOWBIT_QK_NORM_WARPS, 0, &args) }
}
