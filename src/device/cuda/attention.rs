//! Attention over the paged KV cache: prefill, decode, and the writing of keys and values.
#![allow(unsafe_code)] // kernel launches

use super::CudaDevice;
use crate::device::{AttentionShape, BatchMeta, KvLayer, Tensor};
use crate::error::{Error, Result};

pub(crate) fn kv_write(
    _d: &CudaDevice,
    _cache: &mut KvLayer,
    _qkv: &Tensor,
    _slots: &Tensor,
    _shape: &AttentionShape,
    _m: usize,
) -> Result<()> {
    Err(Error::unsupported("kv_write on CUDA", "Use --device cpu"))
}

pub(crate) fn attention(
    _d: &CudaDevice,
    _out: &mut Tensor,
    _qkv: &Tensor,
    _cache: &KvLayer,
    _meta: &BatchMeta,
    _shape: &AttentionShape,
) -> Result<()> {
    Err(Error::unsupported("attention on CUDA", "Use --device cpu"))
}
