//! How fast a device reads memory: the ceiling of decoding.

use std::time::Instant;

use rayon::prelude::*;

use crate::device::Device;
use crate::error::Result;

/// What [`bytes_per_second`] measures, in words.
pub(super) fn method(device: &Device) -> &'static str {
    match device {
        Device::Cpu(_) | Device::Meta(_) => "a read loop on the same threads",
        #[cfg(lowbit_cuda)]
        Device::Cuda(_) => "a copy on the GPU, read plus written",
    }
}

/// Bytes a second that a device moves at best.
pub(super) fn bytes_per_second(device: &Device) -> Result<f64> {
    match device {
        Device::Cpu(_) | Device::Meta(_) => Ok(read_bytes_per_second()),
        #[cfg(lowbit_cuda)]
        Device::Cuda(gpu) => copy_bytes_per_second(device, gpu),
    }
}

/// Rows of 4096 floats copied by `gather_rows`, best of some passes; both buffers are far larger than the L2 cache.
#[cfg(lowbit_cuda)]
fn copy_bytes_per_second(device: &Device, gpu: &crate::device::cuda::CudaDevice) -> Result<f64> {
    use crate::dtype::{DType, HostData};
    const WIDTH: usize = 4096;
    let rows = BYTES / (4 * WIDTH);
    let x = device.zeros(DType::F32, rows * WIDTH)?;
    let mut out = device.zeros(DType::F32, rows * WIDTH)?;
    let ids = device.upload(HostData::U32((0..rows as u32).collect()))?;
    let mut best: f64 = 0.0;
    // The first pass loads the kernel.
    for _ in 0..=PASSES {
        let time = gpu.time(|| device.gather_rows(&mut out, &x, &ids, WIDTH, rows))?;
        best = best.max(2.0 * BYTES as f64 / time.as_secs_f64());
    }
    Ok(best)
}

/// Bytes read by a measurement: far more than any cache holds.
const BYTES: usize = 512 << 20;
const PASSES: usize = 4;

/// Bytes a second that the thread pool reads, best of some passes over a buffer of half a GiB.
fn read_bytes_per_second() -> f64 {
    let threads = rayon::current_num_threads();
    let len = BYTES / size_of::<u64>();
    // Written by the threads that will read it, so that pages are where they are used.
    let data: Vec<u64> = (0..len).into_par_iter().map(|i| i as u64).collect();
    let pass = || {
        let start = Instant::now();
        let all = data.par_chunks(len.div_ceil(threads)).map(combine).reduce(|| 0, |a, b| a ^ b);
        std::hint::black_box(all);
        BYTES as f64 / start.elapsed().as_secs_f64()
    };
    (0..PASSES).map(|_| pass()).fold(0.0, f64::max)
}

/// All elements combined in lanes side by side, which the compiler turns into vectors: the arithmetic must not be
/// what takes the time.
fn combine(data: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    let chunks = data.chunks_exact(lanes.len());
    let rest = chunks.remainder().iter().fold(0, |all, &x| all ^ x);
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, &x)| *lane ^= x);
    }
    lanes.iter().fold(rest, |all, &x| all ^ x)
}
