//! The only two ways a test may compare numbers (docs/numerics.md): exact, and bounded. Nothing else is tuned.

use lowbit::dtype::DType;

/// Fails unless both hold the same values bit for bit; NaN equals NaN.
pub fn assert_exact(what: &str, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    if let Some(i) = (0..got.len()).find(|&i| !same(got[i], expected[i])) {
        let count = (0..got.len()).filter(|&i| !same(got[i], expected[i])).count();
        panic!("{what}: element {i} is {:e}, expected {:e} ({count} of {} differ)", got[i], expected[i], got.len());
    }
}

/// Fails unless `max|got - reference| <= 2 max|twin - reference| + u max|reference|`, `u` the unit roundoff of `output`.
///
/// `reference` is the op in f64, `twin` the same op rounding where the kernel rounds. A NaN in `got` fails.
pub fn assert_bounded(what: &str, got: &[f32], reference: &[f64], twin: &[f64], output: DType) {
    assert_eq!(got.len(), reference.len(), "{what}: length");
    assert_eq!(twin.len(), reference.len(), "{what}: length of the twin");
    let distance = |a: f64, b: f64| if a.is_nan() { f64::INFINITY } else { (a - b).abs() };
    let twin_error = twin.iter().zip(reference).map(|(&t, &r)| distance(t, r)).fold(0.0, f64::max);
    let largest = reference.iter().fold(0.0f64, |max, r| max.max(r.abs()));
    let bound = 2.0 * twin_error + output.unit_roundoff() * largest;
    assert!(bound.is_finite(), "{what}: the bound is {bound}: the reference or its twin is not finite");
    let worst = (0..got.len())
        .map(|i| (distance(f64::from(got[i]), reference[i]), i))
        .fold((0.0, 0), |a, b| if b.0 > a.0 { b } else { a });
    assert!(
        worst.0 <= bound,
        "{what}: element {} is {:e}, expected {:e}: error {:.3e}, bound {bound:.3e} (twin {twin_error:.3e}, largest {largest:.3e})",
        worst.1,
        got[worst.1],
        reference[worst.1],
        worst.0
    );
}
