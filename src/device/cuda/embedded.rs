//! What the build script made of `kernels/`: the compiled modules, and in Rust the argument structs of `abi.h` and the
//! configurations of every `configs.h`.
#![allow(unreachable_pub)] // generated code says pub

// Generated code, allowed what ours is not: bindgen's `Default` of padded structs zeroes memory.
#[allow(unsafe_code, clippy::all, clippy::pedantic, clippy::undocumented_unsafe_blocks)]
#[allow(missing_docs, unreachable_pub, non_camel_case_types, non_snake_case, non_upper_case_globals, dead_code)]
pub(crate) mod abi {
    include!(concat!(env!("OUT_DIR"), "/abi.rs"));
}

/// The lists of `kernels/FAMILY/configs.h`, of whose lines the kernels are made.
#[allow(missing_docs, dead_code)] // generated: fields are told in the list's comment, and some concern the compiler alone
pub(crate) mod configs {
    include!(concat!(env!("OUT_DIR"), "/configs.rs"));
}

include!(concat!(env!("OUT_DIR"), "/embedded.rs"));

/// Fails a test unless `module` has all of `functions`, as the compiler reported them. A stand-in compiler reports none.
#[cfg(test)]
pub(super) fn assert_has(module: &str, functions: Vec<String>) {
    let Some((_, known)) = FUNCTIONS.iter().find(|(name, _)| *name == module) else {
        assert!(!ARCHS.contains(&"sm_90") || FUNCTIONS.is_empty(), "there is no module {module}");
        return; // a build without the architecture that the module is for
    };
    for function in functions {
        assert!(known.is_empty() || known.contains(&function.as_str()), "{module} has no {function}");
    }
}

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
