//! Functions of vectors.

use super::Simd;

/// `e^x`, off by at most 2 units in the last place for -87 to 88; outside, the value at that end of the range; NaN of NaN.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`, ln 2 in two parts (Cody and Waite 1980); `e^r` by its Taylor polynomial of
/// degree 7, whose remainder is below 2^-27.
#[inline(always)]
pub(in crate::device::cpu) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.min(s.splat(88.0), s.max(s.splat(-87.0), x));
    let n = s.to_int(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let nf = s.to_float(n);
    // 355 / 512 has 9 significant bits: its product with n is exact.
    let r = s.mul_add(nf, s.splat(-355.0 / 512.0), x);
    let r = s.mul_add(nf, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.0 / 5040.0);
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = s.mul_add(p, r, s.splat(coefficient));
    }
    s.mul(p, s.power_of_two(n))
}

/// `sum(a[i] * b[i])` over the shorter of the two.
#[inline(always)]
pub(in crate::device::cpu) fn sum_of_products<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let (a_chunks, a_rest) = a.as_chunks::<16>();
    let (b_chunks, b_rest) = b.as_chunks::<16>();
    let mut sums = [s.splat(0.0); 2];
    for (i, (a, b)) in a_chunks.iter().zip(b_chunks).enumerate() {
        sums[i % 2] = s.mul_add(s.load(a), s.load(b), sums[i % 2]);
    }
    let rest = a_rest.iter().zip(b_rest).fold(0.0, |sum, (a, b)| sum + a * b);
    s.sum(s.add(sums[0], sums[1])) + rest
}

/// `max|x|`, and 0, or NaN where `x` holds a NaN or an infinity: as part of the scale it reaches the result.
#[inline(always)]
pub(in crate::device::cpu) fn largest<S: Simd>(s: S, x: &[f32]) -> (f32, f32) {
    let (chunks, rest) = x.as_chunks::<16>();
    let (mut amax, mut poison) = (s.splat(0.0), s.splat(0.0));
    for x in chunks {
        let x = s.load(x);
        amax = s.max(amax, s.max(x, s.sub(s.splat(0.0), x)));
        poison = s.mul_add(x, s.splat(0.0), poison);
    }
    let largest = rest.iter().fold(s.max_lane(amax), |amax, x| amax.max(x.abs()));
    (largest, rest.iter().fold(s.sum(poison), |poison, x| poison + x * 0.0))
}

/// Up to 16 elements, zeros behind them.
#[inline(always)]
pub(in crate::device::cpu) fn load_part<S: Simd>(s: S, x: &[f32]) -> S::F {
    match x.try_into() {
        Ok(whole) => s.load(whole),
        Err(_) => {
            let mut padded = [0.0; 16];
            padded[..x.len()].copy_from_slice(x);
            s.load(&padded)
        }
    }
}

/// Writes as many lanes as there is room for.
#[inline(always)]
pub(in crate::device::cpu) fn store_part<S: Simd>(s: S, x: S::F, to: &mut [f32]) {
    match to.try_into() {
        Ok(whole) => s.store(x, whole),
        Err(_) => {
            let mut padded = [0.0; 16];
            s.store(x, &mut padded);
            to.copy_from_slice(&padded[..to.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Kernel, Level, Simd};

    struct Exp([f32; 16]);

    impl Kernel for Exp {
        type Output = [f32; 16];

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [f32; 16] {
            let mut y = [0.0; 16];
            s.store(super::exp(s, s.load(&self.0)), &mut y);
            y
        }
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for level in Level::available() {
            for i in 0..20_000 {
                let x: [f32; 16] = std::array::from_fn(|lane| -87.0 + (16 * i + lane) as f32 * (175.0 / 320_000.0));
                for (x, y) in x.into_iter().zip(level.run(Exp(x))) {
                    let exact = f64::from(x).exp();
                    let unit = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
                    assert!((f64::from(y) - exact).abs() <= 2.0 * unit, "{level:?}: exp({x}) = {y}, not {exact}");
                }
            }
            let special = level.run(Exp([
                f32::NAN,
                f32::NEG_INFINITY,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
            ]));
            assert!(special[0].is_nan() && special[1] < 2e-38 && special[2] == 1.0);
        }
    }
}
