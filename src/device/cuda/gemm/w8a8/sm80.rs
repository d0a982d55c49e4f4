//! W8A8 and LLM.int8() before sm_90: gemm_w8a8/sm80 and gemm_w8a8/llm_int8/sm80.
#![allow(unsafe_code)] // kernel launches

use crate::device::Epilogue;
use crate::device::cuda::embedded::abi::{GemmW8A8Args, LinearOut};
use crate::device::cuda::embedded::configs::gemm_w8a8::{SM80, SM80_LLM_INT8, SM80_U8, Sm80};
use crate::device::cuda::gemm::family::{GemmFamily, Input, Launch, Plan, Problem, Target, Weight, owns_scales};
use crate::device::cuda::gemm::layout::steps::{steps, steps_fit_i8};
use crate::device::cuda::gemm::packed::{Order, Parameters};
use crate::device::cuda::gemm::recipe::{Recipe, Repack};
use crate::device::cuda::gemm::tile::Tile;
use crate::device::cuda::kernel::{Grid, u32_of};
use crate::device::cuda::op_kernel::OpKernel;
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::quant::{ActQuant, LinearWeight, QuantWeight, Weight as HostWeight};

/// `[n, k]` int8, code minus zero point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct W8A8Sm80 {
    /// LLM.int8().
    pub(crate) outliers: bool,
}

/// Whether the kernels of W8A8 take `weight`, before sm_90 or on it: 8-bit steps, one scale a channel, rows of x that start on
/// 16 bytes.
pub(super) fn takes(weight: &LinearWeight) -> Option<bool> {
    let HostWeight::Quant(q) = &weight.weight else { return None };
    let outliers = matches!(weight.activation, ActQuant::LlmInt8 { .. });
    let fits = weight.activation != ActQuant::None
        && q.encoding.is_affine()
        && q.groups() == 1
        && q.k.is_multiple_of(16)
        && (q.bits > 4 || outliers)
        && steps_fit_i8(q);
    fits.then_some(outliers)
}

impl W8A8Sm80 {
    /// Kernels there are for a problem, with the speed of a full multiprocessor on each, relative to the best.
    fn tiles(self, p: &Problem) -> impl Iterator<Item = (Sm80, Tile)> {
        let all: &[Sm80] = match (self.outliers, p.x_u8) {
            (true, _) => &SM80_LLM_INT8,
            (false, true) => &SM80_U8,
            (false, false) => &SM80,
        };
        let with_rate = |&config: &Sm80| {
            let rate = match (config.bm, config.bn) {
                (16, _) => 0.2,
                (64, 32) => 0.4,
                (64, _) => 0.6,
                (_, 128) => 0.9,
                _ => 1.0,
            };
            (config, Tile { bm: config.bm, bn: config.bn, rate })
        };
        all.iter().map(with_rate).filter(|(_, tile)| owns_scales(p, tile.bn))
    }
}

impl GemmFamily for W8A8Sm80 {
    type Config = Sm80;
    type Params = ();

    fn accept(weight: &LinearWeight, target: Target) -> Option<Self> {
        if target.sm90 { None } else { takes(weight).map(|outliers| W8A8Sm80 { outliers }) }
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
        n * k
    }

    fn recipe(&self, q: &QuantWeight, _: DType) -> Recipe {
        Recipe {
            on_gpu: Some(Repack::new(OpKernel::RepackRows, DType::I8, self.code_bytes(q.n, q.k), true)),
            on_host: Box::new(move |q| HostData::I8(steps(q))),
            // Sums always: uint8 codes of symmetric activations have a zero point too.
            parameters: Some(Parameters { order: Order::ByRow, zero_points: false, sums: true }),
            row_scales: None,
        }
    }

    fn table_name(&self) -> Option<&'static str> {
        Some(if self.outliers { "llm_int8/sm80" } else { "w8a8/sm80" })
    }

    fn config_name(&self, Sm80 { bm, bn, bk, .. }: Sm80) -> String {
        format!("{bm}x{bn}x{bk}")
    }

    fn configs(&self, p: &Problem, _: usize) -> Vec<Sm80> {
        self.tiles(p).map(|(config, _)| config).collect()
    }

    fn choose(&self, p: &Problem, m: usize) -> Sm80 {
        Tile::best(self.tiles(p), p, m)
    }

    fn launch(&self, p: &Problem, config: Sm80, m: usize) -> Launch<()> {
        let Sm80 { bm, bn, bk, warps_m, warps_n, stages, .. } = config;
        let tile = self.config_name(config);
        let (module, function) = match (self.outliers, p.x_u8) {
            (true, _) => ("gemm_w8a8/llm_int8/sm80", format!("gemm_llm_int8_{tile}_{}", p.dtype)),
            (false, true) => ("gemm_w8a8/sm80", format!("gemm_w8a8_u8_{tile}")),
            (false, false) => ("gemm_w8a8/sm80", format!("gemm_w8a8_{tile}")),
        };
        let blocks = m.div_ceil(bm) * p.n.div_ceil(bn);
        let shared_bytes = stages * (bm + bn) * bk;
        let grid = Grid::new([blocks as u32, 1, 1], 32 * (warps_m * warps_n) as u32, shared_bytes as u32);
        Launch { module, function, grid, params: () }
    }

    unsafe fn run(&self, w: &Weight, plan: &Plan<()>, y: LinearOut, x: &Input) -> Result<()> {
        let args = GemmW8A8Args {
            y,
            x: x.x.cast(),
            w: w.parts.codes.ptr(),
            x_scales: x.scales,
            x_zero_points: x.zero_points,
            w_scales: w.scales(),
            w_sums: w.sums_for(x),
            x_zero_point: x.zero_point_as_read(w),
            k: u32_of(w.k)?,
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
    use crate::device::cuda::embedded;
    use crate::device::cuda::gemm::family::h200_problem;

    const INT8: W8A8Sm80 = W8A8Sm80 { outliers: false };

    /// With the least shared memory that a block may have: 100 KB on sm_86 and sm_89, less the kilobyte the system takes.
    fn at(n: usize, m: usize) -> (String, Grid) {
        let p = Problem { max_shared: 99 << 10, ..h200_problem(n, 4096) };
        let config = INT8.choose(&p, m);
        (INT8.config_name(config), INT8.launch(&p, config, m).grid)
    }

    #[test]
    fn every_configuration_has_a_kernel() {
        for outliers in [false, true] {
            for x_u8 in [false, true] {
                for dtype in [DType::F16, DType::BF16] {
                    let (family, p) = (W8A8Sm80 { outliers }, Problem { x_u8, dtype, ..h200_problem(64, 64) });
                    for (config, _) in family.tiles(&p) {
                        let launch = family.launch(&p, config, 1);
                        embedded::assert_has(launch.module, vec![launch.function]);
                    }
                }
            }
        }
    }

    #[test]
    fn every_configuration_fits_every_gpu() {
        for m in [1, 16, 17, 64, 128, 512, 4096, 65536] {
            for n in [1, 64, 4096, 57344] {
                let (config, grid) = at(n, m);
                assert!(
                    grid.shared_bytes <= 99 << 10 && grid.blocks[0] > 0 && grid.threads <= 256,
                    "{config} {grid:?}"
                );
            }
        }
    }

    #[test]
    fn few_rows_get_small_tiles_and_many_get_large_ones() {
        assert_eq!(at(4096, 1).0, "16x32x256");
        assert_eq!(at(57344, 16).0, "16x32x256");
        assert_eq!(at(28672, 4096).0, "128x256x64");
    }

    #[test]
    fn blocks_cover_the_output() {
        for (m, n) in [(1, 1), (65, 129), (128, 256), (257, 4097)] {
            let (config, grid) = at(n, m);
            let sizes: Vec<usize> = config.split('x').map(|size| size.parse().expect("a size")).collect();
            assert_eq!(grid.blocks[0] as usize, m.div_ceil(sizes[0]) * n.div_ceil(sizes[1]));
        }
    }
}
