//! Configurations of gemm_w4a8/sm90 and which of them runs a shape (docs/kernels-linear.md has what was measured).

use super::Grid;
use super::candidates::Config;
use super::choose::{Launch, Problem};
use super::pack_blocks::{COLUMNS, ROWS};
use super::pack_w4a8::NibbleShape;

/// Tile of 64 * `groups` rows of w by `tokens` of x, over which blocks walk.
struct Tile {
    tokens: usize,
    groups: usize,
    /// Most blocks that share a multiprocessor.
    resident: usize,
    /// Microseconds of a block of k; 0 for few rows, where the number of rows alone decides.
    block_us: f64,
}

#[rustfmt::skip]
const TILES: [Tile; 5] = [
    Tile { tokens: 16, groups: 1, resident: 3, block_us: 0.0 },
    Tile { tokens: 32, groups: 1, resident: 3, block_us: 0.0 },
    Tile { tokens: 64, groups: 1, resident: 2, block_us: 0.0 },
    Tile { tokens: 128, groups: 2, resident: 1, block_us: 0.70 },
    Tile { tokens: 128, groups: 3, resident: 1, block_us: 0.86 },
];
/// Those there are for uint8 activations: for few rows, and for more.
const TILES_U8: [usize; 2] = [0, 4];

/// Most rows of the tiles for few.
const FEW_ROWS: usize = 64;
/// Shared memory of a block: barriers before the ring; of a multiprocessor: what blocks may have, a kilobyte of each being
/// the system's.
const HEAD_BYTES: usize = 1024;
const SHARED_BYTES: usize = 228 << 10;
/// Most stages of a ring.
const MOST_STAGES: usize = HEAD_BYTES / 16;

/// The ring of stages in a block's shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ring {
    pub(super) stages: usize,
    pub(super) stage_bytes: usize,
}

/// The launch of W4A8 for `m` rows, `m` at least 1.
pub(super) fn w4a8(p: &Problem, shape: NibbleShape, m: usize) -> Launch {
    let best = |tiles: &mut dyn Iterator<Item = &'static Tile>| {
        tiles.min_by(|a, b| a.cost(p, m).total_cmp(&b.cost(p, m))).expect("a family has tiles")
    };
    let tile = match m {
        _ if p.x_u8 => &TILES[TILES_U8[usize::from(m > TILES[TILES_U8[0]].tokens)]],
        ..=FEW_ROWS => best(&mut TILES.iter().filter(|tile| m <= tile.tokens).take(1)),
        _ => best(&mut TILES.iter().filter(|tile| tile.tokens > FEW_ROWS)),
    };
    tile.launch(p, shape, m)
}

/// Configurations among which the fastest for `m` rows should be.
pub(super) fn candidates(p: &Problem, m: usize) -> Vec<Config> {
    let covers = |tile: &Tile| 2 * tile.tokens >= m || tile.tokens > FEW_ROWS;
    let all = (0..TILES.len()).filter(|tile| !p.x_u8 || TILES_U8.contains(tile));
    all.filter(|&tile| covers(&TILES[tile])).map(|tile| Config { tile, splits: 0 }).collect()
}

/// The launch of one of [`candidates`].
pub(super) fn with_config(p: &Problem, shape: NibbleShape, config: Config, m: usize) -> Launch {
    TILES[config.tile].launch(p, shape, m)
}

/// The ring of `launch`, which is one of this family.
pub(super) fn ring(launch: &Launch, shape: NibbleShape) -> Ring {
    let is_of =
        |tile: &&Tile| (tile.tokens, tile.threads()) == (launch.box_rows as usize, launch.grid.threads as usize);
    let tile = TILES.iter().find(is_of).expect("a tile of the table");
    let stage_bytes = tile.stage_bytes(shape);
    let stages = (launch.grid.shared_bytes as usize - HEAD_BYTES - tile.tail_bytes()) / stage_bytes;
    Ring { stages, stage_bytes }
}

impl Tile {
    fn threads(&self) -> usize {
        128 * self.groups + if self.tokens > FEW_ROWS { 128 } else { 32 * (1 + self.groups) }
    }

    fn count(&self, p: &Problem, m: usize) -> usize {
        m.div_ceil(self.tokens) * p.n.div_ceil(self.groups * ROWS)
    }

    fn cost(&self, p: &Problem, m: usize) -> f64 {
        self.count(p, m).div_ceil(p.sm_count as usize) as f64 * self.block_us
    }

    /// Of the ring: 128 columns of x, and a block for each of `groups`.
    fn stage_bytes(&self, shape: NibbleShape) -> usize {
        (self.tokens * COLUMNS + self.groups * shape.bytes()).next_multiple_of(1024)
    }

    /// Behind the ring, for each warpgroup: sixteen tokens of 68 floats, and two words a token.
    fn tail_bytes(&self) -> usize {
        self.groups * (16 * 68 * 4 + 8 * self.tokens)
    }

    fn launch(&self, p: &Problem, shape: NibbleShape, m: usize) -> Launch {
        let Tile { tokens, groups, .. } = *self;
        let (count, sms) = (self.count(p, m), p.sm_count as usize);
        let resident = count.div_ceil(sms).min(self.resident);
        let room = SHARED_BYTES / resident - 1024 - HEAD_BYTES - self.tail_bytes();
        let k_blocks = p.k.div_ceil(COLUMNS);
        let stages = (room / self.stage_bytes(shape)).min(MOST_STAGES).min(k_blocks.max(2));
        let grid = Grid {
            blocks: [count.min(sms * resident) as u32, 1, 1],
            threads: self.threads() as u32,
            shared_bytes: (HEAD_BYTES + stages * self.stage_bytes(shape) + self.tail_bytes()) as u32,
            cluster: 1,
            overlaps: true,
        };
        let name = if p.x_u8 { "gemm_w4a8_u8_sm90" } else { "gemm_w4a8_sm90" };
        Launch {
            module: "gemm_w4a8/sm90",
            function: format!("{name}_{tokens}x{groups}"),
            config: format!("w4 {}x{tokens}", groups * ROWS),
            grid,
            box_rows: tokens as u32,
            cut_tiles: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::choose::tests::uses;
    use super::super::pack::Layout;
    use super::*;
    use crate::device::Epilogue;

    const SHAPE: NibbleShape = NibbleShape { one_group: false, parts: 1, group_blocks: 1 };

    fn problem(n: usize, k: usize, shape: NibbleShape) -> Problem {
        let layout = Layout::Blocks4(shape);
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

    #[test]
    fn tables_are_those_of_the_kernels() {
        let source = include_str!("../../../kernels/gemm_w4a8/sm90.cu");
        let table: Vec<Vec<u32>> =
            TILES.iter().map(|t| [t.tokens, t.groups, t.resident].map(|x| x as u32).to_vec()).collect();
        assert_eq!(uses(source, "GEMM_W4A8_SM90"), table);
        assert_eq!(uses(source, "GEMM_W4A8_SM90_U8"), TILES_U8.map(|i| table[i].clone()));
        let ring = include_str!("../../../kernels/common/block_ring.cuh");
        assert!(ring.contains(&format!("HEAD_BYTES = {HEAD_BYTES}, MAX_STAGES = HEAD_BYTES / 16;")));
        let tile = include_str!("../../../kernels/gemm_w4a8/epilogue_sm90.cuh");
        assert!(tile.contains("PITCH = 68;") && tile.contains("TURN_BYTES = 16 * PITCH * 4;"));
        assert!(tile.contains("BYTES = TURN_BYTES + 8 * TOKENS;"));
    }

    /// The shared memory of an H100 or H200 holds the blocks that are to run at once, each with two stages or more.
    #[test]
    fn every_launch_is_one_that_the_gpu_takes() {
        for shape in [
            SHAPE,
            NibbleShape { one_group: true, parts: 1, group_blocks: 32 },
            NibbleShape { one_group: false, parts: 2, group_blocks: 1 },
            NibbleShape { one_group: false, parts: 4, group_blocks: 1 },
        ] {
            for m in [1, 16, 17, 33, 64, 65, 128, 129, 257, 512, 4096, 65536] {
                for (n, k) in
                    [(1, 16), (64, 128), (520, 1040), (4096, 4096), (6144, 4096), (57344, 8192), (8192, 28672)]
                {
                    for x_u8 in [false, true] {
                        let launch = w4a8(&Problem { x_u8, ..problem(n, k, shape) }, shape, m);
                        let Grid { blocks, threads, shared_bytes, .. } = launch.grid;
                        let resident = (blocks[0] as usize).div_ceil(132);
                        assert!(resident * (shared_bytes as usize + 1024) <= SHARED_BYTES, "{launch:?}");
                        assert!(blocks[0] > 0 && threads <= 512 && launch.box_rows <= 256, "{launch:?}");
                        let ring = ring(&launch, shape);
                        assert!((2..=MOST_STAGES).contains(&ring.stages), "{launch:?} {ring:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn few_rows_get_narrow_tiles_and_many_those_that_end_first() {
        let config = |n, k, m| w4a8(&problem(n, k, SHAPE), SHAPE, m).config;
        assert_eq!(config(4096, 4096, 1), "w4 64x16");
        assert_eq!(config(4096, 4096, 17), "w4 64x32");
        assert_eq!(config(28672, 4096, 64), "w4 64x64");
        // Measured: 46 and 57 us, 310 and 278, 683 and 583.
        assert_eq!(config(4096, 4096, 1024), "w4 128x128");
        assert_eq!(config(28672, 4096, 1024), "w4 192x128");
        assert_eq!(config(8192, 8192, 4096), "w4 192x128");
    }
}
