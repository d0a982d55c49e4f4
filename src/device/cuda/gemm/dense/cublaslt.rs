//! 16-bit products through cuBLASLt. Without the library, with `LOWBIT_BLAS=off`, or for a product it has no algorithm for, our own
//! kernel runs. Its int8 product is what the benchmark compares with.
#![allow(unsafe_code)] // cuBLASLt

use std::ffi::{c_int, c_void};
use std::ptr::from_ref;
use std::sync::OnceLock;

use super::destination;
use crate::device::Tensor;
use crate::device::cuda::blas::{BlasPlan, Product};
use crate::device::cuda::context::{CudaDevice, WORKSPACE_BYTES};
use crate::device::cuda::embedded::abi::LinearOut;
use crate::device::cuda::gemm::family::{Input, Weight};
use crate::device::cuda::kernel::OpId;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// The library's answers to what it has no kernel for: CUBLAS_STATUS_INVALID_VALUE and CUBLAS_STATUS_NOT_SUPPORTED.
const UNSUPPORTED: [c_int; 2] = [7, 15];
/// Destinations of one weight and number of rows whose algorithms are kept: an owner writes it at one place or two.
const KEPT: usize = 4;

/// True for a weight that cuBLASLt, which chooses by the number of rows, is asked to run.
pub(super) fn runs(w: &Weight) -> bool {
    w.bias.is_none() && w.device.blas().is_some() && !w.device.is_batch_invariant()
}

/// What the library has chosen for a weight and a number of rows so far; `None` where it has no algorithm.
#[derive(Debug, Default)]
pub(crate) struct Algorithms {
    known: [OnceLock<(Product, Option<BlasPlan>)>; KEPT],
}

impl Clone for Algorithms {
    /// Nothing yet: descriptors belong to one owner.
    fn clone(&self) -> Self {
        Algorithms::default()
    }
}

impl Algorithms {
    /// Enqueues the product of `w` and `x` with f32 sums, rounded once to y's type. False, with nothing enqueued, where cuBLASLt
    /// is not there or has no algorithm for it.
    ///
    /// # Safety
    /// `y`, `x` and `w` hold addresses on the device of live matrices of their shapes; x and w are contiguous and of the
    /// activation dtype.
    pub(super) unsafe fn run(&self, w: &Weight, y: &LinearOut, x: &Input) -> Result<bool> {
        let Some((out_dtype, add)) = destination(y) else { return Ok(false) };
        let y_alignment = 1 << (y.out as usize).trailing_zeros().min(8);
        let product = Product { m: x.m, n: w.n, k: w.k, stride: y.stride as usize, out_dtype, add, y_alignment };
        let (one, zero) = (1.0f32, 0.0f32);
        let scalars = [from_ref(&one).cast(), from_ref(if add { &one } else { &zero }).cast()];
        let matrices = [y.out, x.x.cast_mut(), w.parts.codes.ptr()];
        let run = |plan: &Option<BlasPlan>| {
            // SAFETY: the caller's promise; the scalars are f32, as products of 16-bit matrices take them.
            match unsafe { enqueue(&w.device, plan.as_ref(), matrices, scalars) }? {
                None => Ok(false),
                Some(0) => w.device.leave(Ok(())).map(|()| true),
                Some(status) => Err(refusal(status, product, "; LOWBIT_BLAS=off runs our own kernel")),
            }
        };
        for slot in &self.known {
            let (known, plan) = slot.get_or_init(|| (product, new_plan(&w.device, product)));
            if *known == product {
                return run(plan);
            }
        }
        run(&new_plan(&w.device, product))
    }
}

fn new_plan(device: &CudaDevice, product: Product) -> Option<BlasPlan> {
    BlasPlan::new(device.blas()?, device.dtype(), product, WORKSPACE_BYTES)
}

/// cuBLASLt's status for a product, `None` where it is not there or has no algorithm.
///
/// # Safety
/// As [`BlasPlan::run`] of y, x and w, alpha and beta.
unsafe fn enqueue(
    device: &CudaDevice,
    plan: Option<&BlasPlan>,
    matrices: [*mut c_void; 3],
    scalars: [*const c_void; 2],
) -> Result<Option<c_int>> {
    let (Some(lt), Some(plan)) = (device.blas(), plan) else { return Ok(None) };
    device.enter(OpId::CUBLASLT)?;
    // SAFETY: the caller's promise; the workspace is scratch of ops on this stream.
    let status = unsafe { plan.run(lt, matrices, scalars, (device.workspace(), WORKSPACE_BYTES), device.stream()) };
    Ok(Some(status))
}

fn refusal(status: c_int, product: Product, advice: &str) -> Error {
    let reason = format!("cuBLASLt status {status} for {product:?}{advice}");
    Error::Cuda { op: "linear (cuBLASLt)".into(), reason }
}

impl CudaDevice {
    /// cuBLASLt as found and its version: `libcublasLt.so.12 12.8.4`.
    pub fn blas_name(&self) -> Option<String> {
        self.blas().map(|lt| lt.describe())
    }

    /// Enqueues `y = x * w^T` of int8 matrices with exact `I32` sums, `x` `[m, k]`, `w` `[n, k]` and y `[m, n]`: the
    /// product that ours are measured against. False, with nothing enqueued, where cuBLASLt is not there or has no
    /// kernel for the shape (it wants multiples of 4 or 16). It chooses its algorithm anew at every call: record calls in a graph.
    ///
    /// # Errors
    /// `Shape` when a tensor has another type or is too small; `Cuda`.
    pub fn blas_int8(&self, y: &mut Tensor, x: &Tensor, w: &Tensor, [m, n, k]: [usize; 3]) -> Result<bool> {
        let wanted = [(y.dtype(), DType::I32, y.len(), m * n), (x.dtype(), DType::I8, x.len(), m * k)];
        for (dtype, expected, len, needed) in wanted.into_iter().chain([(w.dtype(), DType::I8, w.len(), n * k)]) {
            if dtype != expected || len < needed {
                let (expected, got) = (format!("{needed} elements of {expected}"), format!("{len} of {dtype}"));
                return Err(Error::Shape { op: "blas_int8", expected, got });
            }
        }
        let y: *mut c_void = y.cuda_mut()?.ptr();
        let y_alignment = 1 << (y as usize).trailing_zeros().min(8);
        let product = Product { m, n, k, stride: n, out_dtype: DType::I32, add: false, y_alignment };
        let (one, zero) = (1i32, 0i32);
        let scalars = [from_ref(&one).cast(), from_ref(&zero).cast()];
        let plan = new_plan(self, product);
        // SAFETY: shapes and types were checked above; the scalars are i32, as products of int8 matrices take them.
        match unsafe { enqueue(self, plan.as_ref(), [y, x.cuda()?.ptr(), w.cuda()?.ptr()], scalars) }? {
            None => Ok(false),
            Some(0) => self.leave(Ok(())).map(|()| true),
            Some(status) if UNSUPPORTED.contains(&status) => Ok(false),
            Some(status) => Err(refusal(status, product, "")),
        }
    }
}
