//! What this machine offers to the CUDA device, found without failing: for `doctor`, and for clear errors.
#![allow(unsafe_code)] // the driver API

use std::sync::OnceLock;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use super::driver_error::failure;
use super::{blas, embedded};
use crate::error::{Error, Result};

/// One GPU as the driver shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Product name.
    pub name: String,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Bytes of device memory.
    pub memory_bytes: u64,
}

/// What CUDA finds on this machine and what this binary brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// Release of the kernel driver (`580.65.06`), where the system tells.
    pub driver: Option<String>,
    /// Newest CUDA version that the driver supports, major and minor.
    pub driver_cuda: Option<(u32, u32)>,
    /// GPUs in the driver's order.
    pub gpus: Vec<Gpu>,
    /// Architectures with embedded kernels.
    pub archs: Vec<String>,
    /// Version of the compiler that built them.
    pub nvcc: String,
    /// The cuBLASLt library that loads, for 16-bit layers; without one our own kernel runs them.
    pub cublaslt: Option<String>,
    /// What keeps the CUDA device from working, and what to do about it; empty when it works.
    pub problems: Vec<String>,
}

/// Looks at the driver, the GPUs and the embedded kernels. Never fails: what is wrong is in [`Probe::problems`].
pub fn probe() -> Probe {
    let mut found = Probe {
        driver: driver_release(),
        driver_cuda: None,
        gpus: Vec::new(),
        archs: embedded::ARCHS.iter().map(|a| (*a).to_string()).collect(),
        nvcc: embedded::NVCC_VERSION.to_string(),
        cublaslt: blas::find(),
        problems: Vec::new(),
    };
    if has_driver_library() {
        found.driver_cuda = driver_cuda();
    }
    if let Err(e) = check_driver() {
        found.problems.push(e.to_string());
        return found;
    }
    match gpus() {
        Ok(gpus) => found.gpus = gpus,
        Err(e) => found.problems.push(e.to_string()),
    }
    if found.gpus.is_empty() && found.problems.is_empty() {
        found.problems.push("The driver shows no GPU; CUDA_VISIBLE_DEVICES may hide it".into());
    }
    for (i, gpu) in found.gpus.iter().enumerate() {
        if gpu.compute_capability < (8, 0) {
            let (major, minor) = gpu.compute_capability;
            found
                .problems
                .push(format!("GPU {i} ({}) has compute capability {major}.{minor}; the kernels need 8.0", gpu.name));
        }
    }
    found
}

/// Loads and starts the driver.
///
/// # Errors
/// `Cuda`, saying what is missing or too old, which version is needed, and the way out.
pub(super) fn check_driver() -> Result<()> {
    let error = |reason: String| Error::Cuda { op: "driver".into(), reason };
    if !has_driver_library() {
        let what = "no NVIDIA driver: libcuda.so.1 cannot be loaded";
        return Err(error(format!(
            "{what}. Install the driver (in a container, run it with GPUs), or use --device cpu"
        )));
    }
    let needed = nvcc_major();
    if let Some((major, minor)) = driver_cuda()
        && major < needed
    {
        let release = driver_release().map(|r| format!(" {r}")).unwrap_or_default();
        let needed_release = if needed >= 13 { "580" } else { "525" };
        return Err(error(format!(
            "the driver{release} supports CUDA {major}.{minor}; these kernels were compiled by nvcc {}, which needs driver {needed_release} or \
             newer. Update the driver, or rebuild with nvcc {major}.x (LOWBIT_NVCC=/path/to/nvcc)",
            embedded::NVCC_VERSION
        )));
    }
    result::init().map_err(|e| failure("driver", e))
}

/// Whether the driver's library can be loaded. cudarc panics on the first call when it cannot.
fn has_driver_library() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: loading libcuda runs its initializers, which have no preconditions.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

/// Newest CUDA version that the driver supports.
fn driver_cuda() -> Option<(u32, u32)> {
    let mut version = 0;
    // SAFETY: an out parameter; callable before cuInit.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().ok()?;
    let version = u32::try_from(version).ok()?;
    Some((version / 1000, version % 1000 / 10))
}

fn nvcc_major() -> u32 {
    embedded::NVCC_VERSION.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0)
}

/// The kernel driver's release, from the line `NVRM version: ... Module  580.65.06  ...`.
fn driver_release() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let is_release = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    text.lines().next()?.split_whitespace().find(is_release).map(str::to_owned)
}

fn gpus() -> Result<Vec<Gpu>> {
    let count = result::device::get_count().map_err(|e| failure("device count", e))?;
    (0..count)
        .map(|ordinal| {
            let device = result::device::get(ordinal)?;
            // SAFETY: the handle was just returned by the driver.
            let attribute = |a| unsafe { result::device::get_attribute(device, a) };
            let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            // SAFETY: as above.
            let memory_bytes = unsafe { result::device::total_mem(device) }? as u64;
            Ok(Gpu {
                name: result::device::get_name(device)?,
                compute_capability: (major as u32, minor as u32),
                memory_bytes,
            })
        })
        .collect::<std::result::Result<_, _>>()
        .map_err(|e| failure("device", e))
}
