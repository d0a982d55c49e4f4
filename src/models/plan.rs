//! What a model will take of a device's memory, counted before anything is allocated.

use crate::checkpoint::{Expected, ModelConfig};
use crate::device::{Act, AttentionShape};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layers::KvCache;
use crate::quant::Scheme;

use super::decoder::Limits;
use super::load::{expected_tensors, linear_shapes};

/// Bytes a model takes on its device, by use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights, norms, embedding and rotary table.
    pub weights: u64,
    /// Keys and values.
    pub kv_cache: u64,
    /// Activations, logits and batch metadata.
    pub scratch: u64,
    /// Most that packing takes beside the weights: codes of one layer as they are in the file, its scales and zero points as
    /// f32. Given back before the KV cache and scratch are allocated.
    pub packing: u64,
}

impl MemoryPlan {
    /// The plan of a model whose linear layers have the schemes that `scheme` tells by module name.
    ///
    /// # Errors
    /// Those of `scheme`.
    pub fn new(
        config: &ModelConfig,
        limits: &Limits,
        dtype: DType,
        mut scheme: impl FnMut(&str) -> Result<Scheme>,
    ) -> Result<MemoryPlan> {
        let (mut weights, mut packing) = (0, 0);
        for (name, n, k) in linear_shapes(config) {
            let scheme = scheme(&name)?;
            weights += resident_bytes(&scheme, n, k, dtype);
            // Gate and up are packed as one.
            packing = packing.max(2 * packing_bytes(&scheme, n, k));
        }
        // The embedding stays 16-bit; norms become f32.
        for expected in expected_tensors(config) {
            let Expected::Tensor { shape, .. } = expected else { continue };
            let size = if shape.len() == 2 { 2 } else { 4 };
            weights += size * shape.iter().product::<usize>() as u64;
        }
        let per_token = KvCache::bytes_per_token(dtype, &attention_shape(config, None), config.num_layers);
        let rope = (limits.max_model_len * config.head_dim * 4) as u64;
        Ok(MemoryPlan {
            weights: weights + rope,
            kv_cache: per_token.saturating_mul((limits.kv_blocks * KvCache::BLOCK_SIZE) as u64),
            scratch: scratch_bytes(config, limits, dtype),
            packing,
        })
    }

    /// All that is needed at once.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.kv_cache.saturating_add(self.scratch).max(self.packing))
    }

    /// Fails when the plan needs more than `free` bytes.
    pub fn check(&self, free: u64) -> Result<()> {
        if self.total() <= free {
            return Ok(());
        }
        let advice = if self.weights + self.scratch < free {
            "Lower --max-model-len: the weights fit, the KV cache does not"
        } else {
            "Use a model with fewer or smaller weights, or another device"
        };
        Err(Error::OutOfMemory {
            what: format!(
                "the model ({} weights, {} KV cache, {} scratch bytes)",
                self.weights, self.kv_cache, self.scratch
            ),
            needed_bytes: self.total(),
            free_bytes: free,
            advice: advice.into(),
        })
    }
}

/// Bytes of one linear layer of `scheme` in device memory at most: codes at their container width (4 bits up to 4, else 8;
/// ternary weights take half of it on sm_90), an f32 scale and zero point a group, bias left out.
pub fn resident_bytes(scheme: &Scheme, n: usize, k: usize, dtype: DType) -> u64 {
    let (n, k) = (n as u64, k as u64);
    if scheme.is_dense() {
        return n * k * (dtype.size_bytes() as u64).min(u64::from(scheme.weight_bits) / 8);
    }
    let container = if scheme.weight_bits <= 4 { 4 } else { 8 };
    let groups = scheme.group_size.map_or(1, |g| k.div_ceil(g as u64));
    n * k * container / 8 + n * groups * 8
}

/// Bytes that packing a layer takes beside its result: codes, one to a byte at most, scales and zero points.
fn packing_bytes(scheme: &Scheme, n: usize, k: usize) -> u64 {
    let (n, k) = (n as u64, k as u64);
    let groups = scheme.group_size.map_or(1, |g| k.div_ceil(g as u64));
    if scheme.is_dense() { 0 } else { n * k + n * groups * 8 }
}

/// Attention shape of one layer.
pub fn attention_shape(config: &ModelConfig, window: Option<usize>) -> AttentionShape {
    AttentionShape {
        num_heads: config.num_heads,
        num_kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        scale: 1.0 / (config.head_dim as f32).sqrt(),
        window,
        block_size: KvCache::BLOCK_SIZE,
    }
}

/// Widest input of any linear layer.
pub(super) fn widest_input(config: &ModelConfig) -> usize {
    config.hidden_size.max(config.intermediate_size).max(config.num_heads * config.head_dim)
}

fn scratch_bytes(config: &ModelConfig, limits: &Limits, dtype: DType) -> u64 {
    let act = widest_input(config) * (dtype.size_bytes() + 1) + 4 * Act::outlier_words(widest_input(config)) + 8;
    let shape = attention_shape(config, None);
    let row = 2 * act
        + config.hidden_size * 4
        + (shape.qkv_width() + config.num_heads * config.head_dim + 2 * config.intermediate_size) * dtype.size_bytes();
    let logit_row = (config.vocab_size + config.hidden_size) * 4 + 24;
    (limits.max_batch_tokens * (row + 12) + limits.max_logit_rows * logit_row) as u64
}
