//! Groups whose scales are whole multiples of one scale a row: progressive group quantization (Lin et al. 2024, QServe, arXiv
//! 2405.04532). Such a weight is, exactly, int8 with one scale a row, and takes 4 bits a weight all the same.
//!
//! With int8 activations a weight that *is* so is computed so on every device, whoever made it: sums over all of a row are
//! exact in int32, and one rounding is left where groups of any scales have one each (docs/numerics.md).

use rayon::prelude::*;

use super::QuantWeight;
use super::affine::{Affine, CodeRange};

/// Groups are of a multiple of so many columns: with fewer a weight's groups are added up one by one.
pub const COLUMNS: usize = 128;

/// Longest row whose sum with 255 steps of an input fits an int32.
const MOST_COLUMNS: usize = (i32::MAX / (255 * 128)) as usize;

/// Largest int8 that [`unit`] leaves for a row's largest weight: rounded up to a multiple of 15 or so it still fits.
const LARGEST: f32 = 119.0;

/// The scales of a weight's groups as multiples of those of its rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Factored {
    /// `[n]`
    pub scales: Vec<f32>,
    /// `[n, groups]`, at least 1: a group's scale is so many times the row's, and so many times a code minus its zero point is
    /// an int8.
    pub factors: Vec<u8>,
}

impl Factored {
    /// Of a weight of up to 4 bits and several groups. `None` where its scales are no such multiples, or the products no int8.
    pub fn of(q: &QuantWeight) -> Option<Factored> {
        let fits = q.bits <= 4 && q.encoding.is_affine() && q.k.is_multiple_of(16) && q.k <= MOST_COLUMNS;
        if !fits || q.groups() == 1 || !q.group_size.is_multiple_of(COLUMNS) {
            return None;
        }
        let largest = ((1 << q.bits) - 1) as f32;
        let rows = q.scales.par_chunks(q.groups()).zip(q.zeros.par_chunks(q.groups()));
        let rows = rows.map(|(scales, zeros)| row(scales, zeros, largest)).collect::<Option<Vec<_>>>()?;
        let (scales, factors): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        Some(Factored { scales, factors: factors.concat() })
    }

    /// The weight in int8 with one scale a row.
    pub fn int8_rows(&self, q: &QuantWeight) -> QuantWeight {
        let unpacked: &[u8] = &q.codes;
        let mut codes = vec![0; q.n * q.k];
        codes.par_chunks_mut(q.k).enumerate().for_each(|(r, to)| {
            let groups = r * q.groups()..(r + 1) * q.groups();
            let parameters = self.factors[groups.clone()].iter().zip(&q.zeros[groups]);
            let parts = to.chunks_mut(q.group_size).zip(unpacked[r * q.k..].chunks(q.group_size));
            for ((to, codes), (&factor, &zero)) in parts.zip(parameters) {
                for (to, &code) in to.iter_mut().zip(codes) {
                    *to = (i32::from(factor) * (i32::from(code) - zero as i32) + 128) as u8;
                }
            }
        });
        QuantWeight {
            bits: 8,
            group_size: q.k,
            codes: codes.into(),
            scales: self.scales.clone(),
            zeros: vec![128.0; q.n],
            order: q.order.clone(),
            ..*q
        }
    }
}

/// The scale and the factors of a row, codes being up to `largest`.
fn row(scales: &[f32], zeros: &[f32], largest: f32) -> Option<(f32, Vec<u8>)> {
    let least = scales.iter().copied().fold(f32::INFINITY, f32::min);
    let is_scale = |s: &f32| s.is_finite() && *s >= f32::MIN_POSITIVE;
    if !scales.iter().all(is_scale) || !zeros.iter().all(|z| z.fract() == 0.0 && (0.0..=15.0).contains(z)) {
        return None;
    }
    // The largest number of which all are multiples, exactly: no product of the two has more than 32 bits.
    let is_multiple = |f: f32, unit: f32, scale: f32| f64::from(f) * f64::from(unit) == f64::from(scale);
    let factor =
        |scale: f32, unit: f32| Some((scale / unit).round()).filter(|&f| f <= 128.0 && is_multiple(f, unit, scale));
    (1..=128).map(|parts| least / parts as f32).find_map(|unit| {
        let factors = scales.iter().zip(zeros).map(|(&scale, zero)| {
            let f = factor(scale, unit)?;
            (f * zero <= 128.0 && f * (largest - zero) <= 127.0).then_some(f as u8)
        });
        Some((unit, factors.collect::<Option<_>>()?))
    })
}

/// The scale of a row of weights up to `amax`: of 8 bits, so that its multiples are exact.
pub(super) fn unit(amax: f32) -> f32 {
    let unit = half::bf16::from_f32(amax / LARGEST).to_f32();
    if unit >= f32::MIN_POSITIVE { unit } else { 1.0 }
}

/// A symmetric group's parameters with the nearest multiple of `unit` for its scale.
pub(super) fn snap(params: Affine, unit: f32, range: CodeRange) -> Affine {
    let most = (128 / range.middle()) as f32;
    Affine { scale: unit * (params.scale / unit).round().clamp(1.0, most), ..params }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two groups of 128 columns, of 4 bits.
    fn weight(scales: [f32; 4], zeros: [f32; 4]) -> QuantWeight {
        let mut q = QuantWeight::empty(2, 256, 4, 128);
        q.codes = (0..512).map(|i| (i * 7 % 16) as u8).collect::<Vec<_>>().into();
        (q.scales, q.zeros) = (scales.to_vec(), zeros.to_vec());
        q
    }

    #[test]
    fn multiples_of_one_scale_a_row_are_int8() {
        let q = weight([0.375, 0.625, 1.0, 16.0], [8.0, 3.0, 0.0, 8.0]);
        let factored = Factored::of(&q).expect("multiples of 1/8 and 1");
        assert_eq!(factored, Factored { scales: vec![0.125, 1.0], factors: vec![3, 5, 1, 16] });
        let rows = factored.int8_rows(&q);
        assert_eq!((rows.bits, rows.groups(), rows.is_symmetric()), (8, 1, true));
        assert_eq!(rows.dequantize(), q.dequantize());
        // 3 * (7 - 8) and 16 * (15 - 8).
        assert_eq!((rows.codes[1], rows.codes[256 + 128 + 1]), (125, 128 + 16 * (q.codes[385] as i32 - 8) as u8));
    }

    #[test]
    fn others_stay_in_groups() {
        let of = |scales, zeros| Factored::of(&weight(scales, zeros));
        let even = [1.0; 4];
        assert!(of(even, [8.0; 4]).is_some());
        assert_eq!(of([1.0, 1.37, 1.0, 1.0], [8.0; 4]), None, "no multiples");
        assert_eq!(of([0.1, 0.1 * 3.0, 1.0, 1.0], [8.0; 4]), None, "three times 0.1, but rounded");
        assert_eq!(of([1.0, 17.0, 1.0, 1.0], [8.0; 4]), None, "-136 is no int8");
        assert_eq!(of([1.0, 16.0, 1.0, 1.0], [7.0; 4]), None, "128 is no int8");
        assert_eq!(of([1.0, 9.0, 1.0, 1.0], [0.0; 4]), None, "135 is no int8");
        assert_eq!(of(even, [8.0, 8.0, 7.5, 8.0]), None, "codes are whole steps from zero");
        assert_eq!(of(even, [8.0, 8.0, 16.0, 8.0]), None, "beyond w is no code of zero");
        assert_eq!(of([0.0, 1.0, 1.0, 1.0], [8.0; 4]), None);
        assert_eq!(of([f32::NAN, 1.0, 1.0, 1.0], [8.0; 4]), None);
        let q = weight(even, [8.0; 4]);
        assert_eq!(
            Factored::of(&QuantWeight { group_size: 64, scales: vec![1.0; 8], zeros: vec![8.0; 8], ..q.clone() }),
            None
        );
        assert_eq!(Factored::of(&QuantWeight { bits: 5, ..q }), None);
    }
}
