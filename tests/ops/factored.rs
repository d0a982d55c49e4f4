//! Groups whose scales are whole multiples of one scale a row, with int8 activations: every device adds up all of a row in
//! integers.

use lowbit::device::cpu::reference;
use lowbit::device::{Columns, Device, InputFormat, Write};
use lowbit::dtype::{DType, HostData};
use lowbit::quant::{ActQuant, LinearWeight, QuantWeight, Weight};

use super::{ROWS, activations, assert_untouched, on_every_device, poisoned, poisoned_act, read};
use crate::common::random::{Random, WeightCase};
use crate::common::tolerance::assert_exact;

on_every_device!(exact, rows);

/// A weight of 4 bits with factors as large as int8 allows, and those factors.
pub(super) fn weight(
    n: usize,
    k: usize,
    group_size: usize,
    symmetric: bool,
    activation: ActQuant,
) -> (QuantWeight, Vec<i32>) {
    let mut random = Random::new((n * 1009 + k) as u64);
    let case = WeightCase { n, k, bits: 4, group_size, symmetric, act_order: false, bias: false, activation };
    let Weight::Quant(mut q) = random.weight(case).weight else { panic!("a quantized weight") };
    let groups = q.groups();
    let mut factors = vec![0; n * groups];
    for (i, factor) in factors.iter_mut().enumerate() {
        let zero = q.zeros[i] as i32;
        let most = (128 / zero.max(1)).min(127 / (15 - zero).max(1)).min(16);
        *factor = 1 + random.below(most as usize) as i32;
        if i % groups == 0 {
            *factor = 1; // so that the row's scale is the largest of which all are multiples
        }
        // Of a scale of 8 bits all multiples are floats.
        q.scales[i] = *factor as f32 * half::bf16::from_f32(0.001 * (1 + i / groups % 9) as f32).to_f32();
    }
    (q, factors)
}

fn case(device: &Device, m: usize, (n, k): (usize, usize), group_size: usize, symmetric: bool, activation: ActQuant) {
    let what = format!("m={m} n={n} k={k} groups of {group_size}, {activation:?}, symmetric={symmetric}");
    let (q, factors) = weight(n, k, group_size, symmetric, activation);
    let mut random = Random::new(m as u64);
    let x = HostData::from_f32(device.activation_dtype(), random.normals(m * k)).to_f32();
    let bias = (n % 2 == 1).then(|| random.normals(n));

    let codes = reference::quantize_rows(&x, k, activation);
    let mut expected = vec![0.0; m * n];
    for (i, y) in expected.iter_mut().enumerate() {
        let (row, r) = (i / n, i % n);
        let unit = q.scales[r * q.groups()] / factors[r * q.groups()] as f32;
        let sum: i32 = (0..k)
            .map(|c| {
                let group = r * q.groups() + c / group_size;
                let w = factors[group] * (i32::from(q.codes[r * k + c]) - q.zeros[group] as i32);
                (i32::from(codes.codes[row * k + c]) - codes.zeros[row]) * w
            })
            .sum();
        *y = sum as f32 * codes.scales[row] * unit + bias.as_ref().map_or(0.0, |bias| bias[r]);
    }

    let w = device.pack(LinearWeight { weight: Weight::Quant(q), bias, activation }).expect("pack");
    let mut act = poisoned_act(device, m, k);
    device.quantize(&mut act, &activations(device, &x).0, k, InputFormat::quantized(activation), m).expect("quantize");
    let mut out = poisoned(device, DType::F32, m * n + 3);
    device.linear(&mut out, Columns { offset: 0, stride: n }, &act, &w, Write::Store, m).expect("linear");
    assert_untouched(&what, device, &out, m * n);
    assert_exact(&what, &read(device, &out, m * n), &expected);
}

fn exact(device: &Device) {
    let asymmetric = ActQuant::StaticPerTensor { scale: 0.05, zero_point: -37 };
    for shape in [(1, 144), (17, 256), (65, 400), (130, 1040), (33, 4112)] {
        for group_size in [128, 256] {
            for activation in [ActQuant::DynamicPerToken, ActQuant::DynamicAsymmetric, asymmetric] {
                if shape.1 > group_size {
                    case(device, 3, shape, group_size, shape.0 % 2 == 1, activation);
                }
            }
        }
    }
}

fn rows(device: &Device) {
    for m in ROWS.into_iter().chain([128, 129, 257]) {
        case(device, m, (200, 1168), 128, m % 2 == 0, ActQuant::DynamicPerToken);
    }
}
