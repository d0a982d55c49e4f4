//! Device memory: typed buffers, copies in and out.
#![allow(unsafe_code)] // the driver API

use std::ffi::c_void;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUresult};

use super::context::CudaDevice;
use super::driver_error::failure;
use super::kernel::OpId;
use crate::dtype::{DType, HostData};
use crate::error::{Error, Result};

/// `$body` with the typed vector of a [`HostData`] as `$v`.
macro_rules! each {
    ($data:expr, $v:ident => $body:expr) => {
        match $data {
            HostData::F32($v) => $body,
            HostData::F16($v) => $body,
            HostData::BF16($v) => $body,
            HostData::I8($v) => $body,
            HostData::U8($v) => $body,
            HostData::I32($v) => $body,
            HostData::U32($v) => $body,
        }
    };
}

/// Elements of one type in the memory of one GPU, aligned to 256 bytes; freed when dropped.
#[derive(Debug)]
pub struct Buffer {
    device: CudaDevice,
    address: sys::CUdeviceptr,
    dtype: DType,
    len: usize,
}

impl Buffer {
    /// `len` elements with undefined contents.
    pub(crate) fn new(device: &CudaDevice, dtype: DType, len: usize) -> Result<Self> {
        device.enter(OpId::ALLOCATE)?;
        let out_of_memory = |needed: usize| {
            let free_bytes = result::mem_get_info().map_or(0, |(free, _)| free as u64);
            Error::OutOfMemory {
                what: format!("a tensor of {len} {dtype}"),
                needed_bytes: needed as u64,
                free_bytes,
                advice: "Use a smaller model, fewer or shorter sequences, or free memory of the GPU".into(),
                grows_with_sequences: true,
            }
        };
        let bytes = len.checked_mul(dtype.size_bytes()).ok_or_else(|| out_of_memory(usize::MAX))?;
        // SAFETY: `enter` made the context current. The driver refuses zero bytes, so an empty buffer has one.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Ok(address) => Ok(Buffer { device: device.clone(), address, dtype, len }),
            Err(e) if e.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(out_of_memory(bytes)),
            Err(e) => Err(failure("allocate", e)),
        }
    }

    /// A buffer of `data`.
    pub(crate) fn upload(device: &CudaDevice, data: &HostData) -> Result<Self> {
        let mut buffer = Self::new(device, data.dtype(), data.len())?;
        buffer.write(data)?;
        Ok(buffer)
    }

    /// A buffer of `bytes`.
    pub(crate) fn upload_bytes(device: &CudaDevice, bytes: &[u8]) -> Result<Self> {
        Self::upload_slice(device, DType::U8, bytes)
    }

    /// A buffer of `values`.
    pub(crate) fn upload_floats(device: &CudaDevice, values: &[f32]) -> Result<Self> {
        Self::upload_slice(device, DType::F32, values)
    }

    /// A buffer of `values`, which are of `dtype`.
    fn upload_slice<T: Copy>(device: &CudaDevice, dtype: DType, values: &[T]) -> Result<Self> {
        let buffer = Self::new(device, dtype, values.len())?;
        device.enter(OpId::WRITE)?;
        // SAFETY: the buffer was made for them, and its context is current.
        let done = unsafe { device.copy_to_gpu(buffer.address, bytes_of(values)) };
        device.leave(done).map(|()| buffer)
    }

    /// A buffer of the same elements.
    pub(crate) fn duplicate(&self) -> Result<Self> {
        let copy = Self::new(&self.device, self.dtype, self.len)?;
        self.device.enter(OpId::DUPLICATE)?;
        // SAFETY: both buffers have that many bytes and do not overlap.
        let done = unsafe { result::memcpy_dtod_async(copy.address, self.address, self.bytes(), self.device.stream()) };
        self.device.leave(done)?;
        Ok(copy)
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Device address of the first element. Not dereferenceable on the host.
    pub(crate) fn ptr<T>(&self) -> *mut T {
        self.address as *mut T
    }

    /// Device address of element `index`, at most `len`.
    pub(crate) fn ptr_at<T>(&self, index: usize) -> *mut T {
        debug_assert!(index <= self.len);
        (self.address + (index * self.dtype.size_bytes()) as u64) as *mut T
    }

    /// Sets every byte to `value`.
    pub(crate) fn fill_bytes(&mut self, value: u8) -> Result<()> {
        self.device.enter(OpId::FILL)?;
        // SAFETY: the buffer has that many bytes.
        let done = unsafe { result::memset_d8_async(self.address, value, self.bytes(), self.device.stream()) };
        self.device.leave(done)
    }

    /// Overwrites the start with `data`, which has this dtype and is not longer. The host's copy may be reused at
    /// once.
    pub(crate) fn write(&mut self, data: &HostData) -> Result<()> {
        if data.dtype() != self.dtype || data.len() > self.len {
            return Err(Error::Shape {
                op: "write",
                expected: format!("at most {} elements of {}", self.len, self.dtype),
                got: format!("{} of {}", data.len(), data.dtype()),
            });
        }
        self.device.enter(OpId::WRITE)?;
        // SAFETY: the context is current, and the buffer was found to have room.
        let done = each!(data, v => unsafe { self.device.copy_to_gpu(self.address, bytes_of(v)) });
        self.device.leave(done)
    }

    /// The first `len` elements, after everything enqueued before.
    pub(crate) fn download(&self, len: usize) -> Result<HostData> {
        if len > self.len {
            return Err(Error::Shape {
                op: "download",
                expected: format!("at most {} elements", self.len),
                got: format!("{len}"),
            });
        }
        let mut data = HostData::zeros(self.dtype, len);
        self.device.enter(OpId::DOWNLOAD)?;
        let bytes = len * self.dtype.size_bytes();
        let target = each!(&mut data, v => v.as_mut_ptr().cast::<c_void>());
        // SAFETY: `data` has `len` elements of this dtype; the synchronization comes before anyone reads them.
        let done = unsafe { sys::cuMemcpyDtoHAsync_v2(target, self.address, bytes, self.device.stream()) };
        let copied = self.device.leave(done.result());
        self.device.synchronize()?;
        copied.map(|()| data)
    }

    fn bytes(&self) -> usize {
        self.len * self.dtype.size_bytes()
    }
}

/// The memory of `values`, which are numbers.
fn bytes_of<T: Copy>(values: &[T]) -> &[u8] {
    // SAFETY: the slice's own memory; the types of `HostData` have no padding, and any byte may be read.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.device.context().bind_to_thread().is_ok() {
            // SAFETY: allocated in `new`, freed once; the driver finishes work that uses it first.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}
