//! Quantized weights in blocks of 64 rows x 128 columns, each with the scales and zero points of its groups beside its
//! codes: what gemm_w4a16/sm90 reads (docs/formats.md, "Kernel layouts").

use half::{bf16, f16};
use rayon::prelude::*;

use super::codes::{Codes, largest};
use crate::device::cuda::gemm::layout::blocks::{COLUMNS, ROWS};
use crate::device::cuda::gemm::layout::e4m3::arrange;
use crate::dtype::DType;
use crate::quant::QuantWeight;

/// Sizes of scales that the kernels may multiply into bf16 weights while making them of codes, which takes 2^-32 off
/// (kernels/gemm_w4a16/sm90_block.cuh); scales beyond take the way of those in two parts.
const FUSED_SCALES: std::ops::Range<f32> = 1.0 / (1u64 << 60) as f32..(1u64 << 26) as f32;

/// What a block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlockShape {
    /// What codes stand for.
    pub(crate) codes: Codes,
    /// Groups, of equally many columns: 1, 2 or 4.
    pub(crate) groups: usize,
    /// Scales are the sum of two 16-bit floats; else one is enough, and of a usual size.
    pub(crate) low_scales: bool,
    /// Groups have zero points of their own.
    pub(crate) zero_points: bool,
}

impl BlockShape {
    /// The shape of `q`'s blocks for activations of `dtype` (`F16` or `BF16`). `None` where the layout does not hold `q`:
    /// codebooks, groups that are neither all of k nor a multiple of 32, zero points that are not whole, k no multiple of
    /// 8, and scales so small or large that two 16-bit floats do not give them within 2^-17 of their size.
    pub(crate) fn of(q: &QuantWeight, dtype: DType) -> Option<Self> {
        let per_channel = q.groups() == 1;
        let whole_groups = per_channel || q.group_size.is_multiple_of(32);
        let codes = Codes::of(q);
        if codes == Codes::Codebook4
            || !whole_groups
            || !q.k.is_multiple_of(8)
            || q.zeros.par_iter().any(|z| z.fract() != 0.0)
        {
            return None;
        }
        let largest = largest(q);
        let scales = q.scales.par_iter().map(|&scale| Held::of(scale, largest, dtype)).max()?;
        if scales == Held::Not {
            return None;
        }
        let groups = match q.group_size {
            _ if per_channel => 1,
            g if g.is_multiple_of(128) => 1,
            g if g.is_multiple_of(64) => 2,
            _ => 4,
        };
        Some(BlockShape {
            codes,
            groups,
            low_scales: scales == Held::InTwo,
            zero_points: q.zeros.par_iter().any(|&z| z != q.zeros[0]),
        })
    }

    /// Bytes of a block.
    pub(crate) fn bytes(&self) -> usize {
        self.code_bytes() + self.groups * self.planes() * 128
    }

    fn code_bytes(&self) -> usize {
        ROWS * COLUMNS * self.codes.bits() / 8
    }

    /// Sets of 64 16-bit values beside the codes, for each group.
    fn planes(&self) -> usize {
        1 + usize::from(self.low_scales) + usize::from(self.zero_points)
    }

    /// `q`'s blocks: those of rows 0 to 63 in ascending columns, then those of the next rows. What lies beyond `q` is 0.
    pub(crate) fn pack(&self, q: &QuantWeight, dtype: DType) -> Vec<u8> {
        let k_blocks = q.k.div_ceil(COLUMNS);
        let row_bytes = k_blocks * self.bytes();
        let mut bytes = vec![0; q.n.div_ceil(ROWS) * row_bytes];
        bytes.par_chunks_mut(row_bytes).enumerate().for_each(|(row_block, bytes)| {
            for (k_block, bytes) in bytes.chunks_exact_mut(self.bytes()).enumerate() {
                let (codes, parameters) = bytes.split_at_mut(self.code_bytes());
                self.pack_codes(q, dtype, row_block * ROWS, k_block * COLUMNS, codes);
                self.pack_parameters(q, dtype, row_block * ROWS, k_block * COLUMNS, parameters);
            }
        });
        bytes
    }

    /// A thread's sixteen bytes follow each other, those of 128 threads make 2 KB: 64 columns of 4 bits, 32 of 8 bits.
    fn pack_codes(&self, q: &QuantWeight, dtype: DType, first_row: usize, first_column: usize, bytes: &mut [u8]) {
        for (at, word) in bytes.chunks_exact_mut(4).enumerate() {
            let (part, thread, j) = (at / 512, at / 4 % 128, at % 4);
            let (warp, g, t) = (thread / 32, thread % 32 / 4, thread % 4);
            let is_nibbles = self.codes.bits() == 4;
            let step = if is_nibbles { 4 * part + j } else { 2 * part + j % 2 };
            let code = |half: usize, i: usize| {
                let row = first_row + warp * 16 + half * 8 + g;
                let column = first_column + step * 16 + i / 2 * 8 + 2 * t + i % 2;
                if row < q.n && column < q.k { u32::from(q.codes[row * q.k + column]) } else { 0 }
            };
            let value: u32 = match self.codes {
                _ if is_nibbles => {
                    (0..8).map(|i| code(i % 2, i / 2) << (4 * (i % 2 + 2 * (i / 4) + 4 * (i / 2 % 2)))).sum()
                }
                Codes::E4m3 => arrange(std::array::from_fn(|i| code(j / 2, i) as u8), dtype),
                _ => (0..4).map(|i| code(j / 2, i) << (8 * i)).sum(),
            };
            word.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// For each group its planes: words of two rows, 8 apart.
    fn pack_parameters(&self, q: &QuantWeight, dtype: DType, first_row: usize, first_column: usize, bytes: &mut [u8]) {
        let groups = q.groups();
        for (at, value) in bytes.chunks_exact_mut(2).enumerate() {
            let (group, plane, i) = (at / 64 / self.planes(), at / 64 % self.planes(), at % 64);
            let row = first_row + i / 16 * 16 + i % 2 * 8 + i / 2 % 8;
            if row >= q.n {
                continue;
            }
            let column = first_column + group * (COLUMNS / self.groups);
            let at = row * groups + (column / q.group_size).min(groups - 1);
            let (high, low) = split(q.scales[at], dtype);
            let bits = match plane {
                0 => high,
                1 if self.low_scales => low,
                _ => q.zeros[at] as u16,
            };
            value.copy_from_slice(&bits.to_le_bytes());
        }
    }
}

/// How blocks hold a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Held {
    /// As one 16-bit float, of a usual size.
    InOne,
    /// As the sum of two.
    InTwo,
    Not,
}

impl Held {
    /// Of a scale whose steps from a zero point are up to `largest`.
    fn of(scale: f32, largest: f32, dtype: DType) -> Held {
        let (high, low) = split(scale, dtype);
        let low = widen(low, dtype);
        let fits = dtype == DType::BF16 || (scale * largest).abs() <= 65504.0;
        let near = (widen(high, dtype) + low - scale).abs() <= scale.abs() / 131_072.0;
        match fits && near {
            false => Held::Not,
            true if low == 0.0 && (scale == 0.0 || FUSED_SCALES.contains(&scale.abs())) => Held::InOne,
            true => Held::InTwo,
        }
    }
}

/// The nearest float of `dtype` and that nearest to the rest, as bits.
fn split(value: f32, dtype: DType) -> (u16, u16) {
    let nearest = |x: f32| if dtype == DType::BF16 { bf16::from_f32(x).to_bits() } else { f16::from_f32(x).to_bits() };
    let high = nearest(value);
    let rest = value - widen(high, dtype);
    (high, if rest == 0.0 { 0 } else { nearest(rest) })
}

fn widen(bits: u16, dtype: DType) -> f32 {
    if dtype == DType::BF16 { bf16::from_bits(bits).to_f32() } else { f16::from_bits(bits).to_f32() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::Encoding;

    /// 4 bits, one group: `code[r, c] = (r + c) mod 16`, the worked block of docs/formats.md.
    fn worked() -> QuantWeight {
        crate::quant::QuantWeight {
            n: 64,
            k: 128,
            bits: 4,
            group_size: 128,
            codes: (0..64 * 128).map(|i| ((i / 128 + i % 128) % 16) as u8).collect(),
            scales: (0..64).map(|r| (r + 1) as f32 / 8.0).collect(),
            zeros: vec![8.0; 64],
            order: None,
            encoding: Encoding::Affine,
        }
    }

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[4 * at..4 * at + 4].try_into().expect("four bytes"))
    }

    #[test]
    fn worked_block_is_as_documented() {
        let q = worked();
        let shape = BlockShape::of(&q, DType::F16).expect("a block holds it");
        assert_eq!(shape, BlockShape { codes: Codes::Uint4, groups: 1, low_scales: false, zero_points: false });
        let bytes = shape.pack(&q, DType::F16);
        assert_eq!(bytes.len(), 4096 + 128);
        // Thread 0: rows 0 and 8, columns 0 1 8 9 of the first sixteen. Thread 5: rows 1 and 9, columns 2 3 10 11.
        assert_eq!(word(&bytes, 0), 0x1991_0880);
        assert_eq!(word(&bytes, 4 * 5), 0x4cc4_3bb3);
        // Scales of rows 0 and 8: 1/8 and 9/8.
        assert_eq!(word(&bytes, 1024), 0x3c80_3000);
    }

    /// Every code, scale and zero point comes back by the formulas of docs/formats.md, whatever the shape.
    #[test]
    fn every_value_is_where_the_formulas_say() {
        for (n, k, group_size, bits) in
            [(1, 8, 8, 4), (70, 136, 32, 4), (65, 264, 64, 8), (130, 392, 96, 8), (64, 256, 256, 2)]
        {
            let groups = usize::div_ceil(k, group_size);
            let q = QuantWeight {
                n,
                k,
                bits,
                group_size,
                codes: (0..n * k)
                    .map(|i| ((i * 2_654_435_761_usize) >> 7) as u8 & ((1u16 << bits) - 1) as u8)
                    .collect(),
                scales: (0..n * groups).map(|i| 0.1 * (1.0 + i as f32)).collect(),
                zeros: (0..n * groups).map(|i| (i % (1 << bits)) as f32).collect(),
                order: None,
                encoding: Encoding::Affine,
            };
            for dtype in [DType::F16, DType::BF16] {
                let shape = BlockShape::of(&q, dtype).expect("a block holds it");
                assert!(shape.low_scales, "tenths are no 16-bit floats");
                let bytes = shape.pack(&q, dtype);
                for row in 0..n {
                    for column in 0..k {
                        let block = &bytes[(row / 64 * k.div_ceil(128) + column / 128) * shape.bytes()..];
                        let (r, c) = (row % 64, column % 128);
                        let (warp, half, g) = (r / 16, r % 16 / 8, r % 8);
                        let (step, t, i) = (c / 16, c % 8 / 2, c % 2 + c % 16 / 8 * 2);
                        let thread = warp * 32 + g * 4 + t;
                        let code = if shape.codes == Codes::Uint4 {
                            let word = word(block, step / 4 * 512 + thread * 4 + step % 4);
                            (word >> (4 * (half + 2 * (i / 2) + 4 * (i % 2))) & 15) as u8
                        } else {
                            block[step / 2 * 2048 + thread * 16 + half * 8 + step % 2 * 4 + i]
                        };
                        assert_eq!(
                            code,
                            q.codes[row * k + column],
                            "{n} x {k}, {bits} bits: row {row}, column {column}"
                        );

                        let at = row * groups + column / group_size;
                        let group = c * shape.groups / 128;
                        let value = |plane: usize| {
                            let at = shape.code_bytes() + (group * shape.planes() + plane) * 128 + (warp * 8 + g) * 4;
                            u16::from_le_bytes([block[at + 2 * half], block[at + 2 * half + 1]])
                        };
                        let scale = widen(value(0), dtype) + widen(value(1), dtype);
                        assert!((scale - q.scales[at]).abs() <= q.scales[at] / 131_072.0, "{scale} {}", q.scales[at]);
                        if shape.zero_points {
                            assert_eq!(f32::from(value(2)), q.zeros[at]);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_a_block_does_not_hold_is_refused() {
        let odd_k = QuantWeight { k: 12, group_size: 12, codes: vec![0; 64 * 12].into(), ..worked() };
        assert_eq!(BlockShape::of(&odd_k, DType::F16), None);
        let fractional = QuantWeight { zeros: vec![7.5; 64], ..worked() };
        assert_eq!(BlockShape::of(&fractional, DType::BF16), None);
        let tiny = QuantWeight { scales: vec![3.3e-7; 64], ..worked() };
        assert_eq!(BlockShape::of(&tiny, DType::F16), None);
        assert!(BlockShape::of(&tiny, DType::BF16).is_some_and(|shape| shape.low_scales));
        let huge = QuantWeight { scales: vec![(1u64 << 30) as f32; 64], ..worked() };
        assert!(BlockShape::of(&huge, DType::BF16).is_some_and(|shape| shape.low_scales), "no room for 2^-32");
        let large = QuantWeight { scales: vec![8192.0; 64], ..worked() };
        assert_eq!(BlockShape::of(&large, DType::F16), None, "15 * 8192 is beyond f16");
    }
}
