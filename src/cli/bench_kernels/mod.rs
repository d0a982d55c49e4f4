//! `bench kernels`: the time of every op on the GPU, beside what the GPU can do and what cuBLASLt does, all measured in
//! one run. `cargo bench --bench kernels` is the same command.
//!
//! [`run`] measures all, [`measure`] times, [`linear`] and [`ops`] say what, [`report`] holds the results, [`roofline`] draws them; [`tune`] makes
//! the table by which linear layers choose their kernels.

#[cfg(lowbit_cuda)]
mod linear;
#[cfg(lowbit_cuda)]
mod measure;
#[cfg(lowbit_cuda)]
mod ops;
#[cfg_attr(not(lowbit_cuda), allow(dead_code))] // nothing makes results there
mod report;
mod roofline;
#[cfg(lowbit_cuda)]
mod run;
#[cfg(lowbit_cuda)]
mod tune;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::ValueEnum;
use clap::builder::FalseyValueParser;
use serde::{Deserialize, Serialize};

use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};

use super::options::DeviceArgs;
use super::{Outcome, output};
use report::Report;

const EXAMPLE: &str = "\
Example: lowbit bench kernels --op w8a8 --shapes 4096x4096,28672x4096 --rows 1,16,64,1024";
const METHOD: &str = "\
How it measures:
  A CUDA graph runs the op again and again for some milliseconds, each time on the next of several copies of its weights \
and outputs, which together exceed every cache (256 MiB). CUDA events time replays of the graph; the table has their \
median and the 10th and 90th percentile. Bytes are what the op must read and write once, operations its multiplications \
and additions.

  The ceilings are of the same run: a copy in device memory, and the best rate of cuBLASLt's int8 and 16-bit products of \
large matrices, or of any product of the run that was faster.

  `x int8` and `x 16-bit` are the speed relative to cuBLASLt at the same shape: its plain int8 product (32-bit sums, no \
scales) and its product of 16-bit weights. A dash: it has no kernel for the shape, or runs the op itself. `x plain` is the \
speed relative to the op without what the name adds (w8a8 of w8a8_swiglu, w8a8_u8 and llm_int8, w4a8 of w4a8_progressive, w4a16 of w4a16_asymmetric, \
w4a16_fine_scales and w4a16_norm, w4a16_norm of w4a16_act_order, w8a16 of fp8a16), where the run has both.

Example: lowbit bench kernels --op w8a8 --shapes 4096x4096,28672x4096 --rows 1,16,64,1024";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE, after_long_help = METHOD)]
pub(super) struct Args {
    /// Ops to measure; several with commas. All without it.
    #[arg(long, env = "LOWBIT_OP", value_name = "OP", value_delimiter = ',')]
    op: Vec<Op>,

    /// Weights of the linear ops, N outputs times K inputs; several with commas. Without it those of Llama-3.1-8B
    /// and 70B.
    #[arg(long, env = "LOWBIT_SHAPES", value_name = "NxK", value_delimiter = ',', value_parser = Shape::parse)]
    shapes: Vec<Shape>,

    /// Rows (tokens) of a linear op or of one on rows; several with commas. Without it 1 to 8192 for the first and 1,
    /// 64, 2048 for the second. Attention has batches of its own.
    #[arg(short = 'm', long, env = "LOWBIT_ROWS", value_name = "M", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=MAX_ROWS))]
    rows: Vec<u32>,

    /// Three shapes and six numbers of rows, where --shapes and --rows do not say which.
    #[arg(long, env = "LOWBIT_QUICK", value_parser = FalseyValueParser::new())]
    quick: bool,

    /// Print one JSON object (conditions, ceilings, measurements) instead of a table.
    #[arg(long, env = "LOWBIT_JSON", value_parser = FalseyValueParser::new())]
    json: bool,

    /// Write a roofline plot of each op that multiplies matrices to DIR/OP.svg.
    #[arg(long, env = "LOWBIT_PLOT", value_name = "DIR")]
    plot: Option<PathBuf>,

    /// Show the results that an earlier run printed with --json instead of measuring; needs no GPU.
    #[arg(long, env = "LOWBIT_FROM", value_name = "FILE", conflicts_with_all = ["op", "shapes", "rows", "quick"])]
    from: Option<PathBuf>,

    /// Instead of that, time every configuration of the quantized linear ops, print how much faster the best is than the cost
    /// model's choice, and put it into the table FILE (without a name one named like the GPU), a file for --tuned. Lines for
    /// other weights and rows stay. Without --shapes and --rows those of common models, and 1 to 4096.
    #[arg(long, env = "LOWBIT_TUNE", value_name = "FILE", num_args = 0..=1, conflicts_with_all = ["plot", "from"])]
    tune: Option<Option<PathBuf>>,

    #[command(flatten)]
    device: DeviceArgs,
}

const MAX_ROWS: i64 = 1 << 17;
const MAX_SIDE: usize = 1 << 20;
const MAX_WEIGHTS: usize = 1 << 32;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
enum Op {
    /// Linear: int8 weights, one scale a channel, and int8 activations, one scale a token.
    W8a8,
    /// W8A8 of gate and up with SwiGLU, written as int8 codes.
    W8a8Swiglu,
    /// W8A8 with uint8 activations.
    W8a8U8,
    /// W8A8 with one column of 512 in 16 bit: LLM.int8().
    LlmInt8,
    /// Linear: 4-bit weights in groups of 128, int8 activations.
    W4a8,
    /// W4A8 whose scales are whole multiples of one scale a channel.
    W4a8Progressive,
    /// Linear: 4-bit weights in groups of 128, 16-bit activations.
    W4a16,
    /// W4A16 with zero points.
    W4a16Asymmetric,
    /// W4A16 with scales finer than the type of activations (f16 under bf16, f32 under f16), held in two parts.
    W4a16FineScales,
    /// W4A16 behind the RMSNorm that makes its input.
    W4a16Norm,
    /// The same with act-order: RMSNorm gathers the columns.
    W4a16ActOrder,
    /// Linear: 8-bit weights in groups of 128, 16-bit activations.
    W8a16,
    /// Linear: FP8 weights (e4m3) in groups of 128, 16-bit activations.
    Fp8a16,
    /// Linear: 16-bit weights and activations.
    Dense,
    /// RMSNorm of rows of 4096, to floats and to int8.
    RmsNorm,
    /// SiLU(gate) * up of rows of 14336, to floats and to int8.
    SiluMul,
    /// Rows of 4096 to int8.
    Quantize,
    /// Rotary embedding of 32 query and 8 key heads, keys and values into the cache.
    RopeKvWrite,
    /// Largest logit and normalizer of rows of 128256.
    LogitsStats,
    /// A token from rows of 128256: all of them, and of the best 50 nine tenths of the mass.
    Sample,
    /// Causal attention, 32 query heads, 8 key-value heads of 128, decoding and prompts.
    Attention,
}

impl Op {
    /// The op that it differs from in one thing, whose cost is of interest.
    fn plain(self) -> Option<Op> {
        match self {
            Op::W8a8Swiglu | Op::W8a8U8 | Op::LlmInt8 => Some(Op::W8a8),
            Op::W4a8Progressive => Some(Op::W4a8),
            Op::W4a16Asymmetric | Op::W4a16FineScales | Op::W4a16Norm => Some(Op::W4a16),
            Op::W4a16ActOrder => Some(Op::W4a16Norm),
            Op::Fp8a16 => Some(Op::W8a16),
            _ => None,
        }
    }

    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// A weight: `n` outputs, `k` inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    n: usize,
    k: usize,
}

impl Shape {
    fn parse(text: &str) -> Result<Shape, String> {
        let side = |text: &str| text.parse().ok().filter(|side| (1..=MAX_SIDE).contains(side));
        let sides = text.split_once('x').and_then(|(n, k)| Some(Shape { n: side(n)?, k: side(k)? }));
        sides.filter(|shape| shape.n * shape.k <= MAX_WEIGHTS).ok_or_else(|| {
            format!("`{text}`: expected NxK, as in 28672x4096, each 1 to {MAX_SIDE} and at most {MAX_WEIGHTS} weights")
        })
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.n, self.k)
    }
}

/// Layers of Llama-3.1-8B (output, qkv, gate and up, down) and 70B (output, gate and up, down).
const SHAPES: [Shape; 7] = [
    Shape { n: 4096, k: 4096 },
    Shape { n: 6144, k: 4096 },
    Shape { n: 28672, k: 4096 },
    Shape { n: 4096, k: 14336 },
    Shape { n: 8192, k: 8192 },
    Shape { n: 57344, k: 8192 },
    Shape { n: 8192, k: 28672 },
];
const ROWS: [usize; 12] = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192];
const QUICK_SHAPES: [Shape; 3] = [SHAPES[0], SHAPES[2], SHAPES[4]];
const QUICK_ROWS: [usize; 6] = [1, 16, 64, 256, 1024, 4096];
/// What `--tune` measures: ops, rows, and beside [`SHAPES`] layers of Llama-3.1-70B (qkv), Qwen3-8B (gate and up, down) and Qwen2.5-7B.
const TUNE_OPS: [Op; 6] = [Op::W8a8, Op::LlmInt8, Op::W4a16, Op::W8a16, Op::W4a8, Op::W4a8Progressive];
const TUNE_ROWS: [usize; 13] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096];
const TUNE_SHAPES: [Shape; 7] = [
    Shape { n: 10240, k: 8192 },
    Shape { n: 24576, k: 4096 },
    Shape { n: 4096, k: 12288 },
    Shape { n: 3584, k: 3584 },
    Shape { n: 4608, k: 3584 },
    Shape { n: 37888, k: 3584 },
    Shape { n: 3584, k: 18944 },
];
/// For ops that are not linear.
const OP_ROWS: [usize; 3] = [1, 64, 2048];

/// What a run measures.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Selection {
    ops: Vec<Op>,
    shapes: Vec<Shape>,
    /// Rows of linear ops.
    rows: Vec<usize>,
    /// Rows of the others.
    op_rows: Vec<usize>,
}

impl Args {
    fn selection(&self) -> Selection {
        let given: Vec<usize> = self.rows.iter().map(|&m| m as usize).collect();
        let tuned_shapes = [SHAPES, TUNE_SHAPES].concat();
        let (ops, shapes, rows): (&[Op], &[Shape], &[usize]) = match (self.tune.is_some(), self.quick) {
            (true, false) => (&TUNE_OPS, &tuned_shapes, &TUNE_ROWS),
            (true, true) => (&TUNE_OPS, &QUICK_SHAPES, &QUICK_ROWS),
            (false, false) => (Op::value_variants(), &SHAPES, &ROWS),
            (false, true) => (Op::value_variants(), &QUICK_SHAPES, &QUICK_ROWS),
        };
        Selection {
            ops: or(&self.op, ops),
            shapes: or(&self.shapes, shapes),
            rows: or(&given, rows),
            op_rows: or(&given, &OP_ROWS),
        }
    }
}

/// What was given, or the default for nothing, each item once.
fn or<T: Copy + PartialEq>(given: &[T], default: &[T]) -> Vec<T> {
    unique(if given.is_empty() { default } else { given })
}

/// `items` without those that came before.
fn unique<T: Copy + PartialEq>(items: &[T]) -> Vec<T> {
    let mut kept = Vec::new();
    for &item in items {
        if !kept.contains(&item) {
            kept.push(item);
        }
    }
    kept
}

pub(super) fn run(args: &Args) -> Outcome {
    if let Some(file) = &args.tune {
        tune(&args.device.open_gpu(DType::BF16)?, &args.selection(), file.as_deref(), args.json)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(dir) = &args.plot {
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    }
    let report = match &args.from {
        Some(file) => Report::read(file)?,
        None => measure(&args.device.open_gpu(DType::BF16)?, &args.selection())?,
    };
    if args.json {
        output::write_json(&report.json()?)?;
    } else {
        output::write(&report.text())?;
    }
    args.plot.as_deref().map_or(Ok(()), |dir| plot(&report, dir))?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the plots and says which.
fn plot(report: &Report, dir: &Path) -> Result<()> {
    for &op in Op::value_variants() {
        let Some(picture) = roofline::svg(report, op)? else { continue };
        let path = dir.join(format!("{}.svg", op.name()));
        output::write_file(&path, picture.as_bytes())?;
        eprintln!("plot: {}", path.display());
    }
    Ok(())
}

#[cfg(lowbit_cuda)]
fn measure(device: &Device, selection: &Selection) -> Result<Report> {
    match device {
        Device::Cuda(gpu) => run::run(gpu, selection),
        Device::Cpu(_) | Device::Meta(_) => Err(no_gpu()),
    }
}

#[cfg(not(lowbit_cuda))]
fn measure(_device: &Device, _selection: &Selection) -> Result<Report> {
    Err(no_gpu())
}

#[cfg(lowbit_cuda)]
fn tune(device: &Device, selection: &Selection, file: Option<&Path>, json: bool) -> Result<()> {
    match device {
        Device::Cuda(gpu) => tune::run(gpu, selection, file, json),
        Device::Cpu(_) | Device::Meta(_) => Err(no_gpu()),
    }
}

#[cfg(not(lowbit_cuda))]
fn tune(_device: &Device, _selection: &Selection, _file: Option<&Path>, _json: bool) -> Result<()> {
    Err(no_gpu())
}

fn no_gpu() -> Error {
    Error::input("--device", "bench kernels measures a GPU; `lowbit bench MODEL --device cpu` measures a CPU")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn selection(line: &[&str]) -> Result<Selection, clap::Error> {
        let line = clap::Parser::try_parse_from([&["bench"], line].concat());
        line.map(|line: Line| line.args.selection())
    }

    #[test]
    fn all_is_measured_unless_named() {
        let all = selection(&[]).expect("parses");
        assert_eq!(all.ops, Op::value_variants());
        assert_eq!((&all.shapes[..], &all.rows[..]), (&SHAPES[..], &ROWS[..]));
        assert_eq!(all.op_rows, OP_ROWS);
        let quick = selection(&["--quick"]).expect("parses");
        assert_eq!((&quick.shapes[..], &quick.rows[..]), (&QUICK_SHAPES[..], &QUICK_ROWS[..]));
        let tuned = selection(&["--tune", "--op", "w4a16"]).expect("parses");
        assert_eq!((&tuned.ops[..], tuned.shapes.len(), &tuned.rows[..]), (&[Op::W4a16][..], 14, &TUNE_ROWS[..]));
        assert_eq!(selection(&["--tune", "h200.txt"]).expect("parses").ops, TUNE_OPS);
        let named = ["--quick", "--op", "w4a16,rms_norm,w4a16", "--shapes", "48x32,1x7", "-m", "3,3,1"];
        let named = selection(&named).expect("parses");
        let expected = Selection {
            ops: vec![Op::W4a16, Op::RmsNorm],
            shapes: vec![Shape { n: 48, k: 32 }, Shape { n: 1, k: 7 }],
            rows: vec![3, 1],
            op_rows: vec![3, 1],
        };
        assert_eq!(named, expected);
    }

    #[test]
    fn ops_have_one_name() {
        let names: Vec<String> = Op::value_variants().iter().map(|op| op.name()).collect();
        let int8 = ["w8a8", "w8a8_swiglu", "w8a8_u8", "llm_int8", "w4a8", "w4a8_progressive"];
        let w4a16 = ["w4a16", "w4a16_asymmetric", "w4a16_fine_scales", "w4a16_norm", "w4a16_act_order"];
        assert_eq!(names[..14], [&int8[..], &w4a16, &["w8a16", "fp8a16", "dense"]].concat());
        for op in Op::value_variants() {
            assert_eq!(serde_json::to_value(op).expect("serializes"), op.name());
        }
    }

    #[test]
    fn bad_arguments() {
        for bad in
            ["", "x", "4096", "4096x", "x4096", "0x16", "16x0", "-1x4", "4096x4096x1", "1048577x1", "1048576x4097"]
        {
            assert!(Shape::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(Shape::parse("28672x4096"), Ok(Shape { n: 28672, k: 4096 }));
        for bad in [["--rows", "0"], ["--rows", "131073"], ["--op", "gemm"], ["--shapes", "1x1,"], ["--rows", "1,,2"]] {
            assert!(selection(&bad).is_err(), "{bad:?}");
        }
    }
}
