//! The kernels of the small ops: one name each, resolved at its first launch and found by index afterwards.

use std::sync::OnceLock;

use super::kernel::Kernel;
use crate::error::Result;

/// Lists the kernels: variant, module (path under kernels/ without `.cu`), function; `{}` at its end is the activation type.
macro_rules! op_kernels {
    ($($variant:ident = $module:literal $function:literal,)*) => {
        /// A kernel of an op that has one function for each activation type, or one for all.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum OpKernel {
            $($variant,)*
        }

        impl OpKernel {
            /// All, in the order of their indices.
            const ALL: &[OpKernel] = &[$(OpKernel::$variant,)*];

            /// Module and function.
            fn path(self) -> (&'static str, &'static str) {
                match self {
                    $(OpKernel::$variant => ($module, $function),)*
                }
            }
        }
    };
}

op_kernels! {
    EmbedF32 = "ops/embed" "embed_f32",
    EmbedF16 = "ops/embed" "embed_f16",
    EmbedBf16 = "ops/embed" "embed_bf16",
    GatherRows = "ops/embed" "gather_rows",
    RmsNormFloats = "ops/rms_norm" "rms_norm_{}",
    RmsNormInt8 = "ops/rms_norm" "rms_norm_int8",
    RmsNormOutliers = "ops/rms_norm" "rms_norm_outliers_{}",
    SubNormFloats = "ops/sub_norm" "sub_norm_{}",
    SubNormInt8 = "ops/sub_norm" "sub_norm_int8_{}",
    SubNormOutliers = "ops/sub_norm" "sub_norm_outliers_{}",
    SiluMulFloats = "ops/silu_mul" "silu_mul_{}",
    SiluMulInt8 = "ops/silu_mul" "silu_mul_int8_{}",
    SiluMulOutliers = "ops/silu_mul" "silu_mul_outliers_{}",
    QuantizeFloats = "ops/quantize" "quantize_{}",
    QuantizeInt8 = "ops/quantize" "quantize_int8_{}",
    QuantizeOutliers = "ops/quantize" "quantize_outliers_{}",
    LogitsStatsPart = "ops/logits_stats" "logits_stats_part",
    LogitsStats = "ops/logits_stats" "logits_stats",
    Sample = "ops/sample" "sample",
    RopeKvWrite = "attention/rope_kv_write" "rope_kv_write_{}",
    Prefill64 = "attention/prefill" "attention_prefill_64_{}",
    Prefill128 = "attention/prefill" "attention_prefill_128_{}",
    Prefill256 = "attention/prefill" "attention_prefill_256_{}",
    Decode64 = "attention/decode" "attention_decode_64_{}",
    Decode128 = "attention/decode" "attention_decode_128_{}",
    Decode256 = "attention/decode" "attention_decode_256_{}",
    RepackRows = "ops/repack" "repack_rows",
    RepackBlocks8 = "ops/repack" "repack_blocks8",
    RepackBlocks4 = "ops/repack" "repack_blocks4",
    RepackBlocks16 = "ops/repack" "repack_blocks16_{}",
    RepackFragments4 = "ops/repack" "repack_fragments4",
    RepackFragments8 = "ops/repack" "repack_fragments8",
    RepackScales = "ops/repack" "repack_scales",
    RepackZeros = "ops/repack" "repack_zeros",
    RepackSums = "ops/repack" "repack_sums",
}

/// What was resolved so far, of one device.
#[derive(Debug)]
pub(super) struct OpKernels {
    resolved: [OnceLock<Kernel>; OpKernel::ALL.len()],
}

impl Default for OpKernels {
    fn default() -> Self {
        OpKernels { resolved: [const { OnceLock::new() }; OpKernel::ALL.len()] }
    }
}

impl OpKernels {
    /// `kernel`, which `resolve` finds by module and function the first time.
    pub(super) fn get_or_resolve(
        &self,
        kernel: OpKernel,
        resolve: impl FnOnce(&'static str, &'static str) -> Result<Kernel>,
    ) -> Result<Kernel> {
        let slot = &self.resolved[kernel as usize];
        if let Some(&found) = slot.get() {
            return Ok(found);
        }
        let (module, function) = kernel.path();
        let found = resolve(module, function)?;
        Ok(*slot.get_or_init(|| found))
    }
}

#[cfg(test)]
mod tests {
    use super::super::embedded;
    use super::*;

    /// A name that no module has would be found by the first launch only, on a GPU.
    #[test]
    fn every_kernel_is_in_its_module() {
        for &kernel in OpKernel::ALL {
            let (module, function) = kernel.path();
            let stem = function.strip_suffix("{}");
            let names = match stem {
                Some(stem) => vec![format!("{stem}f16"), format!("{stem}bf16")],
                None => vec![function.to_owned()],
            };
            embedded::assert_has(module, names);
        }
    }
}
