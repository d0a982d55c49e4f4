//! Op entry points of linear layers on the CPU device.

use super::host::{f32s, f32s_mut, host, i32s, narrow, shape_error, u32s, write_bytes};
use super::linear::{Destination, Input, write_codes, write_floats};
use super::{CpuDevice, CpuPacked, outliers, reference};
use crate::device::{Activation, Columns, LinearInput, Output, PackedBody, PackedWeight, Tensor, Write};
use crate::dtype::HostData;
use crate::error::Result;
use crate::quant::{ActQuant, Weight};
use reference::{Codes, Rounding};

pub(crate) fn linear(
    _device: &CpuDevice,
    out: &mut Tensor,
    columns: Columns,
    x: &LinearInput,
    w: &PackedWeight,
    write: Write,
    m: usize,
) -> Result<()> {
    let out = f32s_mut("linear out", out, m * columns.stride)?;
    let packed = packed(w)?;
    let input = OwnedInput::new(x, w, m)?;
    let y = match packed {
        CpuPacked::Fast(level, fast, _) if w.epilogue.activation == Activation::None => {
            fast.run(*level, &input.borrow(), Destination::new(out, columns, w.n, m, write), m);
            return Ok(());
        }
        CpuPacked::Fast(level, fast, _) => {
            let mut y = vec![0.0; m * w.n];
            let whole = Columns { offset: 0, stride: w.n };
            fast.run(*level, &input.borrow(), Destination::new(&mut y, whole, w.n, m, Write::Store), m);
            write_floats(*level, &mut y, w.n, w.epilogue, out, columns, write);
            return Ok(());
        }
        CpuPacked::Reference(weight) => match (&weight.weight, &input) {
            (Weight::Dense { data, .. }, OwnedInput::Floats(x)) => {
                narrow(reference::linear_dense(x, data, w.k, weight.bias.as_deref(), Rounding::Exact))
            }
            (Weight::Quant(q), OwnedInput::Floats(x)) => {
                let y = narrow(reference::linear_quant(x, q, weight.bias.as_deref(), Rounding::Exact));
                reference::activate_rows(y, q.n, w.epilogue.activation)
            }
            (Weight::Quant(_), OwnedInput::Codes(x)) => reference::linear_fused(x, weight, w.epilogue.activation),
            (Weight::Dense { .. }, OwnedInput::Codes(_)) => {
                return Err(shape_error("linear w", "a quantized weight for int8 activations", "an unquantized one"));
            }
        },
    };
    for (row, y) in out.chunks_exact_mut(columns.stride).zip(y.chunks_exact(w.outputs())) {
        let row = &mut row[columns.offset..columns.offset + y.len()];
        match write {
            Write::Store => row.copy_from_slice(y),
            Write::Add => row.iter_mut().zip(y).for_each(|(out, y)| *out += y),
        }
    }
    Ok(())
}

pub(crate) fn linear_codes(
    _device: &CpuDevice,
    out: &mut LinearInput,
    x: &LinearInput,
    w: &PackedWeight,
    m: usize,
) -> Result<()> {
    let packed = packed(w)?;
    let input = OwnedInput::new(x, w, m)?;
    let OwnedInput::Codes(x) = &input else {
        return Err(shape_error("linear_codes x", "int8 activations", "floats"));
    };
    let result = match packed {
        CpuPacked::Reference(weight) => reference::linear_codes(x, weight, w.epilogue)?,
        CpuPacked::Fast(level, fast, fixed) => {
            let mut y = vec![0.0; m * w.n];
            let to = Destination::new(&mut y, Columns { offset: 0, stride: w.n }, w.n, m, Write::Store);
            match w.epilogue.output {
                Output::FixedPoint { .. } => fast.run_sums(*level, &input.borrow(), to, m),
                _ => fast.run(*level, &input.borrow(), to, m),
            }
            let mut result = Codes {
                codes: vec![0; m * w.outputs()],
                scales: vec![0.0; m * w.epilogue.scales(w.n)],
                zeros: Vec::new(),
                outliers: Vec::new(),
            };
            write_codes(*level, &mut y, w.n, w.epilogue, fixed, &x.scales, (&mut result.codes, &mut result.scales));
            result
        }
    };
    f32s_mut("linear_codes scales", &mut out.scales, result.scales.len())?.copy_from_slice(&result.scales);
    write_bytes(&mut out.codes, &result.codes)
}

fn packed(w: &PackedWeight) -> Result<&CpuPacked> {
    match &w.body {
        PackedBody::Cpu(packed) => Ok(packed),
        #[cfg(lowbit_cuda)]
        PackedBody::Cuda(_) => Err(shape_error("linear w", "a weight packed by this device", "one packed for CUDA")),
    }
}

/// The part of an [`LinearInput`] that a weight takes, codes signed and with a zero point for each row.
enum OwnedInput<'a> {
    Floats(&'a [f32]),
    Codes(Codes),
}

impl<'a> OwnedInput<'a> {
    fn new(x: &'a LinearInput, w: &PackedWeight, m: usize) -> Result<Self> {
        let activation = w.scheme.activation;
        if activation == ActQuant::None {
            return Ok(OwnedInput::Floats(f32s("linear x", &x.floats, m * w.k)?));
        }
        let codes = match host("linear codes", &x.codes)? {
            HostData::I8(codes) if codes.len() >= m * w.k => codes[..m * w.k].to_vec(),
            HostData::U8(codes) if codes.len() >= m * w.k => {
                codes[..m * w.k].iter().map(|&code| (code ^ 0x80) as i8).collect()
            }
            other => {
                let expected = format!("{} codes of i8 or u8", m * w.k);
                return Err(shape_error("linear codes", expected, format!("{} of {}", other.len(), other.dtype())));
            }
        };
        let zeros = match activation {
            ActQuant::DynamicAsymmetric => i32s("linear zero points", &x.zero_points, m)?.to_vec(),
            _ => vec![activation.zero_point(); m],
        };
        let outliers = match activation {
            ActQuant::LlmInt8 { .. } => {
                let bits = u32s("linear outliers", &x.outliers, m * LinearInput::outlier_words(w.k))?;
                outliers::values(bits, f32s("linear x", &x.floats, m * w.k)?, w.k)
            }
            _ => Vec::new(),
        };
        Ok(OwnedInput::Codes(Codes { codes, scales: f32s("linear scales", &x.scales, m)?.to_vec(), zeros, outliers }))
    }

    fn borrow(&self) -> Input<'_> {
        match self {
            OwnedInput::Floats(x) => Input::Floats(x),
            OwnedInput::Codes(x) => {
                Input::Codes { codes: &x.codes, scales: &x.scales, zeros: &x.zeros, outliers: &x.outliers }
            }
        }
    }
}
