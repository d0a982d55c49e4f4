//! The CUDA device: one GPU, one stream, kernels resolved once from the embedded modules.

mod attention;
mod blas;
mod context;
mod driver_error;
mod embedded;
mod gemm;
mod graph;
mod kernel;
mod launch;
mod memory;
mod module;
mod nvml;
mod op_kernel;
pub(crate) mod ops;
mod probe;
mod staging;

pub use context::CudaDevice;
pub use gemm::table::{Choice, Tuned};
pub(crate) use gemm::{CudaPacked, packed_bytes};
pub use graph::Graph;
pub use memory::Buffer;
pub use nvml::{Nvml, Reading};
pub use probe::{Gpu, Probe, probe};
