//! An input of a linear layer knows what it holds: a layer refuses one that was made for another.

use lowbit::device::{
    ActOrder, Activation, Columns, Device, Epilogue, InputFormat, LinearInput, Output, PackedWeight, Tensor, Write,
};
use lowbit::dtype::DType;
use lowbit::error::Error;
use lowbit::quant::{ActQuant, LinearWeight};

use super::{activations, on_every_device, read};
use crate::common::random::{Random, WeightCase};

on_every_device!(refuses_what_was_made_for_another_weight, knows_what_linear_codes_wrote);

const M: usize = 3;
const K: usize = 64;
const STATIC: ActQuant = ActQuant::StaticPerTensor { scale: 0.125, zero_point: 3 };
const CASE: WeightCase = WeightCase {
    n: 16,
    k: K,
    bits: 8,
    group_size: usize::MAX,
    symmetric: true,
    act_order: false,
    bias: false,
    activation: ActQuant::None,
};

fn quantize(device: &Device, x: &mut LinearInput, format: InputFormat<'_>, k: usize, m: usize) {
    let (values, _) = activations(device, &Random::new(9).normals(m * k));
    device.quantize(x, &values, k, format, m).expect("quantize");
}

fn linear(device: &Device, x: &LinearInput, w: &PackedWeight, m: usize) -> Result<Tensor, Error> {
    let mut out = device.zeros(DType::F32, m * w.n)?;
    device.linear(&mut out, Columns { offset: 0, stride: w.n }, x, w, Write::Store, m)?;
    Ok(out)
}

#[track_caller]
fn assert_refused<T>(what: &str, result: Result<T, Error>, expected: &str, got: &str) {
    match result {
        Err(Error::Shape { expected: e, got: g, .. }) => {
            assert!(e.contains(expected) && g.contains(got), "{what}: expected {e}, got {g}");
        }
        Err(other) => panic!("{what}: {other}"),
        Ok(_) => panic!("{what} was taken"),
    }
}

fn refuses_what_was_made_for_another_weight(device: &Device) {
    let mut random = Random::new(4);
    let mut pack = |activation, act_order| {
        let case = WeightCase { group_size: 32, act_order, activation, ..CASE };
        let weight = if act_order { case } else { WeightCase { group_size: usize::MAX, ..case } };
        device.pack(random.weight(weight)).expect("pack")
    };
    let (floats, ordered, other_order) =
        (pack(ActQuant::None, false), pack(ActQuant::None, true), pack(ActQuant::None, true));
    let (dynamic, fixed) = (pack(ActQuant::DynamicPerToken, false), pack(STATIC, false));
    let other_scale = pack(ActQuant::StaticPerTensor { scale: 0.25, zero_point: 3 }, false);
    let other_zero = pack(ActQuant::StaticPerTensor { scale: 0.125, zero_point: 4 }, false);
    let outliers = pack(ActQuant::LlmInt8 { threshold: 6.0 }, false);
    let all = [&floats, &ordered, &other_order, &dynamic, &fixed, &other_scale, &other_zero, &outliers];
    // Wide enough for another k.
    let mut x = LinearInput::new(device, M, 2 * K).expect("input");
    assert_refused("nothing", linear(device, &x, &floats, M), "[3, 64]", "[0, 0]");
    for (i, made_for) in all.into_iter().enumerate() {
        quantize(device, &mut x, made_for.input_format(), K, M);
        for (j, w) in all.into_iter().enumerate() {
            let result = linear(device, &x, w, M);
            if i == j {
                linear(device, &x, w, M - 1).expect("fewer rows than are there");
                result.expect("its own input");
            } else {
                assert_refused(&format!("the input of {i} for {j}"), result, "[3, 64]", "[3, 64]");
            }
        }
    }
    quantize(device, &mut x, floats.input_format(), K, M - 1);
    assert_refused("too few rows", linear(device, &x, &floats, M), "[3, 64]", "[2, 64]");
    quantize(device, &mut x, floats.input_format(), 2 * K, M);
    assert_refused("another k", linear(device, &x, &floats, M), "[3, 64]", "[3, 128]");
}

/// Two weights with one permutation take one input, though each holds a copy of it.
#[test]
fn equal_orders_are_one() {
    let device = Device::cpu();
    let weight = Random::new(6).weight(WeightCase { group_size: 32, act_order: true, ..CASE });
    let [a, b] = [weight.clone(), weight].map(|weight| device.pack(weight).expect("pack"));
    let mut x = LinearInput::new(&device, M, K).expect("input");
    quantize(&device, &mut x, a.input_format(), K, M);
    let [a, b] = [a, b].map(|w| read(&device, &linear(&device, &x, &w, M).expect("linear"), M * w.n));
    assert_eq!(a, b);
}

/// Static codes are an input of the layer with that scale; codes with a scale for each group of outputs are one of none.
fn knows_what_linear_codes_wrote(device: &Device) {
    let mut random = Random::new(5);
    let first: LinearWeight = random.weight(WeightCase { n: K, activation: ActQuant::DynamicPerToken, ..CASE });
    let pack =
        |output| device.pack_fused(first.clone(), Epilogue { activation: Activation::Relu, output }).expect("pack");
    let (fixed, groups) = (pack(Output::Static { scale: 0.125, zero_point: 3 }), pack(Output::Groups));
    let mut behind = |activation| device.pack(random.weight(WeightCase { activation, ..CASE })).expect("pack");
    let (takes, dynamic) = (behind(STATIC), behind(ActQuant::DynamicPerToken));

    let (mut x, mut y) =
        (LinearInput::new(device, M, K).expect("input"), LinearInput::new(device, M, K).expect("input"));
    quantize(device, &mut x, fixed.input_format(), K, M);
    device.linear_codes(&mut y, &x, &fixed, M).expect("linear_codes");
    linear(device, &y, &takes, M).expect("the layer with that scale");
    assert_refused("dynamic", linear(device, &y, &dynamic, M), "DynamicPerToken", "StaticPerTensor");
    device.linear_codes(&mut y, &x, &groups, M).expect("linear_codes");
    assert_refused("groups", linear(device, &y, &takes, M), "[3, 64]", "[0, 0]");
    quantize(device, &mut x, takes.input_format(), K, M);
    assert_refused("codes", device.linear_codes(&mut y, &x, &fixed, M), "DynamicPerToken", "StaticPerTensor");
}

/// An op that fails halfway leaves nothing that a layer would take.
#[test]
fn failed_ops_leave_nothing() {
    let device = Device::cpu();
    let w = device.pack(Random::new(7).weight(CASE)).expect("pack");
    let mut x = LinearInput::new(&device, M, K).expect("input");
    quantize(&device, &mut x, w.input_format(), K, M);
    let outside = ActOrder::upload(&device, vec![K as u32; K]).expect("upload");
    let format = InputFormat { order: Some(&outside), ..InputFormat::FLOATS };
    let (values, _) = activations(&device, &[1.0; M * K]);
    device.quantize(&mut x, &values, K, format, M).expect_err("a column that is not there");
    assert_refused("what is left", linear(&device, &x, &w, M), "[3, 64]", "[0, 0]");
}
