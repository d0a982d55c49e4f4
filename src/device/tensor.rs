//! [`Tensor`]: a flat, typed buffer on one device.

use crate::dtype::{DType, HostData};

/// A flat buffer of elements of one type on one device. Ops say how they read it (always contiguous rows).
#[derive(Debug)]
pub struct Tensor {
    pub(crate) data: TensorData,
}

#[derive(Debug)]
pub(crate) enum TensorData {
    Host(HostData),
    #[cfg(lowbit_cuda)]
    Cuda(super::cuda::Buffer),
}

impl Tensor {
    /// Element type.
    pub fn dtype(&self) -> DType {
        match &self.data {
            TensorData::Host(h) => h.dtype(),
            #[cfg(lowbit_cuda)]
            TensorData::Cuda(b) => b.dtype(),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match &self.data {
            TensorData::Host(h) => h.len(),
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
