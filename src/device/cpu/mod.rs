//! The CPU device: `reference` is the executable specification of every op; `ops` dispatches to fast paths.

pub(crate) mod ops;

use crate::dtype::HostData;

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

#[derive(Debug)]
pub(crate) struct CpuPacked {
    pub(crate) data: HostData,
}

impl CpuPacked {
    pub(crate) fn bytes(&self) -> usize {
        self.data.len() * self.data.dtype().size_bytes()
    }

    pub(crate) fn kernel(&self, _m: usize) -> String {
        "reference".into()
    }
}
