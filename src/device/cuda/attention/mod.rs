//! Attention over the paged KV cache: rotation and the writing of keys and values, prompts, and sequences that decode.

mod decode;
mod prefill;
mod rope_kv_write;

use super::context::CudaDevice;
use super::embedded::abi::AttentionArgs;
use super::kernel::u32_of;
use crate::device::{AttentionShape, BatchMeta, KvLayer, Tensor};
use crate::error::{Error, Result};

pub(crate) use decode::decode_grid;
pub(crate) use rope_kv_write::rope_kv_write;

/// Widest head with a kernel; narrower ones use the next template of 64, 128 and 256.
const MAX_HEAD_DIM: usize = 256;

/// A head's template: elements that the kernel computes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeadTemplate {
    D64,
    D128,
    D256,
}

impl HeadTemplate {
    fn of(shape: &AttentionShape) -> Self {
        match shape.head_dim {
            ..=64 => HeadTemplate::D64,
            65..=128 => HeadTemplate::D128,
            _ => HeadTemplate::D256,
        }
    }
}

/// Sequences that decode by one launch, all others by another.
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
    if (meta.max_blocks * shape.block_size) as u64 * shape.block_size as u64 >= 1 << 32 {
        let what = format!("{} keys in blocks of {}", meta.max_blocks * shape.block_size, shape.block_size);
        return Err(Error::unsupported(what, "Use smaller KV blocks or a smaller --max-model-len"));
    }
    let header = meta.header.cuda()?.ptr::<u32>();
    let args = AttentionArgs {
        out: out.cuda_mut()?.ptr(),
        qkv: qkv.cuda()?.ptr(),
        k_cache: cache.k.cuda()?.ptr(),
        v_cache: cache.v.cuda()?.ptr(),
        block_tables: meta.block_tables.cuda()?.ptr(),
        context_lens: meta.context_lens.cuda()?.ptr(),
        cu_seqlens_q: meta.cu_seqlens_q.cuda()?.ptr(),
        header,
        items: meta.items.cuda()?.ptr(),
        partials: device.workspace(),
        counters: device.counters(),
        scale_log2: shape.scale * std::f32::consts::LOG2_E,
        num_heads: u32_of(shape.num_heads)?,
        num_kv_heads: u32_of(shape.num_kv_heads)?,
        head_dim: u32_of(shape.head_dim)?,
        block_size: u32_of(shape.block_size)?,
        block_magic: (1u64 << 32).div_ceil(shape.block_size as u64) as u32,
        window: shape.window.map_or(u32::MAX, |w| u32::try_from(w).unwrap_or(u32::MAX)),
        // Sequences of one row have items; where there are none, they are prompts like others.
        most_items: u32_of(meta.most_items())?,
        least_rows: if decode_grid(device, shape).is_some() { 2 } else { 1 },
    };
    let template = HeadTemplate::of(shape);
    if args.least_rows == 2 {
        decode::launch(device, template, shape, &args)?;
    }
    if meta.max_q_len >= args.least_rows as usize {
        prefill::launch(device, template, meta, &args)?;
    }
    Ok(())
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
