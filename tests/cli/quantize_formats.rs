//! `quantize`: the methods with files of their own (bitsandbytes, hqq, learned tables, ternary), what they hold, and
//! options that make no sense together.

use std::fs;
use std::path::Path;

use lowbit::checkpoint::Checkpoint;
use lowbit::dtype::DType;
use lowbit::quant::affine::Mapping;
use lowbit::quant::codebook::DoubleQuant;
use lowbit::quant::grid::{Grid, Search, round_to_nearest};
use lowbit::quant::hqq::hqq;
use lowbit::quant::table::{learn_table, round_to_table};
use lowbit::quant::ternary::{Threshold, ternary};
use lowbit::quant::{ActQuant, Codebook, QuantWeight, Weight};

use super::lowbit;
use super::quantize::{TEXT, kld, quant_weight, quantize, source};

const BF16: DType = DType::BF16;
const F16: DType = DType::F16;
const F32: DType = DType::F32;

fn dense(name: &str) -> Vec<f32> {
    match Checkpoint::open(source()).unwrap().linear(name).unwrap().weight {
        Weight::Dense { data, .. } => data.to_f32(),
        Weight::Quant(_) => panic!("the source is dense"),
    }
}

fn grid(bits: u8, group_size: Option<usize>, mapping: Mapping, scale_type: DType) -> Grid {
    Grid { bits, group_size, mapping, search: Search::MinMax, scale_type, smallest_zero: 0 }
}

type Rounding = fn(&[f32], usize) -> Option<QuantWeight>;

fn nf4(w: &[f32], k: usize) -> Option<QuantWeight> {
    round_to_table(w, k, &grid(4, Some(64), Mapping::Narrow, F32), Codebook::NF4)
}

fn twice_quantized(w: &[f32], k: usize) -> Option<QuantWeight> {
    let q = nf4(w, k)?;
    Some(QuantWeight { scales: DoubleQuant::new(&q.scales).absmax(), ..q })
}

fn learned(w: &[f32], k: usize) -> Option<QuantWeight> {
    let grid = grid(4, Some(64), Mapping::Narrow, F16);
    round_to_table(w, k, &grid, learn_table(w, k, &grid, None)?)
}

/// Every method: its file gives back what the library computes, `inspect` names it, it runs and is as near to the source
/// as its bits allow, and the dry run told its size.
#[test]
fn files_hold_what_was_computed() {
    let dir = tempfile::tempdir().unwrap();
    let int8 = "w8a8 per-channel sym, activations int8 dynamic per token";
    let cases: &[(&str, Rounding, &str, f64)] = &[
        ("--method nf4", nf4, "nf4a16 g64", 0.08),
        ("--method nf4 --double-quant", twice_quantized, "nf4a16 g64", 0.08),
        (
            "--method fp4 --group-size 128",
            |w, k| round_to_table(w, k, &grid(4, Some(128), Mapping::Narrow, F32), Codebook::FP4),
            "fp4a16 g128",
            0.3,
        ),
        (
            "--method llm-int8",
            |w, k| round_to_nearest(w, k, &grid(8, None, Mapping::Narrow, F32)),
            &format!("{int8}, 16-bit from 6 (LLM.int8)"),
            0.02,
        ),
        (
            "--method rtn --scheme w8a8 --format bitsandbytes",
            |w, k| round_to_nearest(w, k, &grid(8, None, Mapping::Narrow, F32)),
            int8,
            0.02,
        ),
        ("--method hqq", |w, k| hqq(w, k, &grid(4, Some(64), Mapping::Asymmetric, BF16)), "w4a16 g64 asym", 0.08),
        (
            "--method hqq --scheme w3a16 --group-size 32",
            |w, k| hqq(w, k, &grid(3, Some(32), Mapping::Asymmetric, BF16)),
            "w3a16 g32 asym",
            0.5,
        ),
        (
            "--method hqq --scheme w8a16 --group-size 0",
            |w, k| hqq(w, k, &grid(8, None, Mapping::Asymmetric, BF16)),
            "w8a16 per-channel asym",
            0.02,
        ),
        (
            "--method rtn --scheme w2a16 --group-size 16 --mapping asymmetric --format hqq",
            |w, k| round_to_nearest(w, k, &grid(2, Some(16), Mapping::Asymmetric, BF16)),
            "w2a16 g16 asym",
            4.0,
        ),
        (
            "--method ternary --group-size 32",
            |w, k| ternary(w, k, &grid(2, Some(32), Mapping::Centered, F16), Threshold::Twn),
            "w2a16 g32 sym",
            5.0,
        ),
        (
            "--method ternary-absmean --format compressed-tensors",
            |w, k| ternary(w, k, &grid(2, Some(128), Mapping::Centered, BF16), Threshold::AbsMean),
            "w2a16 g128 sym",
            8.0,
        ),
        ("--method kmeans", learned, "codebooka16 g64", 0.08),
        (
            "--method rtn --scheme w8a8-asym",
            |w, k| round_to_nearest(w, k, &grid(8, None, Mapping::Centered, BF16)),
            &format!("{int8}, asymmetric"),
            0.02,
        ),
    ];
    for (i, (args, rounding, words, most)) in cases.iter().enumerate() {
        let dst = dir.path().join(i.to_string());
        let args: Vec<&str> = args.split(' ').collect();
        let planned = quantize(&dst, &[&args[..], &["--dry-run"]].concat());
        quantize(&dst, &args);
        for name in ["self_attn.k_proj", "mlp.down_proj"] {
            let name = format!("model.layers.4.{name}");
            let (got, activation) = quant_weight(&dst, &name);
            assert_eq!(Some(&got), rounding(&dense(&name), got.k).as_ref(), "{args:?} {name}");
            assert_eq!(activation == ActQuant::None, !words.contains("int8"), "{args:?}");
        }
        let inspected = lowbit(&["inspect", dst.to_str().unwrap(), "--device", "cpu", "--json"]).json();
        assert_eq!(inspected["layers"][0]["linears"][0], format!("q,k,v,o,gate,up,down: {words}"), "{args:?}");
        let kld = kld(&dst);
        assert!((0.0..*most).contains(&kld), "{args:?}: {kld}");
        let bytes = fs::metadata(dst.join("model.safetensors")).unwrap().len() as f64;
        let planned = planned["checkpoint_bytes"].as_f64().unwrap();
        assert!((planned / bytes - 1.0).abs() < 0.1, "{args:?}: {planned} planned, {bytes} written");
    }
}

/// A table learned with a calibration text loses less than one without, and than NF4; its layers have tables of their own.
#[test]
fn tables_learn_from_inputs() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, args: &str| {
        let dst = dir.path().join(name);
        let report = quantize(&dst, &args.split(' ').collect::<Vec<_>>());
        (report, dst)
    };
    let calibrated = format!("--method kmeans --calib {TEXT} --samples 16 --seq-len 64");
    let (report, dst) = run("calibrated", &calibrated);
    assert_eq!(report["recipe"]["rounding"]["k-means"]["sensitive"], true);
    let error = report["layers"][2]["linears"][6]["output_error"].as_f64().unwrap();
    let table = |dst: &Path, name: &str| quant_weight(dst, name).0.encoding.codebook().copied().unwrap();
    let down = "model.layers.2.mlp.down_proj";
    assert!((1e-5..0.02).contains(&error), "{error}");
    assert_ne!(table(&dst, down), table(&dst, "model.layers.2.mlp.up_proj"));
    let (_, plain) = run("plain", "--method kmeans");
    assert_ne!(table(&dst, down), table(&plain, down));
    let (_, nf4) = run("nf4", "--method nf4");
    let [calibrated, plain, nf4] = [&dst, &plain, &nf4].map(|dst| kld(dst));
    assert!(plain < nf4 && calibrated < nf4, "calibrated {calibrated}, plain {plain}, nf4 {nf4}");
}

/// Each observer chooses another range, none beyond what was seen, and all of them run.
#[test]
fn observers() {
    let dir = tempfile::tempdir().unwrap();
    let scale = |observer: &str| {
        let dst = dir.path().join(observer.replace(':', "-"));
        let args =
            format!("--method rtn --scheme w8a8-static --calib {TEXT} --samples 8 --seq-len 64 --observer {observer}");
        quantize(&dst, &args.split(' ').collect::<Vec<_>>());
        match quant_weight(&dst, "model.layers.1.mlp.down_proj").1 {
            ActQuant::StaticPerTensor { scale, zero_point: 0 } => scale,
            other => panic!("{observer}: {other:?}"),
        }
    };
    let widest = scale("minmax");
    let others = ["mse", "percentile", "percentile:99", "entropy", "ema"].map(scale);
    assert!(others.iter().all(|s| *s > 0.0 && *s <= widest), "{others:?} of {widest}");
    assert!(others[2] < others[1] && others[1] < widest, "{others:?} of {widest}");
    assert!(others[3] < widest && others[4] < widest, "{others:?} of {widest}");
}

#[test]
fn senseless_combinations() {
    let dir = tempfile::tempdir().unwrap();
    let dst = dir.path().join("dst");
    let cases: &[(&str, i32, &[&str])] = &[
        ("--method nf4 --scheme w3a16", 2, &["--scheme", "nf4", "w4a16"]),
        ("--method fp4 --scheme w4a8", 2, &["--scheme", "fp4", "w4a16"]),
        ("--method nf4 --mapping narrow", 2, &["--mapping", "nf4"]),
        ("--method nf4 --group-size 48", 2, &["--group-size", "32, 64"]),
        ("--method nf4 --group-size 0", 2, &["--group-size", "32, 64"]),
        ("--method nf4 --format gptq", 2, &["--format", "bitsandbytes"]),
        ("--method nf4 --rule down_proj=w8a16", 2, &["--scheme", "w4a16"]),
        ("--method nf4 --lm-head w4a16", 5, &["--lm-head", "bitsandbytes"]),
        ("--method rtn --double-quant", 2, &["--double-quant", "nf4"]),
        ("--method llm-int8 --scheme w4a8", 2, &["--scheme", "w8a8"]),
        ("--method llm-int8 --group-size 64", 2, &["--group-size", "channel"]),
        ("--method llm-int8 --outlier-threshold=-1", 2, &["--outlier-threshold"]),
        ("--method rtn --outlier-threshold 5", 2, &["--outlier-threshold", "llm-int8"]),
        ("--method hqq --scheme w4a8", 2, &["--scheme", "hqq"]),
        ("--method hqq --scheme w7a16", 5, &["7 bits", "hqq"]),
        ("--method hqq --format awq", 2, &["--format", "hqq alone"]),
        ("--method ternary --scheme w4a16", 2, &["--scheme", "ternary", "w2a16"]),
        ("--method ternary --format awq", 5, &["4 bits", "awq"]),
        ("--method kmeans --format bitsandbytes", 2, &["--format", "codebook"]),
        ("--method rtn --format codebook", 5, &["codebook", "learned"]),
        ("--method rtn --format bitsandbytes", 5, &["bitsandbytes", "8 bits"]),
        ("--method rtn --scheme w8a8 --format bitsandbytes --mapping centered", 2, &["--mapping", "narrow"]),
        ("--method rtn --scheme w8a16 --format bitsandbytes", 5, &["int8 activations"]),
        ("--method rtn --observer entropy", 2, &["--observer", "w8a8-static"]),
        ("--method rtn --observer percentile:0", 2, &["percentile:0"]),
        ("--method rtn --scheme w8a8-static --observer ema", 2, &["--calib"]),
        ("--method rtn --scheme w8a8 --format hqq", 5, &["int8 activations", "hqq"]),
    ];
    for (args, code, needles) in cases {
        let all =
            [vec!["quantize", source().to_str().unwrap(), dst.to_str().unwrap()], args.split(' ').collect()].concat();
        let run = lowbit(&all);
        assert_eq!(run.code, Some(*code), "{args}: {}", run.stderr);
        for needle in *needles {
            assert!(run.stderr.contains(needle), "{args}: `{needle}` is not in: {}", run.stderr);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{args}: nothing is begun");
    }
}
