//! Models of well-known shapes with random weights: what `bench --dummy` runs where no checkpoint is at hand.

use rayon::prelude::*;

use crate::checkpoint::{Architecture, ModelConfig, RopeConfig, RopeScaling};
use crate::device::Device;
use crate::dtype::{DType, HostData};
use crate::error::{Error, Result};
use crate::layers::{Linear, RmsNorm};
use crate::quant::{ActQuant, Encoding, LinearWeight, QuantWeight, Weight};

use super::batch::Limits;
use super::model::Model;
use super::plan::MemoryPlan;
use super::spec::{LinearSpec, ModelSpec, TensorSpec};

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
    /// FP8 weights with 16-bit activations; group size, 0 for per channel.
    Fp8(usize),
    /// `bits` of weight with dynamic int8 activations; group size, 0 for per channel.
    Int8(u8, usize),
}

impl DummyScheme {
    /// Inputs that share a scale; 0 where all do.
    pub fn group_size(self) -> usize {
        match self {
            DummyScheme::Bf16 => 0,
            DummyScheme::WeightOnly(_, group_size)
            | DummyScheme::Fp8(group_size)
            | DummyScheme::Int8(_, group_size) => group_size,
        }
    }

    /// Parses `bf16`, `fp8a16`, `w4a16`, `w8a16`, `w8a8`, `w4a8` (any 2 to 8 bits) with a group size (0: per channel;
    /// without one per channel at 8 bits, else 128).
    pub fn parse(scheme: &str, group_size: Option<usize>) -> Result<DummyScheme> {
        let bad =
            || Error::input("--scheme", format!("`{scheme}` is not one of bf16, fp8a16, w2a16 to w8a16, w2a8 to w8a8"));
        if scheme == "bf16" {
            return Ok(DummyScheme::Bf16);
        }
        if scheme == "fp8a16" {
            return Ok(DummyScheme::Fp8(group_size.unwrap_or(0)));
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
        DummyScheme::Fp8(group) => (8, group, ActQuant::None),
        DummyScheme::WeightOnly(bits, group) => (bits, group, ActQuant::None),
        DummyScheme::Int8(bits, group) => (bits, group, ActQuant::DynamicPerToken),
    };
    let group_size = if group == 0 { k } else { group.min(k) };
    let groups = k.div_ceil(group_size);
    let mut codes = vec![0; n * k];
    fill_random(&mut codes, seed);
    codes.par_iter_mut().for_each(|c| *c >>= 8 - bits);
    let is_fp8 = matches!(scheme, DummyScheme::Fp8(_));
    let (encoding, zero, step) = if is_fp8 {
        codes.par_iter_mut().for_each(|c| *c -= u8::from(*c & 0x7f == 0x7f)); // no NaN
        (Encoding::E4m3, 0.0, deviation / 100.0) // the values of all codes: a deviation of 100
    } else {
        let step = deviation * 3.46 / f32::from(1u16 << bits); // uniform codes: deviation of the range / sqrt(12)
        (Encoding::Affine, f32::from(1u16 << (bits - 1)), step)
    };
    let scales = (0..n * groups).map(|i| half::bf16::from_f32(step * (1.0 + (i % 7) as f32 / 32.0)).to_f32()).collect();
    let zeros = vec![zero; n * groups];
    let weight = Weight::Quant(QuantWeight {
        n,
        k,
        bits,
        group_size,
        codes: codes.into(),
        scales,
        zeros,
        order: None,
        encoding,
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
    /// A model of `config` with random weights, those of the head as `head`, if there is room for it and a runner of these `limits`.
    pub fn dummy(
        config: ModelConfig,
        scheme: DummyScheme,
        head: DummyScheme,
        device: &Device,
        limits: &Limits,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Model> {
        let kind = |name: &str| if name == "lm_head" { head } else { scheme };
        let group = |name: &str| dummy_linear(kind(name), 1, config.hidden_size, false, 0).scheme();
        let plan = MemoryPlan::new(&config, limits, device.into(), DType::BF16, |name| Ok(group(name)))?;
        plan.check(device.memory()?.0)?;
        let spec = ModelSpec::new(&config);
        let ones =
            |norm: &TensorSpec| RmsNorm::new(device, &HostData::F32(vec![1.0; norm.elements()]), config.rms_norm_eps);
        let mut seed = 0;
        let mut weight = |linear: &LinearSpec| {
            seed += 1;
            dummy_linear(scheme, linear.n, linear.k, linear.bias, seed)
        };
        let mut layers = Vec::with_capacity(config.num_layers);
        for (i, layer) in spec.layers.iter().enumerate() {
            progress(i, config.num_layers);
            let norms = layer.parts.as_ref().try_map_norms(ones)?;
            let weights = norms.try_map(|_, linears| linears.try_map(|_, linear| Ok::<_, Error>(weight(linear))))?;
            layers.push(weights.pack(device)?);
        }
        progress(config.num_layers, config.num_layers);
        let weights = dummy_linear(DummyScheme::Bf16, spec.head.n, spec.head.k, false, 0);
        let Weight::Dense { data: embedding, .. } = weights.weight else {
            return Err(Error::Shape { op: "dummy", expected: "a dense embedding".into(), got: DType::U8.to_string() });
        };
        Ok(Model {
            device: device.clone(),
            embedding: device.upload(embedding)?,
            head: Linear::new(device, vec![dummy_linear(head, spec.head.n, spec.head.k, false, 0)])?,
            norm: ones(&spec.norm)?,
            config,
            spec,
            layers,
        })
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
