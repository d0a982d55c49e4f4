//! Packing on the host: what every layout means, in plain code. `repack` does the same on the GPU and is held against it byte
//! for byte; it takes over where a weight is stacked of too many parts for that.

use rayon::prelude::*;

use super::pack::{Beside, Layout, Order, Packed, padded_n};
use crate::dtype::{DType, HostData};
use crate::quant::QuantWeight;

/// `q` in `layout`, with what lies `beside`, for activations of `dtype`.
pub(super) fn pack_on_host(layout: Layout, q: &QuantWeight, beside: &Beside, dtype: DType) -> Packed<HostData> {
    let _unpacked: &[u8] = &q.codes; // before cores share the work
    let weights = match layout {
        Layout::Rows8 => HostData::I8(steps(q)),
        Layout::Blocks8 => HostData::I8(blocks8(q)),
        Layout::Blocks16(shape) => HostData::U8(shape.pack(q, dtype)),
        Layout::Blocks4(shape) => HostData::U8(shape.pack(q, beside.factored.as_ref())),
        Layout::Fragments8Bit { bits: 8 } => {
            let steps: Vec<u8> = steps(q).into_iter().map(|step| step as u8).collect();
            HostData::U8(fragments8(q.n, q.k, &steps))
        }
        Layout::Fragments8Bit { .. } => HostData::U8(fragments4(q.n, q.k, &q.codes, NIBBLES_8BIT)),
        Layout::Fragments16Bit { bits: 8 } => HostData::U8(fragments8(q.n, q.k, &q.codes)),
        Layout::Fragments16Bit { .. } => HostData::U8(fragments4(q.n, q.k, &q.codes, NIBBLES_16BIT)),
        Layout::FragmentsCodebook => HostData::U8(fragments4(q.n, q.k, &q.codes, NIBBLES_CODEBOOK)),
        Layout::Canonical { .. } | Layout::CanonicalCodebook => HostData::U8(q.codes.to_vec()),
        Layout::Dense { .. } => unreachable!("of unquantized weights"),
    };
    let zeros = beside.zeros.then(|| match beside.order {
        Some(order @ Order::ByGroup { .. }) => {
            let zeros = ordered(&q.zeros, q.groups(), order);
            HostData::U8(zeros.into_iter().flat_map(|z| (z as u16).to_le_bytes()).collect())
        }
        _ => HostData::F32(q.zeros.clone()),
    });
    let scales = beside.order.map(|order| match &beside.factored {
        Some(factored) => HostData::F32(ordered(&factored.scales, 1, order)),
        None => HostData::F32(ordered(&q.scales, q.groups(), order)),
    });
    let sums =
        beside.order.filter(|_| beside.sums).map(|order| HostData::I32(ordered(&group_sums(q), q.groups(), order)));
    Packed { weights, scales, zeros, sums }
}

/// Code minus zero point, which [`steps_fit_i8`], one zero point a row, in blocks of 64 rows x 128 columns, those of the
/// same rows one after the other; within a block, chunk `c` of 16 columns of row `r` lies at chunk `c ^ (r % 8)`.
fn blocks8(q: &QuantWeight) -> Vec<i8> {
    let slices = q.k.div_ceil(128);
    let mut bytes = vec![0; q.n.div_ceil(64) * slices * 64 * 128];
    bytes.par_chunks_mut(slices * 64 * 128).enumerate().for_each(|(block, bytes)| {
        for r in block * 64..q.n.min(block * 64 + 64) {
            let zero = q.zeros[r] as i32 as u8; // steps fit, so their low bytes do
            for (c, codes) in q.codes[r * q.k..(r + 1) * q.k].chunks(16).enumerate() {
                let to = c / 8 * (64 * 128) + r % 64 * 128 + ((c % 8) ^ (r % 8)) * 16;
                for (to, code) in bytes[to..to + 16].iter_mut().zip(codes) {
                    *to = code.wrapping_sub(zero) as i8;
                }
            }
        }
    });
    bytes
}

/// Row `r`'s codes with the zero points of their groups.
fn row_steps(q: &QuantWeight, r: usize) -> impl Iterator<Item = i32> {
    let zeros = &q.zeros[r * q.groups()..];
    q.codes[r * q.k..(r + 1) * q.k]
        .chunks(q.group_size)
        .zip(zeros)
        .flat_map(|(codes, &zero)| codes.iter().map(move |&code| i32::from(code) - zero as i32))
}

/// True when every code minus its zero point is an int8. All are, at up to 7 bits and at 8 bits about the middle.
pub(super) fn steps_fit_i8(q: &QuantWeight) -> bool {
    let all_fit = || {
        let _unpacked: &[u8] = &q.codes;
        (0..q.n).into_par_iter().all(|r| row_steps(q, r).all(|s| i8::try_from(s).is_ok()))
    };
    q.bits < 8 || q.is_symmetric() || all_fit()
}

/// `[n, k]` code minus zero point, which [`steps_fit_i8`].
fn steps(q: &QuantWeight) -> Vec<i8> {
    let mut steps = vec![0; q.n * q.k];
    steps.par_chunks_mut(q.k).enumerate().for_each(|(r, row)| {
        for (to, step) in row.iter_mut().zip(row_steps(q, r)) {
            *to = step as i8;
        }
    });
    steps
}

/// `[n, groups]` sums of code minus zero point.
fn group_sums(q: &QuantWeight) -> Vec<i32> {
    let groups = q.groups();
    let mut sums = vec![0; q.n * groups];
    sums.par_chunks_mut(groups).enumerate().for_each(|(r, sums)| {
        let codes = q.codes[r * q.k..(r + 1) * q.k].chunks(q.group_size);
        for ((sum, codes), zero) in sums.iter_mut().zip(codes).zip(&q.zeros[r * groups..]) {
            *sum = codes.iter().map(|&code| i32::from(code)).sum::<i32>() - *zero as i32 * codes.len() as i32;
        }
    });
    sums
}

/// `[n, groups]` values in `order`, padded with zeros.
fn ordered<T: Copy + Default>(values: &[T], groups: usize, order: Order) -> Vec<T> {
    let Order::ByGroup { n_pad } = order else { return values.to_vec() };
    let mut transposed = vec![T::default(); groups * n_pad];
    for (r, row) in values.chunks_exact(groups).enumerate() {
        for (g, &value) in row.iter().enumerate() {
            transposed[g * n_pad + r] = value;
        }
    }
    transposed
}

/// Where in a 32-bit word the code of row `g + 8 * r` and column `i` (of four) lies: nibble `[r][i]`.
pub(super) type Nibbles = [[u32; 4]; 2];
/// Columns 0 1 of a row are the low and high half of a word once it is masked by 0x000f000f; then columns 2 3.
pub(super) const NIBBLES_16BIT: Nibbles = [[0, 4, 2, 6], [1, 5, 3, 7]];
/// Columns 0 1 2 3 of a row are the bytes of a word once it is masked by 0x0f0f0f0f.
pub(super) const NIBBLES_8BIT: Nibbles = [[0, 2, 4, 6], [1, 3, 5, 7]];
/// Columns 0 1 2 3 of a row are the four nibbles of a half word, the selector of a byte permutation.
pub(super) const NIBBLES_CODEBOOK: Nibbles = [[0, 1, 2, 3], [4, 5, 6, 7]];

/// 4-bit codes `[n, k]` in tiles of 16 x 64 (512 bytes), the tiles of 16 rows one after the other.
fn fragments4(n: usize, k: usize, codes: &[u8], nibbles: Nibbles) -> Vec<u8> {
    let slices = k.div_ceil(64);
    let mut bytes = vec![0; padded_n(n) / 16 * slices * 512];
    bytes.par_chunks_mut(slices * 512).enumerate().for_each(|(tile, bytes)| {
        for (at, word) in bytes.chunks_exact_mut(4).enumerate() {
            let (slice, lane, j) = (at / 128, at / 4 % 32, at % 4);
            let first = slice * 64 + j / 2 * 32 + lane % 4 * 8 + j % 2 * 4;
            let mut value = 0u32;
            for (half, nibbles) in nibbles.iter().enumerate() {
                let row = tile * 16 + half * 8 + lane / 4;
                if row >= n || first >= k {
                    continue;
                }
                let columns = &codes[row * k + first..row * k + k.min(first + 4)];
                for (&code, nibble) in columns.iter().zip(nibbles) {
                    value |= u32::from(code) << (4 * nibble);
                }
            }
            word.copy_from_slice(&value.to_le_bytes());
        }
    });
    bytes
}

/// 8-bit codes `[n, k]` in tiles of 16 x 32 (512 bytes), k padded to 64.
fn fragments8(n: usize, k: usize, codes: &[u8]) -> Vec<u8> {
    let slices = k.div_ceil(64) * 2;
    let mut bytes = vec![0; padded_n(n) / 16 * slices * 512];
    bytes.par_chunks_mut(slices * 512).enumerate().for_each(|(tile, bytes)| {
        for (at, to) in bytes.chunks_exact_mut(8).enumerate() {
            let (slice, lane, half) = (at / 64, at / 2 % 32, at % 2);
            let (row, first) = (tile * 16 + half * 8 + lane / 4, slice * 32 + lane % 4 * 8);
            if row < n && first < k {
                let columns = &codes[row * k + first..row * k + k.min(first + 8)];
                to[..columns.len()].copy_from_slice(columns);
            }
        }
    });
    bytes
}

#[cfg(test)]
#[path = "pack_tests.rs"]
mod tests;
