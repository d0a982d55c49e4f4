//! One GPU: its context, its one stream, its loaded kernels and its scratch.
//!
//! Work is enqueued in order on a single non-default stream, so buffers need no events between ops and a whole
//! step can be captured as a graph. A fault shows at the next synchronization and is reported with the op that
//! was enqueued last; `LOWBIT_SYNC=1` synchronizes after every launch to name the op at fault.
#![allow(unsafe_code)] // the driver API

use std::ffi::c_void;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::driver::{CudaContext, CudaStream};

use super::blas::Lt;
use super::driver_error::failure;
use super::gemm::table::Tuned;
use super::kernel::{Kernel, OpId};
use super::module::Modules;
use super::op_kernel::{OpKernel, OpKernels};
use super::staging::{self, Staging};
use super::{embedded, probe};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Bytes of [`CudaDevice::workspace`].
pub(super) const WORKSPACE_BYTES: usize = 64 << 20;
/// Number of [`CudaDevice::counters`].
pub(super) const COUNTERS: usize = 4096;

/// One GPU: its context, its stream, its loaded kernels. Clones share all of them.
#[derive(Debug, Clone)]
pub struct CudaDevice {
    inner: Arc<Inner>,
    batch_invariant: bool,
    tuned: Arc<Tuned>,
    packs_on_host: bool,
}

#[derive(Debug)]
pub(super) struct Inner {
    name: String,
    /// Compute capability as `10 * major + minor`; 80 when `LOWBIT_FORCE_SM=80`.
    sm: u32,
    /// Kernels of sm_90a are chosen where there are any.
    uses_sm90: bool,
    sm_count: u32,
    /// Opt-in limit of shared memory per block, bytes.
    max_shared: u32,
    dtype: DType,
    sync_each_op: bool,
    /// [`OpId`] of what was enqueued last.
    last_op: AtomicU32,
    modules: Modules,
    op_kernels: OpKernels,
    /// Made by the first large copy to the GPU.
    staging: Mutex<Option<Staging>>,
    /// cuBLASLt, where it was found.
    blas: Option<Lt>,
    /// Scratch of ops that reduce over blocks; ops on one stream follow each other, so one serves all.
    workspace: sys::CUdeviceptr,
    /// Zeros between ops.
    counters: sys::CUdeviceptr,
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
}

impl CudaDevice {
    /// GPU number `ordinal`, with activations of `dtype` (`F16` or `BF16`).
    ///
    /// `LOWBIT_FORCE_SM=80` in the environment makes a newer GPU run the kernels of the A100, compiled from their
    /// embedded PTX, where an H100 or H200 else runs those written for it ([`Self::uses_sm90`]).
    ///
    /// # Errors
    /// `Cuda` without a driver, without that GPU, or with a driver or GPU too old for the embedded kernels;
    /// `Input` for another dtype or a malformed `LOWBIT_FORCE_SM`.
    pub fn new(ordinal: usize, dtype: DType) -> Result<Self> {
        if !matches!(dtype, DType::F16 | DType::BF16) {
            return Err(Error::input("dtype", format!("CUDA activations are f16 or bf16, not {dtype}")));
        }
        let force_ptx = forces_ptx()?;
        probe::check_driver()?;
        let count = CudaContext::device_count().map_err(|e| failure("device count", e))?;
        if ordinal as i64 >= i64::from(count) {
            let reason =
                format!("there is no GPU {ordinal}: the driver shows {count} (CUDA_VISIBLE_DEVICES hides others)");
            return Err(Error::Cuda { op: "open".into(), reason });
        }
        let context = CudaContext::new(ordinal).map_err(|e| failure("open", e))?;
        // SAFETY: all memory is used on the one stream below, so order on it is all the synchronization there is.
        unsafe { context.disable_event_tracking() };
        let attribute = |a| context.attribute(a).map_err(|e| failure("open", e));
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let max_shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let sm_count = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let sm = (10 * major + minor) as u32;
        let name = context.name().map_err(|e| failure("open", e))?;
        if sm < 80 {
            let reason = format!("{name} has compute capability {major}.{minor}; the kernels need 8.0 (A100) or newer");
            return Err(Error::Cuda { op: "open".into(), reason });
        }
        let stream = context.new_stream().map_err(|e| failure("open", e))?;
        // SAFETY: the context was bound by its creation; freed in Inner's drop.
        let workspace = unsafe { result::malloc_sync(WORKSPACE_BYTES) }.map_err(|e| failure("workspace", e))?;
        // SAFETY: as above; the memory set is all of what was allocated, before anything else is enqueued.
        let counters = unsafe {
            result::malloc_sync(4 * COUNTERS)
                .and_then(|counters| result::memset_d8_sync(counters, 0, 4 * COUNTERS).map(|()| counters))
        }
        .map_err(|e| failure("counters", e))?;
        let uses_sm90 = sm == 90 && !force_ptx && embedded::ARCHS.contains(&"sm_90");
        let tuned = Arc::new(Tuned::built_in(&name));
        let inner = Inner {
            name,
            sm: if force_ptx { 80 } else { sm },
            uses_sm90,
            sm_count,
            max_shared: max_shared.max(0) as u32,
            dtype,
            sync_each_op: std::env::var("LOWBIT_SYNC").is_ok_and(|v| v == "1"),
            last_op: AtomicU32::new(OpId::OPEN.0),
            modules: Modules::new(force_ptx, max_shared),
            op_kernels: OpKernels::default(),
            staging: Mutex::default(),
            blas: Lt::load(),
            workspace,
            counters,
            stream,
            context,
        };
        Ok(CudaDevice { inner: Arc::new(inner), batch_invariant: false, tuned, packs_on_host: false })
    }

    /// The same device in the mode of [`crate::device::Device::batch_invariant`].
    pub fn batch_invariant(self) -> Self {
        CudaDevice { batch_invariant: true, ..self }
    }

    /// The same device choosing the kernels of weights packed from now on by `table` first, then as before.
    ///
    /// # Errors
    /// `Input` for a table of another GPU.
    pub fn tuned_by(mut self, table: &Tuned) -> Result<Self> {
        Arc::make_mut(&mut self.tuned).add(table)?;
        Ok(self)
    }

    /// The choices that were measured for this GPU.
    pub(crate) fn tuned(&self) -> &Tuned {
        &self.tuned
    }

    /// The same device, its weights packed on the host: what those packed on the GPU are held against.
    pub fn packing_on_host(self) -> Self {
        CudaDevice { packs_on_host: true, ..self }
    }

    /// Whether weights are packed on the host.
    pub(crate) fn packs_on_host(&self) -> bool {
        self.packs_on_host
    }

    /// Whether kernels are chosen so that a row's result does not depend on its batch.
    pub(crate) fn is_batch_invariant(&self) -> bool {
        self.batch_invariant
    }

    /// Product name of the GPU.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Type of activations.
    pub fn dtype(&self) -> DType {
        self.inner.dtype
    }

    /// Compute capability that kernels are chosen for, as `10 * major + minor`.
    pub fn sm(&self) -> u32 {
        self.inner.sm
    }

    /// True where weights are packed for kernels that only sm_90 has (`wgmma`, TMA): on such a GPU, if they
    /// were compiled.
    pub fn uses_sm90(&self) -> bool {
        self.inner.uses_sm90
    }

    /// Streaming multiprocessors.
    pub fn sm_count(&self) -> u32 {
        self.inner.sm_count
    }

    /// Dynamic shared memory that a kernel with 1 KB of its own may ask for, bytes.
    pub(crate) fn max_dynamic_shared(&self) -> u32 {
        self.inner.max_shared.saturating_sub(1024)
    }

    /// Device address of [`WORKSPACE_BYTES`] of scratch, aligned to 256 bytes. Its contents are undefined at the
    /// start of every op.
    pub(crate) fn workspace<T>(&self) -> *mut T {
        self.inner.workspace as *mut T
    }

    /// Device address of [`COUNTERS`] 32-bit zeros. An op may use them and leaves them as they were.
    pub(crate) fn counters(&self) -> *mut u32 {
        self.inner.counters as *mut u32
    }

    /// Kernels start before the kernel before them ends: machine code for sm_90 waits by itself; what a driver makes of PTX for
    /// sm_80 does not.
    pub(super) fn launches_overlap(&self) -> bool {
        self.inner.sm == 90
    }

    /// cuBLASLt, where it was found.
    pub(super) fn blas(&self) -> Option<&Lt> {
        self.inner.blas.as_ref()
    }

    /// The context that everything of this device lives in.
    pub(super) fn context(&self) -> &Arc<CudaContext> {
        &self.inner.context
    }

    /// Whether every op is waited for (`LOWBIT_SYNC=1`).
    pub(super) fn syncs_each_op(&self) -> bool {
        self.inner.sync_each_op
    }

    /// The kernel `function` of `module` (its path under kernels/ without `.cu`). Takes a lock: for what is resolved once.
    ///
    /// # Errors
    /// `Cuda` when the module does not load or has no such function.
    pub(super) fn kernel(&self, module: &'static str, function: &str) -> Result<Kernel> {
        self.inner.context.bind_to_thread().map_err(|e| self.fault(e))?;
        self.inner.modules.kernel(module, function)
    }

    /// The kernel of one of the small ops, for this device's activation type.
    ///
    /// # Errors
    /// As [`Self::kernel`].
    pub(super) fn op_kernel(&self, kernel: OpKernel) -> Result<Kernel> {
        self.inner.op_kernels.get_or_resolve(kernel, |module, stem| match stem.strip_suffix("{}") {
            Some(stem) => self.kernel(module, &format!("{stem}{}", self.inner.dtype)),
            None => self.kernel(module, stem),
        })
    }

    /// Before enqueuing `op`: makes the context current and remembers the op for errors.
    pub(super) fn enter(&self, op: OpId) -> Result<()> {
        self.inner.context.bind_to_thread().map_err(|e| self.fault(e))?;
        self.inner.last_op.store(op.0, Ordering::Relaxed);
        Ok(())
    }

    /// After enqueuing the op given to [`Self::enter`]: its error, or under `LOWBIT_SYNC=1` that of running it.
    pub(super) fn leave(&self, enqueued: Result<(), DriverError>) -> Result<()> {
        enqueued.map_err(|e| self.fault(e))?;
        if self.inner.sync_each_op { self.synchronize() } else { Ok(()) }
    }

    /// Enqueues a copy of `bytes`, which may change once this returns.
    ///
    /// # Safety
    /// The context is current; there is room for `bytes` at `target`.
    pub(crate) unsafe fn copy_to_gpu(&self, target: sys::CUdeviceptr, bytes: &[u8]) -> Result<(), DriverError> {
        if bytes.len() >= staging::SMALLEST {
            let mut staging = self.inner.staging.lock().unwrap_or_else(PoisonError::into_inner);
            if staging.is_none() {
                *staging = Staging::new().ok(); // a limit on locked memory costs speed alone
            }
            if let Some(staging) = staging.as_mut() {
                // SAFETY: the caller's promise.
                return unsafe { staging.copy(target, bytes, self.stream()) };
            }
        }
        // SAFETY: the caller's promise; the driver stages pageable memory before it returns.
        unsafe { sys::cuMemcpyHtoDAsync_v2(target, bytes.as_ptr().cast::<c_void>(), bytes.len(), self.stream()) }
            .result()
    }

    /// Waits for everything enqueued.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.inner.stream.synchronize().map_err(|e| self.fault(e))
    }

    /// Free and total bytes of the GPU's memory.
    pub(crate) fn free_and_total_bytes(&self) -> Result<(u64, u64)> {
        self.inner.context.bind_to_thread().map_err(|e| self.fault(e))?;
        let (free, total) = result::mem_get_info().map_err(|e| failure("memory", e))?;
        Ok((free as u64, total as u64))
    }

    /// The stream that everything is enqueued on, as cudarc has it.
    pub(super) fn cuda_stream(&self) -> &Arc<CudaStream> {
        &self.inner.stream
    }

    /// The same as the driver has it.
    pub(super) fn stream(&self) -> sys::CUstream {
        self.inner.stream.cu_stream()
    }

    /// The driver's error, with the op enqueued last.
    fn fault(&self, error: DriverError) -> Error {
        let last = self.inner.modules.op_name(OpId(self.inner.last_op.load(Ordering::Relaxed)));
        let Error::Cuda { op, mut reason } = failure(&last, error) else { unreachable!("failure makes Error::Cuda") };
        if !self.inner.sync_each_op {
            reason.push_str(" (reported at or after this op; LOWBIT_SYNC=1 names the op at fault)");
        }
        Error::Cuda { op, reason }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            let _ = self.stream.synchronize();
            self.modules.unload();
            if let Some(mut staging) = self.staging.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
                staging.free();
            }
            // SAFETY: allocated in `new`, freed once.
            let _ = unsafe { result::free_sync(self.workspace) };
            // SAFETY: as above.
            let _ = unsafe { result::free_sync(self.counters) };
        }
    }
}

/// Whether `LOWBIT_FORCE_SM=80` is in the environment.
fn forces_ptx() -> Result<bool> {
    match std::env::var("LOWBIT_FORCE_SM").as_deref() {
        Err(_) | Ok("") => Ok(false),
        Ok("80") => Ok(true),
        Ok(other) => Err(Error::input("LOWBIT_FORCE_SM", format!("`{other}`: only 80 can be forced"))),
    }
}
