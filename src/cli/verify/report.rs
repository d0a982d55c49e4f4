//! Outcomes of checks: the two rules of docs/numerics.md, exact and bounded, and the one for whole layers.

use serde_json::{Value, json};

use crate::dtype::DType;
use crate::error::{Error, Result};

use super::super::output;

/// One comparison: it passed when `error <= bound`.
#[derive(Debug, Clone)]
struct Check {
    place: String,
    op: String,
    /// Scheme and kernel of a linear layer.
    detail: String,
    error: f64,
    bound: f64,
}

impl Check {
    fn passed(&self) -> bool {
        self.error <= self.bound
    }
}

/// All checks so far, those of one place (`layer 3`) together.
#[derive(Debug, Default)]
pub(super) struct Report {
    checks: Vec<Check>,
    place: String,
}

impl Report {
    /// Names the part of the model that the next checks are about.
    pub(super) fn enter(&mut self, place: String) {
        self.place = place;
    }

    /// Bit for bit: the error is the number of elements that differ, the bound 0.
    pub(super) fn exact(&mut self, op: &str, detail: &str, got: &[f32], expected: &[f32]) {
        let differ = got.iter().zip(expected).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        self.add(op, detail, differ as f64, 0.0);
    }

    /// `max|got - exact| <= 2 max|twin - exact| + u max|exact|`, `u` the unit roundoff of `dtype`.
    pub(super) fn bounded(&mut self, op: &str, detail: &str, got: &[f32], exact: &[f64], twin: &[f64], dtype: DType) {
        let largest = exact.iter().fold(0.0f64, |max, x| max.max(x.abs()));
        let error = max_distance(got.iter().map(|&x| f64::from(x)), exact);
        let bound = 2.0 * max_distance(twin.iter().copied(), exact) + dtype.unit_roundoff() * largest;
        self.add(op, detail, error, bound);
    }

    /// The same in the Euclidean norm, for what many ops in a row added to `before`; `u` bounds what rounding a layer's
    /// inputs costs.
    pub(super) fn close(&mut self, op: &str, before: &[f32], got: &[f32], exact: &[f32], twin: &[f32], u: f64) {
        let added: Vec<f32> = exact.iter().zip(before).map(|(x, b)| x - b).collect();
        let bound = 2.0 * distance(twin, exact) + u * distance(&added, &vec![0.0; added.len()]);
        self.add(op, "", distance(got, exact), bound);
    }

    /// An error with a bound of its own.
    pub(super) fn within(&mut self, op: &str, error: f64, bound: f64) {
        self.add(op, "", error, bound);
    }

    fn add(&mut self, op: &str, detail: &str, error: f64, bound: f64) {
        let (place, op, detail) = (self.place.clone(), op.to_owned(), detail.to_owned());
        self.checks.push(Check { place, op, detail, error, bound });
    }

    /// Lines of the checks of the current place.
    pub(super) fn lines(&self) -> String {
        let line = |c: &Check| {
            let verdict = if c.passed() { "ok" } else { "FAIL" };
            let figures = match c.bound {
                0.0 => format!("{} elements differ, exact", c.error),
                _ => format!("error {:.2e}, bound {:.2e}", c.error, c.bound),
            };
            format!("{:<4} {:<10} {:<20} {figures:<38} {}", verdict, c.place, c.op, c.detail).trim_end().to_owned()
                + "\n"
        };
        self.checks.iter().filter(|c| c.place == self.place).map(line).collect()
    }

    pub(super) fn json(&self, model: &str, device: &str) -> Value {
        let check = |c: &Check| {
            json!({
                "place": c.place,
                "op": c.op,
                "detail": c.detail,
                "error": number(c.error),
                "bound": number(c.bound),
                "exact": c.bound == 0.0,
                "passed": c.passed(),
            })
        };
        json!({
            "model": model,
            "device": device,
            "passed": self.checks.iter().all(Check::passed),
            "checks": self.checks.iter().map(check).collect::<Value>(),
        })
    }

    /// What was checked, in words.
    pub(super) fn summary(&self, device: &str) -> String {
        let exact = self.checks.iter().filter(|c| c.bound == 0.0).count();
        let (all, bounded) = (self.checks.len(), self.checks.len() - exact);
        format!("{all} checks passed on {device}: {exact} bit for bit, {bounded} within their bounds\n")
    }

    /// Fails when a check did.
    pub(super) fn verdict(&self) -> Result<()> {
        let failed: Vec<&Check> = self.checks.iter().filter(|c| !c.passed()).collect();
        match failed.first() {
            None => Ok(()),
            Some(first) => {
                let (count, all) = (failed.len(), self.checks.len());
                let Check { place, op, error, bound, .. } = first;
                let reason = format!(
                    "{count} of {all} checks; the first is {place}, {op}: error {error:.3e}, bound {bound:.3e}"
                );
                Err(Error::Verification(reason))
            }
        }
    }
}

/// JSON has no infinity: what is not finite is told as text.
fn number(x: f64) -> Value {
    if x.is_finite() { json!(x) } else { json!(x.to_string()) }
}

/// Largest distance; infinite when a value is NaN or one side is shorter.
fn max_distance(got: impl ExactSizeIterator<Item = f64>, expected: &[f64]) -> f64 {
    if got.len() != expected.len() {
        return f64::INFINITY;
    }
    let distance = |(a, &b): (f64, &f64)| if a.is_nan() || b.is_nan() { f64::INFINITY } else { (a - b).abs() };
    got.zip(expected).map(distance).fold(0.0, f64::max)
}

/// Euclidean distance; infinite when a value is NaN.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let squares: f64 = a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum();
    if squares.is_nan() || a.len() != b.len() { f64::INFINITY } else { squares.sqrt() }
}

/// Writes the lines of the current place as they come, unless JSON was asked for.
pub(super) fn print(report: &Report, json: bool) -> Result<()> {
    if json { Ok(()) } else { output::write(&report.lines()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passes(check: impl Fn(&mut Report)) -> bool {
        let mut report = Report::default();
        check(&mut report);
        report.verdict().is_ok()
    }

    #[test]
    fn exact_is_bit_for_bit() {
        assert!(passes(|r| r.exact("op", "", &[1.0, -0.0], &[1.0, -0.0])));
        assert!(!passes(|r| r.exact("op", "", &[0.0], &[-0.0])));
    }

    /// The bound of these is `2 * 0.125 + 2^-11 * 4`.
    #[test]
    fn bounded_allows_twice_the_twin() {
        let check = |got: f32| passes(|r| r.bounded("op", "", &[got, 4.0], &[1.0, 4.0], &[1.125, 4.0], DType::F16));
        assert!(check(1.0) && check(1.25) && check(0.75) && check(1.2519));
        assert!(!check(1.2521) && !check(f32::NAN) && !check(f32::INFINITY));
    }

    #[test]
    fn layers_compare_what_they_added() {
        let check = |got: f32| passes(|r| r.close("op", &[1000.0], &[got], &[1001.0], &[1001.0], 0.125));
        assert!(check(1001.0) && check(1001.125));
        assert!(!check(1001.25) && !check(f32::NAN));
    }
}
