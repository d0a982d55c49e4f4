//! Rotary embedding, head normalization, the paged KV cache and causal attention over it.
//!
//! A fused row is `[q heads | k heads | v heads]`, each head `head_dim` wide.

use rayon::prelude::*;

use super::{Rounding, rms_norm};
use crate::device::AttentionShape;
use crate::dtype::HostData;
use crate::error::{Error, Result};

/// RMSNorm of every query head by `q_weight` and key head by `k_weight` (`[head_dim]`); values pass through.
pub fn qk_norm(
    qkv: &[f32],
    q_weight: &[f32],
    k_weight: &[f32],
    eps: f32,
    shape: &AttentionShape,
    rounding: Rounding,
) -> Vec<f64> {
    let (q_end, k_end) = (shape.num_heads, shape.num_heads + shape.num_kv_heads);
    let head = |(i, x): (usize, &[f32])| -> Vec<f64> {
        match i % (k_end + shape.num_kv_heads) {
            head if head < q_end => rms_norm(x, q_weight, eps, rounding),
            head if head < k_end => rms_norm(x, k_weight, eps, rounding),
            _ => x.iter().map(|&x| f64::from(x)).collect(),
        }
    };
    qkv.chunks_exact(shape.head_dim).enumerate().flat_map(head).collect()
}

/// Rotary position embedding of query and key heads, pairs `(i, i + head_dim / 2)`; values pass through. `table` is
/// `[positions, head_dim]`: cosines then sines. Source: Su et al. 2021, arXiv 2104.09864, in the half-split form.
pub fn rope(qkv: &[f32], table: &[f32], positions: &[u32], shape: &AttentionShape, rounding: Rounding) -> Vec<f64> {
    let (d, half) = (shape.head_dim, shape.head_dim / 2);
    let rotated = (shape.num_heads + shape.num_kv_heads) * d;
    let mut out: Vec<f64> = qkv.iter().map(|&x| f64::from(x)).collect();
    for (row, &position) in out.chunks_exact_mut(shape.qkv_width()).zip(positions) {
        let (cos, sin) = table[position as usize * d..(position as usize + 1) * d].split_at(half);
        for head in row[..rotated].chunks_exact_mut(d) {
            let (low, high) = head.split_at_mut(half);
            for (((a, b), &cos), &sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                let (cos, sin) = (f64::from(cos), f64::from(sin));
                let (x, y) = (*a, *b);
                *a = rounding.round(rounding.carry(x * cos) - rounding.carry(y * sin));
                *b = rounding.round(rounding.carry(y * cos) + rounding.carry(x * sin));
            }
        }
    }
    out
}

/// Rounds each row's keys and values to the cache's type and stores them in its slot; slot `u32::MAX` stores nothing.
/// `k` and `v` are `[num_blocks, block_size, num_kv_heads, head_dim]`.
pub fn kv_write(k: &mut HostData, v: &mut HostData, qkv: &[f32], slots: &[u32], shape: &AttentionShape) {
    let width = shape.num_kv_heads * shape.head_dim;
    let k_start = shape.num_heads * shape.head_dim;
    for (row, &slot) in qkv.chunks_exact(shape.qkv_width()).zip(slots) {
        if slot != u32::MAX {
            store(k, slot as usize * width, &row[k_start..k_start + width]);
            store(v, slot as usize * width, &row[k_start + width..]);
        }
    }
}

fn store(cache: &mut HostData, start: usize, values: &[f32]) {
    let range = start..start + values.len();
    match cache {
        HostData::F32(c) => c[range].copy_from_slice(values),
        HostData::F16(c) => c[range].iter_mut().zip(values).for_each(|(c, &x)| *c = half::f16::from_f32(x)),
        HostData::BF16(c) => c[range].iter_mut().zip(values).for_each(|(c, &x)| *c = half::bf16::from_f32(x)),
        other => panic!("kv_write: {} is not a floating type", other.dtype()),
    }
}

fn load(cache: &HostData, start: usize, len: usize) -> Vec<f64> {
    let range = start..start + len;
    match cache {
        HostData::F32(c) => c[range].iter().map(|&x| f64::from(x)).collect(),
        HostData::F16(c) => c[range].iter().map(|x| x.to_f64()).collect(),
        HostData::BF16(c) => c[range].iter().map(|x| x.to_f64()).collect(),
        other => panic!("attention: {} is not a floating type", other.dtype()),
    }
}

/// One layer's cache and where each sequence's tokens are in it.
#[derive(Debug, Clone, Copy)]
pub struct PagedKv<'a> {
    /// `[num_blocks, block_size, num_kv_heads, head_dim]` keys.
    pub k: &'a HostData,
    /// Values, as keys.
    pub v: &'a HostData,
    /// `[batch, max_blocks]` block numbers.
    pub block_tables: &'a [u32],
    /// Row stride of `block_tables`.
    pub max_blocks: usize,
    /// `[batch]` keys of each sequence, this step's included.
    pub context_lens: &'a [u32],
    /// `[batch + 1]` first query row of each sequence, then the number of rows.
    pub cu_seqlens_q: &'a [u32],
}

impl PagedKv<'_> {
    /// Fails unless every index is in range for `m` query rows: the ops above trust it.
    pub fn check(&self, shape: &AttentionShape, m: usize) -> Result<()> {
        let fail = |expected: String, got: String| Err(Error::Shape { op: "attention", expected, got });
        let starts = self.cu_seqlens_q;
        if starts.first() != Some(&0) || starts.last().map(|&end| end as usize) != Some(m) || !starts.is_sorted() {
            return fail(format!("cu_seqlens_q ascending from 0 to {m}"), format!("{starts:?}"));
        }
        let token = shape.num_kv_heads * shape.head_dim;
        let num_blocks = self.k.len().min(self.v.len()) / (shape.block_size * token).max(1);
        for (b, (&keys, rows)) in self.context_lens.iter().zip(starts.windows(2)).enumerate() {
            let blocks = (keys as usize).div_ceil(shape.block_size);
            if keys < rows[1] - rows[0] || blocks > self.max_blocks {
                let limit = self.max_blocks * shape.block_size;
                return fail(format!("{} to {limit} keys in sequence {b}", rows[1] - rows[0]), keys.to_string());
            }
            let table = &self.block_tables[b * self.max_blocks..][..blocks];
            if let Some(block) = table.iter().find(|&&block| block as usize >= num_blocks) {
                return fail(format!("block numbers below {num_blocks}"), block.to_string());
            }
        }
        Ok(())
    }

    /// Slot of key `t` of sequence `b`.
    pub fn slot(&self, b: usize, t: usize, block_size: usize) -> usize {
        self.block_tables[b * self.max_blocks + t / block_size] as usize * block_size + t % block_size
    }
}

/// Causal softmax attention, grouped-query and windowed; `out` `[m, num_heads * head_dim]`. The last query row of a
/// sequence is at position `context_len - 1`. Rounded, probabilities are taken relative to the largest score and
/// rounded before they weigh values, as kernels on tensor cores do.
pub fn attention(qkv: &[f32], kv: &PagedKv<'_>, shape: &AttentionShape, rounding: Rounding) -> Vec<f64> {
    let d = shape.head_dim;
    let heads_per_kv = shape.num_heads / shape.num_kv_heads;
    let sequence_of = |row: usize| kv.cu_seqlens_q.partition_point(|&start| start as usize <= row) - 1;
    let row = |(row, qkv): (usize, &[f32])| -> Vec<f64> {
        let b = sequence_of(row);
        let rows_after = kv.cu_seqlens_q[b + 1] as usize - row;
        let end = kv.context_lens[b] as usize + 1 - rows_after;
        let start = shape.window.map_or(0, |window| end.saturating_sub(window));
        let head = |h: usize| -> Vec<f64> {
            let q: Vec<f64> = qkv[h * d..(h + 1) * d].iter().map(|&q| f64::from(q)).collect();
            let at = |t: usize| (kv.slot(b, t, shape.block_size) * shape.num_kv_heads + h / heads_per_kv) * d;
            let score = |t: usize| rounding.carry(rounding.dot(&q, &load(kv.k, at(t), d)) * f64::from(shape.scale));
            let scores: Vec<f64> = (start..end).map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| rounding.carry((s - max).exp())).collect();
            let sum = weights.iter().fold(0.0, |sum, w| rounding.carry(sum + w));
            let mut out = vec![0.0; d];
            for (t, &weight) in (start..end).zip(&weights) {
                let weight = rounding.round(weight);
                let v = load(kv.v, at(t), d);
                out.iter_mut().zip(v).for_each(|(out, v)| *out = rounding.carry(*out + weight * v));
            }
            out.into_iter().map(|out| rounding.round(out / sum)).collect()
        };
        (0..shape.num_heads).flat_map(head).collect()
    };
    qkv.par_chunks(shape.qkv_width()).enumerate().flat_map_iter(row).collect()
}
