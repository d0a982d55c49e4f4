//! Outliers of LLM.int8() between the op that emits a row and the linear layer that reads it: a bit for each column, and
//! the values among the row's floats.

use crate::device::LinearInput;

/// Marks the nonzero elements of `outliers` `[m, k]` in `bits` `[m, ceil(k / 32)]`, lowest bit first.
pub(super) fn mark(outliers: &[f32], k: usize, bits: &mut [u32]) {
    for (row, bits) in outliers.chunks_exact(k).zip(bits.chunks_exact_mut(LinearInput::outlier_words(k))) {
        for (columns, word) in row.chunks(32).zip(bits) {
            *word = columns.iter().enumerate().fold(0, |word, (i, &x)| word | u32::from(x != 0.0) << i);
        }
    }
}

/// The inverse of [`mark`]: `floats` `[m, k]` where they are marked, else 0.
pub(super) fn values(bits: &[u32], floats: &[f32], k: usize) -> Vec<f32> {
    let row = |(bits, floats): (&[u32], &[f32])| -> Vec<f32> {
        let is_marked = |c: usize| bits[c / 32] >> (c % 32) & 1 == 1;
        floats.iter().enumerate().map(|(c, &x)| if is_marked(c) { x } else { 0.0 }).collect()
    };
    bits.chunks_exact(LinearInput::outlier_words(k)).zip(floats.chunks_exact(k)).flat_map(row).collect()
}
