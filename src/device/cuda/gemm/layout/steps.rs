//! Codes minus their zero points, as int8.

use rayon::prelude::*;

use crate::quant::QuantWeight;

/// Row `r`'s codes minus the zero points of their groups.
fn row_steps(q: &QuantWeight, r: usize) -> impl Iterator<Item = i32> {
    let zeros = &q.zeros[r * q.groups()..];
    q.codes[r * q.k..(r + 1) * q.k]
        .chunks(q.group_size)
        .zip(zeros)
        .flat_map(|(codes, &zero)| codes.iter().map(move |&code| i32::from(code) - zero as i32))
}

/// True when every code minus its zero point is an int8. All are, at up to 7 bits and at 8 bits about the middle.
pub(crate) fn steps_fit_i8(q: &QuantWeight) -> bool {
    let all_fit = || {
        let _unpacked: &[u8] = &q.codes;
        (0..q.n).into_par_iter().all(|r| row_steps(q, r).all(|s| i8::try_from(s).is_ok()))
    };
    q.bits < 8 || q.is_symmetric() || all_fit()
}

/// `[n, k]` code minus zero point, which [`steps_fit_i8`].
pub(crate) fn steps(q: &QuantWeight) -> Vec<i8> {
    let mut steps = vec![0; q.n * q.k];
    steps.par_chunks_mut(q.k).enumerate().for_each(|(r, row)| {
        for (to, step) in row.iter_mut().zip(row_steps(q, r)) {
            *to = step as i8;
        }
    });
    steps
}
