//! `doctor`: what this binary and this machine offer, and what to do about the rest. Never fails.

use std::process::ExitCode;

use clap::builder::FalseyValueParser;
use serde_json::{Value, json};

use crate::checkpoint::hub::Hub;
use crate::device::Device;
use crate::device::cpu::Level;
#[cfg(lowbit_cuda)]
use crate::dtype::DType;

use super::inspect::Lines;
use super::options::DeviceArgs;
use super::{Outcome, bandwidth, output};

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: lowbit doctor")]
pub(super) struct Args {
    /// Print one JSON object instead of text.
    #[arg(long, env = "LOWBIT_JSON", value_parser = FalseyValueParser::new())]
    json: bool,

    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &Args) -> Outcome {
    args.device.start_threads()?;
    let mut problems = Vec::new();
    let cpu = cpu();
    let cuda = cuda(&mut problems);
    let hub = hub(&mut problems);
    if args.json {
        let version = env!("CARGO_PKG_VERSION");
        output::write_json(&json!({ "version": version, "cpu": cpu, "cuda": cuda, "hub": hub, "problems": problems }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut lines = Lines::default();
    lines.add(
        "lowbit",
        format!("{} for {} {}", env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH),
    );
    for (section, value) in [("cpu", &cpu), ("cuda", &cuda), ("hub", &hub)] {
        for (name, value) in value.as_object().into_iter().flatten() {
            let label = name.trim_end_matches("_per_s").trim_end_matches("_bytes").replace('_', " ");
            lines.add(section, format!("{label}: {}", words(name, value)));
        }
    }
    if problems.is_empty() {
        lines.add("problems", "none".into());
    }
    problems.into_iter().for_each(|problem| lines.add("problems", problem));
    output::write(&lines.text)?;
    Ok(ExitCode::SUCCESS)
}

/// A value as people read it; fields named `..._bytes` and `..._bytes_per_s` are numbers of bytes.
fn words(name: &str, value: &Value) -> String {
    match value {
        Value::Null => "not found".into(),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.into(),
        Value::Number(n) if name.ends_with("_bytes_per_s") => format!("{:.1} GB/s", n.as_f64().unwrap_or(0.0) / 1e9),
        Value::Number(n) if name.ends_with("_bytes") => output::bytes(n.as_u64().unwrap_or(0)),
        Value::Array(items) if items.is_empty() => "none".into(),
        Value::Array(items) => items.iter().map(|item| words("", item)).collect::<Vec<_>>().join(", "),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn cpu() -> Value {
    let device = Device::cpu();
    let memory = device.memory().ok();
    json!({
        "features": cpu_features(),
        "fast_paths": format!("{:?}", Level::detect()).to_lowercase(),
        "threads": rayon::current_num_threads(),
        "cores": std::thread::available_parallelism().ok().map(usize::from),
        "free_memory_bytes": memory.map(|(free, _)| free),
        "total_memory_bytes": memory.map(|(_, total)| total),
        "read_bytes_per_s": bandwidth::bytes_per_second(&device).ok().map(f64::round),
    })
}

/// Instruction sets that the fast paths look for.
#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<&'static str> {
    let found = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512vl", is_x86_feature_detected!("avx512vl")),
        ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
    ];
    found.into_iter().filter_map(|(name, has)| has.then_some(name)).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Vec<&'static str> {
    Vec::new()
}

#[cfg(lowbit_cuda)]
fn cuda(problems: &mut Vec<String>) -> Value {
    let probe = crate::device::cuda::probe();
    let gpus = probe.gpus.iter().enumerate().map(|(i, gpu)| {
        let (major, minor) = gpu.compute_capability;
        format!("{i}: {}, {}, compute capability {major}.{minor}", gpu.name, output::bytes(gpu.memory_bytes))
    });
    let copy = match probe.problems.is_empty() {
        true => Device::cuda(0, DType::F16).and_then(|device| bandwidth::bytes_per_second(&device)),
        false => Ok(0.0),
    };
    if let Err(error) = &copy {
        problems.push(error.to_string());
    }
    let value = json!({
        "built_in": true,
        "nvcc": probe.nvcc,
        "archs": probe.archs,
        "driver": probe.driver,
        "driver_supports_cuda": probe.driver_cuda.map(|(major, minor)| format!("{major}.{minor}")),
        "gpus": gpus.collect::<Value>(),
        "cublaslt": probe.cublaslt,
        "copy_bytes_per_s": copy.ok().filter(|&rate| rate > 0.0).map(f64::round),
        "works": probe.problems.is_empty() && problems.is_empty(),
    });
    problems.extend(probe.problems);
    if !probe.gpus.is_empty() && probe.cublaslt.is_none() {
        problems.push(
            "cuBLASLt was not found: 16-bit layers run on our own kernel. Put libcublasLt.so on the library path"
                .into(),
        );
    }
    value
}

#[cfg(not(lowbit_cuda))]
fn cuda(problems: &mut Vec<String>) -> Value {
    problems.push(
        "this binary has no CUDA kernels: it was built without nvcc. To use an NVIDIA GPU, run \
         scripts/install-cuda-toolchain (no root needed) and build again"
            .into(),
    );
    json!({ "built_in": false, "works": false })
}

/// Where models from the hub go and come from.
fn hub(problems: &mut Vec<String>) -> Value {
    match Hub::from_env() {
        Ok(hub) => json!({
            "cache": hub.cache,
            "endpoint": hub.endpoint,
            "offline": hub.offline,
            "token": hub.token.is_some(),
        }),
        Err(error) => {
            problems.push(format!("models cannot be fetched from the hub, directories work: {error}"));
            json!({})
        }
    }
}
