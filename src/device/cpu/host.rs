//! Tensors of this device as slices in host memory.

use crate::device::Tensor;
use crate::device::tensor::TensorData;
use crate::dtype::{DType, HostData};
use crate::error::{Error, Result};

/// f64 results in the CPU's activation type.
pub(super) fn narrow(y: Vec<f64>) -> Vec<f32> {
    y.into_iter().map(|y| y as f32).collect()
}

pub(super) fn shape_error(op: &'static str, expected: impl ToString, got: impl ToString) -> Error {
    Error::Shape { op, expected: expected.to_string(), got: got.to_string() }
}

/// The elements of a tensor, known to be in host memory: a device's tensors never reach another device's ops.
pub(super) fn host<'a>(op: &'static str, tensor: &'a Tensor) -> Result<&'a HostData> {
    match &tensor.data {
        TensorData::Host(data) => Ok(data),
        #[cfg(lowbit_cuda)]
        TensorData::Cuda(_) => Err(shape_error(op, "a tensor in host memory", "one in GPU memory")),
        TensorData::Meta { .. } => Err(shape_error(op, "a tensor in host memory", "one of a plan")),
    }
}

pub(super) fn host_mut<'a>(op: &'static str, tensor: &'a mut Tensor) -> Result<&'a mut HostData> {
    match &mut tensor.data {
        TensorData::Host(data) => Ok(data),
        #[cfg(lowbit_cuda)]
        TensorData::Cuda(_) => Err(shape_error(op, "a tensor in host memory", "one in GPU memory")),
        TensorData::Meta { .. } => Err(shape_error(op, "a tensor in host memory", "one of a plan")),
    }
}

/// Slices of the first `len` elements of a tensor of one type.
macro_rules! slices {
    ($($name:ident, $variant:ident, $element:ty;)*) => {$(
        pub(super) fn $name<'a>(op: &'static str, tensor: &'a Tensor, len: usize) -> Result<&'a [$element]> {
            match host(op, tensor)? {
                HostData::$variant(v) if v.len() >= len => Ok(&v[..len]),
                other => Err(shape_error(op, format!("{len} elements of {}", DType::$variant), format!("{} of {}", other.len(), other.dtype()))),
            }
        }
    )*};
}
slices! { f32s, F32, f32; u32s, U32, u32; i32s, I32, i32; }

pub(super) fn f32s_mut<'a>(op: &'static str, tensor: &'a mut Tensor, len: usize) -> Result<&'a mut [f32]> {
    let (got_len, got_dtype) = (tensor.len(), tensor.dtype());
    match host_mut(op, tensor)? {
        HostData::F32(v) if v.len() >= len => Ok(&mut v[..len]),
        _ => Err(shape_error(op, format!("{len} elements of f32"), format!("{got_len} of {got_dtype}"))),
    }
}

/// Writes signed codes to the start of an `I8` tensor, or each plus 128 to a `U8` one.
pub(super) fn write_bytes(to: &mut Tensor, codes: &[i8]) -> Result<()> {
    match host_mut("codes", to)? {
        HostData::I8(to) => to[..codes.len()].copy_from_slice(codes),
        HostData::U8(to) => to.iter_mut().zip(codes).for_each(|(to, &code)| *to = code as u8 ^ 0x80),
        other => return Err(shape_error("codes", DType::I8, other.dtype())),
    }
    Ok(())
}
