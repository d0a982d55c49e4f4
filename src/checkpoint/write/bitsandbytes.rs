//! bitsandbytes: tables of sixteen values in blocks, and LLM.int8(); and lowbit's own format for learned tables, which is
//! the former under names that others refuse (docs/formats.md sections 5 and 7).

use safetensors::Dtype;
use serde_json::{Value, json};

use super::super::bitsandbytes::LEARNED_TABLES;
use super::{OutTensor, Written};
use crate::dtype::DType;
use crate::quant::codebook::{DoubleQuant, dynamic_map};
use crate::quant::{ActQuant, Codebook, QuantWeight};

/// Block sizes that bitsandbytes has kernels for.
const BLOCKS: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// Whether bitsandbytes has blocks of this size.
pub(super) fn has_blocks_of(size: usize) -> bool {
    BLOCKS.contains(&size)
}

/// `weight`, `absmax`, `quant_map` and the state, for a model of `dtype`. Groups of a row become blocks of the flattened
/// weight, which they divide.
pub(super) fn table(name: &str, q: &QuantWeight, double_quant: bool, dtype: DType) -> Vec<OutTensor> {
    let quant_type = q.encoding.codebook().map_or("", Codebook::name);
    let at = |suffix: &str| format!("{name}.weight.{suffix}");
    let mut state = json!({
        "quant_type": quant_type,
        "blocksize": q.group_size,
        "dtype": torch_name(dtype),
        "shape": [q.n, q.k],
    });
    let mut all = codes_and_map(name, q);
    if double_quant {
        let double = DoubleQuant::new(&q.scales);
        state["nested_blocksize"] = json!(double.inner.block);
        state["nested_dtype"] = json!("float32");
        state["nested_offset"] = json!(double.offset);
        let nested = &double.inner.absmax;
        all.push(OutTensor::floats(at("nested_absmax"), DType::F32, &[nested.len()], nested));
        all.push(OutTensor::floats(at("nested_quant_map"), DType::F32, &[256], &dynamic_map()));
        all.push(OutTensor::raw(at("absmax"), Dtype::U8, &[q.scales.len()], double.inner.codes));
    } else {
        all.push(OutTensor::floats(at("absmax"), DType::F32, &[q.scales.len()], &q.scales));
    }
    all.push(json_tensor(at(&format!("quant_state.bitsandbytes__{quant_type}")), &state));
    all
}

/// A learned table: as [`table`], with `absmax` in `scale_type`.
pub(super) fn learned(name: &str, q: &QuantWeight, scale_type: DType) -> Vec<OutTensor> {
    let at = |suffix: &str| format!("{name}.weight.{suffix}");
    let state = json!({ "quant_type": "codebook", "blocksize": q.group_size, "shape": [q.n, q.k] });
    let mut all = codes_and_map(name, q);
    all.push(OutTensor::floats(at("absmax"), scale_type, &[q.scales.len()], &q.scales));
    all.push(json_tensor(at("quant_state.lowbit__codebook"), &state));
    all
}

/// `q` with the scales that reading a file with double quantization gives.
pub(super) fn double_quantized(q: &QuantWeight) -> QuantWeight {
    QuantWeight { scales: DoubleQuant::new(&q.scales).absmax(), ..q.clone() }
}

fn codes_and_map(name: &str, q: &QuantWeight) -> Vec<OutTensor> {
    // The first of two codes is the high nibble.
    let bytes: Vec<u8> = q.codes.chunks(2).map(|c| c[0] << 4 | c.get(1).copied().unwrap_or(0)).collect();
    let map = q.encoding.codebook().unwrap_or(&Codebook::NF4).0;
    vec![
        OutTensor::raw(format!("{name}.weight"), Dtype::U8, &[bytes.len(), 1], bytes),
        OutTensor::floats(format!("{name}.weight.quant_map"), DType::F32, &[16], &map),
    ]
}

fn json_tensor(name: String, value: &Value) -> OutTensor {
    let bytes = value.to_string().into_bytes();
    OutTensor::raw(name, Dtype::U8, &[bytes.len()], bytes)
}

/// LLM.int8(): signed codes, and 127 times each row's scale.
pub(super) fn int8(name: &str, q: &QuantWeight) -> Vec<OutTensor> {
    let codes = q.codes.iter().map(|code| code ^ 0x80).collect();
    // A reader divides by 127 again: of the neighbours of the rounded product one gives the scale back.
    let row = |&s: &f32| {
        let product = s * 127.0;
        let near = [product, product.next_down(), product.next_up()];
        near.into_iter().find(|x| x / 127.0 == s).unwrap_or(product)
    };
    let largest: Vec<f32> = q.scales.iter().map(row).collect();
    vec![
        OutTensor::raw(format!("{name}.weight"), Dtype::I8, &[q.n, q.k], codes),
        OutTensor::floats(format!("{name}.SCB"), DType::F32, &[q.n], &largest),
        OutTensor::raw(format!("{name}.weight_format"), Dtype::U8, &[], vec![0]),
    ]
}

/// `quantization_config` of a model with learned tables.
pub(super) fn learned_config(skipped: &[&str]) -> Value {
    json!({ "quant_method": LEARNED_TABLES, "modules_to_not_convert": skipped })
}

/// `quantization_config` of a model of `dtype`.
pub(super) fn config(written: &Written, skipped: &[&str], double_quant: bool, dtype: DType) -> Value {
    let scheme = written.schemes().first().map(|(scheme, _)| *scheme);
    let table = scheme.and_then(|scheme| scheme.encoding.codebook().copied());
    let threshold = match scheme.map(|scheme| scheme.activation) {
        Some(ActQuant::LlmInt8 { threshold }) => threshold,
        Some(ActQuant::None) | None => 6.0, // not used
        Some(_) => 0.0,
    };
    json!({
        "quant_method": "bitsandbytes",
        "load_in_4bit": table.is_some(),
        "load_in_8bit": table.is_none(),
        "_load_in_4bit": table.is_some(),
        "_load_in_8bit": table.is_none(),
        "bnb_4bit_compute_dtype": torch_name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": table.map_or("fp4", |table| table.name()),
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": threshold,
    })
}

/// A floating type's name in PyTorch.
pub(super) fn torch_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        _ => "float32",
    }
}
