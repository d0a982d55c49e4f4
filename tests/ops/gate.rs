//! An MLP's gate and up with SwiGLU fused, through its output layer, in each combination of activations and act-order.

use lowbit::device::cpu::reference::{self, Rounding};
use lowbit::device::{Device, InputFormat, LinearInput, Write};
use lowbit::dtype::{DType, HostData};
use lowbit::layers::Linear;
use lowbit::quant::{ActQuant, LinearWeight, Weight};

use super::{activations, assert_untouched, on_every_device, poisoned, poisoned_act, read};
use crate::common::random::{Random, WeightCase};
use crate::common::tolerance::{assert_bounded, assert_exact};

on_every_device!(fused, fused_floats, not_fused);

const STATIC: ActQuant = ActQuant::StaticPerTensor { scale: 0.4, zero_point: 9 };

fn weight(random: &mut Random, n: usize, k: usize, bits: u8, act_order: bool, activation: ActQuant) -> LinearWeight {
    let group_size = if bits == 8 { usize::MAX } else { 32 };
    random.weight(WeightCase { n, k, bits, group_size, symmetric: true, act_order, bias: true, activation })
}

fn codes_of(x: &[f32], w: &LinearWeight) -> reference::Codes {
    let Weight::Quant(q) = &w.weight else { panic!("a quantized weight") };
    let x = q.order.as_ref().map_or(x.to_vec(), |order| reference::gather_columns(x, order));
    reference::quantize_rows(&x, q.k, w.activation)
}

fn product(x: &reference::Codes, w: &LinearWeight) -> Vec<f32> {
    reference::linear_fused(x, w, lowbit::device::Activation::None)
}

fn fused(device: &Device) {
    let (m, hidden, inner) = (19, 96, 160);
    let dtype = device.activation_dtype();
    for (i, down_activation) in [STATIC, ActQuant::DynamicPerToken, ActQuant::DynamicAsymmetric].into_iter().enumerate()
    {
        for (bits, down_order) in [(8, false), (8, true), (4, true)] {
            let mut random = Random::new(i as u64);
            let input = if bits == 8 { ActQuant::DynamicPerToken } else { STATIC };
            // A shared act-order of the inputs too, where there are groups.
            let mut gate = weight(&mut random, inner, hidden, bits, bits == 4, input);
            let mut up = weight(&mut random, inner, hidden, bits, bits == 4, input);
            if let (Weight::Quant(gate), Weight::Quant(up)) = (&mut gate.weight, &mut up.weight) {
                up.order.clone_from(&gate.order);
            }
            let down = weight(&mut random, hidden, inner, 8, down_order, down_activation);
            let linear = Linear::gated(device, vec![gate.clone(), up.clone()], &down).expect("gated");
            assert!(linear.is_gate_fused());
            let out = Linear::new(device, vec![down.clone()]).expect("down");

            let (x, values) = activations(device, &random.normals(m * hidden));
            let mut act = LinearInput::new(device, m, inner).expect("act");
            let mut between = LinearInput::new(device, m, inner).expect("act");
            device.quantize(&mut act, &x, hidden, linear.input_format(), m).expect("quantize");
            let mut scratch = device.zeros(dtype, m * 2 * inner).expect("zeros");
            linear.gate(device, &mut between, &act, &mut scratch, &out, m).expect("gate");
            let mut y = device.zeros(DType::F32, m * hidden).expect("zeros");
            out.forward(device, &mut y, &between, &mut act, Write::Store, m).expect("down");

            let (gates, ups) = (product(&codes_of(&values, &gate), &gate), product(&codes_of(&values, &up), &up));
            let gated = gates.iter().zip(&ups).map(|(&gate, &up)| reference::swiglu(gate, up));
            // Static codes come from the product itself; a live scale from what it leaves in the activation type.
            let gated: Vec<f32> = gated.map(|y| if i == 0 { y } else { dtype.round(y) }).collect();
            let expected = product(&codes_of(&gated, &down), &down);
            let what = format!("{down_activation:?}, {bits} bits, act-order {down_order}");
            assert_exact(&what, &read(device, &y, m * hidden), &expected);
        }
    }
}

/// 16-bit activations of gate and up, fused or not, to an output layer that takes them, in its order, or codes.
fn fused_floats(device: &Device) {
    let dtype = device.activation_dtype();
    let none = ActQuant::None;
    for (m, inner, hidden) in
        [(1, 8, 40), (3, 136, 200), (9, 160, 96), (17, 72, 264), (40, 200, 128), (70, 136, 72), (300, 72, 136)]
    {
        for (i, down_activation) in [none, ActQuant::DynamicPerToken].into_iter().enumerate() {
            for (bits, group_size, symmetric) in [(4, 32, true), (4, usize::MAX, false), (8, 64, true)] {
                let what = format!("m={m} {inner} {hidden} {down_activation:?} {bits} bits {group_size}");
                let mut random = Random::new((m * 100 + bits as usize) as u64);
                let case = WeightCase {
                    n: inner,
                    k: hidden,
                    bits,
                    group_size,
                    symmetric,
                    act_order: false,
                    bias: m % 2 == 1,
                    activation: none,
                };
                let (gate, up) = (random.weight(case), random.weight(case));
                let down = weight(&mut random, hidden, inner, 4, m % 2 == 0, down_activation);
                let linear = Linear::gated(device, vec![gate.clone(), up.clone()], &down).expect("gated");
                let out = Linear::new(device, vec![down.clone()]).expect("down");

                // Small: a product of two outputs must be a number in f16.
                let x: Vec<f32> = random.normals(m * hidden).iter().map(|x| x / 64.0).collect();
                let (x, values) = activations(device, &x);
                let mut act = poisoned_act(device, m, hidden);
                let mut between = poisoned_act(device, m, inner);
                device.quantize(&mut act, &x, hidden, linear.input_format(), m).expect("quantize");
                let mut scratch = poisoned(device, dtype, m * 2 * inner + 3);
                linear.gate(device, &mut between, &act, &mut scratch, &out, m).expect("gate");
                assert_untouched(&what, device, &scratch, m * 2 * inner);

                let of = |w: &LinearWeight, rounding: Rounding| {
                    let Weight::Quant(q) = &w.weight else { panic!("a quantized weight") };
                    let int16 = dtype == DType::F32 && rounding != Rounding::Exact;
                    let x = if int16 { reference::round_int16(&values, q.k, q.group_size) } else { values.clone() };
                    reference::linear_quant(&x, q, w.bias.as_deref(), rounding)
                };
                let order = match &down.weight {
                    Weight::Quant(q) => q.order.clone(),
                    Weight::Dense { .. } => None,
                };
                let gated = |rounding: Rounding| -> Vec<f64> {
                    let pairs = of(&gate, rounding).into_iter().zip(of(&up, rounding));
                    let y: Vec<f64> = pairs.map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
                    order.as_ref().map_or(y.clone(), |order| reference::gather_columns(&y, order))
                };
                let (exact, twin) = (gated(Rounding::Exact), gated(Rounding::As(dtype)));
                if i == 0 {
                    assert_bounded(&what, &read(device, &between.floats, m * inner), &exact, &twin, dtype);
                    continue;
                }
                let codes = device.download(&between.codes, m * inner).expect("download").to_f32();
                let scales = read(device, &between.scales, m);
                let values: Vec<f32> = codes.iter().enumerate().map(|(i, code)| code * scales[i / inner]).collect();
                let step = scales.iter().fold(0.0f32, |a, &b| a.max(b));
                let twin: Vec<f64> = twin.iter().map(|y| y + f64::from(step) / 2.0).collect();
                assert_bounded(&what, &values, &exact, &twin, dtype);
            }
        }
    }
}

/// Two schemes, and widths that do not interleave, take `silu_mul`.
fn not_fused(device: &Device) {
    let (m, hidden) = (3, 64);
    let dynamic = ActQuant::DynamicPerToken;
    for (inner, bits, input) in [(44, [8, 8], ActQuant::None), (48, [8, 4], dynamic), (44, [8, 8], dynamic)] {
        let mut random = Random::new(5);
        let parts = bits.map(|bits| weight(&mut random, inner, hidden, bits, false, input));
        let down = weight(&mut random, hidden, inner, 8, true, dynamic);
        let linear = Linear::gated(device, parts.to_vec(), &down).expect("gated");
        assert!(!linear.is_gate_fused(), "{inner} {bits:?} {input:?}");
        let down = Linear::new(device, vec![down]).expect("down");
        let (x, _) = activations(device, &random.normals(m * hidden));
        let (mut act, mut out) =
            (LinearInput::new(device, m, 64).expect("act"), LinearInput::new(device, m, 64).expect("act"));
        device.quantize(&mut act, &x, hidden, linear.input_format(), m).expect("quantize");
        let mut gate_up = device.zeros(device.activation_dtype(), m * 2 * inner).expect("zeros");
        linear.gate(device, &mut out, &act, &mut gate_up, &down, m).expect("gate");

        let gate_up = read(device, &gate_up, m * 2 * inner);
        let row = |row: &[f32]| -> Vec<f32> { (0..inner).map(|c| reference::swiglu(row[c], row[inner + c])).collect() };
        let gated: Vec<f32> = gate_up.chunks_exact(2 * inner).flat_map(row).collect();
        let InputFormat { order: Some(order), quant, .. } = down.input_format() else { panic!("an act-order") };
        let HostData::U32(order) = device.download(order.indices(), inner).expect("download") else { panic!("u32") };
        let expected = reference::quantize_rows(&reference::gather_columns(&gated, &order), inner, quant);
        assert_eq!(device.download(&out.codes, m * inner).expect("download"), HostData::I8(expected.codes));
    }
}
