//! `tokenizer.json`: loading it, and a text to ids and back. What is judged is what the user gets: a panic of the library that
//! parses the file becomes an error where it is called, before the fuzzer's hook sees it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowbit::text::Tokenizer;
use lowbit_fuzz::ModelDir;

thread_local!(static DIR: ModelDir = ModelDir::new());

fuzz_target!(|file: &[u8]| {
    DIR.with(|dir| {
        dir.write("tokenizer.json", file);
        let Ok(tokenizer) = Tokenizer::load(dir.path(), 1 << 16) else { return };
        if let Ok(ids) = tokenizer.encode("Once upon a time, \u{1f40b}\u{e9} \u{4f60}\u{597d}\n\t 1234", true) {
            tokenizer.decode(&ids, false);
        }
        tokenizer.decode(&(0..300).collect::<Vec<u32>>(), true);
    });
});
