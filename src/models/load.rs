//! From a checkpoint's names to the decoder's slots. The architectures share Hugging Face's names; they differ
//! in which biases and norms exist.

use rayon::prelude::*;

use crate::checkpoint::{Architecture, Checkpoint, Expected, ModelConfig};
use crate::device::Device;
use crate::error::Result;
use crate::layers::{Linear, RmsNorm};
use crate::quant::LinearWeight;

use super::decoder::{DecoderLayer, Limits, Model};
use super::plan::{MemoryPlan, attention_shape};

/// Checkpoint names and shapes of one decoder layer's linears: what is fused into one slot is listed together.
#[derive(Debug, Clone)]
pub struct LayerTable {
    /// `model.layers.N`.
    pub prefix: String,
    /// q, k, v: `(module name, n)`, all with `k = hidden_size`.
    pub qkv: [(String, usize); 3],
    /// Attention output, `n = hidden_size`, `k = num_heads * head_dim`.
    pub o: String,
    /// gate, up: `n = intermediate_size`, `k = hidden_size`.
    pub gate_up: [String; 2],
    /// MLP output, `n = hidden_size`, `k = intermediate_size`.
    pub down: String,
}

impl LayerTable {
    /// Module names of q, k, v, o, gate, up, down.
    pub fn linears(&self) -> impl Iterator<Item = &String> {
        self.qkv.iter().map(|(name, _)| name).chain([&self.o]).chain(&self.gate_up).chain([&self.down])
    }
}

/// The tables of all layers.
pub fn layer_tables(config: &ModelConfig) -> Vec<LayerTable> {
    let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    (0..config.num_layers)
        .map(|i| {
            let prefix = format!("model.layers.{i}");
            let attention = |name: &str| format!("{prefix}.self_attn.{name}");
            let mlp = |name: &str| format!("{prefix}.mlp.{name}");
            LayerTable {
                qkv: [(attention("q_proj"), q), (attention("k_proj"), kv), (attention("v_proj"), kv)],
                o: attention("o_proj"),
                gate_up: [mlp("gate_proj"), mlp("up_proj")],
                down: mlp("down_proj"),
                prefix,
            }
        })
        .collect()
}

/// BitNet's norms before the attention output and before `down`.
pub(crate) const SUB_NORMS: [&str; 2] = ["self_attn.attn_sub_norm", "mlp.ffn_sub_norm"];

/// Module names of all linear layers of the decoder, without the head, in the order in which data flows.
pub fn linear_names(config: &ModelConfig) -> Vec<String> {
    layer_tables(config).iter().flat_map(|table| table.linears().cloned()).collect()
}

/// Module name, outputs and inputs of every linear layer that a model has on its device: its head too where that is the embedding.
pub(super) fn linear_shapes(config: &ModelConfig) -> impl Iterator<Item = (String, usize, usize)> {
    let own = expected_tensors(config).into_iter().filter_map(|expected| match expected {
        Expected::Linear { name, n, k, .. } => Some((name, n, k)),
        Expected::Tensor { .. } => None,
    });
    own.chain(config.tie_word_embeddings.then(|| ("lm_head".into(), config.vocab_size, config.hidden_size)))
}

/// Everything a model of this configuration needs from its checkpoint.
pub fn expected_tensors(config: &ModelConfig) -> Vec<Expected> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let tensor = |name: String, shape: &[usize]| Expected::Tensor { name, shape: shape.to_vec() };
    let mut all = vec![
        tensor("model.embed_tokens.weight".into(), &[config.vocab_size, hidden]),
        tensor("model.norm.weight".into(), &[hidden]),
    ];
    if !config.tie_word_embeddings {
        all.push(Expected::Linear { name: "lm_head".into(), n: config.vocab_size, k: hidden, bias: false });
    }
    for table in layer_tables(config) {
        let norm = |name: &str| format!("{}.{name}.weight", table.prefix);
        all.push(tensor(norm("input_layernorm"), &[hidden]));
        all.push(tensor(norm("post_attention_layernorm"), &[hidden]));
        if config.architecture == Architecture::Qwen3 {
            all.push(tensor(norm("self_attn.q_norm"), &[config.head_dim]));
            all.push(tensor(norm("self_attn.k_norm"), &[config.head_dim]));
        }
        for (name, n) in &table.qkv {
            all.push(Expected::Linear { name: name.clone(), n: *n, k: hidden, bias: config.qkv_bias });
        }
        let attention_width = config.num_heads * config.head_dim;
        if config.architecture == Architecture::BitNet {
            all.push(tensor(norm(SUB_NORMS[0]), &[attention_width]));
            all.push(tensor(norm(SUB_NORMS[1]), &[inner]));
        }
        all.push(Expected::Linear { name: table.o, n: hidden, k: attention_width, bias: config.o_bias });
        for name in table.gate_up {
            all.push(Expected::Linear { name, n: inner, k: hidden, bias: config.mlp_bias });
        }
        all.push(Expected::Linear { name: table.down, n: hidden, k: inner, bias: config.mlp_bias });
    }
    all
}

impl Model {
    /// Checks the checkpoint against the model and moves every weight to `device`, one at a time.
    ///
    /// `progress` is called with the layers done and their number. Notes of the checkpoint's inventory go to the log.
    ///
    /// # Errors
    /// One report of everything missing or mis-shaped; `OutOfMemory` before anything is allocated; whatever a
    /// weight's format makes impossible, naming its tensor.
    pub fn load(
        checkpoint: &Checkpoint,
        device: &Device,
        limits: Limits,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Model> {
        let config = checkpoint.config().clone();
        device.check_attention(&attention_shape(&config, None))?;
        for note in checkpoint.check(&expected_tensors(&config))? {
            tracing::info!("{note}");
        }
        let scheme = |name: &str| checkpoint.linear_scheme(name);
        MemoryPlan::new(&config, &limits, device.into(), scheme)?.check(device.memory()?.0)?;
        let tables = layer_tables(&config);
        let mut layers = Vec::with_capacity(tables.len());
        progress(0, tables.len());
        for table in &tables {
            let norm = |name: &str| {
                let weight = checkpoint.tensor(&format!("{}.{name}.weight", table.prefix))?;
                RmsNorm::new(device, &weight, config.rms_norm_eps)
            };
            let qk_norm = match config.architecture {
                Architecture::Qwen3 => Some((norm("self_attn.q_norm")?, norm("self_attn.k_norm")?)),
                _ => None,
            };
            let sub_norms = match config.architecture {
                Architecture::BitNet => Some((norm(SUB_NORMS[0])?, norm(SUB_NORMS[1])?)),
                _ => None,
            };
            // What is read on the host at all (scales, zero points, floating weights) is read side by side.
            let names: Vec<&String> = table.linears().collect();
            let weights = names.into_par_iter().map(|name| checkpoint.linear(name)).collect::<Result<Vec<_>>>()?;
            let mut weights = weights.into_iter();
            let mut next = |count| -> Vec<LinearWeight> { weights.by_ref().take(count).collect() };
            let (qkv, o, gate_up, down) = (next(3), next(1), next(2), next(1));
            layers.push(DecoderLayer {
                input_norm: norm("input_layernorm")?,
                qkv: Linear::new(device, qkv)?,
                qk_norm,
                o: Linear::new(device, o)?,
                post_attention_norm: norm("post_attention_layernorm")?,
                // SwiGLU is another activation than that of such a norm.
                gate_up: match sub_norms {
                    Some(_) => Linear::new(device, gate_up)?,
                    None => Linear::gated(device, gate_up, &down[0])?,
                },
                sub_norms,
                down: Linear::new(device, down)?,
            });
            progress(layers.len(), tables.len());
        }
        let embedding = checkpoint.tensor("model.embed_tokens.weight")?;
        let head = checkpoint.linear("lm_head")?;
        let norm = RmsNorm::new(device, &checkpoint.tensor("model.norm.weight")?, config.rms_norm_eps)?;
        Model::assemble(config, device, limits, embedding, layers, norm, head)
    }
}
