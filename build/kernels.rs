//! Every `.cu` under `kernels/` to one fatbin: in parallel, and only what changed.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, thread};

use anyhow::{Context, Result, bail, ensure};

use crate::toolchain::Toolchain;
use crate::variable;

/// Where the sources are, and the folder their includes are relative to.
pub(crate) const DIR: &str = "kernels";

/// What is built by default: machine code for these compute capabilities, and PTX of `compute_80`, which the driver
/// compiles for whatever is newer. A file named `sm90.cu` uses instructions of Hopper alone, and is built for it alone.
pub(crate) const ALL_ARCHS: [&str; 5] = ["80", "86", "89", "90", "ptx"];
const HOPPER_FILE: &str = "sm90.cu";

/// ptxas warnings that mean a kernel lost its speed: wgmma was serialised; setmaxnreg was ignored.
const FATAL_WARNINGS: [&str; 3] = ["C7508", "C7510", "C7512"];

/// The architectures of a comma-separated list, or all.
pub(crate) fn archs(list: Option<&str>) -> Result<Vec<&'static str>> {
    let Some(list) = list else { return Ok(ALL_ARCHS.to_vec()) };
    let wanted: Vec<&str> = list.split(',').map(str::trim).collect();
    for arch in &wanted {
        ensure!(ALL_ARCHS.contains(arch), "LOWBIT_CUDA_ARCHS={list}: {arch:?} is not one of {ALL_ARCHS:?}");
    }
    Ok(ALL_ARCHS.into_iter().filter(|arch| wanted.contains(arch)).collect())
}

/// nvcc's own name of a target.
pub(crate) fn target_name(arch: &str) -> String {
    if arch == "ptx" { "compute_80".to_owned() } else { format!("sm_{arch}") }
}

/// Compiles what is not up to date, each `kernels/NAME.cu` to `out/kernels/NAME.fatbin`; returns the names, sorted. The
/// work is done in `shared/ARCHITECTURES/`, which the builds of a target folder have in common: lints, tests and binaries
/// each run this script on their own, and nvcc takes minutes.
///
/// # Errors
/// Everything nvcc said, file by file, after all files have been tried.
pub(crate) fn compile(toolchain: &Toolchain, archs: &[&str], shared: &Path, out: &Path) -> Result<Vec<String>> {
    let shared = &shared.join(archs.join("-"));
    let mut sources = Vec::new();
    find_sources(Path::new(DIR), &mut sources)?;
    sources.retain(|source| !source.ends_with(HOPPER_FILE) || archs.contains(&"90"));
    sources.sort();
    let user_flags: Vec<_> =
        ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"].into_iter().map(variable).collect();
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1).clamp(1, sources.len().max(1));

    let kernels: Vec<Kernel> = sources
        .iter()
        .map(|source| Kernel::new(source, toolchain, archs, &user_flags, shared))
        .collect::<Result<_>>()?;
    let next = AtomicUsize::new(0);
    let work = || {
        let mut failures = Vec::new();
        // From the end: the slowest are there, and should not be what all else waits for.
        while let Some(kernel) = kernels.iter().rev().nth(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = kernel.build() {
                failures.push((kernel.source, format!("{error:#}")));
            }
        }
        failures
    };
    let mut failures: Vec<(&PathBuf, String)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker does not panic")).collect()
    });
    failures.sort();
    if !failures.is_empty() {
        let texts: Vec<_> = failures.iter().map(|(source, text)| format!("{}:\n{text}", source.display())).collect();
        bail!("{}\n{} of {} kernels failed", texts.join("\n"), failures.len(), kernels.len());
    }
    for kernel in &kernels {
        kernel.copy_to(out)?;
    }
    Ok(kernels.into_iter().map(|kernel| kernel.name).collect())
}

/// The entry functions of each of the modules `names`, sorted, as ptxas said in what [`compile`] left in `out`.
pub(crate) fn functions(names: &[String], out: &Path) -> Result<Vec<Vec<String>>> {
    let of_module = |name: &String| {
        let report = out.join(DIR).join(name).with_extension("txt");
        let text = fs::read_to_string(&report).with_context(|| format!("reading {}", report.display()))?;
        let entries = text.lines().filter_map(|line| line.split_once("Compiling entry function '")?.1.split_once('\''));
        // One for each architecture.
        let functions: BTreeSet<&str> = entries.map(|(function, _)| function).collect();
        Ok(functions.into_iter().map(str::to_owned).collect())
    };
    names.iter().map(of_module).collect()
}

/// The files called `name` in the folders of ops and families, sorted.
pub(crate) fn headers(name: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(DIR).with_context(|| format!("reading {DIR}"))? {
        found.extend(Some(entry?.path().join(name)).filter(|file| file.is_file()));
    }
    found.sort();
    Ok(found)
}

fn find_sources(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            find_sources(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "cu") {
            found.push(path);
        }
    }
    Ok(())
}

/// One source file and what comes of it. Beside the fatbin lie: what ptxas said (`.txt`), the files read (`.d`), and
/// a stamp over all that went in, written last.
struct Kernel<'a> {
    source: &'a PathBuf,
    name: String,
    fatbin: PathBuf,
    nvcc: &'a Path,
    arguments: Vec<String>,
    /// Hash of the compiler and its flags, to which the stamp adds the files' contents.
    settings: u64,
}

impl<'a> Kernel<'a> {
    fn new(
        source: &'a PathBuf,
        toolchain: &'a Toolchain,
        archs: &[&str],
        user_flags: &[Option<String>],
        out: &Path,
    ) -> Result<Kernel<'a>> {
        let stem = source.strip_prefix(DIR)?.with_extension("");
        let fatbin = out.join(DIR).join(&stem).with_extension("fatbin");
        fs::create_dir_all(fatbin.parent().context("a file has a folder")?)?;

        let mut arguments: Vec<String> =
            ["--fatbin", "-std=c++17", "-O3", "-Xptxas", "-v", "-I", DIR].map(str::to_owned).to_vec();
        if toolchain.release >= (13, 0) {
            // Smaller, and read by every driver that runs what nvcc 13 makes.
            arguments.push("--compress-mode=size".to_owned());
        }
        let hopper = source.ends_with(HOPPER_FILE);
        for &arch in if hopper { &["90a"][..] } else { archs } {
            let virtual_arch = if arch == "ptx" { "80" } else { arch };
            arguments.push(format!("-gencode=arch=compute_{virtual_arch},code={}", target_name(arch)));
        }
        let mut hasher = DefaultHasher::new();
        (&toolchain.version, &arguments, user_flags).hash(&mut hasher);
        let name = stem.to_str().context("kernel names are UTF-8")?.to_owned();
        Ok(Kernel { source, name, fatbin, nvcc: &toolchain.nvcc, arguments, settings: hasher.finish() })
    }

    fn build(&self) -> Result<()> {
        let (stamp, report) = (self.fatbin.with_extension("stamp"), self.fatbin.with_extension("txt"));
        let is_current = self.fatbin.is_file()
            && fs::read_to_string(&stamp).is_ok_and(|old| self.stamp().is_ok_and(|now| old == now));
        if !is_current {
            let _ = fs::remove_file(&stamp);
            self.run_nvcc(&report)?;
            fs::write(&stamp, self.stamp()?)?;
        }
        for line in fs::read_to_string(&report)?.lines().filter(|line| line.contains("warning")) {
            println!("cargo::warning={}: {line}", self.source.display());
        }
        Ok(())
    }

    /// The fatbin and what ptxas said of it, where `out` does not have them already.
    fn copy_to(&self, out: &Path) -> Result<()> {
        let to = out.join(DIR).join(&self.name).with_extension("fatbin");
        fs::create_dir_all(to.parent().context("a file has a folder")?)?;
        for (from, to) in [(&self.fatbin, &to), (&self.fatbin.with_extension("txt"), &to.with_extension("txt"))] {
            let bytes = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
            if fs::read(to).ok().as_ref() != Some(&bytes) {
                fs::write(to, bytes).with_context(|| format!("writing {}", to.display()))?;
            }
        }
        Ok(())
    }

    fn run_nvcc(&self, report: &Path) -> Result<()> {
        let output = Command::new(self.nvcc)
            .args(&self.arguments)
            .arg("-MD")
            .arg("-MF")
            .arg(self.fatbin.with_extension("d"))
            .arg("-o")
            .arg(&self.fatbin)
            .arg(self.source)
            .output()
            .with_context(|| format!("{} does not start", self.nvcc.display()))?;
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            let said: Vec<_> = text.lines().filter(|line| !line.starts_with("ptxas info")).collect();
            bail!("{}\n(nvcc: {})", said.join("\n"), output.status);
        }
        if let Some(line) = text.lines().find(|line| FATAL_WARNINGS.iter().any(|code| line.contains(code))) {
            bail!("{line}\n(this warning means that the kernel lost its speed, so it fails the build)");
        }
        fs::write(report, &*text).with_context(|| format!("writing {}", report.display()))
    }

    /// Hash of the settings and of every file under `kernels/` that the last compilation read.
    fn stamp(&self) -> Result<String> {
        let mut hasher = DefaultHasher::new();
        self.settings.hash(&mut hasher);
        let rule = fs::read_to_string(self.fatbin.with_extension("d"))?;
        let inside = env::current_dir()?.join(DIR);
        // `target : file file \ file`. The compiler's own headers are covered by its version.
        let files =
            rule.split_whitespace().filter(|word| word.starts_with(DIR) || Path::new(word).starts_with(&inside));
        let mut count = 0;
        for file in files {
            file.hash(&mut hasher);
            fs::read(file)?.hash(&mut hasher);
            count += 1;
        }
        ensure!(count > 0, "nvcc listed no file that {} is made of", self.source.display());
        Ok(format!("{:016x}", hasher.finish()))
    }
}
