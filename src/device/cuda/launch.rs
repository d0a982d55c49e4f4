//! Launches: a resolved kernel, a grid and one argument struct by value.
#![allow(unsafe_code)] // the driver API

use std::ffi::c_void;

use cudarc::driver::result;
use cudarc::driver::sys;

use super::context::CudaDevice;
use super::kernel::{Grid, Kernel};
use super::op_kernel::OpKernel;
use crate::error::Result;

impl CudaDevice {
    /// Enqueues the kernel of a small op with `args` as its one parameter. `shared_bytes` is dynamic shared memory, up to the
    /// GPU's opt-in limit.
    ///
    /// # Safety
    /// As [`Self::launch`]; the kernel begins with `overlap` (kernels/common/overlap.cuh).
    pub(super) unsafe fn launch_op<A: Copy>(
        &self,
        kernel: OpKernel,
        blocks: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        args: &A,
    ) -> Result<()> {
        let grid = Grid { overlaps: self.launches_overlap(), ..Grid::new(blocks, threads, shared_bytes) };
        // SAFETY: the caller's promise.
        unsafe { self.launch(self.op_kernel(kernel)?, &grid, args) }
    }

    /// Enqueues `kernel` with `args` as its one parameter. Formats nothing and takes no lock.
    ///
    /// # Safety
    /// `A` is the argument struct that the kernel declares in its abi.h; its pointers are addresses on this
    /// device of live buffers with the shapes given there. Where `grid.overlaps`, the kernel waits for the kernels
    /// before it (`griddepcontrol.wait`) before it reads what they write or writes anything.
    pub(super) unsafe fn launch<A: Copy>(&self, kernel: Kernel, grid: &Grid, args: &A) -> Result<()> {
        self.enter(kernel.op)?;
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
        let stream = self.stream();
        let [x, y, z] = grid.blocks;
        let block = (grid.threads, 1, 1);
        let launched = if count == 0 {
            // SAFETY: the function belongs to a module that is never unloaded; the driver copies the parameter before
            // it returns; its contents are the caller's promise.
            unsafe { result::launch_kernel(kernel.handle, (x, y, z), block, grid.shared_bytes, stream, &mut params) }
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
            unsafe { sys::cuLaunchKernelEx(&config, kernel.handle, params.as_mut_ptr(), std::ptr::null_mut()) }.result()
        };
        self.leave(launched)
    }
}
