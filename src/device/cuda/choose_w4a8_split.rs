//! Configurations of gemm_w4a8/sm90_split.cuh, for weights whose rows are one group: where tiles do not fill the GPU.

use super::Grid;
use super::candidates::{Config, is_plausible};
use super::choose::{Launch, Problem};
use super::choose_w4a8::{HEAD_BYTES, MOST_STAGES, Ring, SHARED_BYTES, module, prefix, stage_bytes};
use super::pack_blocks::{COLUMNS, ROWS};
use super::pack_w4a8::NibbleShape;

/// Tile of 64 * `groups` rows of w by `tokens` of x, k split over a cluster, and over `parts` warpgroups of a block.
struct Split {
    tokens: usize,
    groups: usize,
    parts: usize,
    /// Most blocks that share a multiprocessor, whose memory has room for so many rings where it has more than one block.
    resident: usize,
    rings: usize,
}

#[rustfmt::skip]
const SPLITS: [Split; 4] = [
    Split { tokens: 16, groups: 1, parts: 2, resident: 2, rings: 4 },
    Split { tokens: 32, groups: 1, parts: 2, resident: 2, rings: 3 },
    Split { tokens: 64, groups: 1, parts: 2, resident: 2, rings: 2 },
    Split { tokens: 128, groups: 1, parts: 2, resident: 1, rings: 1 },
];
/// Blocks of a cluster that may be the best.
const CLUSTERS: [usize; 6] = [1, 2, 3, 4, 6, 8];
/// Of the last of [`SPLITS`]: microseconds of a block of k, and what a tile takes beside.
const SPLIT_US: (f64, f64) = (0.23, 3.5);

/// The launch for `m` rows where tiles do not fill the GPU, or end later: in `tile_us` microseconds, asked for where that counts.
/// `None` where they are faster.
pub(super) fn w4a8(p: &Problem, shape: NibbleShape, m: usize, tile_us: impl Fn() -> f64) -> Option<Launch> {
    let sms = p.sm_count as usize;
    if !shape.one_group || m <= 4 {
        return None;
    }
    let split = SPLITS.iter().find(|split| m <= split.tokens).unwrap_or(&SPLITS[SPLITS.len() - 1]);
    let splits = split.splits(p, m);
    let us = p.k.div_ceil(COLUMNS).div_ceil(splits) as f64 * SPLIT_US.0 + SPLIT_US.1;
    let is_fast = m <= split.tokens || us < tile_us();
    let fits = split.count(p, m) <= split.resident * sms;
    (is_fast && fits).then(|| split.launch(p, shape, m, splits))
}

/// Configurations among which the fastest for `m` rows should be.
pub(super) fn candidates(p: &Problem, shape: NibbleShape, m: usize) -> impl Iterator<Item = Config> {
    SPLITS.iter().enumerate().filter(move |_| shape.one_group).flat_map(move |(tile, split)| {
        let (size, blocks) = ([split.groups * ROWS, split.tokens], p.k.div_ceil(COLUMNS));
        let splits = CLUSTERS.into_iter().filter(move |&splits| is_plausible(p, m, size, blocks, splits));
        splits.map(move |splits| Config { tile, splits })
    })
}

/// The launch of one of [`candidates`].
pub(super) fn with_config(p: &Problem, shape: NibbleShape, config: Config, m: usize) -> Launch {
    SPLITS[config.tile].launch(p, shape, m, config.splits)
}

/// The ring of `launch`, if it is one of these.
pub(super) fn ring(launch: &Launch, shape: NibbleShape) -> Option<Ring> {
    let split = SPLITS.iter().find(|split| split.function(shape) == launch.function)?;
    let stage_bytes = stage_bytes(split.tokens, split.groups, shape);
    Some(Ring { stages: (launch.grid.shared_bytes as usize - HEAD_BYTES) / stage_bytes, stage_bytes })
}

impl Split {
    fn function(&self, shape: NibbleShape) -> String {
        format!("{}_split_{}x{}x{}", prefix(shape, ""), self.tokens, self.groups, self.parts)
    }

    fn count(&self, p: &Problem, m: usize) -> usize {
        p.n.div_ceil(self.groups * ROWS) * m.div_ceil(self.tokens)
    }

    /// Parts of k: two where a multiprocessor has room for more or both of all tiles fill the GPU, and more while each has one
    /// of its own.
    fn splits(&self, p: &Problem, m: usize) -> usize {
        let (tiles, sms) = (self.count(p, m), p.sm_count as usize);
        let most = CLUSTERS[CLUSTERS.len() - 1].min(p.k.div_ceil(COLUMNS));
        let shares = self.rings > 2 || self.rings == 2 && 4 * tiles > 3 * sms;
        let mut splits = if shares && tiles <= sms { most.min(2) } else { 1 };
        while 2 * splits <= most && tiles * 2 * splits <= sms {
            splits *= 2;
        }
        splits
    }

    fn launch(&self, p: &Problem, shape: NibbleShape, m: usize, splits: usize) -> Launch {
        let Split { tokens, groups, parts, rings, .. } = *self;
        let rings = if self.count(p, m) * splits <= p.sm_count as usize { 1 } else { rings };
        let stage_bytes = stage_bytes(tokens, groups, shape);
        // Of a block's part of k as many stages as there is room for, a multiple of `parts`. In the end sums are there, of each
        // token the rows and four words more.
        let most = (SHARED_BYTES / rings - 1024 - HEAD_BYTES) / stage_bytes;
        let fewest = (parts * tokens * (groups * ROWS + 4) * 4).div_ceil(stage_bytes).max(2);
        let stages = p.k.div_ceil(COLUMNS).div_ceil(splits).max(fewest).next_multiple_of(parts);
        let stages = stages.min(most.min(MOST_STAGES) / parts * parts);
        let grid = Grid {
            blocks: [(p.n.div_ceil(groups * ROWS) * splits) as u32, m.div_ceil(tokens) as u32, 1],
            threads: (128 * groups * parts + 64) as u32,
            shared_bytes: (HEAD_BYTES + stages * stage_bytes) as u32,
            cluster: splits as u32,
            overlaps: true,
        };
        Launch {
            module: module(shape),
            function: self.function(shape),
            config: format!("w{} {}x{tokens} cluster {splits}", shape.bits, groups * ROWS),
            grid,
            box_rows: tokens as u32,
            cut_tiles: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::choose::choose;
    use super::super::choose::tests::{problem, uses};
    use super::super::pack::Layout;
    use super::*;

    #[test]
    fn table_is_that_of_the_kernels() {
        let splits: Vec<Vec<u32>> =
            SPLITS.iter().map(|s| [s.tokens, s.groups, s.parts, s.resident].map(|x| x as u32).to_vec()).collect();
        assert_eq!(uses(include_str!("../../../kernels/gemm_w4a8/sm90.cu"), "GEMM_W4A8_SM90_SPLIT"), splits);
        assert_eq!(uses(include_str!("../../../kernels/gemm_w2a8/sm90.cu"), "GEMM_W2A8_SM90_SPLIT"), splits);
        let of_factors = include_str!("../../../kernels/gemm_w4a8_factored/sm90.cu");
        assert_eq!(uses(of_factors, "GEMM_W4A8_FACTORED_SM90_SPLIT"), splits);
        let split = include_str!("../../../kernels/gemm_w4a8/sm90_split.cuh");
        assert!(split.contains("STRIDE = ROWS + 4;") && split.contains("WORDS = TOKENS * STRIDE;"));
        assert!(split.contains("THREADS = CONSUMERS + 64;"));
    }

    #[test]
    fn rows_of_one_group_split_k_where_tiles_are_few() {
        let shape = NibbleShape { bits: 4, one_group: true, factors: true, parts: 1, group_blocks: 32 };
        let config = |n, k, m| choose(&problem(Layout::Blocks4(shape), n, k), m).config;
        assert_eq!(config(4096, 4096, 1), "w4 16x8 split 8");
        assert_eq!(config(4096, 14336, 16), "w4 64x16 cluster 2");
        assert_eq!(config(8192, 28672, 32), "w4 64x32 cluster 2");
        assert_eq!(config(28672, 4096, 16), "w4 64x16");
        assert_eq!(config(4096, 14336, 64), "w4 64x64 cluster 2");
        assert_eq!(config(6144, 4096, 64), "w4 64x64 cluster 1");
        assert_eq!(config(1024, 4096, 64), "w4 64x64 cluster 8");
        assert_eq!(config(4096, 14336, 128), "w4 64x128 cluster 2");
        assert_eq!(config(8192, 28672, 128), "w4 64x128 cluster 1");
        assert_eq!(config(4096, 14336, 256), "w4 64x128 cluster 1");
        assert_eq!(config(28672, 4096, 128), "w4 128x128");
        // Measured: 39.5, 43.8 with 128 x 128 and 44.9 with 128 x 256; 23.2 and 30.0.
        assert_eq!(config(6144, 4096, 1024), "w4 192x128");
        assert_eq!(config(4096, 4096, 1024), "w4 128x256");
        assert_eq!(config(8192, 8192, 4096), "w4 128x256");
    }
}
