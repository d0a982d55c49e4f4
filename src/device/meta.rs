//! Planning without memory: a device whose tensors have a type and a length but no elements, and are only counted.
//!
//! What a model takes is found by running the constructors that allocate it on this device (PyTorch has a `meta` device for
//! the like). Weights of linear layers are not read for a plan: their bytes come from [`Target::packed_bytes`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::tensor::{Tensor, TensorData};
use super::{Device, cpu};
use crate::dtype::DType;
use crate::error::{Error, Result};
#[cfg(not(lowbit_cuda))]
use crate::quant::ActQuant;
use crate::quant::Scheme;

/// A device to plan for: what the bytes of a model depend on beside the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Type of activations.
    pub dtype: DType,
    /// How it holds weights of linear layers.
    pub packing: Packing,
}

/// How a device holds weights of linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// As the CPU's fast paths read them.
    Cpu,
    /// As the CUDA kernels do.
    Cuda {
        /// Those of sm_90a (H100, H200), where they are there to be used.
        sm90: bool,
    },
}

impl From<&Device> for Target {
    fn from(device: &Device) -> Target {
        let packing = match device {
            Device::Cpu(_) => Packing::Cpu,
            Device::Meta(meta) => meta.target.packing,
            #[cfg(lowbit_cuda)]
            Device::Cuda(d) => Packing::Cuda { sm90: d.uses_sm90() },
        };
        Target { dtype: device.activation_dtype(), packing }
    }
}

impl Target {
    /// Bytes of the packed weight of a linear layer `[n, k]` of `scheme`, exactly where scales are of 16 bits and codes lie where
    /// codes of its bits usually do. A build without CUDA knows no layouts of a GPU and tells what the weight takes there at most.
    pub fn packed_bytes(&self, scheme: &Scheme, n: usize, k: usize, bias: bool) -> u64 {
        match self.packing {
            Packing::Cpu => cpu::packed_bytes(scheme, n, k, bias) as u64,
            Packing::Cuda { sm90 } => {
                let bias = if bias { 4 * n as u64 } else { 0 };
                cuda_packed_bytes(scheme, n, k, self.dtype, sm90) + bias
            }
        }
    }
}

/// As the families of kernels lay it out.
#[cfg(lowbit_cuda)]
fn cuda_packed_bytes(scheme: &Scheme, n: usize, k: usize, dtype: DType, sm90: bool) -> u64 {
    super::cuda::packed_bytes(scheme, n, k, dtype, sm90) as u64
}

/// Codes at the width of their container, an f32 scale and zero point a group.
#[cfg(not(lowbit_cuda))]
fn cuda_packed_bytes(scheme: &Scheme, n: usize, k: usize, dtype: DType, sm90: bool) -> u64 {
    let (n, k) = (n as u64, k as u64);
    if scheme.is_dense() {
        return n * k * dtype.size_bytes() as u64;
    }
    let container = match scheme.weight_bits {
        ..=4 if sm90 && is_ternary(scheme, k) => 2,
        ..=4 => 4,
        _ => 8,
    };
    let groups = scheme.group_size.map_or(1, |g| k.div_ceil(g as u64));
    n * k * container / 8 + n * groups * 8
}

/// Whether the kernels of ternary weights take all of `scheme` with `k` inputs. Of an asymmetric weight codes would have to be seen.
#[cfg(not(lowbit_cuda))]
fn is_ternary(scheme: &Scheme, k: u64) -> bool {
    let takes_int8 = !matches!(scheme.activation, ActQuant::None | ActQuant::LlmInt8 { .. });
    let one_scale = scheme.group_size.is_none() && scheme.symmetric && scheme.encoding.is_affine();
    scheme.weight_bits == 2 && takes_int8 && one_scale && k.is_multiple_of(16) && k <= 1 << 16
}

/// A planning device. Clones count together.
#[derive(Debug, Clone)]
pub struct MetaDevice {
    target: Target,
    bytes: Arc<AtomicU64>,
}

impl MetaDevice {
    /// Plans for `target`.
    pub fn new(target: Target) -> MetaDevice {
        MetaDevice { target, bytes: Arc::default() }
    }

    /// Type of activations.
    pub(super) fn dtype(&self) -> DType {
        self.target.dtype
    }

    /// Whether the planned device records its steps.
    pub(super) fn has_graphs(&self) -> bool {
        matches!(self.target.packing, Packing::Cuda { .. })
    }

    /// Bytes of all tensors made since the last call.
    pub fn take_bytes(&self) -> u64 {
        self.bytes.swap(0, Ordering::Relaxed)
    }

    /// A tensor that is counted.
    pub(super) fn tensor(&self, dtype: DType, len: usize) -> Tensor {
        let bytes = (len as u64).saturating_mul(dtype.size_bytes() as u64);
        let add = |sum: u64| Some(sum.saturating_add(bytes));
        let _ = self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add); // `add` never refuses
        Tensor { data: TensorData::Meta { dtype, len } }
    }
}

/// What any op gives on a planning device.
pub(super) fn no_elements<T>(op: &'static str) -> Result<T> {
    Err(Error::Shape { op, expected: "a device with memory".into(), got: "one for planning".into() })
}

#[cfg(all(test, not(lowbit_cuda)))]
mod tests {
    use super::*;

    #[test]
    fn ternary_weights_take_two_bits_where_kernels_read_them() {
        let ternary = Scheme { weight_bits: 2, activation: ActQuant::DynamicPerToken, ..Scheme::dense(DType::BF16) };
        let bytes = |sm90, scheme: Scheme, k| {
            Target { dtype: DType::BF16, packing: Packing::Cuda { sm90 } }.packed_bytes(&scheme, 64, k, false)
        };
        assert_eq!(bytes(true, ternary, 256), 64 * (256 / 4 + 8));
        assert_eq!(bytes(false, ternary, 256), 64 * (256 / 2 + 8));
        for scheme in [
            Scheme { weight_bits: 3, ..ternary },
            Scheme { symmetric: false, ..ternary },
            Scheme { activation: ActQuant::None, ..ternary },
        ] {
            assert_eq!(bytes(true, scheme, 256), 64 * (256 / 2 + 8), "{scheme}");
        }
        assert_eq!(bytes(true, Scheme { group_size: Some(128), ..ternary }, 256), 64 * (256 / 2 + 2 * 8));
        assert_eq!(bytes(true, ternary, 264), 64 * (264 / 2 + 8), "rows of x that do not start on 16 bytes");
    }
}
