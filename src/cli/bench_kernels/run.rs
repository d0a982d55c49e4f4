//! A run of `bench kernels`: its ceilings, then all ops that are selected.

use std::time::SystemTime;

use crate::cli::{bandwidth, output};
use crate::device::Device;
use crate::device::cuda::CudaDevice;
use crate::error::Result;

use super::measure::Bench;
use super::report::{Ceiling, Report};
use super::{Selection, linear, ops};

/// Measures all that is selected.
pub(super) fn run(gpu: &CudaDevice, selection: &Selection) -> Result<Report> {
    let device = Device::Cuda(gpu.clone());
    linear::check_memory(&device, selection)?;
    let start = SystemTime::now();
    let copy = Ceiling { per_s: bandwidth::bytes_per_second(&device)?, source: bandwidth::method(&device).into() };
    let progress = output::progress("kernels");
    progress.set_length((linear::count(selection) + ops::count(selection)) as u64);
    let mut bench = Bench::new(gpu, copy, progress);
    ops::measure(&mut bench, selection)?;
    linear::measure(&mut bench, selection)?;
    Ok(bench.finish(start))
}
