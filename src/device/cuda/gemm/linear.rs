//! The op `linear`: checks of input and destination, and what kernels are told of both.

use std::ffi::c_void;

use super::family::{Input, Weight, address};
use super::weight::CudaPacked;
use crate::device::cuda::context::CudaDevice;
use crate::device::cuda::embedded::abi::{self, LinearOut};
use crate::device::cuda::kernel::u32_of;
use crate::device::cuda::ops::emit::flip;
use crate::device::{Activation, Columns, LinearInput, Output, Tensor, Write};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// `out[r, columns] (+)= x[r, :] * w^T + bias`; the op table has checked `out`.
pub(crate) fn linear(
    device: &CudaDevice,
    out: &mut Tensor,
    columns: Columns,
    x: &LinearInput,
    w: &CudaPacked,
    write: Write,
    m: usize,
) -> Result<()> {
    let y = destination(device, out, columns, &w.weight, write, m)?;
    w.runner.run(&w.weight, y, &input(device, x, w, m)?)
}

/// `out = codes of activation(x * w^T + bias)`; the op table has checked `out`.
pub(crate) fn linear_codes(
    device: &CudaDevice,
    out: &mut LinearInput,
    x: &LinearInput,
    w: &CudaPacked,
    m: usize,
) -> Result<()> {
    let (mode, scale, zero_point) = match w.weight.epilogue.output {
        Output::Floats => return Err(mismatch("a weight whose epilogue quantizes", "one that gives floats")),
        Output::Static { scale, zero_point } => (abi::LOWBIT_OUT_STATIC, scale, zero_point),
        Output::FixedPoint { scale, zero_point } => (abi::LOWBIT_OUT_FIXED, scale, zero_point),
        Output::Groups => (abi::LOWBIT_OUT_GROUPS, 1.0, 0),
    };
    let y = LinearOut {
        scales: out.scales.cuda_mut()?.ptr(),
        scale,
        zero_point,
        flip: flip(&out.codes),
        ..y(out.codes.cuda_mut()?.ptr(), w.weight.epilogue.outputs(w.weight.n), mode, &w.weight, m)?
    };
    w.runner.run(&w.weight, y, &input(device, x, w, m)?)
}

/// The part of `x` that the weight takes, checked for `m` rows.
fn input(device: &CudaDevice, x: &LinearInput, w: &CudaPacked, m: usize) -> Result<Input> {
    let int8 = w.runner.takes_int8();
    let w_k = w.weight.k;
    let (tensor, dtype) = match (int8, x.codes.dtype()) {
        (true, DType::U8) => (&x.codes, DType::U8),
        (true, _) => (&x.codes, DType::I8),
        (false, _) => (&x.floats, device.dtype()),
    };
    if tensor.dtype() != dtype || tensor.len() < m * w_k {
        let expected = format!("[{m}, {w_k}] of {dtype} as input");
        return Err(mismatch(expected, format!("{} of {}", tensor.len(), tensor.dtype())));
    }
    let mut input = Input {
        m,
        x: tensor.cuda()?.ptr::<c_void>().cast_const(),
        flip: 0,
        scales: std::ptr::null(),
        zero_points: std::ptr::null(),
        outliers: std::ptr::null(),
        floats: std::ptr::null(),
    };
    if int8 {
        if x.scales.dtype() != DType::F32 || x.scales.len() < m {
            let expected = format!("{m} f32 scales of the input");
            return Err(mismatch(expected, format!("{} of {}", x.scales.len(), x.scales.dtype())));
        }
        input.flip = flip(&x.codes);
        input.scales = x.scales.cuda()?.ptr();
    }
    if w.weight.has_x_zero_points {
        if x.zero_points.dtype() != DType::I32 || x.zero_points.len() < m {
            let expected = format!("{m} i32 zero points of the input");
            return Err(mismatch(expected, format!("{} of {}", x.zero_points.len(), x.zero_points.dtype())));
        }
        input.zero_points = x.zero_points.cuda()?.ptr();
    }
    if w.runner.takes_outliers() {
        let (bits, values) = (m * LinearInput::outlier_words(w_k), m * w_k);
        let fits = x.outliers.dtype() == DType::U32 && x.outliers.len() >= bits;
        if input.flip != 0 || !fits || x.floats.dtype() != device.dtype() || x.floats.len() < values {
            let expected = format!("int8 codes, {bits} words of outliers and {values} of {}", device.dtype());
            return Err(mismatch(expected, format!("{}, {}, {}", x.codes.dtype(), x.outliers.len(), x.floats.len())));
        }
        input.outliers = x.outliers.cuda()?.ptr();
        input.floats = x.floats.cuda()?.ptr();
    }
    Ok(input)
}

fn destination(
    device: &CudaDevice,
    out: &mut Tensor,
    columns: Columns,
    w: &Weight,
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
fn y(out: *mut c_void, stride: usize, mode: u32, w: &Weight, m: usize) -> Result<LinearOut> {
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
        bias: address(&w.bias),
        scales: std::ptr::null_mut(),
        fixed: address(&w.fixed),
        scale: 1.0,
        zero_point: 0,
        flip: 0,
        activation,
        stride: u32_of(stride)?,
        mode,
        m: u32_of(m)?,
        n: u32_of(w.n)?,
    })
}

fn mismatch(expected: impl ToString, got: impl ToString) -> Error {
    Error::Shape { op: "linear", expected: expected.to_string(), got: got.to_string() }
}
