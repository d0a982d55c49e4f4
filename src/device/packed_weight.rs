//! [`PackedWeight`]: a linear layer's weight as the kernels of one device read it.

use super::cpu;
#[cfg(lowbit_cuda)]
use super::cuda;
use super::epilogue::Epilogue;
use super::linear_input::{ActOrder, InputFormat, OrderId};
#[cfg(lowbit_cuda)]
use crate::error::{Error, Result};
use crate::quant::Scheme;

/// A linear layer's weight in one device's kernel layout. Only [`Device::pack`] makes one, so holding it proves
/// that its bytes are in the order the device's kernels read, its shapes are checked, and its order is a permutation.
#[derive(Debug)]
pub struct PackedWeight {
    /// Output channels.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// What it was packed from.
    pub scheme: Scheme,
    /// Act-order gather of `k` columns that the producer of the input must apply.
    pub order: Option<ActOrder>,
    /// Order that its outputs come in, where its rows were put in the act-order of the layer behind it.
    pub output_order: Option<OrderId>,
    /// What happens to its sums before they are written.
    pub epilogue: Epilogue,
    pub(crate) body: PackedBody,
}

#[derive(Debug)]
pub(crate) enum PackedBody {
    Cpu(Box<cpu::CpuPacked>),
    #[cfg(lowbit_cuda)]
    Cuda(Box<cuda::CudaPacked>),
}

impl PackedWeight {
    /// Bytes of weights, scales, zero points and bias in device memory.
    pub fn bytes(&self) -> usize {
        match &self.body {
            PackedBody::Cpu(p) => p.bytes(),
            #[cfg(lowbit_cuda)]
            PackedBody::Cuda(p) => p.bytes(),
        }
    }

    /// All that it takes of device memory: [`PackedWeight::bytes`] and its act-order.
    pub fn resident_bytes(&self) -> usize {
        self.bytes() + self.order.as_ref().map_or(0, |order| order.indices().bytes())
    }

    /// What the producer of its input must write.
    pub fn input_format(&self) -> InputFormat<'_> {
        InputFormat { order: self.order.as_ref(), ..InputFormat::quantized(self.scheme.activation) }
    }

    /// What the GPU has of it.
    ///
    /// # Errors
    /// `Shape` for a weight packed for the CPU: a bug of `op`'s caller.
    #[cfg(lowbit_cuda)]
    pub(crate) fn cuda(&self, op: &'static str) -> Result<&cuda::CudaPacked> {
        match &self.body {
            PackedBody::Cuda(packed) => Ok(packed),
            PackedBody::Cpu(_) => {
                let (expected, got) = ("a weight packed for CUDA".into(), "one packed for the CPU".into());
                Err(Error::Shape { op, expected, got })
            }
        }
    }

    /// Columns that it writes: its output channels, or half of them for [`SwiGlu`](super::Activation::SwiGlu).
    pub fn outputs(&self) -> usize {
        self.epilogue.outputs(self.n)
    }

    /// Name of the kernel that runs it for `m` rows, for reports.
    pub fn kernel(&self, m: usize) -> String {
        match &self.body {
            PackedBody::Cpu(p) => p.kernel(m),
            #[cfg(lowbit_cuda)]
            PackedBody::Cuda(p) => p.kernel(m),
        }
    }
}
