//! What a family says of how a weight is to lie.

use super::layout::fragments::Nibbles;
use super::packed::Parameters;
use crate::device::cuda::op_kernel::OpKernel;
use crate::dtype::{DType, HostData};
use crate::quant::QuantWeight;

/// A family's layout of one weight.
pub(super) struct Recipe {
    /// How the GPU makes the codes; `None` where only the host can.
    pub(super) on_gpu: Option<Repack>,
    /// The same on the host, byte for byte.
    pub(super) on_host: Box<dyn Fn(&QuantWeight) -> HostData>,
    /// `None` where the codes' blocks hold it all.
    pub(super) parameters: Option<Parameters>,
    /// `[n]` scales of whole rows, in place of those of groups.
    pub(super) row_scales: Option<Vec<f32>>,
}

/// How the GPU makes the codes of a layout.
#[derive(Debug, Clone, Copy)]
pub(super) struct Repack {
    pub(super) kernel: OpKernel,
    /// Of the result.
    pub(super) dtype: DType,
    pub(super) bytes: usize,
    /// Codes minus zero points.
    pub(super) steps: bool,
    /// In fragments of 4 bits: where in a word a code lies.
    pub(super) nibbles: Nibbles,
    /// FP8 codes, arranged for floats of this type.
    pub(super) e4m3: Option<DType>,
    /// Where weights lie in blocks: what a block has beside its codes.
    pub(super) block: Block,
}

/// What a block has beside its codes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Block {
    /// Bits of a code.
    pub(super) bits: usize,
    /// With scales of their own.
    pub(super) groups: usize,
    pub(super) low_scales: bool,
    pub(super) zero_points: bool,
}

impl Repack {
    /// `bytes` of plain codes in no blocks; as steps where `steps`.
    pub(super) fn new(kernel: OpKernel, dtype: DType, bytes: usize, steps: bool) -> Self {
        Repack { kernel, dtype, bytes, steps, nibbles: [[0; 4]; 2], e4m3: None, block: Block::default() }
    }
}
