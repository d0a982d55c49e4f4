//! The paged KV cache: keys and values of all layers in blocks of a fixed number of tokens.

use crate::device::{AttentionShape, Device, KvLayer};
use crate::dtype::DType;
use crate::error::Result;

/// Keys and values of every layer. A sequence owns whole blocks, the same numbers in each layer.
#[derive(Debug)]
pub struct KvCache {
    /// One pair of tensors a layer.
    pub layers: Vec<KvLayer>,
    /// Blocks of each layer.
    pub num_blocks: usize,
    /// Tokens in a block.
    pub block_size: usize,
}

impl KvCache {
    /// Tokens in a block: small enough that short sequences waste little, large enough for 16-row attention tiles.
    pub const BLOCK_SIZE: usize = 16;

    /// Allocates `num_blocks` blocks in each of `num_layers` layers, in the device's activation dtype.
    pub fn new(device: &Device, shape: &AttentionShape, num_layers: usize, num_blocks: usize) -> Result<KvCache> {
        let len = num_blocks * shape.block_size * shape.num_kv_heads * shape.head_dim;
        let dtype = device.activation_dtype();
        let layers = (0..num_layers)
            .map(|_| Ok(KvLayer { k: device.zeros(dtype, len)?, v: device.zeros(dtype, len)? }))
            .collect::<Result<_>>()?;
        Ok(KvCache { layers, num_blocks, block_size: shape.block_size })
    }

    /// Bytes that one token takes in all layers.
    pub fn bytes_per_token(dtype: DType, shape: &AttentionShape, num_layers: usize) -> u64 {
        2 * (num_layers * shape.num_kv_heads * shape.head_dim * dtype.size_bytes()) as u64
    }
}
