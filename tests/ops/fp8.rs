//! FP8 weights: every code exactly, and whole layers bounded.

use lowbit::device::{Device, Write};
use lowbit::error::Error;
use lowbit::quant::{ActQuant, Encoding, LinearWeight, QuantWeight, Weight};

use super::linear::{bounded_case, emitted, run};
use super::{ROWS, on_every_device};
use crate::common::random::{Random, WeightCase};

on_every_device!(every_code, layers, rows, extreme_scales, rejects);

const CASE: WeightCase = WeightCase {
    n: 48,
    k: 256,
    bits: 8,
    group_size: 128,
    symmetric: true,
    act_order: false,
    bias: false,
    activation: ActQuant::None,
};

/// A weight of every code but the two that are NaN, in random order.
fn fp8(random: &mut Random, case: WeightCase) -> LinearWeight {
    let mut weight = random.weight(case);
    let Weight::Quant(q) = &mut weight.weight else { panic!("a quantized weight") };
    q.encoding = Encoding::E4m3;
    q.zeros.fill(0.0);
    q.codes.iter_mut().for_each(|code| *code -= u8::from(*code & 0x7f == 0x7f));
    weight
}

/// One weight a row, of each code, times 1: its value as the format's definition gives it.
fn every_code(device: &Device) {
    let codes: Vec<u8> = (0..=u8::MAX).filter(|code| code & 0x7f != 0x7f).collect();
    let value = |&code: &u8| {
        let (sign, exponent, mantissa) = (i32::from(code >> 7), i32::from(code >> 3 & 15), f64::from(code & 7));
        let magnitude = match exponent {
            0 => mantissa * 2f64.powi(-9),
            _ => (8.0 + mantissa) * 2f64.powi(exponent - 10),
        };
        ((-1f64).powi(sign) * magnitude) as f32
    };
    let expected: Vec<f32> = codes.iter().map(value).collect();
    for k in [1, 2, 3, 4, 5, 8, 11] {
        for column in 0..k {
            let n = codes.len();
            let mut all = vec![0; n * k];
            codes.iter().enumerate().for_each(|(r, &code)| all[r * k + column] = code);
            let weight = Weight::Quant(QuantWeight {
                n,
                k,
                bits: 8,
                group_size: k,
                codes: all.into(),
                scales: vec![1.0; n],
                zeros: vec![0.0; n],
                order: None,
                encoding: Encoding::E4m3,
            });
            let w = device.pack(LinearWeight { weight, bias: None, activation: ActQuant::None }).expect("pack");
            for m in [1, 5, 9] {
                let got = run(device, &w, &emitted(device, &vec![1.0; m * k], &w, m), m);
                assert!(got.chunks_exact(n).all(|row| row == expected), "k={k} column={column} m={m}");
            }
        }
    }
}

fn case(device: &Device, m: usize, case: WeightCase) {
    let mut random = Random::new((m * 1_000_003 + case.n * 1009 + case.k) as u64);
    let weight = fp8(&mut random, case);
    bounded_case(device, m, &format!("fp8 m={m} {case:?}"), &mut random, &weight);
}

fn layers(device: &Device) {
    for (n, k) in super::linear::SHAPES {
        for group_size in [3, 48, 128, usize::MAX] {
            case(device, 9, WeightCase { n, k, group_size, bias: n % 2 == 1, act_order: k % 2 == 1, ..CASE });
        }
    }
    for (m, n, k) in [(1, 33, 7392), (17, 33, 7392), (3, 17, 10_944), (300, 515, 272)] {
        case(device, m, WeightCase { n, k, ..CASE });
        case(device, m, WeightCase { n, k, group_size: usize::MAX, ..CASE });
    }
}

fn rows(device: &Device) {
    for m in ROWS {
        case(device, m, CASE);
        case(device, m, WeightCase { n: 17, k: 200, group_size: usize::MAX, bias: true, ..CASE });
    }
}

/// Scales so large or small that what is folded into them would not fit, and zero.
fn extreme_scales(device: &Device) {
    for scale in [0.0, 1e-36, 1e-30, 1e30, 1e34] {
        let mut random = Random::new(5);
        let mut weight = fp8(&mut random, CASE);
        let Weight::Quant(q) = &mut weight.weight else { panic!("a quantized weight") };
        q.scales.fill(scale);
        bounded_case(device, 3, &format!("fp8 scale {scale}"), &mut random, &weight);
    }
}

fn rejects(device: &Device) {
    let refused = |change: fn(&mut QuantWeight), reason: &str| {
        let mut weight = fp8(&mut Random::new(1), CASE);
        let Weight::Quant(q) = &mut weight.weight else { panic!("a quantized weight") };
        change(q);
        let error = device.pack(weight).expect_err(reason).to_string();
        assert!(error.contains(reason), "`{error}` lacks `{reason}`");
    };
    refused(|q| q.codes[7] = 0x7f, "NaN");
    refused(|q| q.codes[48 * 256 - 1] = 0xff, "NaN");
    refused(|q| q.zeros[1] = 128.0, "without zero points");
    refused(|q| q.bits = 7, "codes below 128");
    refused(|q| q.scales[0] = f32::INFINITY, "finite scales");
    let int8 = LinearWeight { activation: ActQuant::DynamicPerToken, ..fp8(&mut Random::new(1), CASE) };
    assert!(matches!(device.pack(int8), Err(Error::Unsupported { .. })));
    // Adding to what is there.
    let w = device.pack(fp8(&mut Random::new(1), CASE)).expect("pack");
    assert_eq!(w.scheme.to_string(), "fp8a16 g128");
    let x = emitted(device, &vec![1.0; 256], &w, 1);
    let once = run(device, &w, &x, 1);
    let mut out = super::f32s(device, &[1.0; 48]);
    let columns = lowbit::device::Columns { offset: 0, stride: 48 };
    device.linear(&mut out, columns, &x, &w, Write::Add, 1).expect("linear");
    assert!(super::read(device, &out, 48).iter().zip(&once).all(|(sum, y)| *sum == 1.0 + y));
}
