//! Devices, their tensors, and the op table: every operation a model needs, by one name on every device.
//!
//! The CPU device is the specification (`cpu::reference`) and the default where there is no GPU; the CUDA device
//! is checked against it. An op's letters: `m` rows (tokens), `n` outputs, `k` reduction; the destination comes
//! first. Activations are `f32` on the CPU and `f16` or `bf16` on CUDA ([`Device::activation_dtype`]); the
//! residual stream and the logits are `f32` on both.

mod batch_meta;
pub mod cpu;
#[cfg(lowbit_cuda)]
pub mod cuda;
mod epilogue;
mod linear_input;
mod meta;
mod operands;
mod packed_weight;
mod recorded;
pub(crate) mod tensor;

use std::path::Path;

pub(crate) use batch_meta::DecodeGrid;
pub use batch_meta::{BatchMeta, BatchRows, BatchSizes};
pub use cpu::reference::SampleRow;
pub use epilogue::{Activation, Epilogue, GROUP_OUTPUTS, Output};
pub use linear_input::{ActOrder, InputFormat, LinearInput, OrderId};
pub use meta::{MetaDevice, Packing, Target};
pub use operands::{AttentionShape, Columns, HeadNorms, KvLayer, RopeRows, Write};
pub(crate) use packed_weight::PackedBody;
pub use packed_weight::PackedWeight;
pub(crate) use recorded::Recorded;
pub use tensor::Tensor;

use crate::dtype::{DType, HostData};
use crate::error::{Error, Result};
use crate::quant::{ActQuant, LinearWeight};

/// Where tensors live and ops run.
#[derive(Debug, Clone)]
pub enum Device {
    /// Host memory and threads.
    Cpu(cpu::CpuDevice),
    /// No memory at all: tensors are counted, for a plan.
    Meta(MetaDevice),
    /// One NVIDIA GPU.
    #[cfg(lowbit_cuda)]
    Cuda(cuda::CudaDevice),
}

/// One op table line: the CPU arm and the CUDA arm of a method.
macro_rules! dispatch {
    ($self:expr, $op:ident ( $($arg:expr),* )) => {
        match $self {
            Device::Cpu(d) => cpu::ops::$op(d, $($arg),*),
            Device::Meta(_) => meta::no_elements(stringify!($op)),
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
            Device::Cpu(_) | Device::Meta(_) => self,
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
            Device::Cpu(_) | Device::Meta(_) => {
                let _ = file;
                Ok(self)
            }
            #[cfg(lowbit_cuda)]
            Device::Cuda(d) => Ok(Device::Cuda(d.tuned_by(&cuda::Tuned::read(file)?)?)),
        }
    }

    /// `cpu` or `cuda`.
    pub fn name(&self) -> &'static str {
        match self {
            Device::Cpu(_) => "cpu",
            Device::Meta(_) => "meta",
            #[cfg(lowbit_cuda)]
            Device::Cuda(_) => "cuda",
        }
    }

    /// Whether steps are to be recorded ([`Device::record`]): memory for their metadata is planned then.
    pub(crate) fn has_graphs(&self) -> bool {
        match self {
            Device::Cpu(_) => false,
            Device::Meta(d) => d.has_graphs(),
            #[cfg(lowbit_cuda)]
            Device::Cuda(_) => true,
        }
    }

    /// Type of activations between ops.
    pub fn activation_dtype(&self) -> DType {
        match self {
            Device::Cpu(_) => DType::F32,
            Device::Meta(d) => d.dtype(),
            #[cfg(lowbit_cuda)]
            Device::Cuda(d) => d.dtype(),
        }
    }

    /// Free and total bytes of the device's memory.
    pub fn memory(&self) -> Result<(u64, u64)> {
        dispatch!(self, memory())
    }

    /// A tensor of `len` zeros.
    pub fn zeros(&self, dtype: DType, len: usize) -> Result<Tensor> {
        if let Device::Meta(d) = self {
            return Ok(d.tensor(dtype, len));
        }
        dispatch!(self, zeros(dtype, len))
    }

    /// Tensors of so many zeros each, which [`Device::write_together`] fills at once.
    pub(crate) fn zeros_together<const N: usize>(&self, dtype: DType, lens: [usize; N]) -> Result<[Tensor; N]> {
        #[cfg(lowbit_cuda)]
        if let Device::Cuda(d) = self {
            return cuda::ops::zeros_together(d, dtype, lens);
        }
        let tensors = lens.into_iter().map(|len| self.zeros(dtype, len)).collect::<Result<Vec<_>>>()?;
        tensors.try_into().map_err(|_| Error::Shape {
            op: "zeros_together",
            expected: format!("{N} tensors"),
            got: "fewer".into(),
        })
    }

    /// Overwrites the start of each of the `U32` tensors that one [`Device::zeros_together`] made, in its order, with its part of `data`; what
    /// lies behind that start is undefined afterwards.
    pub(crate) fn write_together<const N: usize>(&self, dst: [&mut Tensor; N], data: [&[u32]; N]) -> Result<()> {
        #[cfg(lowbit_cuda)]
        if let Device::Cuda(d) = self {
            return cuda::ops::write_together(d, dst, data);
        }
        dst.into_iter().zip(data).try_for_each(|(dst, data)| self.write(dst, &HostData::U32(data.to_vec())))
    }

    /// Moves host elements to the device.
    pub fn upload(&self, data: HostData) -> Result<Tensor> {
        if let Device::Meta(d) = self {
            return Ok(d.tensor(data.dtype(), data.len()));
        }
        dispatch!(self, upload(data))
    }

    /// [`Device::upload`] of `len` elements of `dtype` that `make` makes; a planning device does without them.
    pub fn upload_with(&self, dtype: DType, len: usize, make: impl FnOnce() -> HostData) -> Result<Tensor> {
        if let Device::Meta(d) = self {
            return Ok(d.tensor(dtype, len));
        }
        let tensor = self.upload(make())?;
        require("upload_with", &tensor, dtype, len)?;
        Ok(tensor)
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
        match self {
            Device::Cpu(d) => cpu::ops::pack(d, weight, epilogue),
            Device::Meta(_) => meta::no_elements("pack"),
            #[cfg(lowbit_cuda)]
            Device::Cuda(d) => {
                let (n, k, scheme) = (weight.n(), weight.k(), weight.scheme());
                let (packed, order) = cuda::ops::pack(d, weight, epilogue)?;
                let order = order.map(|order| ActOrder::upload(self, order)).transpose()?;
                let body = PackedBody::Cuda(Box::new(packed));
                Ok(PackedWeight { n, k, scheme, epilogue, order, output_order: None, body })
            }
        }
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

    /// `out = x / sqrt(mean(x^2) + eps) * weight` in `format` per row; `x` `F32` `[m, k]`, `weight` `F32` `[k]`.
    pub fn rms_norm(
        &self,
        out: &mut LinearInput,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
        format: InputFormat<'_>,
        m: usize,
    ) -> Result<()> {
        let k = weight.len();
        require("rms_norm x", x, DType::F32, m * k)?;
        produce("rms_norm", self, out, format, [m, k], |out| dispatch!(self, rms_norm(out, x, weight, eps, format, m)))
    }

    /// [`Device::rms_norm`] of activations `x` `[m, k]`, or where `gated` of `relu(gate)^2 * up` with `x` `[m, 2 * k]`, gate in the
    /// first `k` columns: the norms inside attention and MLP of BitNet. `x` in the activation dtype, `weight` `F32` `[k]`.
    #[allow(clippy::too_many_arguments)] // of rms_norm, and where the row comes from
    pub fn sub_norm(
        &self,
        out: &mut LinearInput,
        x: &Tensor,
        gated: bool,
        weight: &Tensor,
        eps: f32,
        format: InputFormat<'_>,
        m: usize,
    ) -> Result<()> {
        let k = weight.len();
        require("sub_norm x", x, self.activation_dtype(), m * k * if gated { 2 } else { 1 })?;
        produce("sub_norm", self, out, format, [m, k], |out| {
            dispatch!(self, sub_norm(out, x, gated, weight, eps, format, m))
        })
    }

    /// `out = silu(gate) * up` in `format` per row, `silu(g) = g / (1 + exp(-g))`; `gate_up` `[m, 2 * k]`, gate in the
    /// first `k` columns, in the activation dtype.
    pub fn silu_mul(
        &self,
        out: &mut LinearInput,
        gate_up: &Tensor,
        k: usize,
        format: InputFormat<'_>,
        m: usize,
    ) -> Result<()> {
        require("silu_mul gate_up", gate_up, self.activation_dtype(), m * 2 * k)?;
        produce("silu_mul", self, out, format, [m, k], |out| dispatch!(self, silu_mul(out, gate_up, k, format, m)))
    }

    /// `out = x` in `format` per row; `x` `[m, k]` in the activation dtype. Quantizes or gathers what no producer could.
    pub fn quantize(
        &self,
        out: &mut LinearInput,
        x: &Tensor,
        k: usize,
        format: InputFormat<'_>,
        m: usize,
    ) -> Result<()> {
        require("quantize x", x, self.activation_dtype(), m * k)?;
        produce("quantize", self, out, format, [m, k], |out| dispatch!(self, quantize(out, x, k, format, m)))
    }

    /// `out[r, columns] (+)= activation(x[r, :] * w^T + bias)` for `r < m`, the activation that of the weight's epilogue,
    /// whose output must be [`Output::Floats`].
    ///
    /// `x` must hold what the weight reads ([`PackedWeight::input_format`]). `out` is `F32` or the
    /// activation dtype; `Write::Add` needs `F32`. W8A8 results are the same bits on every device, for every `m`.
    pub fn linear(
        &self,
        out: &mut Tensor,
        columns: Columns,
        x: &LinearInput,
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
        x.require("linear", w.input_format(), m, w.k)?;
        match self {
            Device::Cpu(d) => cpu::ops::linear(d, out, columns, x, w, write, m),
            Device::Meta(_) => meta::no_elements("linear"),
            #[cfg(lowbit_cuda)]
            Device::Cuda(d) => cuda::ops::linear(d, out, columns, x, w.cuda("linear")?, write, m),
        }
    }

    /// `out = codes of activation(x * w^T + bias)` for `m` rows, quantized as the weight's epilogue says, in one launch:
    /// the input of the next linear layer. `out.codes` is `[m, outputs]`, `I8` or `U8`; `out.scales` gets one scale a row
    /// (a row whose input has a scale that is not finite: NaN), for [`Output::Groups`] `[m, ceil(outputs / 128)]`.
    ///
    /// The bits are the same on every device, for every `m`.
    pub fn linear_codes(&self, out: &mut LinearInput, x: &LinearInput, w: &PackedWeight, m: usize) -> Result<()> {
        if w.epilogue.output == Output::Floats {
            let (expected, got) = ("a weight whose epilogue quantizes".into(), format!("{:?}", w.epilogue));
            return Err(Error::Shape { op: "linear_codes", expected, got });
        }
        require_codes("linear_codes", out, m * w.outputs(), m * w.epilogue.scales(w.n))?;
        if m == 0 {
            return Ok(());
        }
        x.require("linear_codes", w.input_format(), m, w.k)?;
        out.forget();
        match self {
            Device::Cpu(d) => cpu::ops::linear_codes(d, out, x, w, m),
            Device::Meta(_) => meta::no_elements("linear_codes"),
            #[cfg(lowbit_cuda)]
            Device::Cuda(d) => cuda::ops::linear_codes(d, out, x, w.cuda("linear_codes")?, m),
        }?;
        if let Some(quant) = w.epilogue.output.as_input() {
            out.record_ordered(w.output_order, quant, m, w.outputs());
        }
        Ok(())
    }

    /// What lies between the qkv projection and attention, for `m` rows of `qkv` `[m, qkv_width]`: RMSNorm of query and key heads where
    /// there is a `norm`, then their rotation in place, pairs being `(i, i + head_dim / 2)`; keys and values go to the row's slot of
    /// the paged cache.
    pub fn rope_kv_write(
        &self,
        cache: &mut KvLayer,
        qkv: &mut Tensor,
        norm: Option<HeadNorms<'_>>,
        rows: RopeRows<'_>,
        shape: &AttentionShape,
        m: usize,
    ) -> Result<()> {
        require("rope_kv_write qkv", qkv, self.activation_dtype(), m * shape.qkv_width())?;
        require("rope_kv_write positions", rows.positions, DType::U32, m)?;
        require("rope_kv_write slot_mapping", rows.slot_mapping, DType::U32, m)?;
        for weight in norm.iter().flat_map(|norm| [norm.q, norm.k]) {
            require("rope_kv_write norm", weight, DType::F32, shape.head_dim)?;
        }
        dispatch!(self, rope_kv_write(cache, qkv, norm, rows, shape, m))
    }

    /// Fails when this device has no attention kernel for `shape`. Asked before a model's weights are read.
    ///
    /// # Errors
    /// `Unsupported`, naming the limit.
    pub fn check_attention(&self, shape: &AttentionShape) -> Result<()> {
        let _ = shape;
        match self {
            Device::Cpu(_) | Device::Meta(_) => Ok(()),
            #[cfg(lowbit_cuda)]
            Device::Cuda(_) => cuda::ops::check_attention(shape),
        }
    }

    /// How the keys of sequences that decode are cut into parts for attention of `shape`; `None` where nothing is cut.
    pub(crate) fn decode_grid(&self, shape: &AttentionShape) -> Option<DecodeGrid> {
        let _ = shape;
        match self {
            Device::Cpu(_) | Device::Meta(_) => None,
            #[cfg(lowbit_cuda)]
            Device::Cuda(d) => cuda::ops::decode_grid(d, shape),
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

    /// In place of an id: a logit of the row is NaN or infinite above.
    pub const NOT_FINITE: u32 = u32::MAX;
    /// In place of an id: all logits of the row are negative infinity.
    pub const NO_TOKEN: u32 = u32::MAX - 1;

    /// For each of `m` rows of `logits` (`F32` `[m, vocab]`) the id that is drawn from it into `ids`, as its row of `rows` says
    /// ([`SampleRow::words`], `U32` `[m, 8]`), by [`cpu::reference::sample`]: the same on every device.
    pub fn sample(&self, ids: &mut Tensor, rows: &Tensor, logits: &Tensor, vocab: usize, m: usize) -> Result<()> {
        require("sample ids", ids, DType::U32, m)?;
        require("sample rows", rows, DType::U32, SampleRow::WORDS * m)?;
        require("sample logits", logits, DType::F32, m * vocab)?;
        if m == 0 {
            return Ok(());
        }
        dispatch!(self, sample(ids, rows, logits, vocab, m))
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

/// Runs `op`, which writes `[m, k]` into `out` in `format`: its buffers are checked before, what they hold recorded after.
fn produce(
    name: &'static str,
    device: &Device,
    out: &mut LinearInput,
    format: InputFormat<'_>,
    [m, k]: [usize; 2],
    op: impl FnOnce(&mut LinearInput) -> Result<()>,
) -> Result<()> {
    if let Some(order) = format.order {
        require(name, order.indices(), DType::U32, k)?;
    }
    let has_floats = matches!(format.quant, ActQuant::None | ActQuant::LlmInt8 { .. });
    if has_floats {
        require(name, &out.floats, device.activation_dtype(), m * k)?;
    }
    if format.quant != ActQuant::None {
        require_codes(name, out, m * k, m)?;
    }
    if format.quant == ActQuant::DynamicAsymmetric {
        require(name, &out.zero_points, DType::I32, m)?;
    }
    if let ActQuant::LlmInt8 { .. } = format.quant {
        require(name, &out.outliers, DType::U32, m * LinearInput::outlier_words(k))?;
    }
    out.forget();
    op(out)?;
    out.record(format, m, k);
    Ok(())
}

fn require_codes(op: &'static str, out: &LinearInput, codes: usize, scales: usize) -> Result<()> {
    let dtype = if out.codes.dtype() == DType::U8 { DType::U8 } else { DType::I8 };
    require(op, &out.codes, dtype, codes)?;
    require(op, &out.scales, DType::F32, scales)
}
