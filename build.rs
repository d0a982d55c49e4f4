//! Compiles `kernels/` for the GPU and embeds them, where a CUDA compiler is found; see docs/architecture.md.
//!
//! Environment: `LOWBIT_CUDA=auto|require|off` (auto: a binary without CUDA and one warning when there is no compiler),
//! `LOWBIT_CUDA_ARCHS` (subset of [`kernels::ALL_ARCHS`], for quick developer builds), and what `build/toolchain.rs`
//! looks at. Sets the cfg `lowbit_cuda` and writes to `OUT_DIR`: `embedded.rs` (every module's fatbin, the compiler's
//! version, the architectures), `abi.rs` (every `abi.h` in Rust), `configs.rs` (the configurations of every `configs.h`) and
//! `kernels/` (fatbins; beside each what ptxas said of its registers, shared memory and spills). A GPU is never looked for.

#[path = "build/configs.rs"]
mod configs;
#[path = "build/kernels.rs"]
mod kernels;
#[path = "build/toolchain.rs"]
mod toolchain;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result, bail};
use toolchain::Toolchain;

fn main() {
    // An error is printed as lines of cargo's own: returned from `main` it would drown in a backtrace.
    if let Err(error) = run() {
        for line in format!("{error:#}").lines() {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    println!("cargo::rustc-check-cfg=cfg(lowbit_cuda)");
    for path in ["build.rs", "build", kernels::DIR] {
        println!("cargo::rerun-if-changed={path}");
    }
    let mode = variable("LOWBIT_CUDA").unwrap_or_else(|| "auto".to_owned());
    let required = match mode.as_str() {
        "off" => return Ok(()),
        "auto" => false,
        "require" => true,
        other => bail!("LOWBIT_CUDA={other}: expected auto, require or off"),
    };
    let toolchain = match Toolchain::find() {
        Ok(toolchain) => toolchain,
        Err(error) if required => return Err(error.context("LOWBIT_CUDA=require, but CUDA kernels cannot be built")),
        Err(error) => {
            println!("cargo::warning=building without CUDA, for the CPU only: {error:#}");
            return Ok(());
        }
    };
    let out = PathBuf::from(env::var_os("OUT_DIR").context("cargo sets OUT_DIR")?);
    let archs = kernels::archs(variable("LOWBIT_CUDA_ARCHS").as_deref())?;
    // OUT_DIR is target/PROFILE/build/lowbit-HASH/out.
    let shared = out.ancestors().nth(3).context("OUT_DIR lies in a target folder")?.join("lowbit-kernels");
    let names = kernels::compile(&toolchain, &archs, &shared, &out)?;
    let functions = kernels::functions(&names, &out)?;
    write_if_changed(&out.join("embedded.rs"), &embedded(&toolchain, &archs, &names, &functions)?)?;
    write_if_changed(&out.join("configs.rs"), &configs::generate(&kernels::headers("configs.h")?)?)?;
    write_if_changed(&out.join("abi.rs"), &abi()?)?;
    println!("cargo::rustc-cfg=lowbit_cuda");
    Ok(())
}

/// Value of an environment variable, unless unset or empty; cargo reruns this script when it changes.
fn variable(name: &str) -> Option<String> {
    println!("cargo::rerun-if-env-changed={name}");
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// Source of `embedded.rs`. The driver reads fatbins as 64-bit words, so each gets an alignment that bytes lack.
fn embedded(toolchain: &Toolchain, archs: &[&str], names: &[String], functions: &[Vec<String>]) -> Result<String> {
    let mut text = format!(
        "/// Version of the compiler that built the modules.\npub const NVCC_VERSION: &str = {:?};\n\
         /// Targets they were built for.\npub const ARCHS: &[&str] = &{:?};\n\
         #[repr(C, align(64))]\nstruct Aligned<T>(T);\n\
         /// Name (path under `kernels/` without its ending) and fatbin of every module, sorted by name.\n\
         pub static MODULES: &[(&str, &[u8])] = &[\n",
        toolchain.version_name(),
        archs.iter().copied().map(kernels::target_name).collect::<Vec<_>>(),
    );
    for name in names {
        writeln!(
            text,
            "    ({name:?}, &Aligned(*include_bytes!(concat!(env!(\"OUT_DIR\"), \"/kernels/{name}.fatbin\"))).0),"
        )?;
    }
    text.push_str("];\n");
    text.push_str(
        "/// Name of every module and its entry functions, sorted; none where ptxas said nothing, as of PTX alone.\n\
         #[allow(dead_code)] // tests compare with it\n\
         pub static FUNCTIONS: &[(&str, &[&str])] = &[\n",
    );
    for (name, functions) in names.iter().zip(functions) {
        writeln!(text, "    ({name:?}, &{functions:?}),")?;
    }
    text.push_str("];\n");
    Ok(text)
}

/// Every `abi.h` as Rust structs and constants, with assertions that both sides lay them out alike.
fn abi() -> Result<String> {
    let headers = kernels::headers("abi.h")?;
    let bindings = bindgen::Builder::default()
        .headers(headers.iter().map(|header| header.display().to_string()))
        .clang_args(["-x", "c", "-std=c11", "-fparse-all-comments", "-I", kernels::DIR])
        .allowlist_file(format!(r".*{}/[a-z0-9_]+/abi\.h", kernels::DIR))
        .use_core()
        .derive_default(true)
        .prepend_enum_name(false)
        .rust_edition(bindgen::RustEdition::Edition2024)
        .formatter(bindgen::Formatter::None)
        .generate()
        .with_context(|| format!("{headers:?} cannot be read by bindgen"))?;
    Ok(bindings.to_string())
}

/// Leaves the file's time alone when it already holds `text`, so that nothing is rebuilt for it.
fn write_if_changed(path: &Path, text: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}
