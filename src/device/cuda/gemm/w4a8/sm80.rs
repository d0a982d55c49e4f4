//! W4A8 and W8A8 in groups before sm_90, and where no block of sm_90 holds a weight: gemm_w4a8/sm80.
#![allow(unsafe_code)] // kernel launches

use rayon::prelude::*;

use crate::device::cuda::embedded::abi::{GemmW4A8Args, LinearOut};
use crate::device::cuda::embedded::configs::gemm_w4a8::{SM80, Sm80};
use crate::device::cuda::gemm::family::{GemmFamily, Input, Launch, Plan, Problem, Target, Weight};
use crate::device::cuda::gemm::layout::fragments::{
    NIBBLES_8BIT, TILE, fragment_bytes, fragments4, fragments8, padded_n,
};
use crate::device::cuda::gemm::layout::steps::{steps, steps_fit_i8};
use crate::device::cuda::gemm::packed::{Order, Parameters};
use crate::device::cuda::gemm::recipe::{Recipe, Repack};
use crate::device::cuda::gemm::tile::Tile;
use crate::device::cuda::kernel::{Grid, u32_of};
use crate::device::cuda::op_kernel::OpKernel;
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::quant::{ActQuant, LinearWeight, QuantWeight, Weight as HostWeight};

/// Fragment order for int8 activations: 4-bit codes, or 8-bit codes minus their zero points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct W4A8Sm80 {
    pub(crate) bits: usize,
    /// Rows of x have zero points, which sums of w's groups are needed for.
    pub(crate) asymmetric: bool,
}

impl W4A8Sm80 {
    /// The kernels, with the speed of a full multiprocessor on each, relative to the best.
    fn tiles() -> impl Iterator<Item = (Sm80, Tile)> {
        SM80.into_iter().map(|config| {
            let rate = match config.bm {
                16 => 0.3,
                64 => 0.7,
                _ => 1.0,
            };
            (config, Tile { bm: config.bm, bn: config.bn, rate })
        })
    }
}

impl GemmFamily for W4A8Sm80 {
    type Config = Sm80;
    type Params = ();

    fn accept(weight: &LinearWeight, _: Target) -> Option<Self> {
        let HostWeight::Quant(q) = &weight.weight else { return None };
        let activation = weight.activation;
        let whole_groups = q.groups() == 1 || q.group_size.is_multiple_of(32);
        if activation == ActQuant::None || !q.encoding.is_affine() || !whole_groups || !q.k.is_multiple_of(16) {
            return None;
        }
        let bits = match q.bits {
            ..=4 if !matches!(activation, ActQuant::LlmInt8 { .. }) => 4,
            _ if q.groups() > 1 && steps_fit_i8(q) => 8,
            _ => return None,
        };
        let asymmetric = activation.zero_point() != 0 || activation == ActQuant::DynamicAsymmetric;
        Some(W4A8Sm80 { bits, asymmetric })
    }

    fn takes_int8(&self) -> bool {
        true
    }

    fn code_bytes(&self, n: usize, k: usize) -> usize {
        fragment_bytes(n, k, self.bits)
    }

    fn recipe(&self, q: &QuantWeight, _: DType) -> Recipe {
        let bits = self.bits;
        let bytes = self.code_bytes(q.n, q.k);
        let on_gpu = match self.bits {
            8 => Repack::new(OpKernel::RepackFragments8, DType::U8, bytes, true),
            _ => Repack { nibbles: NIBBLES_8BIT, ..Repack::new(OpKernel::RepackFragments4, DType::U8, bytes, false) },
        };
        // Codes of 8 bits have theirs taken off.
        let zero_points = self.bits == 4 && q.zeros.par_iter().any(|&z| z != q.zeros[0]);
        Recipe {
            on_gpu: Some(on_gpu),
            on_host: Box::new(move |q| {
                HostData::U8(match bits {
                    8 => {
                        let steps: Vec<u8> = steps(q).into_iter().map(|step| step as u8).collect();
                        fragments8(q.n, q.k, &steps)
                    }
                    _ => fragments4(q.n, q.k, &q.codes, NIBBLES_8BIT),
                })
            }),
            parameters: Some(Parameters {
                order: Order::ByGroup { multiple: TILE },
                zero_points,
                sums: self.asymmetric,
            }),
            row_scales: None,
        }
    }

    fn table_name(&self) -> Option<&'static str> {
        Some(if self.bits == 4 { "w4a8/sm80" } else { "w8a8_groups/sm80" })
    }

    fn config_name(&self, Sm80 { bm, bn, .. }: Sm80) -> String {
        format!("w{} {bm}x{bn}", self.bits)
    }

    fn configs(&self, _: &Problem, _: usize) -> Vec<Sm80> {
        SM80.to_vec()
    }

    fn choose(&self, p: &Problem, m: usize) -> Sm80 {
        Tile::best(Self::tiles(), p, m)
    }

    fn launch(&self, p: &Problem, config: Sm80, m: usize) -> Launch<()> {
        let Sm80 { bm, bn, warps_m, warps_n, stages, .. } = config;
        let blocks = m.div_ceil(bm) * p.n.div_ceil(bn);
        let shared_bytes = stages * (128 * bm + 16 * self.bits * bn);
        Launch {
            module: "gemm_w4a8/sm80",
            function: format!("gemm_grouped_w{}a8_{bm}x{bn}", self.bits),
            grid: Grid::new([blocks as u32, 1, 1], 32 * (warps_m * warps_n) as u32, shared_bytes as u32),
            params: (),
        }
    }

    unsafe fn run(&self, w: &Weight, plan: &Plan<()>, y: LinearOut, x: &Input) -> Result<()> {
        let args = GemmW4A8Args {
            y,
            x: x.x.cast(),
            w: w.parts.codes.ptr(),
            x_scales: x.scales,
            x_zero_points: x.zero_points,
            w_scales: w.scales(),
            w_zero_points: w.zero_points(),
            w_sums: w.sums(),
            x_zero_point: w.x_zero_point,
            x_flip: x.flip * 0x0101_0101,
            w_zero_point: w.zero_point,
            k: u32_of(w.k)?,
            n_pad: u32_of(padded_n(w.n))?,
            group: u32_of(w.group_size)?,
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

    /// Shared memory of at most 99 KB: what a block may have on sm_86 and sm_89.
    #[test]
    fn every_configuration_has_a_kernel_and_fits_every_gpu() {
        for bits in [4, 8] {
            let family = W4A8Sm80 { bits, asymmetric: false };
            let all = SM80.map(|config| family.launch(&h200_problem(4096, 4096), config, 300));
            assert!(all.iter().all(|launch| launch.grid.shared_bytes <= 99 << 10 && launch.grid.threads <= 256));
            embedded::assert_has("gemm_w4a8/sm80", all.map(|launch| launch.function).to_vec());
        }
    }

    #[test]
    fn few_rows_get_small_tiles_and_many_get_large_ones() {
        let family = W4A8Sm80 { bits: 4, asymmetric: false };
        let at = |m| family.config_name(family.choose(&h200_problem(28672, 4096), m));
        assert_eq!((at(1), at(4096)), ("w4 16x64".into(), "w4 128x128".into()));
    }
}
