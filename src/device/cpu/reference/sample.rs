//! The choice of a token from a row of logits.

/// How one row is sampled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleRow {
    /// Softmax temperature; 0 takes the best.
    pub temperature: f32,
    /// Candidates kept; 0 keeps all.
    pub top_k: u32,
    /// Least mass that the kept candidates must hold, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Least logit of a candidate less the best, over the temperature: the natural log of min-p. `f32::MIN` keeps all.
    pub floor: f32,
    /// Uniform random bits.
    pub draw: u64,
}

impl SampleRow {
    /// Words of a row in a tensor, those of `SampleRowArgs` (kernels/ops/abi.h): temperature, top_p and floor as bits, top_k, the draw's low
    /// and high half, no mask, 0.
    pub const WORDS: usize = 8;

    /// `[rows, 8]`.
    pub fn words(rows: &[SampleRow]) -> Vec<u32> {
        let of = |row: &SampleRow| {
            let [temperature, top_p, floor] = [row.temperature, row.top_p, row.floor].map(f32::to_bits);
            [temperature, top_p, floor, row.top_k, row.draw as u32, (row.draw >> 32) as u32, u32::MAX, 0]
        };
        rows.iter().flat_map(of).collect()
    }

    /// The row of such words.
    pub fn of_words(words: &[u32; SampleRow::WORDS]) -> SampleRow {
        let [temperature, top_p, floor] = [words[0], words[1], words[2]].map(f32::from_bits);
        SampleRow { temperature, top_k: words[3], top_p, floor, draw: u64::from(words[5]) << 32 | u64::from(words[4]) }
    }
}

/// `2^40 exp(d)` for `d <= 0` as an integer. Masses are integers so that they add up to the same whatever the order, and every
/// operation that makes one is rounded on its own, so that every device gets the same: a draw depends on nothing else.
pub fn mass(d: f32) -> u64 {
    // 2^40 exp(d) = 2^(40 + n) 2^f with n whole and f in [0, 1); the polynomial is within 2.7e-7 of 2^f.
    let t = d * std::f32::consts::LOG2_E;
    let n = t.floor();
    let f = t - n;
    let coefficients =
        [0x3aea_9331, 0x3c16_ae2f, 0x3d63_fa57, 0x3e75_f8ca, 0x3f31_721f, 0x3f80_0000].map(f32::from_bits);
    let p = coefficients.into_iter().fold(0.0, |p, c| p * f + c);
    if n < -62.0 { 0 } else { (p * (1u64 << 40) as f32) as u64 >> (-n) as u32 }
}

/// The id that `row` draws from `logits`; `None` where none has a logit above negative infinity. Logits are no NaN and not infinite
/// above. Candidates at or above the floor; of these the `top_k` best; of these the fewest best that hold `top_p` of the mass; of these
/// the first in order of ids at which the cumulative mass exceeds the part of the mass that `draw` is of 2^64. Ties go to the lower id.
pub fn sample(logits: &[f32], row: &SampleRow) -> Option<u32> {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if best == f32::NEG_INFINITY {
        return None;
    }
    if row.temperature == 0.0 {
        return logits.iter().position(|&x| x == best).map(|id| id as u32);
    }
    // Adding zero turns -0.0 into 0.0, which must tie.
    let relative = |x: f32| (x - best) / row.temperature + 0.0;
    let ids = (0u32..).zip(logits).filter(|&(_, &x)| x > f32::NEG_INFINITY && relative(x) >= row.floor);
    let mut kept: Vec<(u32, f32)> = ids.map(|(id, &x)| (id, relative(x))).collect();
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if row.top_k > 0 {
        kept.truncate(row.top_k as usize);
    }
    let total = |kept: &[(u32, f32)]| kept.iter().map(|&(_, d)| mass(d)).sum::<u64>();
    if row.top_p < 1.0 {
        let wanted = f64::from(row.top_p) * total(&kept) as f64;
        let mut held = 0;
        let enough = kept.iter().position(|&(_, d)| {
            held += mass(d);
            held as f64 >= wanted
        });
        kept.truncate(enough.map_or(kept.len(), |at| at + 1));
    }
    let target = ((u128::from(row.draw) * u128::from(total(&kept))) >> 64) as u64;
    kept.sort_by_key(|&(id, _)| id);
    let mut passed = 0;
    kept.into_iter()
        .find(|&(_, d)| {
            passed += mass(d);
            passed > target
        })
        .map(|(id, _)| id)
}
