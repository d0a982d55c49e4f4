//! Device memory: typed buffers, copies in and out.
#![allow(unsafe_code)] // the driver API

use std::ffi::c_void;
use std::sync::Arc;

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

/// Where parts of one allocation begin, in bytes: a multiple of this.
const PART_ALIGNMENT: usize = 256;
/// Most bytes that are copied for each byte that is new, to make one copy of several.
const MOST_COPIED: usize = 4;
const ALWAYS_COPIED: usize = 32 << 10;

/// Elements of one type in the memory of one GPU, aligned to 256 bytes; freed when dropped, with the last of those that share an
/// allocation.
#[derive(Debug)]
pub struct Buffer {
    memory: Arc<Memory>,
    address: sys::CUdeviceptr,
    dtype: DType,
    len: usize,
}

/// One allocation.
#[derive(Debug)]
struct Memory {
    device: CudaDevice,
    address: sys::CUdeviceptr,
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.device.context().bind_to_thread().is_ok() {
            // SAFETY: allocated in `Buffer::new`, freed once; the driver finishes work that uses it first.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
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
            Ok(address) => {
                Ok(Buffer { memory: Arc::new(Memory { device: device.clone(), address }), address, dtype, len })
            }
            Err(e) if e.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(out_of_memory(bytes)),
            Err(e) => Err(failure("allocate", e)),
        }
    }

    /// Zeros in one allocation, one part behind the other, so that [`Buffer::write_together`] may fill them by one copy.
    pub(crate) fn zeros_together<const N: usize>(
        device: &CudaDevice,
        dtype: DType,
        lens: [usize; N],
    ) -> Result<[Self; N]> {
        let bytes = lens.map(|len| (len * dtype.size_bytes()).next_multiple_of(PART_ALIGNMENT));
        let mut all = Self::new(device, DType::U8, bytes.iter().sum())?;
        all.fill_bytes(0)?;
        let mut at = all.address;
        Ok(std::array::from_fn(|i| {
            let address = at;
            at += bytes[i] as u64;
            Buffer { memory: all.memory.clone(), address, dtype, len: lens[i] }
        }))
    }

    /// Overwrites the start of each of `parts`, all that one [`Buffer::zeros_together`] made and in its order, with its `data`: by one copy
    /// where they are small, what lies between becoming zeros.
    pub(crate) fn write_together(parts: Vec<&mut Self>, data: &[&[u32]]) -> Result<()> {
        let span = |part: &Self, data: &[u32]| (part.address, part.address + 4 * data.len() as u64);
        let (first, last) = match (parts.first(), parts.iter().zip(data).rev().find(|(_, data)| !data.is_empty())) {
            (Some(first), Some((last, data))) => (first.address, span(last, data).1),
            _ => return Ok(()),
        };
        let new: usize = data.iter().map(|data| size_of_val(*data)).sum();
        let all = (last - first) as usize;
        let is_one = parts.windows(2).all(|two| Arc::ptr_eq(&two[0].memory, &two[1].memory));
        if !is_one || all > ALWAYS_COPIED.max(MOST_COPIED * new) {
            return parts.into_iter().zip(data).try_for_each(|(part, data)| part.write(&HostData::U32(data.to_vec())));
        }
        for (part, data) in parts.iter().zip(data) {
            if part.dtype != DType::U32 || data.len() > part.len {
                let expected = format!("at most {} elements of {}", part.len, part.dtype);
                return Err(Error::Shape { op: "write_together", expected, got: format!("{} of u32", data.len()) });
            }
        }
        let mut words = vec![0u32; all.div_ceil(4)];
        for (part, data) in parts.iter().zip(data) {
            let at = ((part.address - first) / 4) as usize;
            words[at..at + data.len()].copy_from_slice(data);
        }
        let device = &parts[0].memory.device;
        device.enter(OpId::WRITE)?;
        // SAFETY: the context is current; the words go to where the parts lie, which are of one allocation.
        let done = unsafe { device.copy_to_gpu(first, bytes_of(&words)) };
        device.leave(done)
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
        let copy = Self::new(&self.memory.device, self.dtype, self.len)?;
        self.memory.device.enter(OpId::DUPLICATE)?;
        // SAFETY: both buffers have that many bytes and do not overlap.
        let done =
            unsafe { result::memcpy_dtod_async(copy.address, self.address, self.bytes(), self.memory.device.stream()) };
        self.memory.device.leave(done)?;
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
        self.memory.device.enter(OpId::FILL)?;
        // SAFETY: the buffer has that many bytes.
        let done = unsafe { result::memset_d8_async(self.address, value, self.bytes(), self.memory.device.stream()) };
        self.memory.device.leave(done)
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
        self.memory.device.enter(OpId::WRITE)?;
        // SAFETY: the context is current, and the buffer was found to have room.
        let done = each!(data, v => unsafe { self.memory.device.copy_to_gpu(self.address, bytes_of(v)) });
        self.memory.device.leave(done)
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
        self.memory.device.enter(OpId::DOWNLOAD)?;
        let bytes = len * self.dtype.size_bytes();
        let target = each!(&mut data, v => v.as_mut_ptr().cast::<c_void>());
        // SAFETY: `data` has `len` elements of this dtype; the synchronization comes before anyone reads them.
        let done = unsafe { sys::cuMemcpyDtoHAsync_v2(target, self.address, bytes, self.memory.device.stream()) };
        let copied = self.memory.device.leave(done.result());
        self.memory.device.synchronize()?;
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
