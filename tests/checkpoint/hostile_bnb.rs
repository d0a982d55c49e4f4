//! bitsandbytes configurations, states and tensors that contradict themselves or each other.

use lowbit::quant::{ActQuant, Codebook, Encoding, Weight};
use serde_json::json;

use super::build::{Build, K, N, assert_error, bnb_int8, bnb_nf4};

const STATE: &str = "m.weight.quant_state.bitsandbytes__nf4";

fn quantized(build: &Build) -> lowbit::quant::QuantWeight {
    match build.open().unwrap().linear("m").unwrap().weight {
        Weight::Quant(q) => q,
        Weight::Dense { .. } => panic!("not quantized"),
    }
}

#[test]
fn the_bases_mean_what_they_should() {
    assert!(bnb_nf4().load().unwrap().is_empty());
    let q = quantized(&bnb_nf4());
    // The first byte, 0x12, is codes 1 and 2 in this order; every scale is 0.5 * 0.25 + 0.5.
    assert_eq!(q.codes[..4], [1, 2, 3, 4]);
    assert_eq!((q.scales[0], q.group_size, q.encoding), (0.625, 64, Encoding::Codebook(Codebook::NF4)));
    assert_eq!(q.dequantize()[0], 0.625 * Codebook::NF4.0[1]);

    assert!(bnb_int8().load().unwrap().is_empty());
    let q = quantized(&bnb_int8());
    assert_eq!((q.codes[0], q.codes[2], q.bits, q.scales[0]), (129, 127, 8, 1.0 / 127.0));
    let w = q.dequantize();
    assert_eq!((w[0], w[2]), (1.0 / 127.0, -1.0 / 127.0));
}

#[test]
fn the_configuration_is_checked() {
    for (field, value, reason) in [
        ("load_in_8bit", json!(true), "expected one of them"),
        ("load_in_4bit", json!(false), "expected one of them"),
        ("load_in_4bit", json!("yes"), "true or false"),
        ("bnb_4bit_quant_type", json!("af4"), "`nf4` or `fp4`"),
        ("bnb_4bit_quant_storage", json!(8), "a string"),
        ("bnb_4bit_use_double_quant", json!(1), "true or false"),
        ("llm_int8_skip_modules", json!("lm_head"), "list of strings"),
        ("llm_int8_has_fp16_weight", json!(true), "use the unquantized model"),
        ("bnb_4bit_zigzag", json!(1), "not understood"),
    ] {
        let place = format!("quantization_config.{}", if field == "load_in_8bit" { "load_in_4bit" } else { field });
        assert_error(bnb_nf4().set(field, value).load(), &["config.json", &place, reason]);
    }
    for value in [json!(-1), json!("6"), json!(1e39)] {
        assert_error(bnb_int8().set("llm_int8_threshold", value).load(), &["llm_int8_threshold", "expected a number"]);
    }
    bnb_nf4()
        .set("bnb_4bit_compute_dtype", json!("float32"))
        .set("llm_int8_skip_modules", json!(["x"]))
        .load()
        .unwrap();
}

#[test]
fn the_state_is_checked() {
    let good = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [32, 64], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}"#;
    let changed = |from: &str, to: &str| {
        assert!(good.contains(from));
        bnb_nf4().state(&good.replace(from, to)).load()
    };
    for (from, to, reason) in [
        (r#""nf4""#, r#""fp4""#, "expected `nf4`, as the tensor's name says"),
        ("64,", "0,", "blocksize"),
        ("64,", "-64,", "blocksize"),
        ("64,", "1e12,", "blocksize"),
        ("[32, 64]", "[32]", "two sizes"),
        ("[32, 64]", "[32, 0]", "two sizes"),
        ("[32, 64]", "[32, 99999999999]", "two sizes"),
        ("[32, 64]", "null", "two sizes"),
        (r#""float32""#, r#""float16""#, "nested_dtype"),
        ("0.5}", r#""x"}"#, "nested_offset"),
        (r#", "nested_offset": 0.5"#, "", "nested_offset"),
        (r#""dtype""#, r#""zigzag""#, "zigzag"),
        ("}", "", "not valid JSON"),
        (r#"{"quant_type""#, r#"{"blocksize": 64, "quant_type""#, "duplicate key"),
    ] {
        assert_error(changed(from, to), &["model.safetensors", STATE.trim_end_matches("nf4"), reason]);
    }
    assert_error(changed("[32, 64]", "[16777216, 16777216]"), &["`m.weight`: 1024 bytes"]);
    assert_error(bnb_nf4().state("[]").load(), &[STATE, "expected a JSON object"]);
    assert_error(bnb_nf4().state(&" ".repeat(5000)).load(), &[STATE, "5000 bytes"]);
    assert_error(bnb_nf4().without(STATE).load(), &["m.weight.quant_state", "0 of them"]);
    let two = bnb_nf4().tensor("m.weight.quant_state.bitsandbytes__fp4", "U8", &[2], b"{}");
    assert_error(two.load(), &["m.weight.quant_state", "2 of them"]);
}

#[test]
fn tensors_are_checked() {
    let nf4 = |name: &str, dtype, shape: &[usize]| bnb_nf4().tensor(&format!("m.{name}"), dtype, shape, &[0]).load();
    assert_error(nf4("weight", "U8", &[N * K / 2 - 1, 1]), &["m.weight", "1023 bytes", "take 1024"]);
    assert_error(nf4("weight", "U8", &[N * K / 2 + 1, 1]), &["m.weight", "1025 bytes"]);
    assert_error(nf4("weight", "I64", &[N * K / 16, 1]), &["m.weight", "is I64"]);
    nf4("weight", "BF16", &[N * K / 4, 1]).unwrap();
    nf4("weight", "F32", &[1, N * K / 8]).unwrap();
    assert_error(bnb_nf4().without("m.weight").load(), &["m.weight", "missing"]);
    assert_error(nf4("weight.absmax", "F32", &[N]), &["m.weight.absmax", "is F32; expected U8"]);
    assert_error(nf4("weight.absmax", "U8", &[N + 1]), &["m.weight.absmax", "[33]", "[32]"]);
    assert_error(nf4("weight.nested_absmax", "F32", &[2]), &["m.weight.nested_absmax", "[2]", "[1]"]);
    assert_error(nf4("weight.nested_quant_map", "F32", &[16]), &["m.weight.nested_quant_map", "[256]"]);
    assert_error(nf4("weight.quant_map", "F32", &[16]), &["m.weight.quant_map", "is not the table of nf4"]);
    assert_error(nf4("weight.quant_map", "F32", &[15]), &["m.weight.quant_map", "[16]"]);
    assert_error(nf4("weight.zeros", "F32", &[N]), &["m.weight.zeros", "not understood for a layer of this scheme"]);
    let poisoned = bnb_nf4().floats("m.weight.nested_absmax", &[f32::NAN]);
    assert_error(poisoned.load(), &["m.weight.nested_absmax", "finite"]);

    let int8 = |name: &str, dtype, shape: &[usize], fill: u8| {
        bnb_int8().tensor(&format!("m.{name}"), dtype, shape, &[fill]).load()
    };
    assert_error(int8("SCB", "F32", &[N - 1], 0), &["m.SCB", "[31]", "[32]"]);
    assert_error(int8("SCB", "F32", &[N], 0xff), &["m.SCB", "finite"]);
    assert_error(bnb_int8().without("m.SCB").load(), &["m.SCB", "missing"]);
    assert_error(int8("weight", "F16", &[N, K], 0), &["m.weight", "is F16; expected I8"]);
    assert_error(int8("weight_format", "U8", &[], 2), &["m.weight_format", "not stored in rows"]);
    assert_error(int8("zeros", "F32", &[N], 0), &["m.zeros", "not understood"]);
    bnb_int8().without("m.weight_format").load().unwrap();
}

/// The file says which modules are quantized; the others are read as they are.
#[test]
fn modules_may_be_left_out() {
    let plain = |build: Build| {
        ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"]
            .iter()
            .fold(build, |build, name| build.without(&format!("m.weight.{name}")))
            .without("m.SCB")
            .without("m.weight_format")
            .tensor("m.weight", "BF16", &[N, K], &[0x80, 0x3f])
    };
    for build in [bnb_nf4(), bnb_int8()] {
        let build = plain(build);
        build.load().unwrap();
        assert_eq!(build.open().unwrap().linear_scheme("m").unwrap().to_string(), "16-bit");
    }
    let threshold = |value: f32| bnb_int8().set("llm_int8_threshold", json!(value)).open().unwrap();
    assert_eq!(threshold(2.5).linear("m").unwrap().activation, ActQuant::LlmInt8 { threshold: 2.5 });
    assert_eq!(threshold(0.0).linear_scheme("m").unwrap().activation, ActQuant::DynamicPerToken);
    let default = bnb_int8().set("llm_int8_threshold", json!(null)).open().unwrap().linear_scheme("m").unwrap();
    assert_eq!(
        default.to_string(),
        "w8a8 per-channel sym, activations int8 dynamic per token, 16-bit from 6 (LLM.int8)"
    );
    // Tensors of the other kind are a contradiction, not a choice.
    assert_error(bnb_int8().set("load_in_8bit", json!(false)).set("load_in_4bit", json!(true)).load(), &["m.SCB"]);
    assert_eq!(bnb_nf4().open().unwrap().linear("m").unwrap().activation, ActQuant::None);
}
