//! The build script's reader of `kernels/FAMILY/configs.h`: what it makes of lists, and which line it names when it cannot.

#[path = "../build/configs.rs"]
mod configs;

use std::fs;

/// What is made of a family `gemm_x` with such a file.
fn generate(text: &str) -> Result<String, String> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("gemm_x/configs.h");
    fs::create_dir(file.parent().unwrap()).unwrap();
    fs::write(&file, text).unwrap();
    configs::generate(&[file]).map_err(|error| format!("{error:#}"))
}

#[test]
fn lists_become_constants() {
    let text = "/* What all is. */\n#pragma once\n\n/* Tiles, of\n * two lines.\n */\n\
                #define GEMM_X_SM90_SPLIT_K(X) /* rows, bool pingpong */ \\\n  X(8, 0)   \\\n  X(16, 1)\n\n\
                /* Fewer. */\n#define GEMM_X_SM90_U8(X) /* as GEMM_X_SM90_SPLIT_K */ \\\n  X(8, 1)\n";
    let made: String = generate(text).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(
        made,
        "/// Configurations of `gemm_x`. pub mod gemm_x { /// One of [`SM90_SPLIT_K`]. \
         #[derive(Debug, Clone, Copy, PartialEq, Eq)] pub struct Sm90SplitK { pub rows: usize, pub pingpong: bool, } \
         /// Tiles, of two lines. pub const SM90_SPLIT_K: [Sm90SplitK; 2] = [ Sm90SplitK { rows: 8, pingpong: false }, \
         Sm90SplitK { rows: 16, pingpong: true }, ]; \
         /// Fewer. pub const SM90_U8: [Sm90SplitK; 1] = [ Sm90SplitK { rows: 8, pingpong: true }, ]; }"
    );
}

#[test]
fn what_is_not_of_the_form_is_named_by_its_line() {
    for (text, line, what) in [
        ("int x;\n", ":1", "a comment, `#pragma once` or a list"),
        ("/* Doc.\n", ":1", "does not end"),
        ("#define GEMM_X_A(X) /* rows */ \\\n  X(1)\n", ":1", "under a comment"),
        ("/* Doc. */\n#define GEMM_Y_A(X) /* rows */ \\\n  X(1)\n", ":2", "#define GEMM_X_KIND(X)"),
        ("/* Doc. */\n#define GEMM_X_a(X) /* rows */ \\\n  X(1)\n", ":2", "no name"),
        ("/* Doc. */\n#define GEMM_X_A(X) /* Rows */ \\\n  X(1)\n", ":2", "no field"),
        ("/* Doc. */\n#define GEMM_X_A(X) /* as GEMM_X_B */ \\\n  X(1)\n", ":2", "no list GEMM_X_B above"),
        ("/* Doc. */\n#define GEMM_X_A(X) /* rows */ \\\n  X(1, 2)\n", ":3", "`X(rows)` in numbers"),
        ("/* Doc. */\n#define GEMM_X_A(X) /* rows */ \\\n  X(1) \\\n  X(many)\n", ":4", "`X(rows)` in numbers"),
        ("/* Doc. */\n#define GEMM_X_A(X) /* bool flag */ \\\n  X(2)\n", ":3", "bools as 0 or 1"),
        ("/* Doc. */\n#define GEMM_X_A(X) /* rows */ \\\n  X(1) \\\n", "", "the last line continues"),
        ("/* Doc. */\n", "", "no list"),
    ] {
        let error = generate(text).expect_err(text);
        assert!(error.contains(&format!("gemm_x/configs.h{line}")) && error.contains(what), "{text:?}: {error}");
    }
}
