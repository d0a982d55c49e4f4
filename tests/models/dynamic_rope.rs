//! Dynamic rotary scaling: a prompt's base comes from its own length, whatever else is planned, and does not depend on how it
//! is cut into passes.

use std::fs;
use std::path::Path;

use lowbit::checkpoint::Checkpoint;
use lowbit::device::Device;
use lowbit::models::{Batch, Limits, ModelRunner};
use serde_json::{Value, json};

use crate::common::fixtures::demo;

const TRAINED: usize = 64;
const FACTOR: f64 = 4.0;
const HEAD_DIM: f64 = 64.0;

/// The demo with other rotary settings.
fn model(theta: f64, scaling: Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(demo().join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(demo().join("config.json")).unwrap()).unwrap();
    let fields = config.as_object_mut().unwrap();
    fields.remove("rope_parameters");
    fields.insert("rope_theta".into(), json!(theta));
    fields.insert("rope_scaling".into(), scaling);
    fields.insert("max_position_embeddings".into(), json!(TRAINED));
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

fn dynamic() -> tempfile::TempDir {
    model(10000.0, json!({"rope_type": "dynamic", "factor": FACTOR}))
}

/// Logits of the last of `len` tokens, of which the first `prompt` are a prompt, computed in passes that end at `cuts`.
fn logits(dir: &Path, len: usize, prompt: usize, cuts: &[usize], limit: usize) -> Vec<f32> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let limits = Limits::new(limit, limit, 1);
    let mut runner = ModelRunner::load(&checkpoint, &Device::cpu(), limits, &mut |_, _| ()).unwrap();
    let ids: Vec<u32> = (0..len as u32).map(|i| (i * 37 + 11) % 4096).collect();
    let blocks: Vec<u32> = (0..limits.kv_blocks as u32).collect();
    let mut start = 0;
    let mut last = Vec::new();
    for &end in cuts.iter().chain([&len]) {
        let mut batch = Batch::default();
        batch.push(&ids[start..end], start, &blocks, true);
        batch.of_prompt(prompt);
        last = runner.run(&batch).unwrap().read().unwrap();
        start = end;
    }
    last
}

fn assert_close(a: &[f32], b: &[f32], tolerance: f32) {
    let most = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(a.len() == b.len() && most <= tolerance, "{most}");
}

#[test]
fn a_prompt_has_the_base_of_its_own_length() {
    let dir = dynamic();
    let len = 100;
    let found = logits(dir.path(), len, len, &[], 128);
    // The same whatever is planned for.
    assert_eq!(found, logits(dir.path(), len, len, &[], 256));
    // transformers' formula, as a fixed base of another model.
    let stretch = FACTOR * len as f64 / TRAINED as f64 - (FACTOR - 1.0);
    let fixed = model(10000.0 * stretch.powf(HEAD_DIM / (HEAD_DIM - 2.0)), Value::Null);
    assert_close(&found, &logits(fixed.path(), len, len, &[], 128), 1e-3);
    let plain = model(10000.0, Value::Null);
    let unscaled = logits(plain.path(), len, len, &[], 128);
    assert!(found.iter().zip(&unscaled).any(|(a, b)| (a - b).abs() > 0.1), "the test sees the base");
    // Within the trained context there is none but the model's own.
    assert_close(
        &logits(dir.path(), TRAINED, TRAINED, &[], 128),
        &logits(plain.path(), TRAINED, TRAINED, &[], 128),
        1e-4,
    );
}

#[test]
fn passes_do_not_change_it() {
    let dir = dynamic();
    // A prompt in chunks.
    assert_close(&logits(dir.path(), 100, 100, &[], 128), &logits(dir.path(), 100, 100, &[30, 64, 90], 128), 1e-3);
    // What was generated, one token a pass, and computed again in one pass after a preemption.
    for prompt in [60, 100] {
        let one_by_one: Vec<usize> = (prompt..106).collect();
        let again = logits(dir.path(), 106, prompt, &[], 128);
        assert_close(&logits(dir.path(), 106, prompt, &one_by_one, 128), &again, 1e-3);
    }
}
