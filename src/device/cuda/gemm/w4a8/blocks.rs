//! Weights of 4 or 2 bits in blocks of 64 rows x 128 columns, each with the scales or factors of its groups beside its codes:
//! what gemm_w4a8/sm90, gemm_w4a8/factored/sm90 and gemm_w4a8/w2a8/sm90 read (docs/formats.md, "Kernel layouts").

use rayon::prelude::*;

use crate::device::cuda::gemm::layout::blocks::{COLUMNS, ROWS};
use crate::quant::{Factored, QuantWeight};

/// Most columns of a group: 255 steps of x, times 16 * 8 or 64 * 2 of w, stay inside an int32.
const MOST_COLUMNS: usize = (i32::MAX / (255 * 128)) as usize;

/// What a block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NibbleShape {
    /// Of a code: 2 where there is one group and codes minus zero points are within -2 to 1, else 4.
    pub(crate) bits: usize,
    /// One scale an output, which does not lie in blocks.
    pub(crate) one_group: bool,
    /// Groups are factors of that scale: codes are unsigned then.
    pub(crate) factors: bool,
    /// Groups of a block, of equally many columns: 1, 2 or 4.
    pub(crate) groups: usize,
    /// Blocks of a group.
    pub(crate) group_blocks: usize,
}

impl NibbleShape {
    /// The shape of `q`'s blocks. `None` where the layout does not hold `q`: more than 4 bits, a code minus its zero point outside -8 to 7,
    /// groups other than all of k, 32, 64 and multiples of 128 columns, k no multiple of 16, and scales of which a
    /// sixteenth is not exact.
    pub(crate) fn of(q: &QuantWeight) -> Option<Self> {
        let one_group = q.groups() == 1;
        let columns = q.group_size.min(q.k);
        let (groups, group_blocks) = match columns {
            _ if one_group => (1, q.k.div_ceil(COLUMNS)),
            32 => (4, 1),
            64 => (2, 1),
            _ if columns.is_multiple_of(COLUMNS) => (1, columns / COLUMNS),
            _ => return None,
        };
        if Factored::of(q).is_some() {
            let group_blocks = q.k.div_ceil(COLUMNS);
            return Some(NibbleShape { bits: 4, one_group: true, factors: true, groups: 1, group_blocks });
        }
        let fits = q.bits <= 4 && q.encoding.is_affine() && q.k.is_multiple_of(16) && columns <= MOST_COLUMNS;
        let exact = |&scale: &f32| one_group || sixteenth(scale) * 16.0 == scale;
        // Codes of a file that are all about the middle need not be looked at.
        let all_fit = |half: u8| {
            let _unpacked: &[u8] = &q.codes;
            (0..q.n).into_par_iter().all(|r| row_fits(q, r, half))
        };
        if !fits || !q.scales.par_iter().all(exact) || !(q.is_symmetric() || all_fit(8)) {
            return None;
        }
        let is_narrow = one_group && q.bits == 2 && (q.is_symmetric() || all_fit(2));
        Some(NibbleShape { bits: if is_narrow { 2 } else { 4 }, one_group, factors: false, groups, group_blocks })
    }

    /// Bytes of a block's codes.
    fn code_bytes(&self) -> usize {
        ROWS * COLUMNS * self.bits / 8
    }

    /// Bytes of a block.
    pub(crate) fn bytes(&self) -> usize {
        let beside = match self {
            NibbleShape { factors: true, .. } => ROWS * 2,
            NibbleShape { one_group: true, .. } => 0,
            _ => self.groups * ROWS * 4,
        };
        self.code_bytes() + beside
    }

    /// `q`'s blocks: those of rows 0 to 63 in ascending columns, then those of the next rows. What lies beyond `q` is 0.
    /// `factored` where the shape has factors.
    pub(crate) fn pack(&self, q: &QuantWeight, factored: Option<&Factored>) -> Vec<u8> {
        let row_bytes = q.k.div_ceil(COLUMNS) * self.bytes();
        let mut bytes = vec![0; q.n.div_ceil(ROWS) * row_bytes];
        bytes.par_chunks_mut(row_bytes).enumerate().for_each(|(row_block, bytes)| {
            for (k_block, bytes) in bytes.chunks_exact_mut(self.bytes()).enumerate() {
                let (codes, scales) = bytes.split_at_mut(self.code_bytes());
                self.pack_codes(q, row_block * ROWS, k_block * COLUMNS, codes);
                match factored {
                    Some(factored) => pack_factors(q, factored, row_block * ROWS, k_block * COLUMNS, scales),
                    None => self.pack_scales(q, row_block * ROWS, k_block * COLUMNS, scales),
                }
            }
        });
        bytes
    }

    /// A thread's sixteen bytes follow each other, those of 128 threads make 2 KB: 64 columns of 4 bits or 128 of 2 bits.
    fn pack_codes(&self, q: &QuantWeight, first_row: usize, first_column: usize, bytes: &mut [u8]) {
        let step = |row: usize, column: usize| {
            if row >= q.n {
                return 0;
            }
            let zero = q.zeros[row * q.groups() + column.min(q.k - 1) / q.group_size];
            // With factors the code of zero is not 0.
            let code = if column < q.k { f32::from(q.codes[row * q.k + column]) } else { zero };
            (if self.factors { code } else { code - zero }) as i32 as u8 & ((1 << self.bits) - 1)
        };
        // Columns of a word, of which a code is of every sixteen.
        let word_columns = 64 / self.bits;
        for (at, byte) in bytes.iter_mut().enumerate() {
            let (half, thread, word) = (at / 2048, at / 16 % 128, at / 4 % 4);
            let row = first_row + thread / 32 * 16 + thread % 32 / 4;
            let column = first_column + half * 64 + word * word_columns + thread % 4 * 4 + at % 4;
            *byte = (0..8 / self.bits)
                .fold(0, |byte, i| byte | step(row + i % 2 * 8, column + i / 2 * 16) << (i * self.bits));
        }
    }

    /// For each group sixteenths of 64 scales, in pairs of outputs 8 apart.
    fn pack_scales(&self, q: &QuantWeight, first_row: usize, first_column: usize, bytes: &mut [u8]) {
        for (at, value) in bytes.chunks_exact_mut(4).enumerate() {
            let (group, i) = (at / ROWS, at % ROWS);
            let row = first_row + in_pairs(i);
            let column = first_column + group * (COLUMNS / self.groups);
            if row < q.n && column < q.k {
                let scale = q.scales[row * q.groups() + column / q.group_size];
                value.copy_from_slice(&sixteenth(scale).to_le_bytes());
            }
        }
    }
}

/// For each of 64 outputs, in pairs 8 apart, the factor of the block's group and its product with the zero point.
fn pack_factors(q: &QuantWeight, factored: &Factored, first_row: usize, column: usize, bytes: &mut [u8]) {
    for (i, bytes) in bytes.chunks_exact_mut(2).enumerate() {
        let row = first_row + in_pairs(i);
        if row < q.n {
            let group = row * q.groups() + column / q.group_size;
            let factor = factored.factors[group];
            bytes.copy_from_slice(&[factor, factor * q.zeros[group] as u8]);
        }
    }
}

/// Of 64 outputs in pairs 8 apart, the one at place `i`.
fn in_pairs(i: usize) -> usize {
    i / 16 * 16 + i % 2 * 8 + i / 2 % 8
}

fn sixteenth(scale: f32) -> f32 {
    scale * 0.0625
}

/// Row `r`'s codes minus their zero points are within `-half` to `half - 1`.
fn row_fits(q: &QuantWeight, r: usize, half: u8) -> bool {
    let (groups, codes) = (q.groups(), &q.codes[r * q.k..(r + 1) * q.k]);
    let steps = -f32::from(half)..f32::from(half);
    codes.chunks(q.group_size).zip(&q.zeros[r * groups..]).all(|(codes, &zero)| {
        zero.fract() == 0.0 && codes.iter().all(|&code| steps.contains(&(f32::from(code) - zero)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::Encoding;

    fn weight(n: usize, k: usize, bits: u8, group_size: usize) -> QuantWeight {
        let groups = k.div_ceil(group_size);
        QuantWeight {
            n,
            k,
            bits,
            group_size,
            codes: (0..n * k).map(|i| ((i * 2_654_435_761_usize) >> 7) as u8 & ((1u16 << bits) - 1) as u8).collect(),
            scales: (0..n * groups).map(|i| 0.1 * (1.0 + i as f32)).collect(),
            zeros: vec![f32::from(1u8 << (bits - 1)); n * groups],
            order: None,
            encoding: Encoding::Affine,
        }
    }

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[4 * at..4 * at + 4].try_into().expect("four bytes"))
    }

    #[test]
    fn worked_block_is_as_documented() {
        let q = QuantWeight {
            codes: (0..64 * 128).map(|i| ((i / 128 + i % 128) % 16) as u8).collect(),
            scales: (0..64).map(|r| (r + 1) as f32).collect(),
            // Two groups, so that scales lie in blocks.
            ..weight(64, 128, 4, 128)
        };
        let q = QuantWeight {
            k: 256,
            codes: q.codes.chunks(128).flat_map(|row| [row, row].concat()).collect(),
            scales: q.scales.iter().flat_map(|&s| [s, s * 1.0625]).collect(),
            zeros: vec![8.0; 128],
            ..q
        };
        let shape = NibbleShape::of(&q).expect("a block holds it");
        assert_eq!(shape, NibbleShape { bits: 4, one_group: false, factors: false, groups: 1, group_blocks: 1 });
        let bytes = shape.pack(&q, None);
        assert_eq!(bytes.len(), 2 * (4096 + 256));
        // Thread 0: rows 0 and 8, columns 0 to 3. Thread 5: rows 1 and 9, columns 4 to 7.
        assert_eq!(word(&bytes, 0), 0x3b2a_1908);
        assert_eq!(word(&bytes, 4 * 5), 0x807f_6e5d);
        // Sixteenths of the scales of rows 0 and 8: 1 and 9.
        assert_eq!((word(&bytes, 1024), word(&bytes, 1025)), ((1.0f32 / 16.0).to_bits(), (9.0f32 / 16.0).to_bits()));
    }

    /// Every code and scale comes back by the formulas of docs/formats.md, whatever the shape, and padding is 0.
    #[test]
    fn every_value_is_where_the_formulas_say() {
        for (n, k, group_size, bits) in [
            (1, 16, 16, 4),
            (70, 144, 32, 4),
            (65, 272, 64, 3),
            (130, 400, 128, 4),
            (64, 768, 256, 2),
            (33, 144, 144, 4),
            (33, 144, 144, 2),
            (70, 1040, 1040, 2),
        ] {
            let q = weight(n, k, bits, group_size);
            let shape = NibbleShape::of(&q).expect("a block holds it");
            let bytes = shape.pack(&q, None);
            let k_blocks = k.div_ceil(128);
            assert!(!shape.factors);
            assert_eq!(shape.bits, if bits == 2 && group_size == k { 2 } else { 4 });
            assert_eq!(bytes.len(), n.div_ceil(64) * k_blocks * shape.bytes());
            for row in 0..n.next_multiple_of(64) {
                for column in 0..k.next_multiple_of(128) {
                    let block = &bytes[(row / 64 * k_blocks + column / 128) * shape.bytes()..];
                    let (r, c) = (row % 64, column % 128);
                    let thread = r / 16 * 32 + r % 8 * 4 + c % 16 / 4;
                    let (place, code) = match shape.bits {
                        2 => (c / 32, c % 32 / 16 * 2 + r % 16 / 8),
                        _ => (c / 64 * 512 + c % 64 / 16, r % 16 / 8),
                    };
                    let byte = block[place * 4 + thread * 16 + c % 4];
                    let mask = (1 << shape.bits) - 1;
                    let packed = byte >> (code * shape.bits) & mask;
                    let inside = row < n && column < k;
                    let step = if inside { i32::from(q.codes[row * k + column]) - (1 << (bits - 1)) } else { 0 };
                    assert_eq!(packed, step as u8 & mask, "{n} x {k}, {bits} bits: row {row}, column {column}");
                    if !shape.one_group && inside {
                        let at = c * shape.groups / 128 * 64 + r / 16 * 16 + r % 8 * 2 + r % 16 / 8;
                        let scale = f32::from_bits(word(block, 1024 + at)) * 16.0;
                        assert_eq!(scale, q.scales[row * k.div_ceil(group_size) + column / group_size]);
                    }
                }
            }
        }
    }

    /// What a thread multiplies by and adds to bytes of codes gives its weights plus 128, in padding too.
    #[test]
    fn factors_lie_behind_unsigned_codes() {
        for (n, k, group_size) in [(1, 144, 128), (70, 400, 128), (33, 1040, 256)] {
            let mut q = weight(n, k, 4, group_size);
            let groups = q.groups();
            q.scales = (0..n * groups).map(|i| 0.25 * (1 + i % 7) as f32).collect();
            q.zeros = (0..n * groups).map(|i| (i % 16) as f32).collect();
            let factored = Factored::of(&q).expect("multiples of a quarter");
            let shape = NibbleShape::of(&q).expect("a block holds it");
            let k_blocks = k.div_ceil(128);
            assert_eq!(
                shape,
                NibbleShape { bits: 4, one_group: true, factors: true, groups: 1, group_blocks: k_blocks }
            );
            let bytes = shape.pack(&q, Some(&factored));
            assert_eq!(bytes.len(), n.div_ceil(64) * k_blocks * (4096 + 128));
            for row in 0..n.next_multiple_of(64) {
                for column in 0..k.next_multiple_of(128) {
                    let block = &bytes[(row / 64 * k_blocks + column / 128) * shape.bytes()..];
                    let (r, c) = (row % 64, column % 128);
                    let thread = r / 16 * 32 + r % 8 * 4 + c % 16 / 4;
                    let byte = block[(c / 64 * 512 + c % 64 / 16) * 4 + thread * 16 + c % 4];
                    let code = i32::from(byte >> (r % 16 / 8 * 4) & 15);
                    let at = 4096 + 2 * (r / 16 * 16 + r % 8 * 2 + r % 16 / 8);
                    let got = f32::from(block[at]) * code as f32 - f32::from(block[at + 1]);
                    let inside = row < n && column < k;
                    let group = row * groups + column.min(k - 1) / group_size;
                    let expected = if inside { f32::from(q.codes[row * k + column]) - q.zeros[group] } else { 0.0 };
                    let scale = if inside { q.scales[group] / factored.scales[row] } else { 1.0 };
                    assert_eq!(got, expected * scale, "{n} x {k}: row {row}, column {column}");
                }
            }
        }
    }

    #[test]
    fn what_a_block_does_not_hold_is_refused() {
        let holds = |q: &QuantWeight| NibbleShape::of(q).is_some();
        let q = weight(4, 256, 4, 64);
        assert!(holds(&q));
        assert!(!holds(&weight(4, 192, 4, 96)), "groups that neither fill blocks nor divide them");
        assert!(!holds(&weight(4, 264, 4, 264)), "rows of x that do not start on 16 bytes");
        assert!(!holds(&QuantWeight { zeros: vec![7.0; 16], ..q.clone() }), "15 - 7 is no nibble");
        assert!(holds(&QuantWeight { zeros: vec![3.0; 16], bits: 3, codes: vec![7; 1024].into(), ..q.clone() }));
        assert!(!holds(&QuantWeight { scales: vec![1.0e-44; 16], ..q.clone() }), "sixteenths are rounded");
        assert!(!holds(&QuantWeight { scales: vec![f32::NAN; 16], ..q }));
        assert!(holds(&weight(1, MOST_COLUMNS / 16 * 16, 4, MOST_COLUMNS / 16 * 16)));
        assert!(!holds(&weight(1, 65_808, 4, 65_808)), "sums leave an int32");
    }
}
