//! Configurations of gemm_w8a8/sm90 and which of them runs a shape: measured on an H200 (docs/kernels-linear.md).

use super::Grid;
use super::candidates::{Config, is_plausible};
use super::choose::{Launch, Problem};
use crate::device::{GROUP_OUTPUTS, Output};

/// Bytes of k in a slice.
const SLICE: usize = 128;
/// Rows of w in a block of its layout.
const BLOCK: usize = 64;
/// Barriers before the ring of slices in shared memory.
const HEAD_BYTES: usize = 1024;
/// What a block may have where two share a multiprocessor, a kilobyte of each being the system's.
const HALF_BYTES: usize = 113 << 10;

/// Tile of 128 rows of x by `bn` of w, walked over by one block a multiprocessor.
struct Many {
    bn: usize,
    stages: usize,
    /// The two warpgroups have every other tile each instead of half of each.
    turns: bool,
    /// Microseconds of a tile: fixed (with `turns` only after the last tile, else beside the next), and for each slice.
    tile_us: f64,
    slice_us: f64,
}

/// Tile of 64 * `groups` rows of w by `tokens` of x, its k split over a cluster.
struct Few {
    tokens: usize,
    groups: usize,
    stages: usize,
}

#[rustfmt::skip]
const MANY: [Many; 4] = [
    Many { bn: 64, stages: 8, turns: false, tile_us: 0.3, slice_us: 0.285 },
    Many { bn: 128, stages: 6, turns: true, tile_us: 1.3, slice_us: 0.390 },
    Many { bn: 192, stages: 5, turns: false, tile_us: 1.6, slice_us: 0.550 },
    Many { bn: 256, stages: 4, turns: false, tile_us: 2.5, slice_us: 0.750 },
];

/// In shared memory of half a multiprocessor where that makes more blocks at once, or of a whole one for more bytes
/// under way: `deep` in names.
#[rustfmt::skip]
const FEW: [Few; 12] = [
    Few { tokens: 8, groups: 1, stages: 8 },
    Few { tokens: 8, groups: 2, stages: 6 },
    Few { tokens: 16, groups: 1, stages: 8 },
    Few { tokens: 16, groups: 2, stages: 6 },
    Few { tokens: 32, groups: 1, stages: 8 },
    Few { tokens: 32, groups: 2, stages: 5 },
    Few { tokens: 64, groups: 1, stages: 6 },
    Few { tokens: 64, groups: 2, stages: 4 },
    Few { tokens: 64, groups: 2, stages: 9 },
    Few { tokens: 128, groups: 1, stages: 9 },
    Few { tokens: 128, groups: 2, stages: 3 },
    Few { tokens: 128, groups: 2, stages: 7 },
];

/// Rows up to which the kernels for few need no comparison with those for many.
const FEW_ROWS: usize = 128;
/// Of [`FEW`], the one for more rows where k is long and tiles are few; its microseconds as those of [`Many`].
const SPLIT: (usize, f64, f64) = (11, 4.2, 0.373);
/// Most blocks of a cluster.
const MAX_CLUSTER: usize = 8;

/// The launch of W8A8 for `m` rows, `m` at least 1.
pub(super) fn w8a8(p: &Problem, m: usize) -> Launch {
    let groups = p.epilogue.output == Output::Groups;
    if m <= FEW_ROWS && !groups {
        let (few, splits) = few(p, m);
        return few.launch(p, m, splits);
    }
    let tiles = MANY.iter().filter(|tile| tile.owns_scales(p));
    let best = tiles.min_by(|a, b| a.cost(p, m).total_cmp(&b.cost(p, m))).expect("the widest tile fits all");
    let (split, fixed_us, slice_us) = SPLIT;
    let few = &FEW[split];
    let tiles = p.n.div_ceil(few.groups * BLOCK) * m.div_ceil(few.tokens);
    let splits = few_splits(p, tiles, p.sm_count as usize);
    let split_us = fixed_us + p.k.div_ceil(SLICE).div_ceil(splits) as f64 * slice_us;
    if !groups && tiles <= p.sm_count as usize && split_us < best.cost(p, m) {
        return few.launch(p, m, splits);
    }
    best.launch(p, m)
}

/// Configurations among which the fastest for `m` rows should be.
pub(super) fn candidates(p: &Problem, m: usize) -> Vec<Config> {
    let groups = p.epilogue.output == Output::Groups;
    let many = (0..MANY.len()).filter(|&tile| (groups || 2 * m > FEW_ROWS) && MANY[tile].owns_scales(p));
    let mut all: Vec<Config> = many.map(|tile| Config { tile, splits: 0 }).collect();
    for (tile, few) in FEW.iter().enumerate().filter(|_| !groups) {
        let (size, slices) = ([few.groups * BLOCK, few.tokens], p.k.div_ceil(SLICE));
        let splits = [1, 2, 4, MAX_CLUSTER].into_iter().filter(|&s| is_plausible(p, m, size, slices, s));
        all.extend(splits.map(|splits| Config { tile, splits }));
    }
    all
}

/// The launch of one of [`candidates`].
pub(super) fn with_config(p: &Problem, config: Config, m: usize) -> Launch {
    match config.splits {
        0 => MANY[config.tile].launch(p, m),
        splits => FEW[config.tile].launch(p, m, splits),
    }
}

/// Splits of k of `tiles` tiles: powers of two, up to `blocks` blocks in all.
fn few_splits(p: &Problem, tiles: usize, blocks: usize) -> usize {
    let most = (p.k.div_ceil(SLICE)).min(MAX_CLUSTER);
    let mut splits = 1;
    while 2 * splits <= most && tiles * 2 * splits <= blocks {
        splits *= 2;
    }
    splits
}

/// Weights are streamed by about as many blocks as fit at once; k is split only where rows of w make too few.
fn few(p: &Problem, m: usize) -> (&'static Few, usize) {
    let sms = p.sm_count as usize;
    let narrow = p.n.div_ceil(BLOCK);
    let wide = p.n.div_ceil(2 * BLOCK);
    let tokens = m.next_power_of_two().max(8);
    let pick = |groups, stages| {
        let found = FEW.iter().find(|f| (f.tokens, f.groups, f.stages) == (tokens, groups, stages));
        found.expect("a configuration of the table")
    };
    let split = |tiles, blocks| few_splits(p, tiles, blocks);
    let one_and_a_half = sms + sms / 2;
    match tokens {
        ..=32 => {
            let deep = if tokens == 32 { 5 } else { 6 };
            // All at once in two to a multiprocessor, where narrow tiles would make a second round.
            if narrow > 2 * sms && wide <= 2 * sms {
                (pick(2, deep), 1)
            } else {
                (pick(1, 8), split(narrow, one_and_a_half))
            }
        }
        64 if 4 * narrow <= 3 * sms => (pick(1, 6), split(narrow, one_and_a_half)),
        64 if wide <= sms => (pick(2, 9), split(wide, sms)),
        64 => (pick(2, 4), 1),
        _ if narrow <= sms => (pick(1, 9), split(narrow, sms)),
        _ if wide <= sms => (pick(2, 7), split(wide, sms)),
        _ => (pick(2, 3), 1),
    }
}

impl Few {
    fn launch(&self, p: &Problem, m: usize, splits: usize) -> Launch {
        let Few { tokens, groups, stages } = *self;
        let stage = groups * BLOCK * SLICE + (tokens * SLICE).next_multiple_of(1024);
        let tiles = p.n.div_ceil(groups * BLOCK);
        let shared_bytes = HEAD_BYTES + stages * stage;
        let deep = shared_bytes > HALF_BYTES;
        let grid = Grid {
            blocks: [(tiles * splits) as u32, m.div_ceil(tokens) as u32, 1],
            threads: 128 * groups as u32 + 32,
            shared_bytes: shared_bytes as u32,
            cluster: splits as u32,
            overlaps: true,
        };
        Launch {
            module: "gemm_w8a8/sm90",
            function: format!("gemm_w8a8_few_{tokens}x{groups}x{stages}"),
            config: format!("{}x{tokens} split {splits}{}", groups * BLOCK, if deep { " deep" } else { "" }),
            grid,
            box_rows: tokens as u32,
            cut_tiles: 0,
        }
    }
}

impl Many {
    const BM: usize = 128;

    fn tiles(&self, p: &Problem, m: usize) -> usize {
        m.div_ceil(Self::BM) * p.n.div_ceil(self.bn)
    }

    /// A block must own all outputs that share a scale.
    fn owns_scales(&self, p: &Problem) -> bool {
        let inputs = p.n / p.epilogue.outputs(p.n);
        p.epilogue.output != Output::Groups || self.bn.is_multiple_of(GROUP_OUTPUTS * inputs)
    }

    /// Microseconds, but for what all share.
    fn cost(&self, p: &Problem, m: usize) -> f64 {
        let rounds = self.tiles(p, m).div_ceil(p.sm_count as usize) as f64;
        let ends = if self.turns { 1.0 } else { rounds };
        rounds * p.k.div_ceil(SLICE) as f64 * self.slice_us + ends * self.tile_us
    }

    fn launch(&self, p: &Problem, m: usize) -> Launch {
        let Many { bn, stages, turns, .. } = *self;
        // Beside the ring, for each warpgroup: three words a column, and 2 KB a warp for whole lines of y.
        let epilogue = 2 * (12 * bn + 4 * 2048);
        let blocks = self.tiles(p, m).min(p.sm_count as usize);
        let grid = Grid {
            blocks: [blocks as u32, 1, 1],
            threads: 384,
            shared_bytes: (HEAD_BYTES + stages * (Self::BM + bn) * SLICE + epilogue) as u32,
            cluster: 1,
            overlaps: true,
        };
        Launch {
            module: "gemm_w8a8/sm90",
            function: format!("gemm_w8a8_many_{bn}x{stages}_{}", u8::from(turns)),
            config: format!("128x{bn}{}", if turns { " in turns" } else { "" }),
            grid,
            box_rows: Self::BM as u32,
            cut_tiles: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::choose::tests::{problem, uses};
    use super::super::pack::Layout;
    use super::*;
    use crate::device::{Activation, Epilogue};

    #[test]
    fn tables_are_those_of_the_kernels() {
        let source = include_str!("../../../kernels/gemm_w8a8/sm90.cu");
        let many: Vec<Vec<u32>> =
            MANY.iter().map(|t| [t.bn, t.stages, usize::from(t.turns)].map(|x| x as u32).to_vec()).collect();
        assert_eq!(uses(source, "GEMM_W8A8_MANY"), many);
        let few: Vec<Vec<u32>> =
            FEW.iter().map(|t| [t.tokens, t.groups, t.stages].map(|x| x as u32).to_vec()).collect();
        let mut in_source = uses(source, "GEMM_W8A8_FEW");
        in_source.iter_mut().for_each(|row| row.truncate(3)); // the last concerns the compiler alone
        assert_eq!(in_source, few);
    }

    #[test]
    fn groups_of_outputs_lie_in_one_tile() {
        for (activation, bn) in [(Activation::None, 128), (Activation::SwiGlu, 256)] {
            for m in [1, 100, 300, 4096] {
                let epilogue = Epilogue { activation, output: Output::Groups };
                let launch = w8a8(&Problem { epilogue, ..problem(Layout::Blocks8, 6144, 4096) }, m);
                let tile: usize = launch.function.split(['_', 'x']).nth(3).expect("a tile").parse().expect("a width");
                assert!(launch.function.contains("many") && tile.is_multiple_of(bn), "{launch:?}");
            }
        }
    }

    /// 227 KB, what a block may have on an H100 or H200; clusters divide their grids.
    #[test]
    fn every_launch_is_one_that_the_gpu_takes() {
        for m in [1, 8, 9, 16, 33, 64, 65, 128, 129, 256, 384, 4096, 65536] {
            for (n, k) in [(1, 16), (64, 128), (520, 1040), (4096, 4096), (6144, 4096), (57344, 8192), (8192, 28672)] {
                let launch = w8a8(&problem(Layout::Blocks8, n, k), m);
                let Grid { blocks, threads, shared_bytes, cluster, .. } = launch.grid;
                assert!(shared_bytes <= 227 << 10, "{launch:?}");
                assert!(
                    blocks[0] > 0 && blocks[0].is_multiple_of(cluster) && cluster <= 8 && threads <= 384,
                    "{launch:?}"
                );
                assert!(launch.box_rows <= 256, "{launch:?}");
            }
        }
    }

    /// What was fastest when measured, or next to it.
    #[test]
    fn choices_are_the_measured_ones() {
        let config = |n, k, m| w8a8(&problem(Layout::Blocks8, n, k), m).config;
        assert_eq!(config(4096, 4096, 1), "64x8 split 2");
        assert_eq!(config(28672, 4096, 16), "128x16 split 1");
        assert_eq!(config(57344, 8192, 16), "64x16 split 1");
        assert_eq!(config(8192, 28672, 64), "128x64 split 2 deep");
        assert_eq!(config(28672, 4096, 128), "128x128 split 1");
        assert_eq!(config(6144, 4096, 128), "64x128 split 1 deep");
        assert_eq!(config(4096, 4096, 256), "128x64");
        assert_eq!(config(4096, 14336, 256), "128x128 split 2 deep");
        assert_eq!(config(8192, 8192, 256), "128x128 in turns");
        assert_eq!(config(6144, 4096, 512), "128x192");
        assert_eq!(config(28672, 4096, 512), "128x128 in turns");
        assert_eq!(config(8192, 8192, 4096), "128x128 in turns");
    }
}
