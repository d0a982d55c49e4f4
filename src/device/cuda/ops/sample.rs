//! Tokens from rows of logits: kernels/ops/sample.cu.
#![allow(unsafe_code)] // kernel launches

use crate::device::Tensor;
use crate::device::cuda::context::CudaDevice;
use crate::device::cuda::embedded::abi::{self, SampleArgs};
use crate::device::cuda::kernel::u32_of;
use crate::device::cuda::op_kernel::OpKernel;
use crate::error::Result;

pub(crate) fn sample(
    device: &CudaDevice,
    ids: &mut Tensor,
    rows: &Tensor,
    logits: &Tensor,
    vocab: usize,
    m: usize,
) -> Result<()> {
    let args = SampleArgs {
        ids: ids.cuda_mut()?.ptr(),
        logits: logits.cuda()?.ptr(),
        rows: rows.cuda()?.ptr(),
        masks: std::ptr::null(),
        vocab: u32_of(vocab)?,
    };
    let (threads, shared) = (abi::LOWBIT_SAMPLE_THREADS, abi::LOWBIT_SAMPLE_SHARED);
    // SAFETY: the op table checked ids, rows and logits for m rows of `vocab`; no row names a mask (`SampleRow::words`).
    unsafe { device.launch_op(OpKernel::Sample, [u32_of(m)?, 1, 1], threads, shared, &args) }
}

#[cfg(test)]
mod tests {
    use crate::device::SampleRow;
    use crate::device::cuda::embedded::abi::SampleRowArgs;

    /// What the host writes is what the kernel reads.
    #[test]
    fn words_are_those_of_the_struct() {
        use std::mem::{offset_of, size_of};
        assert_eq!(size_of::<SampleRowArgs>(), 4 * SampleRow::WORDS);
        let offsets = [
            offset_of!(SampleRowArgs, temperature),
            offset_of!(SampleRowArgs, top_p),
            offset_of!(SampleRowArgs, floor),
            offset_of!(SampleRowArgs, top_k),
            offset_of!(SampleRowArgs, draw),
            offset_of!(SampleRowArgs, mask),
        ];
        assert_eq!(offsets, [0, 4, 8, 12, 16, 24]);
    }
}
