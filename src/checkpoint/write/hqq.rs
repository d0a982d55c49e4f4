//! HQQ's layer state as the hqq library stores it in safetensors (docs/formats.md section 6).

use safetensors::Dtype;
use serde_json::{Value, json};

use super::super::hqq::Storage;
use super::bitsandbytes::torch_name;
use super::{OutTensor, Written};
use crate::dtype::DType;
use crate::quant::QuantWeight;

/// Everything of one layer but its bias, with scales and zero points of `dtype`, the model's own type: the library computes
/// in the type that it finds.
///
/// # Panics
/// If the sizes are none that [`Format::check_sizes`](super::Format::check_sizes) lets pass: a bug of the caller.
pub(super) fn tensors(name: &str, q: &QuantWeight, dtype: DType) -> Vec<OutTensor> {
    let rows = q.n * q.groups();
    let storage = Storage::of_bits(q.bits).expect("bits that hqq has");
    let at = |suffix: &str| format!("{name}.{suffix}");
    let flag = |suffix: &str, value: bool| OutTensor::raw(at(suffix), Dtype::U8, &[], vec![u8::from(value)]);
    let number =
        |suffix: &str, value: usize| OutTensor::raw(at(suffix), Dtype::I32, &[], (value as i32).to_le_bytes().to_vec());
    let text = |suffix: &str, value: &str| OutTensor::raw(at(suffix), Dtype::U8, &[value.len()], value.into());
    let shape = [q.n as i64, q.k as i64].iter().flat_map(|x| x.to_le_bytes()).collect();
    let (packed_type, packed) = storage.pack(&q.codes, q.group_size);
    let packed_rows = rows.div_ceil(storage.per_word());
    vec![
        OutTensor::raw(at("W_q"), packed_type, &[packed_rows, q.group_size], packed),
        OutTensor::floats(at("scale"), dtype, &[rows, 1], &q.scales),
        OutTensor::floats(at("zero"), dtype, &[rows, 1], &q.zeros),
        OutTensor::raw(at("shape"), Dtype::I64, &[2], shape),
        number("nbits", usize::from(q.bits)),
        number("group_size", q.group_size),
        number("axis", 1),
        text("packing", storage.name()),
        text("unpack_view_dtype", if packed_type == Dtype::I32 { "torch.int32" } else { "torch.uint8" }),
        text("compute_dtype", &format!("torch.{}", torch_name(dtype))),
        flag("view_as_float", false),
        flag("quant_scale", false),
        flag("quant_zero", false),
        flag("offload_meta", false),
        flag("encoded_state_dict", true),
        flag("stores_quant_config", true),
        flag("channel_wise", true),
        flag("optimize", true),
        flag("round_zero", false),
    ]
}

/// What about `rows` groups of `bits` does not fit the library's words.
pub(super) fn misfit(rows: usize, bits: u8) -> Option<String> {
    let Some(storage) = Storage::of_bits(bits) else { return Some(format!("{bits} bits")) };
    let fits = storage.pads() || rows.is_multiple_of(storage.per_word());
    (!fits).then(|| format!("{rows} groups, no multiple of {}", storage.per_word()))
}

/// `quantization_config`.
pub(super) fn config(written: &Written, skipped: &[&str]) -> Value {
    let schemes = written.schemes();
    let scheme = schemes.first().map(|(scheme, _)| scheme);
    json!({
        "quant_method": "hqq",
        "quant_config": {
            "weight_quant_params": {
                "nbits": scheme.map(|s| s.weight_bits),
                "channel_wise": true,
                "group_size": scheme.and_then(|s| s.group_size),
                "optimize": true,
                "round_zero": false,
                "axis": 1,
                "view_as_float": false,
            },
            "scale_quant_params": Value::Null,
            "zero_quant_params": Value::Null,
            "offload_meta": false,
        },
        "skip_modules": skipped,
    })
}
