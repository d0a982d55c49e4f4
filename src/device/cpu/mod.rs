//! The CPU device: `reference` is the executable specification of every op; `ops` dispatches to it or to fast paths.

mod memory;
pub(crate) mod ops;
mod pack;
pub mod reference;

use crate::quant::{LinearWeight, Weight};

/// Host memory and threads.
#[derive(Debug, Clone)]
pub struct CpuDevice {
    reference: bool,
}

impl CpuDevice {
    /// Fast paths chosen by run-time detection.
    pub fn new() -> Self {
        CpuDevice { reference: false }
    }

    /// The specification only.
    pub fn reference() -> Self {
        CpuDevice { reference: true }
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
}

impl CpuPacked {
    pub(crate) fn bytes(&self) -> usize {
        match self {
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
        }
    }
}
