//! Values in another order: columns sorted by quantization group, so that groups are contiguous (act-order), and matrices
//! transposed.

use rayon::prelude::*;

use crate::quant::QuantWeight;

/// The stable order of columns by group; `None` when `g_idx` is `c / group_size` already.
///
/// # Errors
/// When a group is out of range or has another number of columns than `group_size` (the last: what is left).
pub(super) fn sort_by_group(g_idx: &[i64], group_size: usize) -> Result<Option<Vec<u32>>, String> {
    let k = g_idx.len();
    if g_idx.iter().enumerate().all(|(c, &g)| g == (c / group_size) as i64) {
        return Ok(None);
    }
    let groups = k.div_ceil(group_size);
    if let Some((c, g)) = g_idx.iter().enumerate().find(|(_, g)| !(0..groups as i64).contains(*g)) {
        return Err(format!("column {c} is in group {g}; expected 0 to {}", groups - 1));
    }
    let mut order: Vec<u32> = (0..k as u32).collect();
    order.sort_by_key(|&c| g_idx[c as usize]);
    let out_of_place = order.iter().enumerate().find(|&(c, &from)| g_idx[from as usize] != (c / group_size) as i64);
    match out_of_place {
        None => Ok(Some(order)),
        Some((c, _)) => Err(format!("group {} has not {group_size} columns, its group size", c / group_size)),
    }
}

/// Puts the columns of `weight`, which are in the layer's own order, into `order`.
pub(super) fn apply(weight: &mut QuantWeight, order: Vec<u32>) {
    weight.codes.gather_columns(&order);
    weight.order = Some(order);
}

/// A `[rows, columns]` matrix as `[columns, rows]`.
pub(super) fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows * columns];
    let lines = out.par_chunks_mut(rows.max(1)).enumerate();
    lines.for_each(|(c, line)| line.iter_mut().enumerate().for_each(|(r, to)| *to = values[r * columns + c]));
    out
}
