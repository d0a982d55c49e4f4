//! A row's result has the same bits alone and in any batch: always on the CPU, in its mode on a GPU.

use std::path::Path;

use lowbit::checkpoint::Checkpoint;
use lowbit::device::{Columns, Device, InputFormat, LinearInput, PackedWeight, Write};
use lowbit::dtype::{DType, HostData};
use lowbit::models::{Batch, Limits, ModelRunner};
use lowbit::quant::{ActQuant, Codebook, Encoding, LinearWeight, Weight};

use super::{activations, f32s, on_every_device, poisoned, poisoned_act, read};
use crate::common::random::{Random, WeightCase};
use crate::common::tolerance::assert_exact;

on_every_device!(linear_layers, norms);

/// Rows of the whole batch, and of parts of it.
const ALL: usize = 257;
const PARTS: [usize; 13] = [1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 128, 129, 256];

/// `op` of rows `first..first + m` for all of [`PARTS`], at the end of the batch, against the same rows of the whole.
fn assert_invariant(what: &str, width: usize, op: impl Fn(usize, usize) -> Vec<f32>) {
    let all = op(0, ALL);
    for m in PARTS {
        let first = ALL - m;
        assert_exact(&format!("{what}: {m} of {ALL} rows"), &op(first, m), &all[first * width..]);
    }
    assert_exact(&format!("{what}: the first row"), &op(0, 1), &all[..width]);
}

fn linear(device: &Device, w: &PackedWeight, x: &[f32], m: usize) -> Vec<f32> {
    let mut act = poisoned_act(device, m, w.k);
    let (x, _) = activations(device, x);
    device.quantize(&mut act, &x, w.k, w.input_format(), m).expect("quantize");
    let mut out = poisoned(device, DType::F32, m * w.n);
    device.linear(&mut out, Columns { offset: 0, stride: w.n }, &act, w, Write::Store, m).expect("linear");
    read(device, &out, m * w.n)
}

/// Every layout of kernels, unevenly large and split along k where few rows would be.
fn linear_layers(device: &Device) {
    let device = &device.clone().batch_invariant();
    let mut random = Random::new(17);
    let case = WeightCase {
        n: 200,
        k: 1024,
        bits: 4,
        group_size: 128,
        symmetric: true,
        act_order: false,
        bias: true,
        activation: ActQuant::None,
    };
    let int8 = WeightCase { bits: 8, group_size: usize::MAX, activation: ActQuant::DynamicPerToken, ..case };
    let mut weights: Vec<(String, LinearWeight)> = [
        case,
        WeightCase { group_size: 32, symmetric: false, act_order: true, ..case },
        WeightCase { bits: 8, ..case },
        WeightCase { bits: 8, group_size: 64, symmetric: false, bias: false, ..case },
        WeightCase { bits: 3, n: 130, k: 1600, group_size: usize::MAX, ..case },
        WeightCase { n: 33, k: 517, group_size: 32, ..case },
        int8,
        WeightCase { n: 33, k: 517, symmetric: false, ..int8 },
        WeightCase { bits: 4, group_size: 128, ..int8 },
        WeightCase { activation: ActQuant::LlmInt8 { threshold: 2.5 }, ..int8 },
    ]
    .into_iter()
    .map(|case| (format!("{case:?}"), random.weight(case)))
    .collect();
    for (n, k) in [(200, 1024), (33, 517)] {
        let mut weight = random.weight(WeightCase { n, k, group_size: 64, ..case });
        let Weight::Quant(q) = &mut weight.weight else { panic!("a quantized weight") };
        q.zeros.fill(0.0);
        q.encoding = Encoding::Codebook(Codebook::NF4);
        weights.push((format!("nf4 {n} {k}"), weight));
        let mut weight = random.weight(WeightCase { n, k, bits: 8, group_size: 128, ..case });
        let Weight::Quant(q) = &mut weight.weight else { panic!("a quantized weight") };
        q.zeros.fill(0.0);
        q.codes.iter_mut().for_each(|code| *code &= 0xf7); // none is NaN
        q.encoding = Encoding::E4m3;
        weights.push((format!("fp8 {n} {k}"), weight));
        for bias in [None, Some(random.normals(n))] {
            let data = HostData::from_f32(DType::BF16, random.normals(n * k));
            let what = format!("dense {n} {k} bias {}", bias.is_some());
            weights
                .push((what, LinearWeight { weight: Weight::Dense { n, k, data }, bias, activation: ActQuant::None }));
        }
    }
    for (what, weight) in weights {
        let (n, k) = (weight.n(), weight.k());
        let x = random.normals(ALL * k);
        let w = device.pack(weight).expect("pack");
        assert_invariant(&what, n, |first, m| linear(device, &w, &x[first * k..(first + m) * k], m));
    }
}

/// To floats and to codes: by blocks of as many threads whatever the number of rows.
fn norms(device: &Device) {
    let device = &device.clone().batch_invariant();
    for (k, quant) in [(4096, ActQuant::None), (4096, ActQuant::DynamicPerToken), (9000, ActQuant::DynamicPerToken)] {
        let mut random = Random::new(3);
        let (x, weight) = (random.normals(ALL * k), f32s(device, &random.normals(k)));
        assert_invariant(&format!("rms_norm {k} {quant:?}"), k, |first, m| {
            let mut out: LinearInput = poisoned_act(device, m, k);
            let rows = f32s(device, &x[first * k..(first + m) * k]);
            device.rms_norm(&mut out, &rows, &weight, 1e-5, InputFormat::quantized(quant), m).expect("rms_norm");
            if quant == ActQuant::None {
                return read(device, &out.floats, m * k);
            }
            let scales = read(device, &out.scales, m);
            read(device, &out.codes, m * k).iter().enumerate().map(|(i, code)| code * scales[i / k]).collect()
        });
    }
}

/// Logits of every position of a text: in one pass; in passes beside another sequence; token by token at the end.
fn check_model(device: Device) {
    const LEN: usize = 150;
    let checkpoint = Checkpoint::open(Path::new("assets/books-6m-gptq")).expect("the demo opens");
    let limits = Limits { max_logit_rows: LEN, ..Limits::new(LEN, 2 * LEN, 2) };
    let mut model =
        ModelRunner::load(&checkpoint, &device.batch_invariant(), limits, &mut |_, _| ()).expect("the demo loads");
    let ids: Vec<u32> = (0..LEN as u32).map(|i| i * 2_654_435_761 % 4096).collect();
    let other: Vec<u32> = ids.iter().rev().copied().collect();
    let blocks: Vec<u32> = (0..limits.kv_blocks as u32).collect();
    let (ours, theirs) = blocks.split_at(blocks.len() / 2);
    let mut logits = |passes: &[(usize, usize)]| {
        let (mut all, mut past, mut their_past) = (Vec::new(), 0, 0);
        for &(count, of_other) in passes {
            let mut batch = Batch::default();
            if of_other > 0 {
                batch.push(&other[their_past..their_past + of_other], their_past, theirs, false);
            }
            batch.push(&ids[past..past + count], past, ours, false);
            batch.logit_rows = (of_other as u32..(of_other + count) as u32).collect();
            all.extend(model.run(&batch).expect("runs").read().expect("downloads"));
            (past, their_past) = (past + count, their_past + of_other);
        }
        assert_eq!(past, LEN);
        all
    };
    let whole = logits(&[(LEN, 0)]);
    assert_exact("beside another", &logits(&[(64, 1), (1, 1), (30, 100), (55, 0)]), &whole);
    let mut steps = vec![(LEN - 20, 0)];
    steps.extend((0..20).map(|i| (1, i % 2)));
    assert_exact("token by token", &logits(&steps), &whole);
}

#[test]
fn a_model_on_the_cpu() {
    check_model(Device::cpu());
}

mod cuda {
    use super::*;

    #[test]
    #[ignore = "needs a CUDA device"]
    fn a_model() {
        for dtype in [DType::F16, DType::BF16] {
            check_model(Device::cuda(0, dtype).expect("a CUDA device"));
        }
    }
}
