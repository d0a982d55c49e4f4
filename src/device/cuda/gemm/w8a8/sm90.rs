//! W8A8 and LLM.int8() on sm_90: gemm_w8a8/sm90 and gemm_w8a8/llm_int8/sm90, and which configuration runs a shape, as measured on
//! an H200 (docs/kernels-linear.md).
#![allow(unsafe_code)] // kernel launches

use super::sm80::takes;
use crate::device::cuda::embedded::abi::{self, GemmW8A8Sm90Args, LinearOut};
use crate::device::cuda::embedded::configs::gemm_w8a8::{
    SM90_LLM_INT8_PERSISTENT, SM90_LLM_INT8_SPLIT_K, SM90_PERSISTENT, SM90_SPLIT_K, Sm90Persistent, Sm90SplitK,
};
use crate::device::cuda::gemm::family::{
    GemmFamily, Input, Launch, Plan, Problem, Target, Weight, is_plausible, owns_scales,
};
use crate::device::cuda::gemm::layout::blocks::{COLUMNS, ROWS, block_count, blocks8};
use crate::device::cuda::gemm::packed::{Order, Parameters};
use crate::device::cuda::gemm::recipe::{Recipe, Repack};
use crate::device::cuda::gemm::tensor_map::MapMemo;
use crate::device::cuda::kernel::{Grid, u32_of};
use crate::device::cuda::op_kernel::OpKernel;
use crate::device::{Epilogue, Output};
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::quant::{LinearWeight, QuantWeight};

/// Codes minus zero points in blocks of 64 x 128, as sm_90's products read them from shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct W8A8Sm90 {
    /// LLM.int8().
    pub(crate) outliers: bool,
}

/// A kernel, and into how many blocks of a cluster k is split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Config {
    /// Tiles of 128 rows of x, walked over by one block a multiprocessor.
    Persistent(Sm90Persistent),
    /// Tiles of up to 128 rows of x, a cluster of `splits` blocks for each.
    SplitK { kernel: Sm90SplitK, splits: usize },
}

/// Rows of x in tiles of [`Config::Persistent`].
const BM: usize = abi::GEMM_W8A8_SM90_BM as usize;
/// Of a column of a tile, for the scales, sums and biases that its epilogue needs.
const COLUMN_BYTES: usize = abi::GEMM_W8A8_SM90_COLUMN_BYTES as usize;
/// The widest tile: scales and sums of whole tiles are read.
const WIDEST: usize = 256;
/// Bytes of k in a slice.
const SLICE: usize = COLUMNS;
/// Barriers before the ring of slices in shared memory.
const HEAD_BYTES: usize = abi::LOWBIT_RING_HEAD_BYTES as usize;
/// What a block may have where two share a multiprocessor, a kilobyte of each being the system's.
const HALF_BYTES: usize = 113 << 10;
/// Rows up to which the kernels that split k need no comparison with persistent ones.
const SPLIT_K_ROWS: usize = 128;
/// The kernel for more rows where k is long and tiles are few: tokens, blocks of 64 rows and stages; microseconds of a tile, and
/// of each slice.
const LONG_K: (usize, usize, usize) = (128, 2, 7);
const LONG_K_US: (f64, f64) = (4.2, 0.373);
/// Most blocks of a cluster.
const MAX_CLUSTER: usize = 8;

impl W8A8Sm90 {
    fn persistent(self) -> &'static [Sm90Persistent] {
        if self.outliers { &SM90_LLM_INT8_PERSISTENT } else { &SM90_PERSISTENT }
    }

    fn split_k(self) -> &'static [Sm90SplitK] {
        if self.outliers { &SM90_LLM_INT8_SPLIT_K } else { &SM90_SPLIT_K }
    }

    /// Module of the kernels, and what their names begin with.
    fn names(self) -> (&'static str, &'static str) {
        if self.outliers { ("gemm_w8a8/llm_int8/sm90", "gemm_llm_int8") } else { ("gemm_w8a8/sm90", "gemm_w8a8") }
    }

    /// The persistent kernel that ends first, and its microseconds.
    fn best_persistent(self, p: &Problem, m: usize) -> (Sm90Persistent, f64) {
        let all = self.persistent().iter().filter(|kernel| owns_scales(p, kernel.bn));
        let with_us = all.map(|kernel| (*kernel, persistent_us(kernel, p, m)));
        with_us.min_by(|(_, a), (_, b)| a.total_cmp(b)).expect("the widest tile fits all")
    }

    /// The smallest tile that holds `m` rows, else the largest, its k split while blocks are no more than half again the
    /// multiprocessors; for many rows and tiles a persistent kernel.
    fn choose_llm_int8(self, p: &Problem, m: usize) -> Config {
        let narrowest = self.split_k().iter().find(|kernel| m <= kernel.tokens);
        let kernel = *narrowest.unwrap_or(&self.split_k()[self.split_k().len() - 1]);
        let tiles = p.n.div_ceil(kernel.row_blocks * ROWS) * m.div_ceil(kernel.tokens);
        let blocks = p.sm_count as usize * 3 / 2;
        if narrowest.is_some() || m <= SPLIT_K_ROWS && tiles <= blocks {
            return Config::SplitK { kernel, splits: splits(p, tiles, blocks) };
        }
        Config::Persistent(self.best_persistent(p, m).0)
    }

    fn shared_bytes(self, config: Config) -> usize {
        match config {
            Config::Persistent(Sm90Persistent { bn, stages, .. }) => {
                // Beside the ring, for each warpgroup: three words a column, and for each warp whole lines of y or a fetch of
                // outliers.
                let warp =
                    if self.outliers { abi::GEMM_LLM_INT8_SM90_LINE_BYTES } else { abi::GEMM_W8A8_SM90_LINE_BYTES };
                HEAD_BYTES + stages * (BM + bn) * SLICE + 2 * (COLUMN_BYTES * bn + 4 * warp as usize)
            }
            Config::SplitK { kernel: Sm90SplitK { tokens, row_blocks, stages, .. }, .. } => {
                let stage = row_blocks * ROWS * SLICE + (tokens * SLICE).next_multiple_of(1024);
                // For each warp: of each column the values of the rows of x that it writes, and all weights.
                let columns = abi::GEMM_LLM_INT8_SM90_COLUMNS as usize;
                let outliers = columns * 4 * (tokens + 4 * row_blocks * row_blocks * ROWS);
                HEAD_BYTES + stages * stage + if self.outliers { outliers } else { 0 }
            }
        }
    }
}

/// Microseconds of a tile of a persistent kernel: fixed (in ping-pong only after the last tile, else beside the next), and for
/// each slice.
fn tile_us(kernel: &Sm90Persistent) -> (f64, f64) {
    match kernel.bn {
        64 => (0.3, 0.285),
        128 => (1.3, 0.390),
        192 => (1.6, 0.550),
        _ => (2.5, 0.750),
    }
}

/// Microseconds of all tiles, but for what all kernels share.
fn persistent_us(kernel: &Sm90Persistent, p: &Problem, m: usize) -> f64 {
    let rounds = tiles(kernel, p, m).div_ceil(p.sm_count as usize) as f64;
    let (tile_us, slice_us) = tile_us(kernel);
    let ends = if kernel.pingpong { 1.0 } else { rounds };
    rounds * p.k.div_ceil(SLICE) as f64 * slice_us + ends * tile_us
}

fn tiles(kernel: &Sm90Persistent, p: &Problem, m: usize) -> usize {
    m.div_ceil(BM) * p.n.div_ceil(kernel.bn)
}

/// Splits of k of `tiles` tiles: powers of two, up to `blocks` blocks in all.
fn splits(p: &Problem, tiles: usize, blocks: usize) -> usize {
    let most = p.k.div_ceil(SLICE).min(MAX_CLUSTER);
    let mut splits = 1;
    while 2 * splits <= most && tiles * 2 * splits <= blocks {
        splits *= 2;
    }
    splits
}

/// For up to [`SPLIT_K_ROWS`] rows: weights are streamed by about as many blocks as fit at once; k is split only where rows of w
/// make too few.
fn choose_split_k(p: &Problem, m: usize) -> Config {
    let sms = p.sm_count as usize;
    let (narrow, wide) = (p.n.div_ceil(ROWS), p.n.div_ceil(2 * ROWS));
    let tokens = m.next_power_of_two().max(8);
    let with = |row_blocks, stages, splits| Config::SplitK { kernel: find((tokens, row_blocks, stages)), splits };
    let one_and_a_half = sms + sms / 2;
    match tokens {
        // All at once in two to a multiprocessor, where narrow tiles would make a second round.
        ..=32 if narrow > 2 * sms && wide <= 2 * sms => with(2, if tokens == 32 { 5 } else { 6 }, 1),
        ..=32 => with(1, 8, splits(p, narrow, one_and_a_half)),
        64 if 4 * narrow <= 3 * sms => with(1, 6, splits(p, narrow, one_and_a_half)),
        64 if wide <= sms => with(2, 9, splits(p, wide, sms)),
        64 => with(2, 4, 1),
        _ if narrow <= sms => with(1, 9, splits(p, narrow, sms)),
        _ if wide <= sms => with(2, 7, splits(p, wide, sms)),
        _ => with(2, 3, 1),
    }
}

/// The kernel of these tokens, blocks of rows and stages.
fn find(wanted: (usize, usize, usize)) -> Sm90SplitK {
    let found = SM90_SPLIT_K.iter().find(|k| (k.tokens, k.row_blocks, k.stages) == wanted);
    *found.expect("a configuration of the list")
}

impl GemmFamily for W8A8Sm90 {
    type Config = Config;
    type Params = MapMemo;

    fn accept(weight: &LinearWeight, target: Target) -> Option<Self> {
        if target.sm90 { takes(weight).map(|outliers| W8A8Sm90 { outliers }) } else { None }
    }

    fn takes_int8(&self) -> bool {
        true
    }

    fn takes_outliers(&self) -> bool {
        self.outliers
    }

    fn check_epilogue(&self, _: &LinearWeight, _: Epilogue) -> Result<()> {
        Ok(())
    }

    fn code_bytes(&self, n: usize, k: usize) -> usize {
        block_count(n, k) * ROWS * COLUMNS
    }

    fn recipe(&self, q: &QuantWeight, _: DType) -> Recipe {
        let bytes = self.code_bytes(q.n, q.k);
        Recipe {
            on_gpu: Some(Repack::new(OpKernel::RepackBlocks8, DType::I8, bytes, true)),
            on_host: Box::new(move |q| HostData::I8(blocks8(q))),
            // Sums always: uint8 codes of symmetric activations have a zero point too.
            parameters: Some(Parameters { order: Order::ByGroup { multiple: WIDEST }, zero_points: false, sums: true }),
            row_scales: None,
        }
    }

    fn table_name(&self) -> Option<&'static str> {
        Some(if self.outliers { "llm_int8/sm90" } else { "w8a8/sm90" })
    }

    fn config_name(&self, config: Config) -> String {
        match config {
            Config::Persistent(kernel) => {
                format!("128x{}{}", kernel.bn, if kernel.pingpong { " ping-pong" } else { "" })
            }
            Config::SplitK { kernel, splits } => {
                let deep = if self.shared_bytes(config) > HALF_BYTES { " deep" } else { "" };
                format!("{}x{} split {splits}{deep}", kernel.row_blocks * ROWS, kernel.tokens)
            }
        }
    }

    fn configs(&self, p: &Problem, m: usize) -> Vec<Config> {
        let groups = p.epilogue.output == Output::Groups;
        let persistent = self.persistent().iter().filter(|k| (groups || 2 * m > SPLIT_K_ROWS) && owns_scales(p, k.bn));
        let mut all: Vec<Config> = persistent.map(|kernel| Config::Persistent(*kernel)).collect();
        for &kernel in self.split_k().iter().filter(|_| !groups) {
            let (size, slices) = ([kernel.row_blocks * ROWS, kernel.tokens], p.k.div_ceil(SLICE));
            let splits = [1, 2, 4, MAX_CLUSTER].into_iter().filter(|&s| is_plausible(p, m, size, slices, s));
            all.extend(splits.map(|splits| Config::SplitK { kernel, splits }));
        }
        all
    }

    fn choose(&self, p: &Problem, m: usize) -> Config {
        if self.outliers {
            return self.choose_llm_int8(p, m);
        }
        let groups = p.epilogue.output == Output::Groups;
        if m <= SPLIT_K_ROWS && !groups {
            return choose_split_k(p, m);
        }
        let (persistent, persistent_us) = self.best_persistent(p, m);
        let kernel = find(LONG_K);
        let tiles = p.n.div_ceil(kernel.row_blocks * ROWS) * m.div_ceil(kernel.tokens);
        let splits = splits(p, tiles, p.sm_count as usize);
        let split_us = LONG_K_US.0 + p.k.div_ceil(SLICE).div_ceil(splits) as f64 * LONG_K_US.1;
        if !groups && tiles <= p.sm_count as usize && split_us < persistent_us {
            return Config::SplitK { kernel, splits };
        }
        Config::Persistent(persistent)
    }

    fn launch(&self, p: &Problem, config: Config, m: usize) -> Launch<MapMemo> {
        let (module, name) = self.names();
        let shared_bytes = self.shared_bytes(config) as u32;
        let (function, grid, box_rows) = match config {
            Config::Persistent(kernel) => {
                let blocks = tiles(&kernel, p, m).min(p.sm_count as usize) as u32;
                let grid = Grid { overlaps: true, ..Grid::new([blocks, 1, 1], 384, shared_bytes) };
                let Sm90Persistent { bn, stages, pingpong } = kernel;
                (format!("{name}_persistent_{bn}x{stages}_{}", u8::from(pingpong)), grid, BM)
            }
            Config::SplitK { kernel: Sm90SplitK { tokens, row_blocks, stages, .. }, splits } => {
                let across = p.n.div_ceil(row_blocks * ROWS) * splits;
                let grid = Grid {
                    blocks: [across as u32, m.div_ceil(tokens) as u32, 1],
                    threads: 128 * row_blocks as u32 + 32,
                    shared_bytes,
                    cluster: splits as u32,
                    overlaps: true,
                };
                (format!("{name}_split_k_{tokens}x{row_blocks}x{stages}"), grid, tokens)
            }
        };
        Launch { module, function, grid, params: MapMemo::new(box_rows) }
    }

    unsafe fn run(&self, w: &Weight, plan: &Plan<MapMemo>, y: LinearOut, x: &Input) -> Result<()> {
        let args = GemmW8A8Sm90Args {
            x: plan.params.matrix(x.x.cast(), x.m, w.k)?,
            y,
            w: w.parts.codes.ptr(),
            x_scales: x.scales,
            x_zero_points: x.zero_points,
            w_scales: w.scales(),
            w_sums: w.sums_for(x),
            x_zero_point: x.zero_point_as_read(w),
            k: u32_of(w.k)?,
            x_unsigned: u32::from(x.flip != 0),
            floats_f16: u32::from(w.device.dtype() == DType::F16),
            outliers: x.outliers,
            x_floats: x.floats,
        };
        // SAFETY: the caller's promise about every address.
        unsafe { w.device.launch(plan.kernel, &plan.grid, &args) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Activation;
    use crate::device::cuda::embedded;
    use crate::device::cuda::gemm::family::h200_problem;

    const INT8: W8A8Sm90 = W8A8Sm90 { outliers: false };
    const LLM_INT8: W8A8Sm90 = W8A8Sm90 { outliers: true };

    #[test]
    fn every_configuration_has_a_kernel() {
        for family in [INT8, LLM_INT8] {
            let all = family.persistent().iter().map(|&kernel| Config::Persistent(kernel));
            let all = all.chain(family.split_k().iter().map(|&kernel| Config::SplitK { kernel, splits: 1 }));
            let functions = all.map(|config| family.launch(&h200_problem(64, 128), config, 1).function).collect();
            embedded::assert_has(family.names().0, functions);
        }
    }

    /// The shared memory that the kernels count in their own words.
    #[test]
    fn llm_int8_has_room_for_outliers() {
        let p = h200_problem(4096, 4096);
        for (m, name, shared_bytes) in [
            (1, "64x16 split 2", 91_648),
            (16, "64x16 split 2", 91_648),
            (64, "64x64 split 2", 109_568),
            (128, "64x64 split 1", 109_568),
            (256, "128x64", 219_648),
            (4096, "128x128 ping-pong", 221_184),
        ] {
            let config = LLM_INT8.choose(&p, m);
            let launch = LLM_INT8.launch(&p, config, m);
            assert_eq!((LLM_INT8.config_name(config).as_str(), launch.grid.shared_bytes), (name, shared_bytes), "{m}");
        }
    }

    #[test]
    fn groups_of_outputs_lie_in_one_tile() {
        for (activation, columns) in [(Activation::None, 128), (Activation::SwiGlu, 256)] {
            for m in [1, 100, 300, 4096] {
                let epilogue = Epilogue { activation, output: Output::Groups };
                let config = INT8.choose(&Problem { epilogue, ..h200_problem(6144, 4096) }, m);
                let Config::Persistent(kernel) = config else { panic!("{config:?}") };
                assert!(kernel.bn.is_multiple_of(columns), "{config:?}");
            }
        }
    }

    /// 227 KB, what a block may have on an H100 or H200; clusters divide their grids.
    #[test]
    fn every_launch_is_one_that_the_gpu_takes() {
        for m in [1, 8, 9, 16, 33, 64, 65, 128, 129, 256, 384, 4096, 65536] {
            for (n, k) in [(1, 16), (64, 128), (520, 1040), (4096, 4096), (6144, 4096), (57344, 8192), (8192, 28672)] {
                let p = h200_problem(n, k);
                let launch = INT8.launch(&p, INT8.choose(&p, m), m);
                let Grid { blocks, threads, shared_bytes, cluster, .. } = launch.grid;
                assert!(shared_bytes <= 227 << 10, "{launch:?}");
                assert!(
                    blocks[0] > 0 && blocks[0].is_multiple_of(cluster) && cluster <= 8 && threads <= 384,
                    "{launch:?}"
                );
                assert!(launch.params.box_rows() <= 256, "{launch:?}");
            }
        }
    }

    /// What was fastest when measured, or next to it.
    #[test]
    fn choices_are_the_measured_ones() {
        let config = |n, k, m| INT8.config_name(INT8.choose(&h200_problem(n, k), m));
        assert_eq!(config(4096, 4096, 1), "64x8 split 2");
        assert_eq!(config(28672, 4096, 16), "128x16 split 1");
        assert_eq!(config(57344, 8192, 16), "64x16 split 1");
        assert_eq!(config(8192, 28672, 64), "128x64 split 2 deep");
        assert_eq!(config(28672, 4096, 128), "128x128 split 1");
        assert_eq!(config(6144, 4096, 128), "64x128 split 1 deep");
        assert_eq!(config(4096, 4096, 256), "128x64");
        assert_eq!(config(4096, 14336, 256), "128x128 split 2 deep");
        assert_eq!(config(8192, 8192, 256), "128x128 ping-pong");
        assert_eq!(config(6144, 4096, 512), "128x192");
        assert_eq!(config(28672, 4096, 512), "128x128 ping-pong");
        assert_eq!(config(8192, 8192, 4096), "128x128 ping-pong");
    }
}
