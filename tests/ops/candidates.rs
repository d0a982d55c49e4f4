//! Every configuration that a table of measured choices may name computes what the specification says, whatever the cost models
//! would choose.

use lowbit::device::cpu::reference::{self, Rounding};
use lowbit::device::{Columns, Device, PackedWeight, Write};
use lowbit::dtype::{DType, HostData};
use lowbit::quant::{ActQuant, Codebook, Encoding, LinearWeight, Weight};

use super::{activations, assert_untouched, cuda_devices, poisoned, poisoned_act, read};
use crate::common::random::{Random, WeightCase};
use crate::common::tolerance::{assert_bounded, assert_exact};

/// Rows: one, the edges of every tile, and more than a tile holds.
const ROWS: [usize; 9] = [1, 8, 9, 17, 33, 64, 65, 129, 257];
const MOST: usize = ROWS[ROWS.len() - 1];

/// Neither a multiple of a tile nor of a cluster.
const CASE: WeightCase = WeightCase {
    n: 520,
    k: 1168,
    bits: 4,
    group_size: 128,
    symmetric: true,
    act_order: false,
    bias: true,
    activation: ActQuant::None,
};

fn run(device: &Device, w: &PackedWeight, x: &[f32], m: usize, what: &str) -> Vec<f32> {
    let mut act = poisoned_act(device, m, w.k);
    let (x, _) = activations(device, &x[..m * w.k]);
    device.quantize(&mut act, &x, w.k, w.input_format(), m).expect("quantize");
    let mut out = poisoned(device, DType::F32, m * w.n + 3);
    device.linear(&mut out, Columns { offset: 0, stride: w.n }, &act, w, Write::Store, m).expect("linear");
    assert_untouched(what, device, &out, m * w.n);
    read(device, &out, m * w.n)
}

fn weight(case: WeightCase) -> LinearWeight {
    Random::new(5).weight(case)
}

/// Runs all candidates for all [`ROWS`] and gives their results, with name, rows and input, to `check`.
fn each(device: &Device, weight: &LinearWeight, check: impl Fn(&str, usize, &[f32], &[f32])) {
    let Device::Cuda(gpu) = device else { panic!("a CUDA device") };
    let x = HostData::from_f32(device.activation_dtype(), Random::new(6).normals(MOST * weight.k())).to_f32();
    let mut w = device.pack(weight.clone()).expect("pack");
    for m in ROWS {
        let candidates = gpu.candidates(&w, m);
        if candidates.is_empty() {
            println!("{} has nothing to choose", w.kernel(m));
        }
        for choice in candidates {
            gpu.fix(&mut w, &choice);
            assert!(w.kernel(m).ends_with(&choice.config), "{} is not {}", w.kernel(m), choice.config);
            let what = format!("{} for {m} rows of {}", w.kernel(m), w.scheme);
            check(&what, m, &x, &run(device, &w, &x, m, &what));
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_int8_is_exact() {
    for device in cuda_devices() {
        let cpu = Device::cpu();
        let int8 = WeightCase { bits: 8, group_size: usize::MAX, activation: ActQuant::DynamicPerToken, ..CASE };
        let (factored, _) = super::factored::weight(520, 1168, 128, true, int8.activation);
        let factored = LinearWeight { weight: Weight::Quant(factored), ..weight(int8) };
        let llm_int8 = weight(WeightCase { activation: ActQuant::LlmInt8 { threshold: 6.0 }, ..int8 });
        let w4a8 = [weight(WeightCase { bits: 4, group_size: 128, ..int8 }), weight(WeightCase { bits: 4, ..int8 })];
        let w2a8 = weight(WeightCase { bits: 2, ..int8 });
        for weight in [weight(int8), llm_int8, factored, w2a8].into_iter().chain(w4a8) {
            let w = cpu.pack(weight.clone()).expect("pack");
            let expected = std::cell::OnceCell::new();
            each(&device, &weight, |what, m, x, got| {
                let expected = expected.get_or_init(|| run(&cpu, &w, x, MOST, "the CPU's"));
                assert_exact(what, got, &expected[..m * w.n]);
            });
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_16bit_is_bounded() {
    let mut nf4 = weight(CASE);
    let Weight::Quant(q) = &mut nf4.weight else { panic!("a quantized weight") };
    q.zeros.fill(0.0);
    q.encoding = Encoding::Codebook(Codebook::NF4);
    let asymmetric = weight(WeightCase { bits: 8, group_size: 64, symmetric: false, ..CASE });
    for device in cuda_devices() {
        for weight in [&weight(CASE), &asymmetric, &nf4] {
            let Weight::Quant(q) = &weight.weight else { panic!("a quantized weight") };
            let references = std::cell::OnceCell::new();
            each(&device, weight, |what, m, x, got| {
                let of = |rounding| reference::linear_quant(x, q, weight.bias.as_deref(), rounding);
                let (exact, twin) =
                    references.get_or_init(|| (of(Rounding::Exact), of(Rounding::As(device.activation_dtype()))));
                let len = m * q.n;
                assert_bounded(what, got, &exact[..len], &twin[..len], device.activation_dtype());
            });
        }
    }
}
