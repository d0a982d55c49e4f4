//! Copies of much host memory to the GPU: through two page-locked buffers, which all cores fill in turns while the copy engine
//! empties the other. A copy from ordinary memory would be staged by the driver's one thread.
#![allow(unsafe_code)] // the driver API

use std::ffi::c_void;

use cudarc::driver::result::DriverError;
use cudarc::driver::sys::{self, CUdeviceptr};
use rayon::prelude::*;

/// Copies of at least so many bytes are worth it.
pub(super) const SMALLEST: usize = 1 << 20;
/// Bytes of each buffer.
const SLOT_BYTES: usize = 16 << 20;
/// Bytes that a core copies at once: enough to hide its start, few enough to share a buffer evenly.
const PIECE_BYTES: usize = 256 << 10;

/// Two page-locked buffers of one device's context, and when each was last copied from.
#[derive(Debug)]
pub(super) struct Staging {
    slots: [Slot; 2],
    next: usize,
}

#[derive(Debug)]
struct Slot {
    memory: *mut u8,
    copied: sys::CUevent,
}

// SAFETY: host memory and an event belong to a context, not to a thread; every use binds that context first.
unsafe impl Send for Staging {}

impl Staging {
    /// Allocates both buffers in the current context.
    pub(super) fn new() -> Result<Self, DriverError> {
        let mut staging = Staging {
            slots: [const { Slot { memory: std::ptr::null_mut(), copied: std::ptr::null_mut() } }; 2],
            next: 0,
        };
        for i in 0..2 {
            if let Err(error) = staging.slots[i].allocate() {
                staging.free();
                return Err(error);
            }
        }
        Ok(staging)
    }

    /// Enqueues a copy of `bytes` to `target` on `stream`. What `bytes` borrows may change once this returns.
    ///
    /// # Safety
    /// The context that this was made in is current; `target` has room for `bytes`.
    pub(super) unsafe fn copy(
        &mut self,
        target: CUdeviceptr,
        bytes: &[u8],
        stream: sys::CUstream,
    ) -> Result<(), DriverError> {
        for (i, chunk) in bytes.chunks(SLOT_BYTES).enumerate() {
            let Slot { memory, copied } = self.slots[self.next];
            self.next = 1 - self.next;
            // SAFETY: the event was created in `allocate`; one that was never recorded is no reason to wait.
            unsafe { sys::cuEventSynchronize(copied) }.result()?;
            // SAFETY: the memory is `SLOT_BYTES` long, is this struct's alone, and the copy engine is done with it.
            let slot = unsafe { std::slice::from_raw_parts_mut(memory, chunk.len()) };
            let pieces = slot.par_chunks_mut(PIECE_BYTES).zip(chunk.par_chunks(PIECE_BYTES));
            pieces.for_each(|(to, from)| to.copy_from_slice(from));
            let target = target + (i * SLOT_BYTES) as u64;
            // SAFETY: the caller's promise; the slot is left alone until the event after this copy has passed.
            unsafe {
                sys::cuMemcpyHtoDAsync_v2(target, memory.cast::<c_void>(), chunk.len(), stream).result()?;
                sys::cuEventRecord(copied, stream).result()?;
            }
        }
        Ok(())
    }

    /// Gives the memory back. The context is current, and nothing copies any more.
    pub(super) fn free(&mut self) {
        for slot in &mut self.slots {
            // SAFETY: allocated in `allocate`, freed once: both are null afterwards.
            unsafe {
                if !slot.copied.is_null() {
                    let _ = sys::cuEventDestroy_v2(slot.copied);
                }
                if !slot.memory.is_null() {
                    let _ = sys::cuMemFreeHost(slot.memory.cast::<c_void>());
                }
            }
            *slot = Slot { memory: std::ptr::null_mut(), copied: std::ptr::null_mut() };
        }
    }
}

impl Slot {
    fn allocate(&mut self) -> Result<(), DriverError> {
        let mut memory = std::ptr::null_mut();
        // SAFETY: out parameters; the caller made a context current.
        unsafe {
            sys::cuMemHostAlloc(&mut memory, SLOT_BYTES, 0).result()?;
            self.memory = memory.cast::<u8>();
            sys::cuEventCreate(&mut self.copied, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32).result()
        }
    }
}
