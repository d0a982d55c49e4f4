//! Linear layers, ours and cuBLASLt's, on the shapes and rows asked for.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::device::cuda::CudaDevice;
use crate::device::{
    Activation, Columns, Device, Epilogue, InputFormat, LinearInput, Output, PackedWeight, Tensor, Write,
};
use crate::dtype::{DType, HostData};
use crate::error::{Error, Result};
use crate::models::{DummyScheme, dummy_linear, fill_random};
use crate::quant::{ActQuant, LinearWeight, Weight};

use super::measure::{Bench, copies};
use super::report::{Measurement, Peer, Rates, Timing, Unit};
use super::{Op, Selection, Shape};

/// Products large enough for any kernel's best rate: shape and rows.
const LARGE: [(Shape, usize); 3] =
    [(Shape { n: 8192, k: 8192 }, 8192), (Shape { n: 28672, k: 4096 }, 4096), (Shape { n: 4096, k: 14336 }, 4096)];
const UNITS: [Unit; 2] = [Unit::Int8, Unit::Float16];

/// Times of one kernel for each number of rows; `None` where it does not take the shape.
type Sweep = Vec<Option<Timing>>;

/// What a linear op multiplies, and what becomes of its sums.
#[derive(Clone, Copy)]
pub(super) struct Layer {
    scheme: DummyScheme,
    unit: Unit,
    epilogue: Epilogue,
    /// The input in codes of this type.
    codes: DType,
    /// The input with outliers in 16 bit beside its codes.
    outliers: bool,
    /// Zero points that differ.
    asymmetric: bool,
    /// Scales that are no floats of the activation type.
    fine_scales: bool,
    /// Scales that are whole multiples of one a row.
    progressive: bool,
    /// Columns sorted by group, in an order that is not the input's.
    act_order: bool,
    /// Behind the RMSNorm that makes its input, and gathers it for [`Self::act_order`].
    norm: bool,
}

impl Layer {
    const DENSE: Layer = Layer::plain(DummyScheme::Bf16, Unit::Float16);

    const fn plain(scheme: DummyScheme, unit: Unit) -> Layer {
        let (epilogue, codes) = (Epilogue::NONE, DType::I8);
        let (outliers, asymmetric, fine_scales, progressive) = (false, false, false, false);
        let (act_order, norm) = (false, false);
        Layer { scheme, unit, epilogue, codes, outliers, asymmetric, fine_scales, progressive, act_order, norm }
    }

    pub(super) fn of(op: Op) -> Option<Layer> {
        let w8a8 = Layer::plain(DummyScheme::Int8(8, 0), Unit::Int8);
        let w4a8 = Layer::plain(DummyScheme::Int8(4, 128), Unit::Int8);
        let w4a16 = Layer::plain(DummyScheme::WeightOnly(4, 128), Unit::Float16);
        let swiglu = Epilogue { activation: Activation::SwiGlu, output: Output::Static { scale: 0.05, zero_point: 0 } };
        Some(match op {
            Op::W8a8 => w8a8,
            Op::W8a8Swiglu => Layer { epilogue: swiglu, ..w8a8 },
            Op::W8a8U8 => Layer { codes: DType::U8, ..w8a8 },
            Op::LlmInt8 => Layer { outliers: true, ..w8a8 },
            Op::W4a8 => w4a8,
            Op::W4a8Progressive => Layer { progressive: true, ..w4a8 },
            Op::W4a16 => w4a16,
            Op::W4a16Asymmetric => Layer { asymmetric: true, ..w4a16 },
            Op::W4a16FineScales => Layer { fine_scales: true, ..w4a16 },
            Op::W4a16Norm => Layer { norm: true, ..w4a16 },
            Op::W4a16ActOrder => Layer { norm: true, act_order: true, ..w4a16 },
            Op::W8a16 => Layer::plain(DummyScheme::WeightOnly(8, 128), Unit::Float16),
            Op::Fp8a16 => Layer::plain(DummyScheme::Fp8(128), Unit::Float16),
            Op::Dense => Layer::DENSE,
            _ => return None,
        })
    }

    /// Whether its weights run as they do elsewhere, so that a table may be made of their times.
    pub(super) fn is_tunable(&self) -> bool {
        self.epilogue == Epilogue::NONE && self.codes == DType::I8 && !self.norm
    }

    /// Bytes read of each row of the input, of `k` columns.
    fn x_bytes(&self, k: usize) -> usize {
        match self.unit {
            Unit::Int8 => k + 4,
            Unit::Float16 if self.norm => 4 * k,
            Unit::Float16 => 2 * k,
        }
    }

    /// Bytes written of each row of a weight of `n` rows.
    fn out_bytes(&self, n: usize) -> usize {
        let size = if self.epilogue.output == Output::Floats { 2 } else { 1 };
        size * self.epilogue.outputs(n)
    }
}

fn linear_ops(selection: &Selection) -> Vec<(Op, Layer)> {
    selection.ops.iter().filter_map(|&op| Some((op, Layer::of(op)?))).collect()
}

/// Whether cuBLASLt's int8 product is wanted beside them.
fn needs_int8(ops: &[(Op, Layer)]) -> bool {
    ops.iter().any(|(_, layer)| layer.unit == Unit::Int8)
}

/// True where an op multiplies matrices: its ceilings are wanted.
fn wants_tensor(selection: &Selection) -> bool {
    !linear_ops(selection).is_empty() || selection.ops.contains(&Op::Attention)
}

/// Number of measurements.
pub(super) fn count(selection: &Selection) -> usize {
    let ops = linear_ops(selection);
    let quantized = ops.iter().filter(|(op, _)| *op != Op::Dense).count();
    let series = quantized + usize::from(needs_int8(&ops)) + usize::from(!ops.is_empty());
    let ceilings = if wants_tensor(selection) { UNITS.len() * LARGE.len() } else { 0 };
    selection.shapes.len() * selection.rows.len() * series + ceilings
}

/// Fails where the largest measurement does not fit.
///
/// # Errors
/// `OutOfMemory`, naming the shape.
pub(super) fn check_memory(device: &Device, selection: &Selection) -> Result<()> {
    if linear_ops(selection).is_empty() {
        return Ok(());
    }
    let rows = most(&selection.rows);
    let (free_bytes, _) = device.memory()?;
    for shape in &selection.shapes {
        let bytes = |weight: usize, out: usize| copies(weight) as u128 * (weight as u128 + rows as u128 * out as u128);
        let (weights, n) = (shape.n * shape.k, shape.n);
        // 4-bit ops have the most copies, int8 peers the widest outputs, 16-bit ones the largest weights.
        let needed = bytes(weights / 2, 2 * n).max(bytes(weights, 4 * n)).max(bytes(2 * weights, 2 * n));
        let needed_bytes = (needed + 3 * rows as u128 * shape.k as u128).min(u64::MAX.into()) as u64;
        if needed_bytes > free_bytes {
            let what = format!("--shapes {shape} with {rows} rows");
            let advice = "Ask for fewer --rows or a smaller shape".into();
            return Err(Error::OutOfMemory { what, needed_bytes, free_bytes, advice, grows_with_sequences: false });
        }
    }
    Ok(())
}

/// Measures the tensor ceilings, then every linear op selected.
pub(super) fn measure(bench: &mut Bench, selection: &Selection) -> Result<()> {
    let large: &[(Shape, usize)] = if wants_tensor(selection) { &LARGE } else { &[] };
    for &(shape, m) in large {
        let mut x = plain_input(&bench.device, shape.k, m)?;
        for unit in UNITS {
            for time in blas(bench, unit, shape, &mut x, &[m])?.into_iter().flatten() {
                let source = || format!("cuBLASLt {shape}, m = {m}");
                bench.ceilings.raise(unit, time.per_s(operations(shape, m)), source);
            }
        }
    }
    let (ops, rows) = (linear_ops(selection), &selection.rows);
    let shapes: &[Shape] = if ops.is_empty() { &[] } else { &selection.shapes };
    for &shape in shapes {
        let mut x = plain_input(&bench.device, shape.k, most(rows))?;
        let int8 =
            if needs_int8(&ops) { blas(bench, Unit::Int8, shape, &mut x, rows)? } else { vec![None; rows.len()] };
        let float16 = blas(bench, Unit::Float16, shape, &mut x, rows)?;
        for (op, layer) in &ops {
            measure_op(bench, (*op, layer), shape, &mut x, rows, [&int8, &float16])?;
        }
    }
    Ok(())
}

/// Measures one op on one shape; `x` is the plain input, `blas` are cuBLASLt's times, in int8 and in 16 bit.
fn measure_op(
    bench: &mut Bench,
    (op, layer): (Op, &Layer),
    shape: Shape,
    x: &mut LinearInput,
    rows: &[usize],
    blas: [&Sweep; 2],
) -> Result<()> {
    let unit = layer.unit;
    let weights = weights(&bench.gpu, layer, shape)?;
    let weight = &weights[0];
    let runs_blas = weight.kernel(1) == BLAS;
    let times = match runs_blas {
        true => blas[1].clone(), // measured already
        false if layer.norm => behind_norm(bench, &weights, rows)?,
        false => {
            let mut own = own_input(&bench.device, layer, shape.k, most(rows))?;
            ours(bench, &weights, own.as_mut().unwrap_or(x), rows)?
        }
    };
    for (i, (&m, time)) in rows.iter().zip(times).enumerate() {
        let Some(time) = time else { continue };
        let peer = |(peer, sweep): (Unit, &Sweep)| {
            let is_fair = !runs_blas && (peer == Unit::Float16 || unit == Unit::Int8);
            Some(Peer::new(peer, sweep[i].clone().filter(|_| is_fair)?, &time))
        };
        bench.measurements.push(Measurement {
            op,
            shape: shape.to_string(),
            m,
            kernel: weight.kernel(m),
            unit: Some(unit),
            bytes: (weight.bytes() + m * (layer.x_bytes(shape.k) + layer.out_bytes(shape.n))) as u64,
            operations: operations(shape, m),
            peers: UNITS.into_iter().zip(blas).filter_map(peer).collect(),
            time,
            rates: Rates::default(),
        });
    }
    Ok(())
}

/// Times of our own kernels, or of what the device runs instead.
fn ours(bench: &mut Bench, weights: &[PackedWeight], x: &mut LinearInput, rows: &[usize]) -> Result<Sweep> {
    x.record(weights[0].input_format(), most(rows), weights[0].k);
    let x = &*x;
    let n = weights[0].outputs();
    let columns = Columns { offset: 0, stride: n };
    let device = bench.device.clone();
    if weights[0].epilogue.output == Output::Floats {
        let mut outs = outputs(&device, device.activation_dtype(), weights.len(), n, rows)?;
        let mut time =
            |m| bench.time(weights.len(), |i| device.linear(&mut outs[i], columns, x, &weights[i], Write::Store, m));
        return rows.iter().map(|&m| time(m).map(Some)).collect();
    }
    let mut outs = (0..weights.len()).map(|_| LinearInput::new(&device, most(rows), n)).collect::<Result<Vec<_>>>()?;
    let mut time = |m| bench.time(weights.len(), |i| device.linear_codes(&mut outs[i], x, &weights[i], m));
    rows.iter().map(|&m| time(m).map(Some)).collect()
}

/// The same behind the norm of a residual stream, as a decoder layer runs it.
fn behind_norm(bench: &mut Bench, weights: &[PackedWeight], rows: &[usize]) -> Result<Sweep> {
    let (n, k, most) = (weights[0].outputs(), weights[0].k, most(rows));
    let device = bench.device.clone();
    let stream = device.upload(random(DType::F32, most * k, 2))?;
    let norm = device.upload(random(DType::F32, k, 5))?;
    let mut x = LinearInput::new(&device, most, k)?;
    let mut outs = outputs(&device, device.activation_dtype(), weights.len(), n, rows)?;
    let mut op = |i: usize, m: usize| {
        let format = InputFormat { quant: ActQuant::None, ..weights[i].input_format() };
        device.rms_norm(&mut x, &stream, &norm, 1e-5, format, m)?;
        device.linear(&mut outs[i], Columns { offset: 0, stride: n }, &x, &weights[i], Write::Store, m)
    };
    rows.iter().map(|&m| bench.time(weights.len(), |i| op(i, m)).map(Some)).collect()
}

/// Times of cuBLASLt, all `None` where it is not there.
fn blas(bench: &mut Bench, unit: Unit, shape: Shape, x: &mut LinearInput, rows: &[usize]) -> Result<Sweep> {
    let Shape { n, k } = shape;
    if unit == Unit::Float16 {
        let weights = weights(&bench.gpu, &Layer::DENSE, shape)?;
        let is_blas = weights[0].kernel(1) == BLAS;
        return if is_blas { ours(bench, &weights, x, rows) } else { Ok(vec![None; rows.len()]) };
    }
    let copies = copies(n * k);
    let codes = random(DType::I8, n * k, 1);
    let (device, gpu) = (bench.device.clone(), bench.gpu.clone());
    let weights = (0..copies).map(|_| device.upload(codes.clone())).collect::<Result<Vec<_>>>()?;
    let mut outs = outputs(&device, DType::I32, copies, n, rows)?;
    let mut time = |m| {
        let mut product = |i: usize| gpu.blas_int8(&mut outs[i], &x.codes, &weights[i], [m, n, k]);
        if !product(0)? {
            return Ok(None);
        }
        bench.time(copies, |i| product(i).map(drop)).map(Some)
    };
    rows.iter().map(|&m| time(m)).collect()
}

/// What [`PackedWeight::kernel`] calls cuBLASLt.
const BLAS: &str = "cublaslt";

fn operations(shape: Shape, m: usize) -> u64 {
    2 * (m * shape.n * shape.k) as u64
}

/// Copies of one random weight.
pub(super) fn weights(gpu: &CudaDevice, layer: &Layer, shape: Shape) -> Result<Vec<PackedWeight>> {
    let device = Device::Cuda(gpu.clone());
    let mut weight = dummy_linear(layer.scheme, shape.n, shape.k, false, 1);
    to_dtype(&mut weight, gpu.dtype());
    if layer.outliers {
        weight.activation = OUTLIERS;
    }
    if let Weight::Quant(q) = &mut weight.weight {
        if layer.asymmetric {
            q.zeros.iter_mut().enumerate().for_each(|(i, zero)| *zero = (3 + i % 10) as f32);
        }
        if layer.fine_scales {
            q.scales.iter_mut().for_each(|scale| *scale = between(*scale, gpu.dtype()));
        }
        if layer.progressive {
            let unit = q.scales[0] / 16.0;
            q.scales.iter_mut().enumerate().for_each(|(i, scale)| *scale = (9 + i % 8) as f32 * unit);
        }
        q.order = layer.act_order.then(|| shuffled(q.k));
    }
    let first = device.pack_fused(weight, layer.epilogue)?;
    let copies = copies(first.bytes());
    let mut weights = (1..copies).map(|_| gpu.duplicate(&first)).collect::<Result<Vec<_>>>()?;
    weights.push(first);
    Ok(weights)
}

/// In the middle between `x`, a positive float of `dtype`, and the next such.
fn between(x: f32, dtype: DType) -> f32 {
    let next = match dtype {
        DType::F16 => f16::from_bits(f16::from_f32(x).to_bits() + 1).to_f32(),
        _ => bf16::from_bits(bf16::from_f32(x).to_bits() + 1).to_f32(),
    };
    (x + next) / 2.0
}

/// `0..len` in random order.
fn shuffled(len: usize) -> Vec<u32> {
    let mut keys = vec![0; 4 * len];
    fill_random(&mut keys, 6);
    let mut order: Vec<u32> = (0..len as u32).collect();
    order.sort_by_key(|&i| &keys[4 * i as usize..4 * i as usize + 4]);
    order
}

/// A dense bf16 weight in f16, by all threads.
fn to_dtype(weight: &mut LinearWeight, dtype: DType) {
    if let Weight::Dense { data, .. } = &mut weight.weight
        && let (HostData::BF16(values), DType::F16) = (&*data, dtype)
    {
        *data = HostData::F16(values.par_iter().map(|x| f16::from_f32(x.to_f32())).collect());
    }
}

pub(super) fn outputs(device: &Device, dtype: DType, copies: usize, n: usize, rows: &[usize]) -> Result<Vec<Tensor>> {
    (0..copies).map(|_| device.zeros(dtype, most(rows) * n)).collect()
}

pub(super) fn most(rows: &[usize]) -> usize {
    rows.iter().copied().max().unwrap_or(0)
}

const OUTLIERS: ActQuant = ActQuant::LlmInt8 { threshold: 6.0 };
/// Columns of which one holds outliers.
const OUTLIER_COLUMNS: usize = 512;

/// Input of `m` rows in both forms. All copies of a weight meet the same rows: a producer has just left them in L2.
pub(super) fn plain_input(device: &Device, k: usize, m: usize) -> Result<LinearInput> {
    let mut x = LinearInput::new(device, m, k)?;
    device.write(&mut x.floats, &random(device.activation_dtype(), m * k, 2))?;
    device.write(&mut x.codes, &random(DType::I8, m * k, 3))?;
    device.write(&mut x.scales, &random(DType::F32, m, 4))?;
    Ok(x)
}

/// The input of a layer that takes another than [`plain_input`]: uint8 codes, or outliers beside the codes.
pub(super) fn own_input(device: &Device, layer: &Layer, k: usize, m: usize) -> Result<Option<LinearInput>> {
    if layer.codes == DType::I8 && !layer.outliers {
        return Ok(None);
    }
    let mut x = plain_input(device, k, m)?;
    if layer.codes != DType::I8 {
        x.codes = device.upload(random(layer.codes, m * k, 3))?;
    }
    if layer.outliers {
        let mut values = random(device.activation_dtype(), m * k, 2).to_f32();
        values.iter_mut().skip(5).step_by(OUTLIER_COLUMNS).for_each(|x| *x = 20.0 + x.abs());
        let values = device.upload(HostData::from_f32(device.activation_dtype(), values))?;
        device.quantize(&mut x, &values, k, InputFormat::quantized(OUTLIERS), m)?;
    }
    Ok(Some(x))
}

/// Random elements: floats within 1.73 of 0, with a deviation of 1; any integer of 8 bits. Arithmetic on zeros draws
/// less power and runs faster than on real data.
pub(super) fn random(dtype: DType, len: usize, seed: u64) -> HostData {
    let mut bytes = vec![0; len];
    fill_random(&mut bytes, seed);
    let float = |byte: &u8| (f32::from(*byte) - 127.5) / 73.9;
    match dtype {
        DType::F16 => HostData::F16(bytes.par_iter().map(|b| f16::from_f32(float(b))).collect()),
        DType::BF16 => HostData::BF16(bytes.par_iter().map(|b| bf16::from_f32(float(b))).collect()),
        DType::I8 => HostData::I8(bytes.into_par_iter().map(|b| b as i8).collect()),
        DType::U8 => HostData::U8(bytes),
        _ => HostData::F32(bytes.par_iter().map(float).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two floats of the activation type hold such a scale, one does not; under bf16 it is a float of f16.
    #[test]
    fn fine_scales_take_two_parts() {
        for dtype in [DType::F16, DType::BF16] {
            let nearest = |x: f32| HostData::from_f32(dtype, vec![x]).to_f32()[0];
            for step in 0..7 {
                let scale = nearest(0.0013 * (1.0 + step as f32 / 32.0));
                let fine = between(scale, dtype);
                let high = nearest(fine);
                assert!(fine > scale && high != fine && nearest(fine - high) == fine - high, "{fine} in {dtype}");
                assert!(dtype == DType::F16 || f16::from_f32(fine).to_f32() == fine, "{fine} in f16");
            }
        }
    }
}
