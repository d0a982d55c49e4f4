//! `quantize`: a full-precision model into a quantized checkpoint.

mod calibration;
mod methods;
mod options;
mod qat;
mod recipe;
mod rules;
mod words;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::FalseyValueParser;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::write::Output;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::models::linear_names;
use crate::models::quantize::{Estimate, Observer, Progress, check, check_values, quantize};

use super::options::open_checkpoint;
use super::{Outcome, output};
use calibration::{calibrate, fingerprint};
use methods::MethodName;
use options::{
    ActOrderName, FormatName, KvScalesName, MappingName, SchemeName, parse_bpw, parse_fraction, parse_observer,
    parse_threshold,
};
use rules::{LayerSpec, RuleSpec};
use words::{dry_run, in_words, layer_line, tell, widths_table};

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: lowbit quantize models/llama models/llama-w4 --method gptq --scheme w4a16 --calib text.txt\n\n\
                  An interrupted run leaves DST.partial; the same command goes on from there and ends with the same bytes."
)]
pub(super) struct Args {
    /// Full-precision model: directory or hub id (`org/name[@revision]`).
    #[arg(value_name = "SRC")]
    source: String,

    /// Directory to make. It must not exist.
    #[arg(value_name = "DST")]
    destination: PathBuf,

    /// How weights become codes.
    #[arg(long, env = "LOWBIT_METHOD", value_enum, default_value = "gptq")]
    method: MethodName,

    /// `w2a16` to `w8a16`: weights of so many bits; `w8a8`, `w4a8` and so on: int8 activations beside them, per token;
    /// `w8a8-asym`: with zero points; `w8a8-static`, `w8a8-static-asym`: per tensor, by calibration. Without it `w4a16`;
    /// `w2a16` for ternary, `w8a8` for llm-int8.
    #[arg(long, env = "LOWBIT_SCHEME", value_parser = SchemeName::parse)]
    scheme: Option<SchemeName>,

    /// Weights that share a scale; 0 is one scale an output channel. Without it 128; 64 for nf4, fp4, kmeans and hqq; else 0
    /// for 8 bits.
    #[arg(long, env = "LOWBIT_GROUP_SIZE", value_name = "N")]
    group_size: Option<u32>,

    /// How a range becomes a scale. Without it `asymmetric` for awq with 16-bit activations, `narrow` for the format
    /// bitsandbytes, else `centered`. Not with hqq, nf4, fp4, llm-int8, ternary and kmeans, which have their own.
    #[arg(long, env = "LOWBIT_MAPPING", value_enum)]
    mapping: Option<MappingName>,

    /// What linear layers become in whose names the regular expression is found: `skip` stays in 16 bit; else a scheme,
    /// `gN` or `channel`, `sym` or `asym`, as in `w3a16,g64,asym`. Repeatable; the last rule that fits a layer decides.
    #[arg(long = "rule", env = "LOWBIT_RULE", value_name = "REGEX=SPEC", value_parser = RuleSpec::parse)]
    rules: Vec<RuleSpec>,

    /// Mixed precision: bits a weight, scales and zero points counted, that all linear layers of the decoder take together at
    /// most. Each gets the width, of those that the format has, by which the model loses least; rules decide before.
    #[arg(long, env = "LOWBIT_TARGET_BPW", value_name = "X", value_parser = parse_bpw)]
    target_bpw: Option<f64>,

    /// With `--target-bpw`: one width for q, k and v of a layer, and one for gate and up, as programs need that fuse them.
    #[arg(long, env = "LOWBIT_FUSED_WIDTHS", requires = "target_bpw", value_parser = FalseyValueParser::new())]
    fused_widths: bool,

    /// What the output head becomes, spelled as in `--rule`; without it the head stays as it is.
    #[arg(long, env = "LOWBIT_LM_HEAD", value_name = "SPEC", value_parser = LayerSpec::parse)]
    lm_head: Option<LayerSpec>,

    /// Also write scales for an int8 KV cache, one a layer or one a KV head, each for keys and for values
    /// (compressed-tensors only; not used here, where caches are in 16 bit).
    #[arg(long, env = "LOWBIT_KV_SCALES", value_enum)]
    kv_scales: Option<KvScalesName>,

    /// UTF-8 text that shows the model at work, for methods that look at the inputs of layers.
    #[arg(long, env = "LOWBIT_CALIB", value_name = "FILE")]
    calib: Option<PathBuf>,

    /// Windows of the calibration text, spread evenly over it.
    #[arg(long, env = "LOWBIT_SAMPLES", value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    samples: u32,

    /// Tokens of a window.
    #[arg(long, env = "LOWBIT_SEQ_LEN", value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    seq_len: u32,

    /// gptq: order in which columns are rounded. `dynamic` (`desc_act`) makes a checkpoint with reordered groups, which
    /// some programs run slower; the others do not.
    #[arg(long, env = "LOWBIT_ACT_ORDER", value_enum, default_value = "static")]
    act_order: ActOrderName,

    /// gptq: added to the diagonal of the Hessian, in units of its mean.
    #[arg(long, env = "LOWBIT_DAMP", value_name = "X", default_value_t = 0.01, value_parser = parse_fraction)]
    damp: f64,

    /// Calibrate each layer behind the quantized ones of the same decoder layer (not with awq).
    #[arg(long, env = "LOWBIT_TRUE_SEQUENTIAL", value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    true_sequential: bool,

    /// smoothquant: how much of the outliers' size moves into the weights.
    #[arg(long, env = "LOWBIT_ALPHA", value_name = "X", default_value_t = 0.5, value_parser = parse_fraction)]
    alpha: f64,

    /// llm-int8: inputs of this magnitude and more stay in 16 bit; 0: none. Without it 6.
    #[arg(long, env = "LOWBIT_OUTLIER_THRESHOLD", value_name = "X", value_parser = parse_threshold)]
    outlier_threshold: Option<f64>,

    /// nf4, fp4: quantize the largest magnitudes of blocks to 8 bits.
    #[arg(long, env = "LOWBIT_DOUBLE_QUANT", value_parser = FalseyValueParser::new())]
    double_quant: bool,

    /// Static activations: how the range is chosen, `minmax`, `mse`, `percentile`, `percentile:99.9`, `entropy` or `ema`.
    /// Without it `mse`; `percentile` is 99.99.
    #[arg(long, env = "LOWBIT_OBSERVER", value_name = "NAME", value_parser = parse_observer)]
    observer: Option<Observer>,

    /// Format of the files. Without it the method's own (`hqq`, `bitsandbytes`, `codebook`), `awq` for asymmetric awq of 4
    /// bits, `gptq` where that has the bits, and `compressed-tensors` for the rest.
    #[arg(long, env = "LOWBIT_FORMAT", value_enum)]
    format: Option<FormatName>,

    /// Only say what it would take: memory, disk, time.
    #[arg(long, env = "LOWBIT_DRY_RUN", value_parser = FalseyValueParser::new())]
    dry_run: bool,

    #[command(flatten)]
    qat: qat::Args,

    /// CPU threads; without it one for every core that this process may use.
    #[arg(short, long, env = "LOWBIT_THREADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Print the report as one JSON object.
    #[arg(long, env = "LOWBIT_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

impl Args {
    /// Tokens of a window, which the model must have positions for.
    fn context(&self, source: &Checkpoint) -> Result<usize> {
        let (context, positions) = (self.seq_len as usize, source.config().max_position_embeddings);
        if context > positions {
            return Err(Error::input("--seq-len", format!("{context}: the model has {positions} positions")));
        }
        Ok(context)
    }
}

pub(super) fn run(args: &Args) -> Outcome {
    if let Some(threads) = args.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(usize::from(threads)).build_global();
        pool.map_err(|e| Error::input("--threads", e.to_string()))?;
    }
    let source = open_checkpoint(&args.source)?;
    let names = linear_names(source.config());
    let recipe = args.recipe(&names)?;
    let written = recipe.written(&names);
    check(&source, &recipe)?;
    if args.method == MethodName::Qat {
        return qat::run(args, &source, &recipe, &written);
    }
    if recipe.needs_calibration() && args.calib.is_none() && !args.dry_run {
        let reason = "missing: a UTF-8 text that shows the model at work; only the methods rtn, rtn-mse, hqq, nf4, fp4, llm-int8, ternary and kmeans do without one, and not \
                      with static activations, --target-bpw or --kv-scales";
        return Err(Error::input("--calib", reason));
    }
    if recipe.head.is_some() && source.config().tie_word_embeddings {
        eprintln!(
            "note: this model's head is its embedding; the quantized head is a tensor of its own, and the embedding stays in 16 bit beside it"
        );
    }
    let samples = args.samples as usize;
    let context = if recipe.needs_calibration() { args.context(&source)? } else { args.seq_len as usize };
    let estimate = Estimate::new(&source, &recipe, samples, context);
    if args.dry_run {
        return dry_run(args, &recipe, &written, &estimate);
    }
    let calibration = match &args.calib {
        Some(path) if recipe.needs_calibration() => Some(calibrate(path, &source, samples, context)?),
        _ => None,
    };
    check_values(&source, &recipe)?;
    let fingerprint = fingerprint(&source, &recipe, calibration.as_ref())?;
    let output = Output::begin(&args.destination, &fingerprint)?;
    let layers = source.config().num_layers + usize::from(recipe.head.is_some());
    if output.parts() > 0 {
        eprintln!("going on with {}: {} of {layers} layers are done", output.work().display(), output.parts());
    }
    eprintln!("about {}", in_words(&estimate));
    let bar = output::progress("layers");
    bar.set_length(layers as u64);
    bar.set_position(output.parts() as u64);
    let report = quantize(&source, &recipe, calibration.as_ref(), &Device::cpu(), output, &mut |step| match step {
        Progress::Measured(done) => {
            bar.suspend(|| eprintln!("widths tried on layer {done}/{}", source.config().num_layers))
        }
        Progress::Chosen(mixed) => bar.suspend(|| eprintln!("{}", widths_table(mixed))),
        Progress::Layer(layer, note) => {
            bar.suspend(|| eprintln!("{}", layer_line(layer, layers, note)));
            bar.set_position(layer as u64 + 1);
        }
    })?;
    bar.finish_and_clear();
    tell(args, &report, report["schemes"].as_str().unwrap_or_default())?;
    Ok(ExitCode::SUCCESS)
}
