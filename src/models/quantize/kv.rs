//! Scales of an int8 KV cache: the largest keys (after the rotary embedding) and values that calibration saw.

use serde_json::{Value, json};

use crate::checkpoint::ModelConfig;
use crate::checkpoint::write::{KvScales, OutTensor};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::affine::{CodeRange, Mapping};
use crate::quant::observer::absmax;

/// Largest magnitudes of each KV head's keys and values.
#[derive(Debug, Clone)]
pub(super) struct KvRanges {
    /// Values of a row before the first key: the queries.
    skip: usize,
    head_dim: usize,
    /// `[num_kv_heads]`.
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KvRanges {
    pub(super) fn new(config: &ModelConfig) -> KvRanges {
        let zeros = vec![0.0; config.num_kv_heads];
        let (skip, head_dim) = (config.num_heads * config.head_dim, config.head_dim);
        KvRanges { skip, head_dim, keys: zeros.clone(), values: zeros }
    }

    /// Rows of queries, keys and values side by side.
    pub(super) fn add(&mut self, qkv: &[f32]) {
        let width = self.keys.len() * self.head_dim;
        for row in qkv.chunks_exact(self.skip + 2 * width) {
            let (keys, values) = row[self.skip..].split_at(width);
            for (amax, x) in [(&mut self.keys, keys), (&mut self.values, values)] {
                for (amax, head) in amax.iter_mut().zip(x.chunks_exact(self.head_dim)) {
                    *amax = absmax(&[*amax, absmax(head)]); // not f32::max, which forgets NaN
                }
            }
        }
    }

    /// `k_scale` and `v_scale` of the attention under `prefix`, in the model's type as compressed-tensors has them: `[1]`, or
    /// `[num_kv_heads, 1, 1]`.
    pub(super) fn tensors(&self, prefix: &str, granularity: KvScales, dtype: DType) -> Result<Vec<OutTensor>> {
        let scales = |name: &str, amax: &[f32]| {
            let name = format!("{prefix}.self_attn.{name}");
            let amax = match granularity {
                KvScales::Head => amax.to_vec(),
                KvScales::Tensor => vec![amax.iter().copied().fold(0.0, f32::max)],
            };
            let scale = |a: &f32| Some(Mapping::Centered.affine(-a, *a, CodeRange::signed(8), dtype)?.scale);
            let scales: Option<Vec<f32>> = amax.iter().map(scale).collect();
            let reason = || Error::input("--calib", format!("no `{name}` fits: keys or values became infinite"));
            let scales = scales.ok_or_else(reason)?;
            let shape: &[usize] = if granularity == KvScales::Head { &[scales.len(), 1, 1] } else { &[1] };
            Ok(OutTensor::floats(name, dtype, shape, &scales))
        };
        Ok(vec![scales("k_scale", &self.keys)?, scales("v_scale", &self.values)?])
    }

    pub(super) fn json(&self) -> Value {
        json!({ "k": self.keys, "v": self.values })
    }
}
