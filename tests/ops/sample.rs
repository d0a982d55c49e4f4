//! The choice of tokens: the same ids on every device and every path, bit for bit.

use lowbit::device::cpu::reference::{self, SampleRow};
use lowbit::device::{Device, SampleRow as Row};

use super::{f32s, on_every_device, read_u32s, u32s};
use crate::common::random::Random;

on_every_device!(sample_rows, sample_flat_and_steep_rows, sample_ties, sample_special_rows, sample_masses);

const PLAIN: Row = SampleRow { temperature: 1.0, top_k: 0, top_p: 1.0, floor: f32::MIN, draw: 0 };

fn sampled(device: &Device, logits: &[f32], rows: &[Row], vocab: usize) -> Vec<u32> {
    let (mut ids, words) = (u32s(device, &vec![7; rows.len()]), u32s(device, &SampleRow::words(rows)));
    device.sample(&mut ids, &words, &f32s(device, logits), vocab, rows.len()).expect("sample");
    read_u32s(device, &ids, rows.len())
}

/// Ids that `device` draws from `logits` are those of the specification.
fn assert_same(what: &str, device: &Device, logits: &[f32], rows: &[Row]) {
    let vocab = logits.len() / rows.len();
    let got = sampled(device, logits, rows, vocab);
    for ((logits, row), got) in logits.chunks_exact(vocab).zip(rows).zip(got) {
        let expected = reference::sample(logits, row).unwrap_or(Device::NO_TOKEN);
        assert_eq!(got, expected, "{what}, vocabulary of {vocab}: {row:?}");
    }
}

fn parameters(random: &mut Random, vocab: usize) -> Row {
    let pick = |random: &mut Random, of: &[f32]| of[random.below(of.len())];
    SampleRow {
        temperature: pick(random, &[0.0, 0.05, 0.7, 1.0, 1.3, 5.0]),
        top_k: [0, 1, 2, 40, vocab as u32, vocab as u32 + 7][random.below(6)],
        top_p: pick(random, &[1e-9, 0.1, 0.5, 0.9, 0.99, 1.0]),
        floor: pick(random, &[f32::MIN, f32::MIN, -6.9, -0.7, 0.0]),
        draw: (random.below(1 << 32) as u64) << 32 | random.below(1 << 32) as u64,
    }
}

fn sample_rows(device: &Device) {
    for (vocab, rows) in [(1, 3), (2, 9), (31, 20), (513, 40), (4099, 40), (128_256, 6), (151_936, 5)] {
        let mut random = Random::new(vocab as u64);
        let logits: Vec<f32> = random.normals(rows * vocab).iter().map(|x| x * 4.0).collect();
        let rows: Vec<Row> = (0..rows).map(|_| parameters(&mut random, vocab)).collect();
        assert_same("normal logits", device, &logits, &rows);
    }
}

/// Logits so even that thousands are near the best, beside ones so far apart that few are.
fn sample_flat_and_steep_rows(device: &Device) {
    let vocab = 40_000;
    let mut random = Random::new(9);
    for spread in [0.01, 0.5, 30.0] {
        let logits: Vec<f32> = random.normals(12 * vocab).iter().map(|x| x * spread).collect();
        let rows: Vec<Row> = (0..12).map(|_| parameters(&mut random, vocab)).collect();
        assert_same("flat and steep", device, &logits, &rows);
        let rows: Vec<Row> = rows.iter().map(|row| SampleRow { temperature: 1.0, top_k: 5000, ..*row }).collect();
        assert_same("more than are listed", device, &logits, &rows);
    }
}

/// Few different logits, so that thresholds of top-k and top-p fall among ties, and bans.
fn sample_ties(device: &Device) {
    for (vocab, rows) in [(5, 40), (64, 60), (1000, 60)] {
        let mut random = Random::new(vocab as u64 + 1);
        let values = [0.0, -0.0, 1.0, 1.5, -3.0, f32::NEG_INFINITY];
        let logits: Vec<f32> = (0..rows * vocab).map(|_| values[random.below(values.len())]).collect();
        let rows: Vec<Row> = (0..rows).map(|_| parameters(&mut random, vocab)).collect();
        assert_same("ties", device, &logits, &rows);
    }
}

/// The ends of the draw, one token alone, logits far apart, none at all.
fn sample_special_rows(device: &Device) {
    let vocab = 70;
    let mut logits = vec![f32::NEG_INFINITY; 4 * vocab];
    logits[3] = -1000.0;
    logits[vocab..2 * vocab].fill(0.25);
    for (i, x) in logits[2 * vocab..3 * vocab].iter_mut().enumerate() {
        *x = -30.0 * i as f32;
    }
    for draw in [0, 1, u64::MAX, u64::MAX / 2] {
        for top_k in [0, 3] {
            assert_same("special rows", device, &logits, &[Row { draw, top_k, ..PLAIN }; 4]);
        }
    }
    let mut broken = vec![0.0; 3 * vocab];
    broken[5] = f32::NAN;
    broken[vocab + 69] = f32::INFINITY;
    assert_eq!(sampled(device, &broken, &[PLAIN; 3], vocab), [Device::NOT_FINITE, Device::NOT_FINITE, 0]);
}

/// Masses are exponentials: within 4e-7 of 2^40 exp(d), or half a unit and what a shift cuts off.
fn sample_masses(_: &Device) {
    for i in 0..4000 {
        let d = -(i as f32) * 0.0107;
        let exact = (f64::from(d)).exp() * 2f64.powi(40);
        let error = (reference::mass(d) as f64 - exact).abs();
        // The product with log2(e) is rounded to f32: a relative error of |d| 2^-24.
        assert!(error <= exact * (4e-7 + f64::from(-d) * 1.2e-7) + 1.0, "exp({d}): {} for {exact}", reference::mass(d));
    }
    assert_eq!((reference::mass(0.0), reference::mass(-50.0), reference::mass(f32::MIN)), (1 << 40, 0, 0));
}
