//! What a GPU could reach with a model at best: the roofline of whole steps, from data sheets.
//!
//! A step takes at least as long as its bytes do at the memory's peak rate and its operations at the tensor cores'; nothing
//! else is counted. No program reaches it; `bench` says how near this one comes.

use crate::checkpoint::ModelConfig;
use crate::device::{Packing, Target};
use crate::dtype::DType;
use crate::error::Result;
use crate::layers::KvCache;
use crate::quant::{ActQuant, Scheme};

use super::spec::{ModelSpec, attention_shape};

/// A GPU by its data sheet: peak rates without sparsity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gpu {
    /// Name as flags have it.
    pub name: &'static str,
    /// Compute capability, `10 * major + minor`.
    pub sm: u32,
    /// Memory that programs can have, rounded down.
    pub memory_bytes: u64,
    /// Bytes a second.
    pub bandwidth: f64,
    /// Operations a second of 16-bit tensor-core products with f32 sums, two for each multiply-add.
    pub f16: f64,
    /// Likewise of int8 products.
    pub int8: f64,
}

const fn gpu(name: &'static str, sm: u32, gib: u64, gb_per_s: f64, tflops: f64, tops: f64) -> Gpu {
    Gpu { name, sm, memory_bytes: gib << 30, bandwidth: gb_per_s * 1e9, f16: tflops * 1e12, int8: tops * 1e12 }
}

impl Gpu {
    /// What models take there, with activations in `dtype`.
    pub fn target(&self, dtype: DType) -> Target {
        Target { dtype, packing: Packing::Cuda { sm90: self.sm == 90 } }
    }
}

/// The GPUs that plans can be made for (NVIDIA's data sheets; SXM boards where there are several).
pub const GPUS: [Gpu; 9] = [
    gpu("a100-40gb", 80, 39, 1555.0, 312.0, 624.0),
    gpu("a100-80gb", 80, 79, 2039.0, 312.0, 624.0),
    gpu("h100-80gb", 90, 79, 3350.0, 989.0, 1979.0),
    gpu("h200-141gb", 90, 139, 4800.0, 989.0, 1979.0),
    gpu("l40s", 89, 44, 864.0, 362.0, 733.0),
    gpu("l4", 89, 22, 300.0, 121.0, 242.0),
    gpu("a10", 86, 22, 600.0, 125.0, 250.0),
    gpu("rtx-4090", 89, 23, 1008.0, 165.0, 660.0),
    gpu("rtx-3090", 86, 23, 936.0, 71.0, 284.0),
];

/// What one forward pass of a model costs, whatever runs it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// Weights that a pass reads: linear layers and head, without the embedding.
    weight_bytes: f64,
    /// Keys and values of one token.
    kv_bytes: f64,
    /// Multiply-adds of a row through the decoder, by the tensor cores' kind: 16 bit, int8.
    macs: [f64; 2],
    /// Those of the head, for rows whose logits are wanted; 16 bit.
    head_macs: f64,
    /// Those of attention for one row and one token that it sees; 16 bit.
    attention_macs: f64,
}

impl Work {
    /// Of a model whose linear layers have the schemes that `scheme` tells by module name, on a `target`.
    ///
    /// # Errors
    /// Those of `scheme`.
    pub fn new(config: &ModelConfig, target: Target, mut scheme: impl FnMut(&str) -> Result<Scheme>) -> Result<Work> {
        let (mut weight_bytes, mut macs, mut head_macs) = (0.0, [0.0; 2], 0.0);
        let spec = ModelSpec::new(config);
        for linear in spec.linears().chain([&spec.head]) {
            let (scheme, count) = (scheme(&linear.name)?, (linear.n * linear.k) as f64);
            weight_bytes += target.packed_bytes(&scheme, linear.n, linear.k, linear.bias) as f64;
            match scheme.activation {
                _ if linear.name == spec.head.name => head_macs = count,
                ActQuant::None => macs[0] += count,
                _ => macs[1] += count,
            }
        }
        let shape = attention_shape(config, None);
        Ok(Work {
            weight_bytes,
            kv_bytes: KvCache::bytes_per_token(target.dtype, &shape, config.num_layers) as f64,
            macs,
            head_macs,
            attention_macs: (2 * config.num_heads * config.head_dim * config.num_layers) as f64,
        })
    }

    /// Least seconds of a step that gives each of `seqs` sequences one token, each behind `context` others.
    pub fn decode_seconds(&self, gpu: &Gpu, seqs: usize, context: usize) -> f64 {
        let (seqs, context) = (seqs as f64, context as f64);
        let bytes = self.weight_bytes + seqs * context * self.kv_bytes;
        let f16 = seqs * (self.macs[0] + self.head_macs + context * self.attention_macs);
        (bytes / gpu.bandwidth).max(2.0 * (f16 / gpu.f16 + seqs * self.macs[1] / gpu.int8))
    }

    /// Least seconds of a prompt of `tokens`, and its first token.
    pub fn prefill_seconds(&self, gpu: &Gpu, tokens: usize) -> f64 {
        let tokens = tokens as f64;
        let bytes = self.weight_bytes + tokens * self.kv_bytes;
        // Each row sees itself and all before it.
        let attention = tokens * (tokens + 1.0) / 2.0 * self.attention_macs;
        let f16 = tokens * self.macs[0] + self.head_macs + attention;
        (bytes / gpu.bandwidth).max(2.0 * (f16 / gpu.f16 + tokens * self.macs[1] / gpu.int8))
    }

    /// Bytes of keys and values of one token.
    pub fn kv_bytes_per_token(&self) -> u64 {
        self.kv_bytes as u64
    }
}

#[cfg(test)]
mod tests {
    use super::super::dummy_config;
    use super::*;

    /// Llama-3.1-8B by hand: 218,103,808 weights a layer, 32 layers, a head of 128,256 x 4096; 8 KV heads of 128.
    #[test]
    fn an_8b_llama() {
        let config = dummy_config("llama-3.1-8b").expect("a shape");
        let dense = Scheme::dense(DType::BF16);
        let gpu = &GPUS[1];
        let work = Work::new(&config, gpu.target(DType::BF16), |_| Ok(dense)).expect("a scheme for all");
        let (layers, head) = (32.0 * 218_103_808.0, 128_256.0 * 4096.0);
        let near = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 1e-9, "{got} {want}");
        assert_eq!(work.kv_bytes_per_token(), 2 * 32 * 8 * 128 * 2);
        near(work.decode_seconds(gpu, 1, 0), 2.0 * (layers + head) / 2039e9);
        // 256 sequences: keys and values of 1024 tokens each are read, which takes longer than the products.
        let bytes = 2.0 * (layers + head) + 256.0 * 1024.0 * 131_072.0;
        near(work.decode_seconds(gpu, 256, 1024), bytes / 2039e9);
        // A prompt: products, half a square of attention with 32 heads of 128.
        let attention = 2048.0 * 2049.0 / 2.0 * 2.0 * 32.0 * 128.0 * 32.0;
        near(work.prefill_seconds(gpu, 2048), 2.0 * (2048.0 * layers + head + attention) / 312e12);
        // int8 products at twice the rate, the head in 16 bit.
        let int8 = Scheme { weight_bits: 8, activation: ActQuant::DynamicPerToken, ..dense };
        let work = Work::new(&config, gpu.target(DType::BF16), |name| Ok(if name == "lm_head" { dense } else { int8 }))
            .expect("schemes");
        let time = 2.0 * (2048.0 * layers / 624e12 + (head + attention) / 312e12);
        near(work.prefill_seconds(gpu, 2048), time);
    }
}
