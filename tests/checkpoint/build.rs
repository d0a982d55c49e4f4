//! Small model directories made to order, right or wrong.

use std::fs;
use std::path::Path;

use lowbit::checkpoint::{Checkpoint, Expected};
use lowbit::error::{Error, Result};
use lowbit::quant::Codebook;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// A model directory under construction: one linear layer `m` of [32, 64] beside whatever else is added.
pub struct Build {
    pub dir: TempDir,
    pub config: Value,
    tensors: Vec<(String, &'static str, Vec<usize>, Vec<u8>)>,
}

pub const N: usize = 32;
pub const K: usize = 64;

/// A configuration that is accepted.
pub fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0
    })
}

impl Build {
    pub fn new(quantization: Value) -> Build {
        let mut config = config();
        if !quantization.is_null() {
            config["quantization_config"] = quantization;
        }
        Build { dir: tempfile::tempdir().unwrap(), config, tensors: Vec::new() }
    }

    /// Adds or replaces a tensor; `fill` is repeated to its size.
    pub fn tensor(mut self, name: &str, dtype: &'static str, shape: &[usize], fill: &[u8]) -> Build {
        let size = match dtype {
            "I8" | "U8" | "F8_E4M3" | "F8_E5M2" => 1,
            "F16" | "BF16" | "I16" => 2,
            "I64" | "F64" => 8,
            _ => 4,
        };
        let bytes = fill.iter().copied().cycle().take(shape.iter().product::<usize>() * size).collect();
        self = self.without(name);
        self.tensors.push((name.into(), dtype, shape.into(), bytes));
        self
    }

    /// [`Build::tensor`] of I32 values.
    pub fn ints(self, name: &str, shape: &[usize], values: &[i32]) -> Build {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensor(name, "I32", shape, &bytes)
    }

    /// [`Build::tensor`] of a vector of F32 values.
    pub fn floats(self, name: &str, values: &[f32]) -> Build {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensor(name, "F32", &[values.len()], &bytes)
    }

    /// The quantization state of an NF4 layer.
    pub fn state(self, text: &str) -> Build {
        self.tensor("m.weight.quant_state.bitsandbytes__nf4", "U8", &[text.len()], text.as_bytes())
    }

    pub fn without(mut self, name: &str) -> Build {
        self.tensors.retain(|(n, ..)| n != name);
        self
    }

    /// A field of the quantization configuration.
    pub fn set(mut self, field: &str, value: Value) -> Build {
        self.config["quantization_config"][field] = value;
        self
    }

    pub fn file(self, name: &str, content: &str) -> Build {
        fs::write(self.dir.path().join(name), content).unwrap();
        self
    }

    pub fn write(&self) -> &Path {
        fs::write(self.dir.path().join("config.json"), self.config.to_string()).unwrap();
        let mut header = Map::new();
        let mut data = Vec::new();
        for (name, dtype, shape, bytes) in &self.tensors {
            let start = data.len();
            data.extend_from_slice(bytes);
            header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]}));
        }
        fs::write(self.dir.path().join("model.safetensors"), safetensors(&Value::Object(header).to_string(), &data))
            .unwrap();
        self.dir.path()
    }

    pub fn open(&self) -> Result<Checkpoint> {
        Checkpoint::open(self.write())
    }

    /// Opens, checks layer `m` and reads it; the notes of the check.
    pub fn load(&self) -> Result<Vec<String>> {
        let checkpoint = self.open()?;
        let notes = checkpoint.check(&[Expected::Linear { name: "m".into(), n: N, k: K, bias: false }])?;
        checkpoint.linear_scheme("m")?;
        checkpoint.linear("m")?;
        Ok(notes.into_iter().map(|note| note.text).collect())
    }
}

/// A safetensors file.
pub fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// A correct GPTQ layer: 4 bits, group 32, symmetric, v1.
pub fn gptq() -> Build {
    Build::new(json!({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": true, "desc_act": false}))
        .tensor("m.qweight", "I32", &[K / 8, N], &[0x12, 0x34, 0x56, 0x78])
        .tensor("m.qzeros", "I32", &[K / 32, N / 8], &[0x77])
        .tensor("m.scales", "F16", &[K / 32, N], &[0x00, 0x3c])
}

/// A correct AWQ layer: gemm, group 32.
pub fn awq() -> Build {
    Build::new(json!({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": true, "version": "gemm"}))
        .tensor("m.qweight", "I32", &[K, N / 8], &[0x12, 0x34, 0x56, 0x78])
        .tensor("m.qzeros", "I32", &[K / 32, N / 8], &[0x77])
        .tensor("m.scales", "F16", &[K / 32, N], &[0x00, 0x3c])
}

/// A configuration of compressed-tensors with one group.
pub fn ct_config(format: &str, weights: Value, activations: Value) -> Value {
    let group = json!({"targets": ["Linear"], "weights": weights, "input_activations": activations});
    json!({"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}, "ignore": ["lm_head"]})
}

/// A correct packed layer: 4 bits, group 32, symmetric.
pub fn ct_packed() -> Build {
    let weights = json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": true});
    Build::new(ct_config("pack-quantized", weights, Value::Null))
        .tensor("m.weight_packed", "I32", &[N, K / 8], &[0x12, 0x34, 0x56, 0x78])
        .tensor("m.weight_scale", "BF16", &[N, K / 32], &[0x80, 0x3f])
        .tensor("m.weight_shape", "I64", &[2], &[N as u8, 0, 0, 0, 0, 0, 0, 0, K as u8, 0, 0, 0, 0, 0, 0, 0])
}

/// A correct W8A8 layer: channel scales, static activations.
pub fn ct_int8() -> Build {
    let weights = json!({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": true});
    let activations = json!({"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": true, "dynamic": false});
    Build::new(ct_config("int-quantized", weights, activations))
        .tensor("m.weight", "I8", &[N, K], &[1, 2, 0xff])
        .tensor("m.weight_scale", "BF16", &[N, 1], &[0x80, 0x3f])
        .tensor("m.input_scale", "BF16", &[1], &[0x80, 0x3f])
}

/// A correct FP8 layer of compressed-tensors: channel scales, dynamic activations.
pub fn ct_fp8() -> Build {
    let weights = json!({"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true});
    let activations = json!({"num_bits": 8, "type": "float", "strategy": "token", "symmetric": true, "dynamic": true});
    Build::new(ct_config("float-quantized", weights, activations))
        .tensor("m.weight", "F8_E4M3", &[N, K], &[0x38, 0xb8, 0x01])
        .tensor("m.weight_scale", "BF16", &[N, 1], &[0x80, 0x3f])
}

/// A correct layer of `quant_method: fp8` in blocks of [20, 48], which divide neither size.
pub fn hf_fp8() -> Build {
    let config = json!({
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [20, 48],
        "modules_to_not_convert": ["lm_head"]
    });
    Build::new(config).tensor("m.weight", "F8_E4M3", &[N, K], &[0x38, 0xb8, 0x01]).tensor(
        "m.weight_scale_inv",
        "F32",
        &[2, 2],
        &[1.0f32, 2.0, 4.0, 8.0].map(f32::to_le_bytes).concat(),
    )
}

/// Asserts that `result` is an error whose message has every one of `parts`.
pub fn assert_error<T>(result: Result<T>, parts: &[&str]) -> Error {
    let Err(error) = result else { panic!("accepted; expected an error with {parts:?}") };
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "`{text}` lacks `{part}`");
    }
    error
}

/// A correct bitsandbytes layer of 4 bits, NF4 with double quantization.
pub fn bnb_nf4() -> Build {
    let state = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [32, 64], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}"#;
    Build::new(json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}))
        .tensor("m.weight", "U8", &[N * K / 2, 1], &[0x12, 0x34, 0xf0])
        .tensor("m.weight.absmax", "U8", &[N], &[0, 1, 2])
        .floats("m.weight.quant_map", &Codebook::NF4.0)
        .floats("m.weight.nested_absmax", &[0.25])
        .floats("m.weight.nested_quant_map", &[0.5; 256])
        .state(state)
}

/// A correct bitsandbytes layer of 8 bits.
pub fn bnb_int8() -> Build {
    Build::new(json!({"quant_method": "bitsandbytes", "load_in_8bit": true, "llm_int8_threshold": 6.0}))
        .tensor("m.weight", "I8", &[N, K], &[1, 2, 0xff])
        .tensor("m.SCB", "F32", &[N], &[0, 0, 0x80, 0x3f])
        .tensor("m.weight_format", "U8", &[], &[0])
}
