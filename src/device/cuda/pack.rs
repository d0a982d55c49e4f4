//! Repacking of canonical weights into the layouts of the linear kernels.

use super::CudaDevice;
use crate::device::PackedWeight;
use crate::error::{Error, Result};
use crate::quant::LinearWeight;

/// A weight in the layout of one linear kernel.
#[derive(Debug)]
pub(crate) struct CudaPacked {}

impl CudaPacked {
    /// Bytes in device memory.
    pub(crate) fn bytes(&self) -> usize {
        0
    }

    /// Name of the kernel that runs for `m` rows.
    pub(crate) fn kernel(&self, _m: usize) -> String {
        String::new()
    }
}

pub(crate) fn pack(_device: &CudaDevice, weight: LinearWeight) -> Result<PackedWeight> {
    Err(Error::unsupported(format!("{} on CUDA", weight.scheme()), "Use --device cpu"))
}
