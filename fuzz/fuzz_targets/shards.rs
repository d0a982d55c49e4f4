//! `model.safetensors`: header length, names, types, shapes, offsets.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowbit_fuzz::{ModelDir, read_everything};

thread_local!(static DIR: ModelDir = ModelDir::new());

fuzz_target!(|file: &[u8]| {
    DIR.with(|dir| {
        dir.write("model.safetensors", file);
        read_everything(dir.path());
    });
});
