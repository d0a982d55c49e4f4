//! Fields that the tools which write GPTQ and AWQ checkpoints put into their configurations and that change no number.

use crate::error::Result;

use super::json::Object;

/// Fields that describe how the file was made, or how other programs should run it: those of AutoGPTQ, AutoAWQ, GPTQModel,
/// transformers' own configurations, and AutoRound. [`check`] looks at the values of some.
pub(super) const TOOL_FIELDS: &[&str] = &[
    "_commit_hash",
    "act_bits",
    "act_data_type",
    "act_dynamic",
    "act_group_aware",
    "act_group_size",
    "act_sym",
    "adapter_meta",
    "amp",
    "apply_clip",
    "auto_forward_data_parallelism",
    "autoround_version",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "calib_data",
    "compute_device_filter",
    "damp_auto_increment",
    "damp_percent",
    "data_type",
    "dataset",
    "dense_vram_strategy",
    "device",
    "device_map",
    "disable_exllama",
    "duo_scaling",
    "enable_alg_ext",
    "enable_minmax_tuning",
    "enable_norm_bias_tuning",
    "enable_quanted_input",
    "exllama_config",
    "export_compatible",
    "failsafe",
    "fallback",
    "foem",
    "gc_mode",
    "gptaq",
    "gradient_accumulate_steps",
    "hf_device_map",
    "hyb_act",
    "initialized_with_vllm",
    "inject_fused_attention",
    "inject_fused_mlp",
    "iters",
    "low_cpu_mem_usage",
    "low_gpu_mem_usage",
    "lr",
    "max_calib_samples",
    "max_calib_seq_len",
    "max_input_length",
    "meta",
    "minmax_lr",
    "mock_quantization",
    "model_file_base_name",
    "model_free",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "mse",
    "n_parallel_calib_samples",
    "n_samples",
    "nsamples",
    "offload_to_disk",
    "offload_to_disk_path",
    "pack_impl",
    "pad_token_id",
    "process",
    "provider",
    "quant_block_list",
    "quant_nontext_module",
    "quantization_kwargs",
    "quantizer",
    "scale_dtype",
    "seqlen",
    "split",
    "static_groups",
    "super_bits",
    "super_group_size",
    "supported_types",
    "text_column",
    "to_quant_block_names",
    "tokenizer",
    "train_bs",
    "train_type",
    "trainable",
    "true_sequential",
    "uri",
    "use_cuda_fp16",
    "use_exllama",
    "use_quant_input",
    "v2",
    "v2_alpha",
    "v2_memory_device",
    "vram_strategy",
    "wait_for_submodule_finalizers",
    "warmup_triton",
];

/// Fails where a field that usually changes nothing says something else.
pub(super) fn check(o: &Object) -> Result<()> {
    if let Some(other) = o.str("data_type")?.filter(|t| !matches!(*t, "int" | "int_sym" | "int_asym")) {
        return Err(o.error("data_type", format!("expected `int`, got `{other}`: codes of another meaning")));
    }
    // 16 and 32 are how AutoRound writes that activations are not quantized.
    if let Some(bits) = o.integer("act_bits", 0..=64)?.filter(|&bits| bits < 16) {
        return Err(o.error(
            "act_bits",
            format!("expected 16 or none, got {bits}: quantized activations are not supported here"),
        ));
    }
    for field in ["super_bits", "super_group_size"] {
        if o.get(field).is_some_and(|value| value.as_i64() != Some(0)) {
            return Err(o.error(field, "expected none: scales that are quantized themselves are not supported here"));
        }
    }
    Ok(())
}
