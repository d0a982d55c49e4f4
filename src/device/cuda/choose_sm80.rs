//! Configurations of gemm_w4a16/sm80, how its tiles are shared out, and which configuration runs a shape: by times measured
//! on an H200 (docs/kernels-linear.md).

use super::choose::{Launch, Problem, codes};
use super::{COUNTERS, Grid, WORKSPACE_BYTES};

/// Where the kernels are.
pub(super) const MODULE: &str = "gemm_w4a16/sm80";
/// Columns of k in a stage.
const SLICE: usize = 64;

/// A tile of `bm` rows of x by `bn` of w.
#[derive(Debug)]
struct Tile {
    bm: usize,
    bn: usize,
    warps_m: usize,
    warps_n: usize,
    stages: usize,
    /// Blocks that a multiprocessor has registers for.
    blocks: usize,
    /// Microseconds of a slice in each of one, two and three blocks that share a multiprocessor, 4-bit weights.
    slice_us: [f64; 3],
}

#[rustfmt::skip]
const TILES: [Tile; 4] = [
    Tile { bm: 16, bn: 128, warps_m: 1, warps_n: 4, stages: 6, blocks: 3, slice_us: [0.312, 0.406, 0.511] },
    Tile { bm: 32, bn: 128, warps_m: 1, warps_n: 4, stages: 6, blocks: 3, slice_us: [0.395, 0.540, 0.692] },
    Tile { bm: 64, bn: 128, warps_m: 1, warps_n: 4, stages: 4, blocks: 2, slice_us: [0.479, 0.761, 0.761] },
    Tile { bm: 128, bn: 256, warps_m: 2, warps_n: 4, stages: 3, blocks: 1, slice_us: [1.348, 1.348, 1.348] },
];
/// Most rows of x in tiles whose scales go on sums, where no weight is rounded.
const UNROUNDED_ROWS: usize = 32;
/// Microseconds of a launch beside its slices; of adding up tiles that are cut, for each kilobyte of a tile's parts, and where a block
/// has parts of two tiles.
const LAUNCH_US: f64 = 4.99;
const CUT_US: f64 = 2.56;
const PART_KB_US: f64 = 0.0169;
const TWO_TILES_US: f64 = 2.24;

/// A configuration and its grid.
struct Plan {
    tile: &'static Tile,
    grid: usize,
    /// The last tiles, cut along k so that every block has as many slices of them.
    cut: usize,
    us: f64,
}

impl Tile {
    fn threads(&self) -> usize {
        32 * self.warps_m * self.warps_n
    }

    /// The ring, and 192 bytes of scales and zero points for 16 rows of w of each warp.
    fn shared_bytes(&self, bits: usize) -> usize {
        self.stages * (2 * SLICE * self.bm + SLICE * bits / 8 * self.bn) + 192 * self.bn / 16 * self.warps_m
    }

    /// Blocks that a multiprocessor has room for. It has a kilobyte more of shared memory than a block may ask for, and takes one for
    /// itself for each block.
    fn resident(&self, p: &Problem) -> usize {
        let (_, bits) = codes(p.layout);
        self.blocks.min((p.max_shared as usize + 2048) / (self.shared_bytes(bits) + 1024)).max(1)
    }

    fn tiles(&self, p: &Problem, m: usize) -> usize {
        m.div_ceil(self.bm) * p.n.div_ceil(self.bn)
    }

    /// A slot for the sums of a tile for each block and each cut tile.
    fn partials_bytes(&self, grid: usize, cut: usize) -> usize {
        (grid + cut) * self.bm * self.bn * 4
    }

    /// Microseconds of a launch of `grid` blocks of `slices` each.
    fn us(&self, p: &Problem, grid: usize, slices: f64) -> f64 {
        LAUNCH_US + slices * self.slice_us[grid.div_ceil(p.sm_count as usize) - 1]
    }

    /// Rounds of whole tiles.
    fn whole(&'static self, p: &Problem, m: usize) -> Plan {
        let tiles = self.tiles(p, m);
        let grid = tiles.min(p.sm_count as usize * self.resident(p));
        let us = self.us(p, grid, (tiles.div_ceil(grid) * p.k.div_ceil(SLICE)) as f64);
        Plan { tile: self, grid, cut: 0, us }
    }

    /// What makes no whole round of `room` blocks cut along k among `grid` blocks, where that can be.
    fn cut(&'static self, p: &Problem, m: usize, room: usize, grid: usize) -> Option<Plan> {
        let (tiles, slices) = (self.tiles(p, m), p.k.div_ceil(SLICE));
        let cut = tiles % room;
        // Each block has a slice or more, and the products by which it finds them are 32-bit.
        let is_shared = cut > 0 && grid > cut && grid <= cut * slices && grid * cut * slices < 1 << 32;
        if !is_shared || cut > COUNTERS || self.partials_bytes(grid, cut) > WORKSPACE_BYTES {
            return None;
        }
        let share = (tiles / room * slices) as f64 + (cut * slices) as f64 / grid as f64;
        let two_tiles = !grid.is_multiple_of(cut);
        let parts = grid.div_ceil(cut) + usize::from(two_tiles);
        let sums_us = CUT_US
            + PART_KB_US * (parts * self.bm * self.bn * 4 / 1024) as f64
            + if two_tiles { TWO_TILES_US } else { 0.0 };
        Some(Plan { tile: self, grid, cut, us: self.us(p, grid, share) + sums_us })
    }

    /// Whole tiles; the rest cut for all blocks alike; or, where there is but one round, as many blocks for each tile.
    fn plans(&'static self, p: &Problem, m: usize) -> impl Iterator<Item = Plan> {
        let tiles = self.tiles(p, m);
        let rooms = (1..=self.resident(p)).map(|blocks| blocks * p.sm_count as usize);
        let cuts: Vec<Plan> = rooms
            .flat_map(|room| {
                let alike = (tiles < room).then(|| tiles * (room / tiles).min(p.k.div_ceil(SLICE)));
                [Some(room), alike].into_iter().flatten().filter_map(move |grid| self.cut(p, m, room, grid))
            })
            .collect();
        std::iter::once(self.whole(p, m)).chain(cuts)
    }
}

/// The launch of W4A16 and W8A16 for `m` rows, `m` at least 1.
pub(super) fn w4a16(p: &Problem, m: usize) -> Launch {
    launch(p, tiles(p).filter(|tile| tile.bm <= UNROUNDED_ROWS || !p.sums_only).flat_map(|tile| tile.plans(p, m)))
}

/// The same with one order of sums for all `m`: whole tiles, and scales on the sums of groups.
pub(super) fn batch_invariant(p: &Problem, m: usize) -> Launch {
    launch(p, tiles(p).filter(|tile| tile.bm <= UNROUNDED_ROWS).map(|tile| tile.whole(p, m)))
}

/// Tiles that fit the GPU.
fn tiles(p: &Problem) -> impl Iterator<Item = &'static Tile> {
    let (_, bits) = codes(p.layout);
    TILES.iter().filter(move |tile| tile.shared_bytes(bits) <= p.max_shared as usize)
}

/// The best of `plans`.
fn launch(p: &Problem, plans: impl Iterator<Item = Plan>) -> Launch {
    let Plan { tile, grid, cut, .. } =
        plans.min_by(|a, b| a.us.total_cmp(&b.us)).expect("the smallest tiles fit every GPU");
    let (name, bits) = codes(p.layout);
    let shape = format!("{}x{}", tile.bm, tile.bn);
    Launch {
        module: MODULE,
        function: format!("gemm_{name}a16_{shape}_{}", p.suffix),
        config: format!("{name} {shape}"),
        grid: Grid::new([grid as u32, 1, 1], tile.threads() as u32, tile.shared_bytes(bits) as u32),
        box_rows: 0,
        cut_tiles: cut as u32,
    }
}

#[cfg(test)]
mod tests {
    use super::super::choose::tests::{problem, uses};
    use super::super::pack::Layout;
    use super::*;

    const W4: Layout = Layout::Fragments16Bit { bits: 4 };

    #[test]
    fn the_table_is_that_of_the_kernels() {
        let source = include_str!("../../../kernels/gemm_w4a16/sm80.cu");
        let row = |t: &Tile| [t.bm, t.bn, t.warps_m, t.warps_n, t.stages, t.blocks].map(|x| x as u32).to_vec();
        assert_eq!(uses(source, "GEMM_W4A16_TYPES"), TILES.iter().map(row).collect::<Vec<_>>());
        assert!(source.contains("ON_SUMS = MT * NT <= 8;"), "which are the tiles of up to {UNROUNDED_ROWS} rows");
        for tile in &TILES {
            let fragments = tile.bm / tile.warps_m / 8 * (tile.bn / tile.warps_n / 16);
            assert_eq!(fragments <= 8, tile.bm <= UNROUNDED_ROWS, "{tile:?}");
        }
    }

    /// Every launch fits the GPU, its sums the workspace and its cut tiles the counters; blocks are no more than slices.
    #[test]
    fn every_launch_is_one_that_the_gpu_takes() {
        for (sm_count, max_shared) in [(132, 226 << 10), (108, 162 << 10), (128, 99 << 10), (20, 99 << 10)] {
            for bits in [4, 8] {
                for m in [1, 9, 16, 17, 33, 64, 65, 128, 257, 1024, 4096, 65536] {
                    for (n, k) in [(1, 8), (33, 200), (4096, 4096), (6144, 4096), (4096, 14336), (57344, 8192)] {
                        let p = Problem { sm_count, max_shared, ..problem(Layout::Fragments16Bit { bits }, n, k) };
                        for launch in [w4a16(&p, m), batch_invariant(&p, m)] {
                            let Grid { blocks: [blocks, ..], threads, shared_bytes, .. } = launch.grid;
                            let what = format!("{launch:?} of {m} x {n} x {k}");
                            let shape = launch.config.split_once(' ').expect("name and tile").1;
                            let tile = TILES.iter().find(|t| format!("{}x{}", t.bm, t.bn) == shape).expect("a tile");
                            assert!(shared_bytes <= max_shared && threads == tile.threads() as u32, "{what}");
                            assert!(blocks > 0 && blocks as usize <= tile.blocks * sm_count as usize, "{what}");
                            let (tiles, cut) = (m.div_ceil(tile.bm) * n.div_ceil(tile.bn), launch.cut_tiles as usize);
                            assert!(cut <= tiles && cut <= COUNTERS, "{what}");
                            let slots = tile.partials_bytes(blocks as usize, cut);
                            assert!(cut == 0 || slots <= WORKSPACE_BYTES, "{what}");
                            assert!(cut == 0 || blocks as usize <= cut * k.div_ceil(SLICE), "{what}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn weights_that_cannot_be_rounded_get_tiles_that_do_not() {
        let p = Problem { sums_only: true, ..problem(W4, 28672, 4096) };
        assert!(w4a16(&p, 4096).config.starts_with("w4 32x"));
        assert_eq!(w4a16(&problem(W4, 28672, 4096), 4096).config, "w4 128x256");
    }

    #[test]
    fn one_order_of_sums_means_whole_tiles() {
        for m in [1, 8, 64, 4096] {
            assert_eq!(batch_invariant(&problem(W4, 4096, 4096), m).cut_tiles, 0);
        }
    }
}
