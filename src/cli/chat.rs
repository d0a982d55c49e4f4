//! `chat`: a conversation on the terminal, each answer conditioned on all before it.

use std::io::{BufRead, IsTerminal};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::checkpoint::GenerationConfig;
use crate::engine::sampling::SamplingParams;
use crate::engine::{Engine, Request};
use crate::error::{Error, Result};
use crate::models::Limits;
use crate::text::chat_template::{ChatInput, ChatTemplate};
use crate::text::tokenizer::Tokenizer;

use super::generate::{Completion, MAX_BATCH_TOKENS, TextStream, complete, default_tokens};
use super::options::{
    DeviceArgs, EngineArgs, HeadArgs, ModelFlag, SamplingArgs, interrupt_flag, load_model, model_dtype,
};
use super::{Outcome, output};

/// Context without `--max-model-len`: long enough for a conversation, small enough for any machine.
const DEFAULT_CONTEXT: usize = 4096;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: lowbit chat -m Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4 --system \"Answer in one sentence.\"

While chatting: /reset forgets the conversation, /exit or the end of the input ends it, Ctrl-C stops an answer."
)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelFlag,

    /// System message that opens the conversation.
    #[arg(short, long, env = "LOWBIT_SYSTEM", value_name = "TEXT")]
    system: Option<String>,

    /// Most tokens of an answer; without it what the model's generation_config.json says, else as many as the context holds.
    #[arg(short = 'n', long, env = "LOWBIT_MAX_TOKENS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,

    /// Longest context, all of the conversation together; without it what the model was made for, 4096 at most.
    #[arg(long, env = "LOWBIT_MAX_MODEL_LEN", value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1 << 24))]
    max_model_len: Option<u32>,

    #[command(flatten)]
    sampling: SamplingArgs,

    #[command(flatten)]
    engine: EngineArgs,

    #[command(flatten)]
    head: HeadArgs,

    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &Args) -> Outcome {
    let name = args.model.name("chat")?;
    let checkpoint = args.head.open(name)?;
    let config = checkpoint.config();
    let Some(template) = ChatTemplate::load(checkpoint.dir())? else {
        return Err(Error::unsupported(
            format!("chat with {name}: it has no chat template"),
            "Use `lowbit generate` to continue a text",
        ));
    };
    let tokenizer = Tokenizer::load(checkpoint.dir(), config.vocab_size)?;
    let defaults = args.sampling.defaults(checkpoint.generation());
    let params = args.sampling.params(&defaults, tokenizer.eos_id());
    params.validate(config.vocab_size)?;
    args.sampling.stop_strings(&defaults)?;
    let context = args.max_model_len.map_or(config.max_position_embeddings.min(DEFAULT_CONTEXT), |len| len as usize);
    let device = args.device.open(model_dtype(&checkpoint)?)?;
    let limits = Limits::new(context, context.min(MAX_BATCH_TOKENS), 1);
    let engine = args.engine.start(load_model(&checkpoint, &device, limits, "lower --max-model-len")?);
    let mut chat = Chat {
        args,
        engine,
        tokenizer,
        template,
        params,
        defaults,
        context,
        messages: Vec::new(),
        refused: None,
        answered: false,
    };
    chat.reset();
    chat.talk()?;
    // A person has seen that all was refused; a program that wrote the questions reads the exit code.
    let refused = chat.refused.filter(|_| !chat.answered && !std::io::stdin().is_terminal());
    Ok(refused.map_or(ExitCode::SUCCESS, ExitCode::from))
}

struct Chat<'a> {
    args: &'a Args,
    engine: Engine,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    params: SamplingParams,
    defaults: GenerationConfig,
    context: usize,
    messages: Vec<Value>,
    /// Exit code for the last question that could not be answered, while none was.
    refused: Option<u8>,
    answered: bool,
}

impl Chat<'_> {
    /// Forgets everything but the system message.
    fn reset(&mut self) {
        self.messages = self.args.system.iter().map(|text| message("system", text)).collect();
    }

    /// Reads lines and answers them until the input ends.
    fn talk(&mut self) -> Result<()> {
        let interrupted = interrupt_flag()?;
        let interactive = std::io::stdin().is_terminal();
        loop {
            // Ctrl-C at the prompt ends the program, during an answer the answer.
            interrupted.store(true, Ordering::Relaxed);
            if interactive {
                output::write("> ")?;
            }
            let mut line = String::new();
            if std::io::stdin().lock().read_line(&mut line).map_err(Error::io("stdin"))? == 0 {
                return Ok(());
            }
            interrupted.store(false, Ordering::Relaxed);
            match line.trim() {
                "" => {}
                "/exit" => return Ok(()),
                "/reset" => self.reset(),
                text => self.turn(text, &interrupted)?,
            }
        }
    }

    /// One question and its answer. A question that cannot be answered is reported and forgotten.
    fn turn(&mut self, text: &str, interrupted: &AtomicBool) -> Result<()> {
        self.messages.push(message("user", text));
        match self.answer(interrupted) {
            Ok((done, prompt)) => {
                self.answered = true;
                output::write("\n")?;
                tracing::info!("{}", done.summary(prompt));
                self.messages.push(message("assistant", done.text.trim_end()));
            }
            Err(error @ Error::Input { .. }) => {
                self.messages.pop();
                self.refused = Some(error.exit_code());
                eprintln!("error: {error}");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Writes the answer to the messages so far; with the number of tokens they took.
    fn answer(&mut self, interrupted: &AtomicBool) -> Result<(Completion, usize)> {
        let input = ChatInput { messages: self.messages.clone(), add_generation_prompt: true, ..ChatInput::default() };
        let prompt_ids = self.tokenizer.encode(&self.template.render(&input)?, false)?;
        let prompt = prompt_ids.len();
        let room = self.context.saturating_sub(prompt);
        if room == 0 {
            let reason = format!(
                "has {prompt} tokens, the context holds {}; /reset forgets it, --max-model-len enlarges the context",
                self.context
            );
            return Err(Error::input("conversation", reason));
        }
        let max_tokens =
            self.args.max_tokens.map_or_else(|| default_tokens(&self.defaults, prompt, room), |n| n as usize);
        let max_tokens = max_tokens.min(room);
        let stream = TextStream {
            detokenizer: self.tokenizer.detokenizer(true),
            stop: self.args.sampling.stop_strings(&self.defaults)?,
            min_tokens: self.params.min_tokens,
        };
        let request = Request::new(prompt_ids, self.params.clone(), max_tokens);
        let done = complete(&mut self.engine, request, stream, interrupted, &mut output::write)?;
        Ok((done, prompt))
    }
}

fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}
