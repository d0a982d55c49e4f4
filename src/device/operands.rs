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

/// Keys and values of one layer: two `[num_blocks, block_size, num_kv_heads, head_dim]` tensors.
#[derive(Debug)]
pub struct KvLayer {
    /// Keys, rotated.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
}

/// Norms of query and key heads (Qwen3).
#[derive(Debug, Clone, Copy)]
pub struct HeadNorms<'a> {
    /// `F32` `[head_dim]` weight of the query heads.
    pub q: &'a Tensor,
    /// `F32` `[head_dim]` weight of the key heads.
    pub k: &'a Tensor,
    /// Added to the mean of squares.
    pub eps: f32,
}

/// What rotation and the cache need to know of each row.
#[derive(Debug, Clone, Copy)]
pub struct RopeRows<'a> {
    /// `F32` `[positions, head_dim]`: `head_dim / 2` cosines, then as many sines.
    pub table: &'a Tensor,
    /// `[m]` `U32` position of each row, below those of `table`.
    pub positions: &'a Tensor,
    /// `[m]` `U32` KV slot each row writes; `u32::MAX` writes nowhere.
    pub slot_mapping: &'a Tensor,
}
