//! `eval`: how good a model is: its perplexity on a text, how far its predictions are from another's and where that comes
//! from, its answers to questions, what it writes; and several models side by side.

mod compare;
pub mod divergence;
pub mod generate;
pub mod layers;
mod overlap;
pub mod perplexity;
pub mod score;
mod size_plot;
pub mod tasks;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::builder::FalseyValueParser;
use serde_json::{Value, json};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::models::{Limits, ModelRunner};
use crate::text::tokenizer::Tokenizer;

use super::options::{DeviceArgs, EngineArgs, HeadArgs, load_model, model_dtype, open_checkpoint};
use super::{Outcome, output};

/// What makes an evaluation take less memory.
const MEMORY_FLAGS: &str = "lower --context or --batch";
use generate::Comparison;
use score::Reference;
use tasks::Answers;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: lowbit eval assets/books-6m-gptq --text README.md --context 128\n\n\
    Where a quantized model loses:   lowbit eval QUANTIZED --text FILE --reference ORIGINAL --layers\n\
    Multiple choice:                 lowbit eval MODEL --tasks questions.jsonl\n\
    What both write:                 lowbit eval QUANTIZED --text FILE --reference ORIGINAL --generate 64\n\
    Several, with a picture:         lowbit eval --compare A B C --text FILE --reference ORIGINAL --plot sizes.svg\n\n\
    docs/evaluation.md says what each number means.")]
pub(super) struct Args {
    /// Model directory or hub id (`org/name[@revision]`).
    #[arg(required_unless_present = "compare", conflicts_with = "compare")]
    model: Option<String>,

    /// UTF-8 text to predict. Only --tasks, and --generate with --prompts, do without one.
    #[arg(long, env = "LOWBIT_TEXT", value_name = "FILE")]
    text: Option<PathBuf>,

    /// Compare with this model, usually the one that MODEL was quantized from: Kullback-Leibler divergence of the next-token
    /// distributions, and how often the most likely tokens agree.
    #[arg(long, env = "LOWBIT_REFERENCE", value_name = "MODEL")]
    reference: Option<String>,

    /// Say where the difference from the reference comes from: for every decoder layer the relative squared error of the
    /// residual stream after it, and what this layer alone adds.
    #[arg(long, env = "LOWBIT_LAYERS", requires = "reference", conflicts_with = "compare", value_parser = FalseyValueParser::new())]
    layers: bool,

    /// Answer multiple-choice questions: JSON lines with `question` (or `context`, taken verbatim), `choices`, `answer`
    /// (number from 0, or letter). The choice with the highest log-likelihood counts: `acc`, and `acc_norm` by its bytes.
    #[arg(long, env = "LOWBIT_TASKS", value_name = "FILE", conflicts_with = "compare")]
    tasks: Option<PathBuf>,

    /// Continue prompts greedily by this many tokens with MODEL and with the reference, and say how long both write the
    /// same. Prompts are 16 pieces of the text, or those of --prompts.
    #[arg(long, env = "LOWBIT_GENERATE", value_name = "N", requires = "reference", conflicts_with = "compare", value_parser = clap::value_parser!(u32).range(1..))]
    generate: Option<u32>,

    /// Prompts to continue, one a line; in a `.jsonl` file JSON strings, or objects with `prompt`.
    #[arg(long, env = "LOWBIT_PROMPTS", value_name = "FILE", requires = "generate")]
    prompts: Option<PathBuf>,

    /// Print one table of several models: size, bits per weight, perplexity, tokens a second; with --reference also
    /// divergence and agreement.
    #[arg(long, env = "LOWBIT_COMPARE", value_name = "MODEL", num_args = 1.., value_delimiter = ',')]
    compare: Vec<String>,

    /// Draw the models of --compare as an SVG: bits per weight, and divergence from the reference or else perplexity.
    #[arg(long, env = "LOWBIT_PLOT", value_name = "FILE", requires = "compare", conflicts_with = "model")]
    plot: Option<PathBuf>,

    /// Tokens of a window.
    #[arg(short, long, env = "LOWBIT_CONTEXT", value_name = "N", default_value_t = 512)]
    context: usize,

    /// Stop after this many windows.
    #[arg(short, long, env = "LOWBIT_WINDOWS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    windows: Option<u32>,

    /// Windows, choices or prompts computed together.
    #[arg(short, long, env = "LOWBIT_BATCH", value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: u16,

    /// Print one JSON object: of a text `perplexity`, `nll` (mean, natural log), their standard errors, `tokens` predicted,
    /// `windows`, `context`, `protocol`; with --reference `kld`; `layers`, `tasks`, `generation` where asked for; with
    /// --compare `models`. Each part has its `protocol`.
    #[arg(long, env = "LOWBIT_JSON", value_parser = FalseyValueParser::new())]
    json: bool,

    #[command(flatten)]
    engine: EngineArgs,

    #[command(flatten)]
    head: HeadArgs,

    #[command(flatten)]
    device: DeviceArgs,
}

/// A text as tokens, and how much of it is predicted.
struct Windows {
    /// The whole text.
    all: Vec<u32>,
    context: usize,
    count: usize,
    sha256: String,
}

impl Windows {
    /// Tokens of the windows.
    fn ids(&self) -> &[u32] {
        &self.all[..self.count * self.context]
    }

    fn at_once(&self, args: &Args) -> usize {
        usize::from(args.batch).min(self.count)
    }
}

pub(super) fn run(args: &Args) -> Outcome {
    match &args.model {
        Some(model) => one(args, model)?,
        None => compare::run(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// What a model is asked, all read and checked before a weight is.
struct Plan {
    tokenizer: Tokenizer,
    windows: Option<Windows>,
    tasks: Option<Vec<tasks::Item>>,
    prompts: Vec<Vec<u32>>,
}

/// Evaluates one model.
fn one(args: &Args, name: &str) -> Result<()> {
    let checkpoint = args.head.open(name)?;
    let plan = Plan::read(args, &checkpoint)?;
    let reference = args.reference.as_deref().map(|name| open_reference(name, &checkpoint)).transpose()?;
    let device = args.device.open(model_dtype(&checkpoint)?)?;
    let limits = plan.limits(args, checkpoint.config().vocab_size);
    let mut reference =
        reference.map(|checkpoint| load_model(&checkpoint, &device, limits, MEMORY_FLAGS)).transpose()?;
    let mut model = load_model(&checkpoint, &device, limits, MEMORY_FLAGS)?;

    let mut result = json!({});
    let mut text = String::new();
    if let Some(windows) = &plan.windows {
        predict(args, windows, &mut model, reference.as_mut(), &mut result, &mut text)?;
    }
    if let Some(items) = &plan.tasks {
        let answers = answer(&mut model, items)?;
        let theirs = reference.as_mut().map(|reference| answer(reference, items)).transpose()?;
        result["tasks"] = tasks::json(items, &answers, theirs.as_ref());
        text.push_str(&tasks::text(items, &answers, theirs.as_ref()));
    }
    if let (Some(max_tokens), Some(reference)) = (args.generate, reference) {
        let (max_tokens, mut stop) = (max_tokens as usize, checkpoint.generation().eos_token_ids.clone());
        stop.extend(plan.tokenizer.eos_id().filter(|id| !stop.contains(id)));
        let ours = generate::run(args.engine.start(model), "prompts", &plan.prompts, max_tokens, &stop)?;
        let reference = args.engine.start(reference);
        let theirs = generate::run(reference, "prompts, reference", &plan.prompts, max_tokens, &stop)?;
        let comparison = Comparison::new(max_tokens, plan.prompts, ours, theirs);
        result["generation"] = comparison.json(&plan.tokenizer);
        text.push_str(&comparison.text(&plan.tokenizer));
    }
    if args.json { output::write_json(&result) } else { output::write(&text) }
}

/// Perplexity, divergence, and errors layer by layer.
fn predict(
    args: &Args,
    windows: &Windows,
    model: &mut ModelRunner,
    mut reference: Option<&mut ModelRunner>,
    result: &mut Value,
    text: &mut String,
) -> Result<()> {
    let bar = output::progress("windows");
    bar.set_length(windows.count as u64);
    let (ids, context) = (windows.ids(), windows.context);
    let mut other = reference.as_deref_mut().map(|reference| Reference::new(reference, 0));
    let (score, divergence) = score::score(model, other.as_mut(), ids, context, &mut |score| {
        bar.set_position(score.windows as u64);
        bar.set_message(format!("perplexity {:.4}", score.perplexity()));
    })?;
    bar.finish_and_clear();
    *result = score.json(context);
    result["text_sha256"] = windows.sha256.clone().into();
    text.push_str(&score.text(context));
    if let Some(divergence) = &divergence {
        result["kld"] = divergence.json();
        text.push_str(&divergence.text());
    }
    if let (true, Some(reference)) = (args.layers, reference) {
        let bar = output::progress("windows, layer by layer");
        bar.set_length(windows.count as u64);
        let errors = layers::layer_errors(model, reference, ids, context, &mut |done| bar.set_position(done as u64))?;
        bar.finish_and_clear();
        result["layers"] = errors.json();
        text.push_str(&errors.text());
    }
    Ok(())
}

/// A model's answers.
fn answer(model: &mut ModelRunner, items: &[tasks::Item]) -> Result<Answers> {
    let bar = output::progress("choices");
    let found = tasks::loglikelihoods(model, items, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    Ok(Answers::new(items, found))
}

impl Plan {
    fn read(args: &Args, checkpoint: &Checkpoint) -> Result<Plan> {
        let positions = checkpoint.config().max_position_embeddings;
        let does_without = args.tasks.is_some() || args.prompts.is_some();
        let needs_text = args.layers || args.text.is_some() || !does_without;
        let (tokenizer, windows) = if needs_text {
            let (_, text) = args.read_text()?;
            let (tokenizer, windows) = args.windows(checkpoint, &text)?;
            if let Some(warning) = overlap::warning(checkpoint.dir(), text.as_bytes(), &windows.all) {
                eprintln!("warning: {warning}");
            }
            (tokenizer, Some(windows))
        } else {
            (Tokenizer::load(checkpoint.dir(), checkpoint.config().vocab_size)?, None)
        };
        let tasks = args.tasks.as_ref().map(|path| tasks::read(path, &tokenizer, positions)).transpose()?;
        let prompts = match (args.generate, &args.prompts, &windows) {
            (None, ..) => Vec::new(),
            (_, Some(path), _) => generate::prompts_of_file(path, &tokenizer)?,
            (_, None, Some(windows)) => generate::prompts_of_text(&windows.all),
            (_, None, None) => return Err(missing_text()),
        };
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        if longest + args.generate.unwrap_or(0) as usize > positions {
            let reason = format!(
                "{} after a prompt of {longest} tokens; the model has {positions} positions",
                args.generate.unwrap_or(0)
            );
            return Err(Error::input("--generate", reason));
        }
        Ok(Plan { tokenizer, windows, tasks, prompts })
    }

    /// Limits that hold everything that is asked.
    fn limits(&self, args: &Args, vocab: usize) -> Limits {
        let choices = self.tasks.as_deref().map_or(0, tasks::longest);
        let continued = self.prompts.iter().map(|p| p.len() + args.generate.unwrap_or(0) as usize).max().unwrap_or(0);
        let context = self.windows.as_ref().map_or(0, |windows| windows.context);
        let batch = match &self.windows {
            Some(windows) if self.tasks.is_none() && self.prompts.is_empty() => windows.at_once(args),
            _ => usize::from(args.batch),
        };
        score::limits(context.max(choices).max(continued), batch, vocab)
    }
}

impl Args {
    /// The text of `--text`, and its file.
    fn read_text(&self) -> Result<(PathBuf, String)> {
        let path = self.text.clone().ok_or_else(missing_text)?;
        let text = crate::cli::read_text(&path)?;
        Ok((path, text))
    }

    /// The text as windows for a model, and the model's tokenizer.
    fn windows(&self, checkpoint: &Checkpoint, text: &str) -> Result<(Tokenizer, Windows)> {
        let (config, context) = (checkpoint.config(), self.context);
        if !(2..=config.max_position_embeddings).contains(&context) {
            let reason = format!("{context}: expected 2 to the model's {} positions", config.max_position_embeddings);
            return Err(Error::input("--context", reason));
        }
        let tokenizer = Tokenizer::load(checkpoint.dir(), config.vocab_size)?;
        let all = tokenizer.encode(text, false)?;
        let count = (all.len() / context).min(self.windows.map_or(usize::MAX, |n| n as usize));
        if count == 0 {
            let path = self.text.as_deref().unwrap_or(Path::new("the text"));
            let reason = format!(
                "{} has {} tokens, less than one window of {context}; lower --context",
                path.display(),
                all.len()
            );
            return Err(Error::input("--text", reason));
        }
        Ok((tokenizer, Windows { all, context, count, sha256: output::sha256(text.as_bytes()) }))
    }
}

fn missing_text() -> Error {
    Error::input(
        "--text",
        "missing: a UTF-8 text to predict; only --tasks, and --generate with --prompts, do without one",
    )
}

/// Opens a model to compare with: it must have the vocabulary of `model`.
fn open_reference(name: &str, model: &Checkpoint) -> Result<Checkpoint> {
    let reference = open_checkpoint(name)?;
    let (a, b) = (reference.config().vocab_size, model.config().vocab_size);
    if a != b {
        return Err(Error::input("--reference", format!("{name} has {a} tokens, the model {b}; expected the same")));
    }
    Ok(reference)
}
