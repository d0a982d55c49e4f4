//! Ops that are not linear layers: those on rows, and attention, in the shapes of Llama-3.1-8B.

use crate::device::{
    AttentionShape, BatchMeta, BatchRows, Device, InputFormat, KvLayer, LinearInput, RopeRows, SampleRow, Tensor,
};
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::quant::ActQuant;

use super::linear::random;
use super::measure::{Bench, copies};
use super::report::{Measurement, Rates, Unit};
use super::{Op, Selection, unique};

const HIDDEN: usize = 4096;
const INTERMEDIATE: usize = 14336;
const VOCAB: usize = 128_256;
/// Most rows of logits that an engine asks for.
const LOGIT_ROWS: usize = 64;
const SHAPE: AttentionShape =
    AttentionShape { num_heads: 32, num_kv_heads: 8, head_dim: 128, scale: 0.088_388, window: None, block_size: 16 };
/// Sequences, queries of each, and keys that they see: decoding, prompts, and a chunk of a long prompt.
const ATTENTION: [(usize, usize, usize); 7] =
    [(1, 1, 512), (1, 1, 4096), (1, 1, 32_768), (64, 1, 1024), (1, 512, 512), (1, 4096, 4096), (1, 512, 8192)];

/// One op at one shape, to be measured.
struct Case {
    op: Op,
    shape: String,
    m: usize,
    unit: Option<Unit>,
    bytes: usize,
    operations: usize,
}

/// Number of measurements.
pub(super) fn count(selection: &Selection) -> usize {
    let of = |op: &Op| match op {
        Op::RmsNorm | Op::SiluMul => 2 * selection.op_rows.len(),
        Op::Quantize | Op::RopeKvWrite => selection.op_rows.len(),
        Op::LogitsStats => logit_rows(selection).len(),
        Op::Sample => 2 * logit_rows(selection).len(),
        Op::Attention => ATTENTION.len(),
        _ => 0,
    };
    selection.ops.iter().map(of).sum()
}

/// Rows as [`LOGIT_ROWS`] allows.
fn logit_rows(selection: &Selection) -> Vec<usize> {
    unique(&selection.op_rows.iter().map(|&m| m.min(LOGIT_ROWS)).collect::<Vec<_>>())
}

/// Measures every op selected that is not linear.
pub(super) fn measure(bench: &mut Bench, selection: &Selection) -> Result<()> {
    for &op in &selection.ops {
        match op {
            Op::Attention => ATTENTION.into_iter().try_for_each(|case| attention(bench, case))?,
            Op::LogitsStats | Op::Sample => logit_rows(selection).into_iter().try_for_each(|m| rows(bench, op, m))?,
            _ => selection.op_rows.iter().try_for_each(|&m| rows(bench, op, m))?,
        }
    }
    Ok(())
}

/// Times `op` on as many of the tensors that `make` makes as keep them out of the caches.
fn case<T>(
    bench: &mut Bench,
    case: Case,
    make: impl Fn(&Device) -> Result<T>,
    op: impl Fn(&Device, &mut T) -> Result<()>,
) -> Result<()> {
    let device = bench.device.clone();
    let copies = copies(case.bytes).min(64);
    let mut sets = (0..copies).map(|_| make(&device)).collect::<Result<Vec<T>>>()?;
    let time = bench.time(copies, |i| op(&device, &mut sets[i]))?;
    bench.measurements.push(Measurement {
        op: case.op,
        shape: case.shape,
        m: case.m,
        kernel: case.op.name(),
        unit: case.unit,
        bytes: case.bytes as u64,
        operations: case.operations as u64,
        time,
        peers: Vec::new(),
        rates: Rates::default(),
    });
    Ok(())
}

/// An op on `m` rows, where it is one.
fn rows(bench: &mut Bench, op: Op, m: usize) -> Result<()> {
    let dtype = bench.device.activation_dtype();
    let size = dtype.size_bytes();
    let int8 = InputFormat::quantized(ActQuant::DynamicPerToken);
    let of = |shape: String, bytes: usize| Case { op, shape, m, unit: None, bytes, operations: 0 };
    match op {
        Op::RmsNorm => {
            for (to, format, out) in [(dtype, InputFormat::FLOATS, size), (DType::I8, int8, 1)] {
                case(
                    bench,
                    of(format!("{HIDDEN} to {to}"), m * HIDDEN * (4 + out) + 4 * HIDDEN),
                    |d| {
                        Ok((
                            LinearInput::new(d, m, HIDDEN)?,
                            floats(d, DType::F32, m * HIDDEN)?,
                            floats(d, DType::F32, HIDDEN)?,
                        ))
                    },
                    |d, (out, x, w)| d.rms_norm(out, x, w, 1e-5, format, m),
                )?;
            }
            Ok(())
        }
        Op::SiluMul => {
            for (to, format, out) in [(dtype, InputFormat::FLOATS, size), (DType::I8, int8, 1)] {
                case(
                    bench,
                    of(format!("{INTERMEDIATE} to {to}"), m * INTERMEDIATE * (2 * size + out)),
                    |d| Ok((LinearInput::new(d, m, INTERMEDIATE)?, floats(d, dtype, m * 2 * INTERMEDIATE)?)),
                    |d, (out, x)| d.silu_mul(out, x, INTERMEDIATE, format, m),
                )?;
            }
            Ok(())
        }
        Op::Quantize => case(
            bench,
            of(format!("{HIDDEN} to i8"), m * HIDDEN * (size + 1)),
            |d| Ok((LinearInput::new(d, m, HIDDEN)?, floats(d, dtype, m * HIDDEN)?)),
            |d, (out, x)| d.quantize(out, x, HIDDEN, int8, m),
        ),
        Op::RopeKvWrite => {
            let (heads, kv_heads) = (SHAPE.num_heads + SHAPE.num_kv_heads, SHAPE.num_kv_heads);
            let elements = 2 * heads + 3 * kv_heads; // read and written in place; values read, keys and values written
            case(
                bench,
                of(format!("{heads} heads of {}", SHAPE.head_dim), m * elements * SHAPE.head_dim * size),
                |d| {
                    let (qkv, table) =
                        (floats(d, dtype, m * SHAPE.qkv_width())?, floats(d, DType::F32, 4096 * SHAPE.head_dim)?);
                    let cache = || d.zeros(dtype, m * SHAPE.num_kv_heads * SHAPE.head_dim);
                    let slots = u32s(d, (0..m as u32).collect())?;
                    Ok((qkv, table, u32s(d, vec![7; m])?, slots, KvLayer { k: cache()?, v: cache()? }))
                },
                |d, (qkv, table, positions, slot_mapping, cache)| {
                    let rows = RopeRows { table, positions, slot_mapping };
                    d.rope_kv_write(cache, qkv, None, rows, &SHAPE, m)
                },
            )
        }
        Op::Sample => {
            let all = SampleRow { temperature: 1.0, top_k: 0, top_p: 1.0, floor: f32::MIN, draw: 1 << 63 };
            for (what, row) in [("all", all), ("top-k 50, top-p 0.9", SampleRow { top_k: 50, top_p: 0.9, ..all })] {
                case(
                    bench,
                    of(format!("{VOCAB}, {what}"), m * VOCAB * 4),
                    |d| {
                        let rows = u32s(d, SampleRow::words(&vec![row; m]))?;
                        Ok((u32s(d, vec![0; m])?, rows, floats(d, DType::F32, m * VOCAB)?))
                    },
                    |d, (ids, rows, logits)| d.sample(ids, rows, logits, VOCAB, m),
                )?;
            }
            Ok(())
        }
        Op::LogitsStats => case(
            bench,
            of(VOCAB.to_string(), m * VOCAB * 4),
            |d| {
                let (ids, targets) = (u32s(d, vec![0; m])?, u32s(d, vec![1; m])?);
                Ok((ids, floats(d, DType::F32, 3 * m)?, floats(d, DType::F32, m * VOCAB)?, targets))
            },
            |d, (ids, stats, logits, targets)| d.logits_stats(ids, stats, logits, targets, VOCAB, m),
        ),
        _ => Ok(()),
    }
}

fn attention(bench: &mut Bench, (batch, q_len, keys): (usize, usize, usize)) -> Result<()> {
    let dtype = bench.device.activation_dtype();
    let (m, size) = (batch * q_len, dtype.size_bytes());
    let (token, width) = (SHAPE.num_kv_heads * SHAPE.head_dim, SHAPE.num_heads * SHAPE.head_dim);
    let seen: usize = (keys - q_len..keys).map(|p| p + 1).sum();
    let what = Case {
        op: Op::Attention,
        shape: format!("{batch} x {q_len} of {keys} keys"),
        m,
        unit: Some(Unit::Float16),
        bytes: (2 * batch * keys * token + 2 * m * width) * size,
        operations: 4 * batch * seen * width,
    };
    case(
        bench,
        what,
        |d| {
            let cache = || floats(d, dtype, batch * keys * token);
            let (out, qkv) = (floats(d, dtype, m * width)?, floats(d, dtype, m * SHAPE.qkv_width())?);
            Ok((out, qkv, KvLayer { k: cache()?, v: cache()? }, meta(d, batch, q_len, keys)?))
        },
        |d, (out, qkv, cache, meta)| d.attention(out, qkv, cache, meta, &SHAPE),
    )
}

fn meta(device: &Device, batch: usize, q_len: usize, keys: usize) -> Result<BatchMeta> {
    let (m, table_stride) = (batch * q_len, keys / SHAPE.block_size);
    let positions: Vec<u32> = (0..m).map(|r| (keys - q_len + r % q_len) as u32).collect();
    let block_tables: Vec<u32> = (0..(batch * table_stride) as u32).collect();
    let cu_seqlens_q: Vec<u32> = (0..=batch).map(|b| (b * q_len) as u32).collect();
    let rows = BatchRows {
        token_ids: &vec![0; m],
        positions: &positions,
        slot_mapping: &vec![u32::MAX; m],
        block_tables: &block_tables,
        table_stride,
        context_lens: &vec![keys as u32; batch],
        cu_seqlens_q: &cu_seqlens_q,
    };
    BatchMeta::of(device, &rows, &SHAPE)
}

fn floats(device: &Device, dtype: DType, len: usize) -> Result<Tensor> {
    device.upload(random(dtype, len, 5))
}

fn u32s(device: &Device, values: Vec<u32>) -> Result<Tensor> {
    device.upload(HostData::U32(values))
}
