//! Linear layers with an epilogue: activations, codes by float and by integer multipliers, SwiGLU, groups; bit for bit.

use lowbit::device::cpu::reference::{self, Codes};
use lowbit::device::{
    Activation, Columns, Device, Epilogue, GROUP_OUTPUTS, InputFormat, LinearInput, Output, PackedWeight, Write,
};
use lowbit::dtype::{DType, HostData};
use lowbit::quant::{ActQuant, Encoding, LinearWeight, QuantWeight, Weight};

use super::{CANARY_CODE, activations, assert_untouched, f32s, on_every_device, poisoned, poisoned_act, read};
use crate::common::random::{Random, WeightCase};
use crate::common::tolerance::assert_exact;

on_every_device!(
    every_shape,
    every_combination,
    grouped_weights,
    many_tiles,
    fused_is_unfused,
    uint8,
    rows_do_not_depend_on_the_batch,
    strides,
    poisoned_rows,
    fixed_point_by_hand,
    rejects
);

const ROWS: [usize; 12] = [1, 2, 7, 8, 16, 17, 33, 64, 65, 128, 129, 257];
const OUTPUTS: [usize; 6] = [8, 24, 100, 136, 256, 264];
const INPUTS: [usize; 5] = [16, 48, 128, 272, 1040];
const INPUT_QUANTS: [ActQuant; 4] = [
    ActQuant::DynamicPerToken,
    ActQuant::DynamicAsymmetric,
    ActQuant::StaticPerTensor { scale: 0.11, zero_point: 0 },
    ActQuant::StaticPerTensor { scale: 0.05, zero_point: -37 },
];
const STATIC: Output = Output::Static { scale: 0.37, zero_point: -11 };
const FIXED: Output = Output::FixedPoint { scale: 0.37, zero_point: -11 };

/// Every activation with every output it can have.
fn epilogues() -> Vec<Epilogue> {
    use Activation::*;
    let of = |activation, output| Epilogue { activation, output };
    let mut all: Vec<Epilogue> = [None, Relu, GeluTanh, GeluErf, Silu, SwiGlu]
        .into_iter()
        .flat_map(|a| [of(a, STATIC), of(a, Output::Groups)])
        .collect();
    all.extend([Relu, GeluTanh, GeluErf, Silu, SwiGlu].map(|a| of(a, Output::Floats)));
    all.extend([of(None, FIXED), of(Relu, FIXED)]);
    all
}

#[derive(Debug, Clone, Copy)]
struct Case {
    m: usize,
    outputs: usize,
    k: usize,
    input: ActQuant,
    epilogue: Epilogue,
    bits: u8,
    group_size: usize,
    bias: bool,
}

impl Case {
    const W8: Case = Case {
        m: 17,
        outputs: 136,
        k: 272,
        input: ActQuant::DynamicPerToken,
        epilogue: Epilogue::NONE,
        bits: 8,
        group_size: usize::MAX,
        bias: true,
    };

    fn rows_of_w(&self) -> usize {
        if self.epilogue.activation == Activation::SwiGlu { 2 * self.outputs } else { self.outputs }
    }

    /// What this kind of layer cannot be.
    fn is_possible(&self) -> bool {
        let fixed = matches!(self.epilogue.output, Output::FixedPoint { .. });
        let dynamic = !matches!(self.input, ActQuant::StaticPerTensor { .. });
        let gated = self.epilogue.activation == Activation::SwiGlu;
        !(fixed && dynamic || gated && !self.outputs.is_multiple_of(8))
    }

    fn weight(&self, random: &mut Random) -> LinearWeight {
        let (n, k, bits, group_size, bias) = (self.rows_of_w(), self.k, self.bits, self.group_size, self.bias);
        let symmetric = bits == 8;
        let case = WeightCase { n, k, bits, group_size, symmetric, act_order: false, bias, activation: self.input };
        random.weight(case)
    }
}

/// `x` as the device quantizes it, in int8 or uint8.
fn quantized(device: &Device, x: &[f32], k: usize, quant: ActQuant, codes: DType) -> LinearInput {
    let m = x.len() / k;
    let mut act = act_of(device, m, k, codes);
    let (x, _) = activations(device, x);
    device.quantize(&mut act, &x, k, InputFormat::quantized(quant), m).expect("quantize");
    act
}

fn act_of(device: &Device, m: usize, k: usize, codes: DType) -> LinearInput {
    let mut act = poisoned_act(device, m, k);
    if codes == DType::U8 {
        act.codes = device.upload(HostData::U8(vec![CANARY_CODE as u8 ^ 0x80; (m + 1) * k])).expect("upload");
    }
    act
}

/// Codes (uint8 less 128) and scales that the layer wrote, nothing behind them touched.
fn run_codes(device: &Device, w: &PackedWeight, x: &LinearInput, m: usize, codes: DType) -> (Vec<i8>, Vec<f32>) {
    let outputs = w.outputs();
    let scales = m * if w.epilogue.output == Output::Groups { outputs.div_ceil(GROUP_OUTPUTS) } else { 1 };
    let mut out = act_of(device, m, outputs, codes);
    out.scales = poisoned(device, DType::F32, scales + 3);
    device.linear_codes(&mut out, x, w, m).expect("linear_codes");
    assert_untouched("scales", device, &out.scales, scales);
    let all: Vec<i8> = match device.download(&out.codes, (m + 1) * outputs).expect("download") {
        HostData::I8(codes) => codes,
        HostData::U8(codes) => codes.into_iter().map(|code| (code ^ 0x80) as i8).collect(),
        other => panic!("codes of {}", other.dtype()),
    };
    assert!(all[m * outputs..].iter().all(|&c| c == CANARY_CODE), "codes behind the last row were written");
    (all[..m * outputs].to_vec(), read(device, &out.scales, scales))
}

fn run_floats(device: &Device, w: &PackedWeight, x: &LinearInput, m: usize) -> Vec<f32> {
    let mut out = poisoned(device, DType::F32, m * w.outputs() + 3);
    device.linear(&mut out, Columns { offset: 0, stride: w.outputs() }, x, w, Write::Store, m).expect("linear");
    assert_untouched("linear", device, &out, m * w.outputs());
    read(device, &out, m * w.outputs())
}

fn assert_codes(what: &str, got: (Vec<i8>, Vec<f32>), expected: &Codes) {
    if let Some(i) = (0..got.0.len()).find(|&i| got.0[i] != expected.codes[i]) {
        panic!("{what}: code {i} is {}, expected {}", got.0[i], expected.codes[i]);
    }
    assert_exact(&format!("{what}: scales"), &got.1, &expected.scales);
}

fn check(device: &Device, case: Case) {
    let what = format!("{case:?}");
    let mut random = Random::new((case.m * 1_000_003 + case.outputs * 1009 + case.k) as u64);
    let weight = case.weight(&mut random);
    let x = HostData::from_f32(device.activation_dtype(), random.normals(case.m * case.k)).to_f32();
    let codes = reference::quantize_rows(&x, case.k, case.input);
    let w = device.pack_fused(weight.clone(), case.epilogue).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(w.outputs(), case.outputs);
    let act = quantized(device, &x, case.k, case.input, DType::I8);
    if case.epilogue.output == Output::Floats {
        let expected = reference::linear_fused(&codes, &weight, case.epilogue.activation);
        assert_exact(&what, &run_floats(device, &w, &act, case.m), &expected);
    } else {
        let expected = reference::linear_codes(&codes, &weight, case.epilogue).expect("linear_codes");
        assert_codes(&what, run_codes(device, &w, &act, case.m, DType::I8), &expected);
    }
}

/// All shapes, each with one of the combinations, which all come round.
fn every_shape(device: &Device) {
    let epilogues = epilogues();
    let mut i = 0;
    for m in ROWS {
        for outputs in OUTPUTS {
            for k in INPUTS {
                i += 1;
                let (input, epilogue) = (INPUT_QUANTS[i / 3 % 4], epilogues[i % epilogues.len()]);
                let case = Case { m, outputs, k, input, epilogue, bias: i % 2 == 0, ..Case::W8 };
                if case.is_possible() {
                    check(device, case);
                }
            }
        }
    }
}

fn every_combination(device: &Device) {
    for epilogue in epilogues() {
        for input in INPUT_QUANTS {
            for bias in [false, true] {
                for (m, outputs, k) in [(5, 136, 272), (33, 264, 48), (3, 40, 16)] {
                    let case = Case { m, outputs, k, input, epilogue, bias, ..Case::W8 };
                    if case.is_possible() {
                        check(device, case);
                    }
                }
            }
        }
    }
}

/// 4-bit weights, groups, and shapes that only the kernel for any shape takes. Codes in groups need 8 bits a channel.
fn grouped_weights(device: &Device) {
    for epilogue in epilogues().into_iter().filter(|e| e.output != Output::Groups) {
        for input in INPUT_QUANTS {
            for (bits, group_size, outputs, k) in [
                (4, 32, 136, 272),
                (4, usize::MAX, 72, 128),
                (8, 64, 40, 272),
                (8, usize::MAX, 24, 33),
                (4, 24, 16, 50),
            ] {
                let fixed = matches!(epilogue.output, Output::FixedPoint { .. });
                let case = Case { m: 19, outputs, k, input, epilogue, bits, group_size, bias: k % 2 == 0 };
                if case.is_possible() && !(fixed && group_size < k) {
                    check(device, case);
                }
            }
        }
    }
}

/// Enough tiles for the largest configurations of a GPU, none of them full at the edges.
fn many_tiles(device: &Device) {
    let m = if device.name() == "cuda" { 2050 } else { 130 };
    for (i, epilogue) in epilogues().into_iter().enumerate() {
        let input = INPUT_QUANTS[2 + i % 2];
        check(device, Case { m, outputs: 1032, k: 80, input, epilogue, ..Case::W8 });
    }
}

/// A fused layer gives what the layer and `quantize` give one after the other.
fn fused_is_unfused(device: &Device) {
    let (m, k, n, scale, zero_point) = (9, 272, 100, 0.21, 7);
    let mut random = Random::new(31);
    let case = Case { m, outputs: n, k, ..Case::W8 };
    let weight = case.weight(&mut random);
    let x = quantized(device, &random.normals(m * k), k, case.input, DType::I8);
    let plain = device.pack(weight.clone()).expect("pack");
    let y = run_floats(device, &plain, &x, m);
    let expected = reference::quantize_rows(&y, n, ActQuant::StaticPerTensor { scale, zero_point });
    let epilogue = Epilogue { activation: Activation::None, output: Output::Static { scale, zero_point } };
    let fused = device.pack_fused(weight, epilogue).expect("pack_fused");
    assert_codes("fused", run_codes(device, &fused, &x, m, DType::I8), &expected);
}

/// uint8 on either side is int8 with 128 added to every code.
fn uint8(device: &Device) {
    for input in INPUT_QUANTS {
        for (bits, group_size, k) in [(8, usize::MAX, 272), (4, 64, 256), (8, usize::MAX, 35)] {
            for m in [1, 17, 130] {
                let epilogue = Epilogue { activation: Activation::Relu, output: STATIC };
                let case = Case { m, outputs: 72, k, input, epilogue, bits, group_size, ..Case::W8 };
                let mut random = Random::new((m + k) as u64);
                let weight = case.weight(&mut random);
                let x = HostData::from_f32(device.activation_dtype(), random.normals(m * k)).to_f32();
                let expected =
                    reference::linear_codes(&reference::quantize_rows(&x, k, input), &weight, epilogue).expect("codes");
                let w = device.pack_fused(weight, epilogue).expect("pack_fused");
                for (from, to) in [(DType::U8, DType::I8), (DType::I8, DType::U8), (DType::U8, DType::U8)] {
                    let act = quantized(device, &x, k, input, from);
                    let what = format!("{from} to {to}, {case:?}");
                    assert_codes(&what, run_codes(device, &w, &act, m, to), &expected);
                }
            }
        }
    }
}

fn rows_do_not_depend_on_the_batch(device: &Device) {
    for (i, epilogue) in epilogues().into_iter().enumerate() {
        let input = INPUT_QUANTS[i % 4];
        let case = Case { m: 129, outputs: 264, k: 272, input, epilogue, ..Case::W8 };
        if !case.is_possible() {
            continue;
        }
        let mut random = Random::new(i as u64);
        let w = device.pack_fused(case.weight(&mut random), epilogue).expect("pack_fused");
        let x = random.normals(case.m * case.k);
        let act = |rows: std::ops::Range<usize>| {
            quantized(device, &x[rows.start * case.k..rows.end * case.k], case.k, input, DType::I8)
        };
        let scales = if epilogue.output == Output::Groups { 264usize.div_ceil(GROUP_OUTPUTS) } else { 1 };
        for r in [0, 1, 63, 64, 128] {
            let what = format!("row {r}, {epilogue:?}");
            if epilogue.output == Output::Floats {
                let together = run_floats(device, &w, &act(0..case.m), case.m);
                assert_exact(&what, &run_floats(device, &w, &act(r..r + 1), 1), &together[r * 264..(r + 1) * 264]);
            } else {
                let (codes, all) = run_codes(device, &w, &act(0..case.m), case.m, DType::I8);
                let alone = run_codes(device, &w, &act(r..r + 1), 1, DType::I8);
                assert_eq!(alone.0, codes[r * 264..(r + 1) * 264], "{what}");
                assert_exact(&what, &alone.1, &all[r * scales..(r + 1) * scales]);
            }
        }
    }
}

/// Rows of any width with the layer's columns anywhere in them, stored and added; in f32 and in the activation type.
fn strides(device: &Device) {
    let mut random = Random::new(77);
    for i in 0..24 {
        let activation = [Activation::SwiGlu, Activation::GeluErf, Activation::None][i % 3];
        let outputs = [8, 72, 136][random.below(3)];
        let (m, k) = (1 + random.below(70), 16 * (1 + random.below(9)));
        let epilogue = Epilogue { activation, output: Output::Floats };
        let case = Case { m, outputs, k, epilogue, ..Case::W8 };
        let weight = case.weight(&mut random);
        let x = HostData::from_f32(device.activation_dtype(), random.normals(m * k)).to_f32();
        let y = reference::linear_fused(&reference::quantize_rows(&x, k, case.input), &weight, activation);
        let w = device.pack_fused(weight, epilogue).expect("pack_fused");
        let act = quantized(device, &x, k, case.input, DType::I8);
        let offset = random.below(20);
        let stride = offset + outputs + random.below(20);
        let (dtype, write) = match i % 4 {
            0 => (DType::F32, Write::Add),
            1 => (DType::F32, Write::Store),
            _ => (device.activation_dtype(), Write::Store),
        };
        let before = HostData::from_f32(dtype, random.normals((m + 1) * stride));
        let mut expected = before.to_f32();
        for (row, y) in expected.chunks_exact_mut(stride).zip(y.chunks_exact(outputs)) {
            for (out, y) in row[offset..].iter_mut().zip(y) {
                *out = if write == Write::Add { *out + y } else { dtype.round(*y) };
            }
        }
        let mut out = device.upload(before).expect("upload");
        device.linear(&mut out, Columns { offset, stride }, &act, &w, write, m).expect("linear");
        assert_exact(
            &format!("{write:?} {dtype} at {offset} of {stride}, {case:?}"),
            &read(device, &out, (m + 1) * stride),
            &expected,
        );
    }
}

/// A row that was poisoned on its way in poisons what is written of it, whatever the output.
fn poisoned_rows(device: &Device) {
    let k = 64;
    for epilogue in epilogues() {
        let case = Case { m: 3, outputs: 136, k, epilogue, input: INPUT_QUANTS[2], bias: false, ..Case::W8 };
        let mut random = Random::new(8);
        let w = device.pack_fused(case.weight(&mut random), epilogue).expect("pack_fused");
        let mut x = random.normals(3 * k);
        x[k + 3] = f32::NAN;
        let act = quantized(device, &x, k, case.input, DType::I8);
        if epilogue.output == Output::Floats {
            let y = run_floats(device, &w, &act, 3);
            let nan = |row: usize| y[row * 136..(row + 1) * 136].iter().all(|y| y.is_nan());
            assert_eq!([nan(0), nan(1), nan(2)], [false, true, false], "{epilogue:?}");
        } else {
            let scales = run_codes(device, &w, &act, 3, DType::I8).1;
            let of_row = scales.len() / 3;
            for (i, scale) in scales.iter().enumerate() {
                assert_eq!(scale.is_nan(), i / of_row == 1, "scale {i} of {epilogue:?} is {scale}");
            }
        }
    }
}

/// One column whose sum is known: gemmlowp's example multiplier 0.007247427341846.
fn fixed_point_by_hand(device: &Device) {
    let (k, out_scale) = (16, 1.0);
    // Sums of 16 codes: 12345 = 127 * 97 + 26.
    let weight = |bias: f32| LinearWeight {
        weight: Weight::Quant(QuantWeight {
            n: 1,
            k,
            bits: 8,
            group_size: k,
            codes: (0..16).map(|c| if c == 0 { 128 + 97 } else { 128 + u8::from(c == 1) }).collect(),
            scales: vec![0.007_247_427_3],
            zeros: vec![128.0],
            order: None,
            encoding: Encoding::Affine,
        }),
        bias: Some(vec![bias]),
        activation: ActQuant::StaticPerTensor { scale: 1.0, zero_point: 0 },
    };
    let mut x = vec![0.0; k];
    (x[0], x[1]) = (127.0, 26.0);
    let epilogue =
        |activation, zero_point| Epilogue { activation, output: Output::FixedPoint { scale: out_scale, zero_point } };
    let code = |bias: f32, activation, zero_point| {
        let w = device.pack_fused(weight(bias), epilogue(activation, zero_point)).expect("pack_fused");
        let act = quantized(device, &x, k, ActQuant::StaticPerTensor { scale: 1.0, zero_point: 0 }, DType::I8);
        run_codes(device, &w, &act, 1, DType::I8).0[0]
    };
    assert_eq!(code(0.0, Activation::None, 0), 89, "12345 * 0.007247427 = 89.47");
    assert_eq!(code(0.0, Activation::None, -100), -11);
    // A bias of -20000 steps: (12345 - 20000) * 0.007247427 = -55.48.
    let bias = -20_000.0 * 0.007_247_427_3;
    assert_eq!(code(bias, Activation::None, 3), -52);
    assert_eq!(code(bias, Activation::Relu, 3), 3);
    assert_eq!(code(1000.0, Activation::None, 3), 127);
}

/// What must be told when a weight is packed.
fn rejects(device: &Device) {
    let mut random = Random::new(1);
    let w8 = Case { outputs: 24, k: 64, input: INPUT_QUANTS[2], ..Case::W8 };
    let epilogue = |activation, output| Epilogue { activation, output };
    let mut fails = |case: Case, epilogue: Epilogue, change: &dyn Fn(&mut LinearWeight), words: &str| {
        let mut weight = case.weight(&mut random);
        change(&mut weight);
        let message = device.pack_fused(weight, epilogue).map(|_| ()).expect_err(words).to_string();
        assert!(message.contains(words), "{message}");
    };
    let nothing = |_: &mut LinearWeight| {};
    let gated = epilogue(Activation::SwiGlu, Output::Floats);
    fails(Case { outputs: 28, ..w8 }, gated, &nothing, "28 rows");
    let relu = epilogue(Activation::Relu, Output::Floats);
    fails(Case { input: ActQuant::None, ..w8 }, relu, &nothing, "16-bit activations");
    let fixed = epilogue(Activation::None, FIXED);
    fails(Case { input: ActQuant::DynamicPerToken, ..w8 }, fixed, &nothing, "dynamic activations");
    fails(Case { group_size: 32, ..w8 }, fixed, &nothing, "2 groups");
    fails(w8, epilogue(Activation::Silu, FIXED), &nothing, "Silu");
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-30] {
        fails(w8, epilogue(Activation::None, Output::Static { scale, zero_point: 0 }), &nothing, "output scale");
    }
    fails(w8, epilogue(Activation::None, Output::Static { scale: 1.0, zero_point: 128 }), &nothing, "zero point 128");
    let infinite_bias = |w: &mut LinearWeight| w.bias = Some(vec![f32::INFINITY; 24]);
    fails(w8, epilogue(Activation::None, STATIC), &infinite_bias, "bias");
    let large_bias = |w: &mut LinearWeight| w.bias = Some(vec![1e12; 24]);
    fails(w8, fixed, &large_bias, "32 bits");

    // And when it is run: floats and codes are two ops.
    let (k, m) = (64, 2);
    let plain = device.pack(w8.weight(&mut random)).expect("pack");
    let coded = device.pack_fused(w8.weight(&mut random), epilogue(Activation::None, STATIC)).expect("pack_fused");
    let x = quantized(device, &vec![1.0; m * k], k, w8.input, DType::I8);
    let mut out = poisoned_act(device, m, 24);
    assert!(device.linear_codes(&mut out, &x, &plain, m).is_err());
    let mut floats = f32s(device, &vec![0.0; m * 24]);
    assert!(device.linear(&mut floats, Columns { offset: 0, stride: 24 }, &x, &coded, Write::Store, m).is_err());
}

/// The activations' fixed sequences of f32 operations against f64, in units of f32's last place.
#[test]
fn activations_are_accurate() {
    // Simpson's rule on the density of the normal distribution.
    let phi = |x: f64| {
        let (steps, h) = (2000, x / 2000.0);
        let density = |t: f64| (-t * t / 2.0).exp() / std::f64::consts::TAU.sqrt();
        let weighted =
            |i: usize| density(i as f64 * h) * if i == 0 || i == steps { 1.0 } else { 2.0 + 2.0 * (i % 2) as f64 };
        0.5 + (0..=steps).map(weighted).sum::<f64>() * h / 3.0
    };
    let tanh_form =
        |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh());
    for i in -4000..=4000 {
        let y = i as f32 / 400.0;
        let x = f64::from(y);
        for (activation, exact) in [
            (Activation::Silu, x / (1.0 + (-x).exp())),
            (Activation::GeluTanh, tanh_form(x)),
            (Activation::GeluErf, x * phi(x)),
            (Activation::Relu, x.max(0.0)),
        ] {
            let got = f64::from(reference::activate(y, activation));
            // Of the argument's size: what is left of a large negative one is the difference of numbers of its size.
            let bound = 8.0 * DType::F32.unit_roundoff() * exact.abs().max(x.abs() * 0.25);
            assert!((got - exact).abs() <= bound, "{activation:?}({y}) = {got:e}, exactly {exact:e}");
        }
    }
    for i in -870..=870 {
        let x = i as f32 / 10.0;
        let error = f64::from(reference::exp(x)) / f64::from(x).exp() - 1.0;
        assert!(error.abs() < 2.0 * 2f64.powi(-23), "exp({x}) is off by {error:e}");
    }
    assert_eq!(reference::activate(-0.0, Activation::Relu).to_bits(), (-0.0f32).to_bits());
    for activation in [Activation::Relu, Activation::Silu, Activation::GeluTanh, Activation::GeluErf] {
        assert!(reference::activate(f32::NAN, activation).is_nan());
        assert_eq!(reference::activate(0.0, activation), 0.0);
        assert!(reference::activate(-1e30, activation).abs() < 1.0, "{activation:?}");
        assert_eq!(reference::activate(1e4, activation), 1e4);
    }
}
