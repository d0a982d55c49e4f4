//! Op entry points of the CUDA device, one per line of the op table in `device/mod.rs`.
#![allow(unsafe_code)] // kernel launches

use super::abi::{
    EmbedArgs, EmitArgs, GatherRowsArgs, LogitsPart, LogitsStatsArgs, QkNormArgs, QuantizeArgs, RmsNormArgs, RopeArgs,
    SiluMulArgs, SubNormArgs,
};
use super::{Buffer, CudaDevice, WORKSPACE_BYTES, abi};
use crate::device::{Act, AttentionShape, Emit, Tensor};
use crate::dtype::{DType, HostData};
use crate::error::{Error, Result};
use crate::quant::ActQuant;

pub(crate) use super::attention::{attention, check_attention, kv_write};
pub(crate) use super::linear::{linear, linear_codes};
pub(crate) use super::pack::{check_epilogue, pack};

pub(crate) fn memory(device: &CudaDevice) -> Result<(u64, u64)> {
    device.free_and_total_bytes()
}

pub(crate) fn zeros(device: &CudaDevice, dtype: DType, len: usize) -> Result<Tensor> {
    let mut buffer = Buffer::new(device, dtype, len)?;
    buffer.fill_bytes(0)?;
    Ok(buffer.into())
}

pub(crate) fn upload(device: &CudaDevice, data: HostData) -> Result<Tensor> {
    Ok(Buffer::upload(device, &data)?.into())
}

pub(crate) fn write(_device: &CudaDevice, dst: &mut Tensor, data: &HostData) -> Result<()> {
    dst.cuda_mut()?.write(data)
}

pub(crate) fn download(_device: &CudaDevice, src: &Tensor, len: usize) -> Result<HostData> {
    src.cuda()?.download(len)
}

pub(crate) fn synchronize(device: &CudaDevice) -> Result<()> {
    device.synchronize()
}

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
    if !matches!(table.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        let (expected, got) = ("a table of f32, f16 or bf16".into(), table.dtype().to_string());
        return Err(Error::Shape { op: "embed", expected, got });
    }
    let args = EmbedArgs {
        out: out.cuda_mut()?.ptr(),
        table: table.cuda()?.ptr(),
        ids: ids.cuda()?.ptr(),
        width: u32_of(width)?,
    };
    let function = format!("embed_{}", table.dtype());
    // SAFETY: the op table checked `out` and `ids`; ids are below the rows of the table by its contract.
    unsafe { device.launch("ops/embed", &function, [u32_of(m)?, 1, 1], row_threads(width, 512), 0, &args) }
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
    unsafe { device.launch("ops/embed", "gather_rows", [u32_of(m)?, 1, 1], row_threads(width, 512), 0, &args) }
}

pub(crate) fn rms_norm(
    device: &CudaDevice,
    out: &mut Act,
    x: &Tensor,
    weight: &Tensor,
    eps: f32,
    emit: Emit<'_>,
    m: usize,
) -> Result<()> {
    if m == 0 || weight.is_empty() {
        return Ok(());
    }
    let k = weight.len();
    let out = emit_args(device, out, emit, k)?;
    let args = RmsNormArgs { out, x: x.cuda()?.ptr(), weight: weight.cuda()?.ptr(), eps };
    // SAFETY: the op table checked every buffer for m rows of k.
    unsafe { launch_norm(device, "ops/rms_norm", "rms_norm", "int8", &args.out, m, &args) }
}

#[allow(clippy::too_many_arguments)] // those of the op
pub(crate) fn sub_norm(
    device: &CudaDevice,
    out: &mut Act,
    x: &Tensor,
    gated: bool,
    weight: &Tensor,
    eps: f32,
    emit: Emit<'_>,
    m: usize,
) -> Result<()> {
    if m == 0 || weight.is_empty() {
        return Ok(());
    }
    let out = emit_args(device, out, emit, weight.len())?;
    let args = SubNormArgs { out, x: x.cuda()?.ptr(), weight: weight.cuda()?.ptr(), eps, gated: gated.into() };
    let int8 = format!("int8_{}", device.suffix());
    // SAFETY: the op table checked every buffer for m rows of k.
    unsafe { launch_norm(device, "ops/sub_norm", "sub_norm", &int8, &args.out, m, &args) }
}

/// Launches `op`, one block a row, as its kernel for floats, for codes (`int8`) or for codes beside outliers.
///
/// # Safety
/// As [`CudaDevice::launch`].
unsafe fn launch_norm<A: Copy>(
    device: &CudaDevice,
    module: &'static str,
    op: &str,
    int8: &str,
    out: &EmitArgs,
    m: usize,
    args: &A,
) -> Result<()> {
    let (grid, suffix, threads) = ([u32_of(m)?, 1, 1], device.suffix(), code_threads(device, m, out));
    let (function, shared) = match out.mode {
        // A gather of a row in registers goes through shared memory.
        abi::LOWBIT_EMIT_FLOATS if !out.order.is_null() && is_held(out, threads) => {
            (format!("{op}_{suffix}"), 2 * out.k)
        }
        abi::LOWBIT_EMIT_FLOATS => (format!("{op}_{suffix}"), 0),
        abi::LOWBIT_EMIT_OUTLIERS => (format!("{op}_outliers_{suffix}"), staged_bytes(out, threads)),
        _ => (format!("{op}_{int8}"), staged_bytes(out, threads)),
    };
    // SAFETY: the caller's promise.
    unsafe { device.launch(module, &function, grid, threads, shared, args) }
}

pub(crate) fn silu_mul(
    device: &CudaDevice,
    out: &mut Act,
    gate_up: &Tensor,
    k: usize,
    emit: Emit<'_>,
    m: usize,
) -> Result<()> {
    if m == 0 || k == 0 {
        return Ok(());
    }
    let out = emit_args(device, out, emit, k)?;
    let args = SiluMulArgs { out, gate_up: gate_up.cuda()?.ptr() };
    // SAFETY: the op table checked every buffer for m rows of k.
    unsafe { launch_emit(device, "ops/silu_mul", "silu_mul", &out, m, &args) }
}

pub(crate) fn quantize(
    device: &CudaDevice,
    out: &mut Act,
    x: &Tensor,
    k: usize,
    emit: Emit<'_>,
    m: usize,
) -> Result<()> {
    if m == 0 || k == 0 {
        return Ok(());
    }
    let out = emit_args(device, out, emit, k)?;
    let args = QuantizeArgs { out, x: x.cuda()?.ptr() };
    // SAFETY: the op table checked every buffer for m rows of k.
    unsafe { launch_emit(device, "ops/quantize", "quantize", &out, m, &args) }
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
    let function = format!("qk_norm_{}", device.suffix());
    let blocks = u32_of(heads.div_ceil(abi::LOWBIT_QK_NORM_WARPS as usize))?;
    // SAFETY: the op table checked qkv for m rows; the weights were checked above.
    unsafe { device.launch("ops/rope", &function, [blocks, 1, 1], 32 * abi::LOWBIT_QK_NORM_WARPS, 0, &args) }
}

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
    let function = format!("rope_{}", device.suffix());
    let pairs = (shape.num_heads + shape.num_kv_heads) * shape.head_dim / 2;
    // SAFETY: the op table checked qkv and positions for m rows; positions are rows of the table by its contract.
    unsafe { device.launch("ops/rope", &function, [u32_of(m)?, 1, 1], row_threads(pairs, 256), 0, &args) }
}

pub(crate) fn logits_stats(
    device: &CudaDevice,
    ids: &mut Tensor,
    stats: &mut Tensor,
    logits: &Tensor,
    targets: &Tensor,
    vocab: usize,
    m: usize,
) -> Result<()> {
    if m == 0 || vocab == 0 {
        return Ok(());
    }
    let parts = vocab.div_ceil(abi::LOWBIT_LOGITS_PART as usize);
    let rows_at_once = WORKSPACE_BYTES / (parts * size_of::<LogitsPart>());
    for first in (0..m).step_by(rows_at_once.max(1)) {
        let rows = u32_of(rows_at_once.min(m - first))?;
        let args = LogitsStatsArgs {
            ids: ids.cuda_mut()?.ptr_at(first),
            stats: stats.cuda_mut()?.ptr_at(3 * first),
            logits: logits.cuda()?.ptr_at(first * vocab),
            targets: targets.cuda()?.ptr_at(first),
            parts: device.workspace(),
            vocab: u32_of(vocab)?,
        };
        // SAFETY: the op table checked every buffer for m rows; the parts fit the workspace; a target outside the
        // vocabulary is handled by the kernel.
        unsafe {
            device.launch("ops/logits_stats", "logits_stats_part", [u32_of(parts)?, rows, 1], 256, 0, &args)?;
            device.launch("ops/logits_stats", "logits_stats", [rows, 1, 1], 128, 0, &args)?;
        }
    }
    Ok(())
}

/// The kernel's view of an [`Act`] that `emit` is to be written to.
fn emit_args(device: &CudaDevice, out: &mut Act, emit: Emit<'_>, k: usize) -> Result<EmitArgs> {
    let (mode, static_scale, static_zero) = match emit.quant {
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
        zeros: out.zeros.cuda_mut()?.ptr(),
        order: emit.order.map_or(Ok(std::ptr::null_mut()), |order| order.cuda().map(Buffer::ptr))?,
        static_scale,
        static_zero,
        flip: flip(&out.codes),
        mode,
        k: u32_of(k)?,
        staged: u32::from(fits),
        outliers: out.outliers.cuda_mut()?.ptr(),
        threshold: if let ActQuant::LlmInt8 { threshold } = emit.quant { threshold } else { f32::INFINITY },
    })
}

/// What the bytes of a tensor of codes are XORed with: uint8 holds each code plus 128.
pub(super) fn flip(codes: &Tensor) -> u32 {
    if codes.dtype() == DType::U8 { 0x80 } else { 0 }
}

/// Launches an op whose rows need no reduction of their own (kernels/common/emit.cuh): codes need the whole row in one
/// block, floats do not.
///
/// # Safety
/// As [`CudaDevice::launch`].
unsafe fn launch_emit<A: Copy>(
    device: &CudaDevice,
    module: &'static str,
    op: &str,
    out: &EmitArgs,
    m: usize,
    args: &A,
) -> Result<()> {
    let (rows, k, suffix) = (u32_of(m)?, out.k as usize, device.suffix());
    // SAFETY: the caller's promise.
    unsafe {
        if out.mode == abi::LOWBIT_EMIT_FLOATS {
            let threads = row_threads(k, 256);
            let grid = [rows, out.k.div_ceil(8 * threads), 1];
            device.launch(module, &format!("{op}_{suffix}"), grid, threads, 0, args)
        } else {
            let threads = code_threads(device, m, out);
            let kind = if out.mode == abi::LOWBIT_EMIT_OUTLIERS { "outliers" } else { "int8" };
            let function = format!("{op}_{kind}_{suffix}");
            device.launch(module, &function, [rows, 1, 1], threads, staged_bytes(out, threads), args)
        }
    }
}

/// Most times eight columns of a row that a thread holds in registers: MOST_CHUNKS of kernels/common/emit.cuh.
const HELD_CHUNKS: u32 = 4;

/// Whether a row is held in registers by a block of `threads`: `held_chunks` of kernels/common/emit.cuh.
fn is_held(out: &EmitArgs, threads: u32) -> bool {
    let gathers_codes = !out.order.is_null() && out.mode != abi::LOWBIT_EMIT_FLOATS;
    out.k.is_multiple_of(8) && !gathers_codes && out.k <= HELD_CHUNKS * 8 * threads
}

/// Dynamic shared memory of an op that emits codes by blocks of `threads`: none where a row is held in registers.
fn staged_bytes(out: &EmitArgs, threads: u32) -> u32 {
    if is_held(out, threads) || out.staged == 0 { 0 } else { 4 * out.k }
}

/// Threads of a block that owns one of `m` rows. Few rows want them all; of many rows more are under way at once in
/// smaller blocks, as far as these hold a row in registers, which leaves the results alone. With outliers a thread needs
/// more registers than 1024 of them could have.
fn code_threads(device: &CudaDevice, m: usize, out: &EmitArgs) -> u32 {
    let k = out.k as usize;
    let most = row_threads(k, if out.mode == abi::LOWBIT_EMIT_OUTLIERS { 512 } else { 1024 });
    if !is_held(out, most) {
        return row_threads(k, 512);
    }
    let share = (1024 * device.sm_count() as usize / m).max(128) as u32;
    row_threads(k.div_ceil(HELD_CHUNKS as usize), 1024).max(share.next_multiple_of(32)).min(most)
}

/// Threads of a block that works on one row of `width`: eight elements each up to `most` threads, in whole warps.
fn row_threads(width: usize, most: u32) -> u32 {
    width.div_ceil(8).next_multiple_of(32).clamp(32, most as usize) as u32
}

/// `n` as the 32-bit size that kernels take.
pub(super) fn u32_of(n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::unsupported(format!("a dimension of {n}"), "Kernels index with 32 bits"))
}

#[cfg(test)]
mod tests {
    /// What [`super::CudaDevice::launch`] needs of its kernels.
    #[test]
    fn kernels_wait_for_those_before_them() {
        let sources = [
            include_str!("../../../kernels/ops/embed.cu"),
            include_str!("../../../kernels/ops/logits_stats.cu"),
            include_str!("../../../kernels/ops/quantize.cu"),
            include_str!("../../../kernels/ops/repack.cu"),
            include_str!("../../../kernels/ops/rms_norm.cu"),
            include_str!("../../../kernels/ops/rope.cu"),
            include_str!("../../../kernels/ops/silu_mul.cu"),
            include_str!("../../../kernels/ops/sub_norm.cu"),
            include_str!("../../../kernels/attention/decode.cu"),
            include_str!("../../../kernels/attention/kv_write.cu"),
            include_str!("../../../kernels/attention/prefill.cu"),
        ];
        for source in sources {
            for kernel in source.split("__global__").skip(1) {
                let (_, body) = kernel.split_once('{').expect("a body");
                let first = body.trim_start_matches(|c: char| c.is_whitespace() || c == '\\');
                assert!(first.starts_with("overlap();"), "{first:.80}");
            }
        }
    }
}
