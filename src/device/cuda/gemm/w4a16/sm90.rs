//! W4A16 and W8A16 on sm_90: gemm_w4a16/sm90, and which configuration runs a shape, as measured on an H200
//! (docs/kernels-linear.md).
#![allow(unsafe_code)] // kernel launches

use super::blocks::BlockShape;
use super::codes::Codes;
use super::limits::{HEAD_BYTES, LEAST_STAGES, SHARED_BYTES, TRANSPOSE_BYTES};
use super::warp_split_k::{self, WarpSplitK};
use crate::device::Epilogue;
use crate::device::cuda::embedded::abi::{GemmW4A16Sm90Args, LinearOut};
use crate::device::cuda::embedded::configs::gemm_w4a16::{SM90_PERSISTENT, SM90_SPLIT_K, Sm90Persistent, Sm90SplitK};
use crate::device::cuda::gemm::family::{GemmFamily, Input, Launch, Plan, Problem, Target, Weight, is_plausible};
use crate::device::cuda::gemm::layout::blocks::{COLUMNS, ROWS, block_count};
use crate::device::cuda::gemm::recipe::{Block, Recipe, Repack};
use crate::device::cuda::gemm::tensor_map::MapMemo;
use crate::device::cuda::kernel::{Grid, u32_of};
use crate::device::cuda::op_kernel::OpKernel;
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::quant::{ActQuant, LinearWeight, QuantWeight, Weight as HostWeight};

/// Codes in blocks with their scales and zero points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct W4A16Sm90 {
    pub(crate) shape: BlockShape,
}

/// A kernel, and how k is split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Config {
    /// For up to sixteen rows: over warps, and over a cluster of `slices` blocks.
    WarpSplitK { kernel: WarpSplitK, slices: usize },
    /// Over a cluster of `splits` blocks.
    SplitK { kernel: Sm90SplitK, splits: usize },
    /// Not at all: tiles are walked over by one block a multiprocessor.
    Persistent(Sm90Persistent),
}

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

/// Of the tile of 128 rows by 128 tokens with k split.
const SPLIT_K_128: Cost = Cost { block_us: 0.83, tile_us: 5.0 };
/// Splits of k that were of use: clusters of 5 and 7 leave too many multiprocessors of a processing cluster idle.
const SPLITS: [usize; 6] = [8, 6, 4, 3, 2, 1];
/// The kernel of so many tokens and blocks of rows.
fn split_k(tokens: usize, row_blocks: usize) -> Sm90SplitK {
    let found = SM90_SPLIT_K.iter().find(|k| (k.tokens, k.row_blocks) == (tokens, row_blocks));
    *found.expect("a configuration of the list")
}

impl Sm90SplitK {
    /// Behind the ring: a warp's place to transpose its tile, then what the other blocks send.
    fn tail_bytes(&self, splits: usize) -> usize {
        let row_tiles = if splits == 1 { 0 } else { (4 * self.row_blocks).next_multiple_of(splits) };
        4 * self.row_blocks / self.blocks_per_warp * TRANSPOSE_BYTES + row_tiles * 16 * self.tokens * 4
    }

    /// Stages of the ring that there is room for.
    fn stages(&self, shape: BlockShape, splits: usize) -> usize {
        // A kilobyte of each block is the system's.
        let room = (SHARED_BYTES + 1024) / self.min_blocks_per_sm - 1024;
        (room - HEAD_BYTES - self.tail_bytes(splits)) / stage_bytes(self.tokens, self.row_blocks, shape)
    }

    /// The most splits that still run at once; weights are streamed fastest by about three blocks for two multiprocessors.
    fn splits(&self, p: &Problem, m: usize) -> usize {
        let sms = p.sm_count as usize;
        let tiles = p.n.div_ceil(ROWS * self.row_blocks) * m.div_ceil(self.tokens);
        let fits = |&splits: &usize| match (self.min_blocks_per_sm, splits) {
            (2, _) => tiles * splits <= sms * 17 / 10,
            (_, 3 | 8) => tiles * splits <= sms * 9 / 10,
            (_, 4) => tiles * splits <= sms * 15 / 16,
            (_, 6) => tiles * splits <= sms * 3 / 4,
            _ => tiles * splits <= sms,
        };
        let most = p.k.div_ceil(COLUMNS);
        SPLITS.into_iter().filter(|&splits| splits <= most).find(fits).unwrap_or(1)
    }

    fn config(self, p: &Problem, m: usize) -> Config {
        Config::SplitK { kernel: self, splits: self.splits(p, m) }
    }

    fn grid(&self, p: &Problem, shape: BlockShape, m: usize, splits: usize) -> Grid {
        let Sm90SplitK { tokens, row_blocks, blocks_per_warp, .. } = *self;
        let of_k = p.k.div_ceil(COLUMNS).div_ceil(splits).max(LEAST_STAGES);
        let ring = self.stages(shape, splits).min(of_k) * stage_bytes(tokens, row_blocks, shape);
        Grid {
            blocks: [(p.n.div_ceil(row_blocks * ROWS) * splits) as u32, m.div_ceil(tokens) as u32, 1],
            threads: 128 * (row_blocks / blocks_per_warp) as u32,
            shared_bytes: (HEAD_BYTES + ring + self.tail_bytes(splits)) as u32,
            cluster: splits as u32,
            overlaps: true,
        }
    }
}

impl Sm90Persistent {
    fn cost(&self) -> Cost {
        match (self.tokens, self.row_blocks) {
            (128, 2) => Cost { block_us: 0.72, tile_us: 2.7 },
            (128, _) => Cost { block_us: 1.345, tile_us: 2.0 },
            _ => Cost { block_us: 1.32, tile_us: 5.6 },
        }
    }

    fn tiles(&self, p: &Problem, m: usize) -> usize {
        m.div_ceil(self.tokens) * p.n.div_ceil(self.row_blocks * ROWS)
    }

    fn us(&self, p: &Problem, m: usize) -> f64 {
        self.cost().of(self.tiles(p, m), p.k.div_ceil(COLUMNS) as f64, p.sm_count as usize)
    }

    fn tail_bytes(&self) -> usize {
        4 * self.row_blocks * TRANSPOSE_BYTES
    }

    fn grid(&self, p: &Problem, shape: BlockShape, m: usize) -> Grid {
        let stage = stage_bytes(self.tokens, self.row_blocks, shape);
        let stages = (SHARED_BYTES - HEAD_BYTES - self.tail_bytes()) / stage;
        Grid {
            blocks: [self.tiles(p, m).min(p.sm_count as usize) as u32, 1, 1],
            threads: 128 * (self.row_blocks as u32 + 1),
            shared_bytes: (HEAD_BYTES + stages * stage + self.tail_bytes()) as u32,
            cluster: 1,
            overlaps: true,
        }
    }
}

/// Of the ring: 128 columns of x, and a block for each of `row_blocks`.
fn stage_bytes(tokens: usize, row_blocks: usize, shape: BlockShape) -> usize {
    (tokens * COLUMNS * 2 + row_blocks * shape.bytes()).next_multiple_of(1024)
}

impl GemmFamily for W4A16Sm90 {
    type Config = Config;
    type Params = MapMemo;

    fn accept(weight: &LinearWeight, target: Target) -> Option<Self> {
        match &weight.weight {
            HostWeight::Quant(q) if target.sm90 && weight.activation == ActQuant::None => {
                BlockShape::of(q, target.dtype).map(|shape| W4A16Sm90 { shape })
            }
            _ => None,
        }
    }

    fn takes_int8(&self) -> bool {
        false
    }

    /// SwiGLU, the one that there is for floats, is in all kernels.
    fn check_epilogue(&self, _: &LinearWeight, _: Epilogue) -> Result<()> {
        Ok(())
    }

    fn code_bytes(&self, n: usize, k: usize) -> usize {
        block_count(n, k) * self.shape.bytes()
    }

    fn recipe(&self, q: &QuantWeight, dtype: DType) -> Recipe {
        let shape = self.shape;
        let BlockShape { codes, groups, low_scales, zero_points } = shape;
        let bytes = self.code_bytes(q.n, q.k);
        Recipe {
            on_gpu: Some(Repack {
                block: Block { bits: codes.bits(), groups, low_scales, zero_points },
                e4m3: (codes == Codes::E4m3).then_some(dtype),
                ..Repack::new(OpKernel::RepackBlocks16, DType::U8, bytes, false)
            }),
            on_host: Box::new(move |q| HostData::U8(shape.pack(q, dtype))),
            parameters: None,
            row_scales: None,
        }
    }

    fn table_name(&self) -> Option<&'static str> {
        Some(if self.shape.codes == Codes::Uint4 { "w4a16/sm90" } else { "w8a16/sm90" })
    }

    fn config_name(&self, config: Config) -> String {
        let name = self.shape.codes.measured_as();
        match config {
            Config::WarpSplitK { kernel, slices } => format!("{name} {}", kernel.name(slices)),
            Config::SplitK { kernel, splits } => {
                format!("{name} {}x{} split {splits}", kernel.row_blocks * ROWS, kernel.tokens)
            }
            Config::Persistent(kernel) => format!("{name} {}x{}", kernel.row_blocks * ROWS, kernel.tokens),
        }
    }

    fn configs(&self, p: &Problem, m: usize) -> Vec<Config> {
        let persistent = SM90_PERSISTENT.into_iter().filter(|_| m > 64).map(Config::Persistent);
        let split_k = SM90_SPLIT_K.into_iter().flat_map(|kernel| {
            let (size, slices) = ([kernel.row_blocks * ROWS, kernel.tokens], p.k.div_ceil(COLUMNS));
            let splits = SPLITS.into_iter().filter(move |&splits| {
                is_plausible(p, m, size, slices, splits) && kernel.stages(self.shape, splits) >= LEAST_STAGES
            });
            splits.map(move |splits| Config::SplitK { kernel, splits })
        });
        let warps = warp_split_k::configs(p, self.shape, m).into_iter();
        persistent.chain(split_k).chain(warps.map(|(kernel, slices)| Config::WarpSplitK { kernel, slices })).collect()
    }

    fn choose(&self, p: &Problem, m: usize) -> Config {
        let sms = p.sm_count as usize;
        match m {
            ..=warp_split_k::MOST_ROWS => match warp_split_k::choose(p, self.shape, m) {
                Some((kernel, slices)) => Config::WarpSplitK { kernel, slices },
                None => split_k(16, 4).config(p, m),
            },
            17..=32 => split_k(32, 2).config(p, m),
            33..=64 => {
                let wide = split_k(64, 4);
                let blocks = p.n.div_ceil(ROWS * wide.row_blocks) * wide.splits(p, m);
                (if 3 * blocks >= 2 * sms { wide } else { split_k(64, 2) }).config(p, m)
            }
            _ => {
                let kernel = split_k(128, 2);
                let (tiles, splits) = (p.n.div_ceil(2 * ROWS) * m.div_ceil(128), kernel.splits(p, m));
                let split_us = SPLIT_K_128.of(tiles * splits, p.k.div_ceil(COLUMNS) as f64 / splits as f64, sms);
                let persistent = SM90_PERSISTENT.iter().min_by(|a, b| a.us(p, m).total_cmp(&b.us(p, m)));
                let persistent = *persistent.expect("there are persistent kernels");
                if split_us < persistent.us(p, m) {
                    Config::SplitK { kernel, splits }
                } else {
                    Config::Persistent(persistent)
                }
            }
        }
    }

    /// Tiles that multiply by `wgmma` and scale the sums of a group, k split as `n` and `k` say.
    fn choose_batch_invariant(&self, p: &Problem, m: usize) -> Config {
        let tokens = match m {
            ..=32 => 32,
            33..=64 => 64,
            _ => 128,
        };
        let (tiles, most) = (p.n.div_ceil(2 * ROWS), p.k.div_ceil(COLUMNS));
        let fits = |&splits: &usize| splits <= most && 2 * tiles * splits <= 3 * p.sm_count as usize;
        Config::SplitK { kernel: split_k(tokens, 2), splits: SPLITS.into_iter().find(fits).unwrap_or(1) }
    }

    fn launch(&self, p: &Problem, config: Config, m: usize) -> Launch<MapMemo> {
        let (kernel, grid, tokens) = match config {
            Config::WarpSplitK { kernel, slices } => {
                let grid = kernel.grid(p, self.shape, m, slices).expect("a choice for more rows has room for fewer");
                (kernel.function(), grid, kernel.kernel.tokens)
            }
            Config::SplitK { kernel, splits } => {
                let Sm90SplitK { tokens, row_blocks, .. } = kernel;
                (format!("split_k_{tokens}x{row_blocks}"), kernel.grid(p, self.shape, m, splits), tokens)
            }
            Config::Persistent(kernel) => {
                let Sm90Persistent { tokens, row_blocks } = kernel;
                (format!("persistent_{tokens}x{row_blocks}"), kernel.grid(p, self.shape, m), tokens)
            }
        };
        Launch {
            module: self.shape.codes.module("gemm_w4a16/sm90", "gemm_w4a16/e4m3/sm90"),
            function: format!("gemm_{}a16_{kernel}_{}", self.shape.codes.name(), p.dtype),
            grid,
            params: MapMemo::new(tokens),
        }
    }

    unsafe fn run(&self, w: &Weight, plan: &Plan<MapMemo>, y: LinearOut, x: &Input) -> Result<()> {
        let args = GemmW4A16Sm90Args {
            x: plan.params.matrix(x.x.cast(), x.m, 2 * w.k)?,
            y,
            w: w.parts.codes.ptr(),
            block_bytes: u32_of(self.shape.bytes())?,
            row_blocks: u32_of(w.n.div_ceil(ROWS))?,
            k_blocks: u32_of(w.k.div_ceil(COLUMNS))?,
            groups: u32_of(self.shape.groups)?,
            low_scales: self.shape.low_scales.into(),
            has_zero_points: self.shape.zero_points.into(),
            w_zero_point: w.zero_point,
            k: u32_of(w.k)?,
            x_rows: x.x,
        };
        // SAFETY: the caller's promise about every address.
        unsafe { w.device.launch(plan.kernel, &plan.grid, &args) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::embedded;
    use crate::device::cuda::gemm::family::h200_problem;

    const SHAPE: BlockShape = BlockShape { codes: Codes::Uint4, groups: 1, low_scales: false, zero_points: false };
    const W4: W4A16Sm90 = W4A16Sm90 { shape: SHAPE };

    /// The least and the most that blocks have beside their codes.
    fn shapes() -> [BlockShape; 4] {
        let all = |codes| BlockShape { codes, groups: 4, low_scales: true, zero_points: true };
        [SHAPE, all(Codes::Uint4), BlockShape { codes: Codes::Uint8, ..SHAPE }, all(Codes::Uint8)]
    }

    #[test]
    fn every_configuration_has_a_kernel() {
        for codes in [Codes::Uint4, Codes::Uint8, Codes::E4m3] {
            let shape = BlockShape { codes, ..SHAPE };
            for dtype in [DType::F16, DType::BF16] {
                let (family, p) = (W4A16Sm90 { shape }, Problem { dtype, ..h200_problem(64, 128) });
                let warps = warp_split_k::all().map(|kernel| Config::WarpSplitK { kernel, slices: 1 });
                let split_k = SM90_SPLIT_K.into_iter().map(|kernel| Config::SplitK { kernel, splits: 1 });
                let all = warps.chain(split_k).chain(SM90_PERSISTENT.into_iter().map(Config::Persistent));
                let functions = all.map(|config| family.launch(&p, config, 1).function).collect();
                embedded::assert_has(family.launch(&p, Config::Persistent(SM90_PERSISTENT[0]), 1).module, functions);
            }
        }
    }

    /// At most the shared memory of an H100 or H200, with the two stages that the kernels need to go round their ring.
    #[test]
    fn every_launch_is_one_that_the_gpu_takes() {
        for shape in shapes() {
            let family = W4A16Sm90 { shape };
            for m in [1, 8, 9, 16, 17, 33, 64, 65, 128, 129, 257, 512, 4096, 65536] {
                for (n, k) in
                    [(1, 8), (64, 128), (520, 1040), (4096, 4096), (4096, 14336), (57344, 8192), (8192, 28672)]
                {
                    let p = h200_problem(n, k);
                    let others = family.configs(&p, m).into_iter();
                    for config in others.chain([family.choose(&p, m), family.choose_batch_invariant(&p, m)]) {
                        let launch = family.launch(&p, config, m);
                        let Grid { blocks, threads, shared_bytes, cluster, .. } = launch.grid;
                        assert!(shared_bytes <= SHARED_BYTES as u32, "{launch:?}");
                        assert!(
                            blocks[0] > 0 && blocks[0].is_multiple_of(cluster) && cluster <= 8 && threads <= 640,
                            "{launch:?}"
                        );
                        let box_rows = launch.params.box_rows();
                        assert!(box_rows <= 256 && cluster as usize <= k.div_ceil(COLUMNS), "{launch:?}");
                        let (tail, stage) = match config {
                            Config::WarpSplitK { .. } => continue,
                            Config::SplitK { kernel, splits } => {
                                (kernel.tail_bytes(splits), stage_bytes(kernel.tokens, kernel.row_blocks, shape))
                            }
                            Config::Persistent(kernel) => {
                                (kernel.tail_bytes(), stage_bytes(kernel.tokens, kernel.row_blocks, shape))
                            }
                        };
                        let ring = shared_bytes as usize - HEAD_BYTES - tail;
                        assert!(ring >= LEAST_STAGES * stage, "{launch:?}");
                    }
                }
            }
        }
    }

    /// What was fastest when measured.
    #[test]
    fn choices_are_the_measured_ones() {
        let config = |n, k, m| W4.config_name(W4.choose(&h200_problem(n, k), m));
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
