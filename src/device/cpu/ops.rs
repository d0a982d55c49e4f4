//! Op entry points of the CPU device, one per line of the op table in `device/mod.rs`.
#![allow(unused_variables, clippy::unimplemented)]

use super::CpuDevice;
use crate::device::{Act, AttentionShape, BatchMeta, Columns, Emit, KvLayer, PackedWeight, Tensor, Write};
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::quant::LinearWeight;

pub(crate) fn memory(device: &CpuDevice) -> Result<(u64, u64)> {
    unimplemented!()
}

pub(crate) fn zeros(device: &CpuDevice, dtype: DType, len: usize) -> Result<Tensor> {
    unimplemented!()
}

pub(crate) fn upload(device: &CpuDevice, data: HostData) -> Result<Tensor> {
    unimplemented!()
}

pub(crate) fn write(device: &CpuDevice, dst: &mut Tensor, data: &HostData) -> Result<()> {
    unimplemented!()
}

pub(crate) fn download(device: &CpuDevice, src: &Tensor, len: usize) -> Result<HostData> {
    unimplemented!()
}

pub(crate) fn synchronize(device: &CpuDevice) -> Result<()> {
    unimplemented!()
}

pub(crate) fn pack(device: &CpuDevice, weight: LinearWeight) -> Result<PackedWeight> {
    unimplemented!()
}

pub(crate) fn embed(device: &CpuDevice, out: &mut Tensor, table: &Tensor, ids: &Tensor, width: usize, m: usize) -> Result<()> {
    unimplemented!()
}

pub(crate) fn gather_rows(device: &CpuDevice, out: &mut Tensor, x: &Tensor, rows: &Tensor, width: usize, m: usize) -> Result<()> {
    unimplemented!()
}

pub(crate) fn rms_norm(device: &CpuDevice, out: &mut Act, x: &Tensor, weight: &Tensor, eps: f32, emit: Emit<'_>, m: usize) -> Result<()> {
    unimplemented!()
}

pub(crate) fn silu_mul(device: &CpuDevice, out: &mut Act, gate_up: &Tensor, k: usize, emit: Emit<'_>, m: usize) -> Result<()> {
    unimplemented!()
}

pub(crate) fn quantize(device: &CpuDevice, out: &mut Act, x: &Tensor, k: usize, emit: Emit<'_>, m: usize) -> Result<()> {
    unimplemented!()
}

pub(crate) fn linear(device: &CpuDevice, out: &mut Tensor, columns: Columns, x: &Act, w: &PackedWeight, write: Write, m: usize) -> Result<()> {
    unimplemented!()
}

pub(crate) fn qk_norm(device: &CpuDevice, qkv: &mut Tensor, q_weight: &Tensor, k_weight: &Tensor, eps: f32, shape: &AttentionShape, m: usize) -> Result<()> {
    unimplemented!()
}

pub(crate) fn rope(device: &CpuDevice, qkv: &mut Tensor, table: &Tensor, positions: &Tensor, shape: &AttentionShape, m: usize) -> Result<()> {
    unimplemented!()
}

pub(crate) fn kv_write(device: &CpuDevice, cache: &mut KvLayer, qkv: &Tensor, slot_mapping: &Tensor, shape: &AttentionShape, m: usize) -> Result<()> {
    unimplemented!()
}

pub(crate) fn attention(device: &CpuDevice, out: &mut Tensor, qkv: &Tensor, cache: &KvLayer, meta: &BatchMeta, shape: &AttentionShape) -> Result<()> {
    unimplemented!()
}

pub(crate) fn logits_stats(device: &CpuDevice, ids: &mut Tensor, stats: &mut Tensor, logits: &Tensor, targets: &Tensor, vocab: usize, m: usize) -> Result<()> {
    unimplemented!()
}

