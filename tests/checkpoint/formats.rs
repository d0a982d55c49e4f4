//! Every layout against what other programs packed and computed: `tests/golden/formats` (small layers of every bit width
//! and variant) and `tests/golden/dequantized.json` (whole real checkpoints, read by numpy).

use std::fs;
use std::path::{Path, PathBuf};

use lowbit::checkpoint::{Checkpoint, Expected};
use lowbit::dtype::HostData;
use lowbit::quant::{ActQuant, QuantWeight, Weight};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::common::fixtures::{demo, external_golden_dirs, fixture, fixture_names};

fn quantized(checkpoint: &Checkpoint, name: &str) -> QuantWeight {
    match checkpoint.linear(name).unwrap().weight {
        Weight::Quant(q) => q,
        Weight::Dense { .. } => panic!("{name} is not quantized"),
    }
}

fn cases() -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = fs::read_dir("tests/golden/formats")
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.join("config.json").is_file())
        .collect();
    dirs.sort();
    dirs
}

fn expected_weight(dir: &Path) -> (Vec<usize>, Vec<f32>) {
    let bytes = fs::read(dir.join("expected.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let view = tensors.tensor("weight").unwrap();
    let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    (view.shape().to_vec(), values)
}

#[test]
fn layers_packed_elsewhere_dequantize_exactly() {
    let cases = cases();
    assert!(cases.len() >= 50, "{} cases", cases.len());
    for dir in cases {
        let case = dir.display();
        let checkpoint = Checkpoint::open(&dir).unwrap_or_else(|e| panic!("{case}: {e}"));
        let (shape, expected) = expected_weight(&dir);
        let item = Expected::Linear { name: "m".into(), n: shape[0], k: shape[1], bias: false };
        checkpoint.check(&[item]).unwrap_or_else(|e| panic!("{case}: {e}"));
        let weight = quantized(&checkpoint, "m");
        assert_eq!([weight.n, weight.k], shape[..], "{case}");
        let got = weight.dequantize();
        let wrong = got.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{case}: first difference; got {:?}", wrong.map(|i| (got[i], expected[i])));
        assert_eq!(
            checkpoint.linear("m").unwrap().scheme(),
            checkpoint.linear_scheme("m").unwrap(),
            "{case}: scheme from values and from the configuration"
        );
    }
}

#[test]
fn schemes_of_small_layers() {
    let scheme = |case: &str| {
        Checkpoint::open(&Path::new("tests/golden/formats").join(case)).unwrap().linear_scheme("m").unwrap()
    };
    assert_eq!(scheme("gptq-w3-g64-asym-gptq-act").to_string(), "w3a16 g64 asym act-order");
    assert_eq!(scheme("gptq-w8-g-1-sym-gptq-plain").to_string(), "w8a16 per-channel sym");
    assert_eq!(scheme("awq-gemv_fast-g64-k256").to_string(), "w4a16 g64 asym");
    assert_eq!(scheme("ct017-w4-actorder-g32").to_string(), "w4a16 g32 sym act-order");
    assert_eq!(scheme("ct020-w4a8-g32").to_string(), "w4a8 g32 sym, activations int8 dynamic per token");
    assert_eq!(scheme("bnb-nf4-nested-b64-k512").to_string(), "nf4a16 g64");
    assert_eq!(scheme("bnb-nf4-b64-k96").to_string(), "nf4a16 g32"); // every other row starts inside a block
    assert_eq!(scheme("bnb-nf4-nested-b256-k64").to_string(), "nf4a16 per-channel"); // blocks of four rows
    for case in ["bitnet-divided", "bitnet-multiplied", "bitnet-floats", "bitnet-online"] {
        let words = "w2a8 per-channel sym, activations int8 dynamic per token";
        assert_eq!(scheme(case).to_string(), words, "{case}");
    }
    assert_eq!(scheme("bnb-fp4-b64-k128").to_string(), "fp4a16 g64");
    assert_eq!(
        scheme("ct020-w8a8-static-asym").activation,
        ActQuant::StaticPerTensor { scale: 0.0625, zero_point: -7 }
    );
}

#[test]
fn real_checkpoints_dequantize_as_numpy_does() {
    let golden: Value = serde_json::from_slice(&fs::read("tests/golden/dequantized.json").unwrap()).unwrap();
    let mut dirs = vec![("gptq-4bit-g128".to_owned(), demo())];
    dirs.extend(fixture_names().into_iter().map(|name| (name.clone(), fixture(&name))));
    for dir in external_golden_dirs() {
        let name = dir.file_name().unwrap().to_string_lossy().replace("books-6m-", "");
        dirs.push((name, dir));
    }
    let mut compared = 0;
    for (name, dir) in dirs {
        let Some(layers) = golden.get(&name).and_then(Value::as_object) else { continue };
        let checkpoint = Checkpoint::open(&dir).unwrap();
        for (module, probe) in layers {
            let w = quantized(&checkpoint, module).dequantize();
            for (i, value) in probe["values"].as_array().unwrap().iter().enumerate() {
                let at = 7919 * i % w.len();
                assert_eq!(f64::from(w[at]), value.as_f64().unwrap(), "{name}: {module}: element {at}");
            }
            let sum: f64 = w.iter().map(|&x| f64::from(x)).sum();
            let abs: f64 = w.iter().map(|&x| f64::from(x).abs()).sum();
            let (golden_sum, golden_abs) = (probe["sum"].as_f64().unwrap(), probe["abs"].as_f64().unwrap());
            // Exact terms; only the order of f64 additions differs.
            assert!((sum - golden_sum).abs() <= 1e-9 * golden_abs, "{name}: {module}: sum {sum}, golden {golden_sum}");
            assert!((abs - golden_abs).abs() <= 1e-9 * golden_abs, "{name}: {module}: abs {abs}, golden {golden_abs}");
            compared += 1;
        }
    }
    assert!(compared >= 5 * 42, "compared {compared} layers");
}

#[test]
fn unquantized_layers_come_in_their_file_type() {
    let checkpoint = Checkpoint::open(&demo()).unwrap();
    let HostData::BF16(norm) = checkpoint.tensor("model.norm.weight").unwrap() else { panic!("norm is not bf16") };
    assert_eq!(norm.len(), 256);
    assert!(checkpoint.has("model.embed_tokens.weight") && !checkpoint.has("lm_head.weight"));
    assert!(checkpoint.bytes() > 4_600_000);
}
