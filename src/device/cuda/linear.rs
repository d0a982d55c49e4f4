//! Launches of the linear kernels.
#![allow(unsafe_code)] // kernel launches

use std::ffi::c_void;

use half::{bf16, f16};

use super::abi::{
    self, Gemm16BitArgs, GemmAnyArgs, GemmW4A8Args, GemmW4A8Sm90Args, GemmW4A16Args, GemmW4A16Sm80Args,
    GemmW4A16Sm90Args, GemmW8A8Args, GemmW8A8Sm90Args, LinearOut,
};
use super::blas::Product;
use super::choose::Launch;
use super::ops::{flip, u32_of};
use super::pack::{CudaPacked, Layout, cuda_packed, padded_n};
use super::pack_blocks::{COLUMNS, ROWS};
use super::scale_parts::ScaleParts;
use super::{Buffer, CudaDevice, choose_sm80, choose_w4a8, tensor_map};
use crate::device::{Act, Activation, Columns, Output, PackedWeight, Tensor, Write};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::Codebook;

/// `out[r, columns] (+)= x[r, :] * w^T + bias`; the op table has checked `out`.
pub(crate) fn linear(
    device: &CudaDevice,
    out: &mut Tensor,
    columns: Columns,
    x: &Act,
    w: &PackedWeight,
    write: Write,
    m: usize,
) -> Result<()> {
    let w = cuda_packed("linear", w)?;
    let y = destination(device, out, columns, w, write, m)?;
    if w.is_for_blas() {
        let input = input(device, x, w, m)?;
        let product =
            Product { m, n: w.n, k: w.k, stride: columns.stride, out_dtype: out.dtype(), add: write == Write::Add };
        // SAFETY: `input` and `destination` checked the buffers; the weight is `[n, k]` of the activation type.
        if unsafe { device.blas_product(y.out, input.ptr(), w.weights.ptr(), product) }? {
            return Ok(());
        }
    }
    run(device, y, x, w, m)
}

/// `out = codes of activation(x * w^T + bias)`; the op table has checked `out`.
pub(crate) fn linear_codes(device: &CudaDevice, out: &mut Act, x: &Act, w: &PackedWeight, m: usize) -> Result<()> {
    let w = cuda_packed("linear_codes", w)?;
    let (mode, scale, zero) = match w.epilogue.output {
        Output::Floats => return Err(mismatch("a weight whose epilogue quantizes", "one that gives floats")),
        Output::Static { scale, zero_point } => (abi::LOWBIT_OUT_STATIC, scale, zero_point),
        Output::FixedPoint { scale, zero_point } => (abi::LOWBIT_OUT_FIXED, scale, zero_point),
        Output::Groups => (abi::LOWBIT_OUT_GROUPS, 1.0, 0),
    };
    let y = LinearOut {
        scales: out.scales.cuda_mut()?.ptr(),
        scale,
        zero,
        flip: flip(&out.codes),
        ..y(out.codes.cuda_mut()?.ptr(), w.epilogue.outputs(w.n), mode, w, m)?
    };
    run(device, y, x, w, m)
}

/// The layer's own kernel, `y` being a destination of its epilogue.
fn run(device: &CudaDevice, y: LinearOut, x: &Act, w: &CudaPacked, m: usize) -> Result<()> {
    let input = input(device, x, w, m)?;
    let int8 = w.takes_int8();
    let x_scales: *const f32 = if int8 { x.scales.cuda()?.ptr() } else { std::ptr::null() };
    let x_zeros: *const i32 = if w.x_zeros { x.zeros.cuda()?.ptr() } else { std::ptr::null() };
    let x_flip = if int8 { flip(&x.codes) } else { 0 };
    // Of gemm_w8a8, which reads uint8 as it is, 128 above the code.
    let x_zero_as_read = w.x_zero + x_flip as i32;
    let w_sums = if x_zero_as_read != 0 || w.x_zeros { pointer(&w.sums) } else { std::ptr::null() };
    let (outliers, x_floats) = match w.outliers {
        true => outliers(device, x, w, m, x_flip)?,
        false => (std::ptr::null(), std::ptr::null()),
    };
    let launch = w.launch(m, x_flip != 0);
    let k = u32_of(w.k)?;
    let n_pad = u32_of(padded_n(w.n))?;
    let group = u32_of(w.group_size)?;
    // SAFETY: `input` and `destination` checked the buffers; `pack` made those of the weight for these kernels.
    unsafe {
        match w.layout {
            Layout::Rows8 => {
                let args = GemmW8A8Args {
                    y,
                    x: input.ptr(),
                    w: w.weights.ptr(),
                    x_scales,
                    x_zeros,
                    w_scales: pointer(&w.scales),
                    w_sums,
                    x_zero: x_zero_as_read,
                    k,
                    outliers,
                    x_floats,
                };
                start(device, &launch, &args)
            }
            Layout::Blocks8 => {
                let args = GemmW8A8Sm90Args {
                    x: tensor_map::matrix(input.ptr(), m, w.k, launch.box_rows)?,
                    y,
                    w: w.weights.ptr(),
                    x_scales,
                    x_zeros,
                    w_scales: pointer(&w.scales),
                    w_sums,
                    x_zero: x_zero_as_read,
                    k,
                    x_unsigned: u32::from(x_flip != 0),
                    floats_f16: u32::from(device.dtype() == DType::F16),
                    outliers,
                    x_floats,
                };
                start(device, &launch, &args)
            }
            Layout::Blocks4(shape) => {
                let ring = choose_w4a8::ring(&launch, shape, w.k);
                let args = GemmW4A8Sm90Args {
                    x: tensor_map::matrix(input.ptr(), m, w.k, launch.box_rows)?,
                    y,
                    x_rows: input.ptr(),
                    w: w.weights.ptr(),
                    x_scales,
                    w_scales: pointer(&w.scales),
                    x_zeros,
                    x_zero: x_zero_as_read,
                    k,
                    x_unsigned: u32::from(x_flip != 0),
                    row_blocks: u32_of(w.n.div_ceil(ROWS))?,
                    k_blocks: u32_of(w.k.div_ceil(COLUMNS))?,
                    block_bytes: u32_of(shape.bytes())?,
                    parts: u32_of(shape.parts)?,
                    group_blocks: u32_of(shape.group_blocks)?,
                    stages: u32_of(ring.stages)?,
                    stage_bytes: u32_of(ring.stage_bytes)?,
                };
                start(device, &launch, &args)
            }
            Layout::Fragments8Bit { .. } => {
                let args = GemmW4A8Args {
                    y,
                    x: input.ptr(),
                    w: w.weights.ptr(),
                    x_scales,
                    x_zeros,
                    w_scales: pointer(&w.scales),
                    w_zeros: pointer(&w.zeros),
                    w_sums: pointer(&w.sums),
                    x_zero: w.x_zero,
                    x_flip: x_flip * 0x0101_0101,
                    w_zero: w.zero,
                    k,
                    n_pad,
                    group,
                };
                start(device, &launch, &args)
            }
            Layout::Fragments16Bit { .. } | Layout::FragmentsCodebook => {
                let layer = GemmW4A16Args {
                    y,
                    x: input.ptr(),
                    w: w.weights.ptr(),
                    w_scales: pointer(&w.scales),
                    w_zeros: pointer(&w.zeros),
                    w_zero: w.zero,
                    k,
                    n_pad,
                    group,
                    codebook: w.codebook.map_or([0; 8], |codebook| codebook_bytes(&codebook, device.dtype())),
                };
                if launch.module != choose_sm80::MODULE {
                    return start(device, &launch, &layer);
                }
                let args = GemmW4A16Sm80Args {
                    layer,
                    partials: device.workspace(),
                    counters: device.counters(),
                    cut_tiles: launch.cut_tiles,
                    low_scales: u32::from(w.scale_parts == ScaleParts::Two),
                };
                start(device, &launch, &args)
            }
            Layout::Blocks16(shape) => {
                let args = GemmW4A16Sm90Args {
                    x: tensor_map::matrix(input.ptr(), m, 2 * w.k, launch.box_rows)?,
                    y,
                    w: w.weights.ptr(),
                    block_bytes: u32_of(shape.bytes())?,
                    row_blocks: u32_of(w.n.div_ceil(ROWS))?,
                    k_blocks: u32_of(w.k.div_ceil(COLUMNS))?,
                    groups: u32_of(shape.groups)?,
                    low_scales: shape.low_scales.into(),
                    zeros: shape.zeros.into(),
                    w_zero: w.zero,
                    k,
                    x_rows: input.ptr(),
                };
                start(device, &launch, &args)
            }
            Layout::Dense { aligned: true } => {
                start(device, &launch, &Gemm16BitArgs { y, x: input.ptr(), w: w.weights.ptr(), k })
            }
            Layout::Dense { aligned: false } | Layout::Canonical { .. } | Layout::CanonicalCodebook => {
                let args = GemmAnyArgs {
                    y,
                    x: input.ptr(),
                    w: w.weights.ptr(),
                    x_scales,
                    x_zeros,
                    w_scales: pointer(&w.scales),
                    w_zeros: pointer(&w.zeros),
                    x_zero: w.x_zero,
                    x_flip,
                    k,
                    group,
                    codebook: w.codebook.map_or([0.0; 16], |codebook| codebook.0),
                    outliers,
                    x_floats,
                };
                start(device, &launch, &args)
            }
        }
    }
}

/// Bits and values of the input's outliers, checked for `m` rows.
fn outliers(
    device: &CudaDevice,
    x: &Act,
    w: &CudaPacked,
    m: usize,
    x_flip: u32,
) -> Result<(*const u32, *const c_void)> {
    let (bits, values) = (m * Act::outlier_words(w.k), m * w.k);
    let fits = x.outliers.dtype() == DType::U32 && x.outliers.len() >= bits;
    if x_flip != 0 || !fits || x.floats.dtype() != device.dtype() || x.floats.len() < values {
        let expected = format!("int8 codes, {bits} words of outliers and {values} of {}", device.dtype());
        return Err(mismatch(expected, format!("{}, {}, {}", x.codes.dtype(), x.outliers.len(), x.floats.len())));
    }
    Ok((x.outliers.cuda()?.ptr::<u32>().cast_const(), x.floats.cuda()?.ptr::<c_void>().cast_const()))
}

/// The values of a codebook in `dtype`: their low bytes, then their high bytes, four to a word.
fn codebook_bytes(codebook: &Codebook, dtype: DType) -> [u32; 8] {
    let bytes = codebook.0.map(|value| match dtype {
        DType::F16 => f16::from_f32(value).to_le_bytes(),
        _ => bf16::from_f32(value).to_le_bytes(),
    });
    std::array::from_fn(|i| u32::from_le_bytes(std::array::from_fn(|j| bytes[i % 4 * 4 + j][i / 4])))
}

/// # Safety
/// As [`CudaDevice::launch`]: `args` is what the launch's kernel declares.
unsafe fn start<A: Copy>(device: &CudaDevice, launch: &Launch, args: &A) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { device.launch_grid(launch.module, &launch.function, &launch.grid, args) }
}

/// The part of `x` that the weight takes, checked for `m` rows.
fn input<'a>(device: &CudaDevice, x: &'a Act, w: &CudaPacked, m: usize) -> Result<&'a Buffer> {
    let int8 = w.takes_int8();
    let (tensor, dtype) = match (int8, x.codes.dtype()) {
        (true, DType::U8) => (&x.codes, DType::U8),
        (true, _) => (&x.codes, DType::I8),
        (false, _) => (&x.floats, device.dtype()),
    };
    if tensor.dtype() != dtype || tensor.len() < m * w.k {
        let expected = format!("[{m}, {}] of {dtype} as input", w.k);
        return Err(mismatch(expected, format!("{} of {}", tensor.len(), tensor.dtype())));
    }
    if int8 && (x.scales.dtype() != DType::F32 || x.scales.len() < m) {
        let expected = format!("{m} f32 scales of the input");
        return Err(mismatch(expected, format!("{} of {}", x.scales.len(), x.scales.dtype())));
    }
    if w.x_zeros && (x.zeros.dtype() != DType::I32 || x.zeros.len() < m) {
        let expected = format!("{m} i32 zero points of the input");
        return Err(mismatch(expected, format!("{} of {}", x.zeros.len(), x.zeros.dtype())));
    }
    tensor.cuda()
}

fn destination(
    device: &CudaDevice,
    out: &mut Tensor,
    columns: Columns,
    w: &CudaPacked,
    write: Write,
    m: usize,
) -> Result<LinearOut> {
    let mode = match (out.dtype(), write) {
        (DType::F32, Write::Store) => abi::LOWBIT_OUT_F32,
        (DType::F32, Write::Add) => abi::LOWBIT_OUT_F32_ADD,
        (DType::F16, Write::Store) if device.dtype() == DType::F16 => abi::LOWBIT_OUT_F16,
        (DType::BF16, Write::Store) if device.dtype() == DType::BF16 => abi::LOWBIT_OUT_BF16,
        (got, _) => return Err(mismatch(format!("a destination of f32 or {}", device.dtype()), got)),
    };
    let size = out.dtype().size_bytes();
    y(out.cuda_mut()?.ptr::<u8>().wrapping_add(columns.offset * size).cast(), columns.stride, mode, w, m)
}

/// A destination of floats.
fn y(out: *mut c_void, stride: usize, mode: u32, w: &CudaPacked, m: usize) -> Result<LinearOut> {
    let activation = match w.epilogue.activation {
        Activation::None => abi::LOWBIT_ACTIVATION_NONE,
        Activation::Relu => abi::LOWBIT_ACTIVATION_RELU,
        Activation::GeluTanh => abi::LOWBIT_ACTIVATION_GELU_TANH,
        Activation::GeluErf => abi::LOWBIT_ACTIVATION_GELU_ERF,
        Activation::Silu => abi::LOWBIT_ACTIVATION_SILU,
        Activation::SwiGlu => abi::LOWBIT_ACTIVATION_SWIGLU,
    };
    Ok(LinearOut {
        out,
        bias: pointer(&w.bias),
        scales: std::ptr::null_mut(),
        fixed: pointer(&w.fixed),
        scale: 1.0,
        zero: 0,
        flip: 0,
        activation,
        stride: u32_of(stride)?,
        mode,
        m: u32_of(m)?,
        n: u32_of(w.n)?,
    })
}

fn pointer<T>(buffer: &Option<Buffer>) -> *const T {
    buffer.as_ref().map_or(std::ptr::null(), |buffer| buffer.ptr::<T>().cast_const())
}

fn mismatch(expected: impl ToString, got: impl ToString) -> Error {
    Error::Shape { op: "linear", expected: expected.to_string(), got: got.to_string() }
}
