//! What training will take, before it starts.

use crate::checkpoint::{Checkpoint, Expected};

use super::super::super::spec::expected_tensors;
use super::super::estimate::rate;
use super::super::{Estimate, Recipe};
use super::QatOptions;

/// The estimate of rounding by `recipe`, and of training in windows of `context` tokens.
pub fn estimate(source: &Checkpoint, recipe: &Recipe, options: &QatOptions, context: usize) -> Estimate {
    let rounding = Estimate::new(source, recipe, 0, context);
    let config = source.config();
    let weights: f64 = expected_tensors(config)
        .iter()
        .map(|expected| match expected {
            Expected::Linear { name, n, k, .. } if name != "lm_head" => (n * k) as f64,
            _ => 0.0,
        })
        .sum();
    let head = (config.vocab_size * config.hidden_size) as f64;
    let tokens = (options.batch * context) as f64;
    // The model, the teacher, value, gradient, its two moments, the best value, the weight on its grid, and a copy in
    // passing, in f32, and the codes; embedding and head.
    let memory = weights * (4.0 * 9.0 + 1.0) + 2.0 * head * 4.0;
    // What a layer keeps for its derivative, in f32, and what the allocator holds on to; the logits of both, their
    // softmax and gradient. (A model of 5.8 M parameters in windows of 4 x 256 was seen to take 640 MB: 690 by this.)
    let heads = (config.num_heads * config.head_dim) as f64;
    let kv = (config.num_kv_heads * config.head_dim) as f64;
    let inner = config.intermediate_size as f64;
    let layer = 16.0 * config.hidden_size as f64
        + 6.0 * heads
        + 10.0 * kv
        + 7.0 * inner
        + 3.0 * (config.num_heads * context) as f64;
    let activations = 4.0 * tokens * (layer * config.num_layers as f64 + 8.0 * config.vocab_size as f64);
    // Forward once for the teacher, once for the student, and twice that back.
    let flops = 4.0 * 2.0 * tokens * (weights + head) * options.steps as f64;
    Estimate {
        memory_bytes: rounding.memory_bytes.max((memory + activations) as u64),
        disk_bytes: rounding.disk_bytes + (weights * 16.0) as u64,
        seconds: rounding.seconds + flops / rate(),
        ..rounding
    }
}
