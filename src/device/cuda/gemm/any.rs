//! Whatever no other family takes: gemm_any reads canonical codes, or unquantized rows of any alignment.
#![allow(unsafe_code)] // kernel launches

use super::family::{GemmFamily, Input, Launch, Plan, Problem, Target, Weight};
use super::packed::{Order, Parameters};
use super::recipe::{Recipe, Repack};
use crate::device::cuda::embedded::abi::{self, GemmAnyArgs, LinearOut};
use crate::device::cuda::kernel::{Grid, u32_of};
use crate::device::cuda::op_kernel::OpKernel;
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::quant::{ActQuant, Encoding, LinearWeight, QuantWeight, Weight as HostWeight};

/// Warps of a block, each with a column of y, and rows it takes.
const WARPS: usize = abi::GEMM_ANY_WARPS as usize;
const ROWS: usize = abi::GEMM_ANY_ROWS as usize;

/// `[n, k]`: codes, one to a byte, or elements of the activation type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Any {
    /// Unquantized.
    Dense,
    /// Affine codes, floats as activations.
    Quant,
    /// Codes of a codebook, floats as activations.
    Codebook,
    /// FP8 codes, floats as activations.
    E4m3,
    /// Affine codes, int8 activations.
    Int8,
    /// The same, rows with outliers.
    LlmInt8,
}

impl Any {
    /// That of `weight`: there is one for every weight.
    pub(super) fn of(weight: &LinearWeight) -> Self {
        match (&weight.weight, weight.activation) {
            (HostWeight::Dense { .. }, _) => Any::Dense,
            (HostWeight::Quant(QuantWeight { encoding: Encoding::Codebook(_), .. }), _) => Any::Codebook,
            (HostWeight::Quant(QuantWeight { encoding: Encoding::E4m3, .. }), _) => Any::E4m3,
            (_, ActQuant::None) => Any::Quant,
            (_, ActQuant::LlmInt8 { .. }) => Any::LlmInt8,
            _ => Any::Int8,
        }
    }
}

impl GemmFamily for Any {
    type Config = Any;
    type Params = ();

    fn accept(weight: &LinearWeight, _: Target) -> Option<Self> {
        Some(Any::of(weight))
    }

    fn takes_int8(&self) -> bool {
        matches!(self, Any::Int8 | Any::LlmInt8)
    }

    fn takes_outliers(&self) -> bool {
        matches!(self, Any::LlmInt8)
    }

    /// Those of canonical codes find gate and up where they are.
    fn interleaves_gate_and_up(&self) -> bool {
        matches!(self, Any::Dense | Any::Codebook | Any::E4m3)
    }

    fn code_bytes(&self, n: usize, k: usize) -> usize {
        n * k * if matches!(self, Any::Dense) { 2 } else { 1 }
    }

    fn recipe(&self, q: &QuantWeight, _: DType) -> Recipe {
        Recipe {
            on_gpu: Some(Repack::new(OpKernel::RepackRows, DType::U8, self.code_bytes(q.n, q.k), false)),
            on_host: Box::new(move |q| HostData::U8(q.codes.to_vec())),
            parameters: Some(Parameters {
                order: Order::ByRow,
                zero_points: !matches!(self, Any::Codebook | Any::E4m3),
                sums: false,
            }),
            row_scales: None,
        }
    }

    fn table_name(&self) -> Option<&'static str> {
        None
    }

    fn config_name(&self, config: Any) -> String {
        match config {
            Any::Dense => "dense",
            Any::Quant => "quant",
            Any::Codebook => "codebook",
            Any::E4m3 => "e4m3",
            Any::Int8 => "int8",
            Any::LlmInt8 => "llm_int8",
        }
        .into()
    }

    fn configs(&self, _: &Problem, _: usize) -> Vec<Any> {
        vec![*self]
    }

    fn choose(&self, _: &Problem, _: usize) -> Any {
        *self
    }

    fn launch(&self, p: &Problem, config: Any, m: usize) -> Launch<()> {
        let name = self.config_name(config);
        let function = match config {
            Any::Int8 => format!("gemm_any_{name}"),
            _ => format!("gemm_any_{name}_{}", p.dtype),
        };
        let blocks = [p.n.div_ceil(WARPS) as u32, m.div_ceil(ROWS) as u32, 1];
        Launch { module: "gemm_any/any", function, grid: Grid::new(blocks, 32 * WARPS as u32, 0), params: () }
    }

    unsafe fn run(&self, w: &Weight, plan: &Plan<()>, y: LinearOut, x: &Input) -> Result<()> {
        let args = GemmAnyArgs {
            y,
            x: x.x,
            w: w.parts.codes.ptr(),
            x_scales: x.scales,
            x_zero_points: x.zero_points,
            w_scales: w.scales(),
            w_zero_points: w.zero_points(),
            x_zero_point: w.x_zero_point,
            x_flip: x.flip,
            k: u32_of(w.k)?,
            group: u32_of(w.group_size)?,
            codebook: w.codebook.map_or([0.0; 16], |codebook| codebook.0),
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

    #[test]
    fn every_kind_has_a_kernel() {
        for dtype in [DType::F16, DType::BF16] {
            let p = Problem { dtype, ..h200_problem(9, 7) };
            let all = [Any::Dense, Any::Quant, Any::Codebook, Any::E4m3, Any::Int8, Any::LlmInt8];
            embedded::assert_has("gemm_any/any", all.map(|any| any.launch(&p, any, 1).function).to_vec());
        }
    }
}
