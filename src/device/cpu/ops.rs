//! Op entry points of the CPU device, one per line of the op table in `device/mod.rs`: they check what only the CPU can
//! check cheaply (ids, slots and block numbers in range), then run the specification or a fast path.

use rayon::prelude::*;

use super::host::{f32s, f32s_mut, host, host_mut, narrow, shape_error, u32s, write_bytes};
use super::linear::FastWeight;
use super::rows::{self, Emitted, Producer};
use super::sample::Chooser;
use super::{CpuDevice, CpuPacked, attention, check, memory, outliers, reference};
use crate::device::tensor::TensorData;
use crate::device::{
    ActOrder, AttentionShape, BatchMeta, Device, Epilogue, HeadNorms, InputFormat, KvLayer, LinearInput, PackedBody,
    PackedWeight, RopeRows, SampleRow, Tensor,
};
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::quant::{ActQuant, LinearWeight, Weight};
use reference::{Codes, Rounding};

pub(crate) use super::linear_ops::{linear, linear_codes};

pub(crate) fn memory(_device: &CpuDevice) -> Result<(u64, u64)> {
    memory::free_and_total()
}

pub(crate) fn zeros(_device: &CpuDevice, dtype: DType, len: usize) -> Result<Tensor> {
    Ok(Tensor { data: TensorData::Host(HostData::zeros(dtype, len)) })
}

pub(crate) fn upload(_device: &CpuDevice, data: HostData) -> Result<Tensor> {
    Ok(Tensor { data: TensorData::Host(data) })
}

pub(crate) fn write(_device: &CpuDevice, dst: &mut Tensor, data: &HostData) -> Result<()> {
    match (host_mut("write", dst)?, data) {
        (HostData::F32(dst), HostData::F32(data)) => dst[..data.len()].copy_from_slice(data),
        (HostData::F16(dst), HostData::F16(data)) => dst[..data.len()].copy_from_slice(data),
        (HostData::BF16(dst), HostData::BF16(data)) => dst[..data.len()].copy_from_slice(data),
        (HostData::I8(dst), HostData::I8(data)) => dst[..data.len()].copy_from_slice(data),
        (HostData::U8(dst), HostData::U8(data)) => dst[..data.len()].copy_from_slice(data),
        (HostData::I32(dst), HostData::I32(data)) => dst[..data.len()].copy_from_slice(data),
        (HostData::U32(dst), HostData::U32(data)) => dst[..data.len()].copy_from_slice(data),
        (dst, data) => return Err(shape_error("write", dst.dtype(), data.dtype())),
    }
    Ok(())
}

pub(crate) fn download(_device: &CpuDevice, src: &Tensor, len: usize) -> Result<HostData> {
    Ok(match host("download", src)? {
        HostData::F32(v) => HostData::F32(v[..len].to_vec()),
        HostData::F16(v) => HostData::F16(v[..len].to_vec()),
        HostData::BF16(v) => HostData::BF16(v[..len].to_vec()),
        HostData::I8(v) => HostData::I8(v[..len].to_vec()),
        HostData::U8(v) => HostData::U8(v[..len].to_vec()),
        HostData::I32(v) => HostData::I32(v[..len].to_vec()),
        HostData::U32(v) => HostData::U32(v[..len].to_vec()),
    })
}

pub(crate) fn synchronize(_device: &CpuDevice) -> Result<()> {
    Ok(())
}

/// All that [`Epilogue::check`] passes.
pub(crate) fn check_epilogue(_device: &CpuDevice, _weight: &LinearWeight, _epilogue: Epilogue) -> Result<()> {
    Ok(())
}

pub(crate) fn pack(device: &CpuDevice, mut weight: LinearWeight, epilogue: Epilogue) -> Result<PackedWeight> {
    check(&weight)?;
    epilogue.check(&weight)?;
    let (n, k, scheme) = (weight.n(), weight.k(), weight.scheme());
    if let Some((q, factored)) = weight.factored() {
        weight.weight = Weight::Quant(factored.int8_rows(q));
    }
    let order = match &mut weight.weight {
        Weight::Quant(q) => {
            let _unpacked: &[u8] = &q.codes; // before cores share the work
            q.order.take()
        }
        Weight::Dense { .. } => None,
    };
    let packed = match device.level {
        None => CpuPacked::Reference(weight),
        Some(level) => {
            let fixed = epilogue.fixed_point(&weight)?;
            CpuPacked::Fast(level, FastWeight::pack(weight), fixed)
        }
    };
    let order = order.map(|order| ActOrder::upload(&Device::Cpu(device.clone()), order)).transpose()?;
    let body = PackedBody::Cpu(Box::new(packed));
    Ok(PackedWeight { n, k, scheme, order, output_order: None, epilogue, body })
}

pub(crate) fn embed(
    _device: &CpuDevice,
    out: &mut Tensor,
    table: &Tensor,
    ids: &Tensor,
    width: usize,
    m: usize,
) -> Result<()> {
    let table = host("embed table", table)?;
    let ids = below("embed ids", u32s("embed ids", ids, m)?, table.len() / width.max(1))?;
    f32s_mut("embed out", out, m * width)?.copy_from_slice(&reference::embed(table, ids, width));
    Ok(())
}

pub(crate) fn gather_rows(
    _device: &CpuDevice,
    out: &mut Tensor,
    x: &Tensor,
    rows: &Tensor,
    width: usize,
    m: usize,
) -> Result<()> {
    let x = f32s("gather_rows x", x, x.len())?;
    let rows = below("gather_rows rows", u32s("gather_rows rows", rows, m)?, x.len() / width.max(1))?;
    f32s_mut("gather_rows out", out, m * width)?.copy_from_slice(&reference::gather_rows(x, rows, width));
    Ok(())
}

pub(crate) fn rms_norm(
    device: &CpuDevice,
    out: &mut LinearInput,
    x: &Tensor,
    weight: &Tensor,
    eps: f32,
    format: InputFormat<'_>,
    m: usize,
) -> Result<()> {
    let weight = f32s("rms_norm weight", weight, weight.len())?;
    let x = f32s("rms_norm x", x, m * weight.len())?;
    let specified = || narrow(reference::rms_norm(x, weight, eps, Rounding::Exact));
    write_rows(device, out, &Producer::RmsNorm { x, weight, eps }, specified, format, weight.len(), m)
}

#[allow(clippy::too_many_arguments)] // those of the op
pub(crate) fn sub_norm(
    device: &CpuDevice,
    out: &mut LinearInput,
    x: &Tensor,
    gated: bool,
    weight: &Tensor,
    eps: f32,
    format: InputFormat<'_>,
    m: usize,
) -> Result<()> {
    let weight = f32s("sub_norm weight", weight, weight.len())?;
    let x = f32s("sub_norm x", x, m * weight.len() * if gated { 2 } else { 1 })?;
    let specified = || narrow(reference::sub_norm(x, gated, weight, eps, Rounding::Exact));
    write_rows(device, out, &Producer::SubNorm { x, gated, weight, eps }, specified, format, weight.len(), m)
}

pub(crate) fn silu_mul(
    device: &CpuDevice,
    out: &mut LinearInput,
    gate_up: &Tensor,
    k: usize,
    format: InputFormat<'_>,
    m: usize,
) -> Result<()> {
    let gate_up = f32s("silu_mul gate_up", gate_up, m * 2 * k)?;
    let row = |row: &[f32]| -> Vec<f32> {
        let (gate, up) = row.split_at(k);
        gate.iter().zip(up).map(|(&gate, &up)| reference::swiglu(gate, up)).collect()
    };
    let specified = || gate_up.chunks_exact(2 * k).flat_map(row).collect();
    write_rows(device, out, &Producer::SiluMul { gate_up }, specified, format, k, m)
}

pub(crate) fn quantize(
    device: &CpuDevice,
    out: &mut LinearInput,
    x: &Tensor,
    k: usize,
    format: InputFormat<'_>,
    m: usize,
) -> Result<()> {
    let x = f32s("quantize x", x, m * k)?;
    write_rows(device, out, &Producer::Copy { x }, || x.to_vec(), format, k, m)
}

pub(crate) fn rope_kv_write(
    device: &CpuDevice,
    cache: &mut KvLayer,
    qkv: &mut Tensor,
    norm: Option<HeadNorms<'_>>,
    of_rows: RopeRows<'_>,
    shape: &AttentionShape,
    m: usize,
) -> Result<()> {
    let table = f32s("rope_kv_write table", of_rows.table, of_rows.table.len())?;
    let positions = u32s("rope_kv_write positions", of_rows.positions, m)?;
    let positions = below("rope_kv_write positions", positions, table.len() / shape.head_dim)?;
    let slots = u32s("rope_kv_write slot_mapping", of_rows.slot_mapping, m)?;
    let capacity = cache.k.len().min(cache.v.len()) / (shape.num_kv_heads * shape.head_dim);
    if let Some(&slot) = slots.iter().find(|&&s| s != u32::MAX && s as usize >= capacity) {
        return Err(shape_error("rope_kv_write slot_mapping", format!("slots below {capacity}"), slot));
    }
    let qkv = f32s_mut("rope_kv_write qkv", qkv, m * shape.qkv_width())?;
    if let Some(HeadNorms { q, k, eps }) = norm {
        let q = f32s("rope_kv_write q_weight", q, shape.head_dim)?;
        let k = f32s("rope_kv_write k_weight", k, shape.head_dim)?;
        match device.level {
            Some(level) => rows::qk_norm(level, qkv, q, k, eps, shape),
            None => qkv.copy_from_slice(&narrow(reference::qk_norm(qkv, q, k, eps, shape, Rounding::Exact))),
        }
    }
    match device.level {
        Some(_) => rows::rope(qkv, table, positions, shape),
        None => qkv.copy_from_slice(&narrow(reference::rope(qkv, table, positions, shape, Rounding::Exact))),
    }
    let k = host_mut("rope_kv_write k", &mut cache.k)?;
    let v = host_mut("rope_kv_write v", &mut cache.v)?;
    reference::kv_write(k, v, qkv, slots, shape);
    Ok(())
}

pub(crate) fn attention(
    device: &CpuDevice,
    out: &mut Tensor,
    qkv: &Tensor,
    cache: &KvLayer,
    meta: &BatchMeta,
    shape: &AttentionShape,
) -> Result<()> {
    let kv = reference::PagedKv {
        k: host("attention k", &cache.k)?,
        v: host("attention v", &cache.v)?,
        block_tables: u32s("attention block_tables", &meta.block_tables, meta.batch * meta.table_stride)?,
        max_blocks: meta.table_stride,
        context_lens: u32s("attention context_lens", &meta.context_lens, meta.batch)?,
        cu_seqlens_q: u32s("attention cu_seqlens_q", &meta.cu_seqlens_q, meta.batch + 1)?,
    };
    kv.check(shape, meta.m)?;
    let qkv = f32s("attention qkv", qkv, meta.m * shape.qkv_width())?;
    let out = f32s_mut("attention out", out, meta.m * shape.num_heads * shape.head_dim)?;
    match device.level {
        Some(level) => attention::attention(level, out, qkv, &kv, shape),
        None => out.copy_from_slice(&narrow(reference::attention(qkv, &kv, shape, Rounding::Exact))),
    }
    Ok(())
}

pub(crate) fn logits_stats(
    device: &CpuDevice,
    ids: &mut Tensor,
    stats: &mut Tensor,
    logits: &Tensor,
    targets: &Tensor,
    vocab: usize,
    m: usize,
) -> Result<()> {
    let logits = f32s("logits_stats logits", logits, m * vocab)?;
    let targets = u32s("logits_stats targets", targets, m)?;
    let rows = match device.level {
        Some(level) => rows::logits_stats(level, logits, targets, vocab),
        None => reference::logits_stats(logits, targets, vocab),
    };
    let stats = f32s_mut("logits_stats stats", stats, 3 * m)?;
    let HostData::U32(ids) = host_mut("logits_stats ids", ids)? else {
        return Err(shape_error("logits_stats ids", DType::U32, "another type"));
    };
    for ((row, id), stats) in rows.iter().zip(ids).zip(stats.chunks_exact_mut(3)) {
        *id = row.argmax;
        stats.copy_from_slice(&[row.max as f32, row.log_sum_exp as f32, row.target as f32]);
    }
    Ok(())
}

pub(crate) fn sample(
    device: &CpuDevice,
    ids: &mut Tensor,
    rows: &Tensor,
    logits: &Tensor,
    vocab: usize,
    m: usize,
) -> Result<()> {
    let logits = f32s("sample logits", logits, m * vocab)?;
    let (rows, _) = u32s("sample rows", rows, SampleRow::WORDS * m)?.as_chunks();
    let HostData::U32(ids) = host_mut("sample ids", ids)? else {
        return Err(shape_error("sample ids", DType::U32, "another type"));
    };
    ids[..m].par_iter_mut().zip(logits.par_chunks_exact(vocab)).zip(rows).for_each_init(
        Chooser::default,
        |chooser, ((id, logits), row)| {
            let row = SampleRow::of_words(row);
            *id = match logits.iter().any(|x| x.is_nan() || *x == f32::INFINITY) {
                true => Device::NOT_FINITE,
                false if device.level.is_some() => chooser.choose(logits, &row).unwrap_or(Device::NO_TOKEN),
                false => reference::sample(logits, &row).unwrap_or(Device::NO_TOKEN),
            };
        },
    );
    Ok(())
}

/// Rows of an op that writes in an [`InputFormat`]: on the fast path by `producer`, else as `specified`.
fn write_rows(
    device: &CpuDevice,
    out: &mut LinearInput,
    producer: &Producer<'_>,
    specified: impl FnOnce() -> Vec<f32>,
    format: InputFormat<'_>,
    k: usize,
    m: usize,
) -> Result<()> {
    if let ActQuant::LlmInt8 { threshold } = format.quant {
        let as_floats = InputFormat { quant: ActQuant::None, ..format };
        write_rows(device, out, producer, specified, as_floats, k, m)?;
        return write_outliers(device, out, threshold, k, m);
    }
    let order = match format.gather() {
        Some(order) => Some(below("input order", u32s("input order", order, k)?, k)?),
        None => None,
    };
    let specified = || {
        let y = specified();
        order.map_or_else(|| y.clone(), |order| reference::gather_columns(&y, order))
    };
    if format.quant == ActQuant::None {
        let floats = f32s_mut("input floats", &mut out.floats, m * k)?;
        match device.level {
            Some(level) => rows::emit(level, producer, order, Emitted::Floats(floats), k),
            None => floats.copy_from_slice(&specified()),
        }
        return Ok(());
    }
    let Codes { codes, scales, zeros, .. } = match device.level {
        Some(level) => {
            let mut of = Codes { codes: vec![0; m * k], scales: vec![0.0; m], zeros: vec![0; m], outliers: Vec::new() };
            let Codes { codes, scales, zeros, .. } = &mut of;
            rows::emit(level, producer, order, Emitted::Codes { codes, scales, zeros, quant: format.quant }, k);
            of
        }
        None => reference::quantize_rows(&specified(), k, format.quant),
    };
    f32s_mut("input scales", &mut out.scales, m)?.copy_from_slice(&scales);
    if format.quant == ActQuant::DynamicAsymmetric {
        match host_mut("input zero points", &mut out.zero_points)? {
            HostData::I32(to) if to.len() >= m => to[..m].copy_from_slice(&zeros),
            other => return Err(shape_error("input zero points", format!("{m} of i32"), other.dtype())),
        }
    }
    write_bytes(&mut out.codes, &codes)
}

/// Quantizes the floats of `out` but for their outliers, which it marks.
fn write_outliers(device: &CpuDevice, out: &mut LinearInput, threshold: f32, k: usize, m: usize) -> Result<()> {
    let floats = f32s("input floats", &out.floats, m * k)?;
    let (inner, outliers) = reference::split_outliers(floats, k, threshold);
    match host_mut("input outliers", &mut out.outliers)? {
        HostData::U32(bits) => outliers::mark(&outliers, k, &mut bits[..m * LinearInput::outlier_words(k)]),
        other => return Err(shape_error("input outliers", DType::U32, other.dtype())),
    }
    let copy = Producer::Copy { x: &inner };
    let dynamic = InputFormat::quantized(ActQuant::DynamicPerToken);
    write_rows(device, out, &copy, || inner.clone(), dynamic, k, m)
}

/// `indices`, once all are known to be below `limit`.
fn below<'a>(op: &'static str, indices: &'a [u32], limit: usize) -> Result<&'a [u32]> {
    match indices.iter().find(|&&i| i as usize >= limit) {
        None => Ok(indices),
        Some(index) => Err(shape_error(op, format!("indices below {limit}"), index)),
    }
}
