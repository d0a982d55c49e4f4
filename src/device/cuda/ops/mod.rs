//! Op entry points of the CUDA device, one per line of the op table in `device/mod.rs`.

mod embed;
pub(super) mod emit;
mod logits_stats;
mod norm;
mod quantize;
mod sample;
mod tensors;

pub(crate) use embed::{embed, gather_rows};
pub(crate) use logits_stats::logits_stats;
pub(crate) use norm::{rms_norm, sub_norm};
pub(crate) use quantize::{quantize, silu_mul};
pub(crate) use sample::sample;
pub(crate) use tensors::{download, memory, synchronize, upload, write, write_together, zeros, zeros_together};

pub(crate) use super::attention::{attention, check_attention, decode_grid, rope_kv_write};
pub(crate) use super::gemm::{check_epilogue, linear, linear_codes, pack};

#[cfg(test)]
mod tests {
    /// What [`crate::device::cuda::CudaDevice::launch_op`] needs of its kernels.
    #[test]
    fn kernels_wait_for_those_before_them() {
        let sources = [
            include_str!("../../../../kernels/ops/embed.cu"),
            include_str!("../../../../kernels/ops/logits_stats.cu"),
            include_str!("../../../../kernels/ops/quantize.cu"),
            include_str!("../../../../kernels/ops/repack.cu"),
            include_str!("../../../../kernels/ops/rms_norm.cu"),
            include_str!("../../../../kernels/ops/sample.cu"),
            include_str!("../../../../kernels/ops/silu_mul.cu"),
            include_str!("../../../../kernels/ops/sub_norm.cu"),
            include_str!("../../../../kernels/attention/decode.cu"),
            include_str!("../../../../kernels/attention/rope_kv_write.cu"),
            include_str!("../../../../kernels/attention/prefill.cu"),
        ];
        for source in sources {
            for kernel in source.split("__global__").skip(1) {
                let (_, body) = kernel.split_once('{').expect("a body");
                let first = body.trim_start_matches(|c: char| c.is_whitespace() || c == '\\');
                assert!(first.starts_with("overlap();"), "{first:.80}");
            }
        }
    }
}
