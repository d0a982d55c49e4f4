//! Activations as a linear layer takes them: of an MLP (`silu_mul`), or as they are (`quantize`).
#![allow(unsafe_code)] // kernel launches

use super::emit::{EmitKernels, emit_args, launch_emit};
use crate::device::cuda::context::CudaDevice;
use crate::device::cuda::embedded::abi::{QuantizeArgs, SiluMulArgs};
use crate::device::cuda::op_kernel::OpKernel;
use crate::device::{InputFormat, LinearInput, Tensor};
use crate::error::Result;

const SILU_MUL: EmitKernels =
    EmitKernels { floats: OpKernel::SiluMulFloats, int8: OpKernel::SiluMulInt8, outliers: OpKernel::SiluMulOutliers };
const QUANTIZE: EmitKernels = EmitKernels {
    floats: OpKernel::QuantizeFloats,
    int8: OpKernel::QuantizeInt8,
    outliers: OpKernel::QuantizeOutliers,
};

pub(crate) fn silu_mul(
    device: &CudaDevice,
    out: &mut LinearInput,
    gate_up: &Tensor,
    k: usize,
    emit: InputFormat<'_>,
    m: usize,
) -> Result<()> {
    if m == 0 || k == 0 {
        return Ok(());
    }
    let out = emit_args(device, out, emit, k)?;
    let args = SiluMulArgs { out, gate_up: gate_up.cuda()?.ptr() };
    // SAFETY: the op table checked every buffer for m rows of k.
    unsafe { launch_emit(device, SILU_MUL, &out, m, &args) }
}

pub(crate) fn quantize(
    device: &CudaDevice,
    out: &mut LinearInput,
    x: &Tensor,
    k: usize,
    emit: InputFormat<'_>,
    m: usize,
) -> Result<()> {
    if m == 0 || k == 0 {
        return Ok(());
    }
    let out = emit_args(device, out, emit, k)?;
    let args = QuantizeArgs { out, x: x.cuda()?.ptr() };
    // SAFETY: the op table checked every buffer for m rows of k.
    unsafe { launch_emit(device, QUANTIZE, &out, m, &args) }
}
