//! The `quantization_config` of each format: one scheme for all linear layers, or several.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::written::HEAD;
use super::{Format, KvScales, Written, bitsandbytes, hqq};
use crate::dtype::DType;
use crate::quant::{ActQuant, Scheme};

impl Format {
    /// `quantization_config` of config.json, for a model of `dtype`, of what [`Format::check`] lets pass.
    pub fn config(self, written: &Written, dtype: DType) -> Value {
        let skipped = written.unquantized();
        match self {
            Format::BitsAndBytes { double_quant } => bitsandbytes::config(written, &skipped, double_quant, dtype),
            Format::Codebook => bitsandbytes::learned_config(&skipped),
            Format::Hqq => hqq::config(written, &skipped),
            Format::Gptq | Format::GptqV2 => gptq(self, written),
            Format::Awq => awq(written),
            Format::CompressedTensors => compressed(written),
        }
    }
}

fn group_size(scheme: &Scheme) -> Value {
    scheme.group_size.map_or(json!(-1), |g| json!(g))
}

/// The most frequent scheme for all, the others as GPTQModel's `dynamic`.
fn gptq(format: Format, written: &Written) -> Value {
    let schemes = written.schemes();
    let params = |scheme: &Scheme| {
        json!({
            "bits": scheme.weight_bits,
            "group_size": group_size(scheme),
            "sym": scheme.symmetric,
            "desc_act": scheme.act_order,
        })
    };
    let mut dynamic = Map::new();
    // The head is left alone unless `lm_head` says otherwise.
    let skipped: Vec<&str> = written.unquantized().into_iter().filter(|name| *name != HEAD).collect();
    dynamic.extend(patterns(&skipped).into_iter().map(|p| (format!("-:{p}"), json!({}))));
    for (scheme, names) in schemes.iter().skip(1) {
        dynamic.extend(patterns(names).into_iter().map(|p| (format!("+:{p}"), params(scheme))));
    }
    let mut config = json!({ "quant_method": "gptq" });
    if let (Value::Object(config), Some((base, _))) = (&mut config, schemes.first()) {
        if let Value::Object(params) = params(base) {
            config.extend(params);
        }
        if !dynamic.is_empty() {
            config.insert("dynamic".into(), dynamic.into());
        }
    }
    config["static_groups"] = json!(written.static_order);
    if let Some(damp) = written.damp.filter(|damp| *damp > 0.0 && *damp < 1.0) {
        config["damp_percent"] = json!(damp); // GPTQModel takes nothing else
    }
    config["checkpoint_format"] = json!(if format == Format::Gptq { "gptq" } else { "gptq_v2" });
    config["pack_dtype"] = json!("int32");
    config["lm_head"] = json!(written.quantizes_head());
    config["meta"] = json!({ "quantizer": [format!("lowbit:{}", env!("CARGO_PKG_VERSION"))] });
    config
}

fn awq(written: &Written) -> Value {
    json!({
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": written.schemes().first().map_or(json!(-1), |(scheme, _)| group_size(scheme)),
        "zero_point": true,
        "modules_to_not_convert": written.unquantized(),
    })
}

/// One group for all of class `Linear`, or one for each scheme with patterns that match its modules alone.
fn compressed(written: &Written) -> Value {
    let schemes = written.schemes();
    let unquantized = written.unquantized();
    let uniform = schemes.len() == 1 && unquantized == [HEAD];
    let regexes = |names: &[&str]| -> Vec<String> { patterns(names).iter().map(|p| format!("re:{p}")).collect() };
    let mut groups = Map::new();
    for (i, (scheme, names)) in schemes.iter().enumerate() {
        let targets = if uniform { vec!["Linear".to_owned()] } else { regexes(names) };
        groups.insert(format!("group_{i}"), compressed_group(scheme, written.static_order, targets));
    }
    let storage = |scheme: &Scheme| if scheme.activation == ActQuant::None { PACKED } else { INT };
    let mut formats: Vec<&str> = schemes.iter().map(|(scheme, _)| storage(scheme)).collect();
    formats.sort_unstable();
    formats.dedup();
    json!({
        "quant_method": "compressed-tensors",
        "format": if let [one] = formats[..] { one } else { "mixed-precision" },
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": if uniform { vec![HEAD.to_owned()] } else { regexes(&unquantized) },
        "kv_cache_scheme": written.kv_scales.map(|granularity| {
            let strategy = if granularity == KvScales::Head { "attn_head" } else { "tensor" };
            compressed_args(8, true, strategy, None, false, Value::Null)
        }),
        "sparsity_config": {},
        "transform_config": {},
        "global_compression_ratio": Value::Null,
        "version": "0.19.0",
    })
}

const PACKED: &str = "pack-quantized";
const INT: &str = "int-quantized";

fn compressed_group(scheme: &Scheme, static_order: bool, targets: Vec<String>) -> Value {
    let order = match (scheme.act_order, static_order) {
        (true, _) => json!("group"),
        (false, true) => json!("static"),
        (false, false) => Value::Null,
    };
    let args = compressed_args;
    let input = match scheme.activation {
        ActQuant::None => Value::Null,
        ActQuant::StaticPerTensor { zero_point, .. } => args(8, zero_point == 0, "tensor", None, false, Value::Null),
        activation => args(8, activation != ActQuant::DynamicAsymmetric, "token", None, true, Value::Null),
    };
    let strategy = if scheme.group_size.is_some() { "group" } else { "channel" };
    json!({
        "targets": targets,
        "weights": args(scheme.weight_bits, scheme.symmetric, strategy, scheme.group_size, false, order),
        "input_activations": input,
        "output_activations": Value::Null,
        "format": if scheme.activation == ActQuant::None { PACKED } else { INT },
    })
}

fn compressed_args(
    bits: u8,
    symmetric: bool,
    strategy: &str,
    group: Option<usize>,
    dynamic: bool,
    order: Value,
) -> Value {
    json!({
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group,
        "dynamic": dynamic,
        "actorder": order,
        "block_structure": Value::Null,
        "observer": if dynamic { Value::Null } else { json!("minmax") },
        "observer_kwargs": {},
    })
}

/// Regular expressions that match `names`, whole, and no other module: one for each place in a decoder layer. Where q, k
/// and v (or gate and up) of a layer are all there, the name of the layer that fuses them matches too, since some
/// programs look that up.
fn patterns(names: &[&str]) -> Vec<String> {
    const FUSED: [(&[&str], &str); 2] = [
        (&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "self_attn\\.(q|k|v|qkv)_proj"),
        (&["mlp.gate_proj", "mlp.up_proj"], "mlp\\.(gate|up|gate_up)_proj"),
    ];
    let mut layers: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
    let mut all = Vec::new();
    for name in names {
        let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        match layer.and_then(|(index, place)| Some((index.parse().ok()?, place))) {
            Some((index, place)) => layers.entry(index).or_default().push(place),
            None => all.push(format!("^{}$", name.replace('.', "\\."))),
        }
    }
    let mut places: Vec<(String, Vec<String>)> = Vec::new();
    for (index, mut rest) in layers {
        let mut found = Vec::new();
        for (parts, fused) in FUSED {
            if parts.iter().all(|part| rest.contains(part)) {
                rest.retain(|place| !parts.contains(place));
                found.push(fused.to_owned());
            }
        }
        found.extend(rest.iter().map(|place| place.replace('.', "\\.")));
        for place in found {
            match places.iter_mut().find(|(p, _)| *p == place) {
                Some((_, indices)) => indices.push(index.to_string()),
                None => places.push((place, vec![index.to_string()])),
            }
        }
    }
    all.extend(places.into_iter().map(|(place, indices)| match indices.as_slice() {
        [index] => format!("^model\\.layers\\.{index}\\.{place}$"),
        _ => format!("^model\\.layers\\.({})\\.{place}$", indices.join("|")),
    }));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_their_modules_alone() {
        let attention = |i: usize| ["q", "k", "v"].map(|x| format!("model.layers.{i}.self_attn.{x}_proj"));
        let mut names: Vec<String> = [attention(1), attention(11)].concat();
        names.extend(["model.layers.0.self_attn.k_proj", "model.layers.11.mlp.down_proj", "lm_head"].map(String::from));
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        assert_eq!(
            patterns(&names),
            [
                r"^lm_head$",
                r"^model\.layers\.0\.self_attn\.k_proj$",
                r"^model\.layers\.(1|11)\.self_attn\.(q|k|v|qkv)_proj$",
                r"^model\.layers\.11\.mlp\.down_proj$",
            ]
        );
        assert!(patterns(&[]).is_empty());
    }
}
