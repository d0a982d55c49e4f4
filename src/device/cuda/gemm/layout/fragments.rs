//! Codes in fragment order: sixteen bytes feed one lane of a tensor-core operand before sm_90 (docs/formats.md, "Kernel layouts").

use rayon::prelude::*;

/// Outputs of a tile in fragment order.
pub(crate) const TILE: usize = 16;

/// Outputs of a weight in fragment order: whole tiles of 16.
pub(crate) fn padded_n(n: usize) -> usize {
    n.next_multiple_of(TILE)
}

/// Bytes of `[n, k]` codes of `bits` in fragment order.
pub(crate) fn fragment_bytes(n: usize, k: usize, bits: usize) -> usize {
    padded_n(n) * k.next_multiple_of(64) * bits / 8
}

/// Where in a 32-bit word the code of row `g + 8 * r` and column `i` (of four) lies: nibble `[r][i]`.
pub(crate) type Nibbles = [[u32; 4]; 2];
/// Columns 0 1 of a row are the low and high half of a word once it is masked by 0x000f000f; then columns 2 3.
pub(crate) const NIBBLES_16BIT: Nibbles = [[0, 4, 2, 6], [1, 5, 3, 7]];
/// Columns 0 1 2 3 of a row are the bytes of a word once it is masked by 0x0f0f0f0f.
pub(crate) const NIBBLES_8BIT: Nibbles = [[0, 2, 4, 6], [1, 3, 5, 7]];
/// Columns 0 1 2 3 of a row are the four nibbles of a half word, the selector of a byte permutation.
pub(crate) const NIBBLES_CODEBOOK: Nibbles = [[0, 1, 2, 3], [4, 5, 6, 7]];

/// 4-bit codes `[n, k]` in tiles of 16 x 64 (512 bytes), the tiles of 16 rows one after the other.
pub(crate) fn fragments4(n: usize, k: usize, codes: &[u8], nibbles: Nibbles) -> Vec<u8> {
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
pub(crate) fn fragments8(n: usize, k: usize, codes: &[u8]) -> Vec<u8> {
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
