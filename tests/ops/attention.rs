//! Rotary embedding, head norms, the paged cache and attention over it.

use lowbit::device::cpu::reference::{self, PagedKv, Rounding};
use lowbit::device::{AttentionShape, BatchMeta, BatchRows, Device, HeadNorms, KvLayer, RopeRows};
use lowbit::dtype::{DType, HostData};

use super::{activations, assert_untouched, f32s, on_every_device, poisoned, read, u32s};
use crate::common::random::Random;
use crate::common::tolerance::{assert_bounded, assert_exact};

on_every_device!(
    rope_kv_write,
    attention_decode,
    attention_prefill,
    attention_mixed,
    attention_window,
    attention_heads,
    attention_long,
    attention_rejects
);

const SHAPE: AttentionShape =
    AttentionShape { num_heads: 4, num_kv_heads: 2, head_dim: 64, scale: 0.125, window: None, block_size: 16 };
const SHAPES: [AttentionShape; 4] = [
    SHAPE,
    AttentionShape { num_heads: 8, num_kv_heads: 1, head_dim: 128, scale: 0.088, ..SHAPE },
    AttentionShape { num_heads: 3, num_kv_heads: 3, head_dim: 32, scale: 0.3, ..SHAPE },
    AttentionShape { num_heads: 14, num_kv_heads: 2, head_dim: 80, scale: 0.11, ..SHAPE },
];

/// `[positions, head_dim]` cosines then sines of the usual frequencies.
fn rope_table(positions: usize, head_dim: usize) -> Vec<f32> {
    let angle = |p: usize, i: usize| p as f64 * 10_000f64.powf(-2.0 * i as f64 / head_dim as f64);
    let row = |p: usize| {
        let cos = (0..head_dim / 2).map(move |i| angle(p, i).cos() as f32);
        cos.chain((0..head_dim / 2).map(move |i| angle(p, i).sin() as f32))
    };
    (0..positions).flat_map(row).collect()
}

/// Cache types a device is asked to hold: its own, and on the CPU the 16-bit ones too.
fn cache_dtypes(device: &Device) -> Vec<DType> {
    match device.activation_dtype() {
        DType::F32 => vec![DType::F32, DType::F16, DType::BF16],
        dtype => vec![dtype],
    }
}

/// Rotated rows are bounded; the cache holds them, rounded to its type, in their slots and is untouched elsewhere.
fn rope_kv_write(device: &Device) {
    let heads = [(2, 2, 8), (5, 1, 24), (6, 3, 136), (3, 1, 256)]
        .map(|(num_heads, num_kv_heads, head_dim)| AttentionShape { num_heads, num_kv_heads, head_dim, ..SHAPE });
    for cache_dtype in cache_dtypes(device) {
        for (shape, with_norm) in SHAPES.into_iter().chain(heads).flat_map(|shape| [(shape, false), (shape, true)]) {
            for m in [1, 2, 17] {
                rope_kv_write_case(device, cache_dtype, shape, with_norm, m);
            }
        }
    }
}

fn rope_kv_write_case(device: &Device, cache_dtype: DType, shape: AttentionShape, with_norm: bool, m: usize) {
    let what = format!("rope_kv_write m={m} norm={with_norm} cache {cache_dtype} {shape:?}");
    let (dtype, mut random) = (device.activation_dtype(), Random::new(m as u64));
    let table = rope_table(100, shape.head_dim);
    let (mut qkv, values) = activations(device, &random.normals(m * shape.qkv_width()));
    let (q_weight, k_weight) = (random.normals(shape.head_dim), random.normals(shape.head_dim));
    let positions: Vec<u32> = (0..m).map(|_| random.below(100) as u32).collect();
    let mut slots: Vec<u32> = random.permutation(2 * shape.block_size)[..m].to_vec();
    if m > 1 {
        slots[1] = u32::MAX;
    }
    let width = shape.num_kv_heads * shape.head_dim;
    let len = 2 * shape.block_size * width;
    let mut cache = KvLayer { k: poisoned(device, cache_dtype, len), v: poisoned(device, cache_dtype, len) };
    let (q, k) = (f32s(device, &q_weight), f32s(device, &k_weight));
    let norm = with_norm.then_some(HeadNorms { q: &q, k: &k, eps: 1e-6 });
    let (table_on, positions_on, slots_on) = (f32s(device, &table), u32s(device, &positions), u32s(device, &slots));
    let rows = RopeRows { table: &table_on, positions: &positions_on, slot_mapping: &slots_on };
    device.rope_kv_write(&mut cache, &mut qkv, norm, rows, &shape, m).expect("rope_kv_write");

    let of = |rounding| {
        let normed = match with_norm {
            true => reference::qk_norm(&values, &q_weight, &k_weight, 1e-6, &shape, rounding),
            false => values.iter().map(|&x| f64::from(x)).collect(),
        };
        let normed: Vec<f32> = normed.into_iter().map(|x| x as f32).collect();
        reference::rope(&normed, &table, &positions, &shape, rounding)
    };
    let got = read(device, &qkv, values.len());
    assert_bounded(&what, &got, &of(Rounding::Exact), &of(Rounding::As(dtype)), dtype);

    let (mut k, mut v) = (vec![f32::NAN; len], vec![f32::NAN; len]);
    for (row, &slot) in got.chunks_exact(shape.qkv_width()).zip(&slots).filter(|(_, slot)| **slot != u32::MAX) {
        let (keys, at) = (shape.num_heads * shape.head_dim, slot as usize * width);
        for i in 0..width {
            k[at + i] = cache_dtype.round(row[keys + i]);
            v[at + i] = cache_dtype.round(row[keys + width + i]);
        }
    }
    assert_exact(&format!("keys of {what}"), &read(device, &cache.k, len), &k);
    assert_exact(&format!("values of {what}"), &read(device, &cache.v, len), &v);
}

/// A ragged batch of `(query rows, keys)` over a cache whose blocks are shuffled and whose unused slots are NaN.
fn attention_case(device: &Device, shape: AttentionShape, cache_dtype: DType, sequences: &[(usize, usize)], seed: u64) {
    let what = format!("attention {sequences:?} cache {cache_dtype} {shape:?}");
    let mut random = Random::new(seed);
    let token = shape.num_kv_heads * shape.head_dim;
    let blocks_of = |keys: usize| keys.div_ceil(shape.block_size);
    let max_blocks = sequences.iter().map(|s| blocks_of(s.1)).max().unwrap_or(0) + 1;
    let num_blocks: usize = sequences.iter().map(|s| blocks_of(s.1)).sum::<usize>() + 1;
    let mut free = random.permutation(num_blocks);
    let mut block_tables = vec![u32::MAX; sequences.len() * max_blocks];
    let (mut k, mut v) = (vec![f32::NAN; num_blocks * shape.block_size * token], vec![]);
    v.clone_from(&k);
    for (b, &(_, keys)) in sequences.iter().enumerate() {
        for t in 0..keys {
            let entry = &mut block_tables[b * max_blocks + t / shape.block_size];
            if t % shape.block_size == 0 {
                *entry = free.pop().expect("a free block");
            }
            let at = (*entry as usize * shape.block_size + t % shape.block_size) * token;
            k[at..at + token].copy_from_slice(&random.normals(token));
            v[at..at + token].copy_from_slice(&random.normals(token));
        }
    }
    let (k, v) = (HostData::from_f32(cache_dtype, k), HostData::from_f32(cache_dtype, v));
    let context_lens: Vec<u32> = sequences.iter().map(|s| s.1 as u32).collect();
    let mut cu_seqlens_q = vec![0];
    cu_seqlens_q.extend(sequences.iter().scan(0, |row, s| {
        *row += s.0 as u32;
        Some(*row)
    }));
    let m = *cu_seqlens_q.last().expect("not empty") as usize;
    let (qkv, values) = activations(device, &random.normals(m * shape.qkv_width()));
    let kv = PagedKv {
        k: &k,
        v: &v,
        block_tables: &block_tables,
        max_blocks,
        context_lens: &context_lens,
        cu_seqlens_q: &cu_seqlens_q,
    };
    let dtype = device.activation_dtype();
    let of = |rounding| reference::attention(&values, &kv, &shape, rounding);
    let (exact, twin) = (of(Rounding::Exact), of(Rounding::As(dtype)));
    let positions: Vec<u32> = sequences.iter().flat_map(|&(q, keys)| (keys - q..keys).map(|p| p as u32)).collect();
    let rows = BatchRows {
        token_ids: &vec![0; m],
        positions: &positions,
        slot_mapping: &vec![u32::MAX; m],
        block_tables: &block_tables,
        table_stride: max_blocks,
        context_lens: &context_lens,
        cu_seqlens_q: &cu_seqlens_q,
    };
    let meta = BatchMeta::of(device, &rows, &shape).expect("metadata");
    let width = shape.num_heads * shape.head_dim;
    let mut out = poisoned(device, dtype, (m + 1) * width);
    let cache = KvLayer { k: device.upload(k.clone()).expect("upload"), v: device.upload(v.clone()).expect("upload") };
    device.attention(&mut out, &qkv, &cache, &meta, &shape).expect("attention");
    assert_bounded(&what, &read(device, &out, m * width), &exact, &twin, dtype);
    assert_untouched(&what, device, &out, m * width);
}

fn attention_decode(device: &Device) {
    for dtype in cache_dtypes(device) {
        for shape in SHAPES {
            attention_case(device, shape, dtype, &[(1, 1)], 1);
            attention_case(device, shape, dtype, &[(1, 15), (1, 16), (1, 17), (1, 200)], 2);
        }
        attention_case(device, SHAPE, dtype, &[(1, 1500)], 3);
    }
}

fn attention_prefill(device: &Device) {
    for dtype in cache_dtypes(device) {
        for shape in SHAPES {
            for rows in [1, 15, 16, 17, 65] {
                attention_case(device, shape, dtype, &[(rows, rows)], rows as u64);
            }
        }
    }
}

/// Decode, whole prompts and chunks of prompts in one batch.
fn attention_mixed(device: &Device) {
    for dtype in cache_dtypes(device) {
        for shape in SHAPES {
            attention_case(device, shape, dtype, &[(1, 33), (20, 20), (7, 40), (1, 1), (33, 100)], 4);
        }
    }
}

fn attention_window(device: &Device) {
    for window in [1, 16, 17, 40] {
        let shape = AttentionShape { window: Some(window), ..SHAPE };
        attention_case(device, shape, device.activation_dtype(), &[(1, 39), (1, 41), (50, 50), (9, 70)], 5);
    }
}

/// Head sizes between and at the ends of kernel templates; more query heads on a KV head than fit one block.
fn attention_heads(device: &Device) {
    let dtype = device.activation_dtype();
    for (num_heads, num_kv_heads, head_dim) in [(2, 2, 8), (33, 1, 64), (6, 3, 96), (4, 2, 136), (17, 1, 256)] {
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = AttentionShape { num_heads, num_kv_heads, head_dim, scale, ..SHAPE };
        attention_case(device, shape, dtype, &[(1, 33), (1, 80)], 6);
        attention_case(device, shape, dtype, &[(18, 50), (1, 1)], 7);
    }
}

/// Contexts that several blocks share, prompts of several tiles, KV blocks of other sizes.
fn attention_long(device: &Device) {
    let dtype = device.activation_dtype();
    let shape = AttentionShape { num_heads: 8, num_kv_heads: 2, head_dim: 128, scale: 0.088, ..SHAPE };
    attention_case(device, AttentionShape { block_size: 48, ..shape }, dtype, &[(1, 3000), (1, 5), (1, 1025)], 8);
    attention_case(device, AttentionShape { window: Some(700), ..shape }, dtype, &[(1, 3000), (1, 5)], 9);
    attention_case(device, AttentionShape { block_size: 32, ..shape }, dtype, &[(130, 700), (257, 257)], 10);
    // More sequences than blocks that run at once, so that each takes several parts; contexts far apart.
    let many: Vec<(usize, usize)> = (0..300).map(|i| (1, 1 + i * 37 % 700)).collect();
    attention_case(device, SHAPE, dtype, &many, 12);
    attention_case(device, shape, dtype, &[(1, 9000), (1, 64), (1, 65), (3, 100), (1, 63)], 13);
    attention_case(device, AttentionShape { window: Some(100), ..shape }, dtype, &[(200, 300)], 11);
}

/// The CPU checks what would read out of bounds; a GPU trusts the engine's plan.
fn attention_rejects(device: &Device) {
    if device.name() != "cpu" {
        return;
    }
    let shape = SHAPE;
    let cache = HostData::zeros(DType::F32, 2 * shape.block_size * shape.num_kv_heads * shape.head_dim);
    let good = PagedKv {
        k: &cache,
        v: &cache,
        block_tables: &[1, 0],
        max_blocks: 2,
        context_lens: &[20],
        cu_seqlens_q: &[0, 3],
    };
    assert!(good.check(&shape, 3).is_ok());
    for bad in [
        PagedKv { block_tables: &[1, 2], ..good },
        PagedKv { context_lens: &[2], ..good },
        PagedKv { context_lens: &[33], ..good },
        PagedKv { cu_seqlens_q: &[0, 4], ..good },
        PagedKv { cu_seqlens_q: &[1, 3], ..good },
    ] {
        assert!(bad.check(&shape, 3).is_err(), "{bad:?} was accepted");
    }
}
