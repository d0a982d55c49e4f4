//! W4A16 before sm_90: gemm_w4a16/gemv and gemm_w4a16/sm80, how tiles of the second are shared out, and which configuration runs a
//! shape: by times measured on an H200 (docs/kernels-linear.md).
#![allow(unsafe_code)] // kernel launches

use half::{bf16, f16};
use rayon::prelude::*;

use super::codes::{Codes, largest};
use super::scale_parts::ScaleParts;
use crate::device::cuda::context::{COUNTERS, WORKSPACE_BYTES};
use crate::device::cuda::embedded::abi::{self, GemmW4A16Args, GemmW4A16Sm80Args, LinearOut};
use crate::device::cuda::embedded::configs::gemm_w4a16::{GEMV, Gemv, SM80_STREAM_K, Sm80StreamK};
use crate::device::cuda::gemm::family::{GemmFamily, Input, Launch, Plan, Problem, Target, Weight};
use crate::device::cuda::gemm::layout::e4m3::arrange_all;
use crate::device::cuda::gemm::layout::fragments::{
    NIBBLES_16BIT, NIBBLES_CODEBOOK, TILE, fragment_bytes, fragments4, fragments8, padded_n,
};
use crate::device::cuda::gemm::packed::{Order, Parameters};
use crate::device::cuda::gemm::recipe::{Recipe, Repack};
use crate::device::cuda::kernel::{Grid, u32_of};
use crate::device::cuda::op_kernel::OpKernel;
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::quant::{ActQuant, Codebook, LinearWeight, QuantWeight, Weight as HostWeight};

/// Most rows of gemm_w4a16/gemv, and most weights: of more gemm_w4a16/sm80 reads more bytes a second.
const GEMV_ROWS: usize = 8;
const GEMV_WEIGHTS: usize = 200_000_000;
/// Columns of k in a stage.
const SLICE: usize = abi::GEMM_W4A16_SM80_SLICE as usize;
/// Shared memory of a warp for scales and zero points of 16 rows of w.
const TABLE_BYTES: usize = abi::GEMM_W4A16_SM80_TABLE_BYTES as usize;
/// Most rows of x in tiles whose scales go on sums, where no weight is rounded.
const UNROUNDED_ROWS: usize = abi::GEMM_W4A16_SM80_UNROUNDED_BM as usize;
/// Microseconds of a launch beside its slices; of adding up tiles that are shared, for each kilobyte of a tile's parts, and where a
/// block has parts of two tiles.
const LAUNCH_US: f64 = 4.99;
const SHARED_US: f64 = 2.56;
const PART_KB_US: f64 = 0.0169;
const TWO_TILES_US: f64 = 2.24;

/// Codes in fragment order for 16-bit activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct W4A16Sm80 {
    /// What codes stand for.
    pub(crate) codes: Codes,
    /// How many floats of the activation type a scale is.
    pub(crate) scale_parts: ScaleParts,
}

/// A kernel, and how its tiles are shared out among blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Config {
    /// No tiles: each warp has rows of w, and blocks share k.
    Gemv(Gemv),
    /// Tiles as the cost model shares them out.
    StreamK(Sm80StreamK),
    /// Whole tiles, whatever it costs: one order of sums for every number of rows.
    WholeTiles(Sm80StreamK),
}

/// What a launch tells the kernel: how many tiles, the last ones, blocks share along k.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SharedTiles(u32);

/// A grid for a tile.
#[derive(Debug)]
struct Work {
    tile: Sm80StreamK,
    grid: usize,
    /// The last tiles, cut along k so that every block has as many slices of them.
    shared: usize,
    us: f64,
}

impl Sm80StreamK {
    fn threads(&self) -> usize {
        32 * self.warps_m * self.warps_n
    }

    /// The ring, and a table of scales and zero points for 16 rows of w of each warp.
    fn shared_bytes(&self, bits: usize) -> usize {
        self.stages * (2 * SLICE * self.bm + SLICE * bits / 8 * self.bn) + TABLE_BYTES * self.bn / 16 * self.warps_m
    }

    /// A slot for the sums of a tile for each block and each tile that is shared.
    fn partials_bytes(&self, grid: usize, shared: usize) -> usize {
        (grid + shared) * self.bm * self.bn * 4
    }

    fn tiles(&self, p: &Problem, m: usize) -> usize {
        m.div_ceil(self.bm) * p.n.div_ceil(self.bn)
    }

    /// Microseconds of a slice in each of one, two and three blocks that share a multiprocessor, 4-bit weights.
    fn slice_us(&self) -> [f64; 3] {
        match self.bm {
            16 => [0.312, 0.406, 0.511],
            32 => [0.395, 0.540, 0.692],
            64 => [0.479, 0.761, 0.761],
            _ => [1.348, 1.348, 1.348],
        }
    }

    /// Microseconds of a launch of `grid` blocks of `slices` each.
    fn us(&self, p: &Problem, grid: usize, slices: f64) -> f64 {
        LAUNCH_US + slices * self.slice_us()[grid.div_ceil(p.sm_count as usize) - 1]
    }

    /// Blocks that a multiprocessor has room for. It has a kilobyte more of shared memory than a block may ask for, and takes one for
    /// itself for each block.
    fn resident(&self, p: &Problem, bits: usize) -> usize {
        self.min_blocks_per_sm.min((p.max_shared as usize + 2048) / (self.shared_bytes(bits) + 1024)).max(1)
    }

    /// Rounds of whole tiles.
    fn whole(self, p: &Problem, bits: usize, m: usize) -> Work {
        let tiles = self.tiles(p, m);
        let grid = tiles.min(p.sm_count as usize * self.resident(p, bits));
        let us = self.us(p, grid, (tiles.div_ceil(grid) * p.k.div_ceil(SLICE)) as f64);
        Work { tile: self, grid, shared: 0, us }
    }

    /// What makes no whole round of `room` blocks shared along k among `grid` blocks, where that can be.
    fn stream_k(self, p: &Problem, m: usize, room: usize, grid: usize) -> Option<Work> {
        let (tiles, slices) = (self.tiles(p, m), p.k.div_ceil(SLICE));
        let shared = tiles % room;
        // Each block has a slice or more, and the products by which it finds them are 32-bit.
        let can_be = shared > 0 && grid > shared && grid <= shared * slices && grid * shared * slices < 1 << 32;
        if !can_be || shared > COUNTERS || self.partials_bytes(grid, shared) > WORKSPACE_BYTES {
            return None;
        }
        let share = (tiles / room * slices) as f64 + (shared * slices) as f64 / grid as f64;
        let two_tiles = !grid.is_multiple_of(shared);
        let parts = grid.div_ceil(shared) + usize::from(two_tiles);
        let sums_us = SHARED_US
            + PART_KB_US * (parts * self.bm * self.bn * 4 / 1024) as f64
            + if two_tiles { TWO_TILES_US } else { 0.0 };
        Some(Work { tile: self, grid, shared, us: self.us(p, grid, share) + sums_us })
    }

    /// Whole tiles; the rest shared by all blocks alike; or, where there is but one round, as many blocks for each tile.
    fn works(self, p: &Problem, bits: usize, m: usize) -> impl Iterator<Item = Work> {
        let tiles = self.tiles(p, m);
        let rooms = (1..=self.resident(p, bits)).map(|blocks| blocks * p.sm_count as usize);
        let shared: Vec<Work> = rooms
            .flat_map(|room| {
                let alike = (tiles < room).then(|| tiles * (room / tiles).min(p.k.div_ceil(SLICE)));
                [Some(room), alike].into_iter().flatten().filter_map(move |grid| self.stream_k(p, m, room, grid))
            })
            .collect();
        std::iter::once(self.whole(p, bits, m)).chain(shared)
    }
}

/// The fastest of `works`.
fn best(works: impl Iterator<Item = Work>) -> Work {
    works.min_by(|a, b| a.us.total_cmp(&b.us)).expect("the smallest tiles fit every GPU")
}

impl W4A16Sm80 {
    /// Tiles for which the GPU has room, and that may multiply weights as they do.
    fn tiles(self, p: &Problem) -> impl Iterator<Item = Sm80StreamK> {
        let (max_shared, sums_only) = (p.max_shared as usize, self.scale_parts == ScaleParts::SumsOnly);
        let takes = move |tile: &Sm80StreamK| {
            tile.shared_bytes(self.codes.bits()) <= max_shared && (tile.bm <= UNROUNDED_ROWS || !sums_only)
        };
        SM80_STREAM_K.into_iter().filter(takes)
    }
}

impl GemmFamily for W4A16Sm80 {
    type Config = Config;
    type Params = SharedTiles;

    fn accept(weight: &LinearWeight, target: Target) -> Option<Self> {
        let HostWeight::Quant(q) = &weight.weight else { return None };
        let whole_groups = q.groups() == 1 || q.group_size.is_multiple_of(32);
        let fits = whole_groups
            && q.k.is_multiple_of(8)
            && weight.activation == ActQuant::None
            && (!q.encoding.is_affine() || q.zeros.par_iter().all(|z| z.fract() == 0.0));
        let scale_parts = || ScaleParts::of(&q.scales, largest(q), target.dtype);
        fits.then(|| W4A16Sm80 { codes: Codes::of(q), scale_parts: scale_parts() })
    }

    fn takes_int8(&self) -> bool {
        false
    }

    fn code_bytes(&self, n: usize, k: usize) -> usize {
        fragment_bytes(n, k, self.codes.bits())
    }

    fn recipe(&self, q: &QuantWeight, dtype: DType) -> Recipe {
        let codes = self.codes;
        let bytes = self.code_bytes(q.n, q.k);
        let (kernel, nibbles) = match codes {
            Codes::Uint8 | Codes::E4m3 => (OpKernel::RepackFragments8, [[0; 4]; 2]),
            Codes::Codebook4 => (OpKernel::RepackFragments4, NIBBLES_CODEBOOK),
            Codes::Uint4 => (OpKernel::RepackFragments4, NIBBLES_16BIT),
        };
        let e4m3 = (codes == Codes::E4m3).then_some(dtype);
        let zero_points = q.zeros.par_iter().any(|&z| z != q.zeros[0]);
        Recipe {
            on_gpu: Some(Repack { nibbles, e4m3, ..Repack::new(kernel, DType::U8, bytes, false) }),
            on_host: Box::new(move |q| {
                HostData::U8(match codes {
                    Codes::Uint8 => fragments8(q.n, q.k, &q.codes),
                    Codes::E4m3 => arrange_all(fragments8(q.n, q.k, &q.codes), dtype),
                    Codes::Uint4 | Codes::Codebook4 => fragments4(q.n, q.k, &q.codes, nibbles),
                })
            }),
            parameters: Some(Parameters { order: Order::ByGroup { multiple: TILE }, zero_points, sums: false }),
            row_scales: None,
        }
    }

    fn table_name(&self) -> Option<&'static str> {
        Some(match self.codes {
            Codes::Codebook4 => "c4a16/sm80",
            Codes::Uint4 => "w4a16/sm80",
            Codes::Uint8 | Codes::E4m3 => "w8a16/sm80",
        })
    }

    fn config_name(&self, config: Config) -> String {
        let name = self.codes.measured_as();
        match config {
            Config::Gemv(Gemv { row_tiles, .. }) => format!("{name} {GEMV_ROWS}x{}", 16 * row_tiles),
            Config::StreamK(Sm80StreamK { bm, bn, .. }) => format!("{name} {bm}x{bn}"),
            Config::WholeTiles(Sm80StreamK { bm, bn, .. }) => format!("{name} {bm}x{bn} whole"),
        }
    }

    fn configs(&self, p: &Problem, m: usize) -> Vec<Config> {
        let gemv = GEMV.into_iter().filter(|_| m <= GEMV_ROWS).map(Config::Gemv);
        let most_rows = 2 * m.next_power_of_two().max(8);
        let tiles = self.tiles(p).filter(|tile| tile.bm <= most_rows).map(Config::StreamK);
        gemv.chain(tiles).collect()
    }

    fn choose(&self, p: &Problem, m: usize) -> Config {
        if m <= GEMV_ROWS && p.n * p.k <= GEMV_WEIGHTS {
            // Wide blocks once they are as many as two of three multiprocessors.
            let [narrow, wide] = GEMV;
            let is_wide = 3 * p.n.div_ceil(16 * wide.row_tiles) >= 2 * p.sm_count as usize;
            return Config::Gemv(if is_wide { wide } else { narrow });
        }
        Config::StreamK(best(self.tiles(p).flat_map(|tile| tile.works(p, self.codes.bits(), m))).tile)
    }

    /// Whole tiles, and scales on the sums of groups. Warps of gemm_w4a16/gemv share k.
    fn choose_batch_invariant(&self, p: &Problem, m: usize) -> Config {
        let unrounded = self.tiles(p).filter(|tile| tile.bm <= UNROUNDED_ROWS);
        Config::WholeTiles(best(unrounded.map(|tile| tile.whole(p, self.codes.bits(), m))).tile)
    }

    fn launch(&self, p: &Problem, config: Config, m: usize) -> Launch<SharedTiles> {
        let name = self.codes.name();
        let Work { tile, grid, shared, .. } = match config {
            Config::Gemv(Gemv { token_tiles, row_tiles }) => {
                return Launch {
                    module: self.codes.module("gemm_w4a16/gemv", "gemm_w4a16/e4m3/gemv"),
                    function: format!("gemv_{name}a16_{token_tiles}x{row_tiles}_{}", p.dtype),
                    grid: Grid::new([p.n.div_ceil(16 * row_tiles) as u32, 1, 1], 32 * abi::GEMM_W4A16_GEMV_WARPS, 0),
                    params: SharedTiles(0),
                };
            }
            Config::StreamK(tile) => best(tile.works(p, self.codes.bits(), m)),
            Config::WholeTiles(tile) => tile.whole(p, self.codes.bits(), m),
        };
        Launch {
            module: self.codes.module("gemm_w4a16/sm80", "gemm_w4a16/e4m3/sm80"),
            function: format!("gemm_{name}a16_{}x{}_{}", tile.bm, tile.bn, p.dtype),
            grid: Grid::new([grid as u32, 1, 1], tile.threads() as u32, tile.shared_bytes(self.codes.bits()) as u32),
            params: SharedTiles(shared as u32),
        }
    }

    unsafe fn run(&self, w: &Weight, plan: &Plan<SharedTiles>, y: LinearOut, x: &Input) -> Result<()> {
        let layer = GemmW4A16Args {
            y,
            x: x.x,
            w: w.parts.codes.ptr(),
            w_scales: w.scales(),
            w_zero_points: w.zero_points(),
            w_zero_point: w.zero_point,
            k: u32_of(w.k)?,
            n_pad: u32_of(padded_n(w.n))?,
            group: u32_of(w.group_size)?,
            codebook: w.codebook.map_or([0; 8], |codebook| codebook_bytes(&codebook, w.device.dtype())),
        };
        if plan.grid.shared_bytes == 0 {
            // SAFETY: the caller's promise about every address; gemv.cu, which has no ring, takes these.
            return unsafe { w.device.launch(plan.kernel, &plan.grid, &layer) };
        }
        let args = GemmW4A16Sm80Args {
            layer,
            partials: w.device.workspace(),
            counters: w.device.counters(),
            stream_k_tiles: plan.params.0,
            low_scales: u32::from(self.scale_parts == ScaleParts::Two),
        };
        // SAFETY: as above, of sm80.cu.
        unsafe { w.device.launch(plan.kernel, &plan.grid, &args) }
    }
}

/// The values of a codebook in `dtype`: their low bytes, then their high bytes, four to a word.
fn codebook_bytes(codebook: &Codebook, dtype: DType) -> [u32; 8] {
    let bytes = codebook.0.map(|value| match dtype {
        DType::F16 => f16::from_f32(value).to_le_bytes(),
        _ => bf16::from_f32(value).to_le_bytes(),
    });
    std::array::from_fn(|i| u32::from_le_bytes(std::array::from_fn(|j| bytes[i % 4 * 4 + j][i / 4])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::embedded;
    use crate::device::cuda::gemm::family::h200_problem;

    fn family(codes: Codes, scale_parts: ScaleParts) -> W4A16Sm80 {
        W4A16Sm80 { codes, scale_parts }
    }

    #[test]
    fn every_configuration_has_a_kernel() {
        for family in [
            family(Codes::Uint4, ScaleParts::One),
            family(Codes::Uint8, ScaleParts::One),
            family(Codes::E4m3, ScaleParts::Two),
            family(Codes::Codebook4, ScaleParts::One),
        ] {
            for dtype in [DType::F16, DType::BF16] {
                let p = Problem { dtype, ..h200_problem(64, 64) };
                let all = GEMV.into_iter().map(Config::Gemv).chain(SM80_STREAM_K.into_iter().map(Config::StreamK));
                for launch in all.map(|config| family.launch(&p, config, 1)) {
                    embedded::assert_has(launch.module, vec![launch.function]);
                }
            }
        }
    }

    /// Of tiles with 8 fragments or fewer a warp the kernel keeps a group's own sums (`ON_SUMS`).
    #[test]
    fn tiles_of_few_rows_are_those_that_do_not_round() {
        for tile in SM80_STREAM_K {
            let fragments = tile.bm / tile.warps_m / 8 * (tile.bn / tile.warps_n / 16);
            assert_eq!(fragments <= 8, tile.bm <= UNROUNDED_ROWS, "{tile:?}");
        }
    }

    /// Every launch of a tile fits the GPU, its sums the workspace and its shared tiles the counters; blocks are no more than slices.
    #[test]
    fn every_launch_is_one_that_the_gpu_takes() {
        for (sm_count, max_shared) in [(132, 226 << 10), (108, 162 << 10), (128, 99 << 10), (20, 99 << 10)] {
            for family in [Codes::Uint4, Codes::Uint8].map(|codes| family(codes, ScaleParts::One)) {
                for m in [1, 9, 16, 17, 33, 64, 65, 128, 257, 1024, 4096, 65536] {
                    for (n, k) in [(1, 8), (33, 200), (4096, 4096), (6144, 4096), (4096, 14336), (57344, 8192)] {
                        let p = Problem { sm_count, max_shared, ..h200_problem(n, k) };
                        for config in family.configs(&p, m).into_iter().chain([family.choose_batch_invariant(&p, m)]) {
                            let (Config::StreamK(tile) | Config::WholeTiles(tile)) = config else { continue };
                            let launch = family.launch(&p, config, m);
                            let Grid { blocks: [blocks, ..], threads, shared_bytes, .. } = launch.grid;
                            let what = format!("{launch:?} of {m} x {n} x {k}");
                            assert!(shared_bytes <= max_shared && threads == tile.threads() as u32, "{what}");
                            assert!(blocks > 0 && blocks <= tile.min_blocks_per_sm as u32 * sm_count, "{what}");
                            let (tiles, shared) = (tile.tiles(&p, m), launch.params.0 as usize);
                            assert!(shared <= tiles && shared <= COUNTERS, "{what}");
                            let slots = tile.partials_bytes(blocks as usize, shared);
                            assert!(shared == 0 || slots <= WORKSPACE_BYTES, "{what}");
                            assert!(shared == 0 || blocks as usize <= shared * k.div_ceil(SLICE), "{what}");
                        }
                    }
                }
            }
        }
    }

    /// With the least shared memory that a block may have: 100 KB on sm_86 and sm_89, less the kilobyte the system takes.
    #[test]
    fn few_rows_get_small_tiles_and_many_get_large_ones() {
        let w4 = family(Codes::Uint4, ScaleParts::One);
        let at = |n, m| w4.config_name(w4.choose(&Problem { max_shared: 99 << 10, ..h200_problem(n, 4096) }, m));
        assert_eq!(at(4096, 8), "w4 8x16");
        assert_eq!(at(28672, 8), "w4 8x64");
        assert_eq!(at(28672, 9), "w4 16x128");
        assert_eq!(at(57344, 1), "w4 16x128");
        assert_eq!(at(8192, 4096), "w4 128x256");
    }

    #[test]
    fn weights_that_cannot_be_rounded_get_tiles_that_do_not() {
        let at = |parts| {
            let w4 = family(Codes::Uint4, parts);
            w4.config_name(w4.choose(&h200_problem(28672, 4096), 4096))
        };
        assert!(at(ScaleParts::SumsOnly).starts_with("w4 32x"));
        assert_eq!(at(ScaleParts::One), "w4 128x256");
    }

    #[test]
    fn one_order_of_sums_means_whole_tiles() {
        let (w4, p) = (family(Codes::Uint4, ScaleParts::One), h200_problem(4096, 4096));
        for m in [1, 8, 64, 4096] {
            assert_eq!(w4.launch(&p, w4.choose_batch_invariant(&p, m), m).params, SharedTiles(0));
        }
    }
}
