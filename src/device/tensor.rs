//! [`Tensor`]: a flat, typed buffer on one device.

#[cfg(lowbit_cuda)]
use super::cuda::Buffer;
use crate::dtype::{DType, HostData};
#[cfg(lowbit_cuda)]
use crate::error::{Error, Result};

/// A flat buffer of elements of one type on one device. Ops say how they read it (always contiguous rows).
#[derive(Debug)]
pub struct Tensor {
    pub(crate) data: TensorData,
}

#[derive(Debug)]
pub(crate) enum TensorData {
    Host(HostData),
    /// Of a planning device.
    Meta {
        dtype: DType,
        len: usize,
    },
    #[cfg(lowbit_cuda)]
    Cuda(Buffer),
}

impl Tensor {
    /// Element type.
    pub fn dtype(&self) -> DType {
        match &self.data {
            TensorData::Host(h) => h.dtype(),
            TensorData::Meta { dtype, .. } => *dtype,
            #[cfg(lowbit_cuda)]
            TensorData::Cuda(b) => b.dtype(),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match &self.data {
            TensorData::Host(h) => h.len(),
            TensorData::Meta { len, .. } => *len,
            #[cfg(lowbit_cuda)]
            TensorData::Cuda(b) => b.len(),
        }
    }

    /// True when there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the elements.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype().size_bytes()
    }
}

#[cfg(lowbit_cuda)]
impl Tensor {
    /// This tensor's buffer.
    ///
    /// # Errors
    /// `Shape` when the tensor is on another device: a bug of the caller.
    pub(crate) fn cuda(&self) -> Result<&Buffer> {
        match &self.data {
            TensorData::Cuda(buffer) => Ok(buffer),
            TensorData::Host(_) | TensorData::Meta { .. } => Err(elsewhere()),
        }
    }

    /// As [`Self::cuda`], to be written.
    pub(crate) fn cuda_mut(&mut self) -> Result<&mut Buffer> {
        match &mut self.data {
            TensorData::Cuda(buffer) => Ok(buffer),
            TensorData::Host(_) | TensorData::Meta { .. } => Err(elsewhere()),
        }
    }
}

#[cfg(lowbit_cuda)]
impl From<Buffer> for Tensor {
    fn from(buffer: Buffer) -> Self {
        Tensor { data: TensorData::Cuda(buffer) }
    }
}

#[cfg(lowbit_cuda)]
fn elsewhere() -> Error {
    Error::Shape { op: "cuda", expected: "a tensor in GPU memory".into(), got: "one in host memory".into() }
}
