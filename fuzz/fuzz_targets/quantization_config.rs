//! `quantization_config`, with tensors in the layout it names: the input is the JSON, and after a NUL the tensors' bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowbit_fuzz::{ModelDir, config, quantized, read_everything, shard};

thread_local!(static DIR: ModelDir = ModelDir::new());

fuzz_target!(|input: &[u8]| {
    let end = input.iter().position(|&byte| byte == 0).unwrap_or(input.len());
    let (json, data) = (&input[..end], input.get(end + 1..).unwrap_or_default());
    let Ok(quantization) = serde_json::from_slice::<serde_json::Value>(json) else { return };
    let text = quantization.to_string();
    let method =
        ["gptq", "awq", "pack-quantized"].into_iter().find(|name| text.contains(name)).unwrap_or("int-quantized");
    let bits = [8, 4, 3, 2].into_iter().find(|bits| text.contains(&format!("bits\":{bits}"))).unwrap_or(4);

    let mut config = config();
    config["quantization_config"] = quantization;
    DIR.with(|dir| {
        dir.write("config.json", config.to_string().as_bytes());
        dir.write("model.safetensors", &shard(&quantized(method, bits), data));
        read_everything(dir.path());
    });
});
