//! The CPU device: `reference` is the executable specification of every op; `ops` dispatches to it or to fast paths.

mod activation;
mod attention;
mod host;
mod linear;
mod linear_ops;
mod memory;
pub(crate) mod ops;
mod outliers;
pub mod reference;
mod rows;
mod sample;
mod simd;

pub(in crate::device) use linear::{check, packed_bytes};

pub(crate) use sample::Chooser;
pub use simd::Level;

#[cfg(doc)]
use crate::device::Epilogue;
use crate::quant::{LinearWeight, Weight};

/// Host memory and threads.
#[derive(Debug, Clone)]
pub struct CpuDevice {
    /// Instructions of the fast paths; `None` runs the specification.
    level: Option<Level>,
}

impl CpuDevice {
    /// Fast paths chosen by run-time detection.
    pub fn new() -> Self {
        CpuDevice { level: Some(Level::detect()) }
    }

    /// The specification only.
    pub fn reference() -> Self {
        CpuDevice { level: None }
    }

    /// The specification, then the fast paths at every level this machine has: what tests run on.
    pub fn all() -> Vec<Self> {
        let levels = Level::available().into_iter().map(|level| CpuDevice { level: Some(level) });
        std::iter::once(CpuDevice::reference()).chain(levels).collect()
    }
}

impl Default for CpuDevice {
    fn default() -> Self {
        Self::new()
    }
}

/// A linear layer's weight as the CPU's kernels read it.
#[derive(Debug)]
pub(crate) enum CpuPacked {
    /// Canonical form, for the specification.
    Reference(LinearWeight),
    /// The fast paths' layout, and what [`Epilogue::fixed_point`] says of the weight.
    Fast(Level, linear::FastWeight, Vec<i32>),
}

impl CpuPacked {
    pub(crate) fn bytes(&self) -> usize {
        match self {
            CpuPacked::Fast(_, w, fixed) => w.bytes() + 4 * fixed.len(),
            CpuPacked::Reference(w) => {
                let bias = w.bias.as_ref().map_or(0, |b| 4 * b.len());
                bias + match &w.weight {
                    Weight::Dense { data, .. } => data.len() * data.dtype().size_bytes(),
                    Weight::Quant(q) => q.codes.len() + 4 * (q.scales.len() + q.zeros.len()),
                }
            }
        }
    }

    pub(crate) fn kernel(&self, _m: usize) -> String {
        match self {
            CpuPacked::Reference(_) => "reference".into(),
            CpuPacked::Fast(level, w, _) => w.kernel(*level),
        }
    }
}
