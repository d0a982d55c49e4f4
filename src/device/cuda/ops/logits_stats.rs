//! The most likely id of each row of logits, and log-probabilities.
#![allow(unsafe_code)] // kernel launches

use crate::device::Tensor;
use crate::device::cuda::context::{CudaDevice, WORKSPACE_BYTES};
use crate::device::cuda::embedded::abi::{self, LogitsPart, LogitsStatsArgs};
use crate::device::cuda::kernel::u32_of;
use crate::device::cuda::op_kernel::OpKernel;
use crate::error::Result;

pub(crate) fn logits_stats(
    device: &CudaDevice,
    ids: &mut Tensor,
    stats: &mut Tensor,
    logits: &Tensor,
    targets: &Tensor,
    vocab: usize,
    m: usize,
) -> Result<()> {
    if m == 0 || vocab == 0 {
        return Ok(());
    }
    let parts = vocab.div_ceil(abi::LOWBIT_LOGITS_PART as usize);
    let rows_at_once = WORKSPACE_BYTES / (parts * size_of::<LogitsPart>());
    for first in (0..m).step_by(rows_at_once.max(1)) {
        let rows = u32_of(rows_at_once.min(m - first))?;
        let args = LogitsStatsArgs {
            ids: ids.cuda_mut()?.ptr_at(first),
            stats: stats.cuda_mut()?.ptr_at(3 * first),
            logits: logits.cuda()?.ptr_at(first * vocab),
            targets: targets.cuda()?.ptr_at(first),
            parts: device.workspace(),
            vocab: u32_of(vocab)?,
        };
        // SAFETY: the op table checked every buffer for m rows; the parts fit the workspace; a target outside the
        // vocabulary is handled by the kernel.
        unsafe {
            device.launch_op(OpKernel::LogitsStatsPart, [u32_of(parts)?, rows, 1], 256, 0, &args)?;
            device.launch_op(OpKernel::LogitsStats, [rows, 1, 1], 128, 0, &args)?;
        }
    }
    Ok(())
}
