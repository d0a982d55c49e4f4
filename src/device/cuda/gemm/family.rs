//! What a family of linear kernels is: the one interface that packing, choosing and launching go through.
#![allow(unsafe_code)] // kernel launches

use std::ffi::c_void;
use std::fmt::Debug;

use super::packed::Packed;
use super::recipe::Recipe;
use crate::device::cuda::context::CudaDevice;
use crate::device::cuda::embedded::abi::LinearOut;
use crate::device::cuda::kernel::{Grid, Kernel};
use crate::device::cuda::memory::Buffer;
use crate::device::{Activation, Epilogue, Output};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::{Codebook, LinearWeight, QuantWeight};

/// What of a GPU decides which families take a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Target {
    /// Kernels of sm_90a are there to be used.
    pub(super) sm90: bool,
    /// `F16` or `BF16`.
    pub(super) dtype: DType,
}

impl Target {
    pub(super) fn of(device: &CudaDevice) -> Self {
        Target { sm90: device.uses_sm90(), dtype: device.dtype() }
    }
}

/// What the choice of a configuration depends on beside the family and the number of rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Problem {
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) epilogue: Epilogue,
    /// Activations are uint8.
    pub(super) x_u8: bool,
    pub(super) sm_count: u32,
    /// Dynamic shared memory that a block may have, bytes.
    pub(super) max_shared: u32,
    /// Of activations: `F16` or `BF16`.
    pub(super) dtype: DType,
}

/// One launch, all but its addresses, by the kernel's name.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Launch<P> {
    /// Path under kernels/ without `.cu`.
    pub(super) module: &'static str,
    /// Kernel in it.
    pub(super) function: String,
    pub(super) grid: Grid,
    /// What the family tells the kernel of this configuration.
    pub(super) params: P,
}

/// The same with its kernel resolved: what is launched.
#[derive(Debug)]
pub(super) struct Plan<P> {
    pub(super) kernel: Kernel,
    pub(super) grid: Grid,
    pub(super) params: P,
}

/// A weight on the GPU, as every family has it.
#[derive(Debug)]
pub(super) struct Weight {
    pub(super) device: CudaDevice,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) group_size: usize,
    pub(super) parts: Packed<Buffer>,
    /// Zero point of every weight, where there are none beside the codes.
    pub(super) zero_point: u32,
    /// Zero point of the activations, and whether each row has its own.
    pub(super) x_zero_point: i32,
    pub(super) has_x_zero_points: bool,
    /// What codes stand for, where they are not evenly spaced.
    pub(super) codebook: Option<Codebook>,
    /// `[n]` `F32`.
    pub(super) bias: Option<Buffer>,
    /// `[3, n]` `I32`, as [`Epilogue::fixed_point`] says.
    pub(super) fixed: Option<Buffer>,
    pub(super) epilogue: Epilogue,
}

impl Weight {
    /// Address of the scales.
    pub(super) fn scales(&self) -> *const f32 {
        address(&self.parts.scales)
    }

    /// Address of the zero points; null where one holds for all.
    pub(super) fn zero_points<T>(&self) -> *const T {
        address(&self.parts.zero_points)
    }

    /// Address of the sums of groups; null where there are none.
    pub(super) fn sums(&self) -> *const i32 {
        address(&self.parts.sums)
    }

    /// The same where kernels read `x` as it is and need none unless it has zero points.
    pub(super) fn sums_for(&self, x: &Input) -> *const i32 {
        let is_needed = x.zero_point_as_read(self) != 0 || self.has_x_zero_points;
        if is_needed { self.sums() } else { std::ptr::null() }
    }
}

/// Device address of what is in `buffer`; null for nothing.
pub(super) fn address<T>(buffer: &Option<Buffer>) -> *const T {
    buffer.as_ref().map_or(std::ptr::null(), |buffer| buffer.ptr::<T>().cast_const())
}

/// Input of a launch, checked for its rows: addresses on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Input {
    pub(super) m: usize,
    /// `[m, k]` floats of the activation type or 8-bit codes.
    pub(super) x: *const c_void,
    /// 0x80 where codes are uint8, 128 above what they stand for; else 0.
    pub(super) flip: u32,
    /// `[m]` scales of codes.
    pub(super) scales: *const f32,
    /// `[m]` zero points of codes; null: none.
    pub(super) zero_points: *const i32,
    /// LLM.int8(): bits and values of outliers; else null.
    pub(super) outliers: *const u32,
    pub(super) floats: *const c_void,
}

impl Input {
    /// Zero point of the activations as a kernel reads them that takes uint8 as it is, 128 above the code.
    pub(super) fn zero_point_as_read(&self, w: &Weight) -> i32 {
        w.x_zero_point + self.flip as i32
    }
}

/// A family of kernels: a folder here and one of the same name under `kernels/`. A value of the type is a weight's layout.
pub(super) trait GemmFamily: Debug + Copy + PartialEq + Send + Sync + 'static {
    /// One configuration: which kernel, and what its launch is free to choose.
    type Config: Debug + Copy + PartialEq + Send + Sync;
    /// What a launch tells the kernel beside shapes and addresses.
    type Params: Debug + Clone + Send + Sync;

    /// The layout that `weight`, whose parts agree with each other, has in this family on such a GPU; `None` where the family
    /// does not run it. The order of its rows makes no difference.
    fn accept(weight: &LinearWeight, target: Target) -> Option<Self>;

    /// Codes as activations; else floats.
    fn takes_int8(&self) -> bool;

    /// Whether rows of LLM.int8() come with outliers.
    fn takes_outliers(&self) -> bool {
        false
    }

    /// Fails where the kernels do not have `epilogue`, one that [`Epilogue::check`] allows for the weight.
    ///
    /// # Errors
    /// `Unsupported`, about `weight`.
    fn check_epilogue(&self, weight: &LinearWeight, epilogue: Epilogue) -> Result<()> {
        check_common_epilogue(weight, epilogue, self.takes_int8())
    }

    /// Whether kernels own blocks of 8 rows of gate, 8 of up, and so on, for SwiGLU: [`super::pack`] interleaves them.
    fn interleaves_gate_and_up(&self) -> bool {
        true
    }

    /// Bytes of the codes of an `[n, k]` weight, or of its elements where it is not quantized.
    fn code_bytes(&self, n: usize, k: usize) -> usize;

    /// How the codes of a quantized weight, and what belongs to them, lie in this layout, for activations of `dtype`.
    fn recipe(&self, q: &QuantWeight, dtype: DType) -> Recipe;

    /// What tables of measured choices call the kernels, by op and architecture. Groups, zero points and the 16-bit type of a
    /// weight are not told apart: they change its bytes by some percent. `None` where there is nothing to choose.
    fn table_name(&self) -> Option<&'static str>;

    /// A configuration as tables and reports name it.
    fn config_name(&self, config: Self::Config) -> String;

    /// Configurations among which the fastest for `m` rows should be, each valid for as many rows or fewer.
    fn configs(&self, p: &Problem, m: usize) -> Vec<Self::Config>;

    /// The cost model's choice for `m` rows, `m` at least 1.
    fn choose(&self, p: &Problem, m: usize) -> Self::Config;

    /// The choice in which a row's sums do not depend on `m`: tiles may, the order of the sums over k may not. Sums of integers
    /// are exact in any order, and most kernels have only one.
    fn choose_batch_invariant(&self, p: &Problem, m: usize) -> Self::Config {
        self.choose(p, m)
    }

    /// The launch of `config`, one for `m` rows or more, for `m` rows.
    fn launch(&self, p: &Problem, config: Self::Config, m: usize) -> Launch<Self::Params>;

    /// Whether a library runs `w` in place of the kernels, where it can.
    fn runs_by_library(&self, _w: &Weight) -> bool {
        false
    }

    /// Enqueues a launch of `plan`, made for the rows of `x`.
    ///
    /// # Safety
    /// `w` is in this layout; `y` and `x` hold addresses on its device of live buffers with the shapes that they say.
    ///
    /// # Errors
    /// `Cuda`.
    unsafe fn run(&self, w: &Weight, plan: &Plan<Self::Params>, y: LinearOut, x: &Input) -> Result<()>;
}

/// What most families have: functions of their outputs and codes of them behind int8 activations, nothing behind floats.
pub(super) fn check_common_epilogue(weight: &LinearWeight, epilogue: Epilogue, int8: bool) -> Result<()> {
    if epilogue != Epilogue::NONE && !int8 {
        return Err(Error::unsupported(
            format!("SwiGLU fused into a weight of scheme {} on this GPU", weight.scheme()),
            "Kernels of compute capability 9.0 have it, for weights that their blocks hold: use silu_mul",
        ));
    }
    if epilogue.output == Output::Groups {
        return Err(Error::unsupported(
            format!("codes in groups from a weight of scheme {}, k = {}", weight.scheme(), weight.k()),
            "Only 8-bit weights with a scale a channel and k a multiple of 16 have them",
        ));
    }
    Ok(())
}

/// Whether to try tiles of `rows` of w by `tokens` of x with k, of `slices` slices, in `splits` parts: those in which most rows
/// of x are rows of the batch, one or two below each other, or more where all tiles run at once; k is split only there.
pub(super) fn is_plausible(p: &Problem, m: usize, [rows, tokens]: [usize; 2], slices: usize, splits: usize) -> bool {
    let blocks = p.n.div_ceil(rows) * m.div_ceil(tokens) * splits;
    let at_once = blocks <= 2 * p.sm_count as usize;
    let fills = tokens <= 2 * m.next_power_of_two().max(8);
    fills && (2 * tokens >= m || at_once) && (splits == 1 || at_once) && splits <= slices
}

/// Columns of w that a tile of `bn` must hold whole: those that share a scale of the codes written.
pub(super) fn owns_scales(p: &Problem, bn: usize) -> bool {
    let inputs = if p.epilogue.activation == Activation::SwiGlu { 2 } else { 1 };
    p.epilogue.output != Output::Groups || bn.is_multiple_of(crate::device::GROUP_OUTPUTS * inputs)
}

/// On an H200, in bf16.
#[cfg(test)]
pub(super) fn h200_problem(n: usize, k: usize) -> Problem {
    Problem { n, k, epilogue: Epilogue::NONE, x_u8: false, sm_count: 132, max_shared: 226 << 10, dtype: DType::BF16 }
}
