//! Ops on rows, against the specification; and the specification against numbers worked out by hand.

use lowbit::device::cpu::reference::{self, Rounding};
use lowbit::device::{ActOrder, Device, InputFormat};
use lowbit::dtype::{DType, HostData};
use lowbit::quant::ActQuant;

use super::{
    CANARY_CODE, ROWS, activations, assert_untouched, f32s, on_every_device, poisoned, poisoned_act, read, u32s,
};
use crate::common::random::Random;
use crate::common::tolerance::{assert_bounded, assert_exact};

on_every_device!(
    embed,
    gather_rows,
    rms_norm,
    sub_norm,
    silu_mul,
    quantize,
    quantize_special_rows,
    emit_gathers,
    logits_stats,
    logits_stats_special_rows
);

const WIDTHS: [usize; 6] = [1, 7, 64, 100, 256, 1031];

fn embed(device: &Device) {
    for (dtype, width) in [(DType::F32, 5), (DType::F16, 64), (DType::BF16, 129)] {
        let mut random = Random::new(width as u64);
        let table = HostData::from_f32(dtype, random.normals(50 * width));
        let ids: Vec<u32> = (0..17).map(|i| [0, 49, 7, 7][i % 4]).collect();
        let mut out = poisoned(device, DType::F32, 18 * width);
        let expected = reference::embed(&table, &ids, width);
        device.embed(&mut out, &device.upload(table).expect("upload"), &u32s(device, &ids), width, 17).expect("embed");
        assert_exact("embed", &read(device, &out, 17 * width), &expected);
        assert_untouched("embed", device, &out, 17 * width);
    }
}

fn gather_rows(device: &Device) {
    let x = Random::new(3).normals(9 * 33);
    let rows = [8, 0, 0, 5];
    let mut out = poisoned(device, DType::F32, 5 * 33);
    device.gather_rows(&mut out, &f32s(device, &x), &u32s(device, &rows), 33, 4).expect("gather_rows");
    let expected: Vec<f32> = rows.iter().flat_map(|&r| x[r as usize * 33..][..33].to_vec()).collect();
    assert_exact("gather_rows", &read(device, &out, 4 * 33), &expected);
    assert_untouched("gather_rows", device, &out, 4 * 33);
}

fn rms_norm(device: &Device) {
    let dtype = device.activation_dtype();
    for (m, k) in ROWS.into_iter().map(|m| (m, 192)).chain(WIDTHS.map(|k| (3, k))) {
        let mut random = Random::new((m * 10_007 + k) as u64);
        let mut x = random.normals(m * k);
        x[..k].fill(0.0);
        let weight = random.normals(k);
        let mut out = poisoned_act(device, m, k);
        let (xs, weights) = (f32s(device, &x), f32s(device, &weight));
        device.rms_norm(&mut out, &xs, &weights, 1e-5, InputFormat::FLOATS, m).expect("rms_norm");
        let of = |rounding| reference::rms_norm(&x, &weight, 1e-5, rounding);
        let got = read(device, &out.floats, m * k);
        assert_bounded(&format!("rms_norm m={m} k={k}"), &got, &of(Rounding::Exact), &twin_of(dtype, of), dtype);
        assert_untouched("rms_norm", device, &out.floats, m * k);

        let quant = ActQuant::DynamicPerToken;
        device.rms_norm(&mut out, &xs, &weights, 1e-5, InputFormat::quantized(quant), m).expect("rms_norm");
        assert_codes(device, &out, &of(Rounding::Exact), k, quant, dtype);
    }
}

fn sub_norm(device: &Device) {
    let dtype = device.activation_dtype();
    for (m, k) in ROWS.into_iter().map(|m| (m, 192)).chain([1, 7, 100, 1031, 6912, 20_000].map(|k| (3, k))) {
        for gated in [false, true] {
            let width = if gated { 2 * k } else { k };
            let mut random = Random::new((m * 10_007 + k) as u64);
            let mut values = random.normals(m * width);
            values[..width].fill(0.0);
            values[m / 2 * width] = 300.0; // its square is beyond f16
            let (x, values) = activations(device, &values);
            let weight = random.normals(k);
            let weights = f32s(device, &weight);
            let mut out = poisoned_act(device, m, k);
            device.sub_norm(&mut out, &x, gated, &weights, 1e-5, InputFormat::FLOATS, m).expect("sub_norm");
            let of = |rounding| reference::sub_norm(&values, gated, &weight, 1e-5, rounding);
            let got = read(device, &out.floats, m * k);
            let what = format!("sub_norm m={m} k={k} gated={gated}");
            assert_bounded(&what, &got, &of(Rounding::Exact), &twin_of(dtype, of), dtype);
            assert_untouched("sub_norm", device, &out.floats, m * k);

            let quant = ActQuant::DynamicPerToken;
            device.sub_norm(&mut out, &x, gated, &weights, 1e-5, InputFormat::quantized(quant), m).expect("sub_norm");
            assert_codes(device, &out, &of(Rounding::Exact), k, quant, dtype);
        }
    }
    // By hand: relu(-1)^2 * 2 and relu(3)^2 * 2 are 0 and 18, whose mean square is 162.
    let by_hand = reference::sub_norm(&[-1.0, 3.0, 2.0, 2.0], true, &[1.0, 0.5], 0.0, Rounding::Exact);
    assert!(by_hand[0] == 0.0 && (by_hand[1] - 0.5 * 2f64.sqrt()).abs() < 1e-15, "{by_hand:?}");
}

fn silu_mul(device: &Device) {
    let dtype = device.activation_dtype();
    for (m, k) in ROWS.into_iter().map(|m| (m, 192)).chain(WIDTHS.map(|k| (3, k))) {
        let mut values = Random::new((m * 10_007 + k) as u64).normals(m * 2 * k);
        // exp overflows and underflows here; silu does not.
        values[0] = -120.0;
        values[k / 2] = 120.0;
        let (gate_up, values) = activations(device, &values);
        let mut out = poisoned_act(device, m, k);
        device.silu_mul(&mut out, &gate_up, k, InputFormat::FLOATS, m).expect("silu_mul");
        let of = |rounding| reference::silu_mul(&values, k, rounding);
        let got = read(device, &out.floats, m * k);
        let what = format!("silu_mul m={m} k={k}");
        assert_bounded(&what, &got, &of(Rounding::Exact), &twin_of(dtype, of), dtype);
        assert_untouched("silu_mul", device, &out.floats, m * k);
        // The same bits everywhere, rounded to the activation type or quantized.
        let row = |row: &[f32]| -> Vec<f32> { (0..k).map(|c| reference::swiglu(row[c], row[k + c])).collect() };
        let exact: Vec<f32> = values.chunks_exact(2 * k).flat_map(row).collect();
        assert_exact(&what, &got, &exact.iter().map(|&y| dtype.round(y)).collect::<Vec<_>>());

        for quant in [ActQuant::StaticPerTensor { scale: 0.07, zero_point: 3 }, ActQuant::DynamicAsymmetric] {
            device.silu_mul(&mut out, &gate_up, k, InputFormat::quantized(quant), m).expect("silu_mul");
            assert_quantized_as(device, &out, &exact, k, quant);
        }
    }
}

/// The twin at `dtype`. At f32 the reference kernel is off by its own few roundings, which the twin also has.
fn twin_of(dtype: DType, of: impl Fn(Rounding) -> Vec<f64>) -> Vec<f64> {
    of(Rounding::As(dtype))
}

/// Codes of a fused producer: its values are bounded, not exact, so a code may be one off where a value lies at a
/// rounding boundary, and the scale is off by the error of the largest value.
fn assert_codes(
    device: &Device,
    out: &lowbit::device::LinearInput,
    exact: &[f64],
    k: usize,
    quant: ActQuant,
    dtype: DType,
) {
    let m = exact.len() / k;
    let values: Vec<f32> = exact.iter().map(|&x| x as f32).collect();
    let expected = reference::quantize_rows(&values, k, quant);
    let scales = read(device, &out.scales, m);
    let codes = device.download(&out.codes, (m + 1) * k).expect("download").to_f32();
    for (r, (&got, &scale)) in scales.iter().zip(&expected.scales).enumerate() {
        assert!(
            (got - scale).abs() <= 4.0 * dtype.unit_roundoff() as f32 * scale,
            "scale of row {r}: {got}, expected {scale}"
        );
    }
    let mut moved = 0;
    for (i, (&got, &code)) in codes.iter().zip(&expected.codes).enumerate() {
        assert!((got - f32::from(code)).abs() <= 1.0, "code {i}: {got}, expected {code}");
        moved += usize::from(got != f32::from(code));
    }
    assert!(moved * 4 <= m * k, "{moved} of {} codes differ", m * k);
    assert!(codes[m * k..].iter().all(|&c| c == f32::from(CANARY_CODE)), "codes behind the last row were written");
}

const QUANTS: [ActQuant; 5] = [
    ActQuant::DynamicPerToken,
    ActQuant::DynamicAsymmetric,
    ActQuant::StaticPerTensor { scale: 0.031, zero_point: 0 },
    ActQuant::StaticPerTensor { scale: 0.5, zero_point: -128 },
    ActQuant::StaticPerTensor { scale: 0.004, zero_point: 127 },
];

fn quantize(device: &Device) {
    for (m, k) in ROWS.into_iter().map(|m| (m, 192)).chain(WIDTHS.map(|k| (3, k))) {
        for quant in QUANTS {
            let (x, values) = activations(device, &Random::new((m * 10_007 + k) as u64).normals(m * k));
            assert_quantized(device, &x, &values, k, quant);
        }
    }
}

/// Ties, zeros, subnormals, the largest values, NaN and infinities.
fn quantize_special_rows(device: &Device) {
    let k = 8;
    let rows: [[f32; 8]; 7] = [
        [0.0; 8],
        [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5],
        [-127.0, 127.0, 63.5, -63.5, 1.0, -1.0, 0.25, -0.0],
        [65504.0, 1.0, -65504.0, 300.0, 0.0, 257.9, 258.1, 4.0],
        [1.0, f32::NAN, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        [1.0, 2.0, f32::INFINITY, 3.0, 4.0, 5.0, 6.0, 7.0],
        [6e-8, -6e-8, 0.0, 6e-8, 0.0, 0.0, 0.0, 0.0],
    ];
    for quant in QUANTS {
        let (x, values) = activations(device, &rows.concat());
        assert_quantized(device, &x, &values, k, quant);
    }
    let codes = reference::quantize_rows(&rows[1], k, ActQuant::DynamicPerToken);
    assert_eq!(
        (codes.codes.as_slice(), codes.scales.as_slice()),
        ([127, 0, 2, 2, 0, -2, -2, 126].as_slice(), [1.0].as_slice())
    );
    let nan = reference::quantize_rows(&rows[4], k, ActQuant::DynamicPerToken);
    assert!(nan.scales[0].is_nan() && nan.codes == [0; 8]);
    // A range of 0 to 255, one that only 0 extends, and one on either side: s and z by hand.
    let of = |row: &[f32]| {
        let q = reference::quantize_rows(row, row.len(), ActQuant::DynamicAsymmetric);
        (q.codes, q.scales[0], q.zeros[0])
    };
    assert_eq!(of(&[0.0, 255.0, 100.0]), (vec![-128, 127, -28], 1.0, -128));
    assert_eq!(of(&[-510.0, -2.0]), (vec![-128, 126], 2.0, 127));
    assert_eq!(of(&[-51.0, 204.0, 0.0, 0.5]), (vec![-128, 127, -77, -77], 1.0, -77));
    assert_eq!(of(&[0.0; 3]), (vec![-128; 3], 1.0, -128));
}

fn assert_quantized(device: &Device, x: &lowbit::device::Tensor, values: &[f32], k: usize, quant: ActQuant) {
    let m = values.len() / k;
    let mut out = poisoned_act(device, m, k);
    device.quantize(&mut out, x, k, InputFormat::quantized(quant), m).expect("quantize");
    assert_quantized_as(device, &out, values, k, quant);
}

/// `out` holds exactly the codes of `values`.
fn assert_quantized_as(device: &Device, out: &lowbit::device::LinearInput, values: &[f32], k: usize, quant: ActQuant) {
    let m = values.len() / k;
    let expected = reference::quantize_rows(values, k, quant);
    let what = format!("{quant:?} m={m} k={k}");
    assert_exact(&format!("scales {what}"), &read(device, &out.scales, m), &expected.scales);
    if quant == ActQuant::DynamicAsymmetric {
        let zeros = device.download(&out.zero_points, m + 1).expect("download");
        let expected = [expected.zeros.as_slice(), &[i32::MIN]].concat();
        assert_eq!(zeros, HostData::I32(expected), "zero points {what}");
    }
    let HostData::I8(codes) = device.download(&out.codes, (m + 1) * k).expect("download") else {
        panic!("codes are i8")
    };
    assert_eq!(codes[..m * k], expected.codes, "codes {what}");
    assert!(codes[m * k..].iter().all(|&c| c == CANARY_CODE), "codes behind the last row were written");
}

/// An act-order gather, by every op that emits: of rows that a thread block holds in registers, eight columns or more to a
/// thread, and of others.
fn emit_gathers(device: &Device) {
    for (m, k) in [(5, 70), (3, 8), (5, 72), (2, 4104), (1, 16_384), (300, 4096), (1, 32_776)] {
        gathers(device, m, k);
    }
}

fn gathers(device: &Device, m: usize, k: usize) {
    let mut random = Random::new(21);
    let order = random.permutation(k);
    let on_device = ActOrder::upload(device, order.clone()).expect("upload");
    let gather = InputFormat { order: Some(&on_device), ..InputFormat::FLOATS };
    let (x, values) = activations(device, &random.normals(m * 2 * k));
    let mut plain = poisoned_act(device, m, k);
    let mut gathered = poisoned_act(device, m, k);
    let mut assert_gathered = |what: &str, run: &dyn Fn(&mut lowbit::device::LinearInput, InputFormat<'_>)| {
        run(&mut plain, InputFormat::FLOATS);
        run(&mut gathered, gather);
        let expected = reference::gather_columns(&read(device, &plain.floats, m * k), &order);
        assert_exact(&format!("{what} {m} x {k}"), &read(device, &gathered.floats, m * k), &expected);
    };
    assert_gathered("quantize", &|out, format| device.quantize(out, &x, k, format, m).expect("quantize"));
    assert_gathered("silu_mul", &|out, format| device.silu_mul(out, &x, k, format, m).expect("silu_mul"));
    let (residual, weight) = (f32s(device, &values), f32s(device, &values[..k]));
    assert_gathered("rms_norm", &|out, format| {
        device.rms_norm(out, &residual, &weight, 1e-6, format, m).expect("rms_norm")
    });
    for gated in [false, true] {
        assert_gathered("sub_norm", &|out, format| {
            device.sub_norm(out, &x, gated, &weight, 1e-6, format, m).expect("sub_norm")
        });
    }

    let quant = ActQuant::DynamicPerToken;
    device.quantize(&mut gathered, &x, k, InputFormat { quant, ..gather }, m).expect("quantize");
    let expected = reference::quantize_rows(&reference::gather_columns(&values[..m * k], &order), k, quant);
    let codes = device.download(&gathered.codes, m * k).expect("download");
    assert_eq!(codes, HostData::I8(expected.codes));
}

fn logits_stats(device: &Device) {
    for (m, vocab) in [(1, 1), (3, 7), (17, 1000), (2, 32_003)] {
        let mut random = Random::new((m + vocab) as u64);
        let logits = random.normals(m * vocab);
        let targets: Vec<u32> = (0..m).map(|_| random.below(vocab) as u32).collect();
        assert_stats(device, &logits, &targets, vocab);
    }
}

/// Ties go to the lowest id; infinities are ordinary.
fn logits_stats_special_rows(device: &Device) {
    let low = f32::NEG_INFINITY;
    let logits = [[1.0, 5.0, 5.0, -2.0], [low, low, 0.5, low], [3e38, 3e38, -3e38, 0.0], [-1e30, -1e30, -1e30, -1e30]];
    assert_stats(device, &logits.concat(), &[3, 2, 0, 1], 4);
    let of = |row: usize| reference::logits_stats(&logits[row], &[3], 4)[0];
    assert_eq!((of(0).argmax, of(1).argmax, of(2).argmax, of(3).argmax), (1, 2, 0, 0));
    assert!((of(0).log_sum_exp - (2.0 * 5f64.exp() + 1f64.exp() + (-2f64).exp()).ln()).abs() < 1e-12);
    assert_eq!(of(1).log_sum_exp, 0.5);
}

fn assert_stats(device: &Device, logits: &[f32], targets: &[u32], vocab: usize) {
    let m = targets.len();
    let mut ids = device.upload(HostData::U32(vec![u32::MAX; m])).expect("upload");
    let mut stats = poisoned(device, DType::F32, 3 * m + 1);
    let (logits_tensor, targets_tensor) = (f32s(device, logits), u32s(device, targets));
    device.logits_stats(&mut ids, &mut stats, &logits_tensor, &targets_tensor, vocab, m).expect("logits_stats");
    let expected = reference::logits_stats(logits, targets, vocab);
    let HostData::U32(ids) = device.download(&ids, m).expect("download") else { panic!("ids are u32") };
    assert_eq!(ids, expected.iter().map(|row| row.argmax).collect::<Vec<_>>());
    assert_untouched("logits_stats", device, &stats, 3 * m);
    for (row, (got, expected)) in read(device, &stats, 3 * m).chunks_exact(3).zip(&expected).enumerate() {
        assert_exact(&format!("row {row}"), &[got[0], got[2]], &[expected.max as f32, expected.target as f32]);
        // The sum is of at most 2^15 terms in f32, its log adds to the largest logit.
        let bound = 4e-6 + 2.0 * DType::F32.unit_roundoff() * expected.log_sum_exp.abs();
        let error = (f64::from(got[1]) - expected.log_sum_exp).abs();
        assert!(error <= bound, "row {row}: log-sum-exp {}, expected {}", got[1], expected.log_sum_exp);
    }
}
