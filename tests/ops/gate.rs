//! An MLP's gate and up with SwiGLU fused, through its output layer, in each combination of activations and act-order.

use lowbit::device::cpu::reference;
use lowbit::device::{Act, Device, Emit, Write};
use lowbit::dtype::{DType, HostData};
use lowbit::layers::Linear;
use lowbit::quant::{ActQuant, LinearWeight, Weight};

use super::{activations, on_every_device, read};
use crate::common::random::{Random, WeightCase};
use crate::common::tolerance::assert_exact;

on_every_device!(fused, not_fused);

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
            let mut act = Act::new(device, m, inner).expect("act");
            let mut between = Act::new(device, m, inner).expect("act");
            device.quantize(&mut act, &x, hidden, linear.emit(), m).expect("quantize");
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

/// 16-bit activations, two schemes, and widths that do not interleave take `silu_mul`.
fn not_fused(device: &Device) {
    let (m, hidden) = (3, 64);
    let dynamic = ActQuant::DynamicPerToken;
    for (inner, bits, input) in [(48, [8, 8], ActQuant::None), (48, [8, 4], dynamic), (44, [8, 8], dynamic)] {
        let mut random = Random::new(5);
        let parts = bits.map(|bits| weight(&mut random, inner, hidden, bits, false, input));
        let down = weight(&mut random, hidden, inner, 8, true, dynamic);
        let linear = Linear::gated(device, parts.to_vec(), &down).expect("gated");
        assert!(!linear.is_gate_fused(), "{inner} {bits:?} {input:?}");
        let down = Linear::new(device, vec![down]).expect("down");
        let (x, _) = activations(device, &random.normals(m * hidden));
        let (mut act, mut out) = (Act::new(device, m, 64).expect("act"), Act::new(device, m, 64).expect("act"));
        device.quantize(&mut act, &x, hidden, linear.emit(), m).expect("quantize");
        let mut gate_up = device.zeros(device.activation_dtype(), m * 2 * inner).expect("zeros");
        linear.gate(device, &mut out, &act, &mut gate_up, &down, m).expect("gate");

        let gate_up = read(device, &gate_up, m * 2 * inner);
        let row = |row: &[f32]| -> Vec<f32> { (0..inner).map(|c| reference::swiglu(row[c], row[inner + c])).collect() };
        let gated: Vec<f32> = gate_up.chunks_exact(2 * inner).flat_map(row).collect();
        let Emit { order: Some(order), quant } = down.emit() else { panic!("an act-order") };
        let HostData::U32(order) = device.download(order, inner).expect("download") else { panic!("u32") };
        let expected = reference::quantize_rows(&reference::gather_columns(&gated, &order), inner, quant);
        assert_eq!(device.download(&out.codes, m * inner).expect("download"), HostData::I8(expected.codes));
    }
}
