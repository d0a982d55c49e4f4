//! Configurations of gemm_w4a16/sm90 and which of them runs a shape: measured on an H200 (docs/kernels-linear.md).

use super::Grid;
use super::candidates::{Config, is_plausible};
use super::choose::{Launch, Problem};
use super::choose_w4a16_warps;
use super::pack_blocks::{BlockShape, COLUMNS, ROWS};

/// Tile of 64 * `groups` rows of w by `tokens` of x, its k split over a cluster.
struct Few {
    tokens: usize,
    groups: usize,
    /// Blocks of w, of `groups`, that each warp has rows of.
    share: usize,
    /// Blocks of the grid for which a multiprocessor has room.
    resident: usize,
}

#[rustfmt::skip]
const FEW: [Few; 5] = [
    Few { tokens: 16, groups: 4, share: 2, resident: 2 },
    Few { tokens: 32, groups: 2, share: 1, resident: 2 },
    Few { tokens: 64, groups: 2, share: 1, resident: 1 },
    Few { tokens: 64, groups: 4, share: 1, resident: 1 },
    Few { tokens: 128, groups: 2, share: 1, resident: 1 },
];

/// Microseconds that a multiprocessor takes for a tile: for each block of k, and besides.
struct Cost {
    block_us: f64,
    tile_us: f64,
}

impl Cost {
    /// Of `tiles` of `k_blocks` blocks of k each, spread over `sms` multiprocessors.
    fn of(&self, tiles: usize, k_blocks: f64, sms: usize) -> f64 {
        tiles.div_ceil(sms) as f64 * (self.tile_us + k_blocks * self.block_us)
    }
}

/// The same tile walked over by one block a multiprocessor.
struct Many {
    tokens: usize,
    groups: usize,
    cost: Cost,
}

#[rustfmt::skip]
const MANY: [Many; 3] = [
    Many { tokens: 128, groups: 2, cost: Cost { block_us: 0.72, tile_us: 2.7 } },
    Many { tokens: 128, groups: 4, cost: Cost { block_us: 1.345, tile_us: 2.0 } },
    Many { tokens: 256, groups: 2, cost: Cost { block_us: 1.32, tile_us: 5.6 } },
];
/// Of the tile of 128 rows by 128 tokens with k split.
const FEW_128: Cost = Cost { block_us: 0.83, tile_us: 5.0 };

/// Splits of k that were of use: clusters of 5 and 7 leave too many multiprocessors of a processing cluster idle.
const SPLITS: [usize; 6] = [8, 6, 4, 3, 2, 1];
/// Stages without which a kernel's ring stands still: one is filled again only after the next has come.
pub(super) const LEAST_STAGES: usize = 2;
/// Shared memory of a block: barriers, and a warp's place to turn its tile over.
pub(super) const HEAD_BYTES: usize = 1024;
pub(super) const TURN_BYTES: usize = 640;
/// Shared memory of a multiprocessor that blocks may have.
pub(super) const SHARED_BYTES: usize = 227 << 10;

/// The launch of W4A16 and W8A16 for `m` rows, `m` at least 1.
pub(super) fn w4a16(p: &Problem, shape: BlockShape, m: usize) -> Launch {
    let few = |tokens, groups| {
        FEW.iter().find(|f| (f.tokens, f.groups) == (tokens, groups)).expect("a configuration of the table")
    };
    let sms = p.sm_count as usize;
    // The most splits that still run at once; weights are streamed fastest by about three blocks for two multiprocessors.
    let split = |f: &Few| {
        let tiles = p.n.div_ceil(ROWS * f.groups) * m.div_ceil(f.tokens);
        let fits = |&splits: &usize| match (f.resident, splits) {
            (2, _) => tiles * splits <= sms * 17 / 10,
            (_, 3 | 8) => tiles * splits <= sms * 9 / 10,
            (_, 4) => tiles * splits <= sms * 15 / 16,
            (_, 6) => tiles * splits <= sms * 3 / 4,
            _ => tiles * splits <= sms,
        };
        let most = p.k.div_ceil(COLUMNS);
        SPLITS.into_iter().filter(|&splits| splits <= most).find(fits).unwrap_or(1)
    };
    let k_blocks = p.k.div_ceil(COLUMNS);
    match m {
        ..=choose_w4a16_warps::MOST_ROWS => choose_w4a16_warps::few_rows(p, shape, m)
            .unwrap_or_else(|| few(16, 4).launch(p, shape, m, split(few(16, 4)))),
        17..=32 => few(32, 2).launch(p, shape, m, split(few(32, 2))),
        33..=64 => {
            let wide = few(64, 4);
            let blocks = p.n.div_ceil(ROWS * wide.groups) * split(wide);
            let f = if 3 * blocks >= 2 * sms { wide } else { few(64, 2) };
            f.launch(p, shape, m, split(f))
        }
        _ => {
            let few = few(128, 2);
            let tiles = p.n.div_ceil(2 * ROWS) * m.div_ceil(128);
            let few_us = FEW_128.of(tiles * split(few), k_blocks as f64 / split(few) as f64, sms);
            let many = MANY.iter().min_by(|a, b| a.us(p, m).total_cmp(&b.us(p, m))).expect("a family has tiles");
            if few_us < many.us(p, m) { few.launch(p, shape, m, split(few)) } else { many.launch(p, shape, m) }
        }
    }
}

/// Configurations among which the fastest for `m` rows should be.
pub(super) fn candidates(p: &Problem, shape: BlockShape, m: usize) -> Vec<Config> {
    let many = (0..MANY.len()).filter(|_| m > 64).map(|tile| Config { tile, splits: 0 });
    let few = FEW.iter().enumerate().flat_map(|(tile, few)| {
        let (size, slices) = ([few.groups * ROWS, few.tokens], p.k.div_ceil(COLUMNS));
        let splits = SPLITS.into_iter().filter(move |&splits| {
            is_plausible(p, m, size, slices, splits) && few.stages(shape, splits) >= LEAST_STAGES
        });
        splits.map(move |splits| Config { tile, splits })
    });
    let warps = choose_w4a16_warps::candidates(p, shape, m).into_iter();
    many.chain(few).chain(warps.map(|config| Config { tile: FEW.len() + config.tile, ..config })).collect()
}

/// The launch of one of [`candidates`].
pub(super) fn with_config(p: &Problem, shape: BlockShape, config: Config, m: usize) -> Launch {
    let Config { tile, splits } = config;
    match tile.checked_sub(FEW.len()) {
        _ if splits == 0 => MANY[tile].launch(p, shape, m),
        None => FEW[tile].launch(p, shape, m, splits),
        Some(tile) => choose_w4a16_warps::with_config(p, shape, Config { tile, splits }, m)
            .expect("a candidate of more rows has room for fewer"),
    }
}

/// The launch for `m` rows, `m` at least 1, with one order of sums for all: tiles that multiply by `wgmma` and scale the sums of a
/// group, k split as `n` and `k` say.
pub(super) fn batch_invariant(p: &Problem, shape: BlockShape, m: usize) -> Launch {
    let tokens = match m {
        ..=32 => 32,
        33..=64 => 64,
        _ => 128,
    };
    let few = FEW.iter().find(|f| (f.tokens, f.groups) == (tokens, 2)).expect("a configuration of the table");
    let (tiles, most) = (p.n.div_ceil(2 * ROWS), p.k.div_ceil(COLUMNS));
    let fits = |&splits: &usize| splits <= most && 2 * tiles * splits <= 3 * p.sm_count as usize;
    few.launch(p, shape, m, SPLITS.into_iter().find(fits).unwrap_or(1))
}

impl Few {
    /// Behind the ring: a warp's place to turn its tile over, then what the other blocks send.
    fn tail_bytes(&self, splits: usize) -> usize {
        let sixteens = if splits == 1 { 0 } else { (4 * self.groups).next_multiple_of(splits) };
        4 * self.groups / self.share * TURN_BYTES + sixteens * 16 * self.tokens * 4
    }

    /// Stages of the ring that there is room for.
    fn stages(&self, shape: BlockShape, splits: usize) -> usize {
        // A kilobyte of each block is the system's.
        let room = (SHARED_BYTES + 1024) / self.resident - 1024;
        (room - HEAD_BYTES - self.tail_bytes(splits)) / stage_bytes(self.tokens, self.groups, shape)
    }

    fn launch(&self, p: &Problem, shape: BlockShape, m: usize, splits: usize) -> Launch {
        let Few { tokens, groups, share, .. } = *self;
        let of_k = p.k.div_ceil(COLUMNS).div_ceil(splits).max(LEAST_STAGES);
        let stages = self.stages(shape, splits).min(of_k);
        let grid = Grid {
            blocks: [(p.n.div_ceil(groups * ROWS) * splits) as u32, m.div_ceil(tokens) as u32, 1],
            threads: 128 * (groups / share) as u32,
            shared_bytes: (HEAD_BYTES + stages * stage_bytes(tokens, groups, shape) + self.tail_bytes(splits)) as u32,
            cluster: splits as u32,
            overlaps: true,
        };
        let config = format!("{}x{tokens} split {splits}", groups * ROWS);
        launch(p, shape, &format!("few_{tokens}x{groups}"), &config, tokens, grid)
    }
}

impl Many {
    fn tiles(&self, p: &Problem, m: usize) -> usize {
        m.div_ceil(self.tokens) * p.n.div_ceil(self.groups * ROWS)
    }

    fn us(&self, p: &Problem, m: usize) -> f64 {
        self.cost.of(self.tiles(p, m), p.k.div_ceil(COLUMNS) as f64, p.sm_count as usize)
    }

    fn launch(&self, p: &Problem, shape: BlockShape, m: usize) -> Launch {
        let Many { tokens, groups, .. } = *self;
        let tail = 4 * groups * TURN_BYTES;
        let stages = (SHARED_BYTES - HEAD_BYTES - tail) / stage_bytes(tokens, groups, shape);
        let grid = Grid {
            blocks: [self.tiles(p, m).min(p.sm_count as usize) as u32, 1, 1],
            threads: 128 * (groups as u32 + 1),
            shared_bytes: (HEAD_BYTES + stages * stage_bytes(tokens, groups, shape) + tail) as u32,
            cluster: 1,
            overlaps: true,
        };
        launch(p, shape, &format!("many_{tokens}x{groups}"), &format!("{}x{tokens}", groups * ROWS), tokens, grid)
    }
}

/// Of the ring: 128 columns of x, and a block for each of `groups`.
fn stage_bytes(tokens: usize, groups: usize, shape: BlockShape) -> usize {
    (tokens * COLUMNS * 2 + groups * shape.bytes()).next_multiple_of(1024)
}

/// The launch of `kernel`, as the module's names go on after the op, whose tile has `tokens` rows of x; `config` as reports name it.
pub(super) fn launch(p: &Problem, shape: BlockShape, kernel: &str, config: &str, tokens: usize, grid: Grid) -> Launch {
    let bits = shape.bits;
    Launch {
        module: "gemm_w4a16/sm90",
        function: format!("gemm_w{bits}a16_{kernel}_{}", p.suffix),
        config: format!("w{bits} {config}"),
        grid,
        box_rows: tokens as u32,
        cut_tiles: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::super::choose::tests::{problem, uses};
    use super::super::pack::Layout;
    use super::*;

    const SHAPE: BlockShape = BlockShape { bits: 4, groups: 1, low_scales: false, zeros: false };

    #[test]
    fn tables_are_those_of_the_kernels() {
        let source = include_str!("../../../kernels/gemm_w4a16/sm90.cu");
        let few: Vec<Vec<u32>> =
            FEW.iter().map(|f| [f.tokens, f.groups, f.share, f.resident].map(|x| x as u32).to_vec()).collect();
        assert_eq!(uses(source, "GEMM_W4A16_FEW_TYPES"), few);
        let many: Vec<Vec<u32>> = MANY.iter().map(|t| [t.tokens, t.groups].map(|x| x as u32).to_vec()).collect();
        assert_eq!(uses(source, "GEMM_W4A16_MANY_TYPES"), many);
        let block = include_str!("../../../kernels/gemm_w4a16/sm90_block.cuh");
        assert!(block.contains(&format!("HEAD_BYTES = {HEAD_BYTES},")));
        assert_eq!(TURN_BYTES, 8 * 20 * 4);
        assert!(block.contains("TURN_STRIDE = 20, TURN_BYTES = 8 * TURN_STRIDE * 4;"));
    }

    /// At most the shared memory of an H100 or H200, with the two stages that the kernels need to go round their ring.
    #[test]
    fn every_launch_is_one_that_the_gpu_takes() {
        for shape in [
            SHAPE,
            BlockShape { bits: 4, groups: 4, low_scales: true, zeros: true },
            BlockShape { bits: 8, groups: 1, low_scales: false, zeros: false },
            BlockShape { bits: 8, groups: 4, low_scales: true, zeros: true },
        ] {
            for m in [1, 8, 9, 16, 17, 33, 64, 65, 128, 129, 257, 512, 4096, 65536] {
                for (n, k) in
                    [(1, 8), (64, 128), (520, 1040), (4096, 4096), (4096, 14336), (57344, 8192), (8192, 28672)]
                {
                    let p = problem(Layout::Blocks16(shape), n, k);
                    let others = candidates(&p, shape, m).into_iter().map(|config| with_config(&p, shape, config, m));
                    for launch in others.chain([w4a16(&p, shape, m), batch_invariant(&p, shape, m)]) {
                        let Grid { blocks, threads, shared_bytes, cluster, .. } = launch.grid;
                        assert!(shared_bytes <= SHARED_BYTES as u32, "{launch:?}");
                        assert!(
                            blocks[0] > 0 && blocks[0].is_multiple_of(cluster) && cluster <= 8 && threads <= 640,
                            "{launch:?}"
                        );
                        assert!(launch.box_rows <= 256 && cluster as usize <= k.div_ceil(COLUMNS), "{launch:?}");
                        if launch.function.contains("warps") {
                            continue;
                        }
                        let (tokens, groups) =
                            (launch.box_rows as usize, if launch.config.contains("256x") { 4 } else { 2 });
                        let few = FEW.iter().find(|f| (f.tokens, f.groups) == (tokens, groups));
                        let tail = match few.filter(|_| launch.function.contains("few")) {
                            Some(few) => few.tail_bytes(cluster as usize),
                            None => 4 * groups * TURN_BYTES,
                        };
                        let ring = shared_bytes as usize - HEAD_BYTES - tail;
                        assert!(ring >= LEAST_STAGES * stage_bytes(tokens, groups, shape), "{launch:?}");
                    }
                }
            }
        }
    }

    /// What was fastest when measured.
    #[test]
    fn choices_are_the_measured_ones() {
        let config = |n, k, m| w4a16(&problem(Layout::Blocks16(SHAPE), n, k), SHAPE, m).config;
        assert_eq!(config(28672, 4096, 8), "w4 128x8/4 split 1 by 2");
        assert_eq!(config(28672, 4096, 16), "w4 256x16 split 2");
        assert_eq!(config(8192, 8192, 32), "w4 128x32 split 3");
        assert_eq!(config(8192, 8192, 64), "w4 256x64 split 3");
        assert_eq!(config(57344, 8192, 64), "w4 256x64 split 1");
        assert_eq!(config(6144, 4096, 128), "w4 128x128 split 2");
        assert_eq!(config(4096, 14336, 256), "w4 128x128 split 2");
        assert_eq!(config(28672, 4096, 128), "w4 256x128");
        assert_eq!(config(4096, 4096, 512), "w4 128x128");
        assert_eq!(config(8192, 8192, 512), "w4 256x128");
        assert_eq!(config(8192, 28672, 1024), "w4 128x256");
    }
}
