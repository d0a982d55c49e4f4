//! Choosing tokens: the fast path of `reference::sample`, which selects where that sorts.

use super::reference::{SampleRow, mass};

/// Scratch for choosing from rows of logits.
#[derive(Debug, Default)]
pub(crate) struct Chooser {
    candidates: Vec<u64>,
}

impl Chooser {
    /// What [`super::reference::sample`] gives.
    pub(crate) fn choose(&mut self, logits: &[f32], row: &SampleRow) -> Option<u32> {
        let best = argmax(logits)?;
        if row.temperature == 0.0 {
            return Some(best);
        }
        let max = logits[best as usize];
        self.candidates.clear();
        self.candidates.extend((0..).zip(logits).filter_map(|(id, &x)| {
            let d = (x - max) / row.temperature;
            (x > f32::NEG_INFINITY && d >= row.floor).then(|| key(d, id))
        }));
        let k = row.top_k as usize;
        if k > 0 {
            keep_top(&mut self.candidates, k);
        }
        if row.top_p < 1.0 {
            keep_mass(&mut self.candidates, f64::from(row.top_p));
        }
        // Filters leave candidates in an order of their own; ids make the draw independent of it.
        self.candidates.sort_unstable_by_key(|&c| id_of(c));
        let total: u64 = self.candidates.iter().map(|&c| mass_of(c)).sum();
        let target = ((u128::from(row.draw) * u128::from(total)) >> 64) as u64;
        let mut passed = 0;
        let drawn = self.candidates.iter().find(|&&c| {
            passed += mass_of(c);
            passed > target
        });
        drawn.map(|&c| id_of(c))
    }

    /// The `n` greatest logits, best first, ties to the lower id.
    pub(crate) fn top(&mut self, logits: &[f32], n: usize) -> Vec<u32> {
        self.candidates.clear();
        if n > 0 {
            self.candidates.extend((0..).zip(logits).map(|(id, &x)| key(x, id)));
            keep_top(&mut self.candidates, n);
            self.candidates.sort_unstable_by(|a, b| b.cmp(a));
        }
        self.candidates.iter().map(|&c| id_of(c)).collect()
    }
}

/// The lowest id of the greatest logit; `None` when all are negative infinity.
fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best = (None, f32::NEG_INFINITY);
    for (id, &x) in (0..).zip(logits) {
        if x > best.1 {
            best = (Some(id), x);
        }
    }
    best.0
}

/// A candidate as one integer that orders by its number, then by lower id: partial selection compares plain integers.
fn key(x: f32, id: u32) -> u64 {
    // Adding zero turns -0.0 into 0.0, which must tie.
    let bits = (x + 0.0).to_bits();
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(ordered) << 32 | u64::from(!id)
}

fn id_of(candidate: u64) -> u32 {
    !(candidate as u32)
}

/// Of a candidate whose number is relative to the best.
fn mass_of(candidate: u64) -> u64 {
    let ordered = (candidate >> 32) as u32;
    mass(f32::from_bits(if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered }))
}

/// Keeps the `k` best candidates, in no order.
fn keep_top(candidates: &mut Vec<u64>, k: usize) {
    if k < candidates.len() {
        candidates.select_nth_unstable_by(k.saturating_sub(1), |a, b| b.cmp(a));
        candidates.truncate(k);
    }
}

/// Keeps the fewest best candidates that hold at least `p` of the mass. Sorts only as many as that takes: the best
/// 128, then eight times more while they do not suffice.
fn keep_mass(candidates: &mut Vec<u64>, p: f64) {
    let wanted = p * candidates.iter().map(|&c| mass_of(c)).sum::<u64>() as f64;
    let (mut sorted, mut held, mut next) = (0, 0, 128);
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        let n = next.min(rest.len());
        if n < rest.len() {
            rest.select_nth_unstable_by(n - 1, |a, b| b.cmp(a));
        }
        rest[..n].sort_unstable_by(|a, b| b.cmp(a));
        for &c in &rest[..n] {
            held += mass_of(c);
            sorted += 1;
            if held as f64 >= wanted {
                candidates.truncate(sorted);
                return;
            }
        }
        next *= 8;
    }
}
