//! The CUDA device: one GPU, one stream, kernels launched by name from the embedded modules.
//!
//! Work is enqueued in order on a single non-default stream, so buffers need no events between ops and a whole
//! step can be captured as a graph. A fault shows at the next synchronization and is reported with the op that
//! was enqueued last; `LOWBIT_SYNC=1` synchronizes after every launch to name the op at fault.
#![allow(unsafe_code)] // the driver API

mod attention;
mod blas;
mod candidates;
mod choose;
mod choose_sm80;
mod choose_sm90;
mod choose_w4a16;
mod choose_w4a16_warps;
mod choose_w4a8;
mod choose_w4a8_split;
mod embedded;
mod graph;
mod linear;
mod memory;
mod module;
mod nvml;
pub(crate) mod ops;
mod pack;
mod pack_blocks;
mod pack_host;
mod pack_w4a8;
mod probe;
mod repack;
mod scale_parts;
mod staging;
mod tensor_map;
mod tuned;

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::driver::{CudaContext, CudaStream};

use crate::dtype::DType;
use crate::error::{Error, Result};

pub(crate) use embedded::abi;
pub use graph::Graph;
pub use memory::Buffer;
pub use nvml::{Nvml, Reading};
pub(crate) use pack::CudaPacked;
pub use probe::{Gpu, Probe, probe};
pub use tuned::{Choice, Tuned};

/// Bytes of [`CudaDevice::workspace`].
pub(crate) const WORKSPACE_BYTES: usize = 64 << 20;
/// Number of [`CudaDevice::counters`].
pub(crate) const COUNTERS: usize = 4096;

/// One GPU: its context, its stream, its loaded kernels. Clones share all of them.
#[derive(Debug, Clone)]
pub struct CudaDevice {
    inner: Arc<Inner>,
    batch_invariant: bool,
    tuned: Arc<Tuned>,
    packs_on_host: bool,
}

/// How the blocks of a launch lie, and how it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grid {
    pub(crate) blocks: [u32; 3],
    pub(crate) threads: u32,
    /// Dynamic shared memory of a block.
    pub(crate) shared_bytes: u32,
    /// Blocks, next to each other along x, that run together and see each other's shared memory; divides `blocks[0]`.
    /// Above 1 from sm_90 on.
    pub(crate) cluster: u32,
    /// Starts before the kernel before it ends (programmatic dependent launch, sm_90 and newer).
    pub(crate) overlaps: bool,
}

impl Grid {
    /// Blocks on their own, after all that came before.
    pub(crate) fn new(blocks: [u32; 3], threads: u32, shared_bytes: u32) -> Self {
        Grid { blocks, threads, shared_bytes, cluster: 1, overlaps: false }
    }
}

#[derive(Debug)]
struct Inner {
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
    last_op: Mutex<String>,
    modules: module::Modules,
    /// Made by the first large copy to the GPU.
    staging: Mutex<Option<staging::Staging>>,
    blas: blas::Blas,
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
            last_op: Mutex::new(String::from("open")),
            modules: module::Modules::new(force_ptx, max_shared),
            staging: Mutex::default(),
            blas: blas::Blas::load(),
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

    /// True where weights are packed for kernels that only sm_90 has (`wgmma`, copy engine): on such a GPU, if they
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

    /// Suffix of kernels instantiated per activation dtype: `f16` or `bf16`.
    pub(crate) fn suffix(&self) -> &'static str {
        self.inner.dtype.name()
    }

    /// Enqueues `function` of `module` (its path under kernels/ without `.cu`) with `args` as its one parameter.
    /// `shared_bytes` is dynamic shared memory, up to the GPU's opt-in limit.
    ///
    /// # Safety
    /// As [`Self::launch_grid`]; the kernel begins with `overlap` (kernels/common/overlap.cuh).
    pub(crate) unsafe fn launch<A: Copy>(
        &self,
        module: &'static str,
        function: &str,
        blocks: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        args: &A,
    ) -> Result<()> {
        // Machine code for sm_90 waits by itself; what a driver makes of PTX for sm_80 does not.
        let overlaps = self.inner.sm == 90;
        let grid = Grid { overlaps, ..Grid::new(blocks, threads, shared_bytes) };
        // SAFETY: the caller's promise.
        unsafe { self.launch_grid(module, function, &grid, args) }
    }

    /// As [`Self::launch`], with all that a grid can be.
    ///
    /// # Safety
    /// `A` is the argument struct that `function` declares in kernels/abi.h; its pointers are addresses on this
    /// device of live buffers with the shapes given there. Where `grid.overlaps`, the kernel waits for the kernels
    /// before it (`griddepcontrol.wait`) before it reads what they write or writes anything.
    pub(crate) unsafe fn launch_grid<A: Copy>(
        &self,
        module: &'static str,
        function: &str,
        grid: &Grid,
        args: &A,
    ) -> Result<()> {
        self.enter(function)?;
        let handle = self.inner.modules.function(module, function)?;
        let mut params = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
        let none = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_IGNORE,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { pad: [0; 64] },
        };
        let mut attributes = [none; 2];
        let mut count = 0;
        if grid.cluster > 1 {
            attributes[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes[count].value.clusterDim =
                sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: grid.cluster, y: 1, z: 1 };
            count += 1;
        }
        if grid.overlaps {
            attributes[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[count].value.programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        let stream = self.inner.stream.cu_stream();
        let [x, y, z] = grid.blocks;
        let block = (grid.threads, 1, 1);
        let launched = if count == 0 {
            // SAFETY: the function belongs to a module that is never unloaded; the driver copies the parameter before
            // it returns; its contents are the caller's promise.
            unsafe { result::launch_kernel(handle, (x, y, z), block, grid.shared_bytes, stream, &mut params) }
        } else {
            let config = sys::CUlaunchConfig {
                gridDimX: x,
                gridDimY: y,
                gridDimZ: z,
                blockDimX: grid.threads,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: grid.shared_bytes,
                hStream: stream,
                attrs: attributes.as_mut_ptr(),
                numAttrs: count as u32,
            };
            // SAFETY: as above; the attributes outlive the call.
            unsafe { sys::cuLaunchKernelEx(&config, handle, params.as_mut_ptr(), std::ptr::null_mut()) }.result()
        };
        self.leave(launched)
    }

    /// Before enqueuing `op`: makes the context current and remembers the name for errors.
    pub(crate) fn enter(&self, op: &str) -> Result<()> {
        self.inner.context.bind_to_thread().map_err(|e| self.fault(e))?;
        let mut last = self.inner.last_op.lock().unwrap_or_else(PoisonError::into_inner);
        last.clear();
        last.push_str(op);
        Ok(())
    }

    /// After enqueuing the op named to [`Self::enter`]: its error, or under `LOWBIT_SYNC=1` that of running it.
    pub(crate) fn leave(&self, enqueued: Result<(), DriverError>) -> Result<()> {
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
                *staging = staging::Staging::new().ok(); // a limit on locked memory costs speed alone
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

    /// The stream that everything is enqueued on.
    pub(crate) fn stream(&self) -> sys::CUstream {
        self.inner.stream.cu_stream()
    }

    /// The driver's error, with the op enqueued last.
    fn fault(&self, error: DriverError) -> Error {
        let last = self.inner.last_op.lock().unwrap_or_else(PoisonError::into_inner);
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

/// The driver's error as ours.
fn failure(op: &str, error: DriverError) -> Error {
    let text =
        |r: Result<&std::ffi::CStr, DriverError>| r.map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    Error::Cuda { op: op.into(), reason: format!("{} ({})", text(error.error_string()), text(error.error_name())) }
}
