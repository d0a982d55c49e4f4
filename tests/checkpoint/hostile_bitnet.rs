//! BitNet configurations and tensors that contradict themselves or each other.

use lowbit::quant::{ActQuant, LinearWeight, Weight};
use serde_json::{Value, json};

use super::build::{Build, K, N, assert_error};

/// A correct `bitlinear` layer: rows 0 to 7 are -1, 8 to 15 are 0, 16 to 23 are 1, 24 to 31 are 0; over a scale of 4.
fn packed() -> Build {
    Build::new(json!({"quant_method": "bitnet", "modules_to_not_convert": Value::Null}))
        .tensor("m.weight", "U8", &[N / 4, K], &[0b01_10_01_00])
        .floats("m.weight_scale", &[4.0])
}

/// A correct `autobitlinear` layer as trained.
fn online() -> Build {
    Build::new(json!({"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}))
        .tensor(
            "m.weight",
            "BF16",
            &[N, K],
            &[0x80, 0x3f, 0x80, 0xbf, 0, 0, 0, 0], // 1, -1, 0, 0
        )
}

fn linear(build: &Build) -> LinearWeight {
    build.open().unwrap().linear("m").unwrap()
}

fn values(build: &Build) -> Vec<f32> {
    let linear = linear(build);
    assert_eq!(linear.activation, ActQuant::DynamicPerToken);
    match linear.weight {
        Weight::Quant(q) => q.dequantize(),
        Weight::Dense { .. } => panic!("not quantized"),
    }
}

#[test]
fn the_bases_mean_what_they_should() {
    assert!(packed().load().unwrap().is_empty());
    let column: Vec<f32> = values(&packed()).chunks(K * N / 4).map(|rows| rows[0]).collect();
    assert_eq!(column, [-0.25, 0.0, 0.25, 0.0]);
    let times = values(&packed().set("linear_class", json!("autobitlinear")));
    assert_eq!(times[0], -4.0);
    // In 16 bits a weight may be ternary already, of any magnitude.
    let floats = online().set("quantization_mode", json!("offline")).floats("m.weight_scale", &[3.0]);
    assert_eq!(values(&floats)[..4], [3.0, -3.0, 0.0, 0.0]);
    assert!(online().load().unwrap().is_empty());
    assert_eq!(values(&online())[..4], [0.5, -0.5, 0.0, 0.0]); // the mean magnitude
}

#[test]
fn the_configuration_is_checked() {
    for (field, value, reason) in [
        ("linear_class", json!("bitblas"), "`bitlinear` or `autobitlinear`"),
        ("quantization_mode", json!("lazy"), "`offline` or `online`, got `lazy`"),
        ("use_rms_norm", json!(true), "a norm of its own"),
        ("use_rms_norm", json!("no"), "true or false"),
        ("rms_norm_eps", json!("x"), "a number"),
        ("modules_to_not_convert", json!("lm_head"), "list of strings"),
        ("modules_to_not_convert", json!(["("]), "not a regular expression"),
        ("zigzag", json!(1), "not understood"),
    ] {
        let place = format!("quantization_config.{field}");
        assert_error(packed().set(field, value).load(), &["config.json", &place, reason]);
    }
    packed().set("use_rms_norm", json!(false)).set("rms_norm_eps", json!(1e-6)).load().unwrap();
}

/// Of weights as trained only the configuration tells which stay; of the others the file does.
#[test]
fn modules_that_stay_floating_point() {
    for (keys, stays) in [
        (json!(["m"]), true),
        (json!([".*"]), true),
        (json!(["lm_head", "x|m"]), true),
        (json!(["lm_head"]), false),
        (json!([]), false),
        (Value::Null, false),
    ] {
        let build = online().set("modules_to_not_convert", keys.clone());
        assert_eq!(matches!(linear(&build).weight, Weight::Dense { .. }), stays, "{keys}");
    }
    values(&packed().set("modules_to_not_convert", json!(["m"])));
}

#[test]
fn tensors_are_checked() {
    assert_error(packed().without("m.weight").load(), &["`m.weight`: missing"]);
    assert_error(packed().without("m.weight_scale").load(), &["`m.weight_scale`: missing"]);
    assert_error(packed().tensor("m.weight", "I8", &[N / 4, K], &[0]).load(), &["m.weight", "is I8; expected U8"]);
    assert_error(packed().tensor("m.weight", "BF16", &[N, K], &[0]).load(), &["m.weight", "is BF16; expected U8"]);
    assert_error(packed().tensor("m.weight", "U8", &[N, K], &[0]).load(), &["[128, 64]", "[32, 64]"]);
    assert_error(packed().tensor("m.weight", "U8", &[N / 4, K], &[3]).load(), &["m.weight", "a field of 3"]);
    assert_error(packed().floats("m.weight_scale", &[1.0, 1.0]).load(), &["m.weight_scale", "shape [2]"]);
    for scale in [0.0, f32::NAN, f32::INFINITY] {
        assert_error(packed().floats("m.weight_scale", &[scale]).load(), &["m.weight_scale", "expected"]);
    }
    assert_error(packed().floats("m.rms_norm.weight", &[1.0]).load(), &["m.rms_norm.weight", "not understood"]);
    assert_error(online().floats("m.weight_scale", &[1.0]).load(), &["m.weight_scale", "`online`"]);
    assert_error(online().tensor("m.weight", "F16", &[N, K], &[0x00, 0x7e]).load(), &["m.weight", "finite"]);
    let trained = online().set("quantization_mode", json!("offline"));
    assert_error(trained.load(), &["`m.weight_scale`: missing"]);
    let trained = online().set("quantization_mode", json!("offline")).floats("m.weight_scale", &[1.0]);
    let trained = trained.tensor("m.weight", "BF16", &[N, K], &[0x80, 0x3f, 0x00, 0x3f]);
    assert_error(trained.load(), &["element 1 is 0.5", "expected -1, 0 and 1", "`online`"]);
}
