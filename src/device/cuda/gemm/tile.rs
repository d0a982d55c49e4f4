//! Tiles of kernels before sm_90, and which ends first.

use super::family::Problem;

/// A block's part of the output, and what the cost model knows of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile {
    pub(super) bm: usize,
    pub(super) bn: usize,
    /// Speed of a full multiprocessor on this tile, relative to the family's best.
    pub(super) rate: f64,
}

impl Tile {
    /// Time of `[m, n]` in arbitrary units: blocks of the busiest multiprocessor, each as long as its area over its
    /// speed.
    fn cost(&self, p: &Problem, m: usize) -> f64 {
        let count = m.div_ceil(self.bm) * p.n.div_ceil(self.bn);
        count.div_ceil(p.sm_count as usize) as f64 * (self.bm * self.bn) as f64 / self.rate
    }

    /// Of `tiles`, at least one, the configuration that ends first for `m` rows.
    pub(super) fn best<C>(tiles: impl Iterator<Item = (C, Tile)>, p: &Problem, m: usize) -> C {
        let best = tiles.min_by(|(_, a), (_, b)| a.cost(p, m).total_cmp(&b.cost(p, m)));
        best.expect("a family has a tile for every problem").0
    }
}
