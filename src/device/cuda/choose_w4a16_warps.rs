//! Configurations of gemm_w4a16/sm90_warps.cuh, for up to sixteen rows.

use super::Grid;
use super::candidates::Config;
use super::choose::{Launch, Problem};
use super::choose_w4a16::{HEAD_BYTES, LEAST_STAGES, SHARED_BYTES, TURN_BYTES, launch};
use super::pack_blocks::{BlockShape, COLUMNS, ROWS};

/// Tile of 64 * `groups` rows of w by `tokens` of x, its k split over `parts` warps, and slices of it over a cluster; blocks walk
/// over tiles.
struct Warps {
    tokens: usize,
    groups: usize,
    parts: usize,
    /// Blocks of w that a warp has under way.
    depth: usize,
    /// Most blocks of a launch that share a multiprocessor.
    beside: usize,
}

#[rustfmt::skip]
const WARPS: [Warps; 10] = [
    Warps { tokens: 8, groups: 1, parts: 8, depth: 2, beside: 1 },
    Warps { tokens: 8, groups: 1, parts: 8, depth: 2, beside: 2 },
    Warps { tokens: 8, groups: 2, parts: 4, depth: 2, beside: 2 },
    Warps { tokens: 8, groups: 1, parts: 12, depth: 2, beside: 1 },
    Warps { tokens: 8, groups: 1, parts: 16, depth: 2, beside: 1 },
    Warps { tokens: 8, groups: 1, parts: 4, depth: 2, beside: 2 },
    Warps { tokens: 16, groups: 1, parts: 8, depth: 2, beside: 1 },
    Warps { tokens: 16, groups: 2, parts: 4, depth: 2, beside: 1 },
    Warps { tokens: 16, groups: 4, parts: 2, depth: 2, beside: 1 },
    Warps { tokens: 16, groups: 1, parts: 12, depth: 2, beside: 1 },
];
/// Slices of k, by which the kernel divides with shifts.
const SLICES: [usize; 4] = [1, 2, 4, 8];
/// Most stages of x.
const MAX_STAGES: usize = 32;
/// Rows of x that there is a configuration for.
pub(super) const MOST_ROWS: usize = 16;

/// The launch for `m` rows, 1 to [`MOST_ROWS`]; `None` where a kernel with another split of the work is faster, or x has no room.
pub(super) fn few_rows(p: &Problem, shape: BlockShape, m: usize) -> Option<Launch> {
    let sms = p.sm_count as usize;
    let blocks = p.n.div_ceil(ROWS);
    let many = 2 * blocks >= 5 * sms;
    let wanted = match (m, many) {
        // Tiles of 128 rows, two beside each other, spread 28672 outputs more evenly; they are too large to matter above.
        (..=8, true) if blocks < 6 * sms => [2, 0],
        (..=8, _) => [0, 5],
        (_, true) if shape.bits == 4 => return None,
        _ => [6, 7],
    };
    let slices = |warps: &Warps| {
        let tiles = warps.tiles(p) * m.div_ceil(warps.tokens);
        let fits = |&slices: &usize| tiles * slices <= sms * warps.beside;
        SLICES.into_iter().rev().filter(|&slices| warps.allows(p, slices)).find(fits).unwrap_or(1)
    };
    let launch = |&i: &usize| WARPS[i].launch(p, shape, m, slices(&WARPS[i]));
    wanted.iter().find_map(launch)
}

/// Configurations among which the fastest for `m` rows should be: indices into their table, and slices of k.
pub(super) fn candidates(p: &Problem, shape: BlockShape, m: usize) -> Vec<Config> {
    let fits = |warps: &Warps| m <= warps.tokens && warps.tokens <= m.next_power_of_two().max(8);
    let tiles = WARPS.iter().enumerate().filter(|(_, warps)| fits(warps));
    let configs = tiles.flat_map(|(tile, warps)| {
        let at_once = move |slices: usize| warps.tiles(p) * slices <= 2 * p.sm_count as usize;
        let slices = SLICES.into_iter().filter(move |&slices| slices <= 2 || at_once(slices));
        slices.map(move |splits| Config { tile, splits })
    });
    configs.filter(|config| with_config(p, shape, *config, m).is_some()).collect()
}

/// The launch of one of [`candidates`].
pub(super) fn with_config(p: &Problem, shape: BlockShape, config: Config, m: usize) -> Option<Launch> {
    let warps = &WARPS[config.tile];
    if warps.allows(p, config.splits) { warps.launch(p, shape, m, config.splits) } else { None }
}

impl Warps {
    /// Tiles of w.
    fn tiles(&self, p: &Problem) -> usize {
        p.n.div_ceil(ROWS * self.groups)
    }

    /// Every block of a cluster has a part of k, and sums to add up.
    fn allows(&self, p: &Problem, slices: usize) -> bool {
        slices <= p.k.div_ceil(COLUMNS) && slices <= 4 * self.groups
    }

    /// Clusters that run at once. Processing clusters have room for all multiprocessors' blocks in pairs only.
    fn clusters(&self, p: &Problem, m: usize, slices: usize) -> usize {
        let sms = p.sm_count as usize;
        let sms = if slices > 2 { sms * 10 / 11 } else { sms };
        (sms * self.beside / slices / m.div_ceil(self.tokens)).clamp(1, self.tiles(p))
    }

    /// Shared memory; `None` where there is not enough.
    fn shared_bytes(&self, p: &Problem, shape: BlockShape, m: usize, slices: usize) -> Option<usize> {
        let (warps, eights) = (self.groups * self.parts, self.tokens / 8);
        let pairs = 4 * self.groups * eights;
        let has_one_tile = self.clusters(p, m, slices) >= self.tiles(p);
        let steps = p.k.div_ceil(COLUMNS).div_ceil(slices).div_ceil(self.parts);
        let gathered = if slices == 1 { 0 } else { 2 * 512 * pairs.next_multiple_of(slices) };
        let (depth, sums) = if has_one_tile { (self.depth.min(steps), 0) } else { (self.depth, 4 * eights * 512) };
        let slots = warps * (depth * shape.bytes() + sums);
        let fixed = (HEAD_BYTES + gathered + pairs.min(warps) * TURN_BYTES + slots).next_multiple_of(1024);
        let room = ((SHARED_BYTES + 1024) / self.beside - 1024).checked_sub(fixed)?;
        let stage = |rows: usize| self.parts * 2 * rows * 128;
        let whole = steps * stage(m.min(self.tokens));
        if steps <= MAX_STAGES && whole <= room {
            return Some(fixed + whole);
        }
        let stages = (room / stage(self.tokens)).min(MAX_STAGES).min(steps);
        (stages >= LEAST_STAGES).then_some(fixed + stages * stage(self.tokens))
    }

    fn launch(&self, p: &Problem, shape: BlockShape, m: usize, slices: usize) -> Option<Launch> {
        let Warps { tokens, groups, parts, beside, .. } = *self;
        let grid = Grid {
            blocks: [(self.clusters(p, m, slices) * slices) as u32, m.div_ceil(tokens) as u32, 1],
            threads: (32 * groups * parts + 32) as u32,
            shared_bytes: self.shared_bytes(p, shape, m, slices)? as u32,
            cluster: slices as u32,
            overlaps: true,
        };
        let beside = if beside == 1 { String::new() } else { format!(" by {beside}") };
        let config = format!("{}x{tokens}/{parts} split {slices}{beside}", groups * ROWS);
        Some(launch(p, shape, &format!("warps_{tokens}x{groups}x{parts}"), &config, tokens, grid))
    }
}

#[cfg(test)]
mod tests {
    use super::super::choose::tests::{problem, uses};
    use super::super::pack::Layout;
    use super::*;

    const SHAPE: BlockShape = BlockShape { bits: 4, groups: 1, low_scales: false, zeros: false };

    #[test]
    fn table_is_that_of_the_kernels() {
        let source = include_str!("../../../kernels/gemm_w4a16/sm90.cu");
        let mut table: Vec<Vec<u32>> =
            WARPS.iter().map(|w| [w.tokens, w.groups, w.parts, w.depth].map(|x| x as u32).to_vec()).collect();
        table.dedup();
        assert_eq!(uses(source, "GEMM_W4A16_WARPS_TYPES"), table);
        let kernel = include_str!("../../../kernels/gemm_w4a16/sm90_warps.cuh");
        assert!(kernel.contains(&format!("HEAD_BYTES = {HEAD_BYTES}, MAX_STAGES = {MAX_STAGES};")));
    }

    #[test]
    fn every_launch_is_one_that_the_gpu_takes() {
        for shape in [
            SHAPE,
            BlockShape { bits: 4, groups: 4, low_scales: true, zeros: true },
            BlockShape { bits: 8, groups: 1, low_scales: false, zeros: false },
            BlockShape { bits: 8, groups: 4, low_scales: true, zeros: true },
        ] {
            for m in [1, 2, 7, 8, 9, 16] {
                for (n, k) in
                    [(1, 8), (64, 128), (520, 1040), (4096, 4096), (4096, 14336), (57344, 8192), (8192, 28672)]
                {
                    let p = problem(Layout::Blocks16(shape), n, k);
                    let configs = candidates(&p, shape, m);
                    assert!(!configs.is_empty(), "{n}x{k}, {m} rows");
                    let launches = configs.into_iter().map(|config| with_config(&p, shape, config, m));
                    for launch in launches.chain([few_rows(&p, shape, m)]).flatten() {
                        let Grid { blocks, threads, shared_bytes, cluster, .. } = launch.grid;
                        let beside = (blocks[0] * blocks[1]).div_ceil(p.sm_count);
                        assert!((shared_bytes + 1024) * beside <= 228 << 10, "{launch:?}");
                        assert!(blocks[0] > 0 && blocks[0].is_multiple_of(cluster) && cluster <= 8, "{launch:?}");
                        assert!(threads <= 544 && cluster as usize <= k.div_ceil(COLUMNS), "{launch:?}");
                    }
                }
            }
        }
    }

    /// What was fastest, or nearly, when measured.
    #[test]
    fn choices_are_the_measured_ones() {
        let config = |n, k, m| {
            few_rows(&problem(Layout::Blocks16(SHAPE), n, k), SHAPE, m).map(|launch| launch.config).unwrap_or_default()
        };
        assert_eq!(config(4096, 4096, 1), "w4 64x8/8 split 2");
        assert_eq!(config(4096, 14336, 8), "w4 64x8/8 split 2");
        assert_eq!(config(6144, 4096, 4), "w4 64x8/8 split 1");
        assert_eq!(config(28672, 4096, 8), "w4 128x8/4 split 1 by 2");
        assert_eq!(config(57344, 8192, 1), "w4 64x8/8 split 1");
        assert_eq!(config(4096, 14336, 16), "w4 64x16/8 split 2");
        assert_eq!(config(8192, 28672, 16), "w4 64x16/8 split 1");
        assert_eq!(config(28672, 4096, 16), "");
    }
}
