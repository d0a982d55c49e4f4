//! What the targets share: a sound model directory of a few kilobytes, of which each target replaces one part.

use std::fs;
use std::path::Path;

use lowbit::checkpoint::{Checkpoint, Expected};
use lowbit::models::expected_tensors;
use safetensors::tensor::{Dtype, TensorView, serialize};
use tempfile::TempDir;

/// Rows and columns of every linear layer of the sound model.
const WIDTH: usize = 32;
const LINEARS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// A tensor's name, type and shape.
pub type Entry = (String, Dtype, Vec<usize>);

/// A model directory that loads, until a target writes over a file.
pub struct ModelDir(TempDir);

impl ModelDir {
    /// One Llama layer, unquantized.
    pub fn new() -> ModelDir {
        let dir = ModelDir(tempfile::tempdir().expect("a folder for temporary files"));
        dir.write("config.json", &serde_json::to_vec(&config()).expect("JSON"));
        let linears = LINEARS.map(|name| (layer(name) + ".weight", Dtype::F16, vec![WIDTH, WIDTH]));
        dir.write("model.safetensors", &shard(&linears, &[0]));
        dir
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path().join(name), bytes).expect("room for temporary files");
    }
}

impl Default for ModelDir {
    fn default() -> ModelDir {
        ModelDir::new()
    }
}

/// The sound `config.json`.
pub fn config() -> serde_json::Value {
    serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float16",
        "vocab_size": WIDTH, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": WIDTH / 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "bos_token_id": 0, "eos_token_id": 1,
    })
}

/// What a quantized linear layer is stored as, in the layout of `method` and with groups of [`WIDTH`] inputs.
pub fn quantized(method: &str, bits: usize) -> Vec<Entry> {
    let words = (WIDTH * bits).div_ceil(32);
    let parts: Vec<(&str, Dtype, Vec<usize>)> = match method {
        "gptq" => vec![
            ("qweight", Dtype::I32, vec![words, WIDTH]),
            ("qzeros", Dtype::I32, vec![1, words]),
            ("scales", Dtype::F16, vec![1, WIDTH]),
            ("g_idx", Dtype::I32, vec![WIDTH]),
        ],
        "awq" => vec![
            ("qweight", Dtype::I32, vec![WIDTH, words]),
            ("qzeros", Dtype::I32, vec![1, words]),
            ("scales", Dtype::F16, vec![1, WIDTH]),
        ],
        "pack-quantized" => vec![
            ("weight_packed", Dtype::I32, vec![WIDTH, words]),
            ("weight_scale", Dtype::BF16, vec![WIDTH, 1]),
            ("weight_zero_point", Dtype::I32, vec![words, 1]),
            ("weight_shape", Dtype::I64, vec![2]),
            ("weight_g_idx", Dtype::I32, vec![WIDTH]),
        ],
        _ => vec![
            ("weight", Dtype::I8, vec![WIDTH, WIDTH]),
            ("weight_scale", Dtype::BF16, vec![WIDTH, 1]),
            ("input_scale", Dtype::BF16, vec![1]),
            ("input_zero_point", Dtype::I8, vec![1]),
        ],
    };
    let named = |linear: &str, (part, dtype, shape): &(&str, Dtype, Vec<usize>)| {
        (format!("{}.{part}", layer(linear)), *dtype, shape.clone())
    };
    LINEARS.iter().flat_map(|linear| parts.iter().map(move |part| named(linear, part))).collect()
}

fn layer(name: &str) -> String {
    format!("model.layers.0.{name}")
}

/// A safetensors file of these tensors and the norms and embedding every model has; `data`, repeated, fills them.
pub fn shard(entries: &[Entry], data: &[u8]) -> Vec<u8> {
    let norms = ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"];
    let mut all: Vec<Entry> = norms.map(|name| (format!("{name}.weight"), Dtype::F16, vec![WIDTH])).to_vec();
    all.push(("model.embed_tokens.weight".to_owned(), Dtype::F16, vec![WIDTH, WIDTH]));
    all.extend_from_slice(entries);
    let data = if data.is_empty() { &[0] } else { data };
    let bytes: Vec<u8> = data.iter().copied().cycle().take(8 * WIDTH * WIDTH).collect();
    let view = |(name, dtype, shape): &Entry| {
        let length = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        (name.clone(), TensorView::new(*dtype, shape.clone(), &bytes[..length]).expect("as long as its shape says"))
    };
    serialize(all.iter().map(view), None).expect("distinct names")
}

/// Opens a model directory and reads all that a model would read of it.
pub fn read_everything(dir: &Path) {
    let Ok(checkpoint) = Checkpoint::open(dir) else { return };
    let expected = expected_tensors(checkpoint.config());
    let _ = checkpoint.check(&expected);
    for part in expected {
        match part {
            Expected::Linear { name, .. } => {
                let _ = checkpoint.linear_scheme(&name);
                let _ = checkpoint.linear(&name);
            }
            Expected::Tensor { name, .. } => {
                let _ = checkpoint.tensor(&name);
            }
        }
    }
}
