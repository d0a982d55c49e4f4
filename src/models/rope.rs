//! Rotary position embedding: the table of cosines and sines for every supported scaling.
//!
//! Su et al. 2021 (RoFormer); linear interpolation: Chen et al. 2023; YaRN: Peng et al. 2023; the definitions of
//! transformers' `modeling_rope_utils` are followed, in its order of f32 roundings.

use std::f64::consts::PI;

use crate::checkpoint::{RopeConfig, RopeScaling};

/// `[positions, head_dim]`, as the forward over a text of `positions` tokens has it: for each position `head_dim / 2` cosines,
/// then as many sines.
///
/// `max_position_embeddings` is the model's own claim; with dynamic scaling a longer text stretches the base.
pub fn rope_table(rope: &RopeConfig, head_dim: usize, max_position_embeddings: usize, positions: usize) -> Vec<f32> {
    let rows = (0..positions as u32).map(|position| (position, positions as u32));
    rope_rows(rope, head_dim, max_position_embeddings, rows)
}

/// [`rope_table`]'s rows for single tokens: the position of each, and the length of the text whose forward it belongs to.
pub(super) fn rope_rows(
    rope: &RopeConfig,
    head_dim: usize,
    max_position_embeddings: usize,
    rows: impl ExactSizeIterator<Item = (u32, u32)>,
) -> Vec<f32> {
    let factor = match rope.scaling {
        RopeScaling::Yarn { attention_factor, .. } => attention_factor,
        _ => 1.0,
    };
    let half = head_dim / 2;
    let mut table = vec![0.0; rows.len() * head_dim];
    let (mut inv_freq, mut length_of_it) = (Vec::new(), None);
    for (row, (position, length)) in table.chunks_exact_mut(head_dim).zip(rows) {
        if length_of_it != Some(length) {
            inv_freq = inverse_frequencies(rope, head_dim, max_position_embeddings, length as usize);
            length_of_it = Some(length);
        }
        for (i, &inv) in inv_freq.iter().enumerate() {
            let angle = f64::from(position as f32 * inv);
            row[i] = angle.cos() as f32 * factor;
            row[half + i] = angle.sin() as f32 * factor;
        }
    }
    table
}

/// `head_dim / 2` angular frequencies after scaling, in f32 as transformers holds them.
fn inverse_frequencies(rope: &RopeConfig, head_dim: usize, max_positions: usize, positions: usize) -> Vec<f32> {
    let dim = head_dim as f64;
    let theta = f64::from(rope.theta);
    let plain = |base: f64| (0..head_dim / 2).map(move |i| base.powf(2.0 * i as f64 / dim).recip());
    let scaled: Vec<f64> = match rope.scaling {
        RopeScaling::None => plain(theta).collect(),
        RopeScaling::Linear { factor } => plain(theta).map(|f| f / f64::from(factor)).collect(),
        RopeScaling::Dynamic { factor } => {
            let (factor, served) = (f64::from(factor), positions.max(max_positions) as f64);
            let stretch = factor * served / max_positions as f64 - (factor - 1.0);
            plain(theta * stretch.powf(dim / (dim - 2.0))).collect()
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let original = original_max_position_embeddings as f64;
            let (factor, low, high) = (f64::from(factor), f64::from(low_freq_factor), f64::from(high_freq_factor));
            plain(theta)
                .map(|f| {
                    let wavelength = 2.0 * PI / f;
                    if wavelength > original / low {
                        f / factor
                    } else if wavelength < original / high {
                        f
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect()
        }
        RopeScaling::Yarn { factor, original_max_position_embeddings, beta_fast, beta_slow, truncate, .. } => {
            let original = original_max_position_embeddings as f64;
            let dimension =
                |rotations: f32| dim * (original / (f64::from(rotations) * 2.0 * PI)).ln() / (2.0 * theta.ln());
            let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(dim - 1.0));
            if low == high {
                high += 0.001;
            }
            plain(theta)
                .enumerate()
                .map(|(i, f)| {
                    let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / f64::from(factor) * ramp + f * (1.0 - ramp)
                })
                .collect()
        }
    };
    scaled.into_iter().map(|f| f as f32).collect()
}
