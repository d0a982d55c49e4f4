//! Tensors in GPU memory: made, written, read.

use crate::device::Tensor;
use crate::device::cuda::context::CudaDevice;
use crate::device::cuda::memory::Buffer;
use crate::dtype::{DType, HostData};
use crate::error::Result;

pub(crate) fn memory(device: &CudaDevice) -> Result<(u64, u64)> {
    device.free_and_total_bytes()
}

pub(crate) fn zeros(device: &CudaDevice, dtype: DType, len: usize) -> Result<Tensor> {
    let mut buffer = Buffer::new(device, dtype, len)?;
    buffer.fill_bytes(0)?;
    Ok(buffer.into())
}

pub(crate) fn zeros_together<const N: usize>(
    device: &CudaDevice,
    dtype: DType,
    lens: [usize; N],
) -> Result<[Tensor; N]> {
    Ok(Buffer::zeros_together(device, dtype, lens)?.map(Tensor::from))
}

pub(crate) fn write_together<const N: usize>(
    _device: &CudaDevice,
    dst: [&mut Tensor; N],
    data: [&[u32]; N],
) -> Result<()> {
    let mut buffers = Vec::with_capacity(N);
    for tensor in dst {
        buffers.push(tensor.cuda_mut()?);
    }
    Buffer::write_together(buffers, &data)
}

pub(crate) fn upload(device: &CudaDevice, data: HostData) -> Result<Tensor> {
    Ok(Buffer::upload(device, &data)?.into())
}

pub(crate) fn write(_device: &CudaDevice, dst: &mut Tensor, data: &HostData) -> Result<()> {
    dst.cuda_mut()?.write(data)
}

pub(crate) fn download(_device: &CudaDevice, src: &Tensor, len: usize) -> Result<HostData> {
    src.cuda()?.download(len)
}

pub(crate) fn synchronize(device: &CudaDevice) -> Result<()> {
    device.synchronize()
}
