//! Recorded sequences of ops, replayed with one launch; and the time that work takes on the GPU.
#![allow(unsafe_code)] // the driver API

use std::marker::PhantomData;
use std::time::Duration;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUevent_flags as EventFlags, CUstreamCaptureMode as CaptureMode};

use super::context::CudaDevice;
use super::driver_error::failure;
use super::kernel::OpId;
use crate::error::{Error, Result};

/// Ops recorded by [`CudaDevice::capture`]. A replay runs them with the addresses and sizes they were recorded with, so
/// a graph keeps the tensors of its ops borrowed.
#[derive(Debug)]
pub struct Graph<'a> {
    device: CudaDevice,
    executable: sys::CUgraphExec,
    tensors: PhantomData<&'a mut ()>,
}

// SAFETY: an executable graph belongs to a context, not to a thread, and every use of it binds the context first. It must not be launched
// by two threads at once, so it is no `Sync`.
unsafe impl Send for Graph<'_> {}

impl CudaDevice {
    /// Records what `work` enqueues, without running it. Run it once before: kernels must be loaded by then, and
    /// nothing may be allocated, copied from the host or waited for.
    ///
    /// # Errors
    /// That of `work`; `Cuda` when it did something that cannot be recorded, and under `LOWBIT_SYNC=1`.
    pub fn capture<'a>(&self, work: impl FnOnce() -> Result<()> + 'a) -> Result<Graph<'a>> {
        if self.syncs_each_op() {
            let reason = "ops cannot be recorded when each is waited for; unset LOWBIT_SYNC";
            return Err(Error::Cuda { op: "capture".into(), reason: reason.into() });
        }
        Ok(Graph { device: self.clone(), executable: self.record(work)?, tensors: PhantomData })
    }

    /// The same for an owner of both the tensors and the graph, which drops the graph first; `None` under `LOWBIT_SYNC=1`.
    ///
    /// # Errors
    /// As [`Self::capture`].
    pub(crate) fn capture_owned(&self, work: impl FnOnce() -> Result<()>) -> Result<Option<Graph<'static>>> {
        if self.syncs_each_op() {
            return Ok(None);
        }
        Ok(Some(Graph { device: self.clone(), executable: self.record(work)?, tensors: PhantomData }))
    }

    fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<sys::CUgraphExec> {
        self.enter(OpId::GRAPH)?;
        let stream = self.stream();
        // SAFETY: the stream is ours and not the default one, so no other work falls into the recording.
        unsafe { result::stream::begin_capture(stream, CaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) }
            .map_err(|e| failure("capture", e))?;
        let worked = work();
        // SAFETY: begun above, whatever `work` returned.
        let graph = unsafe { result::stream::end_capture(stream) };
        worked?;
        let graph = graph.map_err(|e| failure("capture", e))?;
        // SAFETY: the graph was just recorded; the executable is a copy, so the recording can go.
        let executable = unsafe {
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            executable
        };
        executable.map_err(|e| failure("capture", e))
    }

    /// Time between the start and the end on the GPU of what `work` enqueues, after waiting for it.
    ///
    /// # Errors
    /// That of `work`, and what came to light by waiting.
    pub fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        let event = || self.context().new_event(Some(EventFlags::CU_EVENT_DEFAULT)).map_err(|e| failure("time", e));
        let (start, end) = (event()?, event()?);
        start.record(self.cuda_stream()).map_err(|e| failure("time", e))?;
        work()?;
        end.record(self.cuda_stream()).map_err(|e| failure("time", e))?;
        self.synchronize()?;
        let milliseconds = start.elapsed_ms(&end).map_err(|e| failure("time", e))?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds) / 1e3))
    }
}

impl Graph<'_> {
    /// Enqueues all recorded ops.
    ///
    /// # Errors
    /// `Cuda`.
    pub fn launch(&self) -> Result<()> {
        self.device.enter(OpId::GRAPH)?;
        // SAFETY: instantiated by `capture`; the tensors of its ops are still borrowed.
        let launched = unsafe { result::graph::launch(self.executable, self.device.stream()) };
        self.device.leave(launched)
    }
}

impl Drop for Graph<'_> {
    fn drop(&mut self) {
        if self.device.context().bind_to_thread().is_ok() {
            let _ = self.device.synchronize();
            // SAFETY: instantiated by `capture`, destroyed once, and no replay is under way.
            let _ = unsafe { result::graph::exec_destroy(self.executable) };
        }
    }
}
