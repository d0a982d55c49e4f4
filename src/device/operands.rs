//! What the ops of [`Device`] take: activations, where outputs go, packed weights, and the shapes and rows of attention.

#[cfg(lowbit_cuda)]
use super::cuda;
use super::epilogue::Epilogue;
use super::tensor::Tensor;
use super::{Device, cpu};
use crate::dtype::DType;
use crate::error::Result;
use crate::quant::{ActQuant, Scheme};

/// Input of linear layers: a row-major `[rows, k]` matrix, as floats, as 8-bit codes with one scale per row, or both.
///
/// Which part is valid is what the producing op's [`Emit`] asked for. Buffers are scratch: allocated once for the
/// largest batch and used from their start with a row stride of exactly `k`.
///
/// Codes are signed everywhere but in the bytes of a `U8` tensor, which holds each code plus 128: uint8 with zero point
/// `z + 128` is the same affine map as int8 with zero point `z`.
#[derive(Debug)]
pub struct Act {
    /// `[rows, k]` in the device's activation dtype; written when `Emit::quant` is [`ActQuant::None`].
    pub floats: Tensor,
    /// `[rows, k]` codes, `I8`, or `U8` (code plus 128); written otherwise.
    pub codes: Tensor,
    /// `[rows]` `F32` scales of the codes (every entry the static scale when static).
    pub scales: Tensor,
    /// `[rows]` `I32` zero points of the codes; written and read with [`ActQuant::DynamicAsymmetric`] alone.
    pub zeros: Tensor,
    /// `[rows, outlier_words(k)]` `U32`, with [`ActQuant::LlmInt8`] alone: bit `c % 32` of word `c / 32` is set where column
    /// `c` is an outlier, whose code is 0 and whose value is in `floats`; other floats are then undefined.
    pub outliers: Tensor,
}

impl Act {
    /// Zeros for `rows` rows of `k`, with int8 codes.
    pub fn new(device: &Device, rows: usize, k: usize) -> Result<Act> {
        Ok(Act {
            floats: device.zeros(device.activation_dtype(), rows * k)?,
            codes: device.zeros(DType::I8, rows * k)?,
            scales: device.zeros(DType::F32, rows)?,
            zeros: device.zeros(DType::I32, rows)?,
            outliers: device.zeros(DType::U32, rows * Act::outlier_words(k))?,
        })
    }

    /// Words of a row of `outliers`.
    pub fn outlier_words(k: usize) -> usize {
        k.div_ceil(32)
    }
}

/// What an op that produces a linear layer's input does on its way out.
#[derive(Debug, Clone, Copy)]
pub struct Emit<'a> {
    /// Act-order gather: output column `c` takes computed column `order[c]` (`U32`, `[k]`).
    pub order: Option<&'a Tensor>,
    /// Quantization of the row, after the gather.
    pub quant: ActQuant,
}

impl Emit<'_> {
    /// Plain floats in their own order.
    pub const FLOATS: Emit<'static> = Emit { order: None, quant: ActQuant::None };
}

/// Where a linear layer writes in each row of its destination.
#[derive(Debug, Clone, Copy)]
pub struct Columns {
    /// First column written.
    pub offset: usize,
    /// Elements between rows of the destination.
    pub stride: usize,
}

/// How a linear layer writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// `out = y`
    Store,
    /// `out += y` (`F32` destinations only: the residual stream).
    Add,
}

/// A linear layer's weight in one device's kernel layout. Only [`Device::pack`] makes one, so holding it proves
/// that its bytes are in the order the device's kernels read, its shapes are checked, and its order is a permutation.
#[derive(Debug)]
pub struct PackedWeight {
    /// Output channels.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// What it was packed from.
    pub scheme: Scheme,
    /// `[k]` `U32` act-order gather that the producer of the input must apply.
    pub order: Option<Tensor>,
    /// What happens to its sums before they are written.
    pub epilogue: Epilogue,
    pub(crate) body: PackedBody,
}

#[derive(Debug)]
pub(crate) enum PackedBody {
    Cpu(Box<cpu::CpuPacked>),
    #[cfg(lowbit_cuda)]
    Cuda(Box<cuda::CudaPacked>),
}

impl PackedWeight {
    /// Bytes of weights, scales, zero points and bias in device memory.
    pub fn bytes(&self) -> usize {
        match &self.body {
            PackedBody::Cpu(p) => p.bytes(),
            #[cfg(lowbit_cuda)]
            PackedBody::Cuda(p) => p.bytes(),
        }
    }

    /// Columns that it writes: its output channels, or half of them for [`SwiGlu`](super::Activation::SwiGlu).
    pub fn outputs(&self) -> usize {
        self.epilogue.outputs(self.n)
    }

    /// Name of the kernel that runs it for `m` rows, for reports.
    pub fn kernel(&self, m: usize) -> String {
        match &self.body {
            PackedBody::Cpu(p) => p.kernel(m),
            #[cfg(lowbit_cuda)]
            PackedBody::Cuda(p) => p.kernel(m),
        }
    }
}

/// Shape of the attention of one model.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Elements of a head, even.
    pub head_dim: usize,
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Sliding window: a query at position `p` sees keys at `p - window + 1 ..= p`.
    pub window: Option<usize>,
    /// Tokens in a KV block.
    pub block_size: usize,
}

impl AttentionShape {
    /// Width of the fused `[q | k | v]` row.
    pub fn qkv_width(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }
}

/// The per-step metadata of a ragged batch, on the device. Rows of all sequences are concatenated.
#[derive(Debug)]
pub struct BatchMeta {
    /// `[m]` `U32` token ids.
    pub token_ids: Tensor,
    /// `[m]` `U32` position of each row in its sequence.
    pub positions: Tensor,
    /// `[m]` `U32` KV slot (`block * block_size + offset`) each row writes; `u32::MAX` writes nowhere.
    pub slot_mapping: Tensor,
    /// `[batch, max_blocks]` `U32` block numbers of each sequence.
    pub block_tables: Tensor,
    /// `[batch]` `U32` keys of each sequence, this step's included.
    pub context_lens: Tensor,
    /// `[batch + 1]` `U32` first row of each sequence, then `m`.
    pub cu_seqlens_q: Tensor,
    /// `[logit_rows]` `U32` rows whose logits are wanted.
    pub logit_rows: Tensor,
    /// Rows.
    pub m: usize,
    /// Sequences.
    pub batch: usize,
    /// Row stride of `block_tables`.
    pub max_blocks: usize,
    /// Most rows of any sequence; 1 means pure decode.
    pub max_q_len: usize,
    /// Most keys of any sequence.
    pub max_context_len: usize,
    /// Rows whose logits are wanted.
    pub num_logit_rows: usize,
}

/// Keys and values of one layer: two `[num_blocks, block_size, num_kv_heads, head_dim]` tensors.
#[derive(Debug)]
pub struct KvLayer {
    /// Keys, rotated.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
}
