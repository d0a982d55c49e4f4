//! Tokens from rows of logits: kernels/ops/sample.cu.
#![allow(unsafe_code)] // kernel launches

use crate::device::cuda::context::CudaDevice;
use crate::device::cuda::embedded::abi::{self, SampleArgs};
use crate::device::cuda::kernel::u32_of;
use crate::device::cuda::op_kernel::OpKernel;
use crate::device::{SampleRow, Tensor};
use crate::dtype::HostData;
use crate::error::Result;

/// 32-bit words of a row's parameters.
const ROW_WORDS: usize = size_of::<abi::SampleRowArgs>() / 4;

pub(crate) fn sample(
    device: &CudaDevice,
    ids: &mut Tensor,
    rows: &mut Tensor,
    logits: &Tensor,
    of_rows: &[SampleRow],
    vocab: usize,
) -> Result<()> {
    // As `SampleRowArgs` lies in memory; no row has a mask.
    let words = of_rows.iter().flat_map(|row| {
        let draw = [row.draw as u32, (row.draw >> 32) as u32];
        let floats = [row.temperature, row.top_p, row.floor].map(f32::to_bits);
        [floats[0], floats[1], floats[2], row.top_k, draw[0], draw[1], u32::MAX, 0]
    });
    rows.cuda_mut()?.write(&HostData::U32(words.collect()))?;
    debug_assert_eq!(ROW_WORDS, 8, "as written above");
    let args = SampleArgs {
        ids: ids.cuda_mut()?.ptr(),
        logits: logits.cuda()?.ptr(),
        rows: rows.cuda()?.ptr(),
        masks: std::ptr::null(),
        vocab: u32_of(vocab)?,
    };
    let blocks = [u32_of(of_rows.len())?, 1, 1];
    // SAFETY: the op table checked ids, rows and logits for as many rows of `vocab`.
    unsafe { device.launch_op(OpKernel::Sample, blocks, abi::LOWBIT_SAMPLE_THREADS, abi::LOWBIT_SAMPLE_SHARED, &args) }
}
