//! Rotary tables against values of a numpy script written from the papers' formulas: `(position, pair, cos, sin)`.
#![allow(clippy::excessive_precision)] // digits as the script printed them

use lowbit::checkpoint::{RopeConfig, RopeScaling};
use lowbit::models::rope_table;

/// cos and sin of an f32 angle of up to 1e5 are sensitive to one ulp of the frequency.
fn check(
    theta: f32,
    scaling: RopeScaling,
    head_dim: usize,
    max: usize,
    served: usize,
    golden: &[(usize, usize, f32, f32)],
) {
    let table = rope_table(&RopeConfig { theta, scaling }, head_dim, max, served);
    assert_eq!(table.len(), served * head_dim);
    for &(position, pair, cos, sin) in golden {
        let row = &table[position * head_dim..][..head_dim];
        let tolerance = 1e-6 + position as f32 * 1.2e-7;
        assert!((row[pair] - cos).abs() <= tolerance, "cos at {position}, {pair}: {} != {cos}", row[pair]);
        let s = row[head_dim / 2 + pair];
        assert!((s - sin).abs() <= tolerance, "sin at {position}, {pair}: {s} != {sin}");
    }
}

#[test]
fn plain() {
    let golden = [
        (0, 31, 1.0, 0.0),
        (1, 0, 0.540302277, 0.841470957),
        (1, 16, 0.999949992, 0.00999983307),
        (511, 1, 0.996929765, -0.0783006549),
        (2047, 16, -0.0496266708, 0.998767853),
        (2047, 31, 0.962973952, 0.269594431),
    ];
    check(10000.0, RopeScaling::None, 64, 2048, 2048, &golden);
}

#[test]
fn linear() {
    let golden = [
        (1, 0, 0.968912423, 0.247403964),
        (1, 5, 0.998243213, 0.0592496246),
        (2047, 5, -0.392852992, 0.919601262),
        (2047, 31, 0.997672379, 0.068190001),
    ];
    check(10000.0, RopeScaling::Linear { factor: 4.0 }, 64, 2048, 2048, &golden);
}

#[test]
fn llama3_low_medium_and_high_frequencies() {
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let golden = [
        (1, 32, 0.999999881, 0.000524846138),
        (1000, 20, -0.658120334, -0.75291276),
        (1000, 32, 0.86540103, 0.501079857),
        (1000, 35, 0.995437443, 0.0954167396),
        (8191, 32, -0.401701808, -0.915770531),
        (8191, 35, 0.708977282, 0.705231309),
        (8191, 63, 0.999996841, 0.00251375465),
    ];
    check(500_000.0, scaling, 128, 131_072, 8192, &golden);
}

#[test]
fn yarn_scales_cosines_and_sines_too() {
    let scaling = RopeScaling::Yarn {
        factor: 4.0,
        original_max_position_embeddings: 32768,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: 1.138_629_4,
        truncate: true,
    };
    let golden = [
        (1, 0, 0.615204096, 0.958123624),
        (1, 26, 1.13862371, 0.00360765308),
        (40000, 26, 0.54349041, 1.00054741),
        (40000, 40, -0.234554976, 1.1142087),
        (131071, 63, 1.13768828, 0.0462870337),
    ];
    check(1_000_000.0, scaling, 128, 131_072, 131_072, &golden);
}

#[test]
fn dynamic_stretches_only_beyond_the_claimed_context() {
    let scaling = RopeScaling::Dynamic { factor: 2.0 };
    let golden =
        [(1, 7, 0.994591177, 0.103867322), (4095, 7, 0.407202959, -0.913337708), (4095, 31, 0.983479023, 0.181022152)];
    check(10000.0, scaling, 64, 2048, 4096, &golden);
    check(10000.0, scaling, 64, 2048, 2048, &[(2047, 16, -0.0496266708, 0.998767853)]);
}
