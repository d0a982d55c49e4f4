//! The command line: one file a verb, and here what they share: the parser, exit codes, logging.
//!
//! Results go to stdout, everything else (progress, timings, logs, errors) to stderr.

mod bandwidth;
mod bench;
mod bench_kernels;
mod bench_serve;
mod chat;
mod config_file;
mod constraint;
mod doctor;
mod engine_limits;
pub mod eval;
mod generate;
mod inspect;
mod options;
mod output;
mod plan;
mod plot;
mod quantize;
mod run_batch;
mod serve;
mod served;
mod source;
mod verify;

use std::error::Error as _;
use std::ffi::OsString;
use std::io::{ErrorKind, IsTerminal};
use std::process::ExitCode;

use clap::builder::styling::{AnsiColor, Styles};
use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::error::{Error, Result};

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

const EXIT_CODES: &str = "\
Exit codes:
    0  success
    2  a flag, an argument or a request is out of its range
    3  the system refused a file operation
    4  a file of the model is missing something, damaged or not understood
    5  the model or the request needs something that is not supported
    6  the memory plan does not fit
    7  the GPU, its driver or a kernel failed
    8  the model could not be fetched from the hub, or a server could not be reached or refused (bench serve)
    9  a check that was asked for (verify) did not pass
  130  interrupted by Ctrl-C

Every flag has an environment twin, shown in the help of each command; the flag wins. RUST_LOG sets what is logged.
MODEL is a directory or a Hugging Face hub id, `org/name` or `org/name@revision`; HF_HOME, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE mean what they mean elsewhere.";

/// Runs quantized language models from Hugging Face directories on NVIDIA GPUs and CPUs.
#[derive(Debug, Parser)]
#[command(name = "lowbit", version, styles = STYLES, after_long_help = EXIT_CODES)]
#[command(after_help = "Example: lowbit generate -m assets/books-6m-gptq -p \"It was a dark night\"")]
struct Cli {
    /// Log what is going on to stderr; twice for more.
    #[arg(short, long, global = true, action = ArgAction::Count, env = "LOWBIT_VERBOSE")]
    verbose: u8,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Continue a prompt, writing the text as it is generated.
    Generate(generate::Args),
    /// Talk with a model that has a chat template.
    Chat(chat::Args),
    /// Serve a model over an OpenAI-compatible HTTP API.
    Serve(Box<serve::Args>),
    /// Answer a file of requests in OpenAI's batch format.
    RunBatch(run_batch::Args),
    /// Measure how good a model is: perplexity, divergence from a reference, multiple choice, comparisons.
    Eval(eval::Args),
    /// Make a quantized checkpoint of a full-precision model.
    Quantize(quantize::Args),
    /// Show what a model is, how each layer is quantized, which kernels would run it and what memory it would take.
    Inspect(inspect::Args),
    /// Say whether a model fits a GPU that need not be here, how many sequences at once, and what it would reach at best.
    Plan(plan::Args),
    /// Check every operation and every layer of a model on a device against the CPU's executable specification.
    Verify(verify::Args),
    /// Measure the speed of prompt processing and of decoding; `bench kernels` that of every op on the GPU, `bench serve` that of a
    /// server.
    Bench(bench::Args),
    /// Show what this binary and this machine offer, and what to do about what does not work.
    Doctor(doctor::Args),
}

/// Parses the command line of this process and runs it.
pub fn run() -> ExitCode {
    run_from(std::env::args_os())
}

/// Parses a command line, the program's name first, and runs it.
pub fn run_from(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match with_config(args.into_iter().collect()) {
        Ok(args) => args,
        Err(error) => {
            report(&error);
            return ExitCode::from(error.exit_code());
        }
    };
    let cli = Cli::from_arg_matches(&parser().get_matches_from(args)).unwrap_or_else(|e| e.exit());
    log_to_stderr(cli.verbose);
    let result = match &cli.command {
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Serve(args) => serve::run(args),
        Command::RunBatch(args) => run_batch::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Doctor(args) => doctor::run(args),
    };
    match result {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

/// A command line with what stands in the file that `serve --config` names.
fn with_config(args: Vec<OsString>) -> Result<Vec<OsString>> {
    let mut parser = parser();
    // Names and actions of flags are complete only then.
    parser.build();
    match parser.find_subcommand("serve").filter(|verb| args.iter().skip(1).any(|arg| arg == verb.get_name())) {
        Some(verb) => config_file::expanded(args, verb),
        None => Ok(args),
    }
}

/// The parser, whose flags take what begins with a minus and a digit as their value: it is refused by its range, not as a
/// flag that nobody knows.
fn parser() -> clap::Command {
    fn negative(command: clap::Command) -> clap::Command {
        let command = command.mut_args(|arg| match arg.get_long().is_some() && arg.get_action().takes_values() {
            true => arg.allow_negative_numbers(true),
            false => arg,
        });
        let verbs: Vec<String> = command.get_subcommands().map(|verb| verb.get_name().to_owned()).collect();
        verbs.iter().fold(command, |command, verb| command.mut_subcommand(verb, negative))
    }
    negative(Cli::command())
}

/// The text of a file that people wrote, without a byte order mark and with `\n` at the end of every line.
fn read_text(path: &std::path::Path) -> Result<String> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    Ok(crate::checkpoint::without_bom(&text).replace("\r\n", "\n"))
}

/// The reader of our output has seen enough (`lowbit ... | head`): not an error.
fn is_broken_pipe(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == ErrorKind::BrokenPipe)
}

/// `error: ...` and its causes, as far as the message does not hold them already.
fn report(error: &Error) {
    let mut message = error.to_string();
    let mut lines = vec![format!("error: {message}")];
    let mut cause = error.source();
    while let Some(source) = cause {
        let text = source.to_string();
        if !message.contains(&text) {
            lines.push(format!("  caused by: {text}"));
        }
        message = text;
        cause = source.source();
    }
    output::note(&lines.join("\n"));
}

fn log_to_stderr(verbose: u8) {
    let default = match verbose {
        0 => "lowbit=warn",
        1 => "lowbit=info",
        _ => "lowbit=debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .with_target(false)
        // Told of on stderr too, with a panic where that is closed.
        .log_internal_errors(false)
        .init();
}

/// Exit code after Ctrl-C, as shells have it.
const INTERRUPTED: u8 = 130;

/// What a verb returns: an exit code other than success without an error message is an interruption's.
type Outcome = Result<ExitCode>;

#[cfg(test)]
mod tests {
    use super::*;

    /// clap's own checks of the definitions, and ours: every flag has its environment twin, every verb an example.
    #[test]
    fn definitions_are_complete() {
        let mut cli = Cli::command();
        cli.build();
        // clap's own `help` repeats every verb below itself.
        fn verbs(command: &clap::Command) -> impl Iterator<Item = &clap::Command> {
            command.get_subcommands().filter(|verb| verb.get_name() != "help")
        }
        for verb in verbs(&cli).flat_map(|verb| std::iter::once(verb).chain(verbs(verb))) {
            let help = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example: lowbit"), "{} has no example", verb.get_name());
            for arg in verb.get_arguments().filter(|arg| arg.get_long().is_some_and(|long| long != "help")) {
                let long = arg.get_long().expect("filtered");
                let twin = format!("LOWBIT_{}", long.replace('-', "_").to_uppercase());
                let env = arg.get_env().and_then(|env| env.to_str()).unwrap_or_default();
                assert_eq!(env, twin, "{} --{long}", verb.get_name());
                assert!(arg.get_help().is_some(), "{} --{long} has no help", verb.get_name());
            }
        }
    }
}
