//! Where nvcc and libclang are.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::variable;

/// A compiler that can build the kernels, and a libclang (loaded by bindgen at run time) that can read their header.
pub(crate) struct Toolchain {
    pub(crate) nvcc: PathBuf,
    /// All that `nvcc --version` says: part of what decides whether a kernel must be compiled again.
    pub(crate) version: String,
    /// The release, `(13, 0)`.
    pub(crate) release: (u32, u32),
}

impl Toolchain {
    /// The first nvcc of: `LOWBIT_NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH`, `/usr/local/cuda`, `LOWBIT_CUDA_DIR`, `.cuda`.
    pub(crate) fn find() -> Result<Toolchain> {
        let wheels: Vec<PathBuf> =
            variable("LOWBIT_CUDA_DIR").map(PathBuf::from).into_iter().chain([PathBuf::from(".cuda")]).collect();
        let nvcc = find_nvcc(&wheels)?;
        println!("cargo::rerun-if-changed={}", nvcc.display());
        let output = Command::new(&nvcc)
            .arg("--version")
            .output()
            .with_context(|| format!("{} does not start", nvcc.display()))?;
        let version = String::from_utf8_lossy(&output.stdout).into_owned();
        let release = release(&version).with_context(|| format!("{} --version is not understood", nvcc.display()))?;
        if release < (12, 0) {
            bail!("{} is of CUDA {}.{}; 12.0 or newer is needed", nvcc.display(), release.0, release.1);
        }
        find_libclang(&wheels)?;
        Ok(Toolchain { nvcc, version, release })
    }

    /// `13.0.88` where the compiler gives its build, else `13.0`.
    pub(crate) fn version_name(&self) -> String {
        let build = self.version.split(", V").nth(1).and_then(|rest| rest.split_whitespace().next());
        build.map_or_else(|| format!("{}.{}", self.release.0, self.release.1), str::to_owned)
    }
}

fn find_nvcc(wheels: &[PathBuf]) -> Result<PathBuf> {
    if let Some(nvcc) = variable("LOWBIT_NVCC") {
        if !Path::new(&nvcc).is_file() {
            bail!("LOWBIT_NVCC={nvcc}: there is no such file");
        }
        return Ok(PathBuf::from(nvcc));
    }
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).map(|dir| Path::new(&dir).join("bin"));
    let path: Vec<PathBuf> = variable("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    let unpacked = wheels.iter().map(|dir| dir.join("nvidia/cu13/bin"));
    let mut folders = toolkits.chain(path).chain([PathBuf::from("/usr/local/cuda/bin")]).chain(unpacked);
    folders.find_map(|dir| Some(dir.join("nvcc")).filter(|nvcc| nvcc.is_file())).context(
        "no nvcc in LOWBIT_NVCC, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda, LOWBIT_CUDA_DIR or .cuda. \
         `scripts/install-cuda-toolchain` fetches one without root; LOWBIT_CUDA=off silences this",
    )
}

/// The two numbers after `release` in what `nvcc --version` prints.
fn release(version: &str) -> Option<(u32, u32)> {
    let text = version.split("release ").nth(1)?.split(',').next()?;
    let (major, minor) = text.split_once('.')?;
    Some((major.trim().parse().ok()?, minor.trim().parse().ok()?))
}

/// Makes sure that bindgen will find a libclang: `LIBCLANG_PATH`, the wheel, or where clang is usually installed.
fn find_libclang(wheels: &[PathBuf]) -> Result<()> {
    if variable("LIBCLANG_PATH").is_none()
        && let Some(dir) = wheels.iter().map(|dir| dir.join("clang/native")).find(|dir| dir.is_dir())
    {
        println!("cargo::rerun-if-changed={}", dir.display());
        #[expect(unsafe_code, reason = "bindgen takes the folder from the environment alone")]
        // SAFETY: this is the only thread so far, so no other reads the environment.
        unsafe {
            env::set_var("LIBCLANG_PATH", dir);
        }
    }
    for name in ["LLVM_CONFIG_PATH", "BINDGEN_EXTRA_CLANG_ARGS"] {
        variable(name);
    }
    // bindgen panics, with a page of advice, when it cannot load the library.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = std::panic::catch_unwind(bindgen::clang_version).is_ok();
    std::panic::set_hook(hook);
    if !found {
        bail!(
            "nvcc is there, but libclang, which reads {}/common/abi.h for Rust, is not. Install it (Debian: libclang-dev), \
             set LIBCLANG_PATH to its folder, or run `scripts/install-cuda-toolchain`",
            crate::kernels::DIR
        );
    }
    Ok(())
}
