//! Fast attention: online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) over tiles of keys, in f32.
//!
//! A task is a few query rows of one sequence and the query heads of one KV head, so that a tile of keys and values is
//! read once for all of them. Scores are computed 16 queries to a vector: softmax needs no sums across lanes.
#![allow(unsafe_code)] // threads write disjoint columns
#![allow(clippy::needless_range_loop)] // arrays of registers, several indexed together

use std::ops::Range;

use rayon::prelude::*;

use super::Level;
use super::linear::Destination;
use super::reference::PagedKv;
use super::simd::{Kernel, Simd, exp};
use crate::device::{AttentionShape, Columns, Write};
use crate::dtype::HostData;

/// Keys of a tile.
const KEYS: usize = 32;
/// Queries a task should have, where the sequence has rows enough.
const QUERIES: usize = 64;
/// The score of a key that is not to be seen: `exp` of it less any real score is 0 but for rounding.
const HIDDEN: f32 = -1e30;

/// `reference::attention` of checked arguments.
pub(super) fn attention(level: Level, out: &mut [f32], qkv: &[f32], kv: &PagedKv<'_>, shape: &AttentionShape) {
    let width = shape.num_heads * shape.head_dim;
    let m = out.len() / width;
    let to = Destination::new(out, Columns { offset: 0, stride: width }, width, m, Write::Store);
    let rows_of_task = (QUERIES * shape.num_kv_heads / shape.num_heads).max(1);
    let mut tasks = Vec::new();
    for (sequence, rows) in kv.cu_seqlens_q.windows(2).enumerate() {
        for first in (rows[0] as usize..rows[1] as usize).step_by(rows_of_task) {
            let rows = first..(first + rows_of_task).min(rows[1] as usize);
            tasks.extend((0..shape.num_kv_heads).map(|kv_head| (sequence, rows.clone(), kv_head)));
        }
    }
    tasks.into_par_iter().for_each(|(sequence, rows, kv_head)| {
        level.run(Task { qkv, kv, shape, to, sequence, rows, kv_head });
    });
}

struct Task<'a> {
    qkv: &'a [f32],
    kv: &'a PagedKv<'a>,
    shape: &'a AttentionShape,
    to: Destination<'a>,
    sequence: usize,
    rows: Range<usize>,
    kv_head: usize,
}

/// 16 queries: lane `i` is query `i`.
struct Lanes {
    /// `[width, 16]`, `width` the head size padded to vectors.
    q: Vec<[f32; 16]>,
    /// Keys seen: from `first` up to, not with, `end`.
    first: [usize; 16],
    end: [usize; 16],
    largest: [f32; 16],
    sum: [f32; 16],
    /// `[16, width]`
    out: Vec<f32>,
}

impl Kernel for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (shape, d) = (self.shape, self.shape.head_dim);
        let width = d.next_multiple_of(16);
        let heads = shape.num_heads / shape.num_kv_heads;
        let rows_behind = self.kv.cu_seqlens_q[self.sequence + 1] as usize;
        let context = self.kv.context_lens[self.sequence] as usize;
        // Query i is head i % heads of row i / heads.
        let queries = self.rows.len() * heads;
        let mut all: Vec<Lanes> = (0..queries.div_ceil(16)).map(|_| Lanes::new(width)).collect();
        for i in 0..queries {
            let (row, head) = (self.rows.start + i / heads, self.kv_head * heads + i % heads);
            let (lanes, lane) = (&mut all[i / 16], i % 16);
            let q = &self.qkv[row * shape.qkv_width() + head * d..][..d];
            lanes.q.iter_mut().zip(q).for_each(|(to, &q)| to[lane] = q);
            lanes.end[lane] = context + 1 - (rows_behind - row);
            lanes.first[lane] = shape.window.map_or(0, |window| lanes.end[lane].saturating_sub(window));
        }
        let first = (0..queries).map(|i| all[i / 16].first[i % 16]).min().unwrap_or(0);
        let end = (0..queries).map(|i| all[i / 16].end[i % 16]).max().unwrap_or(0);
        let (mut keys, mut values) = (vec![0.0; KEYS * width], vec![0.0; KEYS * width]);
        // Tiles lie the same however a sequence is cut into passes, and so do the sums over them.
        for start in (first / KEYS * KEYS..end).step_by(KEYS) {
            let positions = start.max(first)..end.min(start + KEYS);
            self.gather(s, self.kv.k, start, positions.clone(), width, &mut keys);
            self.gather(s, self.kv.v, start, positions, width, &mut values);
            for (block, lanes) in all.iter_mut().enumerate() {
                let active = (queries - block * 16).min(16);
                lanes.visit(s, active, start, &keys, &values, width, shape.scale);
            }
        }
        for i in 0..queries {
            let (row, head) = (self.rows.start + i / heads, self.kv_head * heads + i % heads);
            let (lanes, lane) = (&mut all[i / 16], i % 16);
            let out = &mut lanes.out[lane * width..][..d];
            let sum = lanes.sum[lane];
            out.iter_mut().for_each(|out| *out /= sum);
            // SAFETY: the row is below m; the columns of a row's heads belong to one task.
            unsafe { self.to.write(row, head * d, out) };
        }
    }
}

impl Task<'_> {
    /// Keys or values of some `positions` of the tile that begins at `start` as f32 `[KEYS, width]`, zeros elsewhere: what no query sees
    /// may be another sequence's.
    #[inline(always)]
    fn gather<S: Simd>(
        &self,
        s: S,
        cache: &HostData,
        start: usize,
        positions: Range<usize>,
        width: usize,
        to: &mut [f32],
    ) {
        let d = self.shape.head_dim;
        let (before, to) = to.split_at_mut((positions.start - start) * width);
        before.fill(0.0);
        to[positions.len() * width..].fill(0.0);
        for (t, to) in positions.zip(to.chunks_exact_mut(width)) {
            let slot = self.kv.slot(self.sequence, t, self.shape.block_size);
            let at = (slot * self.shape.num_kv_heads + self.kv_head) * d;
            match cache {
                HostData::F32(cache) => to[..d].copy_from_slice(&cache[at..at + d]),
                HostData::F16(cache) => widen(s, &cache[at..at + d], &mut to[..d], S::load_f16, half::f16::to_f32),
                HostData::BF16(cache) => widen(s, &cache[at..at + d], &mut to[..d], S::load_bf16, half::bf16::to_f32),
                other => unreachable!("a cache of {}", other.dtype()),
            }
        }
    }
}

#[inline(always)]
fn widen<S: Simd, E: Copy>(s: S, from: &[E], to: &mut [f32], load: fn(S, &[E; 16]) -> S::F, one: fn(E) -> f32) {
    let (chunks, rest) = from.as_chunks::<16>();
    let (to_chunks, to_rest) = to.as_chunks_mut::<16>();
    for (x, to) in chunks.iter().zip(to_chunks) {
        s.store(load(s, x), to);
    }
    rest.iter().zip(to_rest).for_each(|(&x, to)| *to = one(x));
}

impl Lanes {
    fn new(width: usize) -> Self {
        let q = vec![[0.0; 16]; width];
        Lanes { q, first: [0; 16], end: [0; 16], largest: [HIDDEN; 16], sum: [0.0; 16], out: vec![0.0; 16 * width] }
    }

    /// Takes in the tile of keys that starts at position `start`.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // one call; a struct would only name them again
    fn visit<S: Simd>(
        &mut self,
        s: S,
        active: usize,
        start: usize,
        keys: &[f32],
        values: &[f32],
        width: usize,
        scale: f32,
    ) {
        let mut weights = [[0.0; 16]; KEYS];
        for (eight, keys) in weights.chunks_exact_mut(8).zip(keys.chunks_exact(8 * width)) {
            let mut sums = [s.splat(0.0); 8];
            for (i, q) in self.q.iter().enumerate() {
                let q = s.load(q);
                for t in 0..8 {
                    sums[t] = s.mul_add(s.splat(keys[t * width + i]), q, sums[t]);
                }
            }
            for t in 0..8 {
                s.store(s.mul(sums[t], s.splat(scale)), &mut eight[t]);
            }
        }
        let hides = |lane: usize| self.end[lane] < start + KEYS || self.first[lane] > start;
        if (0..active).any(hides) {
            for (t, weights) in weights.iter_mut().enumerate() {
                for lane in 0..active {
                    if !(self.first[lane]..self.end[lane]).contains(&(start + t)) {
                        weights[lane] = HIDDEN;
                    }
                }
            }
        }
        let before = s.load(&self.largest);
        let mut largest = before;
        for score in &weights {
            largest = s.max(s.load(score), largest);
        }
        let correction = exp(s, s.sub(before, largest));
        let mut sum = s.mul(s.load(&self.sum), correction);
        for weight in &mut weights {
            let w = exp(s, s.sub(s.load(weight), largest));
            sum = s.add(sum, w);
            s.store(w, weight);
        }
        s.store(largest, &mut self.largest);
        s.store(sum, &mut self.sum);
        let mut corrections = [0.0; 16];
        s.store(correction, &mut corrections);

        for column in (0..width).step_by(64) {
            match width - column {
                16 => self.weigh::<S, 1>(s, active, &weights, &corrections, values, width, column),
                32 => self.weigh::<S, 2>(s, active, &weights, &corrections, values, width, column),
                48 => self.weigh::<S, 3>(s, active, &weights, &corrections, values, width, column),
                _ => self.weigh::<S, 4>(s, active, &weights, &corrections, values, width, column),
            }
        }
    }

    /// `out = out * correction + sum over keys of weight * value`, `16 * C` columns, two queries at a time.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // as above
    fn weigh<S: Simd, const C: usize>(
        &mut self,
        s: S,
        active: usize,
        weights: &[[f32; 16]; KEYS],
        corrections: &[f32; 16],
        values: &[f32],
        width: usize,
        column: usize,
    ) {
        for lane in (0..active).step_by(2) {
            let pair = [lane, (lane + 1).min(15)];
            let mut sums = [[s.splat(0.0); C]; 2];
            for (sums, lane) in sums.iter_mut().zip(pair) {
                for c in 0..C {
                    let out = s.load(vector(&self.out, lane * width + column + 16 * c));
                    sums[c] = s.mul(out, s.splat(corrections[lane]));
                }
            }
            for (t, weights) in weights.iter().enumerate() {
                for c in 0..C {
                    let value = s.load(vector(values, t * width + column + 16 * c));
                    sums[0][c] = s.mul_add(s.splat(weights[pair[0]]), value, sums[0][c]);
                    sums[1][c] = s.mul_add(s.splat(weights[pair[1]]), value, sums[1][c]);
                }
            }
            for (sums, lane) in sums.iter().zip(pair) {
                for c in 0..C {
                    let at = lane * width + column + 16 * c;
                    s.store(sums[c], (&mut self.out[at..at + 16]).try_into().expect("16 elements"));
                }
            }
        }
    }
}

/// 16 elements from `start` on.
#[inline(always)]
fn vector(x: &[f32], start: usize) -> &[f32; 16] {
    x[start..start + 16].try_into().expect("16 elements")
}
