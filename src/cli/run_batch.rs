//! `run-batch`: a file of requests in OpenAI's batch format, answered without a server.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::error::Error;
use crate::server::{
    AccessLogFormat, ApiKeys, BatchSummary, ConnectionLimits, RequestLimits, ServerOptions, run_batch,
};

use super::served::ServedArgs;
use super::{Outcome, output};

/// How long one request may take: nobody waits for it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: lowbit run-batch -i requests.jsonl -o answers.jsonl assets/books-6m-gptq

A line of the input: {\"custom_id\": \"1\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {\"prompt\": \"It was\", \"max_tokens\": 16}}
An interrupted run goes on where it was when it is started again.")]
pub(super) struct Args {
    #[command(flatten)]
    served: ServedArgs,

    /// Requests, one JSON object a line.
    #[arg(short, long, env = "LOWBIT_INPUT_FILE", value_name = "IN.jsonl")]
    input_file: PathBuf,

    /// Answers, one JSON object a line in the order in which they end.
    #[arg(short, long, env = "LOWBIT_OUTPUT_FILE", value_name = "OUT.jsonl")]
    output_file: PathBuf,
}

pub(super) fn run(args: &Args) -> Outcome {
    if args.output_file.exists() {
        let reason = format!("{} exists already; remove it, or name another", args.output_file.display());
        return Err(Error::input("--output-file", reason));
    }
    let options = ServerOptions {
        bind: Vec::new(),
        tls: None,
        keys: ApiKeys::default(),
        allowed_hosts: Vec::new(),
        allowed_origins: Vec::new(),
        requests: RequestLimits { request_timeout: REQUEST_TIMEOUT, ..RequestLimits::default() },
        connections: ConnectionLimits::default(),
        max_queued: 4096,
        shutdown_timeout: Duration::ZERO,
        access_log: AccessLogFormat::Off,
        vllm_metrics: false,
        web: false,
    };
    let loader = args.served.loader()?;
    let bar = output::progress("requests");
    let files = (args.input_file.as_path(), args.output_file.as_path());
    let summary = run_batch(&options, loader, files, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let BatchSummary { completed, failed, resumed } = summary?;
    let earlier = if resumed > 0 { format!(", {resumed} from an earlier run") } else { String::new() };
    eprintln!("{completed} answered, {failed} failed{earlier}: {}", args.output_file.display());
    Ok(ExitCode::SUCCESS)
}
