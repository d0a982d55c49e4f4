//! cuBLASLt, where the library is found at run time: its functions, and the algorithm that it chooses for a product.
//!
//! cudarc loads only library names of the CUDA version it is bound to; a newer cuBLASLt serves as well, since the few
//! functions used here have not changed since CUDA 11. So they are looked up here, with cudarc's types.
#![allow(unsafe_code)] // cuBLASLt

use std::ffi::{c_int, c_void};
use std::ptr::{from_ref, null_mut};

use cudarc::cublaslt::sys::{
    cublasComputeType_t as ComputeType, cublasLtHandle_t as Handle, cublasLtMatmulAlgo_t as Algorithm,
    cublasLtMatmulDesc_t as MatmulDesc, cublasLtMatmulDescAttributes_t as DescAttribute,
    cublasLtMatmulHeuristicResult_t as Heuristic, cublasLtMatmulPreference_t as Preference,
    cublasLtMatmulPreferenceAttributes_t as PreferenceAttribute, cublasLtMatrixLayout_t as Layout,
    cudaDataType as DataType,
};
use cudarc::driver::sys::CUstream;
use libloading::Library;

use crate::dtype::DType;

/// Where the library is looked for, after the file that `LOWBIT_CUBLASLT` names.
const NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];

/// One product `y[m, n] = x[m, k] * w[n, k]^T`, or `+=` with `add`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Product {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    /// Elements between rows of y.
    pub(super) stride: usize,
    /// `F32` or the activation dtype; `I32` of a product of int8 matrices.
    pub(super) out_dtype: DType,
    pub(super) add: bool,
    /// Bytes that the address of y is a multiple of, up to 256.
    pub(super) y_alignment: usize,
}

/// Name of the cuBLASLt library that loads, if any does.
pub(super) fn find() -> Option<String> {
    // SAFETY: loading cuBLASLt runs its initializers, which have no preconditions.
    names().find(|name| unsafe { Library::new(name) }.is_ok())
}

fn names() -> impl Iterator<Item = String> {
    std::env::var("LOWBIT_CUBLASLT").ok().into_iter().chain(NAMES.map(str::to_owned))
}

type Create<T> = unsafe extern "C" fn(*mut T) -> c_int;
type Destroy<T> = unsafe extern "C" fn(T) -> c_int;
type SetAttribute<T, A> = unsafe extern "C" fn(T, A, *const c_void, usize) -> c_int;

/// The library's functions, and a handle.
pub(super) struct Lt {
    name: String,
    /// Major, minor and patch version, two digits each of the last two.
    version: usize,
    handle: Handle,
    destroy: Destroy<Handle>,
    desc_create: unsafe extern "C" fn(*mut MatmulDesc, ComputeType, DataType) -> c_int,
    desc_set: SetAttribute<MatmulDesc, DescAttribute>,
    desc_destroy: Destroy<MatmulDesc>,
    layout_create: unsafe extern "C" fn(*mut Layout, DataType, u64, u64, i64) -> c_int,
    layout_destroy: Destroy<Layout>,
    preference_create: Create<Preference>,
    preference_set: SetAttribute<Preference, PreferenceAttribute>,
    preference_destroy: Destroy<Preference>,
    heuristic: unsafe extern "C" fn(
        Handle,
        MatmulDesc,
        Layout,
        Layout,
        Layout,
        Layout,
        Preference,
        c_int,
        *mut Heuristic,
        *mut c_int,
    ) -> c_int,
    #[allow(clippy::type_complexity)] // cublasLtMatmul's own parameters
    matmul: unsafe extern "C" fn(
        Handle,
        MatmulDesc,
        *const c_void,
        *const c_void,
        Layout,
        *const c_void,
        Layout,
        *const c_void,
        *const c_void,
        Layout,
        *mut c_void,
        Layout,
        *const Algorithm,
        *mut c_void,
        usize,
        CUstream,
    ) -> c_int,
}

// SAFETY: cuBLASLt handles may be used from any thread; the functions are plain pointers into a library never unloaded.
unsafe impl Send for Lt {}
// SAFETY: as above.
unsafe impl Sync for Lt {}

impl std::fmt::Debug for Lt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

impl Drop for Lt {
    fn drop(&mut self) {
        // SAFETY: created by the library, destroyed once, while its context is alive.
        unsafe { (self.destroy)(self.handle) };
    }
}

impl Lt {
    /// The first library that loads and starts; `None` without one and under `LOWBIT_BLAS=off`. A context must be current.
    pub(super) fn load() -> Option<Lt> {
        let is_off = std::env::var("LOWBIT_BLAS").is_ok_and(|value| value == "off");
        let found = if is_off { None } else { names().find_map(|name| Lt::start(&name)) };
        tracing::debug!(library = found.as_ref().map_or("none", |lt| lt.name.as_str()), "cuBLASLt");
        found
    }

    /// The library as found and its version: `libcublasLt.so.12 12.8.4`.
    pub(super) fn describe(&self) -> String {
        let v = self.version;
        format!("{} {}.{}.{}", self.name, v / 10_000, v / 100 % 100, v % 100)
    }

    fn start(name: &str) -> Option<Lt> {
        // SAFETY: loading cuBLASLt runs its initializers, which have no preconditions. It is never unloaded: it keeps
        // threads and device state of its own.
        let library: &'static Library = Box::leak(Box::new(unsafe { Library::new(name) }.ok()?));
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the field it is assigned to has the function's type in cuBLASLt's header.
                *unsafe { library.get($name) }.ok()?
            };
        }
        let create: Create<Handle> = symbol!(b"cublasLtCreate");
        let mut handle = null_mut();
        // SAFETY: an out parameter; a context is current.
        if unsafe { create(&mut handle) } != 0 {
            return None; // mostly a library newer than the driver
        }
        let version: unsafe extern "C" fn() -> usize = symbol!(b"cublasLtGetVersion");
        Some(Lt {
            name: name.to_owned(),
            // SAFETY: no preconditions.
            version: unsafe { version() },
            handle,
            destroy: symbol!(b"cublasLtDestroy"),
            desc_create: symbol!(b"cublasLtMatmulDescCreate"),
            desc_set: symbol!(b"cublasLtMatmulDescSetAttribute"),
            desc_destroy: symbol!(b"cublasLtMatmulDescDestroy"),
            layout_create: symbol!(b"cublasLtMatrixLayoutCreate"),
            layout_destroy: symbol!(b"cublasLtMatrixLayoutDestroy"),
            preference_create: symbol!(b"cublasLtMatmulPreferenceCreate"),
            preference_set: symbol!(b"cublasLtMatmulPreferenceSetAttribute"),
            preference_destroy: symbol!(b"cublasLtMatmulPreferenceDestroy"),
            heuristic: symbol!(b"cublasLtMatmulAlgoGetHeuristic"),
            matmul: symbol!(b"cublasLtMatmul"),
        })
    }
}

/// A cuBLASLt object, destroyed by the function it came with.
#[derive(Debug)]
struct Owned<T: Copy>(T, Destroy<T>);

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: created by the library, destroyed once. These objects are host memory only.
        unsafe { (self.1)(self.0) };
    }
}

/// Descriptors of one product and the algorithm chosen for it.
///
/// cuBLASLt sees column-major matrices: row-major y `[m, n]` is its `[n, m]`, so the product is computed as
/// `y^T = w x^T` with w, its `[k, n]`, transposed.
#[derive(Debug)]
pub(super) struct BlasPlan {
    desc: Owned<MatmulDesc>,
    w: Owned<Layout>,
    x: Owned<Layout>,
    y: Owned<Layout>,
    algorithm: Algorithm,
}

// SAFETY: the descriptors are host memory that only their owner touches.
unsafe impl Send for BlasPlan {}
// SAFETY: as above: the library only reads them once a plan is made.
unsafe impl Sync for BlasPlan {}

impl BlasPlan {
    /// The library's first choice for a product of matrices of `activations`, or of int8 ones when y is `I32`.
    pub(super) fn new(lt: &Lt, activations: DType, product: Product, workspace_bytes: usize) -> Option<BlasPlan> {
        let Product { m, n, k, stride, out_dtype, y_alignment, .. } = product;
        let (dtype, sums, scalars) = match out_dtype {
            DType::I32 => (DType::I8, ComputeType::CUBLAS_COMPUTE_32I, DataType::CUDA_R_32I),
            _ => (activations, ComputeType::CUBLAS_COMPUTE_32F, DataType::CUDA_R_32F),
        };
        let data_type = |dtype| match dtype {
            DType::F16 => Some(DataType::CUDA_R_16F),
            DType::BF16 => Some(DataType::CUDA_R_16BF),
            DType::F32 => Some(DataType::CUDA_R_32F),
            DType::I8 => Some(DataType::CUDA_R_8I),
            DType::I32 => Some(DataType::CUDA_R_32I),
            _ => None,
        };
        let layout = |dtype, rows: usize, columns: usize, stride: usize| {
            let mut layout = null_mut();
            // SAFETY: an out parameter.
            let status = unsafe {
                (lt.layout_create)(&mut layout, data_type(dtype)?, rows as u64, columns as u64, stride as i64)
            };
            (status == 0).then_some(Owned(layout, lt.layout_destroy))
        };
        let (w, x, y) = (layout(dtype, k, n, k)?, layout(dtype, k, m, k)?, layout(out_dtype, n, m, stride)?);

        let mut desc = null_mut();
        // SAFETY: an out parameter.
        let status = unsafe { (lt.desc_create)(&mut desc, sums, scalars) };
        let desc = (status == 0).then_some(Owned(desc, lt.desc_destroy))?;
        let transpose: u32 = 1; // CUBLAS_OP_T
        // SAFETY: the attribute is 32 bits.
        let status = unsafe {
            (lt.desc_set)(desc.0, DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, from_ref(&transpose).cast(), 4)
        };

        let mut preference = null_mut();
        // SAFETY: an out parameter.
        let created = unsafe { (lt.preference_create)(&mut preference) };
        let preference = (created == 0).then_some(Owned(preference, lt.preference_destroy))?;
        let set = |attribute, value: *const c_void, bytes| {
            // SAFETY: value points to that many bytes.
            unsafe { (lt.preference_set)(preference.0, attribute, value, bytes) }
        };
        let workspace = workspace_bytes as u64;
        let alignment = y_alignment as u32;
        let split_sums: u32 = 2; // CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE: split sums are not rounded to 16 bits
        let statuses = [
            status,
            set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, from_ref(&workspace).cast(), 8),
            set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, from_ref(&alignment).cast(), 4),
            set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, from_ref(&alignment).cast(), 4),
            set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, from_ref(&split_sums).cast(), 4),
        ];
        if statuses.iter().any(|&status| status != 0) {
            return None;
        }

        let mut best = std::mem::MaybeUninit::<Heuristic>::zeroed();
        let mut count = 0;
        // SAFETY: all descriptors are alive; room for the one result asked for.
        let status = unsafe {
            (lt.heuristic)(lt.handle, desc.0, w.0, x.0, y.0, y.0, preference.0, 1, best.as_mut_ptr(), &mut count)
        };
        if status != 0 || count == 0 {
            return None;
        }
        // SAFETY: all-zero bytes are a valid result (a struct of integers and a status whose 0 is success), and the
        // library has written over them.
        let best = unsafe { best.assume_init() };
        Some(BlasPlan { desc, w, x, y, algorithm: best.algo })
    }

    /// Enqueues the product; the library's status.
    ///
    /// # Safety
    /// `y`, `x` and `w` are addresses on the device of live matrices of the product's shapes, x and w contiguous;
    /// `alpha` and `beta` point to scalars of the type of the product's sums; `workspace` is scratch of the stream, as
    /// long as the plan was made for.
    pub(super) unsafe fn run(
        &self,
        lt: &Lt,
        [y, x, w]: [*mut c_void; 3],
        [alpha, beta]: [*const c_void; 2],
        (workspace, workspace_bytes): (*mut c_void, usize),
        stream: CUstream,
    ) -> c_int {
        // SAFETY: the descriptors live with the plan; the rest is the caller's promise.
        unsafe {
            (lt.matmul)(
                lt.handle,
                self.desc.0,
                alpha,
                w,
                self.w.0,
                x,
                self.x.0,
                beta,
                y,
                self.y.0,
                y,
                self.y.0,
                &self.algorithm,
                workspace,
                workspace_bytes,
                stream,
            )
        }
    }
}
