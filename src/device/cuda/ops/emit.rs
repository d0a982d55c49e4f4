//! What ops that produce a linear layer's input do on their way out: gather, quantize (kernels/ops/emit.cuh).
#![allow(unsafe_code)] // kernel launches

use crate::device::cuda::context::CudaDevice;
use crate::device::cuda::embedded::abi::{self, EmitArgs};
use crate::device::cuda::kernel::u32_of;
use crate::device::cuda::memory::Buffer;
use crate::device::cuda::op_kernel::OpKernel;
use crate::device::{InputFormat, LinearInput, Tensor};
use crate::dtype::DType;
use crate::error::Result;
use crate::quant::ActQuant;

/// An op's kernels, by what they write.
#[derive(Debug, Clone, Copy)]
pub(super) struct EmitKernels {
    pub(super) floats: OpKernel,
    pub(super) int8: OpKernel,
    /// Codes beside outliers, of LLM.int8().
    pub(super) outliers: OpKernel,
}

impl EmitKernels {
    /// The one that writes what `out` is to hold.
    pub(super) fn of(self, out: &EmitArgs) -> OpKernel {
        match out.mode {
            abi::LOWBIT_EMIT_FLOATS => self.floats,
            abi::LOWBIT_EMIT_OUTLIERS => self.outliers,
            _ => self.int8,
        }
    }
}

/// The kernel's view of an [`LinearInput`] that `emit` is to be written to.
pub(super) fn emit_args(
    device: &CudaDevice,
    out: &mut LinearInput,
    emit: InputFormat<'_>,
    k: usize,
) -> Result<EmitArgs> {
    let (mode, static_scale, static_zero_point) = match emit.quant {
        ActQuant::None => (abi::LOWBIT_EMIT_FLOATS, 1.0, 0),
        ActQuant::DynamicPerToken => (abi::LOWBIT_EMIT_DYNAMIC, 1.0, 0),
        ActQuant::DynamicAsymmetric => (abi::LOWBIT_EMIT_ASYMMETRIC, 1.0, 0),
        ActQuant::LlmInt8 { .. } => (abi::LOWBIT_EMIT_OUTLIERS, 1.0, 0),
        ActQuant::StaticPerTensor { scale, zero_point } => (abi::LOWBIT_EMIT_STATIC, scale, zero_point),
    };
    let fits = k * size_of::<f32>() <= device.max_dynamic_shared() as usize;
    Ok(EmitArgs {
        floats: out.floats.cuda_mut()?.ptr(),
        codes: out.codes.cuda_mut()?.ptr(),
        scales: out.scales.cuda_mut()?.ptr(),
        zero_points: out.zero_points.cuda_mut()?.ptr(),
        order: emit.gather().map_or(Ok(std::ptr::null_mut()), |order| order.cuda().map(Buffer::ptr))?,
        static_scale,
        static_zero_point,
        flip: flip(&out.codes),
        mode,
        k: u32_of(k)?,
        staged: u32::from(fits),
        outliers: out.outliers.cuda_mut()?.ptr(),
        threshold: if let ActQuant::LlmInt8 { threshold } = emit.quant { threshold } else { f32::INFINITY },
    })
}

/// What the bytes of a tensor of codes are XORed with: uint8 holds each code plus 128.
pub(in crate::device::cuda) fn flip(codes: &Tensor) -> u32 {
    if codes.dtype() == DType::U8 { 0x80 } else { 0 }
}

/// Launches an op whose rows need no reduction of their own (kernels/ops/emit.cuh): codes need the whole row in one
/// block, floats do not.
///
/// # Safety
/// As [`CudaDevice::launch`].
pub(super) unsafe fn launch_emit<A: Copy>(
    device: &CudaDevice,
    kernels: EmitKernels,
    out: &EmitArgs,
    m: usize,
    args: &A,
) -> Result<()> {
    let (rows, kernel) = (u32_of(m)?, kernels.of(out));
    // SAFETY: the caller's promise.
    unsafe {
        if out.mode == abi::LOWBIT_EMIT_FLOATS {
            let threads = row_threads(out.k as usize, 256);
            device.launch_op(kernel, [rows, out.k.div_ceil(8 * threads), 1], threads, 0, args)
        } else {
            let threads = code_threads(device, m, out);
            device.launch_op(kernel, [rows, 1, 1], threads, staged_bytes(out, threads), args)
        }
    }
}

/// Most times eight columns of a row that a thread holds in registers.
const HELD_CHUNKS: u32 = abi::LOWBIT_EMIT_MOST_CHUNKS;

/// Whether a row is held in registers by a block of `threads`: `held_chunks` of kernels/ops/emit.cuh.
pub(super) fn is_held(out: &EmitArgs, threads: u32) -> bool {
    let gathers_codes = !out.order.is_null() && out.mode != abi::LOWBIT_EMIT_FLOATS;
    out.k.is_multiple_of(8) && !gathers_codes && out.k <= HELD_CHUNKS * 8 * threads
}

/// Dynamic shared memory of an op that emits codes by blocks of `threads`: none where a row is held in registers.
pub(super) fn staged_bytes(out: &EmitArgs, threads: u32) -> u32 {
    if is_held(out, threads) || out.staged == 0 { 0 } else { 4 * out.k }
}

/// Threads of a block that owns one of `m` rows. Few rows want them all; of many rows more are under way at once in
/// smaller blocks, as far as these hold a row in registers, which leaves the results alone. With outliers a thread needs
/// more registers than 1024 of them could have.
pub(super) fn code_threads(device: &CudaDevice, m: usize, out: &EmitArgs) -> u32 {
    let k = out.k as usize;
    let most = row_threads(k, if out.mode == abi::LOWBIT_EMIT_OUTLIERS { 512 } else { 1024 });
    if !is_held(out, most) {
        return row_threads(k, 512);
    }
    let share = (1024 * device.sm_count() as usize / m).max(128) as u32;
    row_threads(k.div_ceil(HELD_CHUNKS as usize), 1024).max(share.next_multiple_of(32)).min(most)
}

/// Threads of a block that works on one row of `width`: eight elements each up to `most` threads, in whole warps.
pub(super) fn row_threads(width: usize, most: u32) -> u32 {
    width.div_ceil(8).next_multiple_of(32).clamp(32, most as usize) as u32
}
