//! Bytes of a packed weight that is not there yet, for memory plans.

use super::families::first_family;
use super::family::{GemmFamily, Target};
use super::packed::{Order, Parameters};
use crate::dtype::{DType, HostData};
use crate::quant::{LinearWeight, QuantWeight, Scheme, Weight};

/// Rows of a specimen: those of a block of any layout.
const ROWS: usize = 64;

/// Bytes in GPU memory of an `[n, k]` weight of `scheme` without a bias, whose scales are floats of the activation type and
/// whose codes are where codes of its bits usually are: what packing it takes, to the byte. Found by asking the families for the
/// layout of a specimen of few rows. `dtype` is that of activations; `sm90`: kernels of sm_90a are there to be used.
pub(crate) fn packed_bytes(scheme: &Scheme, n: usize, k: usize, dtype: DType, sm90: bool) -> usize {
    let target = Target { sm90, dtype };
    let specimen = specimen(scheme, k);
    first_family!(&specimen, target, family => bytes(family, &specimen, n, k, target))
}

fn bytes<F: GemmFamily>(family: F, specimen: &LinearWeight, n: usize, k: usize, target: Target) -> usize {
    let codes = family.code_bytes(n, k);
    let Weight::Quant(q) = &specimen.weight else { return codes };
    let recipe = family.recipe(q, target.dtype);
    let Some(Parameters { order, zero_points, sums }) = recipe.parameters else { return codes };
    let groups = if recipe.row_scales.is_some() { 1 } else { q.groups() };
    let zero_point_bytes = match order {
        Order::ByRow => 4,
        Order::ByGroup { .. } => 2,
    };
    let each = 4 + if zero_points { zero_point_bytes } else { 0 } + if sums { 4 } else { 0 };
    codes + order.lines(n) * groups * each
}

/// A weight of few rows as quantizers make them: groups of different zero points where these are not the middle.
fn specimen(scheme: &Scheme, k: usize) -> LinearWeight {
    let activation = scheme.activation;
    if scheme.is_dense() {
        let data = HostData::zeros(DType::BF16, ROWS * k);
        return LinearWeight { weight: Weight::Dense { n: ROWS, k, data }, bias: None, activation };
    }
    let bits = scheme.weight_bits;
    let group_size = scheme.group_size.unwrap_or(k);
    let groups = k.div_ceil(group_size);
    let middle = 1u16 << (bits - 1);
    let zero = |i: usize| match (scheme.symmetric, scheme.encoding.is_affine()) {
        (_, false) => 0.0,
        (true, true) => f32::from(middle),
        (false, true) => f32::from(middle) - (i % 2) as f32,
    };
    let q = QuantWeight {
        n: ROWS,
        k,
        bits,
        group_size,
        codes: vec![(middle - 1) as u8; ROWS * k].into(),
        // No two of a row are multiples of each other, which would be factors (QServe).
        scales: (0..ROWS * groups).map(|i| 0.5 + (i % 7) as f32 / 16.0).collect(),
        zeros: (0..ROWS * groups).map(zero).collect(),
        order: None,
        encoding: scheme.encoding,
    };
    LinearWeight { weight: Weight::Quant(q), bias: None, activation }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::ActQuant;

    /// By hand, from the layouts of docs/formats.md.
    #[test]
    fn bytes_are_those_of_the_documented_layouts() {
        let (sm80, sm90) = (false, true);
        let packed_bytes = |scheme: &Scheme, n, k, sm90| super::packed_bytes(scheme, n, k, DType::BF16, sm90);
        let dense = Scheme::dense(DType::BF16);
        let w4 = Scheme { weight_bits: 4, group_size: Some(128), ..dense };
        let (n, k) = (1000, 512);
        // Blocks of 64 x 128 with 64 16-bit scales; fragments of 16 rows, an f32 a group.
        assert_eq!(packed_bytes(&w4, n, k, sm90), 16 * 4 * (64 * 128 / 2 + 128));
        assert_eq!(packed_bytes(&w4, n, k, sm80), 1008 * 512 / 2 + 1008 * 4 * 4);
        let asymmetric = Scheme { symmetric: false, ..w4 };
        assert_eq!(packed_bytes(&asymmetric, n, k, sm90), 16 * 4 * (64 * 128 / 2 + 2 * 128));
        assert_eq!(packed_bytes(&asymmetric, n, k, sm80), 1008 * 512 / 2 + 1008 * 4 * (4 + 2));
        let w8a8 = Scheme { weight_bits: 8, activation: ActQuant::DynamicPerToken, ..dense };
        // Scales and sums of rows, padded to 256 on sm_90.
        assert_eq!(packed_bytes(&w8a8, n, k, sm90), 1024 * 512 + 1024 * 8);
        assert_eq!(packed_bytes(&w8a8, n, k, sm80), 1000 * 512 + 1000 * 8);
        assert_eq!(packed_bytes(&dense, n, k, sm90), 2 * 1000 * 512);
        // Ternary: two bits on sm_90, four before.
        let ternary = Scheme { weight_bits: 2, ..w8a8 };
        assert_eq!(packed_bytes(&ternary, n, k, sm90), 1024 * 512 / 4 + 1024 * 4);
        assert_eq!(packed_bytes(&ternary, n, k, sm80), 1008 * 512 / 2 + 1008 * 4);
    }
}
