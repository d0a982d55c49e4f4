//! `model.safetensors.index.json`, which names shards: paths, missing files, tensors not where it says.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowbit_fuzz::{ModelDir, read_everything};

thread_local!(static DIR: ModelDir = {
    let dir = ModelDir::new();
    let shard = std::fs::read(dir.path().join("model.safetensors")).expect("just written");
    dir.write("model-00001-of-00001.safetensors", &shard);
    std::fs::remove_file(dir.path().join("model.safetensors")).expect("just written");
    dir
});

fuzz_target!(|index: &[u8]| {
    DIR.with(|dir| {
        dir.write("model.safetensors.index.json", index);
        read_everything(dir.path());
    });
});
