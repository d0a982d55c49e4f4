//! The memory plan is what is then allocated, to the byte.

use std::path::{Path, PathBuf};

use lowbit::checkpoint::{Architecture, Checkpoint, Expected, ModelConfig};
use lowbit::device::Device;
use lowbit::dtype::DType;
use lowbit::models::{
    DummyScheme, Limits, MemoryPlan, Model, ModelRunner, dummy_config, dummy_linear, expected_tensors,
};

use crate::common::fixtures::{demo, fixture};

#[track_caller]
fn assert_planned(what: &str, plan: MemoryPlan, runner: &ModelRunner) {
    let got = runner.allocated();
    assert!(got.weights > 0 && got.kv_cache > 0 && got.scratch > 0, "{what}: {got:?}");
    assert_eq!(MemoryPlan { packing: 0, ..plan }, got, "{what}");
}

/// More logit rows than tokens, blocks that are not full: sizes whose parts can be told from each other.
fn limits() -> Limits {
    Limits { max_logit_rows: 37, ..Limits::new(50, 33, 3) }
}

#[test]
fn checkpoints() {
    let dirs: [PathBuf; 4] = [demo(), fixture("awq-4bit-g128"), fixture("ct-w4a16-gptq"), fixture("ct-w8a8-dynamic")];
    for dir in dirs {
        let what = dir.display().to_string();
        let (checkpoint, device) = (Checkpoint::open(&dir).expect("opens"), Device::cpu());
        let plan = MemoryPlan::of_checkpoint(&checkpoint, &limits(), (&device).into()).expect("a plan");
        let runner = ModelRunner::load(&checkpoint, &device, limits(), &mut |_, _| ()).expect("loads");
        assert_planned(&what, plan, &runner);
    }
}

/// The plan takes scales to be 16-bit floats; those of this BitNet model are none, and take two bytes more a row.
#[test]
fn scales_of_32_bits() {
    let (checkpoint, device) = (Checkpoint::open(Path::new("tests/golden/bitnet")).expect("opens"), Device::cpu());
    let plan = MemoryPlan::of_checkpoint(&checkpoint, &limits(), (&device).into()).expect("a plan");
    let got = ModelRunner::load(&checkpoint, &device, limits(), &mut |_, _| ()).expect("loads").allocated();
    let rows = |expected: Expected| match expected {
        Expected::Linear { name, n, .. } if name != "lm_head" => n as u64,
        _ => 0,
    };
    let rows: u64 = expected_tensors(checkpoint.config()).into_iter().map(rows).sum();
    assert_eq!(MemoryPlan { weights: plan.weights + 2 * rows, packing: 0, ..plan }, got);
}

/// Act-orders that q, k and v, or gate and up, share are one on the device; headers do not tell that they do.
#[test]
fn act_orders_at_most() {
    let (checkpoint, device) = (Checkpoint::open(&fixture("gptq-4bit-g32-actorder")).expect("opens"), Device::cpu());
    let config = checkpoint.config();
    let plan = MemoryPlan::of_checkpoint(&checkpoint, &limits(), (&device).into()).expect("a plan");
    let runner = ModelRunner::load(&checkpoint, &device, limits(), &mut |_, _| ()).expect("loads");
    let got = runner.allocated();
    let orders = 4 * (5 * config.hidden_size + config.intermediate_size) * config.num_layers;
    assert!(plan.weights >= got.weights && plan.weights - got.weights <= orders as u64, "{plan:?} {got:?}");
    assert_eq!((plan.kv_cache, plan.scratch), (got.kv_cache, got.scratch));
}

#[test]
fn dummies_of_every_architecture() {
    let shape = dummy_config("llama-1.1b").expect("a shape");
    // Widths that are not whole tiles of the CPU's layouts.
    let config = ModelConfig {
        vocab_size: 101,
        hidden_size: 72,
        intermediate_size: 88,
        num_layers: 2,
        num_heads: 3,
        num_kv_heads: 1,
        head_dim: 24,
        windows: vec![None; 2],
        ..shape
    };
    for (architecture, tie_word_embeddings) in
        [(Architecture::Llama, true), (Architecture::Qwen2, false), (Architecture::Qwen3, false)]
    {
        let qkv_bias = architecture == Architecture::Qwen2;
        let config = ModelConfig { architecture, tie_word_embeddings, qkv_bias, ..config.clone() };
        for scheme in [
            DummyScheme::Bf16,
            DummyScheme::WeightOnly(4, 32),
            DummyScheme::WeightOnly(8, 0),
            DummyScheme::Int8(8, 0),
            DummyScheme::Int8(3, 40),
        ] {
            let (head, device) = (DummyScheme::WeightOnly(8, 32), Device::cpu());
            let of = |name: &str| if name == "lm_head" { head } else { scheme };
            let plan = MemoryPlan::new(&config, &limits(), (&device).into(), DType::BF16, |name| {
                let k = if name.ends_with("down_proj") { config.intermediate_size } else { config.hidden_size };
                Ok(dummy_linear(of(name), 1, k, false, 0).scheme())
            });
            let model =
                Model::dummy(config.clone(), scheme, head, &device, &limits(), &mut |_, _| ()).expect("a model");
            let runner = ModelRunner::new(model, limits()).expect("a runner");
            assert_planned(&format!("{architecture:?} {scheme:?}"), plan.expect("a plan"), &runner);
        }
    }
}
