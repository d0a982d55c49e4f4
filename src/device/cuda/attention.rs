//! Attention over the paged KV cache: the writing of keys and values, prefill and decode.
#![allow(unsafe_code)] // kernel launches

use super::context::{CudaDevice, WORKSPACE_BYTES};
use super::embedded::abi::{self, AttentionArgs, KvWriteArgs};
use super::kernel::u32_of;
use super::op_kernel::OpKernel;
use crate::device::{AttentionShape, BatchMeta, KvLayer, Tensor};
use crate::error::{Error, Result};

/// Widest head with a kernel; narrower ones use the next template of 64, 128 and 256.
const MAX_HEAD_DIM: usize = 256;
/// Query heads of one KV head that a decode block takes.
const HEADS_PER_BLOCK: usize = 16;
/// Fewest keys worth a split of its own: two tiles for each warp of its block.
const MIN_KEYS_PER_SPLIT: usize = 128;
/// Decode blocks that an SM holds at once.
const BLOCKS_PER_SM: usize = 3;

pub(crate) fn kv_write(
    device: &CudaDevice,
    cache: &mut KvLayer,
    qkv: &Tensor,
    slot_mapping: &Tensor,
    shape: &AttentionShape,
    m: usize,
) -> Result<()> {
    check(device, "kv_write", cache, shape)?;
    if m == 0 {
        return Ok(());
    }
    let args = KvWriteArgs {
        k_cache: cache.k.cuda_mut()?.ptr(),
        v_cache: cache.v.cuda_mut()?.ptr(),
        qkv: qkv.cuda()?.ptr(),
        slot_mapping: slot_mapping.cuda()?.ptr(),
        num_heads: u32_of(shape.num_heads)?,
        num_kv_heads: u32_of(shape.num_kv_heads)?,
        head_dim: u32_of(shape.head_dim)?,
    };
    let threads = (shape.num_kv_heads * shape.head_dim / 8).next_multiple_of(32).min(256) as u32;
    // SAFETY: the op table checked qkv and slots for m rows; a slot is inside the cache by the op's contract.
    unsafe { device.launch_op(OpKernel::KvWrite, [u32_of(m)?, 1, 1], threads, 0, &args) }
}

pub(crate) fn attention(
    device: &CudaDevice,
    out: &mut Tensor,
    qkv: &Tensor,
    cache: &KvLayer,
    meta: &BatchMeta,
    shape: &AttentionShape,
) -> Result<()> {
    check(device, "attention", cache, shape)?;
    if meta.m == 0 || meta.batch == 0 {
        return Ok(());
    }
    // Keys are split into block and offset by a multiplication that is exact below this (abi.h, block_magic).
    if (meta.max_context_len as u64).saturating_mul(shape.block_size as u64) >= 1 << 32 {
        let what = format!("{} keys in blocks of {}", meta.max_context_len, shape.block_size);
        return Err(Error::unsupported(what, "Use smaller KV blocks or a smaller --max-model-len"));
    }
    let template = [64, 128, MAX_HEAD_DIM].into_iter().find(|&d| shape.head_dim <= d).unwrap_or(MAX_HEAD_DIM);
    // A row may be alone in its sequence or not, and the keys be split by how many sequences there are.
    let is_decode = meta.max_q_len == 1 && !device.is_batch_invariant();
    let splits = if is_decode { decode_splits(device, meta, shape) } else { 1 };
    let args = AttentionArgs {
        out: out.cuda_mut()?.ptr(),
        qkv: qkv.cuda()?.ptr(),
        k_cache: cache.k.cuda()?.ptr(),
        v_cache: cache.v.cuda()?.ptr(),
        block_tables: meta.block_tables.cuda()?.ptr(),
        context_lens: meta.context_lens.cuda()?.ptr(),
        cu_seqlens_q: meta.cu_seqlens_q.cuda()?.ptr(),
        partials: device.workspace(),
        scale_log2: shape.scale * std::f32::consts::LOG2_E,
        num_heads: u32_of(shape.num_heads)?,
        num_kv_heads: u32_of(shape.num_kv_heads)?,
        head_dim: u32_of(shape.head_dim)?,
        block_size: u32_of(shape.block_size)?,
        block_magic: (1u64 << 32).div_ceil(shape.block_size as u64) as u32,
        max_blocks: u32_of(meta.max_blocks)?,
        window: shape.window.map_or(u32::MAX, |w| u32::try_from(w).unwrap_or(u32::MAX)),
        splits: u32_of(splits)?,
    };
    let (heads, batch) = (u32_of(shape.num_heads)?, u32_of(meta.batch)?);
    if !is_decode {
        let (kernel, shared_bytes) = match template {
            64 => (OpKernel::Prefill64, abi::LOWBIT_PREFILL_SHARED_64),
            128 => (OpKernel::Prefill128, abi::LOWBIT_PREFILL_SHARED_128),
            _ => (OpKernel::Prefill256, abi::LOWBIT_PREFILL_SHARED_256),
        };
        let tiles = u32_of(meta.max_q_len.div_ceil(abi::LOWBIT_PREFILL_QUERIES as usize))?;
        // SAFETY: the op table checked `out` and `qkv`; the metadata describes them and the cache by its contract.
        return unsafe { device.launch_op(kernel, [tiles, heads, batch], 128, shared_bytes, &args) };
    }
    let (kernel, threads, shared_bytes) = match template {
        64 => (OpKernel::Decode64, 128, abi::LOWBIT_DECODE_SHARED_64),
        128 => (OpKernel::Decode128, 128, abi::LOWBIT_DECODE_SHARED_128),
        _ => (OpKernel::Decode256, 64, abi::LOWBIT_DECODE_SHARED_256),
    };
    let blocks = u32_of(shape.num_kv_heads * head_groups(shape))?;
    let grid = [args.splits, blocks, batch];
    // SAFETY: as above; the partial results of all splits fit the workspace (`decode_splits`).
    unsafe { device.launch_op(kernel, grid, threads, shared_bytes, &args)? };
    if splits == 1 {
        return Ok(());
    }
    let threads = abi::LOWBIT_COMBINE_GROUPS * shape.head_dim.next_multiple_of(64) as u32;
    // SAFETY: as above.
    unsafe { device.launch_op(OpKernel::DecodeCombine, [heads, batch, 1], threads, 0, &args) }
}

fn head_groups(shape: &AttentionShape) -> usize {
    (shape.num_heads / shape.num_kv_heads).div_ceil(HEADS_PER_BLOCK)
}

/// Blocks that share a sequence's keys: enough to fill the GPU, none with too little to do, and no more than there is
/// workspace for.
fn decode_splits(device: &CudaDevice, meta: &BatchMeta, shape: &AttentionShape) -> usize {
    let blocks = meta.batch * shape.num_kv_heads * head_groups(shape);
    let keys = shape.window.map_or(meta.max_context_len, |window| meta.max_context_len.min(window));
    let partial_bytes = meta.batch * shape.num_heads * (shape.head_dim + 2) * size_of::<f32>();
    (device.sm_count() as usize * BLOCKS_PER_SM / blocks)
        .min(keys.div_ceil(MIN_KEYS_PER_SPLIT))
        .min(WORKSPACE_BYTES / partial_bytes)
        .min(abi::LOWBIT_DECODE_MAX_SPLITS as usize)
        .max(1)
}

/// Fails unless the kernels can run this shape.
pub(crate) fn check_attention(shape: &AttentionShape) -> Result<()> {
    let AttentionShape { num_heads, num_kv_heads, head_dim, block_size, .. } = *shape;
    if head_dim == 0 || head_dim % 8 != 0 || head_dim > MAX_HEAD_DIM {
        let advice = format!("The CUDA kernels take multiples of 8 up to {MAX_HEAD_DIM}; use --device cpu");
        return Err(Error::unsupported(format!("head_dim {head_dim}"), advice));
    }
    if block_size == 0 || block_size % 16 != 0 {
        return Err(Error::unsupported(format!("KV blocks of {block_size} tokens"), "Use a multiple of 16"));
    }
    if num_kv_heads == 0 || num_heads % num_kv_heads != 0 {
        let (expected, got) = (format!("query heads in multiples of {num_kv_heads}"), num_heads.to_string());
        return Err(Error::Shape { op: "attention", expected, got });
    }
    Ok(())
}

/// As [`check_attention`], and that the cache is in the activation dtype.
fn check(device: &CudaDevice, op: &'static str, cache: &KvLayer, shape: &AttentionShape) -> Result<()> {
    check_attention(shape)?;
    if cache.k.dtype() != device.dtype() || cache.v.dtype() != device.dtype() {
        let (expected, got) = (format!("a cache of {}", device.dtype()), cache.k.dtype().to_string());
        return Err(Error::Shape { op, expected, got });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check_attention;
    use crate::device::AttentionShape;
    use crate::error::Error;

    #[test]
    fn shapes_without_a_kernel_are_refused() {
        let good =
            AttentionShape { num_heads: 6, num_kv_heads: 2, head_dim: 80, scale: 0.1, window: None, block_size: 48 };
        assert!(check_attention(&good).is_ok());
        for head_dim in [0, 4, 20, 264] {
            let refused = check_attention(&AttentionShape { head_dim, ..good });
            assert!(matches!(refused, Err(Error::Unsupported { .. })), "head_dim {head_dim}");
        }
        for block_size in [0, 8, 24] {
            let refused = check_attention(&AttentionShape { block_size, ..good });
            assert!(matches!(refused, Err(Error::Unsupported { .. })), "block_size {block_size}");
        }
        assert!(check_attention(&AttentionShape { num_kv_heads: 4, ..good }).is_err());
    }
}
