//! Models of well-known shapes with random weights: what `bench --dummy` runs where no checkpoint is at hand.

use rayon::prelude::*;

use crate::checkpoint::{Architecture, ModelConfig, RopeConfig, RopeScaling};
use crate::device::Device;
use crate::dtype::{DType, HostData};
use crate::error::{Error, Result};
use crate::layers::{Linear, RmsNorm};
use crate::quant::{ActQuant, LinearWeight, QuantWeight, Weight};

use super::decoder::{DecoderLayer, Limits, Model};
use super::plan::MemoryPlan;

/// A shape: name, architecture, hidden, intermediate, layers, heads, KV heads, head size, vocabulary, tied head.
type Shape = (&'static str, Architecture, usize, usize, usize, usize, usize, usize, usize, bool);

/// Shapes that `--dummy` knows.
pub const DUMMY_MODELS: &[Shape] = &[
    ("llama-1.1b", Architecture::Llama, 2048, 5632, 22, 32, 4, 64, 32000, false),
    ("llama-3.2-1b", Architecture::Llama, 2048, 8192, 16, 32, 8, 64, 128_256, true),
    ("llama-3.2-3b", Architecture::Llama, 3072, 8192, 28, 24, 8, 128, 128_256, true),
    ("llama-2-7b", Architecture::Llama, 4096, 11008, 32, 32, 32, 128, 32000, false),
    ("mistral-7b", Architecture::Mistral, 4096, 14336, 32, 32, 8, 128, 32768, false),
    ("llama-3.1-8b", Architecture::Llama, 4096, 14336, 32, 32, 8, 128, 128_256, false),
    ("qwen2.5-7b", Architecture::Qwen2, 3584, 18944, 28, 28, 4, 128, 152_064, false),
    ("qwen3-0.6b", Architecture::Qwen3, 1024, 3072, 28, 16, 8, 128, 151_936, true),
    ("qwen3-8b", Architecture::Qwen3, 4096, 12288, 36, 32, 8, 128, 151_936, false),
    ("llama-3.1-70b", Architecture::Llama, 8192, 28672, 80, 64, 8, 128, 128_256, false),
];

/// How linear layers of a dummy model are quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DummyScheme {
    /// Unquantized bf16.
    Bf16,
    /// `bits` of weight with 16-bit activations; group size, 0 for per channel.
    WeightOnly(u8, usize),
    /// `bits` of weight with dynamic int8 activations; group size, 0 for per channel.
    Int8(u8, usize),
}

impl DummyScheme {
    /// Parses `bf16`, `w4a16`, `w8a16`, `w8a8`, `w4a8` (any 2 to 8 bits) with a group size (0: per channel;
    /// without one per channel at 8 bits, else 128).
    pub fn parse(scheme: &str, group_size: Option<usize>) -> Result<DummyScheme> {
        let bad = || Error::input("--scheme", format!("`{scheme}` is not one of bf16, w2a16 to w8a16, w2a8 to w8a8"));
        if scheme == "bf16" {
            return Ok(DummyScheme::Bf16);
        }
        let (bits, activation) = scheme.strip_prefix('w').and_then(|s| s.split_once('a')).ok_or_else(bad)?;
        let bits: u8 = bits.parse().ok().filter(|b| (2..=8).contains(b)).ok_or_else(bad)?;
        let group_size = group_size.unwrap_or(if bits == 8 { 0 } else { 128 });
        match activation {
            "16" => Ok(DummyScheme::WeightOnly(bits, group_size)),
            "8" => Ok(DummyScheme::Int8(bits, group_size)),
            _ => Err(bad()),
        }
    }
}

/// The configuration of a known shape.
pub fn dummy_config(name: &str) -> Result<ModelConfig> {
    let Some(&(_, architecture, hidden, inner, layers, heads, kv_heads, head_dim, vocab, tied)) =
        DUMMY_MODELS.iter().find(|shape| shape.0 == name)
    else {
        let known: Vec<_> = DUMMY_MODELS.iter().map(|shape| shape.0).collect();
        return Err(Error::input("--dummy", format!("`{name}` is not a known shape; there are {}", known.join(", "))));
    };
    Ok(ModelConfig {
        architecture,
        vocab_size: vocab,
        hidden_size: hidden,
        intermediate_size: inner,
        num_layers: layers,
        num_heads: heads,
        num_kv_heads: kv_heads,
        head_dim,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: tied,
        max_position_embeddings: 131_072,
        rope: RopeConfig { theta: 500_000.0, scaling: RopeScaling::None },
        windows: vec![None; layers],
        qkv_bias: architecture == Architecture::Qwen2,
        o_bias: false,
        mlp_bias: false,
        eos_token_ids: Vec::new(),
        bos_token_id: None,
    })
}

/// A random weight of `scheme`, its values of about `1 / sqrt(k)`, the same for the same `seed`. Scales are floats of either 16-bit
/// type, as those of a checkpoint are floats of its own.
pub fn dummy_linear(scheme: DummyScheme, n: usize, k: usize, bias: bool, seed: u64) -> LinearWeight {
    let bias = bias.then(|| vec![0.01; n]);
    let deviation = 1.0 / (k as f32).sqrt();
    let (bits, group, activation) = match scheme {
        DummyScheme::Bf16 => {
            let mut bytes = vec![0; n * k];
            fill_random(&mut bytes, seed);
            let values: Vec<half::bf16> =
                bytes.par_iter().map(|&b| half::bf16::from_f32((f32::from(b) - 127.5) / 74.0 * deviation)).collect();
            let weight = Weight::Dense { n, k, data: HostData::BF16(values) };
            return LinearWeight { weight, bias, activation: ActQuant::None };
        }
        DummyScheme::WeightOnly(bits, group) => (bits, group, ActQuant::None),
        DummyScheme::Int8(bits, group) => (bits, group, ActQuant::DynamicPerToken),
    };
    let group_size = if group == 0 { k } else { group.min(k) };
    let groups = k.div_ceil(group_size);
    let mut codes = vec![0; n * k];
    fill_random(&mut codes, seed);
    codes.par_iter_mut().for_each(|c| *c >>= 8 - bits);
    let step = deviation * 3.46 / f32::from(1u16 << bits); // uniform codes: deviation of the range / sqrt(12)
    let scales = (0..n * groups).map(|i| half::bf16::from_f32(step * (1.0 + (i % 7) as f32 / 32.0)).to_f32()).collect();
    let zeros = vec![f32::from(1u16 << (bits - 1)); n * groups];
    let weight = Weight::Quant(QuantWeight {
        n,
        k,
        bits,
        group_size,
        codes: codes.into(),
        scales,
        zeros,
        order: None,
        codebook: None,
    });
    LinearWeight { weight, bias, activation }
}

/// Fills `bytes` from SplitMix64 (Steele et al. 2014), a stream of its own for every chunk.
pub(crate) fn fill_random(bytes: &mut [u8], seed: u64) {
    const CHUNK: usize = 1 << 16;
    bytes.par_chunks_mut(CHUNK).enumerate().for_each(|(i, chunk)| {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add((i as u64) << 32);
        for word in chunk.chunks_mut(8) {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            word.copy_from_slice(&(z ^ (z >> 31)).to_le_bytes()[..word.len()]);
        }
    });
}

impl Model {
    /// A model of `config` with random weights, those of the head as `head`.
    pub fn dummy(
        config: ModelConfig,
        scheme: DummyScheme,
        head: DummyScheme,
        device: &Device,
        limits: Limits,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Model> {
        let kind = |name: &str| if name == "lm_head" { head } else { scheme };
        let group = |name: &str| dummy_linear(kind(name), 1, config.hidden_size, false, 0).scheme();
        let plan = MemoryPlan::new(&config, &limits, device.into(), |name| Ok(group(name)))?;
        plan.check(device.memory()?.0)?;
        let (hidden, inner, eps) = (config.hidden_size, config.intermediate_size, config.rms_norm_eps);
        let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let ones = |width: usize| RmsNorm::new(device, &HostData::F32(vec![1.0; width]), eps);
        let mut seed = 0;
        let mut weights = |ns: &[usize], k: usize, bias: bool| -> Vec<LinearWeight> {
            let weight = |&n: &usize| {
                seed += 1;
                dummy_linear(scheme, n, k, bias, seed)
            };
            ns.iter().map(weight).collect()
        };
        let mut layers = Vec::with_capacity(config.num_layers);
        for i in 0..config.num_layers {
            progress(i, config.num_layers);
            let qk_norm = match config.architecture {
                Architecture::Qwen3 => Some((ones(config.head_dim)?, ones(config.head_dim)?)),
                _ => None,
            };
            let qkv = weights(&[q, kv, kv], hidden, config.qkv_bias);
            let o = weights(&[hidden], q, config.o_bias);
            let gate_up = weights(&[inner, inner], hidden, config.mlp_bias);
            let down = weights(&[hidden], inner, config.mlp_bias);
            layers.push(DecoderLayer {
                input_norm: ones(hidden)?,
                qkv: Linear::new(device, qkv)?,
                qk_norm,
                sub_norms: None,
                o: Linear::new(device, o)?,
                post_attention_norm: ones(hidden)?,
                gate_up: Linear::gated(device, gate_up, &down[0])?,
                down: Linear::new(device, down)?,
            });
        }
        progress(config.num_layers, config.num_layers);
        let weights = dummy_linear(DummyScheme::Bf16, config.vocab_size, hidden, false, 0);
        let Weight::Dense { data: embedding, .. } = weights.weight else {
            return Err(Error::Shape { op: "dummy", expected: "a dense embedding".into(), got: DType::U8.to_string() });
        };
        let head = dummy_linear(head, config.vocab_size, hidden, false, 0);
        let norm = ones(hidden)?;
        Model::assemble(config, device, limits, embedding, layers, norm, head)
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    /// bf16 has fewer digits than f16 and f16 less range, which small scales leave first: those of 8 bits and long rows.
    #[test]
    fn scales_are_floats_of_both_types() {
        for (bits, k) in [(2, 64), (4, 4096), (4, 28672), (8, 28672)] {
            let Weight::Quant(q) = dummy_linear(DummyScheme::WeightOnly(bits, 32), 16, k, false, 1).weight else {
                panic!("codes")
            };
            let exact =
                |&scale: &f32| bf16::from_f32(scale).to_f32() == scale && f16::from_f32(scale).to_f32() == scale;
            assert!(q.scales.iter().all(exact), "{bits} bits, k = {k}: {:?}", &q.scales[..7]);
            assert!(q.scales[..7].windows(2).all(|pair| pair[0] < pair[1]), "{:?}", &q.scales[..7]);
        }
    }
}
