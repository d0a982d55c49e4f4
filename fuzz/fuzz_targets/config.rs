//! `config.json`: sizes, types, rotary scaling, unknown fields.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowbit_fuzz::{ModelDir, read_everything};

thread_local!(static DIR: ModelDir = ModelDir::new());

fuzz_target!(|config: &[u8]| {
    DIR.with(|dir| {
        dir.write("config.json", config);
        read_everything(dir.path());
    });
});
