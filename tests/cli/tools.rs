//! `inspect`, `verify`, `bench`, `doctor`, and the help.

use super::{DEMO, lowbit};
use crate::common::fixtures::fixture;

#[test]
fn inspect_describes_the_demo() {
    let got =
        lowbit(&["inspect", DEMO, "--device", "cpu", "--max-model-len", "160", "--max-num-seqs", "3", "--json"]).json();
    assert_eq!(
        (&got["architecture"], &got["num_layers"], &got["parameters"]),
        (&"Llama".into(), &6.into(), &5_770_496.into())
    );
    assert_eq!(
        got["layers"],
        serde_json::json!([{ "layers": "0-5", "linears": ["q,k,v,o,gate,up,down: w4a16 g128 sym"] }])
    );
    // 4 bits and a 16-bit scale for 128 of them.
    assert_eq!(got["linear_bits_per_weight"], 4.125);
    // Keys and values of 6 layers, 2 heads of 64, in f32, for 3 x 160 tokens.
    assert_eq!(got["memory"]["kv_cache_bytes"], 2 * 6 * 2 * 64 * 4 * 3 * 160);
    assert_eq!(got["memory"]["fits"], true);
    assert_eq!(got["kernels"][0]["scheme"], "w4a16 g128 sym");
    let huge = ["inspect", DEMO, "--device", "cpu", "--max-model-len", "16777216", "--max-num-seqs", "65536", "--json"];
    assert_eq!(lowbit(&huge).json()["memory"]["fits"], false);
    let text = lowbit(&["inspect", DEMO, "--device", "cpu"]);
    assert_eq!(text.code, Some(0), "{}", text.stderr);
    assert!(text.stdout.contains("layers 0-5    q,k,v,o,gate,up,down: w4a16 g128 sym\n"), "{}", text.stdout);
}

/// Bytes of a group of weights beside its codes on a GPU before sm_90: an f32 scale. A build without kernels does not know that
/// there are no zero points, and counts one.
const GROUP_BYTES: u64 = if cfg!(lowbit_cuda) { 4 } else { 8 };

/// What fits where, by numbers worked out by hand: a 70B Llama has 68.5 billion weights in its layers' linears, 2.1 billion in
/// embedding and head.
#[test]
fn plan_knows_what_fits() {
    let got = lowbit(&["plan", DEMO, "--gpu", "l4", "--max-model-len", "160", "--max-num-seqs", "3", "--json"]).json();
    assert_eq!((&got["parameters"], &got["memory"]["fits"]), (&5_770_496.into(), &true.into()));
    assert_eq!(got["memory"]["kv_cache_bytes"], 2 * 6 * 2 * 64 * 2 * 3 * 160, "keys and values in 16 bit");
    let plan = |scheme: &str, gpu: &str| {
        let args = ["plan", "--dummy", "llama-3.1-70b", "--scheme", scheme, "--gpu", gpu];
        lowbit(&[&args[..], &["--max-model-len", "8192", "--max-num-seqs", "8", "--json"]].concat()).json()
    };
    let four = plan("w4a16", "a100-80gb");
    let layers = 80.0 * (8192.0 * 8192.0 * 2.0 + 2.0 * 8192.0 * 1024.0 + 3.0 * 8192.0 * 28672.0);
    let head = 128_256.0 * 8192.0;
    let bytes = layers * (0.5 + GROUP_BYTES as f64 / 128.0) + 2.0 * head;
    assert_eq!(four["memory"]["fits"], true);
    let best = four["at_best"]["decode"][0]["tokens_per_s"].as_f64().unwrap();
    assert!((best / (2039e9 / bytes) - 1.0).abs() < 1e-6, "{best}");
    // A token: 2 x 8 heads x 128 x 2 bytes x 80 layers.
    assert_eq!(four["memory"]["kv_cache_bytes"], 327_680u64 * 8 * 8192);
    assert_eq!(plan("bf16", "a100-80gb")["memory"]["fits"], false);
    assert_eq!(plan("w8a8", "h200-141gb")["memory"]["fits"], true);
    // Ternary weights: 4 bits each before Hopper, there 2.
    let ternary = |gpu: &str| {
        let args =
            ["plan", "--dummy", "llama-3.1-70b", "--scheme", "w2a8", "--group-size", "0", "--gpu", gpu, "--json"];
        lowbit(&args).json()["memory"]["weights_bytes"].as_f64().unwrap()
    };
    assert_eq!(ternary("a100-80gb") - ternary("h100-80gb"), layers / 4.0);
    let text = lowbit(&["plan", DEMO]);
    assert!(text.stdout.contains("fits") && text.stdout.contains("at best"), "{}", text.stdout);
    let bad = lowbit(&["plan", DEMO, "--gpu", "voodoo-2"]);
    assert_eq!(bad.code, Some(2));
    assert!(bad.stderr.contains("h200-141gb"), "{}", bad.stderr);
}

/// The demo's head is its embedding, 4096 x 256 in 16 bit: held in 8 bits it takes half, and a 16-bit scale for 128 weights.
#[test]
fn a_head_held_in_fewer_bits() {
    let inspect = |extra: &[&str]| lowbit(&[&["inspect", DEMO, "--device", "cpu", "--json"], extra].concat()).json();
    let (found, held) = (inspect(&[]), inspect(&["--lm-head", "w8a16"]));
    assert_eq!(
        (&found["head"], &held["head"]),
        (&"the embedding, transposed".into(), &"w8a16 g128 sym, of the embedding".into())
    );
    let bytes = |report: &serde_json::Value| report["memory"]["weights_bytes"].as_u64().unwrap();
    assert_eq!(bytes(&found) - bytes(&held), 4096 * 256 * 2 - (4096 * 256 + 4096 * 2 * 2));
    assert_eq!(held["kernels"][1]["scheme"], "w8a16 g128 sym");
    assert_eq!(held["linear_bits_per_weight"], 4.125, "the layers stay");

    let plan = |extra: &[&str]| lowbit(&[&["plan", "--dummy", "llama-3.1-8b", "--json"], extra].concat()).json();
    let saved = bytes(&plan(&[])) - bytes(&plan(&["--lm-head", "w8a16"]));
    assert_eq!(saved, 128_256 * 4096 - 128_256 * 32 * GROUP_BYTES);
    let bench = ["bench", DEMO, "--device", "cpu", "-p", "0", "-n", "1", "-r", "1", "--json", "--lm-head", "w8a16"];
    let scheme = lowbit(&bench).json()[0]["scheme"].clone();
    assert_eq!(scheme, "w4a16 g128 sym, head w8a16 g128 sym");
    let verified = lowbit(&["verify", DEMO, "--device", "cpu", "--layers", "1", "--json", "--lm-head", "w8a16"]).json();
    assert_eq!(verified["passed"], true);
}

#[test]
fn inspect_names_schemes() {
    for (name, scheme) in [
        ("awq-4bit-g128", "w4a16 g128 asym"),
        ("gptq-4bit-g32-actorder", "w4a16 g32 sym act-order"),
        ("ct-w8a8-dynamic", "w8a8 per-channel sym, activations int8 dynamic per token"),
    ] {
        let got = lowbit(&["inspect", fixture(name).to_str().unwrap(), "--device", "cpu", "--json"]).json();
        assert_eq!(got["layers"][0]["linears"][0], format!("q,k,v,o,gate,up,down: {scheme}"), "{name}");
    }
}

/// The fast path against the specification, for a checkpoint of each family; int8 bit for bit.
#[test]
fn verify_passes_on_the_cpu() {
    let fixtures = ["awq-4bit-g128", "gptq-4bit-g32-actorder", "ct-w8a8-dynamic", "ct-w4a16-gptq"].map(fixture);
    for dir in [DEMO].into_iter().chain(fixtures.iter().map(|dir| dir.to_str().unwrap())) {
        let got = lowbit(&["verify", dir, "--device", "cpu", "--layers", "2", "--json"]).json();
        assert_eq!((&got["passed"], &got["device"]), (&true.into(), &"cpu".into()), "{dir}");
        let checks = got["checks"].as_array().unwrap();
        for op in [
            "embed",
            "input_norm",
            "q_proj",
            "attention prefill",
            "attention decode",
            "down_proj",
            "whole layer",
            "norm and lm_head",
        ] {
            assert!(checks.iter().any(|c| c["op"] == op), "{dir}: {op} was not checked");
        }
        let int8 = checks.iter().filter(|c| c["detail"].as_str().unwrap().contains("activations int8"));
        assert!(int8.clone().all(|c| c["exact"] == true));
        assert_eq!(int8.count(), if dir.contains("w8a8") { 14 } else { 0 }, "{dir}");
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_verify_passes() {
    for name in ["awq-4bit-g128", "gptq-4bit-g32-actorder", "ct-w8a8-dynamic", "ct-w4a16-gptq"] {
        for dtype in ["f16", "bf16"] {
            let run = lowbit(&["verify", fixture(name).to_str().unwrap(), "--device", "cuda", "--dtype", dtype]);
            assert_eq!(run.code, Some(0), "{name} in {dtype}: {}{}", run.stdout, run.stderr);
        }
    }
}

#[test]
fn bench_reports_every_test() {
    let args = ["bench", DEMO, "--device", "cpu", "-p", "16", "-n", "2", "-b", "1,3", "-d", "0,20", "-r", "2"];
    let got = lowbit(&[&args[..], &["--json"]].concat()).json();
    let lines = got.as_array().unwrap();
    let names: Vec<&str> = lines.iter().map(|line| line["test"].as_str().unwrap()).collect();
    assert_eq!(names, ["pp16", "tg2", "tg2 b3", "pp16 @ d20", "tg2 @ d20", "tg2 b3 @ d20"]);
    for line in lines {
        assert_eq!(line["samples"].as_array().unwrap().len(), 2);
        assert!(line["tokens_per_s"].as_f64().unwrap() > 0.0 && line["tokens_per_s_stddev"].as_f64().unwrap() >= 0.0);
        assert_eq!(line["ceiling_fraction"].is_null(), line["n_gen"] == 0);
    }
    let table = lowbit(&["bench", DEMO, "--device", "cpu", "--threads", "1", "-p", "16", "-n", "0", "-r", "1"]);
    assert_eq!(table.code, Some(0), "{}", table.stderr);
    assert!(table.stdout.starts_with("| model") && table.stdout.contains("| pp16 |"), "{}", table.stdout);
}

/// Results of `bench kernels --json`, as a run with a GPU prints them, shown again where there is none.
#[test]
fn bench_kernels_shows_earlier_results() {
    let time = |us: f64| serde_json::json!({ "median_us": us, "p10_us": us - 1.0, "p90_us": us + 2.0, "replays": 15, "ops": 150, "sm_mhz": 1980.0 });
    let ceiling = |per_s: f64| serde_json::json!({ "per_s": per_s, "source": "a measurement" });
    let results = serde_json::json!({
        "conditions": {
            "lowbit": "0.1.0", "date": "2026-11-22T01:20:33Z", "gpu": "NVIDIA H200", "sm": 90, "dtype": "bf16",
            "driver": null, "nvcc": "13.0.88", "cublaslt": "libcublasLt.so.13 13.1.0", "rotated_bytes": 268435456,
            "power_limit_w": 700.0, "sm_mhz": { "min": 1755.0, "median": 1965.0, "max": 1980.0 }, "memory_mhz": null,
            "power_w": null, "temperature_c": null,
        },
        "ceilings": { "copy": ceiling(4e12), "int8": ceiling(1.5e15), "float16": null },
        "measurements": [{
            "op": "w8a8", "shape": "8192x8192", "m": 16, "kernel": "gemm_w8a8/sm80 16x32x256", "unit": "int8",
            "bytes": 67502080, "operations": 2147483648_u64, "time": time(20.0),
            "peers": [{ "unit": "int8", "time": time(25.0), "speedup": 1.25 }],
            "rates": { "bytes_per_s": 3.375e12, "operations_per_s": 1.074e14, "of_copy": 0.84, "of_tensor": 0.07 },
        }],
    });
    let dir = tempfile::tempdir().expect("a directory");
    let (file, plots) = (dir.path().join("results.json"), dir.path().join("some/plots"));
    std::fs::write(&file, results.to_string()).expect("written");
    let (file, plots) = (file.to_str().expect("UTF-8"), plots.to_str().expect("UTF-8"));
    let shown = lowbit(&["bench", "kernels", "--from", file, "--plot", plots]);
    assert_eq!(shown.code, Some(0), "{}", shown.stderr);
    for part in
        ["copy      4.00 TB/s", "| w8a8 | 8192x8192 | 16 |", "19.0-22.0", "|    84 % |", "|   1.25 |        - |"]
    {
        assert!(shown.stdout.contains(part), "{part} is not in: {}", shown.stdout);
    }
    assert!(shown.stderr.contains("w8a8.svg"), "{}", shown.stderr);
    let files: Vec<_> = std::fs::read_dir(plots).expect("made").map(|file| file.expect("a file").file_name()).collect();
    assert_eq!(files, ["w8a8.svg"]);
    assert_eq!(lowbit(&["bench", "kernels", "--from", file, "--json"]).json(), results);
}

#[test]
fn doctor_never_fails() {
    let got = lowbit(&["doctor", "--threads", "1", "--json"]).json();
    assert_eq!((&got["version"], &got["cpu"]["threads"]), (&env!("CARGO_PKG_VERSION").into(), &1.into()));
    assert!(got["cpu"]["read_bytes_per_s"].as_f64().unwrap() > 0.0);
    assert_eq!(got["hub"]["offline"], true);
    assert_eq!(got["cuda"]["works"] == false, !got["problems"].as_array().unwrap().is_empty());
    let text = lowbit(&["doctor"]);
    assert!(text.code == Some(0) && text.stdout.contains("problems"), "{}{}", text.stdout, text.stderr);
}

#[test]
fn help_names_verbs_and_exit_codes() {
    let help = lowbit(&["--help"]).stdout;
    for word in ["generate", "chat", "eval", "inspect", "verify", "bench", "doctor", "Exit codes:", "LOWBIT", "HF_HOME"]
    {
        assert!(help.contains(word), "{word} is not in: {help}");
    }
    for verb in ["generate", "chat", "eval", "inspect", "verify", "bench", "doctor"] {
        let run = lowbit(&[verb, "--help"]);
        assert!(run.code == Some(0) && run.stdout.contains("Example: lowbit"), "{verb}: {}", run.stdout);
    }
    let kernels = lowbit(&["bench", "kernels", "--help"]).stdout;
    assert!(["w8a8", "NxK", "--quick", "Example: lowbit"].iter().all(|word| kernels.contains(word)), "{kernels}");
    assert!(lowbit(&["--version"]).stdout.starts_with("lowbit "));
}
