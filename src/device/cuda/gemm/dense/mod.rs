//! Unquantized weights: cuBLASLt where it is found, else gemm_dense/sm80.
#![allow(unsafe_code)] // kernel launches

mod cublaslt;

use super::family::{GemmFamily, Input, Launch, Plan, Problem, Target, Weight};
use super::packed::Packed;
use super::recipe::Recipe;
use super::tile::Tile;
use crate::device::cuda::context::CudaDevice;
use crate::device::cuda::embedded::abi::{self, GemmDenseArgs, LinearOut};
use crate::device::cuda::embedded::configs::gemm_dense::{SM80, Sm80};
use crate::device::cuda::kernel::{Grid, u32_of};
use crate::device::cuda::memory::Buffer;
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::quant::{LinearWeight, QuantWeight, Weight as HostWeight};
use cublaslt::Algorithms;

/// `[n, k]` in the activation type, rows that start on 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dense;

/// `data` on the GPU as the activations there are.
pub(super) fn upload(device: &CudaDevice, data: HostData) -> Result<Packed<Buffer>> {
    let dtype = device.dtype();
    let data = if data.dtype() == dtype { data } else { HostData::from_f32(dtype, data.to_f32()) };
    Ok(Packed::new(Buffer::upload(device, &data)?))
}

impl Dense {
    fn tiles() -> impl Iterator<Item = (Sm80, Tile)> {
        SM80.into_iter().map(|config| {
            let rate = match config.bm {
                16 => 0.3,
                64 => 0.6,
                _ => 1.0,
            };
            (config, Tile { bm: config.bm, bn: config.bn, rate })
        })
    }
}

impl GemmFamily for Dense {
    type Config = Sm80;
    type Params = Algorithms;

    fn accept(weight: &LinearWeight, _: Target) -> Option<Self> {
        let HostWeight::Dense { k, .. } = &weight.weight else { return None };
        k.is_multiple_of(8).then_some(Dense)
    }

    fn takes_int8(&self) -> bool {
        false
    }

    fn code_bytes(&self, n: usize, k: usize) -> usize {
        2 * n * k
    }

    fn recipe(&self, _: &QuantWeight, _: DType) -> Recipe {
        unreachable!("of quantized weights, which this family does not accept")
    }

    fn table_name(&self) -> Option<&'static str> {
        None
    }

    fn config_name(&self, Sm80 { bm, bn, .. }: Sm80) -> String {
        format!("{bm}x{bn}")
    }

    fn configs(&self, _: &Problem, _: usize) -> Vec<Sm80> {
        SM80.to_vec()
    }

    fn choose(&self, p: &Problem, m: usize) -> Sm80 {
        Tile::best(Self::tiles(), p, m)
    }

    fn launch(&self, p: &Problem, config: Sm80, m: usize) -> Launch<Algorithms> {
        let Sm80 { bm, bn, warps_m, warps_n, stages, .. } = config;
        let blocks = m.div_ceil(bm) * p.n.div_ceil(bn);
        let shared_bytes = stages * 128 * (bm + bn);
        Launch {
            module: "gemm_dense/sm80",
            function: format!("gemm_dense_{bm}x{bn}_{}", p.dtype),
            grid: Grid::new([blocks as u32, 1, 1], 32 * (warps_m * warps_n) as u32, shared_bytes as u32),
            params: Algorithms::default(),
        }
    }

    fn runs_by_library(&self, w: &Weight) -> bool {
        cublaslt::runs(w)
    }

    unsafe fn run(&self, w: &Weight, plan: &Plan<Algorithms>, y: LinearOut, x: &Input) -> Result<()> {
        // SAFETY: the caller's promise; the weight is `[n, k]` of the activation type.
        if cublaslt::runs(w) && unsafe { plan.params.run(w, &y, x) }? {
            return Ok(());
        }
        let args = GemmDenseArgs { y, x: x.x, w: w.parts.codes.ptr(), k: u32_of(w.k)? };
        // SAFETY: the caller's promise about every address.
        unsafe { w.device.launch(plan.kernel, &plan.grid, &args) }
    }
}

/// Type of `y`'s elements and whether they are added to.
fn destination(y: &LinearOut) -> Option<(DType, bool)> {
    match y.mode {
        abi::LOWBIT_OUT_F32 => Some((DType::F32, false)),
        abi::LOWBIT_OUT_F32_ADD => Some((DType::F32, true)),
        abi::LOWBIT_OUT_F16 => Some((DType::F16, false)),
        abi::LOWBIT_OUT_BF16 => Some((DType::BF16, false)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::embedded;
    use crate::device::cuda::gemm::family::h200_problem;

    /// Shared memory of at most 99 KB: what a block may have on sm_86 and sm_89.
    #[test]
    fn every_configuration_has_a_kernel_and_fits_every_gpu() {
        for dtype in [DType::F16, DType::BF16] {
            let p = Problem { dtype, ..h200_problem(4096, 4096) };
            let all = SM80.map(|config| Dense.launch(&p, config, 300));
            assert!(all.iter().all(|launch| launch.grid.shared_bytes <= 99 << 10 && launch.grid.threads <= 256));
            embedded::assert_has("gemm_dense/sm80", all.map(|launch| launch.function).to_vec());
        }
    }
}
