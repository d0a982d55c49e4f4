//! `bench serve`: throughput and latencies of any server that speaks OpenAI's API, in the manner of `vllm bench serve`.
//!
//! [`load`] says what is asked and when, [`drive`] sends it from one thread a request under way, [`client`] reads the streams ([`sse`])
//! and times them, [`metrics`] and [`report`] say what that comes to.

mod client;
mod drive;
mod load;
mod metrics;
mod plot;
mod report;
mod sse;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::ValueEnum;
use clap::builder::FalseyValueParser;
use serde_json::{Map, Value};

use self::client::{Client, Options};
use self::load::Load;
use self::metrics::{Metric, Metrics, Objective};
use self::report::{Conditions, Report};
use super::{Outcome, output};
use crate::error::{Error, Result};

/// Requests under way at once, each on a thread of its own.
const MAX_CONCURRENCY: usize = 4096;

const METHOD: &str = "\
How it measures:
  All times are the client's own. TTFT is from sending a request to its first token, ITL from one event with a token to the next, TPOT \
the time behind the first token over one less than the tokens, E2EL from sending to the last token; goodput counts the requests a second \
that keep all of --goodput. Tokens are those of the server's `usage`. A chat's opening event that holds a role alone is no token.

  Prompts are random token ids, so that their lengths are exact; with --backend openai-chat they are random words. Two prompts have \
nothing in common but --random-prefix-len. Results have the keys of `vllm bench serve`.

Example: lowbit bench serve --base-url http://127.0.0.1:8000 --num-prompts 200 --request-rate 8";

/// Which API is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Backend {
    /// Completions.
    #[value(alias = "vllm")]
    Openai,
    /// Chat completions.
    OpenaiChat,
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: lowbit bench serve --base-url http://127.0.0.1:8000 --num-prompts 200 --request-rate 8"
)]
#[command(after_long_help = METHOD)]
pub(super) struct Args {
    /// Address of the server.
    #[arg(long, env = "LOWBIT_BASE_URL", value_name = "URL", default_value = "http://127.0.0.1:8000")]
    base_url: String,

    /// API to measure: completions of token ids, or chat completions of words.
    #[arg(long, env = "LOWBIT_BACKEND", value_enum, default_value_t = Backend::Openai)]
    backend: Backend,

    /// Path of the API. Without it /v1/completions or /v1/chat/completions, by the backend.
    #[arg(long, env = "LOWBIT_ENDPOINT", value_name = "PATH")]
    endpoint: Option<String>,

    /// Model to ask for. Without it the first that the server names.
    #[arg(long, env = "LOWBIT_MODEL", value_name = "NAME")]
    model: Option<String>,

    /// Key of the API, sent as a bearer token. Without it that of OPENAI_API_KEY.
    #[arg(long, env = "LOWBIT_API_KEY", value_name = "KEY", hide_env_values = true)]
    api_key: Option<String>,

    /// Headers of every request.
    #[arg(long, env = "LOWBIT_HEADER", value_name = "KEY=VALUE", num_args = 1.., hide_env_values = true)]
    header: Vec<String>,

    /// Requests to send.
    #[arg(long, env = "LOWBIT_NUM_PROMPTS", value_name = "N", default_value_t = 1000)]
    num_prompts: usize,

    /// Requests a second; `inf` sends all at once.
    #[arg(long, env = "LOWBIT_REQUEST_RATE", value_name = "RATE", default_value_t = f64::INFINITY)]
    request_rate: f64,

    /// Shape of the gamma distribution of the intervals between requests: 1 is a Poisson process, less comes in bursts, more is
    /// more even, `inf` is even.
    #[arg(long, env = "LOWBIT_BURSTINESS", value_name = "SHAPE", default_value_t = 1.0)]
    burstiness: f64,

    /// Requests under way at most; what is due later waits. Without it as many as there are prompts, up to 4096.
    #[arg(long, env = "LOWBIT_MAX_CONCURRENCY", value_name = "N")]
    max_concurrency: Option<usize>,

    /// Tokens of a prompt, behind the shared prefix.
    #[arg(
        long,
        visible_alias = "input-len",
        env = "LOWBIT_RANDOM_INPUT_LEN",
        value_name = "N",
        default_value_t = 1024
    )]
    random_input_len: usize,

    /// Tokens to generate.
    #[arg(
        long,
        visible_alias = "output-len",
        env = "LOWBIT_RANDOM_OUTPUT_LEN",
        value_name = "N",
        default_value_t = 128
    )]
    random_output_len: usize,

    /// Draw both lengths evenly from LEN * (1 - R) to LEN * (1 + R).
    #[arg(long, env = "LOWBIT_RANDOM_RANGE_RATIO", value_name = "R", default_value_t = 0.0)]
    random_range_ratio: f64,

    /// Tokens at the start of every prompt that prompts share.
    #[arg(long, env = "LOWBIT_RANDOM_PREFIX_LEN", value_name = "N", default_value_t = 0)]
    random_prefix_len: usize,

    /// Shared prefixes, which take turns.
    #[arg(long, env = "LOWBIT_NUM_PREFIXES", value_name = "N", default_value_t = 1)]
    num_prefixes: usize,

    /// Token ids are drawn from the upper seven eighths of 0 to N; the model's vocabulary must be no smaller.
    #[arg(long, env = "LOWBIT_RANDOM_VOCAB_SIZE", value_name = "N", default_value_t = 4000)]
    random_vocab_size: usize,

    /// Have the server generate on at an end-of-sequence token. So it is without this flag too.
    #[arg(long, env = "LOWBIT_IGNORE_EOS", value_parser = FalseyValueParser::new(), overrides_with = "no_ignore_eos")]
    ignore_eos: bool,

    /// Let answers end where the model ends them, and do not send `ignore_eos`, which some servers refuse.
    #[arg(long, env = "LOWBIT_NO_IGNORE_EOS", value_parser = FalseyValueParser::new(), overrides_with = "ignore_eos")]
    no_ignore_eos: bool,

    /// Temperature to sample with. Without it the server's own.
    #[arg(long, env = "LOWBIT_TEMPERATURE", value_name = "T")]
    temperature: Option<f64>,

    /// Further fields of every request, a JSON object.
    #[arg(long, env = "LOWBIT_EXTRA_BODY", value_name = "JSON")]
    extra_body: Option<String>,

    /// Seed of lengths, prompts and arrivals.
    #[arg(long, env = "LOWBIT_SEED", value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Requests to send before the clock starts, one after the other; the first tells whether the server answers at all.
    #[arg(long, env = "LOWBIT_NUM_WARMUPS", value_name = "N", default_value_t = 1)]
    num_warmups: usize,

    /// Seconds after which a request has failed.
    #[arg(long, env = "LOWBIT_REQUEST_TIMEOUT", value_name = "SECONDS", default_value_t = 21_600, value_parser = clap::value_parser!(u64).range(1..=86_400 * 7))]
    request_timeout: u64,

    /// Metrics to report: ttft, tpot, itl, e2el.
    #[arg(
        long,
        env = "LOWBIT_PERCENTILE_METRICS",
        value_name = "NAME",
        value_delimiter = ',',
        default_value = "ttft,tpot,itl,e2el"
    )]
    percentile_metrics: Vec<Metric>,

    /// Percentiles to report of them.
    #[arg(long, env = "LOWBIT_METRIC_PERCENTILES", value_name = "P", value_delimiter = ',', default_value = "99")]
    metric_percentiles: Vec<f64>,

    /// What a request must keep to be counted as good, in milliseconds: `ttft:200 tpot:50`, also e2el.
    #[arg(long, env = "LOWBIT_GOODPUT", value_name = "METRIC:MS", num_args = 1.., value_delimiter = ',')]
    goodput: Vec<Objective>,

    /// A name for this run in the results.
    #[arg(long, env = "LOWBIT_LABEL", value_name = "NAME")]
    label: Option<String>,

    /// Print the results as one JSON object.
    #[arg(long, env = "LOWBIT_JSON", value_parser = FalseyValueParser::new())]
    json: bool,

    /// Write the results as JSON to a file whose name has label, rate, model and date.
    #[arg(long, env = "LOWBIT_SAVE_RESULT", value_parser = FalseyValueParser::new())]
    save_result: bool,

    /// Put times and lengths of every request into the JSON too.
    #[arg(long, env = "LOWBIT_SAVE_DETAILED", value_parser = FalseyValueParser::new())]
    save_detailed: bool,

    /// Folder of that file, made where it is not there.
    #[arg(long, env = "LOWBIT_RESULT_DIR", value_name = "DIR", default_value = ".")]
    result_dir: PathBuf,

    /// Name of that file.
    #[arg(long, env = "LOWBIT_RESULT_FILENAME", value_name = "NAME")]
    result_filename: Option<String>,

    /// Write a plot (distributions of TTFT and ITL, tokens a second over time): an .svg file, or a folder to put serve.svg into.
    #[arg(long, env = "LOWBIT_PLOT", value_name = "PATH")]
    plot: Option<PathBuf>,
}

pub(super) fn run(args: &Args) -> Outcome {
    let load = args.load()?;
    let concurrency = args.concurrency()?;
    args.check()?;
    let client = Client::new(args.options(concurrency)?)?;
    // Also where the model is given: a server that is not there is told of before anything else is done.
    let first = client.first_model()?;
    let model = args.model.clone().map_or(first, Ok)?;
    warm_up(&client, &model, &load, args.num_warmups)?;
    let conditions = args.conditions(&client, &model);
    let bar = output::progress("requests");
    bar.set_length(load.num_prompts as u64);
    let arrivals = load.arrivals(args.request_rate, args.burstiness);
    let run = drive::drive(&client, &model, &load, &arrivals, concurrency, &bar);
    bar.finish_and_clear();
    let run = run?;
    let metrics = Metrics::of(&run.replies, run.duration, &args.goodput);
    let report = Report { conditions: &conditions, run: &run, metrics: &metrics };
    args.save(&report)?;
    if args.json {
        output::write_json(&report.json(args.save_detailed))?;
    } else {
        output::write(&report.text())?;
    }
    match metrics.errors.first() {
        Some((error, _)) if metrics.completed == 0 => Err(Error::Server {
            url: conditions.url.clone(),
            reason: format!("all {} requests failed: {error}", metrics.failed),
        }),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Sends prompts of their own, so that no measured one is in a cache.
fn warm_up(client: &Client, model: &str, load: &Load, count: usize) -> Result<()> {
    let load = Load { seed: !load.seed, ..load.clone() };
    for i in 0..count {
        let reply = client.ask(&client.body(model, &load, i), load.input_len(i));
        if let Some(reason) = reply.error {
            let reason = format!("the warm-up request failed: {reason}. --num-warmups 0 sends none");
            return Err(Error::Server { url: client.url().to_string(), reason });
        }
    }
    Ok(())
}

impl Args {
    fn load(&self) -> Result<Load> {
        let load = Load {
            seed: self.seed,
            num_prompts: self.num_prompts,
            input_len: self.random_input_len,
            output_len: self.random_output_len,
            range_ratio: self.random_range_ratio,
            prefix_len: self.random_prefix_len,
            num_prefixes: self.num_prefixes,
            vocab_size: self.random_vocab_size,
        };
        load.check()?;
        Ok(load)
    }

    fn concurrency(&self) -> Result<usize> {
        match self.max_concurrency {
            Some(n) if !(1..=MAX_CONCURRENCY).contains(&n) => {
                Err(Error::input("--max-concurrency", format!("{n}: expected 1 to {MAX_CONCURRENCY}")))
            }
            Some(n) => Ok(n),
            None => {
                if self.num_prompts > MAX_CONCURRENCY {
                    tracing::warn!(
                        "at most {MAX_CONCURRENCY} requests are under way at once: others wait for their turn"
                    );
                }
                Ok(self.num_prompts.min(MAX_CONCURRENCY))
            }
        }
    }

    fn check(&self) -> Result<()> {
        for (flag, value) in [("--request-rate", self.request_rate), ("--burstiness", self.burstiness)] {
            if value.is_nan() || value < 1e-6 {
                return Err(Error::input(flag, format!("{value}: expected a number above 0, or `inf`")));
            }
        }
        match self.metric_percentiles.iter().find(|percent| !(0.0..=100.0).contains(*percent)) {
            Some(percent) => Err(Error::input("--metric-percentiles", format!("{percent}: expected 0 to 100"))),
            None => Ok(()),
        }
    }

    fn options(&self, concurrency: usize) -> Result<Options> {
        let mut headers = Vec::new();
        let key = self.api_key.clone().or_else(|| std::env::var("OPENAI_API_KEY").ok().filter(|key| !key.is_empty()));
        headers.extend(key.map(|key| ("authorization".to_string(), format!("Bearer {key}"))));
        for header in &self.header {
            let Some((name, value)) = header.split_once('=') else {
                return Err(Error::input("--header", "expected KEY=VALUE"));
            };
            headers.push((name.trim().to_string(), value.trim().to_string()));
        }
        let mut extra_body = Map::new();
        extra_body.extend(self.temperature.map(|t| ("temperature".to_string(), Value::from(t))));
        if let Some(text) = &self.extra_body {
            match serde_json::from_str(text) {
                Ok(Value::Object(fields)) => extra_body.extend(fields),
                Ok(_) => return Err(Error::input("--extra-body", "expected a JSON object")),
                Err(e) => return Err(Error::input("--extra-body", format!("expected a JSON object: {e}"))),
            }
        }
        let default = if self.is_chat() { "/v1/chat/completions" } else { "/v1/completions" };
        Ok(Options {
            base_url: self.base_url.clone(),
            endpoint: self.endpoint.clone().unwrap_or_else(|| default.to_string()),
            is_chat: self.is_chat(),
            headers,
            ignore_eos: self.ignore_eos || !self.no_ignore_eos,
            extra_body,
            timeout: Duration::from_secs(self.request_timeout),
            concurrency,
        })
    }

    fn is_chat(&self) -> bool {
        self.backend == Backend::OpenaiChat
    }

    fn conditions(&self, client: &Client, model: &str) -> Conditions {
        Conditions {
            date: output::utc(SystemTime::now()),
            backend: if self.is_chat() { "openai-chat" } else { "openai" },
            label: self.label.clone(),
            url: client.url().to_string(),
            model: model.to_string(),
            num_prompts: self.num_prompts,
            request_rate: self.request_rate,
            burstiness: self.burstiness,
            max_concurrency: self.max_concurrency,
            objectives: self.goodput.clone(),
            metrics: self.percentile_metrics.clone(),
            percentiles: self.metric_percentiles.clone(),
        }
    }

    /// Writes the files that were asked for, and says where.
    fn save(&self, report: &Report<'_>) -> Result<()> {
        if self.save_result {
            let json = report.json(self.save_detailed);
            let name = self.result_filename.clone().unwrap_or_else(|| {
                let label = self.label.as_deref().unwrap_or(report.conditions.backend);
                let model = report.conditions.model.rsplit('/').next().unwrap_or_default();
                let date = json["date"].as_str().unwrap_or_default();
                format!("{label}-{}qps-{model}-{date}.json", self.request_rate).replace(['/', '\\'], "_")
            });
            std::fs::create_dir_all(&self.result_dir).map_err(Error::io(&self.result_dir))?;
            let path = self.result_dir.join(name);
            output::write_file(&path, format!("{json}\n").as_bytes())?;
            eprintln!("results: {}", path.display());
        }
        if let Some(plot) = &self.plot {
            let is_file = plot.extension().is_some_and(|extension| extension == "svg");
            let path = if is_file { plot.clone() } else { plot.join("serve.svg") };
            if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
                std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
            }
            output::write_file(&path, plot::svg(report)?.as_bytes())?;
            eprintln!("plot: {}", path.display());
        }
        Ok(())
    }
}
