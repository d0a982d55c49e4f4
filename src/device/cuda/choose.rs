//! Which kernel, in which configuration, runs a linear layer: a pure function of layout, shape and GPU.
//!
//! The tables repeat the configurations at the end of each `.cu` file; a test compares them.

use super::candidates::Config;
use super::pack::Layout;
use super::{Grid, choose_sm80, choose_sm90, choose_w4a8, choose_w4a16};
use crate::device::{Activation, Epilogue, GROUP_OUTPUTS, Output};

/// One launch, all but its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Launch {
    /// Path under kernels/ without `.cu`.
    pub(super) module: &'static str,
    /// Kernel in it.
    pub(super) function: String,
    /// Configuration as reports name it; empty where there is only one.
    pub(super) config: String,
    pub(super) grid: Grid,
    /// Rows of x that one copy of a tensor map takes; 0 for kernels that read x by address.
    pub(super) box_rows: u32,
    /// How many tiles, the last ones, blocks of gemm_w4a16/sm80 share along k.
    pub(super) cut_tiles: u32,
}

/// What a choice depends on beside the number of rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Problem {
    pub(super) layout: Layout,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) epilogue: Epilogue,
    /// Activations are uint8.
    pub(super) x_u8: bool,
    /// LLM.int8().
    pub(super) outliers: bool,
    /// A weight times its scale may be no number of the activation type: scales go on sums (gemm_w4a16).
    pub(super) sums_only: bool,
    pub(super) sm_count: u32,
    /// Dynamic shared memory that a block may have, bytes.
    pub(super) max_shared: u32,
    /// `f16` or `bf16`.
    pub(super) suffix: &'static str,
}

/// A block's part of the output, and what the cost model knows of it.
#[derive(Debug, Clone, Copy)]
struct Tile {
    bm: usize,
    bn: usize,
    /// Columns of k in one stage.
    bk: usize,
    warps_m: u32,
    warps_n: u32,
    stages: u32,
    /// Speed of a full multiprocessor on this tile, relative to the family's best.
    rate: f64,
}

impl Tile {
    fn threads(&self) -> u32 {
        32 * self.warps_m * self.warps_n
    }

    fn count(&self, m: usize, n: usize) -> usize {
        m.div_ceil(self.bm) * n.div_ceil(self.bn)
    }

    /// Time of `[m, n]` in arbitrary units: blocks of the busiest multiprocessor, each as long as its area over its
    /// speed.
    fn cost(&self, m: usize, n: usize, sm_count: u32) -> f64 {
        self.count(m, n).div_ceil(sm_count as usize) as f64 * (self.bm * self.bn) as f64 / self.rate
    }

    /// A block must own all outputs that share a scale.
    fn owns_scales(&self, p: &Problem) -> bool {
        let gated = p.epilogue.activation == Activation::SwiGlu;
        p.epilogue.output != Output::Groups || self.bn.is_multiple_of(GROUP_OUTPUTS * if gated { 2 } else { 1 })
    }
}

#[rustfmt::skip]
const W8A8: [Tile; 5] = [
    Tile { bm: 16, bn: 32, bk: 256, warps_m: 1, warps_n: 2, stages: 6, rate: 0.2 },
    Tile { bm: 64, bn: 32, bk: 128, warps_m: 2, warps_n: 2, stages: 6, rate: 0.4 },
    Tile { bm: 64, bn: 64, bk: 128, warps_m: 2, warps_n: 2, stages: 4, rate: 0.6 },
    Tile { bm: 128, bn: 128, bk: 64, warps_m: 2, warps_n: 2, stages: 4, rate: 0.9 },
    Tile { bm: 128, bn: 256, bk: 64, warps_m: 2, warps_n: 4, stages: 4, rate: 1.0 },
];
const LLM_INT8: [Tile; 3] = [W8A8[0], W8A8[2], W8A8[3]];
/// Those of [`W8A8`] that there are for uint8 activations: for few rows, and one that holds all groups of outputs.
const W8A8_U8: [Tile; 2] = [W8A8[0], W8A8[4]];
#[rustfmt::skip]
const W4A8: [Tile; 3] = [
    Tile { bm: 16, bn: 64, bk: 128, warps_m: 1, warps_n: 4, stages: 6, rate: 0.3 },
    Tile { bm: 64, bn: 64, bk: 128, warps_m: 2, warps_n: 2, stages: 4, rate: 0.7 },
    Tile { bm: 128, bn: 128, bk: 128, warps_m: 2, warps_n: 4, stages: 3, rate: 1.0 },
];
#[rustfmt::skip]
const DENSE: [Tile; 3] = [
    Tile { bm: 16, bn: 64, bk: 64, warps_m: 1, warps_n: 4, stages: 6, rate: 0.3 },
    Tile { bm: 64, bn: 64, bk: 64, warps_m: 2, warps_n: 2, stages: 4, rate: 0.6 },
    Tile { bm: 128, bn: 128, bk: 64, warps_m: 2, warps_n: 4, stages: 3, rate: 1.0 },
];

/// Most rows of gemm_w4a16/gemv, and most weights: of more gemm_w4a16/sm80 reads more bytes a second.
const GEMV_ROWS: usize = 8;
const GEMV_WEIGHTS: usize = 200_000_000;
/// Warps of a block, and rows it takes, in gemm_any.
const ANY_WARPS: usize = 8;
const ANY_ROWS: usize = 8;

/// The launch for `m` rows, `m` at least 1.
pub(super) fn choose(p: &Problem, m: usize) -> Launch {
    let suffix = p.suffix;
    match p.layout {
        Layout::Blocks8 => choose_sm90::w8a8(p, m),
        Layout::Rows8 | Layout::Fragments8Bit { .. } => int8(p, m, best(tiles(p), p, m)),
        Layout::Blocks4(shape) => choose_w4a8::w4a8(p, shape, m),
        Layout::Blocks16(shape) => choose_w4a16::w4a16(p, shape, m),
        Layout::Fragments16Bit { .. } | Layout::FragmentsCodebook if m <= GEMV_ROWS && p.n * p.k <= GEMV_WEIGHTS => {
            gemv(p)
        }
        Layout::Fragments16Bit { .. } | Layout::FragmentsCodebook => choose_sm80::w4a16(p, m),
        Layout::Dense { aligned: true } => {
            let tile = best(&DENSE, p, m);
            let shape = format!("{}x{}", tile.bm, tile.bn);
            let shared = tile.stages as usize * 128 * (tile.bm + tile.bn);
            tiled(p, m, tile, "gemm_16bit/sm80", format!("gemm_16bit_{shape}_{suffix}"), shape, shared)
        }
        Layout::Dense { aligned: false } => any(p, m, format!("gemm_any_dense_{suffix}"), "dense"),
        Layout::Canonical { int8: false } => any(p, m, format!("gemm_any_quant_{suffix}"), "quant"),
        Layout::Canonical { int8: true } if p.outliers => any(p, m, format!("gemm_any_llm_int8_{suffix}"), "llm_int8"),
        Layout::Canonical { int8: true } => any(p, m, "gemm_any_int8".into(), "int8"),
        Layout::CanonicalCodebook => any(p, m, format!("gemm_any_codebook_{suffix}"), "codebook"),
    }
}

/// Tiles of the kernels with int8 activations before sm_90.
fn tiles(p: &Problem) -> &'static [Tile] {
    match p.layout {
        Layout::Rows8 if p.outliers => &LLM_INT8,
        Layout::Rows8 if p.x_u8 => &W8A8_U8,
        Layout::Rows8 => &W8A8,
        _ => &W4A8,
    }
}

/// Of their kernels, all tiles that `p` allows.
pub(super) fn candidates(p: &Problem, _m: usize) -> Vec<Config> {
    let tiles = tiles(p);
    (0..tiles.len()).filter(|&tile| tiles[tile].owns_scales(p)).map(|tile| Config { tile, splits: 0 }).collect()
}

/// The launch of one of [`candidates`].
pub(super) fn with_config(p: &Problem, config: Config, m: usize) -> Launch {
    int8(p, m, &tiles(p)[config.tile])
}

/// The launch of one of [`tiles`].
fn int8(p: &Problem, m: usize, tile: &Tile) -> Launch {
    let Tile { bm, bn, bk, stages, .. } = *tile;
    let stages = stages as usize;
    if let Layout::Fragments8Bit { bits } = p.layout {
        let (shape, shared) = (format!("{bm}x{bn}"), stages * (128 * bm + 16 * bits * bn));
        let function = format!("gemm_grouped_w{bits}a8_{shape}");
        return tiled(p, m, tile, "gemm_w4a8/sm80", function, format!("w{bits} {shape}"), shared);
    }
    let (shape, shared) = (format!("{bm}x{bn}x{bk}"), stages * (bm + bn) * bk);
    let (module, function) = match (p.outliers, p.x_u8) {
        (true, _) => ("gemm_w8a8/llm_int8", format!("gemm_llm_int8_{shape}_{}", p.suffix)),
        (false, true) => ("gemm_w8a8/sm80", format!("gemm_w8a8_u8_{shape}")),
        (false, false) => ("gemm_w8a8/sm80", format!("gemm_w8a8_{shape}")),
    };
    tiled(p, m, tile, module, function, shape, shared)
}

/// The launch for `m` rows, `m` at least 1, in which a row's sums do not depend on `m`: tiles may, the order of the sums over k
/// may not. Sums of integers are exact in any order, and most kernels have only one.
pub(super) fn choose_batch_invariant(p: &Problem, m: usize) -> Launch {
    match p.layout {
        Layout::Blocks16(shape) => choose_w4a16::batch_invariant(p, shape, m),
        // gemv splits k over its warps.
        Layout::Fragments16Bit { .. } | Layout::FragmentsCodebook => choose_sm80::batch_invariant(p, m),
        _ => choose(p, m),
    }
}

fn best<'a>(tiles: &'a [Tile], p: &Problem, m: usize) -> &'a Tile {
    let cost = |tile: &Tile| tile.cost(m, p.n, p.sm_count);
    tiles
        .iter()
        .filter(|tile| tile.owns_scales(p))
        .min_by(|a, b| cost(a).total_cmp(&cost(b)))
        .expect("a family has tiles")
}

fn tiled(
    p: &Problem,
    m: usize,
    tile: &Tile,
    module: &'static str,
    function: String,
    config: String,
    shared: usize,
) -> Launch {
    let blocks = tile.count(m, p.n) as u32;
    let grid = Grid::new([blocks, 1, 1], tile.threads(), shared as u32);
    Launch { module, function, config, grid, box_rows: 0, cut_tiles: 0 }
}

/// Four tiles of 16 rows to a warp share what is read of x; one makes more blocks. Four once they make blocks for two of three
/// multiprocessors.
fn gemv(p: &Problem) -> Launch {
    let (name, _) = codes(p.layout);
    let tiles = if 3 * p.n.div_ceil(64) >= 2 * p.sm_count as usize { 4 } else { 1 };
    Launch {
        module: "gemm_w4a16/gemv",
        function: format!("gemv_{name}a16_1x{tiles}_{}", p.suffix),
        config: format!("{name} 8x{}", 16 * tiles),
        grid: Grid::new([p.n.div_ceil(16 * tiles) as u32, 1, 1], 256, 0),
        box_rows: 0,
        cut_tiles: 0,
    }
}

/// What kernels of gemm_w4a16 are called by, and the bits of their codes.
pub(super) fn codes(layout: Layout) -> (&'static str, usize) {
    match layout {
        Layout::FragmentsCodebook => ("c4", 4),
        Layout::Fragments16Bit { bits: 4 } => ("w4", 4),
        _ => ("w8", 8),
    }
}

fn any(p: &Problem, m: usize, function: String, config: &str) -> Launch {
    Launch {
        module: "gemm_any/any",
        function,
        config: config.into(),
        grid: Grid::new([p.n.div_ceil(ANY_WARPS) as u32, m.div_ceil(ANY_ROWS) as u32, 1], 32 * ANY_WARPS as u32, 0),
        box_rows: 0,
        cut_tiles: 0,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// On an H200, in bf16.
    pub(in super::super) fn problem(layout: Layout, n: usize, k: usize) -> Problem {
        Problem {
            layout,
            n,
            k,
            epilogue: Epilogue::NONE,
            x_u8: false,
            outliers: false,
            sums_only: false,
            sm_count: 132,
            max_shared: 226 << 10,
            suffix: "bf16",
        }
    }

    /// With the least shared memory that a block may have: 100 KB on sm_86 and sm_89, less the kilobyte the system takes.
    fn at(layout: Layout, n: usize, m: usize) -> Launch {
        choose(&Problem { max_shared: 99 << 10, ..problem(layout, n, 4096) }, m)
    }

    /// Arguments of each use of `name(` at the start of a line.
    pub(in super::super) fn uses(source: &str, name: &str) -> Vec<Vec<u32>> {
        let lines = source.lines().filter_map(|l| l.strip_prefix(name)?.strip_prefix('(')?.strip_suffix(')'));
        lines.map(|l| l.split(", ").map(|x| x.parse().expect("a number")).collect()).collect()
    }

    #[test]
    fn tables_are_those_of_the_kernels() {
        let table = |tiles: &[Tile], with_k: bool| -> Vec<Vec<u32>> {
            let row = |t: &Tile| {
                let k = with_k.then_some(t.bk as u32);
                [t.bm as u32, t.bn as u32].into_iter().chain(k).chain([t.warps_m, t.warps_n, t.stages]).collect()
            };
            tiles.iter().map(row).collect()
        };
        // The last argument, blocks that share a multiprocessor, concerns the compiler alone.
        let without_last = |mut uses: Vec<Vec<u32>>| {
            uses.iter_mut().for_each(|row| row.truncate(row.len() - 1));
            uses
        };
        let w8a8 = include_str!("../../../kernels/gemm_w8a8/sm80.cu");
        assert_eq!(without_last(uses(w8a8, "GEMM_W8A8")), table(&W8A8, true));
        assert_eq!(without_last(uses(w8a8, "GEMM_W8A8_U8")), table(&W8A8_U8, true));
        let llm_int8 = include_str!("../../../kernels/gemm_w8a8/llm_int8.cu");
        assert_eq!(without_last(uses(llm_int8, "GEMM_LLM_INT8_TYPES")), table(&LLM_INT8, true));
        let w4a8 = include_str!("../../../kernels/gemm_w4a8/sm80.cu");
        assert_eq!(without_last(uses(w4a8, "GEMM_W4A8_BITS")), table(&W4A8, false));
        let dense = include_str!("../../../kernels/gemm_16bit/sm80.cu");
        assert_eq!(without_last(uses(dense, "GEMM_16BIT_TYPES")), table(&DENSE, false));
        let gemv = uses(include_str!("../../../kernels/gemm_w4a16/gemv.cu"), "GEMV_W4A16_TYPES");
        assert_eq!(gemv, [[1, 1], [1, 4]]);
        let any = include_str!("../../../kernels/gemm_any/any.cu");
        assert!(any.contains(&format!("constexpr int WARPS = {ANY_WARPS};")));
        assert!(any.contains(&format!("constexpr int ROWS = {ANY_ROWS};")));
    }

    #[test]
    fn every_configuration_fits_every_gpu() {
        for m in [1, 16, 17, 64, 128, 512, 4096, 65536] {
            for n in [1, 64, 4096, 57344] {
                for bits in [4, 8] {
                    for layout in [
                        Layout::Rows8,
                        Layout::Fragments8Bit { bits },
                        Layout::Fragments16Bit { bits },
                        Layout::Dense { aligned: true },
                    ] {
                        let launch = at(layout, n, m);
                        assert!(launch.grid.shared_bytes <= 99 << 10, "{launch:?}");
                        assert!(launch.grid.blocks[0] > 0 && launch.grid.threads <= 256, "{launch:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn few_rows_get_small_tiles_and_many_get_large_ones() {
        assert_eq!(at(Layout::Rows8, 4096, 1).config, "16x32x256");
        assert_eq!(at(Layout::Rows8, 57344, 16).config, "16x32x256");
        assert_eq!(at(Layout::Rows8, 28672, 4096).config, "128x256x64");
        let w4 = Layout::Fragments16Bit { bits: 4 };
        assert_eq!((at(w4, 4096, 8).module, at(w4, 4096, 8).config.as_str()), ("gemm_w4a16/gemv", "w4 8x16"));
        assert_eq!(at(w4, 28672, 8).config, "w4 8x64");
        assert_eq!((at(w4, 28672, 9).module, at(w4, 28672, 9).config.as_str()), ("gemm_w4a16/sm80", "w4 16x128"));
        assert_eq!(at(w4, 57344, 1).config, "w4 16x128");
        assert_eq!(at(w4, 8192, 4096).config, "w4 128x256");
    }

    #[test]
    fn blocks_cover_the_output() {
        for (m, n) in [(1, 1), (65, 129), (128, 256), (257, 4097)] {
            let launch = at(Layout::Rows8, n, m);
            let (bm, rest) = launch.config.split_once('x').expect("a tile");
            let (bn, _) = rest.split_once('x').expect("a tile");
            let (bm, bn): (usize, usize) = (bm.parse().expect("bm"), bn.parse().expect("bn"));
            assert_eq!(launch.grid.blocks[0] as usize, m.div_ceil(bm) * n.div_ceil(bn));
        }
    }
}
