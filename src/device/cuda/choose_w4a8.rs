//! Configurations of gemm_w4a8/sm90 and gemm_w2a8/sm90, and which of them runs a shape (docs/kernels-linear.md has what was measured).

use super::Grid;
use super::candidates::Config;
use super::choose::{Launch, Problem};
use super::choose_w4a8_split;
use super::pack_blocks::{COLUMNS, ROWS};
use super::pack_w4a8::NibbleShape;

/// Tile of 16 * `sixteens` rows of w by `tokens` of x, k split over `parts` warps for each sixteen rows; blocks walk over those.
struct Few {
    tokens: usize,
    sixteens: usize,
    parts: usize,
    /// Most blocks that share a multiprocessor.
    resident: usize,
}

#[rustfmt::skip]
const FEW: [Few; 4] = [
    Few { tokens: 8, sixteens: 1, parts: 8, resident: 2 },
    Few { tokens: 8, sixteens: 2, parts: 8, resident: 1 },
    Few { tokens: 16, sixteens: 2, parts: 8, resident: 1 },
    Few { tokens: 16, sixteens: 4, parts: 4, resident: 1 },
];
/// Sums that each of their warps keeps in a round.
const EACH: usize = 4;

/// Tile of 64 * `groups` rows of w by `tokens` of x, over which blocks walk.
struct Tile {
    tokens: usize,
    groups: usize,
    /// Most blocks that share a multiprocessor.
    resident: usize,
    /// Microseconds of a block of k, of as many tiles as share a multiprocessor, for weights in groups; 0 where the number of
    /// rows alone decides, or there is no such kernel.
    block_us: f64,
    /// The same where rows are one group, and what a tile takes beside.
    one_group_us: (f64, f64),
}

#[rustfmt::skip]
const TILES: [Tile; 6] = [
    Tile { tokens: 16, groups: 1, resident: 3, block_us: 0.0, one_group_us: (0.0, 0.0) },
    Tile { tokens: 32, groups: 1, resident: 3, block_us: 0.0, one_group_us: (0.0, 0.0) },
    Tile { tokens: 64, groups: 1, resident: 2, block_us: 0.47, one_group_us: (0.38, 1.0) },
    Tile { tokens: 128, groups: 2, resident: 1, block_us: 0.69, one_group_us: (0.40, 1.8) },
    Tile { tokens: 128, groups: 3, resident: 1, block_us: 0.86, one_group_us: (0.54, 1.6) },
    Tile { tokens: 256, groups: 2, resident: 1, block_us: 0.0, one_group_us: (0.62, 2.2) },
];
/// That of which sums in groups would not fit into registers.
const WIDE: usize = 5;
/// Those there are for uint8 activations: for up to 64 rows, and for more.
const TILES_U8: [usize; 2] = [2, 4];
/// Most rows of the tiles of one warpgroup.
const NARROW_ROWS: usize = 64;

/// Shared memory of a block of [`TILES`] and of those that split k: barriers before the ring; of a multiprocessor: what blocks may have, a
/// kilobyte of each being the system's.
pub(super) const HEAD_BYTES: usize = 1024;
pub(super) const SHARED_BYTES: usize = 228 << 10;
/// Most stages of a ring.
pub(super) const MOST_STAGES: usize = HEAD_BYTES / 16;

/// What a block's shared memory has in stages: of [`TILES`] x and w of 128 columns; of [`FEW`] one, all of x, or two, of a
/// round in turn, and `stage_bytes` is the distance of rows of x.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ring {
    pub(super) stages: usize,
    pub(super) stage_bytes: usize,
}

pub(super) fn module(shape: NibbleShape) -> &'static str {
    match shape {
        NibbleShape { factors: true, .. } => "gemm_w4a8_factored/sm90",
        NibbleShape { bits: 2, .. } => "gemm_w2a8/sm90",
        _ => "gemm_w4a8/sm90",
    }
}

/// What names of a module's kernels begin with, of uint8 activations where `x` says so.
pub(super) fn prefix(shape: NibbleShape, x: &str) -> String {
    format!("gemm_w{}a8{}{x}_sm90", shape.bits, if shape.factors { "_factored" } else { "" })
}

/// The launch of W4A8 for `m` rows, `m` at least 1.
pub(super) fn w4a8(p: &Problem, shape: NibbleShape, m: usize) -> Launch {
    if let Some(launch) = choose_w4a8_split::w4a8(p, shape, m, || best_tile(p, shape, m).cost(p, shape, m)) {
        return launch;
    }
    if let Some(few) = few(p, shape, m) {
        return few.launch(p, shape, m);
    }
    let tile = match m {
        _ if p.x_u8 => &TILES[TILES_U8[usize::from(m > NARROW_ROWS)]],
        ..=NARROW_ROWS => TILES.iter().find(|tile| m <= tile.tokens).expect("a tile of 64 tokens"),
        _ => best_tile(p, shape, m),
    };
    tile.launch(p, shape, m)
}

/// The tile that ends first for many rows.
fn best_tile(p: &Problem, shape: NibbleShape, m: usize) -> &'static Tile {
    let many = TILES.iter().filter(|tile| tile.tokens >= NARROW_ROWS && tile.has(shape));
    many.min_by(|a, b| a.cost(p, shape, m).total_cmp(&b.cost(p, shape, m))).expect("a family has tiles")
}

/// The tile for few rows, where one of [`TILES`] is not faster.
fn few(p: &Problem, shape: NibbleShape, m: usize) -> Option<&'static Few> {
    // Sixteen rows of w for each of two blocks a multiprocessor, and three of 64 rows.
    let (is_low, is_high) = (p.n <= 32 * p.sm_count as usize, p.n >= 192 * p.sm_count as usize);
    match m {
        // Two bits: few warps are bound by what they do for a block, not by its bytes.
        _ if is_high && !p.x_u8 && (shape.bits == 2 || shape.one_group && m > 4) => None,
        ..=8 if FEW[0].ring(p, shape, m).stages == 1 => Some(&FEW[0]),
        ..=8 => Some(&FEW[1]),
        ..=16 if is_low => Some(&FEW[2]),
        ..=16 if p.x_u8 || !is_high => Some(&FEW[3]),
        ..=32 if is_low => Some(&FEW[3]),
        _ => None,
    }
}

/// Configurations among which the fastest for `m` rows should be: of [`FEW`], then of [`TILES`]; with splits those of
/// [`choose_w4a8_split`].
pub(super) fn candidates(p: &Problem, shape: NibbleShape, m: usize) -> Vec<Config> {
    let covers = |tokens: usize| (m..=16 * m.max(2)).contains(&(2 * tokens)) || tokens >= NARROW_ROWS;
    let few = (0..FEW.len()).filter(|&i| covers(FEW[i].tokens));
    let has = |i: &usize| TILES[*i].has(shape) && (!p.x_u8 || TILES_U8.contains(i));
    let tiles = (0..TILES.len()).filter(|i| covers(TILES[*i].tokens) && has(i));
    let mut all: Vec<Config> = few.chain(tiles.map(|i| FEW.len() + i)).map(|tile| Config { tile, splits: 0 }).collect();
    all.extend(choose_w4a8_split::candidates(p, shape, m));
    all
}

/// The launch of one of [`candidates`].
pub(super) fn with_config(p: &Problem, shape: NibbleShape, config: Config, m: usize) -> Launch {
    match config.tile.checked_sub(FEW.len()) {
        _ if config.splits != 0 => choose_w4a8_split::with_config(p, shape, config, m),
        None => FEW[config.tile].launch(p, shape, m),
        Some(tile) => TILES[tile].launch(p, shape, m),
    }
}

/// The ring of `launch`, which is one of this family, for a weight of `k` columns.
pub(super) fn ring(launch: &Launch, shape: NibbleShape, k: usize) -> Ring {
    let shared_bytes = launch.grid.shared_bytes as usize;
    if let Some(few) = FEW.iter().find(|few| few.function(shape) == launch.function) {
        let in_turn = few.in_turn(shape);
        return if few.shared_bytes(shape, in_turn, few.tokens) == shared_bytes {
            in_turn
        } else {
            few.whole(shape, k)
        };
    }
    if let Some(ring) = choose_w4a8_split::ring(launch, shape) {
        return ring;
    }
    let is_of =
        |tile: &&Tile| (tile.tokens, tile.threads()) == (launch.box_rows as usize, launch.grid.threads as usize);
    let tile = TILES.iter().find(is_of).expect("a tile of the table");
    let stage_bytes = stage_bytes(tile.tokens, tile.groups, shape);
    Ring { stages: (shared_bytes - HEAD_BYTES - tile.tail_bytes()) / stage_bytes, stage_bytes }
}

/// Of a ring: 128 columns of x, and a block for each of `groups`.
pub(super) fn stage_bytes(tokens: usize, groups: usize, shape: NibbleShape) -> usize {
    (tokens * COLUMNS + groups * shape.bytes()).next_multiple_of(1024)
}

impl Few {
    fn function(&self, shape: NibbleShape) -> String {
        format!("{}_few_{}x{}x{}", prefix(shape, ""), self.tokens, self.sixteens, self.parts)
    }

    fn rows(&self) -> usize {
        16 * self.sixteens
    }

    /// Columns that the block's warps share out at a time.
    fn round(&self, shape: NibbleShape) -> usize {
        EACH / shape.parts * self.parts * COLUMNS
    }

    /// The ring with all of x.
    fn whole(&self, shape: NibbleShape, k: usize) -> Ring {
        Ring { stages: 1, stage_bytes: k.next_multiple_of(self.round(shape)) + 16 }
    }

    /// The ring with two rounds of x, in turn.
    fn in_turn(&self, shape: NibbleShape) -> Ring {
        Ring { stages: 2, stage_bytes: self.round(shape) + 16 }
    }

    /// Sums, scales of two rounds, and `rows` rows of x. Where rows are made to be one group warps have one sum each, and no scales.
    fn shared_bytes(&self, shape: NibbleShape, ring: Ring, rows: usize) -> usize {
        let words = if shape.factors || shape.bits == 2 { self.tokens } else { EACH * (self.tokens + 2) };
        self.parts * self.rows() * words * 4 + ring.stages * ring.stage_bytes * rows
    }

    /// Tiles of w and of x, and blocks that share a multiprocessor.
    fn tiles(&self, p: &Problem, m: usize) -> (usize, usize, usize) {
        let (down, across) = (p.n.div_ceil(self.rows()), m.div_ceil(self.tokens));
        (down, across, (down * across).div_ceil(p.sm_count as usize).min(self.resident))
    }

    fn ring(&self, p: &Problem, shape: NibbleShape, m: usize) -> Ring {
        let room = SHARED_BYTES / self.tiles(p, m).2 - 1024;
        let whole = self.whole(shape, p.k);
        if self.shared_bytes(shape, whole, m.min(self.tokens)) <= room { whole } else { self.in_turn(shape) }
    }

    fn launch(&self, p: &Problem, shape: NibbleShape, m: usize) -> Launch {
        let (down, across, resident) = self.tiles(p, m);
        let ring = self.ring(p, shape, m);
        let rows = if ring.stages == 1 { m.min(self.tokens) } else { self.tokens };
        let grid = Grid {
            blocks: [down.min((p.sm_count as usize * resident / across).max(1)) as u32, across as u32, 1],
            threads: (32 * self.sixteens * self.parts) as u32,
            shared_bytes: self.shared_bytes(shape, ring, rows) as u32,
            cluster: 1,
            overlaps: true,
        };
        Launch {
            module: module(shape),
            function: self.function(shape),
            config: format!("w{} {}x{} split {}", shape.bits, self.rows(), self.tokens, self.parts),
            grid,
            box_rows: self.tokens as u32,
            cut_tiles: 0,
        }
    }
}

impl Tile {
    fn threads(&self) -> usize {
        128 * self.groups + if self.tokens > NARROW_ROWS { 128 } else { 32 * (1 + self.groups) }
    }

    fn count(&self, p: &Problem, m: usize) -> usize {
        m.div_ceil(self.tokens) * p.n.div_ceil(self.groups * ROWS)
    }

    /// Whether there is a kernel for weights of `shape`.
    fn has(&self, shape: NibbleShape) -> bool {
        shape.one_group || self.tokens < TILES[WIDE].tokens
    }

    /// Microseconds, but for what all share: for weights in groups of a block of k.
    fn cost(&self, p: &Problem, shape: NibbleShape, m: usize) -> f64 {
        let rounds = self.count(p, m).div_ceil(p.sm_count as usize * self.resident) as f64;
        let (block_us, tile_us) = self.one_group_us;
        rounds * if shape.one_group { p.k.div_ceil(COLUMNS) as f64 * block_us + tile_us } else { self.block_us }
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
        let stage_bytes = stage_bytes(tokens, groups, shape);
        let stages = (room / stage_bytes).min(MOST_STAGES).min(p.k.div_ceil(COLUMNS).max(2));
        let grid = Grid {
            blocks: [count.min(sms * resident) as u32, 1, 1],
            threads: self.threads() as u32,
            shared_bytes: (HEAD_BYTES + stages * stage_bytes + self.tail_bytes()) as u32,
            cluster: 1,
            overlaps: true,
        };
        let (bits, x) = (shape.bits, if p.x_u8 { "_u8" } else { "" });
        Launch {
            module: module(shape),
            function: format!("{}_{tokens}x{groups}", prefix(shape, x)),
            config: format!("w{bits} {}x{tokens}", groups * ROWS),
            grid,
            box_rows: tokens as u32,
            cut_tiles: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::choose::tests::{problem, uses};
    use super::super::pack::Layout;
    use super::*;

    const SHAPE: NibbleShape = NibbleShape { bits: 4, one_group: false, factors: false, parts: 1, group_blocks: 1 };

    #[test]
    fn tables_are_those_of_the_kernels() {
        let source = include_str!("../../../kernels/gemm_w4a8/sm90.cu");
        let of_two_bits = include_str!("../../../kernels/gemm_w2a8/sm90.cu");
        let of_factors = include_str!("../../../kernels/gemm_w4a8_factored/sm90.cu");
        let table: Vec<Vec<u32>> =
            TILES.iter().map(|t| [t.tokens, t.groups, t.resident].map(|x| x as u32).to_vec()).collect();
        let few: Vec<Vec<u32>> =
            FEW.iter().map(|t| [t.tokens, t.sixteens, t.parts, t.resident].map(|x| x as u32).to_vec()).collect();
        assert_eq!(uses(source, "GEMM_W4A8_SM90_FEW"), few);
        assert_eq!(uses(of_two_bits, "GEMM_W2A8_SM90_FEW"), few);
        assert_eq!(uses(of_factors, "GEMM_W4A8_FACTORED_SM90_FEW"), few);
        let few = include_str!("../../../kernels/gemm_w4a8/sm90_few.cuh");
        assert!(few.contains("UNITS = (Codes::ONE_GROUP ? 1 : EACH) * PARTS;"));
        assert!(few.contains(&format!("EACH = {EACH};")) && few.contains("SUM_BYTES = UNITS * ROWS * TOKENS * 4"));
        assert!(
            few.contains("SCALE_BYTES = Codes::ONE_GROUP ? 0 : UNITS * ROWS * 4;")
                && few.contains("SUM_BYTES + 2 * SCALE_BYTES;")
        );
        assert_eq!(uses(source, "GEMM_W4A8_SM90"), table[..WIDE]);
        assert_eq!(uses(source, "GEMM_W4A8_SM90_ROW"), table[WIDE..]);
        assert_eq!(uses(of_two_bits, "GEMM_W2A8_SM90"), table);
        assert_eq!(uses(of_factors, "GEMM_W4A8_FACTORED_SM90"), table);
        assert_eq!(uses(source, "GEMM_W4A8_SM90_U8"), TILES_U8.map(|i| table[i].clone()));
        assert_eq!(uses(of_two_bits, "GEMM_W2A8_SM90_U8"), TILES_U8.map(|i| table[i].clone()));
        assert_eq!(uses(of_factors, "GEMM_W4A8_FACTORED_SM90_U8"), TILES_U8.map(|i| table[i].clone()));
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
            NibbleShape { bits: 4, one_group: true, factors: false, parts: 1, group_blocks: 32 },
            NibbleShape { bits: 4, one_group: true, factors: true, parts: 1, group_blocks: 32 },
            NibbleShape { bits: 2, one_group: true, factors: false, parts: 1, group_blocks: 32 },
            NibbleShape { bits: 4, one_group: false, factors: false, parts: 2, group_blocks: 1 },
            NibbleShape { bits: 4, one_group: false, factors: false, parts: 4, group_blocks: 1 },
        ] {
            for m in [1, 16, 17, 33, 64, 65, 128, 129, 257, 512, 4096, 65536] {
                for (n, k) in
                    [(1, 16), (64, 128), (520, 1040), (4096, 4096), (6144, 4096), (57344, 8192), (8192, 28672)]
                {
                    for x_u8 in [false, true] {
                        let launch = w4a8(&Problem { x_u8, ..problem(Layout::Blocks4(shape), n, k) }, shape, m);
                        let Grid { blocks, threads, shared_bytes, cluster, .. } = launch.grid;
                        let split = launch.function.contains("split");
                        // Blocks that split k need not all run at once.
                        let resident = if split { 1 } else { ((blocks[0] * blocks[1]) as usize).div_ceil(132) };
                        assert!(resident * (shared_bytes as usize + 1024) <= SHARED_BYTES, "{launch:?}");
                        assert!(blocks[0] > 0 && threads <= 512 && launch.box_rows <= 256, "{launch:?}");
                        assert!(
                            blocks[0].is_multiple_of(cluster) && cluster as usize <= k.div_ceil(COLUMNS),
                            "{launch:?}"
                        );
                        let ring = ring(&launch, shape, k);
                        let fewest = 1 + usize::from(!launch.function.contains("few"));
                        assert!((fewest..=MOST_STAGES).contains(&ring.stages), "{launch:?} {ring:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn few_rows_get_narrow_tiles_and_many_those_that_end_first() {
        let config = |n, k, m| w4a8(&problem(Layout::Blocks4(SHAPE), n, k), SHAPE, m).config;
        // Measured: 4.2 us; 13.6 where 8 rows of x do not fit twice; 6.9 and 11.1; 17.2, 18.1 and 22.1; 25.4 and 24.0.
        assert_eq!(config(4096, 4096, 1), "w4 16x8 split 8");
        assert_eq!(config(4096, 14336, 8), "w4 32x8 split 8");
        assert_eq!(config(4096, 4096, 16), "w4 32x16 split 8");
        assert_eq!(config(8192, 8192, 16), "w4 64x16 split 4");
        assert_eq!(config(28672, 4096, 16), "w4 64x16");
        assert_eq!(config(4096, 4096, 32), "w4 64x16 split 4");
        assert_eq!(config(28672, 4096, 17), "w4 64x32");
        assert_eq!(config(28672, 4096, 64), "w4 64x64");
        // Measured: 22 us with 128 x 128; 46 and 57; 310 and 278; 683 and 583.
        assert_eq!(config(4096, 4096, 128), "w4 64x64");
        assert_eq!(config(4096, 4096, 1024), "w4 128x128");
        assert_eq!(config(28672, 4096, 1024), "w4 192x128");
        assert_eq!(config(8192, 8192, 4096), "w4 192x128");
    }
}
