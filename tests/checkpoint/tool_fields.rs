//! What exporters write into quantization configurations beside what counts: known by name, and nothing else passes.

use serde_json::{Value, json};

use super::build::{Build, assert_error, awq, ct_fp8, ct_int8, ct_packed, gptq, hf_fp8};

fn with(build: fn() -> Build, fields: &[(&str, Value)]) -> Build {
    fields.iter().fold(build(), |build, (field, value)| build.set(field, value.clone()))
}

/// AutoRound's own (export to auto_gptq and auto_awq).
fn auto_round() -> Vec<(&'static str, Value)> {
    vec![
        ("data_type", json!("int")),
        ("seqlen", json!(512)),
        ("iters", json!(200)),
        ("autoround_version", json!("0.6.1")),
        ("enable_quanted_input", json!(true)),
        ("enable_minmax_tuning", json!(true)),
        ("scale_dtype", json!("torch.float16")),
        ("lr", json!(0.005)),
        ("minmax_lr", json!(0.005)),
        ("gradient_accumulate_steps", json!(1)),
        ("amp", json!(true)),
        ("nsamples", json!(128)),
        ("low_gpu_mem_usage", json!(true)),
        ("batch_size", json!(8)),
        ("to_quant_block_names", json!("model.layers")),
        ("enable_norm_bias_tuning", json!(false)),
        ("act_bits", json!(16)),
        ("act_group_size", json!(-1)),
        ("act_sym", json!(true)),
        ("act_dynamic", json!(true)),
        ("act_data_type", json!("int")),
        ("super_bits", Value::Null),
        ("supported_types", json!(["Linear"])),
    ]
}

#[test]
fn informational_fields_pass() {
    for build in [gptq, awq] {
        with(build, &auto_round()).load().unwrap();
    }
    let gptqmodel = [
        ("meta", json!({"quantizer": ["gptqmodel:5.0"]})),
        ("act_group_aware", json!(true)),
        ("v2", json!(false)),
        ("v2_alpha", json!(0.25)),
        ("vram_strategy", json!("exclusive")),
        ("adapter", Value::Null),
    ];
    with(gptq, &gptqmodel).load().unwrap();
    for status in ["initialized", "calibration", "frozen", "compressed"] {
        for build in [ct_packed, ct_int8, ct_fp8] {
            with(build, &[("quantization_status", json!(status)), ("provider", json!("auto-round"))]).load().unwrap();
        }
    }
    with(hf_fp8, &[("kv_cache_scheme", json!("static"))]).load().unwrap();
}

#[test]
fn fields_that_change_numbers_do_not() {
    type Case = (fn() -> Build, &'static str, Value, &'static str);
    let cases: [Case; 8] = [
        (gptq, "data_type", json!("mx_fp"), "expected `int`"),
        (gptq, "act_bits", json!(8), "quantized activations"),
        (awq, "super_bits", json!(6), "scales that are quantized"),
        (gptq, "adapter", json!({"lora": "x"}), "not understood"),
        (gptq, "extra_config", json!({"m": {"bits": 8}}), "not understood"),
        (gptq, "future_field", json!(1), "not understood"),
        (ct_packed, "quantization_status", json!("thawed"), "got `thawed`"),
        (ct_packed, "future_field", json!(1), "not understood"),
    ];
    for (build, field, value, part) in cases {
        assert_error(with(build, &[(field, value)]).open(), &[field, part]);
    }
}

#[test]
fn layouts_of_other_kernels_are_named() {
    assert_error(with(gptq, &[("is_marlin_format", json!(true))]).open(), &["is_marlin_format", "Marlin", "repacked"]);
    assert_error(with(gptq, &[("checkpoint_format", json!("marlin"))]).open(), &["checkpoint_format", "Marlin"]);
    assert_error(with(gptq, &[("checkpoint_format", json!("bitblas"))]).open(), &["checkpoint_format", "bitblas"]);
    with(gptq, &[("is_marlin_format", json!(false))]).load().unwrap();
    assert_error(Build::new(json!({"quant_method": "auto-round", "bits": 4})).open(), &["auto-round", "auto_gptq"]);
}

/// Every name under which a KV cache's scales came is passed over with one note.
#[test]
fn scales_of_a_cache_have_many_names() {
    let name = "model.layers.0.self_attn.k_proj";
    let layer = |rest: &str| {
        let build = gptq()
            .tensor(&format!("{name}.qweight"), "I32", &[8, 32], &[0x12])
            .tensor(&format!("{name}.qzeros"), "I32", &[2, 4], &[0x77])
            .tensor(&format!("{name}.scales"), "F16", &[2, 32], &[0x00, 0x3c])
            .tensor(&format!("model.layers.0.self_attn.{rest}"), "F32", &[1], &1f32.to_le_bytes());
        let expected = lowbit::checkpoint::Expected::Linear { name: name.into(), n: 32, k: 64, bias: false };
        build.open().unwrap().check(&[expected])
    };
    for rest in [
        "k_scale",
        "v_scale",
        "k_zero_point",
        "kv_scale",
        "q_scale",
        "k_proj.output_scale",
        "k_proj.k_scale",
        "v_proj.output_zero_point",
        "qkv_proj.v_scale",
        "attn.k_scale",
    ] {
        let notes = layer(rest).unwrap_or_else(|e| panic!("{rest}: {e}"));
        assert!(notes.iter().any(|note| note.text.contains("quantized KV cache")), "{rest}: {notes:?}");
    }
    assert_error(layer("k_proj.other_scale"), &["k_proj.other_scale", "not understood"]);
}
