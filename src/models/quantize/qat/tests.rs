//! The network against lowbit's own forward pass, gradients against finite differences, and a whole run on tiny models.

use std::path::Path;

use candle_core::Var;
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};

use super::ops::{CausalSoftmax, Divergence, FakeQuantize, Quantizer, Rope, RoundRows, values};
use super::*;
use crate::checkpoint::write::Format;
use crate::dtype::DType;
use crate::layers::KvCache;
use crate::models::dummy::fill_random;
use crate::models::quantize::Observer;
use crate::models::{Batch, Limits, ModelRunner};
use crate::quant::affine::Mapping;
use crate::quant::grid::{Grid, Search, round_to_nearest};

const CONTEXT: usize = 12;
const VOCAB: usize = 40;

/// Numbers in -1..1 that repeat for a seed: SplitMix64.
fn noise(seed: usize, len: usize) -> Vec<f32> {
    let mut bytes = vec![0; 4 * len];
    fill_random(&mut bytes, seed as u64);
    let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    bytes.chunks(4).map(|b| (f64::from(word(b)) / f64::from(u32::MAX) * 2.0 - 1.0) as f32).collect()
}

const ARCHITECTURES: [(&str, &str); 4] = [
    (
        r#""model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": true,
        "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}"#,
        "",
    ),
    (r#""model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5"#, ""),
    (r#""model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]"#, "bias"),
    (r#""model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]"#, "qk_norm"),
];

/// Writes a checkpoint of two layers, query heads in groups of two.
fn write_model(dir: &Path, (config, kind): (&str, &str)) {
    let (hidden, inner, q, kv, head) = (32, 48, 32, 16, 8);
    let mut tensors: Vec<(String, Vec<usize>)> =
        vec![("model.embed_tokens.weight".into(), vec![VOCAB, hidden]), ("model.norm.weight".into(), vec![hidden])];
    if !config.contains("tie_word_embeddings") {
        tensors.push(("lm_head.weight".into(), vec![VOCAB, hidden]));
    }
    for layer in 0..2 {
        let mut add = |name: &str, shape: &[usize]| {
            tensors.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        };
        add("input_layernorm.weight", &[hidden]);
        add("post_attention_layernorm.weight", &[hidden]);
        for (name, n) in [("q", q), ("k", kv), ("v", kv)] {
            add(&format!("self_attn.{name}_proj.weight"), &[n, hidden]);
            if kind == "bias" {
                add(&format!("self_attn.{name}_proj.bias"), &[n]);
            }
        }
        if kind == "qk_norm" {
            add("self_attn.q_norm.weight", &[head]);
            add("self_attn.k_norm.weight", &[head]);
        }
        add("self_attn.o_proj.weight", &[hidden, q]);
        add("mlp.gate_proj.weight", &[inner, hidden]);
        add("mlp.up_proj.weight", &[inner, hidden]);
        add("mlp.down_proj.weight", &[hidden, inner]);
    }
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .enumerate()
        .map(|(seed, (name, shape))| {
            let (scale, offset) = match name {
                _ if name.contains("norm") => (0.3, 1.0),
                _ if name.contains("embed") => (0.05, 0.0), // logits neither flat nor sharp
                _ => (0.4, 0.0),
            };
            let values = noise(seed + 1, shape.iter().product());
            values.iter().flat_map(|x| (x * scale + offset).to_le_bytes()).collect()
        })
        .collect();
    let views = tensors.iter().zip(&bytes);
    let views =
        views.map(|((n, shape), b)| (n.as_str(), TensorView::new(Dtype::F32, shape.clone(), b).expect("a tensor")));
    serialize_to_file(views, None, &dir.join("model.safetensors")).expect("written");
    let config = format!(
        r#"{{{config}, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": {VOCAB}, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "torch_dtype": "float32"}}"#
    );
    std::fs::write(dir.join("config.json"), config).expect("written");
}

fn recipe(bits: u8, activation: Activation, mapping: Mapping, format: Format) -> Recipe {
    let (search, scale_type) = (Search::Shrink { norm: 2.4 }, DType::F16);
    let grid = Grid { bits, group_size: Some(16), mapping, search, scale_type, smallest_zero: 0 };
    Recipe {
        base: LayerScheme { grid, activation },
        overrides: Default::default(),
        target: None,
        head: None,
        kv_scales: None,
        transform: Transform::None,
        rounding: WeightRounding::Nearest,
        true_sequential: true,
        format,
    }
}

fn tokens(windows: usize) -> Vec<u32> {
    (0..windows * CONTEXT).map(|i| ((i * i * 31 + i * 7) % VOCAB) as u32).collect()
}

/// Logits of whole windows from lowbit's own decoder.
fn logits(checkpoint: &Checkpoint, ids: &[u32]) -> Vec<f32> {
    let windows = ids.len() / CONTEXT;
    let limits = Limits { max_logit_rows: ids.len(), ..Limits::new(CONTEXT, ids.len(), windows) };
    let mut model = ModelRunner::load(checkpoint, &Device::cpu(), limits, &mut |_, _| {}).expect("loads");
    let mut batch = Batch::default();
    let blocks = CONTEXT.div_ceil(KvCache::BLOCK_SIZE) as u32;
    for (w, window) in (0..).zip(ids.chunks(CONTEXT)) {
        batch.push(window, 0, &(w * blocks..(w + 1) * blocks).collect::<Vec<_>>(), false);
    }
    batch.logit_rows = (0..ids.len() as u32).collect();
    model.run(&batch).expect("runs").read().expect("logits")
}

/// Layers rounded by `recipe`, and the networks over them.
fn networks(checkpoint: &Checkpoint, recipe: Option<&Recipe>) -> (Network, Network, Vec<Parameter>) {
    let config = checkpoint.config();
    let mut layers = Vec::new();
    let spec = ModelSpec::new(config);
    for layer_spec in &spec.layers {
        let scheme = |name: &str| recipe.and_then(|r| r.layer(name, DType::F32));
        let mut layer = HostLayer::read(checkpoint, layer_spec, scheme).expect("read");
        if let Some(recipe) = recipe {
            process(&mut layer, recipe, None, None, &mut Vec::new()).expect("rounded");
        }
        layers.push(layer);
    }
    let norm = HostNorm::read(checkpoint, &spec.norm).expect("read");
    let embedding = checkpoint.tensor("model.embed_tokens.weight").expect("read").to_f32();
    let head = if config.tie_word_embeddings { embedding.clone() } else { head_of(checkpoint).expect("read") };
    let head = Tensor::from_vec(head, (VOCAB, config.hidden_size), &CandleDevice::Cpu).expect("a tensor");
    let frame = Frame { config, embedding: embedding.into(), head, norm: &norm, context: CONTEXT };
    let (student, parameters) = Network::student(&frame, &layers).expect("built");
    (Network::teacher(&frame, &layers).expect("built"), student, parameters)
}

fn relative(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x).powi(2);
    let error: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (error / b.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}

/// Four architectures: the teacher's logits are the decoder's; and gradients of norms in the first layer, which all pass
/// through every operation behind them, are finite differences of the loss.
#[test]
fn network_is_the_model_and_differentiates() {
    for architecture in ARCHITECTURES {
        let dir = tempfile::tempdir().expect("a directory");
        write_model(dir.path(), architecture);
        let checkpoint = Checkpoint::open(dir.path()).expect("opens");
        let ids = tokens(3);
        // Without a scheme nothing is rounded and only norms learn.
        let (teacher, student, mut parameters) = networks(&checkpoint, None);
        let want = logits(&checkpoint, &ids);
        let got = values(&teacher.forward(&ids).expect("runs")).expect("values");
        let error = relative(&got, &want);
        assert!(error < 1e-5, "{architecture:?}: {error}");

        let target: Arc<Vec<f32>> = Arc::new(noise(5, want.len()));
        let loss = || {
            let op = Divergence { teacher: target.clone() };
            student.forward(&ids).and_then(|x| x.apply_op1(op)).expect("runs")
        };
        let grads = loss().backward().expect("differentiates");
        for parameter in parameters.iter_mut().filter(|p| p.name.contains("layers.0") || p.name == "model.norm.weight")
        {
            let grad = values(grads.get(&parameter.var).expect("a gradient")).expect("values");
            let size = (grad.iter().map(|g| g * g).sum::<f32>() / grad.len() as f32).sqrt();
            let before = parameter.values().expect("values");
            for i in [0, grad.len() / 2, grad.len() - 1] {
                let at = |offset: f32| {
                    let mut moved = before.clone();
                    moved[i] += offset;
                    parameter.set(moved).expect("set");
                    loss().to_scalar::<f32>().expect("a number")
                };
                let difference = (at(1e-2) - at(-1e-2)) / 2e-2;
                assert!(
                    (difference - grad[i]).abs() < 0.02 * size.max(grad[i].abs()) + 2e-5,
                    "{architecture:?} {}: {difference} {}",
                    parameter.name,
                    grad[i]
                );
            }
            parameter.set(before).expect("set");
        }
    }
}

/// The gradient of `sum c * op(x)` against finite differences.
fn check_gradient(name: &str, shape: &[usize], op: impl Fn(&Tensor) -> candle_core::Result<Tensor>) {
    let x = noise(3, shape.iter().product());
    let var = Var::from_slice(&x, shape, &CandleDevice::Cpu).expect("a variable");
    let loss = || {
        let y = op(&var).expect("runs");
        let c = Tensor::from_vec(noise(8, y.elem_count()), y.shape(), &CandleDevice::Cpu).expect("a tensor");
        (y * c).and_then(|y| y.sum_all()).expect("a sum")
    };
    let grads = loss().backward().expect("differentiates");
    let grad = values(grads.get(&var).expect("a gradient")).expect("values");
    for i in 0..x.len() {
        let at = |offset: f32| {
            let mut moved = x.clone();
            moved[i] += offset;
            var.set(&Tensor::from_vec(moved, shape, &CandleDevice::Cpu).expect("a tensor")).expect("set");
            loss().to_scalar::<f32>().expect("a number")
        };
        let difference = (at(1e-2) - at(-1e-2)) / 2e-2;
        assert!((difference - grad[i]).abs() < 2e-3 * (1.0 + grad[i].abs()), "{name} {i}: {difference} {}", grad[i]);
    }
}

#[test]
fn operations_differentiate() {
    let table: Vec<f32> = noise(4, 3 * 6);
    let rope = Rope { table: Arc::new(table), context: 3, head_dim: 6 };
    check_gradient("rope", &[5, 2, 6], |x| x.apply_op1(rope.clone()));
    for window in [None, Some(1), Some(2)] {
        let softmax = CausalSoftmax { scale: 1.5, context: 4, window };
        check_gradient("causal_softmax", &[2, 8, 4], |x| x.apply_op1(softmax));
    }
    let teacher = Arc::new(noise(6, 5 * 7));
    check_gradient("divergence", &[5, 7], |x| x.apply_op1(Divergence { teacher: teacher.clone() }));
}

/// A row sees itself and what came before, within the window; rows of weights sum to 1. The divergence of a
/// distribution from itself is 0, and that of two known ones is `sum p ln(p / q)`.
#[test]
fn masks_and_divergence() {
    let x = Tensor::zeros((1, 4, 4), candle_core::DType::F32, &CandleDevice::Cpu).expect("a tensor");
    let y = x.apply_op1(CausalSoftmax { scale: 1.0, context: 4, window: Some(2) }).expect("runs");
    let want = [1.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.5, 0.5];
    assert_eq!(values(&y).expect("values"), want);
    let logits = |p: [f32; 2]| p.map(f32::ln).to_vec();
    let of = |p: [f32; 2], q: [f32; 2]| {
        let student = Tensor::from_vec(logits(q), (1, 2), &CandleDevice::Cpu).expect("a tensor");
        let op = Divergence { teacher: Arc::new(logits(p)) };
        student.apply_op1(op).and_then(|x| x.to_scalar::<f32>()).expect("a number")
    };
    assert!(of([0.3, 0.7], [0.3, 0.7]).abs() < 1e-7);
    let want = 0.3 * (0.3f32 / 0.5).ln() + 0.7 * (0.7f32 / 0.5).ln();
    assert!((of([0.3, 0.7], [0.5, 0.5]) - want).abs() < 1e-6);
}

/// Fake quantization gives what the file will hold; gradients pass where nothing is clipped, and those of steps are LSQ's:
/// at a clipped weight the derivative itself, the bound.
#[test]
fn fake_quantization() {
    let w = [0.4, -0.1, 9.0, 0.2, -9.0, 0.4];
    let grid = Grid {
        bits: 3,
        group_size: Some(4),
        mapping: Mapping::Asymmetric,
        search: Search::MinMax,
        scale_type: DType::F32,
        smallest_zero: 0,
    };
    let mut q = round_to_nearest(&w, 6, &grid).expect("finite");
    assert_eq!(q.groups(), 2, "the last group is short");
    (q.scales, q.zeros) = (vec![0.25, 0.5], vec![2.0, 4.0]);
    let quantizer = Arc::new(Quantizer::new(&q, &grid));
    let w = Var::from_slice(&w, (1, 6), &CandleDevice::Cpu).expect("a variable");
    let f = Var::from_slice(&[1.0f32, 1.2], (1, 2), &CandleDevice::Cpu).expect("a variable");
    let out = w.apply_op2(&f, FakeQuantize(quantizer.clone())).expect("runs");
    let made = quantizer.quantize(&values(&w).expect("values"), &values(&f).expect("values"));
    assert_eq!(values(&out).expect("values"), made.dequantize());
    assert_eq!(made.scales, [0.25, 0.5 * 1.2]);
    // Codes 0..=7, zero 2 and 4: 0.25 * -2..=5, 0.6 * -4..=3.
    let want = [0.5, 0.0, 1.25, 0.25, -2.4, 0.6 * 1.0];
    assert!(relative(&values(&out).expect("values"), &want) < 1e-6);
    let grads = out.sum_all().and_then(|s| s.backward()).expect("differentiates");
    let grad = |v: &Var| values(grads.get(v).expect("a gradient")).expect("values");
    assert_eq!(grad(&w), [1.0, 1.0, 0.0, 1.0, 0.0, 1.0]);
    let first = (2.0 - 1.6) + (0.0 + 0.4) + 5.0 + (1.0 - 0.8);
    let second = -4.0 + (1.0 - 0.4 / 0.6);
    let want = [first * 0.25 / (4.0f32 * 7.0).sqrt(), second * 0.5 / (2.0f32 * 7.0).sqrt()];
    assert!(relative(&grad(&f), &want) < 1e-5, "{:?} {want:?}", grad(&f));

    let x = Tensor::from_slice(&[1.0f32, -127.0, 0.4, 0.0, 0.0, 0.0], (2, 3), &CandleDevice::Cpu).expect("a tensor");
    let rounded = x.apply_op1(RoundRows).expect("runs");
    assert_eq!(values(&rounded).expect("values"), [1.0, -127.0, 0.0, 0.0, 0.0, 0.0]);
}

/// What is written is what was trained: its held-out divergence, by lowbit's own decoder, is the one reported, and lower than
/// that of rounding. A run that goes on from a snapshot gives the same bytes.
#[test]
fn trains_writes_and_goes_on() {
    let cases = [
        (ARCHITECTURES[0], recipe(2, Activation::None, Mapping::Centered, Format::GptqV2)),
        (ARCHITECTURES[2], recipe(3, Activation::None, Mapping::Asymmetric, Format::CompressedTensors)),
        (
            ARCHITECTURES[3],
            recipe(4, Activation::Dynamic { asymmetric: false }, Mapping::Centered, Format::CompressedTensors),
        ),
    ];
    for (architecture, recipe) in cases {
        let dir = tempfile::tempdir().expect("a directory");
        write_model(dir.path(), architecture);
        let source = Checkpoint::open(dir.path()).expect("opens");
        let text = Calibration { ids: tokens(16), context: CONTEXT, text_sha256: String::new() };
        let options = QatOptions { steps: 40, batch: 4, rate: 5e-3, step_rate: 5e-3, seed: 1, save_every: 7 };
        let run = |name: &str, stop: usize| {
            let output = Output::begin(&dir.path().join(name), &json!({})).expect("begins");
            let partial = dir.path().join(format!("{name}.partial"));
            let kept = dir.path().join("kept.partial");
            qat(&source, &recipe, &options, &text, output, &mut |at| {
                if at.step == stop {
                    std::fs::create_dir(&kept).expect("made");
                    for entry in std::fs::read_dir(&partial).expect("listed") {
                        let path = entry.expect("an entry").path();
                        std::fs::copy(&path, kept.join(path.file_name().expect("a name"))).expect("copied");
                    }
                }
            })
            .expect("trains")
        };
        let report = run("whole", 20);
        let held_out = report["qat"]["held_out"].as_array().expect("a list");
        let loss = |i: usize| held_out[i][1].as_f64().expect("a number");
        let best = (0..held_out.len()).map(loss).fold(f64::INFINITY, f64::min);
        let most = if recipe.base.grid.bits == 2 { 0.8 } else { 1.0 };
        assert!(best < most * loss(0), "{architecture:?}: {held_out:?}");

        let ids = split(&text).expect("enough").1;
        let made = Checkpoint::open(&dir.path().join("whole")).expect("opens");
        let (p, q) = (logits(&source, ids), logits(&made, ids));
        let student = Tensor::from_vec(q, (ids.len(), VOCAB), &CandleDevice::Cpu).expect("a tensor");
        let again = student.apply_op1(Divergence { teacher: Arc::new(p) }).expect("runs");
        let again = f64::from(again.to_scalar::<f32>().expect("a number"));
        assert!((again / best - 1.0).abs() < 5e-3, "{architecture:?}: {again}, reported {best}");

        let resumed = run("kept", usize::MAX);
        assert_eq!(resumed["qat"]["loss"], report["qat"]["loss"]);
        let bytes = |name: &str| std::fs::read(dir.path().join(name).join("model.safetensors")).expect("read");
        assert!(bytes("whole") == bytes("kept"), "the same bytes");
    }
}

/// A loss that is no number names the step and the flag; so does a text of one window.
#[test]
fn errors() {
    let dir = tempfile::tempdir().expect("a directory");
    write_model(dir.path(), ARCHITECTURES[0]);
    let source = Checkpoint::open(dir.path()).expect("opens");
    let run = |recipe: &Recipe, rate: f32, windows: usize| {
        let text = Calibration { ids: tokens(windows), context: CONTEXT, text_sha256: String::new() };
        let options = QatOptions { steps: 3, batch: 1, rate, step_rate: 1e-3, seed: 0, save_every: 50 };
        let dst = dir.path().join(format!("dst{windows}"));
        let output = Output::begin(&dst, &json!({})).expect("begins");
        qat(&source, recipe, &options, &text, output, &mut |_| {}).expect_err("fails").to_string()
    };
    let plain = recipe(2, Activation::None, Mapping::Centered, Format::Gptq);
    let diverged = run(&plain, f32::INFINITY, 4);
    assert!(diverged.contains("--lr") && diverged.contains("step 1"), "{diverged}");
    assert!(run(&plain, 1e-3, 1).contains("--calib"));
    let fixed = recipe(
        8,
        Activation::Static { asymmetric: false, observer: Observer::Mse },
        Mapping::Centered,
        Format::CompressedTensors,
    );
    assert!(run(&fixed, 1e-3, 4).contains("activations"));
}
