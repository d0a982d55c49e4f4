//! FP8 configurations and tensors that contradict themselves or each other.

use lowbit::quant::{ActQuant, Encoding, LinearWeight, QuantWeight, Weight};
use serde_json::{Value, json};

use super::build::{Build, K, N, assert_error, ct_config, ct_fp8, hf_fp8};

fn linear(build: &Build) -> LinearWeight {
    build.open().unwrap().linear("m").unwrap()
}

fn quantized(build: &Build) -> QuantWeight {
    let linear = linear(build);
    assert_eq!(
        (linear.scheme(), linear.activation),
        (build.open().unwrap().linear_scheme("m").unwrap(), ActQuant::None)
    );
    let Weight::Quant(q) = linear.weight else { panic!("not quantized") };
    assert_eq!((q.encoding, q.bits), (Encoding::E4m3, 8));
    q
}

/// The parts of a compressed-tensors scheme.
fn part<'a>(build: &'a mut Build, part: &str) -> &'a mut Value {
    &mut build.config["quantization_config"]["config_groups"]["group_0"][part]
}

fn ct(change: impl Fn(&mut Build)) -> Build {
    let mut build = ct_fp8();
    change(&mut build);
    build
}

#[test]
fn the_bases_mean_what_they_should() {
    let channel = ct_fp8().tensor("m.weight_scale", "BF16", &[N, 1], &[0x80, 0x3f, 0x00, 0x40]); // 1, 2, 1, 2, ...
    let w = quantized(&channel).dequantize();
    assert_eq!(w[..3], [1.0, -1.0, 2f32.powi(-9)]);
    assert_eq!(w[K..K + 3], [-2.0, 2f32.powi(-8), 2.0]); // codes go on where the row before ended

    // Blocks: rows 0 to 19 and 20 to 31, columns 0 to 47 and 48 to 63.
    let ones = hf_fp8().tensor("m.weight", "F8_E4M3", &[N, K], &[0x38]);
    let w = quantized(&ones).dequantize();
    for (row, column, value) in [(0, 0, 1.0), (19, 47, 1.0), (0, 48, 2.0), (19, 63, 2.0), (20, 47, 4.0), (31, 48, 8.0)]
    {
        assert_eq!(w[row * K + column], value, "row {row}, column {column}");
    }
    assert_eq!(ones.open().unwrap().linear_scheme("m").unwrap().to_string(), "fp8a16 g48");
    let wide = hf_fp8().set("weight_block_size", json!([16, 128])).floats("m.weight_scale_inv", &[1.0, 3.0]);
    let wide = wide.tensor("m.weight_scale_inv", "F32", &[2, 1], &[1.0f32, 3.0].map(f32::to_le_bytes).concat());
    assert_eq!(quantized(&wide).scales[15..17], [1.0, 3.0]);
    assert_eq!(wide.open().unwrap().linear_scheme("m").unwrap().to_string(), "fp8a16 per-channel");

    let tensor = hf_fp8().set("weight_block_size", Value::Null).floats("m.weight_scale_inv", &[3.0]);
    assert_eq!(quantized(&tensor).scales, vec![3.0; N]);
    // AutoFP8 and vLLM name the scale otherwise.
    let named = tensor.without("m.weight_scale_inv").floats("m.weight_scale", &[5.0]);
    assert_eq!(quantized(&named).scales, vec![5.0; N]);

    let block = ct(|b| {
        *part(b, "weights") = json!({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 64]})
    });
    let block = block.tensor("m.weight_scale", "F16", &[2, 1], &[0x00, 0x3c, 0x00, 0x40]);
    assert_eq!(quantized(&block).scales[15..17], [1.0, 2.0]);
    let group =
        ct(|b| *part(b, "weights") = json!({"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}));
    let group = group.tensor("m.weight_scale", "F16", &[N, 2], &[0x00, 0x3c, 0x00, 0x40]);
    assert_eq!((quantized(&group).group_size, &quantized(&group).scales[..3]), (32, &[1.0, 2.0, 1.0][..]));
}

#[test]
fn activations_are_noted_and_not_run() {
    let note = |build: &Build| build.load().unwrap().join("; ");
    assert!(note(&ct_fp8()).contains("1 layers: activations in FP8 (dynamic): not quantized here"));
    assert!(note(&hf_fp8()).contains("activations in FP8 (dynamic)"));
    let none = ct(|b| *part(b, "input_activations") = Value::Null);
    assert_eq!(note(&none), "");
    let fixed = json!({"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": false});
    let fixed = ct(|b| *part(b, "input_activations") = fixed.clone());
    assert_error(fixed.load(), &["`m.input_scale`: missing"]);
    let fixed = fixed.floats("m.input_scale", &[0.5]);
    assert!(note(&fixed).contains("activations in FP8 (static)"));
    assert_error(fixed.floats("m.input_scale", &[f32::NAN]).load(), &["m.input_scale", "NaN", "finite"]);
    for name in ["m.activation_scale", "m.input_scale"] {
        let fixed = hf_fp8().set("activation_scheme", json!("static")).floats(name, &[0.5]);
        assert!(note(&fixed).contains("(static)"));
        assert_error(fixed.floats(name, &[0.5, 1.0]).load(), &[name, "shape [2]"]);
        // A dynamic scheme has none: what is there says something that nothing reads.
        assert_error(hf_fp8().floats(name, &[0.5]).load(), &[name, "not understood"]);
    }
    assert_error(hf_fp8().set("activation_scheme", json!("static")).load(), &["`m.activation_scale`: missing"]);
    let cache = hf_fp8().tensor("model.layers.0.self_attn.k_scale", "BF16", &[1], &[0x80, 0x3f]);
    assert!(note(&cache).contains("scales of a quantized KV cache: not used"));
}

#[test]
fn the_configuration_is_checked() {
    for (field, value, reason) in [
        ("fmt", json!("e5m2"), "FP8 weights in `e5m2`"),
        ("activation_scheme", json!("lazy"), "`dynamic` or `static`, got `lazy`"),
        ("weight_block_size", json!([128]), "two sizes"),
        ("weight_block_size", json!([0, 128]), "two sizes"),
        ("weight_block_size", json!([128, -1]), "two sizes"),
        ("weight_block_size", json!([128, 128, 1]), "two sizes"),
        ("weight_block_size", json!(128), "two sizes"),
        ("weight_block_size", json!([1u64 << 40, 128]), "two sizes"),
        ("scale_fmt", json!("e5m3"), "`float` or `ue8m0`"),
        ("modules_to_not_convert", json!("lm_head"), "list of strings"),
        ("ignored_layers", json!([1]), "list of strings"),
        ("zigzag", json!(1), "not understood"),
    ] {
        let place = format!("quantization_config.{field}");
        assert_error(hf_fp8().set(field, value).load(), &["config.json", &place, reason]);
    }
    hf_fp8().set("scale_fmt", json!("ue8m0")).set("modules_to_not_convert", Value::Null).load().unwrap();

    let weights = |value: Value| ct(|b| *part(b, "weights") = value.clone());
    let base = json!({"num_bits": 8, "type": "float", "strategy": "channel"});
    let with = |field: &str, value: Value| {
        let mut changed = base.clone();
        changed[field] = value;
        weights(changed)
    };
    weights(base.clone()).load().unwrap();
    for (field, value, reason) in [
        ("num_bits", json!(4), "floats of 4 bits"),
        ("type", json!("int"), "`int` codes in the format `float-quantized`"),
        ("type", json!("complex"), "`complex` codes"),
        ("symmetric", json!(false), "expected true for floats"),
        ("strategy", json!("block"), "missing; the strategy `block`"),
        ("strategy", json!("group"), "missing; the strategy `group`"),
        ("strategy", json!("tensor_group"), "`tensor_group`"),
        ("block_structure", json!([128, 128]), "expected null with the strategy `channel`"),
        ("actorder", json!("group"), "reordered columns in FP8"),
        ("dynamic", json!(true), "while running"),
    ] {
        assert_error(with(field, value).load(), &["config.json", "weights.", field, reason]);
    }
    let activations = |field: &str, value: Value| {
        let mut changed = json!({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": true});
        changed[field] = value;
        ct(|b| *part(b, "input_activations") = changed.clone())
    };
    for (field, value, reason) in [
        ("num_bits", json!(4), "floats of 4 bits"),
        ("type", json!("int"), "`int` activations of FP8 weights"),
        ("dynamic", json!("local"), "locally dynamic"),
        ("dynamic", json!(false), "static activation scales by `token`"),
        ("strategy", json!("channel"), "dynamic activation scales by `channel`"),
    ] {
        assert_error(activations(field, value).load(), &["config.json", "input_activations.", field, reason]);
    }
    let config = ct_config("int-quantized", base, Value::Null);
    let mut wrong = ct_fp8();
    wrong.config["quantization_config"] = config;
    assert_error(wrong.load(), &["weights.type", "`float` codes in the format `int-quantized`"]);
}

#[test]
fn tensors_are_checked() {
    for (build, scale, shape) in
        [(ct_fp8 as fn() -> Build, "m.weight_scale", vec![N, 1]), (hf_fp8, "m.weight_scale_inv", vec![2, 2])]
    {
        let full = format!("`{scale}`");
        assert_error(build().without("m.weight").load(), &["`m.weight`: missing"]);
        assert_error(build().without(scale).load(), &[&full, "missing"]);
        for dtype in ["F8_E5M2", "U8", "I8"] {
            let other = build().tensor("m.weight", dtype, &[N, K], &[0]);
            assert_error(other.load(), &["`m.weight`", &format!("is {dtype}; expected F8_E4M3")]);
        }
        // A scale beside a weight that is not in FP8, as one whose codes were dequantized carelessly.
        assert_error(build().tensor("m.weight", "BF16", &[N, K], &[0]).load(), &["is BF16; expected F8_E4M3"]);
        assert_error(build().tensor("m.weight", "F8_E4M3", &[N, K, 1], &[0]).load(), &["m.weight", "a matrix"]);
        assert_error(build().tensor("m.weight", "F8_E4M3", &[N / 2, K], &[0]).load(), &["[32, 64]"]);
        for wrong in [vec![shape[1], shape[0] + 1], vec![shape[0]; 3], vec![shape[0] + 1, shape[1]], vec![N + 1]] {
            let other = build().tensor(scale, "F32", &wrong, &[0, 0, 0x80, 0x3f]);
            assert_error(other.load(), &[&full, &format!("shape {wrong:?}"), &format!("expected {shape:?}")]);
        }
        assert_error(build().tensor(scale, "F8_E4M3", &shape, &[0x38]).load(), &[&full, "is F8_E4M3; expected F16"]);
        for (bytes, value) in [([0xc0, 0x7f], "NaN"), ([0x80, 0x7f], "inf"), ([0x80, 0xff], "-inf")] {
            assert_error(build().tensor(scale, "BF16", &shape, &bytes).load(), &[scale, value, "finite"]);
        }
        // As everywhere, a scale of 0 or below is a value like any other.
        build().tensor(scale, "BF16", &shape, &[0, 0]).load().unwrap();
        build().tensor(scale, "BF16", &shape, &[0x80, 0xbf]).load().unwrap();
        assert_error(build().floats("m.weight_zero", &[1.0]).load(), &["m.weight_zero", "not understood"]);
        assert_error(build().floats("m.bias", &[1.0]).load(), &["m.bias", "shape [1]"]);
    }
    ct_fp8().tensor("m.weight_zero_point", "F8_E4M3", &[N, 1], &[0]).load().unwrap();
    let wrong = ct_fp8().tensor("m.weight_zero_point", "F8_E4M3", &[N, 1], &[0x38]);
    assert_error(wrong.load(), &["m.weight_zero_point", "other values than 0"]);
}

#[test]
fn a_nan_is_named_with_its_place() {
    for code in [0x7f, 0xff] {
        for build in [ct_fp8(), hf_fp8()] {
            let mut codes = vec![0x7e; N * K];
            codes[5 * K + 17] = code;
            let build = build.tensor("m.weight", "F8_E4M3", &[N, K], &codes);
            let place = format!("row 5, column 17 is NaN ({code:#04x})");
            assert_error(build.load(), &["model.safetensors", "`m.weight`", &place]);
        }
    }
    ct_fp8().tensor("m.weight", "F8_E4M3", &[N, K], &[0x7e, 0xfe, 0x80, 0]).load().unwrap();
}

/// Which layers are in FP8 the file says itself.
#[test]
fn other_layers_stay_as_they_are() {
    for named in [json!(["m"]), json!([]), Value::Null] {
        let build = hf_fp8().set("modules_to_not_convert", named.clone());
        quantized(&build);
        let plain = build.without("m.weight_scale_inv").tensor("m.weight", "BF16", &[N, K], &[0x80, 0x3f]);
        assert!(matches!(linear(&plain).weight, Weight::Dense { .. }), "{named}");
        assert_eq!(plain.load().unwrap(), [""; 0]);
    }
    let ignored = ct_fp8().set("ignore", json!(["m"]));
    assert_error(ignored.load(), &["m.weight_scale", "not quantized"]);
    let plain = ignored.without("m.weight_scale").tensor("m.weight", "BF16", &[N, K], &[0x80, 0x3f]);
    assert!(matches!(linear(&plain).weight, Weight::Dense { .. }));
    let unnamed = Build::new(Value::Null).tensor("m.weight", "F8_E4M3", &[N, K], &[0x38]);
    assert_error(unnamed.load(), &["m.weight", "is F8_E4M3; expected F16 or BF16 or F32"]);
}
