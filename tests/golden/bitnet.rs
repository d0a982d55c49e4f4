//! A BitNet b1.58 model that transformers read and ran in float32 (`formats/make.py`): as a Llama of either linear class, and as
//! a BitNet, with norms inside attention and MLP and squared ReLU.

use std::fs;
use std::path::{Path, PathBuf};

use lowbit::checkpoint::Checkpoint;
use lowbit::device::Device;
use lowbit::dtype::DType;
use lowbit::models::{Batch, Limits, ModelRunner, Slot};
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

const DIR: &str = "tests/golden/bitnet";

/// The model as `case` has it, and scales as its linear class has them. The scales of the files are bf16, whose reciprocals
/// are not: they become f32.
fn model_dir(case: &str) -> (TempDir, PathBuf) {
    let linear_class = if case == "bitlinear" { case } else { "autobitlinear" };
    let dir = tempfile::tempdir().unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(Path::new(DIR).join("config.json")).unwrap()).unwrap();
    config["quantization_config"]["linear_class"] = linear_class.into();
    if case == "bitnet" {
        config["architectures"] = ["BitNetForCausalLM"].into();
        config["model_type"] = "bitnet".into();
        config["hidden_act"] = "relu2".into();
        config["auto_map"] = serde_json::json!({"AutoConfig": "configuration_bitnet.BitNetConfig"});
    }
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let bytes = fs::read(Path::new(DIR).join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut reciprocals = Vec::new();
    for name in file.names().into_iter().filter(|name| name.ends_with("_scale") && linear_class == "autobitlinear") {
        let data = file.tensor(name).unwrap().data();
        let scale = half::bf16::from_le_bytes([data[0], data[1]]).to_f32();
        reciprocals.push((name.to_owned(), (1.0 / scale).to_le_bytes()));
    }
    let kept = file.tensors().into_iter().filter(|(name, _)| reciprocals.iter().all(|(other, _)| other != name));
    let mut tensors: Vec<_> = kept.collect();
    for (name, scale) in &reciprocals {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], scale).unwrap();
        tensors.push((name.clone(), view));
    }
    fs::write(dir.path().join("model.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
    let path = dir.path().to_path_buf();
    (dir, path)
}

/// Logits of every position, `most` the largest error allowed and `mean` the mean one.
///
/// In f32 no activation rounds otherwise than in the golden run; in 16 bits some do, each by a step of 1/127 of its row's largest.
fn check(device: &Device, most: f32, mean: f32) {
    let bytes = fs::read(Path::new(DIR).join("logits.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| -> Vec<[u8; 4]> {
        golden.tensor(name).unwrap().data().chunks_exact(4).map(|b| b.try_into().unwrap()).collect()
    };
    let ids: Vec<u32> = words("ids").into_iter().map(u32::from_le_bytes).collect();
    for case in ["bitlinear", "autobitlinear", "bitnet"] {
        let expected: Vec<f32> = words(case).into_iter().map(f32::from_le_bytes).collect();
        let (_dir, path) = model_dir(case);
        let limits = Limits { max_logit_rows: ids.len(), ..Limits::new(ids.len(), ids.len(), 1) };
        let checkpoint = Checkpoint::open(&path).unwrap();
        let mut model = ModelRunner::load(&checkpoint, device, limits, &mut |_, _| ()).unwrap();
        let scheme = model.model().layers[0].slot(Slot::Down).parts()[0].scheme.to_string();
        assert_eq!(scheme, "w2a8 per-channel sym, activations int8 dynamic per token");
        let mut batch = Batch::default();
        let blocks: Vec<u32> = (0..limits.kv_blocks as u32).collect();
        batch.push(&ids, 0, &blocks, false);
        batch.logit_rows = (0..ids.len() as u32).collect();
        let got = model.run(&batch).unwrap().read().unwrap();
        assert_eq!(got.len(), expected.len());
        let errors: Vec<f32> = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).collect();
        let worst = errors.iter().copied().fold(0.0, f32::max);
        let average = errors.iter().sum::<f32>() / errors.len() as f32;
        println!("{case} on {}: logits off by {worst:.5}, mean {average:.5}", device.name());
        assert!(worst <= most && average <= mean, "{case}: off by {worst}, mean {average}");
    }
}

#[test]
fn verify_passes() {
    let (dir, path) = model_dir("bitnet");
    let got = crate::cli::lowbit(&["verify", path.to_str().unwrap(), "--device", "cpu", "--json"]).json();
    let checks = got["checks"].as_array().unwrap();
    let has = |op: &str| checks.iter().any(|check| check["op"] == op);
    assert!(got["passed"] == true && has("attn_sub_norm") && has("ffn_sub_norm"), "{got}");
    let to = dir.path().join("quantized");
    let refused = crate::cli::lowbit(&["quantize", path.to_str().unwrap(), to.to_str().unwrap(), "--method", "rtn"]);
    assert_eq!(refused.code, Some(5), "{}", refused.stderr);
}

#[test]
fn cpu() {
    check(&Device::cpu(), 1e-3, 1e-4);
    check(&Device::cpu_reference(), 1e-3, 1e-4);
}

mod cuda {
    use super::*;

    #[test]
    #[ignore = "needs a CUDA device"]
    fn f16() {
        check(&Device::cuda(0, DType::F16).expect("a CUDA device"), 0.5, 0.03);
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn bf16() {
        check(&Device::cuda(0, DType::BF16).expect("a CUDA device"), 0.8, 0.06);
    }
}
