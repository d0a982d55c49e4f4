//! `config.json` into [`ModelConfig`], with the defaults of transformers and a bound on every number.

use serde_json::Value;

use crate::error::{Error, Result};

use super::config::{Architecture, MAX_POSITIONS, ModelConfig};
use super::json::Object;
use super::parse_rope;

/// Bounds far above any model, low enough that products of two of them fit 64 bits and a mistake cannot ask for
/// unbounded work.
const MAX_LAYERS: usize = 1 << 10;
const MAX_HEADS: usize = 1 << 12;
const MAX_HEAD_DIM: usize = 1 << 10;
const MAX_WIDTH: usize = 1 << 20;
const MAX_VOCAB: usize = 1 << 24;

const ARCHITECTURES: [(&str, &str, Architecture); 5] = [
    ("LlamaForCausalLM", "llama", Architecture::Llama),
    ("MistralForCausalLM", "mistral", Architecture::Mistral),
    ("Qwen2ForCausalLM", "qwen2", Architecture::Qwen2),
    ("Qwen3ForCausalLM", "qwen3", Architecture::Qwen3),
    ("BitNetForCausalLM", "bitnet", Architecture::BitNet),
];

/// Fields by which other families change the arithmetic, with the value that means "not used".
const FOREIGN: [(&str, f64); 9] = [
    ("attention_multiplier", f64::NAN),
    ("attn_logit_softcapping", f64::NAN),
    ("clip_qkv", f64::NAN),
    ("embedding_multiplier", 1.0),
    ("final_logit_softcapping", f64::NAN),
    ("logits_scaling", 1.0),
    ("num_local_experts", 1.0),
    ("partial_rotary_factor", 1.0),
    ("residual_multiplier", 1.0),
];

/// Reads `config.json`.
pub(super) fn model(o: &Object) -> Result<ModelConfig> {
    let architecture = architecture(o)?;
    for (field, neutral) in FOREIGN {
        if o.get(field).is_some_and(|v| v.as_f64() != Some(neutral)) {
            return Err(o.error(field, format!("{architecture:?} models with this field are not supported")));
        }
    }
    let bitnet = architecture == Architecture::BitNet;
    match (o.str("hidden_act")?.or(o.str("hidden_activation")?), bitnet) {
        (None, _) | (Some("silu" | "swish"), false) | (Some("relu2"), true) => {}
        (Some(other), _) => {
            let expected = if bitnet { "relu2" } else { "silu" };
            return Err(o.error("hidden_act", format!("expected `{expected}`, got `{other}`")));
        }
    }

    let vocab_size = o.need_size("vocab_size", MAX_VOCAB)?;
    let hidden_size = o.need_size("hidden_size", MAX_WIDTH)?;
    let num_layers = o.need_size("num_hidden_layers", MAX_LAYERS)?;
    let num_heads = o.need_size("num_attention_heads", MAX_HEADS)?;
    let num_kv_heads = o.size("num_key_value_heads", MAX_HEADS)?.unwrap_or(num_heads);
    if num_heads % num_kv_heads != 0 {
        let reason = format!("{num_kv_heads} does not divide num_attention_heads = {num_heads}");
        return Err(o.error("num_key_value_heads", reason));
    }
    let head_dim = match o.size("head_dim", MAX_HEAD_DIM)? {
        Some(d) => d,
        None if architecture == Architecture::Qwen3 && !o.contains("head_dim") => 128,
        None if hidden_size % num_heads == 0 => hidden_size / num_heads,
        None => {
            let reason =
                format!("{num_heads} heads do not divide hidden_size = {hidden_size}, and there is no head_dim");
            return Err(o.error("num_attention_heads", reason));
        }
    };
    if head_dim % 2 != 0 || num_heads * head_dim > MAX_WIDTH {
        let reason = format!(
            "head size {head_dim} times {num_heads} heads: expected an even size and at most {MAX_WIDTH} in all"
        );
        return Err(o.error("head_dim", reason));
    }
    let max_position_embeddings = o.size("max_position_embeddings", MAX_POSITIONS)?.unwrap_or(match architecture {
        Architecture::Llama | Architecture::BitNet => 2048,
        Architecture::Mistral => 131_072,
        Architecture::Qwen2 | Architecture::Qwen3 => 32_768,
    });

    let llama = architecture == Architecture::Llama;
    let attention_bias = o.bool("attention_bias")?.unwrap_or(false);
    let has_attention_bias =
        attention_bias && matches!(architecture, Architecture::Llama | Architecture::Qwen3 | Architecture::BitNet);
    Ok(ModelConfig {
        architecture,
        vocab_size,
        hidden_size,
        intermediate_size: o.need_size("intermediate_size", MAX_WIDTH)?,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        rms_norm_eps: o.number("rms_norm_eps", 1e-12, 1.0)?.unwrap_or(if bitnet { 1e-5 } else { 1e-6 }) as f32,
        tie_word_embeddings: o.bool("tie_word_embeddings")?.unwrap_or(false),
        max_position_embeddings,
        rope: parse_rope::rope(o, max_position_embeddings, if bitnet { 500_000.0 } else { 10_000.0 })?,
        windows: windows(o, architecture, num_layers)?,
        qkv_bias: architecture == Architecture::Qwen2 || has_attention_bias,
        o_bias: has_attention_bias,
        mlp_bias: llama && o.bool("mlp_bias")?.unwrap_or(false),
        eos_token_ids: token_ids(o, "eos_token_id", vocab_size)?,
        bos_token_id: token_ids(o, "bos_token_id", vocab_size)?.first().copied(),
    })
}

fn architecture(o: &Object) -> Result<Architecture> {
    let supported =
        "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM and BitNetForCausalLM are supported";
    // BitNet's own repository has the code that transformers has had since.
    if o.get("auto_map").is_some() && o.str("model_type")? != Some("bitnet") {
        return Err(Error::unsupported(
            format!("{}: field `auto_map`: the model runs code of its own", o.file().display()),
            supported.to_owned(),
        ));
    }
    let name = match o.strings("architectures")?.and_then(|list| list.into_iter().next()) {
        Some(name) => name,
        None => match o.str("model_type")? {
            Some(model_type) => model_type.to_owned(),
            None => return Err(o.error("architectures", format!("missing; {supported}"))),
        },
    };
    if let Some((.., found)) = ARCHITECTURES.iter().find(|(class, model_type, _)| name == *class || name == *model_type)
    {
        return Ok(*found);
    }
    let common = |class: &str| class.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
    let nearest = ARCHITECTURES.iter().map(|(class, ..)| *class).max_by_key(|class| common(class));
    let hint = nearest.filter(|class| common(class) >= 3).map(|c| format!("; the nearest is {c}")).unwrap_or_default();
    Err(Error::unsupported(format!("{}: architecture `{name}`", o.file().display()), format!("{supported}{hint}")))
}

/// Sliding window of each layer.
fn windows(o: &Object, architecture: Architecture, num_layers: usize) -> Result<Vec<Option<usize>>> {
    let size = o.size("sliding_window", MAX_POSITIONS)?;
    let qwen = matches!(architecture, Architecture::Qwen2 | Architecture::Qwen3);
    let window = match architecture {
        Architecture::Llama | Architecture::BitNet => None,
        // transformers' MistralConfig: 4096 unless written, and null switches it off.
        Architecture::Mistral if !o.contains("sliding_window") => Some(4096),
        Architecture::Mistral => size,
        Architecture::Qwen2 | Architecture::Qwen3 => {
            size.filter(|_| o.get("use_sliding_window") == Some(&Value::Bool(true)))
        }
    };
    o.bool("use_sliding_window")?;
    if let Some(types) = o.strings("layer_types")? {
        if types.len() != num_layers {
            return Err(o.error("layer_types", format!("{} entries for {num_layers} layers", types.len())));
        }
        return types
            .iter()
            .map(|t| match (t.as_str(), window) {
                ("full_attention", _) => Ok(None),
                ("sliding_attention", Some(w)) => Ok(Some(w)),
                ("sliding_attention", None) => {
                    Err(o.error("layer_types", "`sliding_attention` without a sliding_window in use"))
                }
                (other, _) => Err(o.error("layer_types", format!("`{other}` is not supported"))),
            })
            .collect();
    }
    let first = match window {
        Some(_) if qwen => {
            let default = 28.min(num_layers as i64);
            o.integer("max_window_layers", 0..=MAX_POSITIONS as i64)?.unwrap_or(default) as usize
        }
        _ => 0,
    };
    Ok((0..num_layers).map(|layer| window.filter(|_| layer >= first)).collect())
}

/// One id or a list of them, each below `vocab_size`.
pub(super) fn token_ids(o: &Object, field: &str, vocab_size: usize) -> Result<Vec<u32>> {
    o.get(field).map_or(Ok(Vec::new()), |value| ids_of(o, field, value, vocab_size))
}

/// [`token_ids`] of a value somewhere in `field`.
pub(super) fn ids_of(o: &Object, field: &str, value: &Value, vocab_size: usize) -> Result<Vec<u32>> {
    let values = match value {
        Value::Array(list) => list.as_slice(),
        value => std::slice::from_ref(value),
    };
    let id = |value: &Value| match value.as_u64() {
        Some(id) if id < vocab_size as u64 => Ok(id as u32),
        _ => Err(o.error(field, format!("{value} is not a token id; expected 0 to {}", vocab_size - 1))),
    };
    values.iter().map(id).collect()
}
