//! What the build script made of `kernels/`: the compiled modules, and the argument structs of `abi.h` in Rust.
#![allow(unreachable_pub)] // generated code says pub

// Generated code, allowed what ours is not: bindgen's `Default` of padded structs zeroes memory.
#[allow(unsafe_code, clippy::all, clippy::pedantic, clippy::undocumented_unsafe_blocks)]
#[allow(missing_docs, unreachable_pub, non_camel_case_types, non_snake_case, non_upper_case_globals, dead_code)]
pub(crate) mod abi {
    include!(concat!(env!("OUT_DIR"), "/abi.rs"));
}

include!(concat!(env!("OUT_DIR"), "/embedded.rs"));

#[cfg(test)]
mod tests {
    use super::MODULES;

    /// The driver takes no length: it trusts the header and reads whole words.
    #[test]
    fn modules_are_aligned_fatbins() {
        assert!(!MODULES.is_empty());
        for (name, fatbin) in MODULES {
            assert_eq!(fatbin.as_ptr() as usize % 64, 0, "{name}");
            assert_eq!(fatbin[..4], 0xba55_ed50_u32.to_le_bytes(), "{name}");
        }
    }
}
