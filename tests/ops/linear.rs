//! Linear layers: unquantized and weight-only quantized bounded, INT8 activations bit for bit.

use std::path::Path;

use lowbit::checkpoint::Checkpoint;
use lowbit::device::cpu::reference::{self, Rounding};
use lowbit::device::{Columns, Device, LinearInput, PackedWeight, Write};
use lowbit::dtype::{DType, HostData};
use lowbit::quant::{ActQuant, Codebook, Encoding, LinearWeight, QuantWeight, Weight};

use safetensors::SafeTensors;

use super::{ROWS, activations, assert_untouched, f32s, on_every_device, poisoned, poisoned_act, read};
use crate::common::random::{Random, WeightCase};
use crate::common::tolerance::{assert_bounded, assert_exact};

on_every_device!(
    dense,
    dense_rows,
    quant,
    quant_rows,
    quant_scales,
    codebook,
    int8,
    int8_rows,
    int8_grouped,
    int8_narrow,
    int8_rows_do_not_depend_on_the_batch,
    llm_int8,
    llm_int8_uneven,
    llm_int8_is_that_of_bitsandbytes,
    deep,
    large,
    repeats,
    add,
    columns,
    rejects
);

/// `(n, k)`: one, odd, one past a tile, not a multiple of a group, ordinary.
pub(super) const SHAPES: [(usize, usize); 9] =
    [(1, 1), (3, 5), (16, 32), (17, 33), (15, 127), (33, 200), (64, 256), (65, 129), (48, 640)];
const GROUPS: [usize; 4] = [32, 64, 128, usize::MAX];
const DYNAMIC: ActQuant = ActQuant::DynamicPerToken;
const LLM_INT8: ActQuant = ActQuant::LlmInt8 { threshold: 6.0 };
const STATIC: ActQuant = ActQuant::StaticPerTensor { scale: 0.11, zero_point: 0 };
const STATIC_ASYMMETRIC: ActQuant = ActQuant::StaticPerTensor { scale: 0.05, zero_point: -37 };

fn quant_of(weight: &LinearWeight) -> &QuantWeight {
    match &weight.weight {
        Weight::Quant(q) => q,
        Weight::Dense { .. } => panic!("a quantized weight"),
    }
}

/// `x` `[m, k]` in the layer's own input order as the weight wants it: gathered, and quantized or not.
pub(super) fn emitted(device: &Device, x: &[f32], w: &PackedWeight, m: usize) -> LinearInput {
    let mut act = poisoned_act(device, m, w.k);
    let (x, _) = activations(device, x);
    device.quantize(&mut act, &x, w.k, w.input_format(), m).expect("quantize");
    act
}

pub(super) fn run(device: &Device, w: &PackedWeight, x: &LinearInput, m: usize) -> Vec<f32> {
    let mut out = poisoned(device, DType::F32, m * w.n + 3);
    let columns = Columns { offset: 0, stride: w.n };
    device.linear(&mut out, columns, x, w, Write::Store, m).expect("linear");
    assert_untouched("linear", device, &out, m * w.n);
    read(device, &out, m * w.n)
}

fn dense_case(device: &Device, m: usize, n: usize, k: usize, dtype: DType, bias: bool) {
    let what = format!("dense {dtype} m={m} n={n} k={k} bias={bias}");
    let mut random = Random::new((m * 1_000_003 + n * 1009 + k) as u64);
    let x = HostData::from_f32(device.activation_dtype(), random.normals(m * k)).to_f32();
    let data = HostData::from_f32(dtype, random.normals(n * k));
    let bias = bias.then(|| random.normals(n));
    let of = |rounding| reference::linear_dense(&x, &data, k, bias.as_deref(), rounding);
    let (exact, twin) = (of(Rounding::Exact), of(Rounding::As(device.activation_dtype())));
    let weight = Weight::Dense { n, k, data: data.clone() };
    let w = device.pack(LinearWeight { weight, bias: bias.clone(), activation: ActQuant::None }).expect("pack");
    let got = run(device, &w, &emitted(device, &x, &w, m), m);
    assert_bounded(&what, &got, &exact, &twin, device.activation_dtype());
}

fn dense(device: &Device) {
    for (n, k) in SHAPES {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            dense_case(device, 3, n, k, dtype, n % 2 == 1);
        }
    }
}

fn dense_rows(device: &Device) {
    for m in ROWS {
        dense_case(device, m, 37, 136, DType::BF16, true);
        dense_case(device, m, 64, 128, DType::F16, false);
    }
}

fn quant_case(device: &Device, m: usize, case: WeightCase) {
    let what = format!("m={m} {case:?}");
    let mut random = Random::new((m * 1_000_003 + case.n * 1009 + case.k) as u64);
    let weight = random.weight(case);
    bounded_case(device, m, &what, &mut random, &weight);
}

pub(super) fn bounded_case(device: &Device, m: usize, what: &str, random: &mut Random, weight: &LinearWeight) {
    let q = quant_of(weight);
    let x = HostData::from_f32(device.activation_dtype(), random.normals(m * q.k)).to_f32();
    let ordered = q.order.as_ref().map_or(x.clone(), |order| reference::gather_columns(&x, order));
    let bias = weight.bias.as_deref();
    let exact = reference::linear_quant(&ordered, q, bias, Rounding::Exact);
    let twin = match device.activation_dtype() {
        // The CPU holds the activations of evenly spaced codes as 16-bit integers.
        DType::F32 if q.encoding.is_affine() => {
            let rounded = reference::round_int16(&ordered, q.k, q.group_size);
            reference::linear_quant(&rounded, q, bias, Rounding::As(DType::F32))
        }
        dtype => {
            let twin = reference::linear_quant(&ordered, q, bias, Rounding::As(dtype));
            // Where f16 has no room for a weight, none is rounded to it; bf16 gives the bound.
            let fits = twin.iter().all(|y| y.is_finite());
            if fits { twin } else { reference::linear_quant(&ordered, q, bias, Rounding::As(DType::BF16)) }
        }
    };
    let w = device.pack(weight.clone()).expect("pack");
    let got = run(device, &w, &emitted(device, &x, &w, m), m);
    assert_bounded(what, &got, &exact, &twin, device.activation_dtype());
}

const W4: WeightCase = WeightCase {
    n: 48,
    k: 256,
    bits: 4,
    group_size: 128,
    symmetric: true,
    act_order: false,
    bias: false,
    activation: ActQuant::None,
};

fn quant(device: &Device) {
    for (n, k) in SHAPES {
        for group_size in GROUPS {
            for (bits, symmetric) in [(4, true), (4, false), (8, true), (8, false)] {
                let (act_order, bias) = (k % 2 == 1, n % 2 == 1);
                quant_case(device, 2, WeightCase { n, k, bits, group_size, symmetric, act_order, bias, ..W4 });
            }
        }
    }
    for bits in [2, 3, 5, 6, 7] {
        for symmetric in [true, false] {
            quant_case(device, 2, WeightCase { n: 33, k: 200, bits, group_size: 64, symmetric, act_order: true, ..W4 });
        }
    }
}

fn quant_rows(device: &Device) {
    for m in ROWS {
        quant_case(device, m, WeightCase { group_size: 32, ..W4 });
        quant_case(device, m, WeightCase { symmetric: false, ..W4 });
        quant_case(device, m, WeightCase { bits: 8, group_size: usize::MAX, n: 17, ..W4 });
    }
}

/// Scales that a weight may be multiplied by before it is rounded, that take two floats for it, and that the activation type
/// has no room for.
fn quant_scales(device: &Device) {
    type Change = fn(f32) -> f32;
    let bf16: Change = |scale| half::bf16::from_f32(scale).to_f32();
    let scales: [(&str, Change); 5] = [
        ("bf16", bf16),
        ("f32", |scale| scale * 0.123_456_7),
        ("large", |scale| scale * 1e4),
        ("tiny", |scale| scale * 1e-7),
        ("zero", |_| 0.0),
    ];
    for m in [1, 16, 33, 65, 129] {
        for (bits, symmetric) in [(4, true), (4, false), (8, true)] {
            let case = WeightCase { n: 130, group_size: 64, bits, symmetric, ..W4 };
            for (name, scale_of) in scales {
                let mut random = Random::new(m as u64);
                let mut weight = random.weight(case);
                let Weight::Quant(q) = &mut weight.weight else { panic!("a quantized weight") };
                q.scales.iter_mut().for_each(|scale| *scale = scale_of(*scale));
                bounded_case(device, m, &format!("{name} scales m={m} {case:?}"), &mut random, &weight);
            }
        }
    }
}

fn codebook_case(device: &Device, m: usize, case: WeightCase, codebook: Codebook) {
    let what = format!("m={m} {} {case:?}", codebook.name());
    let mut random = Random::new((m * 1_000_003 + case.n * 1009 + case.k) as u64);
    let mut weight = random.weight(case);
    let Weight::Quant(q) = &mut weight.weight else { panic!("a quantized weight") };
    q.zeros.fill(0.0);
    q.encoding = Encoding::Codebook(codebook);
    bounded_case(device, m, &what, &mut random, &weight);
}

fn codebook(device: &Device) {
    // Values of all signs and sizes, in no order.
    let odd = Codebook(std::array::from_fn(|i| ((i * 7 + 3) as f32).sin() * 10f32.powi(i as i32 % 5 - 2)));
    for (n, k) in SHAPES {
        for group_size in [1, 16, 32, 64, usize::MAX] {
            for codebook in [Codebook::NF4, Codebook::FP4, odd] {
                let case = WeightCase { n, k, group_size, bias: n % 2 == 1, act_order: k % 2 == 1, ..W4 };
                codebook_case(device, 2, case, codebook);
            }
        }
    }
    for m in ROWS {
        codebook_case(device, m, WeightCase { group_size: 64, ..W4 }, Codebook::NF4);
        codebook_case(device, m, WeightCase { group_size: 64, n: 33, k: 200, ..W4 }, Codebook::FP4);
    }
    for (m, n, k) in [(17, 33, 7392), (3, 17, 10_944), (300, 515, 272)] {
        codebook_case(device, m, WeightCase { n, k, group_size: 32, ..W4 }, Codebook::NF4);
    }
}

/// What every device must give, bit for bit, from the codes its own `quantize` must also give.
fn int8_case(device: &Device, m: usize, case: WeightCase) {
    let what = format!("m={m} {case:?}");
    let mut random = Random::new((m * 1_000_003 + case.n * 1009 + case.k) as u64);
    let weight = random.weight(case);
    let x = random.normals(m * case.k);
    int8_of(device, &what, &weight, x, m);
}

fn int8_of(device: &Device, what: &str, weight: &LinearWeight, x: Vec<f32>, m: usize) {
    let q = quant_of(weight);
    let x = HostData::from_f32(device.activation_dtype(), x).to_f32();
    let ordered = q.order.as_ref().map_or(x.clone(), |order| reference::gather_columns(&x, order));
    let codes = reference::quantize_rows(&ordered, q.k, weight.activation);
    let expected = reference::linear_of_codes(&codes, q, weight.bias.as_deref());
    let w = device.pack(weight.clone()).expect("pack");
    let got = run(device, &w, &emitted(device, &x, &w, m), m);
    assert_exact(what, &got, &expected);
}

fn int8(device: &Device) {
    let w8 = WeightCase { bits: 8, group_size: usize::MAX, activation: DYNAMIC, ..W4 };
    for (n, k) in SHAPES {
        for activation in [DYNAMIC, STATIC, STATIC_ASYMMETRIC] {
            for symmetric in [true, false] {
                int8_case(device, 3, WeightCase { n, k, symmetric, activation, bias: n % 2 == 1, ..w8 });
            }
        }
    }
    int8_case(device, 1, WeightCase { n: 5, k: 33_000, ..w8 });
}

fn int8_rows(device: &Device) {
    for m in ROWS {
        int8_case(device, m, WeightCase { bits: 8, group_size: usize::MAX, activation: DYNAMIC, n: 33, ..W4 });
        int8_case(device, m, WeightCase { activation: DYNAMIC, ..W4 });
    }
}

fn int8_grouped(device: &Device) {
    for (n, k) in SHAPES {
        for bits in [4, 8] {
            for (group_size, symmetric) in [(32, true), (64, false), (128, true), (128, false), (usize::MAX, true)] {
                for activation in [DYNAMIC, STATIC_ASYMMETRIC] {
                    let act_order = k % 2 == 1;
                    int8_case(
                        device,
                        2,
                        WeightCase { n, k, bits, group_size, symmetric, act_order, bias: false, activation },
                    );
                }
            }
        }
    }
}

/// Codes of 2 bits (ternary weights) and of 4, of one scale a channel and of groups, of long and of odd k, for few rows and more.
fn int8_narrow(device: &Device) {
    for (n, k) in [(17, 48), (33, 16), (130, 1136), (33, 7392), (16, 14_336)] {
        for (bits, group_size) in [(2, usize::MAX), (4, usize::MAX), (4, 128)] {
            for (m, activation) in
                [(1, DYNAMIC), (8, STATIC_ASYMMETRIC), (9, DYNAMIC), (17, DYNAMIC), (65, STATIC_ASYMMETRIC)]
            {
                int8_case(device, m, WeightCase { n, k, bits, group_size, activation, bias: n % 2 == 1, ..W4 });
            }
        }
    }
}

/// Long sums, of groups that do not divide them.
fn deep(device: &Device) {
    let w8 = WeightCase { bits: 8, group_size: usize::MAX, activation: DYNAMIC, ..W4 };
    for (n, k) in [(33, 7392), (17, 10_944), (24, 48), (16, 14_336)] {
        for m in [1, 5, 9, 17] {
            quant_case(device, m, WeightCase { n, k, symmetric: false, ..W4 });
            quant_case(device, m, WeightCase { n, k, bits: 8, group_size: 96, ..W4 });
            int8_case(device, m, WeightCase { n, k, ..w8 });
            int8_case(device, m, WeightCase { n, k, symmetric: false, activation: STATIC_ASYMMETRIC, ..W4 });
        }
    }
}

/// Outputs of many tiles, so that on a GPU the largest configurations run, none of them full at the edges.
fn large(device: &Device) {
    let m = if device.name() == "cuda" { 4090 } else { 257 };
    let w8 = WeightCase { bits: 8, group_size: usize::MAX, activation: STATIC_ASYMMETRIC, bias: true, ..W4 };
    int8_case(device, m, WeightCase { n: m, k: 80, ..w8 });
    int8_case(device, m, WeightCase { n: 1037, k: 208, ..w8 });
    int8_case(device, m, WeightCase { n: 1037, k: 208, activation: LLM_INT8, ..w8 });
    int8_case(device, m, WeightCase { n: 1037, k: 208, activation: DYNAMIC, symmetric: false, ..W4 });
    int8_case(device, m, WeightCase { n: 1037, k: 208, bits: 8, group_size: 64, activation: DYNAMIC, ..W4 });
    quant_case(device, m, WeightCase { n: 1037, k: 208, group_size: 64, symmetric: false, bias: true, ..W4 });
    quant_case(device, m, WeightCase { n: 1037, k: 208, bits: 8, ..W4 });
    dense_case(device, m, 1037, 208, DType::BF16, false);
    for m in [128, 257] {
        int8_case(device, m, WeightCase { n: 515, k: 272, ..w8 });
        quant_case(device, m, WeightCase { n: 515, k: 272, ..W4 });
    }
}

/// The same input gives the same bits, run to run.
fn repeats(device: &Device) {
    let mut random = Random::new(3);
    // Few outputs and a long sum too, which a GPU splits among blocks.
    for (m, bits, n, k) in [
        (1, 4, 130, 1000),
        (1, 4, 70, 7392),
        (8, 4, 130, 1000),
        (16, 8, 130, 1000),
        (16, 4, 70, 7392),
        (33, 4, 70, 7392),
        (64, 8, 130, 1000),
        (100, 4, 70, 7392),
        (129, 8, 130, 1000),
    ] {
        let w = device.pack(random.weight(WeightCase { n, k, bits, ..W4 })).expect("pack");
        let x = emitted(device, &random.normals(m * w.k), &w, m);
        let first = run(device, &w, &x, m);
        for _ in 0..4 {
            assert_exact(&format!("m={m} bits={bits}"), &run(device, &w, &x, m), &first);
        }
    }
}

fn int8_rows_do_not_depend_on_the_batch(device: &Device) {
    for activation in [DYNAMIC, LLM_INT8] {
        let mut random = Random::new(5);
        let w = device
            .pack(random.weight(WeightCase { n: 70, k: 384, bits: 8, group_size: usize::MAX, activation, ..W4 }))
            .expect("pack");
        let x = random.normals(65 * w.k);
        let together = run(device, &w, &emitted(device, &x, &w, 65), 65);
        for r in [0, 1, 31, 64] {
            let alone = run(device, &w, &emitted(device, &x[r * w.k..(r + 1) * w.k], &w, 1), 1);
            assert_exact(&format!("row {r}"), &alone, &together[r * w.n..(r + 1) * w.n]);
        }
    }
}

/// A few outliers in a row, none, and more than half of it; weights of every width.
fn llm_int8(device: &Device) {
    let w8 = WeightCase { bits: 8, group_size: usize::MAX, activation: LLM_INT8, ..W4 };
    for (n, k) in SHAPES {
        for threshold in [6.0, 0.5, 1e9] {
            let activation = ActQuant::LlmInt8 { threshold };
            int8_case(device, 3, WeightCase { n, k, activation, bias: n % 2 == 1, ..w8 });
            int8_case(device, 2, WeightCase { n, k, activation, symmetric: false, act_order: k % 2 == 1, ..w8 });
        }
    }
    for m in ROWS {
        int8_case(device, m, WeightCase { n: 33, ..w8 });
        int8_case(device, m, WeightCase { n: 130, k: 1136, bits: 4, bias: true, ..w8 });
    }
    for (m, n, k) in [(5, 17, 10_944), (130, 260, 2064), (300, 515, 272)] {
        int8_case(device, m, WeightCase { n, k, bias: true, ..w8 });
    }
    // Tiles for few rows and for many, full at no edge; none, some and mostly outliers.
    for m in [1, 17, 65, 129, 257] {
        for (n, k, threshold) in [(131, 1136, 6.0), (35, 4112, 6.0), (70, 272, 0.5), (70, 48, 1e9)] {
            int8_case(device, m, WeightCase { n, k, activation: ActQuant::LlmInt8 { threshold }, ..w8 });
        }
    }
}

/// Rows of outliers alone beside rows with one in the last column and rows without.
fn llm_int8_uneven(device: &Device) {
    for m in [1, 17, 65, 257] {
        for (n, k) in [(131, 1136), (64, 2048)] {
            let case =
                WeightCase { n, k, bits: 8, group_size: usize::MAX, activation: LLM_INT8, bias: n % 2 == 1, ..W4 };
            let mut random = Random::new((m * n) as u64);
            let weight = random.weight(case);
            let mut x: Vec<f32> = random.normals(m * k).into_iter().map(|x| x.clamp(-5.0, 5.0)).collect();
            for (r, row) in x.chunks_mut(k).enumerate() {
                match r % 16 {
                    0 => row.iter_mut().for_each(|x| *x += 20.0),
                    7 => row[k - 1] = -1000.0,
                    _ => {}
                }
            }
            int8_of(device, &format!("uneven m={m} {case:?}"), &weight, x, m);
        }
    }
}

/// One row at a time, where outliers by value and by column of the batch are the same; 16-bit sums and results there.
fn llm_int8_is_that_of_bitsandbytes(device: &Device) {
    let dir = Path::new("tests/golden/formats/bnb-int8-k64");
    let bytes = std::fs::read(dir.join("llm_int8.safetensors")).expect("golden file");
    let tensors = SafeTensors::deserialize(&bytes).expect("golden file");
    let values = |name: &str| -> Vec<f32> {
        let data = tensors.tensor(name).expect("tensor").data();
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect()
    };
    let (x, expected) = (values("x"), values("y"));
    let w = device.pack(Checkpoint::open(dir).expect("opens").linear("m").expect("reads")).expect("pack");
    let m = x.len() / w.k;
    let got = run(device, &w, &emitted(device, &x, &w, m), m);
    let largest = expected.iter().fold(0f32, |max, y| max.max(y.abs()));
    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
        // Two roundings to f16 there; here x, which is exact in f16, to the activation type, against weights of about 1.
        let u = DType::F16.unit_roundoff() as f32 * 2.0 + device.activation_dtype().unit_roundoff() as f32;
        assert!((got - expected).abs() <= u * largest * 2.0, "element {i}: {got}, bitsandbytes {expected}");
    }
}

/// `Write::Add` is one f32 addition to what is there.
fn add(device: &Device) {
    let mut random = Random::new(9);
    for case in
        [WeightCase { n: 35, ..W4 }, WeightCase { n: 35, bits: 8, group_size: usize::MAX, activation: DYNAMIC, ..W4 }]
    {
        let w = device.pack(random.weight(case)).expect("pack");
        let x = emitted(device, &random.normals(5 * w.k), &w, 5);
        let y = run(device, &w, &x, 5);
        let before = random.normals(5 * w.n);
        let mut out = f32s(device, &before);
        device.linear(&mut out, Columns { offset: 0, stride: w.n }, &x, &w, Write::Add, 5).expect("linear");
        let expected: Vec<f32> = before.iter().zip(&y).map(|(a, b)| a + b).collect();
        assert_exact("add", &read(device, &out, 5 * w.n), &expected);
    }
}

/// Three layers side by side in one destination, in the activation type (the fused q, k, v).
fn columns(device: &Device) {
    let mut random = Random::new(11);
    let stride = 16 + 33 + 8;
    let m = 17;
    let x = random.normals(m * W4.k);
    let mut out = poisoned(device, device.activation_dtype(), (m + 1) * stride);
    let mut expected = vec![f32::NAN; m * stride];
    for (offset, n) in [(0, 16), (16, 33), (49, 8)] {
        let w = device.pack(random.weight(WeightCase { n, bias: true, ..W4 })).expect("pack");
        let x = emitted(device, &x, &w, m);
        device.linear(&mut out, Columns { offset, stride }, &x, &w, Write::Store, m).expect("linear");
        for (r, y) in run(device, &w, &x, m).chunks_exact(n).enumerate() {
            for (c, &y) in y.iter().enumerate() {
                expected[r * stride + offset + c] = device.activation_dtype().round(y);
            }
        }
    }
    assert_exact("columns", &read(device, &out, m * stride), &expected);
    assert_untouched("columns", device, &out, m * stride);
}

/// What must not reach a kernel.
fn rejects(device: &Device) {
    let good = Random::new(1).weight(WeightCase { n: 8, k: 64, group_size: 32, symmetric: false, ..W4 });
    let broken = |change: &dyn Fn(&mut QuantWeight)| {
        let mut weight = good.clone();
        match &mut weight.weight {
            Weight::Quant(q) => change(q),
            Weight::Dense { .. } => unreachable!("made above"),
        }
        weight
    };
    let cases: [(&str, LinearWeight); 9] = [
        ("too few codes", broken(&|q| q.codes = q.codes[..8].to_vec().into())),
        ("a code past its bits", broken(&|q| q.codes[3] = 16)),
        ("a NaN scale", broken(&|q| q.scales[1] = f32::NAN)),
        ("an infinite zero point", broken(&|q| q.zeros[1] = f32::INFINITY)),
        ("a zero point past its bits", broken(&|q| q.zeros[1] = 17.0)),
        ("group size 0", broken(&|q| q.group_size = 0)),
        ("9 bits", broken(&|q| q.bits = 9)),
        ("a repeated column", broken(&|q| q.order = Some(vec![0; 64]))),
        ("a short bias", LinearWeight { bias: Some(vec![0.0; 7]), ..good.clone() }),
    ];
    for (what, weight) in cases {
        assert!(device.pack(weight).is_err(), "{what} was accepted");
    }
    let long = WeightCase { n: 1, k: 132_105, bits: 8, group_size: usize::MAX, activation: DYNAMIC, ..W4 };
    let message = device.pack(Random::new(2).weight(long)).map(|_| ()).expect_err("too long a sum").to_string();
    assert!(message.contains("132105"), "{message}");
}
