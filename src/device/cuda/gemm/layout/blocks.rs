//! Blocks of 64 rows x 128 columns, which kernels of sm_90 fetch whole (docs/formats.md, "Kernel layouts").

use rayon::prelude::*;

use crate::device::cuda::embedded::abi;
use crate::quant::QuantWeight;

/// Rows and columns of a block.
pub(crate) const ROWS: usize = abi::LOWBIT_BLOCK_ROWS as usize;
pub(crate) const COLUMNS: usize = abi::LOWBIT_BLOCK_COLUMNS as usize;

/// Code minus zero point, which fits an int8, one zero point a row, in blocks of 64 rows x 128 columns, those of the
/// same rows one after the other; within a block, chunk `c` of 16 columns of row `r` lies at chunk `c ^ (r % 8)`.
pub(crate) fn blocks8(q: &QuantWeight) -> Vec<i8> {
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

/// Blocks of an `[n, k]` weight.
pub(crate) fn block_count(n: usize, k: usize) -> usize {
    n.div_ceil(ROWS) * k.div_ceil(COLUMNS)
}
