//! Ops recorded once and replayed with one launch (CUDA graphs), where a device can.

use super::Device;
#[cfg(lowbit_cuda)]
use super::cuda;
use crate::error::Result;

/// Ops that [`Device::record`] recorded, with the tensors that they were given.
#[derive(Debug)]
pub(crate) struct Recorded {
    #[cfg(lowbit_cuda)]
    graph: cuda::Graph<'static>,
}

impl Recorded {
    /// Enqueues all of them.
    ///
    /// # Errors
    /// The device's failure.
    pub(crate) fn replay(&self) -> Result<()> {
        #[cfg(lowbit_cuda)]
        self.graph.launch()?;
        Ok(())
    }
}

impl Device {
    /// Records what `ops` enqueue, without running them; `None` where ops of this device cannot be recorded (a CPU, `LOWBIT_SYNC=1`). They
    /// must have run once before, and neither allocate nor copy from or to the host. Whoever keeps the recording keeps their tensors
    /// alive as long.
    ///
    /// # Errors
    /// That of `ops`; the device's failure.
    pub(crate) fn record(&self, ops: impl FnOnce() -> Result<()>) -> Result<Option<Recorded>> {
        #[cfg(lowbit_cuda)]
        if let Device::Cuda(d) = self {
            return Ok(d.capture_owned(ops)?.map(|graph| Recorded { graph }));
        }
        let _ = ops;
        Ok(None)
    }
}
