//! What a model is made of, told once from its configuration: names, shapes, biases, norms, and roles of linear layers.
//!
//! Everything that walks over a model's parts goes by a [`ModelSpec`]: what a checkpoint must hold, loading, the memory plan,
//! dummy models, quantization, verification and `inspect`. The architectures share Hugging Face's names; they differ in which
//! biases and norms exist.

use crate::checkpoint::{Architecture, Checkpoint, Expected, ModelConfig};
use crate::device::AttentionShape;
use crate::error::Result;
use crate::layers::KvCache;
use crate::quant::LinearWeight;

use super::layer::{Attention, DecoderLayer, DenseMlp, Mlp, Projections, QkNorm};
use super::role::{LinearRole, Slot};

/// A linear layer: module name, and the shape `[n, k]` of its weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearSpec {
    /// Module name, without `.weight`.
    pub name: String,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Whether it has a bias.
    pub bias: bool,
}

impl LinearSpec {
    /// Reads the layer: a bias in the files that the model does not have is not its part.
    ///
    /// # Errors
    /// Those of [`Checkpoint::linear`].
    pub fn read(&self, checkpoint: &Checkpoint) -> Result<LinearWeight> {
        let weight = checkpoint.linear(&self.name)?;
        Ok(LinearWeight { bias: weight.bias.filter(|_| self.bias), ..weight })
    }

    fn expected(&self) -> Expected {
        Expected::Linear { name: self.name.clone(), n: self.n, k: self.k, bias: self.bias }
    }
}

fn linear_spec(role: LinearRole, config: &ModelConfig, prefix: &str) -> LinearSpec {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let (n, k, bias) = match role {
        LinearRole::Q => (q, hidden, config.qkv_bias),
        LinearRole::K | LinearRole::V => (kv, hidden, config.qkv_bias),
        LinearRole::O => (hidden, q, config.o_bias),
        LinearRole::Gate | LinearRole::Up => (inner, hidden, config.mlp_bias),
        LinearRole::Down => (hidden, inner, config.mlp_bias),
    };
    LinearSpec { name: format!("{prefix}.{}", role.module()), n, k, bias }
}

/// A tensor that is never quantized: a norm's weight, or the embedding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name of the tensor.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn expected(&self) -> Expected {
        Expected::Tensor { name: self.name.clone(), shape: self.shape.clone() }
    }
}

/// One decoder layer.
#[derive(Debug, Clone)]
pub struct LayerSpec {
    /// `model.layers.N`.
    pub prefix: String,
    /// Its attention, the window its own.
    pub attention: AttentionShape,
    /// Its parts.
    pub parts: DecoderLayer<Projections<LinearSpec>, TensorSpec>,
}

impl LayerSpec {
    fn new(config: &ModelConfig, index: usize) -> LayerSpec {
        let prefix = format!("model.layers.{index}");
        let norm =
            |name: &str, width: usize| TensorSpec { name: format!("{prefix}.{name}.weight"), shape: vec![width] };
        let slot = |slot: Slot| Projections::new(slot, |role| linear_spec(role, config, &prefix));
        let (hidden, heads) = (config.hidden_size, config.num_heads * config.head_dim);
        let qk_norm = config.architecture == Architecture::Qwen3;
        let sub_norms = config.architecture == Architecture::BitNet;
        let parts = DecoderLayer {
            input_norm: norm("input_layernorm", hidden),
            attention: Attention {
                qkv: slot(Slot::Qkv),
                qk_norm: qk_norm.then(|| QkNorm {
                    q: norm("self_attn.q_norm", config.head_dim),
                    k: norm("self_attn.k_norm", config.head_dim),
                }),
                sub_norm: sub_norms.then(|| norm("self_attn.attn_sub_norm", heads)),
                o: slot(Slot::O),
            },
            post_attention_norm: norm("post_attention_layernorm", hidden),
            mlp: Mlp::Dense(DenseMlp {
                gate_up: slot(Slot::GateUp),
                sub_norm: sub_norms.then(|| norm("mlp.ffn_sub_norm", config.intermediate_size)),
                down: slot(Slot::Down),
            }),
        };
        let window = config.windows.get(index).copied().flatten();
        LayerSpec { attention: attention_shape(config, window), prefix, parts }
    }
}

/// All parts of a model.
#[derive(Debug, Clone)]
pub struct ModelSpec {
    /// `[vocab, hidden]`.
    pub embedding: TensorSpec,
    /// Decoder layers.
    pub layers: Vec<LayerSpec>,
    /// Norm before the head.
    pub norm: TensorSpec,
    /// Output head.
    pub head: LinearSpec,
    /// The head's weight is the embedding, and the checkpoint has none of its own.
    pub is_head_tied: bool,
}

impl ModelSpec {
    /// That of a model with this configuration.
    pub fn new(config: &ModelConfig) -> ModelSpec {
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        ModelSpec {
            embedding: TensorSpec { name: "model.embed_tokens.weight".into(), shape: vec![vocab, hidden] },
            layers: (0..config.num_layers).map(|index| LayerSpec::new(config, index)).collect(),
            norm: TensorSpec { name: "model.norm.weight".into(), shape: vec![hidden] },
            head: LinearSpec { name: "lm_head".into(), n: vocab, k: hidden, bias: false },
            is_head_tied: config.tie_word_embeddings,
        }
    }

    /// Linear layers of the decoder, without the head, in the order in which data flows.
    pub fn linears(&self) -> impl Iterator<Item = &LinearSpec> {
        self.layers.iter().flat_map(|layer| layer.parts.linears()).map(|(_, linear)| linear)
    }

    /// All norms.
    pub fn norms(&self) -> impl Iterator<Item = &TensorSpec> {
        self.layers.iter().flat_map(|layer| layer.parts.norms()).chain([&self.norm])
    }

    /// Everything that a model's checkpoint must hold.
    pub fn expected(&self) -> Vec<Expected> {
        let mut all = vec![self.embedding.expected(), self.norm.expected()];
        all.extend((!self.is_head_tied).then(|| self.head.expected()));
        for layer in &self.layers {
            all.extend(layer.parts.norms().map(TensorSpec::expected));
            all.extend(layer.parts.linears().map(|(_, linear)| linear.expected()));
        }
        all
    }
}

/// Everything a model of this configuration needs from its checkpoint.
pub fn expected_tensors(config: &ModelConfig) -> Vec<Expected> {
    ModelSpec::new(config).expected()
}

/// Attention shape of a layer with this sliding window.
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

/// Module names of all linear layers of the decoder, without the head, in the order in which data flows.
pub fn linear_names(config: &ModelConfig) -> Vec<String> {
    ModelSpec::new(config).linears().map(|linear| linear.name.clone()).collect()
}
