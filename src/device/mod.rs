//! Devices, their tensors, and the op table: every operation a model needs, by one name on every device.
//!
//! The CPU device is the specification (`cpu::reference`) and the default where there is no GPU; the CUDA device
//! is checked against it. An op's letters: `m` rows (tokens), `n` outputs, `k` reduction; the destination comes
//! first. Activations are `f32` on the CPU and `f16` or `bf16` on CUDA ([`Device::activation_dtype`]); the
//! residual stream and the logits are `f32` on both.

pub mod cpu;
#[cfg(lowbit_cuda)]
pub mod cuda;
mod epilogue;
mod operands;
pub(crate) mod tensor;

use std::path::Path;

pub use epilogue::{Activation, Epilogue, GROUP_OUTPUTS, Output};
pub(crate) use operands::PackedBody;
pub use operands::{Act, AttentionShape, BatchMeta, Columns, Emit, KvLayer, PackedWeight, Write};
pub use tensor::Tensor;

use crate::dtype::{DType, HostData};
use crate::error::{Error, Result};
use crate::quant::{ActQuant, LinearWeight};

/// Where tensors live and ops run.
#[derive(Debug, Clone)]
pub enum Device {
    /// Host memory and threads.
    Cpu(cpu::CpuDevice),
    /// One NVIDIA GPU.
    #[cfg(lowbit_cuda)]
    Cuda(cuda::CudaDevice),
}

/// One op table line: the CPU arm and the CUDA arm of a method.
macro_rules! dispatch {
    ($self:expr, $op:ident ( $($arg:expr),* )) => {
        match $self {
            Device::Cpu(d) => cpu::ops::$op(d, $($arg),*),
            #[cfg(lowbit_cuda)]
            Device::Cuda(d) => cuda::ops::$op(d, $($arg),*),
        }
    };
}

impl Device {
    /// The CPU with its fast paths.
    pub fn cpu() -> Device {
        Device::Cpu(cpu::CpuDevice::new())
    }

    /// The CPU running the executable specification only: slow, exact, readable.
    pub fn cpu_reference() -> Device {
        Device::Cpu(cpu::CpuDevice::reference())
    }

    /// GPU number `ordinal`, computing in `dtype` (`F16` or `BF16`).
    ///
    /// # Errors
    /// `Unsupported` when this binary was built without CUDA; `Cuda` when there is no driver or GPU, or the driver
    /// is too old for the embedded kernels.
    pub fn cuda(ordinal: usize, dtype: DType) -> Result<Device> {
        #[cfg(lowbit_cuda)]
        {
            Ok(Device::Cuda(cuda::CudaDevice::new(ordinal, dtype)?))
        }
        #[cfg(not(lowbit_cuda))]
        {
            let _ = (ordinal, dtype);
            Err(Error::unsupported(
                "CUDA in this binary: it was built without nvcc",
                "Run scripts/install-cuda-toolchain (no root needed) and rebuild, or use --device cpu",
            ))
        }
    }

    /// The same device in a mode where a row's result has the same bits whatever else is in its batch and however its
    /// sequence was cut into passes, at some cost in speed. On the CPU that is always so; a GPU otherwise chooses among
    /// kernels whose sums have different orders by the number of rows, where these are not exact. Weights packed before are
    /// not changed by it.
    pub fn batch_invariant(self) -> Device {
        match self {
            Device::Cpu(d) => Device::Cpu(d),
            #[cfg(lowbit_cuda)]
            Device::Cuda(d) => Device::Cuda(d.batch_invariant()),
        }
    }

    /// The same device choosing its kernels by the table of measured choices in `file`, made by `bench kernels --tune`, before
    /// its own. The CPU has nothing to choose. Weights packed before are not changed by it.
    ///
    /// # Errors
    /// `Io`; `Checkpoint` for a malformed file, with the line; `Input` for the table of another GPU.
    pub fn tuned_by(self, file: &Path) -> Result<Device> {
        match self {
            Device::Cpu(d) => {
                let _ = file;
                Ok(Device::Cpu(d))
            }
            #[cfg(lowbit_cuda)]
            Device::Cuda(d) => Ok(Device::Cuda(d.tuned_by(&cuda::Tuned::read(file)?)?)),
        }
    }

    /// `cpu` or `cuda`.
    pub fn name(&self) -> &'static str {
        match self {
            Device::Cpu(_) => "cpu",
            #[cfg(lowbit_cuda)]
            Device::Cuda(_) => "cuda",
        }
    }

    /// Type of activations between ops.
    pub fn activation_dtype(&self) -> DType {
        match self {
            Device::Cpu(_) => DType::F32,
            #[cfg(lowbit_cuda)]
            Device::Cuda(d) => d.dtype(),
        }
    }

    /// True where a ternary weight with int8 activations takes 2 bits, as kernels of sm_90 read them; else it takes 4.
    pub fn packs_ternary(&self) -> bool {
        match self {
            Device::Cpu(_) => false,
            #[cfg(lowbit_cuda)]
            Device::Cuda(d) => d.uses_sm90(),
        }
    }

    /// Free and total bytes of the device's memory.
    pub fn memory(&self) -> Result<(u64, u64)> {
        dispatch!(self, memory())
    }

    /// A tensor of `len` zeros.
    pub fn zeros(&self, dtype: DType, len: usize) -> Result<Tensor> {
        dispatch!(self, zeros(dtype, len))
    }

    /// Moves host elements to the device.
    pub fn upload(&self, data: HostData) -> Result<Tensor> {
        dispatch!(self, upload(data))
    }

    /// Overwrites the start of `dst` with `data` (same dtype, not longer).
    pub fn write(&self, dst: &mut Tensor, data: &HostData) -> Result<()> {
        if data.dtype() != dst.dtype() || data.len() > dst.len() {
            return Err(Error::Shape {
                op: "write",
                expected: format!("at most {} elements of {}", dst.len(), dst.dtype()),
                got: format!("{} of {}", data.len(), data.dtype()),
            });
        }
        dispatch!(self, write(dst, data))
    }

    /// Copies the first `len` elements to the host, after everything enqueued before.
    pub fn download(&self, src: &Tensor, len: usize) -> Result<HostData> {
        require("download", src, src.dtype(), len)?;
        dispatch!(self, download(src, len))
    }

    /// Waits for everything enqueued and reports faults.
    pub fn synchronize(&self) -> Result<()> {
        dispatch!(self, synchronize())
    }

    /// Repacks a canonical weight into this device's kernel layout and moves it there. The only maker of
    /// [`PackedWeight`].
    ///
    /// # Errors
    /// `Unsupported` for a scheme without a kernel; `Shape` when parts of the weight disagree.
    pub fn pack(&self, weight: LinearWeight) -> Result<PackedWeight> {
        self.pack_fused(weight, Epilogue::NONE)
    }

    /// Fails unless [`Device::pack_fused`] takes `weight` with `epilogue`.
    ///
    /// # Errors
    /// `Unsupported`, naming what stands against it.
    pub fn check_epilogue(&self, weight: &LinearWeight, epilogue: Epilogue) -> Result<()> {
        epilogue.check(weight)?;
        dispatch!(self, check_epilogue(weight, epilogue))
    }

    /// [`Device::pack`] of a weight whose sums go through `epilogue`. For [`Activation::SwiGlu`] the weight's first half
    /// is the gate, its second half up.
    ///
    /// # Errors
    /// As [`Device::pack`]; `Unsupported` for an epilogue that this weight cannot have.
    pub fn pack_fused(&self, weight: LinearWeight, epilogue: Epilogue) -> Result<PackedWeight> {
        dispatch!(self, pack(weight, epilogue))
    }

    /// `out[r, :] = table[ids[r], :]` for `r < m`; `out` `F32`, `table` `[vocab, width]` of any floating type.
    /// Ids must be below the vocabulary size: the engine checks them.
    pub fn embed(&self, out: &mut Tensor, table: &Tensor, ids: &Tensor, width: usize, m: usize) -> Result<()> {
        require("embed out", out, DType::F32, m * width)?;
        require("embed ids", ids, DType::U32, m)?;
        dispatch!(self, embed(out, table, ids, width, m))
    }

    /// `out[r, :] = x[rows[r], :]` for `r < m`; `F32` rows of `width`.
    pub fn gather_rows(&self, out: &mut Tensor, x: &Tensor, rows: &Tensor, width: usize, m: usize) -> Result<()> {
        require("gather_rows out", out, DType::F32, m * width)?;
        require("gather_rows rows", rows, DType::U32, m)?;
        dispatch!(self, gather_rows(out, x, rows, width, m))
    }

    /// `out = emit(x / sqrt(mean(x^2) + eps) * weight)` per row; `x` `F32` `[m, k]`, `weight` `F32` `[k]`.
    pub fn rms_norm(
        &self,
        out: &mut Act,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
        emit: Emit<'_>,
        m: usize,
    ) -> Result<()> {
        let k = weight.len();
        require("rms_norm x", x, DType::F32, m * k)?;
        require_act("rms_norm", self, out, emit, m, k)?;
        dispatch!(self, rms_norm(out, x, weight, eps, emit, m))
    }

    /// [`Device::rms_norm`] of activations `x` `[m, k]`, or where `gated` of `relu(gate)^2 * up` with `x` `[m, 2 * k]`, gate in the
    /// first `k` columns: the norms inside attention and MLP of BitNet. `x` in the activation dtype, `weight` `F32` `[k]`.
    #[allow(clippy::too_many_arguments)] // of rms_norm, and where the row comes from
    pub fn sub_norm(
        &self,
        out: &mut Act,
        x: &Tensor,
        gated: bool,
        weight: &Tensor,
        eps: f32,
        emit: Emit<'_>,
        m: usize,
    ) -> Result<()> {
        let k = weight.len();
        require("sub_norm x", x, self.activation_dtype(), m * k * if gated { 2 } else { 1 })?;
        require_act("sub_norm", self, out, emit, m, k)?;
        dispatch!(self, sub_norm(out, x, gated, weight, eps, emit, m))
    }

    /// `out = emit(silu(gate) * up)` per row, `silu(g) = g / (1 + exp(-g))`; `gate_up` `[m, 2 * k]`, gate in the
    /// first `k` columns, in the activation dtype.
    pub fn silu_mul(&self, out: &mut Act, gate_up: &Tensor, k: usize, emit: Emit<'_>, m: usize) -> Result<()> {
        require("silu_mul gate_up", gate_up, self.activation_dtype(), m * 2 * k)?;
        require_act("silu_mul", self, out, emit, m, k)?;
        dispatch!(self, silu_mul(out, gate_up, k, emit, m))
    }

    /// `out = emit(x)` per row; `x` `[m, k]` in the activation dtype. Quantizes or gathers what no producer could.
    pub fn quantize(&self, out: &mut Act, x: &Tensor, k: usize, emit: Emit<'_>, m: usize) -> Result<()> {
        require("quantize x", x, self.activation_dtype(), m * k)?;
        require_act("quantize", self, out, emit, m, k)?;
        dispatch!(self, quantize(out, x, k, emit, m))
    }

    /// `out[r, columns] (+)= activation(x[r, :] * w^T + bias)` for `r < m`, the activation that of the weight's epilogue,
    /// whose output must be [`Output::Floats`].
    ///
    /// `x` must have been emitted with the weight's `order` and activation quantization. `out` is `F32` or the
    /// activation dtype; `Write::Add` needs `F32`. W8A8 results are the same bits on every device, for every `m`.
    pub fn linear(
        &self,
        out: &mut Tensor,
        columns: Columns,
        x: &Act,
        w: &PackedWeight,
        write: Write,
        m: usize,
    ) -> Result<()> {
        let fits = columns.offset + w.outputs() <= columns.stride && out.len() >= m * columns.stride;
        if !fits || (write == Write::Add && out.dtype() != DType::F32) || w.epilogue.output != Output::Floats {
            return Err(Error::Shape {
                op: "linear",
                expected: format!(
                    "[{m}, {}] from column {} in rows of {}",
                    w.outputs(),
                    columns.offset,
                    columns.stride
                ),
                got: format!("{} elements of {}, {write:?}, {:?}", out.len(), out.dtype(), w.epilogue.output),
            });
        }
        if m == 0 {
            return Ok(());
        }
        dispatch!(self, linear(out, columns, x, w, write, m))
    }

    /// `out = codes of activation(x * w^T + bias)` for `m` rows, quantized as the weight's epilogue says, in one launch:
    /// the input of the next linear layer. `out.codes` is `[m, outputs]`, `I8` or `U8`; `out.scales` gets one scale a row
    /// (a row whose input has a scale that is not finite: NaN), for [`Output::Groups`] `[m, ceil(outputs / 128)]`.
    ///
    /// The bits are the same on every device, for every `m`.
    pub fn linear_codes(&self, out: &mut Act, x: &Act, w: &PackedWeight, m: usize) -> Result<()> {
        if w.epilogue.output == Output::Floats {
            let (expected, got) = ("a weight whose epilogue quantizes".into(), format!("{:?}", w.epilogue));
            return Err(Error::Shape { op: "linear_codes", expected, got });
        }
        require_codes("linear_codes", out, m * w.outputs(), m * w.epilogue.scales(w.n))?;
        if m == 0 {
            return Ok(());
        }
        dispatch!(self, linear_codes(out, x, w, m))
    }

    /// RMSNorm of every query and key head in place (Qwen3); `qkv` `[m, qkv_width]`, weights `F32` `[head_dim]`.
    pub fn qk_norm(
        &self,
        qkv: &mut Tensor,
        q_weight: &Tensor,
        k_weight: &Tensor,
        eps: f32,
        shape: &AttentionShape,
        m: usize,
    ) -> Result<()> {
        require("qk_norm qkv", qkv, self.activation_dtype(), m * shape.qkv_width())?;
        dispatch!(self, qk_norm(qkv, q_weight, k_weight, eps, shape, m))
    }

    /// Rotates queries and keys in place; pairs are `(i, i + head_dim / 2)`. `table` is `F32` `[positions, head_dim]`:
    /// `head_dim / 2` cosines, then as many sines.
    pub fn rope(
        &self,
        qkv: &mut Tensor,
        table: &Tensor,
        positions: &Tensor,
        shape: &AttentionShape,
        m: usize,
    ) -> Result<()> {
        require("rope qkv", qkv, self.activation_dtype(), m * shape.qkv_width())?;
        require("rope positions", positions, DType::U32, m)?;
        dispatch!(self, rope(qkv, table, positions, shape, m))
    }

    /// Writes each row's keys and values to its slot of the paged cache.
    pub fn kv_write(
        &self,
        cache: &mut KvLayer,
        qkv: &Tensor,
        slot_mapping: &Tensor,
        shape: &AttentionShape,
        m: usize,
    ) -> Result<()> {
        require("kv_write qkv", qkv, self.activation_dtype(), m * shape.qkv_width())?;
        require("kv_write slot_mapping", slot_mapping, DType::U32, m)?;
        dispatch!(self, kv_write(cache, qkv, slot_mapping, shape, m))
    }

    /// Fails when this device has no attention kernel for `shape`. Asked before a model's weights are read.
    ///
    /// # Errors
    /// `Unsupported`, naming the limit.
    pub fn check_attention(&self, shape: &AttentionShape) -> Result<()> {
        let _ = shape;
        match self {
            Device::Cpu(_) => Ok(()),
            #[cfg(lowbit_cuda)]
            Device::Cuda(_) => cuda::ops::check_attention(shape),
        }
    }

    /// Causal attention of the batch's queries over the paged cache (which already holds this step's keys):
    /// `out` `[m, num_heads * head_dim]` in the activation dtype.
    pub fn attention(
        &self,
        out: &mut Tensor,
        qkv: &Tensor,
        cache: &KvLayer,
        meta: &BatchMeta,
        shape: &AttentionShape,
    ) -> Result<()> {
        require("attention out", out, self.activation_dtype(), meta.m * shape.num_heads * shape.head_dim)?;
        require("attention qkv", qkv, self.activation_dtype(), meta.m * shape.qkv_width())?;
        dispatch!(self, attention(out, qkv, cache, meta, shape))
    }

    /// Per row of `logits` (`F32` `[m, vocab]`): the lowest id of the largest logit into `ids`, and into `stats`
    /// (`F32` `[m, 3]`) the largest logit, the natural log of the sum of exponentials, and `logits[r, targets[r]]`.
    pub fn logits_stats(
        &self,
        ids: &mut Tensor,
        stats: &mut Tensor,
        logits: &Tensor,
        targets: &Tensor,
        vocab: usize,
        m: usize,
    ) -> Result<()> {
        require("logits_stats ids", ids, DType::U32, m)?;
        require("logits_stats stats", stats, DType::F32, 3 * m)?;
        require("logits_stats logits", logits, DType::F32, m * vocab)?;
        require("logits_stats targets", targets, DType::U32, m)?;
        dispatch!(self, logits_stats(ids, stats, logits, targets, vocab, m))
    }
}

/// Fails unless `tensor` has `dtype` and at least `len` elements.
fn require(op: &'static str, tensor: &Tensor, dtype: DType, len: usize) -> Result<()> {
    if tensor.dtype() == dtype && tensor.len() >= len {
        return Ok(());
    }
    Err(Error::Shape {
        op,
        expected: format!("at least {len} elements of {dtype}"),
        got: format!("{} of {}", tensor.len(), tensor.dtype()),
    })
}

fn require_act(op: &'static str, device: &Device, out: &Act, emit: Emit<'_>, m: usize, k: usize) -> Result<()> {
    if let Some(order) = emit.order {
        require(op, order, DType::U32, k)?;
    }
    if emit.quant == ActQuant::None {
        return require(op, &out.floats, device.activation_dtype(), m * k);
    }
    if emit.quant == ActQuant::DynamicAsymmetric {
        require(op, &out.zeros, DType::I32, m)?;
    }
    if let ActQuant::LlmInt8 { .. } = emit.quant {
        require(op, &out.floats, device.activation_dtype(), m * k)?;
        require(op, &out.outliers, DType::U32, m * Act::outlier_words(k))?;
    }
    require_codes(op, out, m * k, m)
}

fn require_codes(op: &'static str, out: &Act, codes: usize, scales: usize) -> Result<()> {
    let dtype = if out.codes.dtype() == DType::U8 { DType::U8 } else { DType::I8 };
    require(op, &out.codes, dtype, codes)?;
    require(op, &out.scales, DType::F32, scales)
}
