//! Quantization configurations and tensors that contradict themselves or each other.

use std::fs;

use lowbit::quant::Weight;
use serde_json::{Value, json};

use super::build::{Build, K, N, assert_error, awq, ct_config, ct_int8, ct_packed, gptq};

const F16_NAN: [u8; 2] = [0x00, 0x7e];
const F16_INF: [u8; 2] = [0x00, 0x7c];

#[test]
fn the_bases_of_these_tests_load() {
    for build in [gptq(), awq(), ct_packed(), ct_int8()] {
        assert!(build.load().unwrap().is_empty());
    }
}

#[test]
fn numbers_of_the_configuration_are_bounded() {
    let builds: [fn() -> Build; 2] = [gptq, awq];
    for build in builds {
        for (field, value, reason) in [
            ("group_size", json!(0), "got 0"),
            ("group_size", json!(-2), "got -2"),
            ("group_size", json!(1e9), "got 1000000000"),
            ("group_size", json!("128"), "got a string"),
            ("bits", json!(0), "got 0"),
            ("bits", json!(17), "got 17"),
            ("bits", json!(4.5), "got 4.5"),
            ("pack_dtype", json!("int16"), "int32"),
            ("zigzag", json!(1), "not understood"),
        ] {
            assert_error(
                build().set(field, value).load(),
                &["config.json", &format!("quantization_config.{field}"), reason],
            );
        }
    }
    assert_error(awq().set("bits", json!(3)).load(), &["quantization_config.bits", "expected 4 for AWQ, got 3"]);
    assert_error(gptq().set("bits", json!(5)).load(), &["quantization_config.bits", "expected 2, 3, 4 or 8"]);
    // Fields that are empty say nothing, whatever their name.
    gptq().set("zigzag", Value::Null).load().unwrap();
    gptq().set("meta", json!({"quantizer": ["x:1"], "anything": 1})).load().unwrap();

    let weights = |field: &str, value: Value| {
        let mut build = ct_packed();
        build.config["quantization_config"]["config_groups"]["group_0"]["weights"][field] = value;
        build
    };
    let place = "quantization_config.config_groups.group_0.weights";
    for (field, value, reason) in [
        ("num_bits", json!(0), "expected 2 to 8, got 0"),
        ("num_bits", json!(17), "expected 2 to 8, got 17"),
        ("group_size", json!(0), "got 0"),
        ("group_size", json!(-7), "got -7"),
        ("type", json!("float"), "`float` codes"),
        ("strategy", json!("block"), "`block`"),
        ("strategy", json!(3), "expected a string"),
        ("actorder", json!("sideways"), "sideways"),
        ("dynamic", json!(true), "while running"),
        ("block_structure", json!([128, 128]), "block scales"),
        ("is_mx", json!(true), "not understood"),
    ] {
        assert_error(weights(field, value).load(), &["config.json", &format!("{place}.{field}"), reason]);
    }
}

#[test]
fn what_is_not_supported_is_named() {
    assert_error(
        gptq().set("checkpoint_format", json!("bitblas")).load(),
        &["checkpoint_format", "bitblas", "Use the checkpoint"],
    );
    assert_error(awq().set("version", json!("exllama")).load(), &["version", "exllama"]);
    for method in ["exl2", "fbgemm_fp8", "quip", "marlin"] {
        let error = assert_error(
            gptq().set("quant_method", json!(method)).load(),
            &["quantization_config.quant_method", method],
        );
        assert_eq!(error.exit_code(), 5);
    }
    assert_error(gptq().set("quant_method", Value::Null).load(), &["quant_method", "missing"]);
    for (field, value) in [
        ("transform_config", json!({"config_groups": {"u": {}}})),
        ("sparsity_config", json!({"format": "sparse-24-bitmask"})),
        ("moe_sparsity_config", json!({"x": 1})),
        ("quantization_status", json!("thawed")),
        ("format", json!("nvfp4-pack-quantized")),
        ("format", json!("marlin-24")),
        ("config_groups", json!(7)),
    ] {
        assert_error(
            ct_packed().set(field, value).load(),
            &["quantization_config.", field.trim_start_matches("config_")],
        );
    }
    let activations = |field: &str, value: Value| {
        let mut build = ct_int8();
        build.config["quantization_config"]["config_groups"]["group_0"]["input_activations"][field] = value;
        build
    };
    for (field, value, reason) in [
        ("num_bits", json!(4), "activations of 4 bits"),
        ("strategy", json!("group"), "`group`"),
        ("dynamic", json!(true), "dynamic activation scales by `tensor`"),
        ("dynamic", json!("local"), "locally dynamic"),
        ("type", json!("float"), "`float` codes"),
    ] {
        assert_error(activations(field, value).load(), &["input_activations", reason]);
    }
    let mut outputs = ct_int8();
    outputs.config["quantization_config"]["config_groups"]["group_0"]["output_activations"] = json!({"num_bits": 8});
    assert_error(outputs.load(), &["output_activations"]);
}

#[test]
fn scales_are_finite() {
    for fill in [F16_NAN, F16_INF] {
        assert_error(
            gptq().tensor("m.scales", "F16", &[2, N], &fill).load(),
            &["model.safetensors", "m.scales", "finite"],
        );
        assert_error(awq().tensor("m.scales", "F16", &[2, N], &fill).load(), &["m.scales", "finite"]);
        assert_error(ct_packed().tensor("m.weight_scale", "F16", &[N, 2], &fill).load(), &["m.weight_scale", "finite"]);
        assert_error(ct_int8().tensor("m.input_scale", "F16", &[1], &fill).load(), &["m.input_scale", "finite"]);
    }
    assert_error(
        ct_int8().tensor("m.input_scale", "F16", &[1], &[0, 0]).load(),
        &["m.input_scale", "is 0; expected a positive"],
    );
    // Zero and subnormal weight scales are values: they make a weight zero or tiny, exactly.
    for (fill, scale) in [([0, 0], 0.0f32), ([1, 0], 2f32.powi(-24))] {
        let build = gptq().tensor("m.scales", "F16", &[2, N], &fill);
        build.load().unwrap();
        let Weight::Quant(q) = build.open().unwrap().linear("m").unwrap().weight else { panic!() };
        assert!(q.scales.iter().all(|&s| s == scale) && q.dequantize().iter().all(|w| w.abs() <= 8.0 * scale));
    }
}

#[test]
fn zero_points_agree_with_the_configuration() {
    assert!(gptq().load().unwrap().is_empty());
    let v2 = gptq().tensor("m.qzeros", "I32", &[2, N / 8], &[0x88]);
    let notes = v2.load().unwrap().join("\n");
    assert!(notes.contains("1 layers: labelled v1") && notes.contains("read as v2"), "{notes}");
    assert!(v2.open().unwrap().linear_scheme("m").unwrap().symmetric);
    let Weight::Quant(q) = v2.open().unwrap().linear("m").unwrap().weight else { panic!() };
    assert!(q.is_symmetric());
    assert!(
        gptq()
            .tensor("m.qzeros", "I32", &[2, N / 8], &[0x88])
            .set("checkpoint_format", json!("gptq_v2"))
            .load()
            .unwrap()
            .is_empty()
    );

    assert_error(gptq().tensor("m.qzeros", "I32", &[2, N / 8], &[0]).load(), &["m.qzeros", "symmetric", "got 0"]);
    assert_error(gptq().tensor("m.qzeros", "I32", &[2, N / 8], &[0x78]).load(), &["m.qzeros", "mixture"]);
    // Stored 15 in a v1 file is 16, not masked to 0.
    let top = gptq().set("sym", json!(false)).tensor("m.qzeros", "I32", &[2, N / 8], &[0xff]);
    assert!(top.load().unwrap().join("").contains("asymmetric zero points read as v1"));
    let Weight::Quant(q) = top.open().unwrap().linear("m").unwrap().weight else { panic!() };
    assert!(q.zeros.iter().all(|&z| z == 16.0));

    awq().set("zero_point", json!(false)).tensor("m.qzeros", "I32", &[2, N / 8], &[0x88]).load().unwrap();
    awq().set("zero_point", json!(false)).without("m.qzeros").load().unwrap();
    assert_error(awq().set("zero_point", json!(false)).load(), &["m.qzeros", "zero_point false"]);
    assert_error(awq().without("m.qzeros").load(), &["m.qzeros", "missing"]);

    let symmetric = |fill| ct_int8().tensor("m.weight_zero_point", "I8", &[N, 1], fill);
    symmetric(&[0]).load().unwrap();
    assert_error(symmetric(&[3]).load(), &["m.weight_zero_point", "symmetric"]);
    assert_error(ct_int8().tensor("m.input_zero_point", "I8", &[1], &[3]).load(), &["m.input_zero_point", "is 3"]);
}

#[test]
fn column_groups_are_checked() {
    let with =
        |g_idx: &[i32], desc_act: bool| gptq().set("desc_act", json!(desc_act)).ints("m.g_idx", &[g_idx.len()], g_idx);
    let natural: Vec<i32> = (0..K as i32).map(|c| c / 32).collect();
    let reversed: Vec<i32> = natural.iter().rev().copied().collect();
    with(&natural, true).load().unwrap();
    with(&vec![0; K], false).load().unwrap();
    with(&reversed, true).load().unwrap();
    assert!(with(&reversed, true).open().unwrap().linear_scheme("m").unwrap().act_order);

    let changed = |at: usize, to: i32| {
        let mut g = natural.clone();
        g[at] = to;
        g
    };
    assert_error(with(&changed(5, 2), true).load(), &["m.g_idx", "column 5 is in group 2; expected 0 to 1"]);
    assert_error(with(&changed(5, -1), true).load(), &["m.g_idx", "group -1"]);
    assert_error(with(&changed(5, i32::MIN), true).load(), &["m.g_idx", "column 5"]);
    assert_error(with(&changed(5, 1), true).load(), &["m.g_idx", "group 0 has not 32 columns"]);
    assert_error(with(&vec![0; K], true).load(), &["m.g_idx", "all zero", "desc_act"]);
    assert_error(gptq().set("desc_act", json!(true)).load(), &["m.g_idx", "absent"]);
    assert_error(with(&natural[..40], true).load(), &["m.qweight", "8 rows of words for 40 inputs"]);

    let packed = |g_idx: &[i32]| {
        let mut build = ct_packed().ints("m.weight_g_idx", &[K], g_idx);
        build.config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = json!("group");
        build
    };
    packed(&[-1]).load().unwrap();
    packed(&reversed).load().unwrap();
    assert_error(packed(&changed(9, 7)).load(), &["m.weight_g_idx", "column 9"]);
    assert_error(packed(&changed(9, -1)).load(), &["m.weight_g_idx", "group -1"]);
}

#[test]
fn shapes_are_checked() {
    assert_error(gptq().tensor("m.scales", "F16", &[3, N], &[0]).load(), &["m.scales", "[3, 32]", "[2, 32]"]);
    assert_error(gptq().set("group_size", json!(48)).set("bits", json!(8)).load(), &["m.qzeros", "[2, 4]", "[1, 8]"]);
    assert_error(gptq().tensor("m.qweight", "I32", &[K, 2, 2], &[0]).load(), &["m.qweight", "expected a matrix"]);
    assert_error(gptq().tensor("m.qweight", "I64", &[K / 8, N], &[0]).load(), &["m.qweight", "is I64; expected I32"]);
    assert_error(gptq().without("m.qweight").load(), &["m.qweight", "missing"]);
    assert_error(gptq().tensor("m.weight", "F16", &[N, K], &[0]).load(), &["m.weight", "beside qweight"]);
    assert_error(ct_int8().tensor("m.weight_scale", "F32", &[N, 1, 1], &[0]).load(), &["m.weight_scale", "[32, 1, 1]"]);
    assert_error(ct_int8().tensor("m.weight_scale", "F32", &[1], &[0]).load(), &["m.weight_scale", "[1]", "[32, 1]"]);
    assert_error(ct_int8().without("m.input_scale").load(), &["m.input_scale", "missing"]);
    assert_error(ct_packed().without("m.weight_shape").load(), &["m.weight_shape", "missing"]);
    for shape in [[N as u8, 0], [N as u8, 63], [31, 64]] {
        let fill: Vec<u8> = shape.iter().flat_map(|&s| i64::from(s).to_le_bytes()).collect();
        let wrong = ct_packed().tensor("m.weight_shape", "I64", &[2], &fill).open().unwrap().linear("m");
        // 63 codes fill the same eight words as 64 do.
        if shape[1] == 63 {
            assert_eq!(wrong.unwrap().k(), 63);
        } else {
            assert_error(wrong, &["m.weight_shape", "does not fit"]);
        }
    }
    let huge: Vec<u8> = [N as i64, i64::MAX].iter().flat_map(|s| s.to_le_bytes()).collect();
    assert_error(ct_packed().tensor("m.weight_shape", "I64", &[2], &huge).load(), &["m.weight_shape", "does not fit"]);
    // Codes of four bits in bytes.
    let weights = json!({"num_bits": 4, "strategy": "channel"});
    let mut wide = ct_int8().without("m.input_scale").tensor("m.weight", "I8", &[N, K], &[8]);
    wide.config["quantization_config"] = ct_config("int-quantized", weights, Value::Null);
    assert_error(wide.load(), &["m.weight", "outside -8 to 7"]);
}

#[test]
fn layers_are_stored_as_the_configuration_says() {
    let ignored = |patterns: Value| ct_packed().set("ignore", patterns);
    assert_error(ignored(json!(["m"])).load(), &["m.weight_packed", "not quantized"]);
    assert_error(ignored(json!(["re:^m$"])).load(), &["m.weight_packed", "not quantized"]);
    assert_error(ignored(json!(["Linear"])).load(), &["m.weight_packed", "not quantized"]);
    ignored(json!(["re:n", "lm_head", "mm"])).load().unwrap();
    assert_error(ignored(json!(["re:("])).load(), &["quantization_config.ignore", "not a regular expression"]);
    assert_error(ignored(json!([7])).load(), &["quantization_config.ignore", "list of strings"]);
    // Bounded in time, whatever the pattern.
    let bomb = ignored(json!([format!("re:(?=a)?(m|m?)*{}$", "(x+x+)+".repeat(20))]));
    let _ = bomb.load();

    let mut plain = ct_packed().without("m.weight_packed").without("m.weight_scale").without("m.weight_shape");
    plain = plain.tensor("m.weight", "BF16", &[N, K], &[0x80, 0x3f]);
    assert_error(plain.load(), &["m.weight_packed", "missing"]);
    plain.set("ignore", json!(["re:.*m"])).load().unwrap();

    let mut two = ct_packed();
    let group = two.config["quantization_config"]["config_groups"]["group_0"].clone();
    let mut other = group.clone();
    other["weights"]["num_bits"] = json!(8);
    two.config["quantization_config"]["config_groups"]["group_1"] = other.clone();
    assert_error(two.load(), &["`group_0`", "`group_1`", "differ"]);
    // A name goes before the class, whatever the order.
    two.config["quantization_config"]["config_groups"]["group_0"] = other;
    two.config["quantization_config"]["config_groups"]["group_1"] = group;
    two.config["quantization_config"]["config_groups"]["group_1"]["targets"] = json!(["re:m"]);
    two.load().unwrap();

    assert_error(gptq().set("dynamic", json!({"-:^m": {}})).load(), &["m.qweight", "not quantized"]);
    gptq().set("bits", json!(8)).set("dynamic", json!({"x": {"bits": 2}, "+:m": {"bits": 4}})).load().unwrap();
    assert_error(
        gptq().set("dynamic", json!({"m": {"bits": 4, "rank": 8}})).load(),
        &["dynamic.m.rank", "not understood"],
    );
    assert_error(gptq().set("dynamic", json!({"[": {}})).load(), &["dynamic.[", "regular expression"]);
    assert_error(awq().set("modules_to_not_convert", json!(["m"])).load(), &["m.qweight", "not quantized"]);
}

#[test]
fn sidecar_files_are_used_and_compared() {
    let mut build = gptq();
    let quantization = build.config["quantization_config"].take();
    build = build.file("quantize_config.json", &quantization.to_string());
    build.load().unwrap();
    build.config["quantization_config"] = quantization.clone();
    build.load().unwrap();
    let mut other = quantization;
    other["group_size"] = json!(128);
    fs::write(build.dir.path().join("quantize_config.json"), other.to_string()).unwrap();
    assert_error(build.load(), &["quantize_config.json", "contradicts config.json"]);

    let mut llm_awq = awq();
    llm_awq.config["quantization_config"].take();
    llm_awq
        .file("quant_config.json", r#"{"zero_point": true, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}"#)
        .load()
        .unwrap();
}
