//! What the report keeps of weights and inputs: a histogram of each, with the range that was chosen.

use serde_json::{Value, json};

use crate::quant::observer::absmax;
use crate::quant::{ActQuant, QuantWeight};

/// Bins of a histogram.
const BINS: usize = 64;

/// Of the weights of a linear layer before they were rounded, from `-amax` to `amax`; `range` has the least, the median and
/// the largest of its groups' lower ends, and of the upper ones.
pub(super) fn of_weights(weight: &[f32], quantized: &QuantWeight) -> Value {
    let amax = absmax(weight);
    let mut note = histogram(weight, -amax, amax);
    let (mut low, mut high): (Vec<f32>, Vec<f32>) = group_ranges(quantized).unzip();
    note["range"] = json!({ "low": spread(&mut low), "high": spread(&mut high) });
    note
}

/// Of sampled inputs, and the range that int8 covers where calibration chose one.
pub(super) fn of_inputs(samples: &[f32], activation: Option<ActQuant>) -> Value {
    let (low, high) = samples.iter().fold((0f32, 0f32), |(low, high), x| (low.min(*x), high.max(*x)));
    let mut note = histogram(samples, low, high);
    note["range"] = match activation {
        Some(ActQuant::StaticPerTensor { scale, zero_point }) => {
            let end = |code: i32| f64::from(scale) * f64::from(code - zero_point);
            json!([end(-128), end(127)])
        }
        _ => Value::Null,
    };
    note
}

/// Counts in bins of one width between `low` and `high`; everything is in the first bin where these are equal.
fn histogram(values: &[f32], low: f32, high: f32) -> Value {
    let mut counts = [0u64; BINS];
    let per_unit = if high > low { BINS as f32 / (high - low) } else { 0.0 };
    for value in values {
        counts[(((value - low) * per_unit) as usize).min(BINS - 1)] += 1;
    }
    json!({ "low": low, "high": high, "counts": counts.as_slice() })
}

/// What the codes of each group can stand for: from, to.
fn group_ranges(q: &QuantWeight) -> impl Iterator<Item = (f32, f32)> {
    let (least, most) = q.levels().iter().fold((f32::MAX, f32::MIN), |(low, high), &x| (low.min(x), high.max(x)));
    q.scales.iter().zip(&q.zeros).map(move |(&scale, &zero)| {
        let (a, b) = ((least - zero) * scale, (most - zero) * scale);
        (a.min(b), a.max(b))
    })
}

/// Least, median, largest.
fn spread(values: &mut [f32]) -> Value {
    values.sort_by(f32::total_cmp);
    match values {
        [] => Value::Null,
        [first, ..] => json!([*first, values[values.len() / 2], values[values.len() - 1]]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::Encoding;

    fn weight(bits: u8, scales: &[f32], zeros: &[f32]) -> QuantWeight {
        QuantWeight {
            n: scales.len(),
            k: 2,
            bits,
            group_size: 2,
            codes: vec![0; 2 * scales.len()].into(),
            scales: scales.to_vec(),
            zeros: zeros.to_vec(),
            order: None,
            encoding: Encoding::Affine,
        }
    }

    /// 4 bits with zero point 8 reach from -8 to 7 scales; a negative scale turns that around.
    #[test]
    fn ranges_of_groups() {
        let note = of_weights(&[-1.0, 0.5, 0.0, 1.0], &weight(4, &[0.5, -1.0, 2.0], &[8.0, 8.0, 0.0]));
        assert_eq!(note["range"], json!({ "low": [-7.0, -4.0, 0.0], "high": [3.5, 8.0, 30.0] }));
        let counts: Vec<u64> = note["counts"].as_array().unwrap().iter().map(|c| c.as_u64().unwrap()).collect();
        assert_eq!((counts.len(), counts[0], counts[32], counts[48], counts[63]), (BINS, 1, 1, 1, 1));
        assert_eq!((&note["low"], &note["high"]), (&json!(-1.0), &json!(1.0)));
    }

    #[test]
    fn ranges_of_inputs() {
        let none = of_inputs(&[0.0, 0.0], Some(ActQuant::DynamicPerToken));
        assert_eq!((&none["range"], &none["counts"][0], &none["counts"][63]), (&Value::Null, &json!(2), &json!(0)));
        let some = of_inputs(&[1.0, 3.0], Some(ActQuant::StaticPerTensor { scale: 0.5, zero_point: -28 }));
        assert_eq!((&some["range"], &some["low"], &some["high"]), (&json!([-50.0, 77.5]), &json!(0.0), &json!(3.0)));
    }
}
