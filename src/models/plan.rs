//! What a model will take of a device's memory, counted before anything is allocated.

use crate::checkpoint::{Expected, ModelConfig};
use crate::device::{Act, AttentionShape, Device};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layers::KvCache;
use crate::quant::{ActQuant, Scheme};

use super::decoder::Limits;
use super::load::{expected_tensors, linear_shapes};

/// What the bytes of a model depend on beside the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Type of activations, and of weights that are not quantized.
    pub dtype: DType,
    /// Ternary weights take 2 bits; else 4.
    pub packs_ternary: bool,
}

impl From<&Device> for Target {
    fn from(device: &Device) -> Target {
        Target { dtype: device.activation_dtype(), packs_ternary: device.packs_ternary() }
    }
}

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
        target: Target,
        mut scheme: impl FnMut(&str) -> Result<Scheme>,
    ) -> Result<MemoryPlan> {
        let (mut weights, mut packing) = (0, 0);
        for (name, n, k) in linear_shapes(config) {
            let scheme = scheme(&name)?;
            weights += resident_bytes(&scheme, n, k, target);
            // Gate and up are packed as one.
            packing = packing.max(2 * packing_bytes(&scheme, n, k));
        }
        // The embedding stays 16-bit; norms become f32.
        for expected in expected_tensors(config) {
            let Expected::Tensor { shape, .. } = expected else { continue };
            let size = if shape.len() == 2 { 2 } else { 4 };
            weights += size * shape.iter().product::<usize>() as u64;
        }
        let per_token = KvCache::bytes_per_token(target.dtype, &attention_shape(config, None), config.num_layers);
        let rope = (limits.max_model_len * config.head_dim * 4) as u64;
        Ok(MemoryPlan {
            weights: weights + rope,
            kv_cache: per_token.saturating_mul((limits.kv_blocks * KvCache::BLOCK_SIZE) as u64),
            scratch: scratch_bytes(config, limits, target.dtype),
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

/// Bytes of one linear layer of `scheme` in device memory at most: codes at the width of their container, an f32 scale and zero
/// point a group, bias left out.
pub(super) fn resident_bytes(scheme: &Scheme, n: usize, k: usize, target: Target) -> u64 {
    let (n, k) = (n as u64, k as u64);
    if scheme.is_dense() {
        return n * k * (target.dtype.size_bytes() as u64).min(u64::from(scheme.weight_bits) / 8);
    }
    let container = match scheme.weight_bits {
        ..=4 if target.packs_ternary && is_ternary(scheme, k) => 2,
        ..=4 => 4,
        _ => 8,
    };
    let groups = scheme.group_size.map_or(1, |g| k.div_ceil(g as u64));
    n * k * container / 8 + n * groups * 8
}

/// Whether the kernels of ternary weights take all of `scheme` with `k` inputs. Of an asymmetric weight codes would have to be seen.
fn is_ternary(scheme: &Scheme, k: u64) -> bool {
    let takes_int8 = !matches!(scheme.activation, ActQuant::None | ActQuant::LlmInt8 { .. });
    let one_scale = scheme.group_size.is_none() && scheme.symmetric && scheme.codebook.is_none();
    scheme.weight_bits == 2 && takes_int8 && one_scale && k.is_multiple_of(16) && k <= 1 << 16
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ternary_weights_take_two_bits_where_kernels_read_them() {
        let ternary = Scheme { weight_bits: 2, activation: ActQuant::DynamicPerToken, ..Scheme::dense(DType::BF16) };
        let bytes = |packs_ternary, scheme: Scheme, k| {
            resident_bytes(&scheme, 64, k, Target { dtype: DType::BF16, packs_ternary })
        };
        assert_eq!(bytes(true, ternary, 256), 64 * (256 / 4 + 8));
        assert_eq!(bytes(false, ternary, 256), 64 * (256 / 2 + 8));
        for scheme in [
            Scheme { weight_bits: 3, ..ternary },
            Scheme { symmetric: false, ..ternary },
            Scheme { activation: ActQuant::None, ..ternary },
        ] {
            assert_eq!(bytes(true, scheme, 256), 64 * (256 / 2 + 8), "{scheme}");
        }
        assert_eq!(bytes(true, Scheme { group_size: Some(128), ..ternary }, 256), 64 * (256 / 2 + 2 * 8));
        assert_eq!(bytes(true, ternary, 264), 64 * (264 / 2 + 8), "rows of x that do not start on 16 bytes");
    }
}
