//! What the ops of [`Device`](super::Device) take beside inputs and weights of linear layers: where outputs go, and the shapes and
//! rows of attention.

use super::tensor::Tensor;

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
}

impl BatchMeta {
    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        let BatchMeta {
            token_ids, positions, slot_mapping, block_tables, context_lens, cu_seqlens_q, logit_rows, ..
        } = self;
        let tensors = [token_ids, positions, slot_mapping, block_tables, context_lens, cu_seqlens_q, logit_rows];
        tensors.map(Tensor::bytes).iter().sum()
    }
}

/// Keys and values of one layer: two `[num_blocks, block_size, num_kv_heads, head_dim]` tensors.
#[derive(Debug)]
pub struct KvLayer {
    /// Keys, rotated.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
}
