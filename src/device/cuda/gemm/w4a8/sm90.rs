//! W4A8 and W2A8 on sm_90: gemm_w4a8/sm90, gemm_w4a8/factored/sm90 and gemm_w4a8/w2a8/sm90, and which configuration runs a shape
//! (docs/kernels-linear.md has what was measured).
#![allow(unsafe_code)] // kernel launches

use super::blocks::NibbleShape;
use super::limits::Ring;
use super::persistent::NARROW_ROWS;
use super::{persistent, split_k, warp_split_k};
use crate::device::cuda::embedded::abi::{GemmW4A8Sm90Args, LinearOut};
use crate::device::cuda::embedded::configs::gemm_w4a8::{
    SM90_WARP_SPLIT_K, Sm90Persistent, Sm90SplitK, Sm90WarpSplitK,
};
use crate::device::cuda::gemm::family::{GemmFamily, Input, Launch, Plan, Problem, Target, Weight};
use crate::device::cuda::gemm::layout::blocks::{COLUMNS, ROWS, block_count};
use crate::device::cuda::gemm::packed::{Order, Parameters};
use crate::device::cuda::gemm::recipe::{Block, Recipe, Repack};
use crate::device::cuda::gemm::tensor_map::MapMemo;
use crate::device::cuda::kernel::u32_of;
use crate::device::cuda::op_kernel::OpKernel;
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::quant::{ActQuant, Factored, LinearWeight, QuantWeight, Weight as HostWeight};

/// 4- or 2-bit codes in blocks with the scales or factors of their groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct W4A8Sm90 {
    pub(crate) shape: NibbleShape,
}

/// A kernel, and how k is split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Config {
    /// For few rows: over warps.
    WarpSplitK(Sm90WarpSplitK),
    /// Where rows are one group: over warpgroups, and over a cluster of `splits` blocks.
    SplitK { kernel: Sm90SplitK, splits: usize },
    /// Not at all: blocks walk over tiles.
    Persistent(Sm90Persistent),
}

/// What a launch tells the kernel.
#[derive(Debug, Clone)]
pub(crate) struct Params {
    ring: Ring,
    map: MapMemo,
}

impl W4A8Sm90 {
    fn module(self) -> &'static str {
        match self.shape {
            NibbleShape { factors: true, .. } => "gemm_w4a8/factored/sm90",
            NibbleShape { bits: 2, .. } => "gemm_w4a8/w2a8/sm90",
            _ => "gemm_w4a8/sm90",
        }
    }

    /// A kernel of the module, of uint8 activations where `x_u8` asks for one of its own.
    fn function(self, kernel: &str, x_u8: bool) -> String {
        let factored = if self.shape.factors { "_factored" } else { "" };
        format!("gemm_w{}a8{factored}{}_sm90_{kernel}", self.shape.bits, if x_u8 { "_u8" } else { "" })
    }
}

impl GemmFamily for W4A8Sm90 {
    type Config = Config;
    type Params = Params;

    fn accept(weight: &LinearWeight, target: Target) -> Option<Self> {
        let HostWeight::Quant(q) = &weight.weight else { return None };
        match weight.activation {
            _ if !target.sm90 => None,
            ActQuant::None | ActQuant::LlmInt8 { .. } => None,
            _ => NibbleShape::of(q).map(|shape| W4A8Sm90 { shape }),
        }
    }

    fn takes_int8(&self) -> bool {
        true
    }

    fn code_bytes(&self, n: usize, k: usize) -> usize {
        block_count(n, k) * self.shape.bytes()
    }

    fn recipe(&self, q: &QuantWeight, _: DType) -> Recipe {
        let shape = self.shape;
        let factored = if shape.factors { Factored::of(q) } else { None };
        let row_scales = factored.as_ref().map(|factored| factored.scales.clone());
        let bytes = self.code_bytes(q.n, q.k);
        let block = Block { bits: 4, groups: if shape.one_group { 0 } else { shape.groups }, ..Block::default() };
        let can_repack = shape.bits == 4 && !shape.factors;
        Recipe {
            on_gpu: can_repack
                .then(|| Repack { block, ..Repack::new(OpKernel::RepackBlocks4, DType::U8, bytes, true) }),
            on_host: Box::new(move |q| HostData::U8(shape.pack(q, factored.as_ref()))),
            parameters: shape.one_group.then_some(Parameters {
                order: Order::ByGroup { multiple: ROWS },
                zero_points: false,
                sums: false,
            }),
            row_scales,
        }
    }

    fn table_name(&self) -> Option<&'static str> {
        Some(match self.shape {
            NibbleShape { bits: 2, .. } => "w2a8/sm90",
            NibbleShape { factors: true, .. } => "w4a8_factored/sm90",
            _ => "w4a8/sm90",
        })
    }

    fn config_name(&self, config: Config) -> String {
        let bits = self.shape.bits;
        match config {
            Config::WarpSplitK(kernel) => {
                format!("w{bits} {}x{} split {}", kernel.rows(), kernel.tokens, kernel.warps_k)
            }
            Config::SplitK { kernel, splits } => {
                format!("w{bits} {}x{} cluster {splits}", kernel.row_blocks * ROWS, kernel.tokens)
            }
            Config::Persistent(kernel) => format!("w{bits} {}x{}", kernel.row_blocks * ROWS, kernel.tokens),
        }
    }

    fn configs(&self, p: &Problem, m: usize) -> Vec<Config> {
        let covers = |tokens: usize| (m..=16 * m.max(2)).contains(&(2 * tokens)) || tokens >= NARROW_ROWS;
        let warps = SM90_WARP_SPLIT_K.into_iter().filter(|kernel| covers(kernel.tokens)).map(Config::WarpSplitK);
        let tiles = persistent::kernels(p, self.shape).filter(|kernel| covers(kernel.tokens)).map(Config::Persistent);
        let split_k = split_k::configs(p, self.shape, m).map(|(kernel, splits)| Config::SplitK { kernel, splits });
        warps.chain(tiles).chain(split_k).collect()
    }

    fn choose(&self, p: &Problem, m: usize) -> Config {
        let shape = self.shape;
        let tile_us = || persistent::best(p, shape, m).cost(p, shape, m);
        if let Some((kernel, splits)) = split_k::choose(p, shape, m, tile_us) {
            return Config::SplitK { kernel, splits };
        }
        match warp_split_k::choose(p, shape, m) {
            Some(kernel) => Config::WarpSplitK(kernel),
            None => Config::Persistent(persistent::choose(p, shape, m)),
        }
    }

    fn launch(&self, p: &Problem, config: Config, m: usize) -> Launch<Params> {
        let shape = self.shape;
        let (function, (grid, ring), tokens) = match config {
            Config::WarpSplitK(kernel) => {
                (self.function(&kernel.function(), false), kernel.grid(p, shape, m), kernel.tokens)
            }
            Config::SplitK { kernel, splits } => {
                (self.function(&kernel.function(), false), kernel.grid(p, shape, m, splits), kernel.tokens)
            }
            Config::Persistent(kernel) => {
                (self.function(&kernel.function(), p.x_u8), kernel.grid(p, shape, m), kernel.tokens)
            }
        };
        Launch { module: self.module(), function, grid, params: Params { ring, map: MapMemo::new(tokens) } }
    }

    unsafe fn run(&self, w: &Weight, plan: &Plan<Params>, y: LinearOut, x: &Input) -> Result<()> {
        let args = GemmW4A8Sm90Args {
            x: plan.params.map.matrix(x.x.cast(), x.m, w.k)?,
            y,
            x_rows: x.x.cast(),
            w: w.parts.codes.ptr(),
            x_scales: x.scales,
            w_scales: w.scales(),
            x_zero_points: x.zero_points,
            x_zero_point: x.zero_point_as_read(w),
            k: u32_of(w.k)?,
            x_unsigned: u32::from(x.flip != 0),
            row_blocks: u32_of(w.n.div_ceil(ROWS))?,
            k_blocks: u32_of(w.k.div_ceil(COLUMNS))?,
            block_bytes: u32_of(self.shape.bytes())?,
            groups_per_block: u32_of(self.shape.groups)?,
            group_blocks: u32_of(self.shape.group_blocks)?,
            stages: u32_of(plan.params.ring.stages)?,
            stage_bytes: u32_of(plan.params.ring.stage_bytes)?,
        };
        // SAFETY: the caller's promise about every address.
        unsafe { w.device.launch(plan.kernel, &plan.grid, &args) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::embedded;
    use crate::device::cuda::embedded::configs::gemm_w4a8::{
        SM90_PERSISTENT, SM90_PERSISTENT_ONE_GROUP, SM90_SPLIT_K, SM90_U8,
    };
    use crate::device::cuda::gemm::family::h200_problem;
    use crate::device::cuda::gemm::w4a8::limits::{MOST_STAGES, SHARED_BYTES};
    use crate::device::cuda::kernel::Grid;

    const SHAPE: NibbleShape = NibbleShape { bits: 4, one_group: false, factors: false, groups: 1, group_blocks: 1 };
    const ONE_GROUP: NibbleShape = NibbleShape { one_group: true, group_blocks: 32, ..SHAPE };
    const FACTORED: NibbleShape = NibbleShape { factors: true, ..ONE_GROUP };
    const TERNARY: NibbleShape = NibbleShape { bits: 2, ..ONE_GROUP };

    #[test]
    fn every_configuration_has_a_kernel() {
        for shape in [ONE_GROUP, FACTORED, TERNARY] {
            let family = W4A8Sm90 { shape };
            let warps = SM90_WARP_SPLIT_K.into_iter().map(Config::WarpSplitK);
            let split_k = SM90_SPLIT_K.into_iter().map(|kernel| Config::SplitK { kernel, splits: 1 });
            let tiles = SM90_PERSISTENT.into_iter().chain(SM90_PERSISTENT_ONE_GROUP).map(Config::Persistent);
            let int8 = warps.chain(split_k).chain(tiles).map(|config| (config, false));
            let all = int8.chain(SM90_U8.into_iter().map(|kernel| (Config::Persistent(kernel), true)));
            let function =
                |(config, x_u8)| family.launch(&Problem { x_u8, ..h200_problem(4096, 4096) }, config, 1).function;
            embedded::assert_has(family.module(), all.map(function).collect());
        }
    }

    /// The shared memory of an H100 or H200 holds the blocks that are to run at once, each with two stages or more.
    #[test]
    fn every_launch_is_one_that_the_gpu_takes() {
        let [two, four] = [2, 4].map(|groups| NibbleShape { groups, ..SHAPE });
        for shape in [SHAPE, ONE_GROUP, FACTORED, TERNARY, two, four] {
            let family = W4A8Sm90 { shape };
            for m in [1, 16, 17, 33, 64, 65, 128, 129, 257, 512, 4096, 65536] {
                for (n, k) in
                    [(1, 16), (64, 128), (520, 1040), (4096, 4096), (6144, 4096), (57344, 8192), (8192, 28672)]
                {
                    for x_u8 in [false, true] {
                        let p = Problem { x_u8, ..h200_problem(n, k) };
                        let config = family.choose(&p, m);
                        let launch = family.launch(&p, config, m);
                        let Grid { blocks, threads, shared_bytes, cluster, .. } = launch.grid;
                        // Blocks that split k over clusters need not all run at once.
                        let resident = match config {
                            Config::SplitK { .. } => 1,
                            _ => ((blocks[0] * blocks[1]) as usize).div_ceil(132),
                        };
                        assert!(resident * (shared_bytes as usize + 1024) <= SHARED_BYTES, "{launch:?}");
                        assert!(blocks[0] > 0 && threads <= 512 && launch.params.map.box_rows() <= 256, "{launch:?}");
                        assert!(
                            blocks[0].is_multiple_of(cluster) && cluster as usize <= k.div_ceil(COLUMNS),
                            "{launch:?}"
                        );
                        let fewest = if matches!(config, Config::WarpSplitK(_)) { 1 } else { 2 };
                        assert!((fewest..=MOST_STAGES).contains(&launch.params.ring.stages), "{launch:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn few_rows_get_narrow_tiles_and_many_those_that_end_first() {
        let family = W4A8Sm90 { shape: SHAPE };
        let config = |n, k, m| family.config_name(family.choose(&h200_problem(n, k), m));
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

    #[test]
    fn rows_of_one_group_split_k_where_tiles_are_few() {
        let family = W4A8Sm90 { shape: FACTORED };
        let config = |n, k, m| family.config_name(family.choose(&h200_problem(n, k), m));
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
