//! `generate`: continue one prompt; and the loop that turns an engine's events into text, which `chat` shares.

use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::builder::FalseyValueParser;
use serde_json::{Value, json};

use crate::checkpoint::{GenerationConfig, ModelConfig};
use crate::engine::{Engine, Event, Request};
use crate::error::{Error, Result};
use crate::models::Limits;
use crate::text::detokenizer::Detokenizer;
use crate::text::stop::StopStrings;
use crate::text::tokenizer::Tokenizer;

use super::constraint::ConstraintArgs;
use super::options::{
    DeviceArgs, EngineArgs, HeadArgs, ModelFlag, SamplingArgs, interrupt_flag, load_model, model_dtype, parse_count,
};
use super::{INTERRUPTED, Outcome, output, read_text};

/// Tokens generated without `-n`.
const DEFAULT_MAX_TOKENS: usize = 128;
/// Most prompt tokens of one forward pass.
pub(super) const MAX_BATCH_TOKENS: usize = 2048;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: lowbit generate -m assets/books-6m-gptq -p \"It was a dark night\" -n 64 --temperature 0"
)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelFlag,

    /// Text to continue.
    #[arg(short, long, env = "LOWBIT_PROMPT", conflicts_with = "file", allow_hyphen_values = true)]
    prompt: Option<String>,

    /// File with the text to continue; `-` is stdin, which is also read when neither this nor a prompt is given.
    #[arg(short, long, env = "LOWBIT_FILE")]
    file: Option<PathBuf>,

    /// Most tokens to generate; without it what the model's generation_config.json says, else 128, or fewer where the context
    /// ends.
    #[arg(short = 'n', long, env = "LOWBIT_MAX_TOKENS", value_name = "N", value_parser = parse_count::<usize>)]
    max_tokens: Option<usize>,

    /// Longest context, prompt and output together; without it what the model was made for.
    #[arg(long, env = "LOWBIT_MAX_MODEL_LEN", value_name = "N")]
    max_model_len: Option<u32>,

    /// Report this many of the most likely tokens at each position, in the JSON.
    #[arg(long, env = "LOWBIT_LOGPROBS", value_name = "N", requires = "json", value_parser = parse_count::<usize>)]
    logprobs: Option<usize>,

    /// Print one JSON object at the end instead of text as it comes: `prompt_ids`, `token_ids`, `logprobs` (natural
    /// logs of the model's own probabilities), `text`, `finish_reason`, `usage`, `timings`.
    #[arg(long, env = "LOWBIT_JSON", value_parser = FalseyValueParser::new())]
    json: bool,

    #[command(flatten)]
    sampling: SamplingArgs,

    #[command(flatten)]
    constraint: ConstraintArgs,

    #[command(flatten)]
    engine: EngineArgs,

    #[command(flatten)]
    head: HeadArgs,

    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &Args) -> Outcome {
    let name = args.model.name("generate")?;
    let prompt = args.read_prompt()?;
    let start = Instant::now();
    let checkpoint = args.head.open(name)?;
    let config = checkpoint.config();
    let tokenizer = Tokenizer::load(checkpoint.dir(), config.vocab_size)?;
    let defaults = args.sampling.defaults(checkpoint.generation());
    let stop = args.sampling.stop_strings(&defaults)?;
    let mut params = args.sampling.params(&defaults, tokenizer.eos_id());
    params.logprobs = args.logprobs;
    params.validate(config.vocab_size)?;
    let constraint = args.constraint.compile(&tokenizer, &params.stop_token_ids)?;
    let prompt_ids = tokenizer.encode(&prompt, true)?;
    let max_tokens = args.room(prompt_ids.len(), config, &defaults)?;

    let device = args.device.open(model_dtype(&checkpoint)?)?;
    let limits = Limits::new(prompt_ids.len() + max_tokens, prompt_ids.len().min(MAX_BATCH_TOKENS), 1);
    let mut engine = args.engine.start(load_model(&checkpoint, &device, limits, "lower --max-model-len")?);
    let load = start.elapsed();

    let interrupted = interrupt_flag()?;
    let text =
        TextStream { detokenizer: tokenizer.detokenizer(true).continuing(), stop, min_tokens: params.min_tokens };
    let request = Request { constraint, ..Request::new(prompt_ids.clone(), params, max_tokens) };
    let mut print = |text: &str| if args.json { Ok(()) } else { output::write(text) };
    let done = complete(&mut engine, request, text, &interrupted, &mut print)?;
    if args.json {
        output::write_json(&done.json(&prompt_ids, load, args.logprobs.is_some()))?;
    } else {
        output::write("\n")?;
        eprintln!("{}; loaded in {:.2} s on {}", done.summary(prompt_ids.len()), load.as_secs_f64(), device.name());
    }
    Ok(if done.finish_reason == ABORT { ExitCode::from(INTERRUPTED) } else { ExitCode::SUCCESS })
}

impl Args {
    fn read_prompt(&self) -> Result<String> {
        if let Some(prompt) = &self.prompt {
            return Ok(prompt.clone());
        }
        match &self.file {
            Some(path) if path.as_os_str() != "-" => read_text(path),
            None if std::io::stdin().is_terminal() => {
                Err(Error::input("--prompt", "is required: text to continue, or --file with a file of it"))
            }
            _ => {
                let mut text = String::new();
                std::io::stdin().read_to_string(&mut text).map_err(Error::io("stdin"))?;
                Ok(text)
            }
        }
    }

    /// How many tokens to generate after a prompt of this length.
    fn room(&self, prompt: usize, config: &ModelConfig, defaults: &GenerationConfig) -> Result<usize> {
        if prompt == 0 {
            return Err(Error::input("--prompt", "is empty after tokenization; give at least one token"));
        }
        let limit = self.max_model_len.map_or(config.max_position_embeddings, |len| len as usize);
        if limit > config.max_position_embeddings {
            tracing::warn!(
                "--max-model-len {limit} is more than the {} tokens the model was made for",
                config.max_position_embeddings
            );
        }
        let room = limit.saturating_sub(prompt);
        let wanted = self.max_tokens.unwrap_or_else(|| default_tokens(defaults, prompt, DEFAULT_MAX_TOKENS).min(room));
        if room == 0 {
            let reason = format!(
                "has {prompt} tokens, which leaves no room in a context of {limit}; shorten it or raise --max-model-len"
            );
            return Err(Error::input("--prompt", reason));
        }
        if wanted == 0 || wanted > room {
            let reason = format!(
                "{wanted}: expected 1 to {room}, what the prompt of {prompt} tokens leaves in a context of {limit}"
            );
            return Err(Error::input("--max-tokens", reason));
        }
        Ok(wanted)
    }
}

/// Tokens to generate where nobody says how many: what the model's own defaults make of `otherwise`.
pub(super) fn default_tokens(defaults: &GenerationConfig, prompt: usize, otherwise: usize) -> usize {
    let of_length = defaults.max_length.and_then(|length| length.checked_sub(prompt)).filter(|&n| n > 0);
    defaults.max_new_tokens.unwrap_or(otherwise.min(of_length.unwrap_or(otherwise)))
}

/// `finish_reason` of a request that Ctrl-C ended; the others are the engine's.
pub(super) const ABORT: &str = "abort";

/// How the ids of one sequence become text.
pub(super) struct TextStream {
    pub(super) detokenizer: Detokenizer,
    pub(super) stop: StopStrings,
    /// Tokens before which stop strings do not count.
    pub(super) min_tokens: usize,
}

/// What one request gave.
pub(super) struct Completion {
    token_ids: Vec<u32>,
    logprobs: Vec<f32>,
    top: Vec<Vec<(u32, f32)>>,
    pub(super) text: String,
    pub(super) finish_reason: String,
    /// Tokens of the prompt that the prefix cache held.
    cached_tokens: usize,
    /// Until the first token.
    prompt_time: Duration,
    /// From the first token to the last.
    decode_time: Duration,
}

/// Runs one request to its end and hands its text to `emit` as it becomes certain.
pub(super) fn complete(
    engine: &mut Engine,
    request: Request,
    mut stream: TextStream,
    interrupted: &AtomicBool,
    emit: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Completion> {
    let mut done = Completion {
        token_ids: Vec::new(),
        logprobs: Vec::new(),
        top: Vec::new(),
        text: String::new(),
        finish_reason: String::new(),
        cached_tokens: 0,
        prompt_time: Duration::ZERO,
        decode_time: Duration::ZERO,
    };
    let start = Instant::now();
    let id = engine.submit(request)?;
    while done.finish_reason.is_empty() {
        if interrupted.load(Ordering::Relaxed) {
            engine.abort(id);
            done.finish_reason = ABORT.into();
            break;
        }
        for event in engine.step() {
            match event {
                Event::Prompt { output, .. } => done.cached_tokens = output.cached_tokens,
                Event::Token { token, .. } => {
                    match done.token_ids.len() {
                        0 => done.prompt_time = start.elapsed(),
                        _ => done.decode_time = start.elapsed() - done.prompt_time,
                    }
                    done.token_ids.push(token.id);
                    done.logprobs.push(token.logprob);
                    done.top.push(token.top);
                    let piece = stream.detokenizer.push(token.id);
                    let piece = if done.token_ids.len() > stream.min_tokens { stream.stop.push(&piece) } else { piece };
                    done.text.push_str(&piece);
                    emit(&piece)?;
                    if stream.stop.found() {
                        engine.abort(id);
                        done.finish_reason = crate::engine::FinishReason::Stop.to_string();
                    }
                }
                Event::Finished { reason, .. } if done.finish_reason.is_empty() => {
                    done.finish_reason = reason.to_string()
                }
                Event::Finished { .. } => {}
                Event::Failed { error, .. } => return Err(error),
            }
        }
    }
    if !stream.stop.found() {
        let mut rest = stream.stop.push(&stream.detokenizer.finish());
        rest.push_str(&stream.stop.finish());
        done.text.push_str(&rest);
        emit(&rest)?;
    }
    Ok(done)
}

impl Completion {
    fn json(&self, prompt_ids: &[u32], load: Duration, with_top: bool) -> Value {
        let (prompt, generated) = (prompt_ids.len(), self.token_ids.len());
        let mut object = json!({
            "prompt_ids": prompt_ids,
            "token_ids": self.token_ids,
            "logprobs": self.logprobs,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "usage": { "prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated },
            "timings": {
                "load_s": output::rounded(load.as_secs_f64()),
                "prompt_s": output::rounded(self.prompt_time.as_secs_f64()),
                "prompt_tokens_per_s": output::rounded(output::per_second(prompt, self.prompt_time)),
                "decode_s": output::rounded(self.decode_time.as_secs_f64()),
                "decode_tokens_per_s": output::rounded(self.decode_speed()),
            },
        });
        if with_top {
            let entry = |&(id, logprob): &(u32, f32)| json!({ "id": id, "logprob": logprob });
            object["top_logprobs"] = self.top.iter().map(|top| top.iter().map(entry).collect::<Value>()).collect();
        }
        object
    }

    /// Tokens a second after the first, which belongs to the prompt.
    fn decode_speed(&self) -> f64 {
        output::per_second(self.token_ids.len().saturating_sub(1), self.decode_time)
    }

    /// Speeds in words.
    pub(super) fn summary(&self, prompt: usize) -> String {
        let prompt_speed = output::per_second(prompt, self.prompt_time);
        let cached = if self.cached_tokens > 0 { format!(" ({} cached)", self.cached_tokens) } else { String::new() };
        format!(
            "prompt: {prompt} tokens{cached}, {prompt_speed:.1} tokens/s; generated: {} tokens, {:.1} tokens/s ({})",
            self.token_ids.len(),
            self.decode_speed(),
            self.finish_reason
        )
    }
}
