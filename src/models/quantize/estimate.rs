//! What a run will take, before it starts.

use std::time::Instant;

use crate::checkpoint::{Checkpoint, Expected};
use crate::dtype::DType;
use crate::quant::hessian::Gram;

use super::super::spec::expected_tensors;
use super::inputs::SAMPLES;
use super::mixed;
use super::{Recipe, Transform, WINDOWS, WeightRounding};

/// Bytes and seconds of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Most memory at once, without the source's mapped files.
    pub memory_bytes: u64,
    /// The finished checkpoint.
    pub checkpoint_bytes: u64,
    /// Most disk at once: parts, the checkpoint made of them, and the state that lets a run go on.
    pub disk_bytes: u64,
    /// Time, from a short measurement of this machine's arithmetic.
    pub seconds: f64,
}

impl Estimate {
    /// The estimate of `recipe` on `source` with `windows` windows of `context` tokens.
    pub fn new(source: &Checkpoint, recipe: &Recipe, windows: usize, context: usize) -> Estimate {
        let config = source.config();
        let tokens = if recipe.needs_calibration() { (windows * context) as f64 } else { 0.0 };
        let gptq = matches!(recipe.rounding, WeightRounding::Gptq(_));
        let in_source = |name: &str| {
            let weight = format!("{name}.weight");
            source.inventory().find(|(tensor, ..)| *tensor == weight).map_or(0.0, |(.., bytes)| bytes as f64)
        };
        let (mut layer_weights, mut quantized_bytes, mut source_linears, mut flops, mut widest) =
            (0f64, 0f64, 0f64, 0f64, 0f64);
        for expected in expected_tensors(config) {
            let Expected::Linear { name, n, k, .. } = expected else { continue };
            if name == "lm_head" {
                continue;
            }
            let weights = (n * k) as f64;
            let (kf, layers) = (k as f64, config.num_layers as f64);
            layer_weights += weights / layers;
            source_linears += in_source(&name);
            // Forward: the parts of a layer are run again for each slot behind them, and once to move on.
            flops += 2.0 * tokens * weights * if recipe.true_sequential { 2.5 } else { 2.0 };
            let Some(layer) = recipe.layer(&name, DType::F16) else {
                quantized_bytes += in_source(&name);
                continue;
            };
            quantized_bytes += weights * layer.bits_per_weight(k, recipe.format) / 8.0;
            if gptq {
                flops += weights * kf * 2.0;
            }
            if recipe.transform == Transform::Awq {
                flops += 21.0 * 2.0 * SAMPLES as f64 * weights + 10.0 * 2.0 * weights * layer.grid.columns(k) as f64;
            }
            if tokens > 0.0 {
                flops += 4.0 * SAMPLES as f64 * weights;
            }
            let leads = ["q_proj", "o_proj", "gate_proj", "down_proj"].iter().any(|end| name.ends_with(end));
            if gptq && leads {
                flops += tokens * kf * kf + 2.0 * kf.powi(3);
                // Sums and matrix in f32, its copy, the factor in f64, its panels.
                widest = widest.max(kf * kf * (2.0 + 4.0 + 4.0 + 8.0 + 2.0));
            }
        }
        if let Some(target) = recipe.target {
            // Widths are measured on some windows, each linear layer at each width; the most that the weights then take is known.
            let measured = tokens.min((mixed::WINDOWS * context) as f64);
            let weights = layer_weights * config.num_layers as f64;
            flops += 2.0 * measured * weights * 7.0 * recipe.widths().len() as f64;
            quantized_bytes = weights * target.bits_per_weight / 8.0;
        }
        if let Some(head) = recipe.head(DType::F16) {
            let (weights, k) = ((config.vocab_size * config.hidden_size) as f64, config.hidden_size);
            source_linears += in_source("lm_head");
            quantized_bytes += weights * head.bits_per_weight(k, recipe.format) / 8.0;
            layer_weights = layer_weights.max(weights);
            if gptq {
                flops += weights * 2.0 * k as f64 + (tokens + 2.0 * k as f64) * (k * k) as f64;
            }
        }
        let inner = config.intermediate_size.max(config.hidden_size) as f64;
        let residual = tokens * config.hidden_size as f64 * 4.0;
        let scratch = if tokens > 0.0 { (WINDOWS * context) as f64 * inner * 32.0 } else { 0.0 };
        // A layer in f32, its copy on the device, and its codes.
        let memory = residual + scratch + layer_weights * (4.0 + 4.0 + 1.0) + widest + SAMPLES as f64 * inner * 4.0;
        let checkpoint = (source.bytes() as f64 - source_linears).max(0.0) + quantized_bytes;
        Estimate {
            memory_bytes: memory as u64,
            checkpoint_bytes: checkpoint as u64,
            disk_bytes: (checkpoint + quantized_bytes + 2.0 * residual) as u64,
            seconds: flops / rate(),
        }
    }
}

/// Floating-point operations a second of the product that most of the time goes into.
pub(super) fn rate() -> f64 {
    let (tokens, k) = (512, 512);
    let x = vec![0.5f32; tokens * k];
    let mut gram = Gram::new(k);
    gram.add(&x);
    let started = Instant::now();
    let rounds = 8;
    (0..rounds).for_each(|_| gram.add(&x));
    let flops = (rounds * tokens * k * k) as f64;
    flops / started.elapsed().as_secs_f64().max(1e-6)
}
