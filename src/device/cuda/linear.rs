//! Launches of the linear kernels.

use super::CudaDevice;
use crate::device::{Act, Columns, PackedWeight, Tensor, Write};
use crate::error::{Error, Result};

pub(crate) fn linear(
    _device: &CudaDevice,
    _out: &mut Tensor,
    _columns: Columns,
    _x: &Act,
    w: &PackedWeight,
    _write: Write,
    _m: usize,
) -> Result<()> {
    Err(Error::unsupported(format!("{} on CUDA", w.scheme), "Use --device cpu"))
}
