//! `serve`: an OpenAI-compatible server over one model.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::FalseyValueParser;

use crate::error::{Error, Result};
use crate::server::{self, AccessLogFormat, ApiKeys, Bind, ConnectionLimits, RequestLimits, ServerOptions, Tls};

use super::options::parse_count;
use super::served::ServedArgs;
use super::{Outcome, output, read_text};

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: lowbit serve assets/books-6m-gptq --port 8000

    curl localhost:8000/v1/completions -H 'content-type: application/json' -d '{\"prompt\": \"It was a dark night\", \"max_tokens\": 32}'")]
pub(super) struct Args {
    #[command(flatten)]
    served: ServedArgs,

    /// Flags as TOML, named without their dashes, and `model`: `port = 8080`. The command line and the environment win.
    #[arg(long, env = "LOWBIT_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(flatten)]
    http: HttpArgs,

    #[command(flatten)]
    limits: LimitArgs,
}

/// Where to listen, and to whom.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "HTTP")]
struct HttpArgs {
    /// Address or name to listen on. Whoever can reach it may use the model, but for --api-key.
    #[arg(long, env = "LOWBIT_HOST", default_value = "127.0.0.1")]
    host: String,

    /// Port to listen on; 0 takes one that is free.
    #[arg(long, env = "LOWBIT_PORT", default_value_t = 8000)]
    port: u16,

    /// Listen on a Unix socket instead.
    #[arg(long, env = "LOWBIT_UDS", value_name = "PATH", conflicts_with_all = ["host", "port", "tls_cert", "tls_key", "allowed_host"])]
    uds: Option<PathBuf>,

    /// Key that clients must send as `Authorization: Bearer KEY`. May be repeated. Better kept in the environment or in
    /// --api-key-file, since other users of the machine see command lines.
    #[arg(long, env = "LOWBIT_API_KEY", value_name = "KEY", value_delimiter = ',', hide_env_values = true)]
    api_key: Vec<String>,

    /// File of keys, one a line as `NAME KEY`; lines that begin with # are comments. Logs say names.
    #[arg(long, env = "LOWBIT_API_KEY_FILE", value_name = "FILE")]
    api_key_file: Option<PathBuf>,

    /// Host that requests may name, beside localhost where --host is of this machine alone. May be repeated.
    #[arg(long, env = "LOWBIT_ALLOWED_HOST", value_name = "HOST", value_delimiter = ',')]
    allowed_host: Vec<String>,

    /// Origin of web pages that may ask, as `https://app.example`; `*` for any. May be repeated.
    #[arg(long, env = "LOWBIT_ALLOWED_ORIGIN", value_name = "ORIGIN", value_delimiter = ',')]
    allowed_origin: Vec<String>,

    /// Certificate chain in PEM; needs --tls-key.
    #[arg(long, env = "LOWBIT_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// Private key in PEM.
    #[arg(long, env = "LOWBIT_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// Lines about requests on stderr: `text`, `json` or `off`. What was asked is never logged.
    #[arg(long, env = "LOWBIT_ACCESS_LOG", default_value = "text", value_parser = parse_access_log)]
    access_log: AccessLogFormat,

    /// Do not serve the web page.
    #[arg(long, env = "LOWBIT_NO_WEB", value_parser = FalseyValueParser::new())]
    no_web: bool,

    /// Tell /metrics under the names of another server too, for dashboards and routers made for it: `vllm`.
    #[arg(long, env = "LOWBIT_METRICS_COMPAT", value_name = "SERVER", value_parser = ["vllm"])]
    metrics_compat: Option<String>,
}

/// What clients may not exceed.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// Sequences that may wait beside those that run; what comes then is answered 429.
    #[arg(long, env = "LOWBIT_MAX_QUEUED", value_name = "N", default_value_t = 1024)]
    max_queued: u32,

    /// Connections at once; further ones wait.
    #[arg(long, env = "LOWBIT_MAX_CONNECTIONS", value_name = "N", default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    max_connections: u32,

    /// Largest body of a request in MiB.
    #[arg(long, env = "LOWBIT_MAX_BODY_MIB", value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    max_body_mib: u32,

    /// Most choices of one request, `n` times its prompts.
    #[arg(long, env = "LOWBIT_MAX_CHOICES", value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_choices: u32,

    /// Most alternatives to each token that are told.
    #[arg(long, env = "LOWBIT_MAX_LOGPROBS", value_name = "N", default_value_t = 20, value_parser = parse_count::<usize>)]
    max_logprobs: usize,

    /// Seconds that a request may take.
    #[arg(long, env = "LOWBIT_REQUEST_TIMEOUT", value_name = "S", default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..))]
    request_timeout: u32,

    /// Seconds that requests have to end after a signal to stop.
    #[arg(long, env = "LOWBIT_SHUTDOWN_TIMEOUT", value_name = "S", default_value_t = 30)]
    shutdown_timeout: u32,
}

fn parse_access_log(text: &str) -> Result<AccessLogFormat, String> {
    match text {
        "text" => Ok(AccessLogFormat::Text),
        "json" => Ok(AccessLogFormat::Json),
        "off" => Ok(AccessLogFormat::Off),
        _ => Err(format!("`{text}`: expected text, json or off")),
    }
}

pub(super) fn run(args: &Args) -> Outcome {
    if let Some(path) = &args.config {
        tracing::info!("flags of {} are read", path.display());
    }
    let options = ServerOptions {
        bind: vec![args.http.bind()],
        tls: args.http.tls(),
        keys: args.http.keys()?,
        allowed_hosts: args.http.allowed_hosts(),
        allowed_origins: args.http.allowed_origin.clone(),
        requests: args.limits.requests(),
        connections: ConnectionLimits {
            max_connections: args.limits.max_connections as usize,
            ..ConnectionLimits::default()
        },
        max_queued: args.limits.max_queued as usize,
        shutdown_timeout: Duration::from_secs(args.limits.shutdown_timeout.into()),
        access_log: args.http.access_log,
        vllm_metrics: args.http.metrics_compat.is_some(),
        web: !args.http.no_web,
    };
    let is_open = options.keys.is_empty() && !args.http.is_local();
    let loader = args.served.loader()?;
    server::run(options, loader, |addresses| {
        output::note(&format!("listening on {}", addresses.join(", ")));
        if is_open {
            tracing::warn!("whoever reaches {} may use the model: --api-key asks for a key", addresses.join(", "));
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

impl HttpArgs {
    fn bind(&self) -> Bind {
        match &self.uds {
            Some(path) => Bind::Unix(path.clone()),
            None => Bind::Tcp(self.host.clone(), self.port),
        }
    }

    fn tls(&self) -> Option<Tls> {
        let (cert, key) = self.tls_cert.clone().zip(self.tls_key.clone())?;
        Some(Tls { cert, key })
    }

    /// Whether only this machine can reach it.
    fn is_local(&self) -> bool {
        let is_loopback = self.host.parse().is_ok_and(|address: IpAddr| address.is_loopback());
        self.uds.is_some() || self.host == "localhost" || is_loopback
    }

    /// On this machine's own address a page of any site could have its name lead here.
    fn allowed_hosts(&self) -> Vec<String> {
        match (self.uds.is_some(), self.is_local()) {
            (true, _) => Vec::new(),
            (_, true) => {
                let own = ["localhost", "127.0.0.1", "[::1]", &self.host].map(str::to_owned);
                own.into_iter().chain(self.allowed_host.iter().cloned()).collect()
            }
            _ => self.allowed_host.clone(),
        }
    }

    fn keys(&self) -> Result<ApiKeys> {
        let mut keys = ApiKeys::default();
        for (index, key) in self.api_key.iter().enumerate() {
            if key.trim().is_empty() {
                return Err(Error::input("--api-key", "is empty"));
            }
            keys.add(format!("key{}", index + 1), key.trim());
        }
        let Some(path) = &self.api_key_file else { return Ok(keys) };
        let text = read_text(path)?;
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let Some((name, key)) = line.split_once(char::is_whitespace) else {
                let reason = format!("{}:{}: expected a name and a key", path.display(), number + 1);
                return Err(Error::input("--api-key-file", reason));
            };
            keys.add(name, key.trim());
        }
        if keys.is_empty() {
            return Err(Error::input("--api-key-file", format!("{}: holds no key", path.display())));
        }
        Ok(keys)
    }
}

impl LimitArgs {
    fn requests(&self) -> RequestLimits {
        RequestLimits {
            max_body_bytes: (self.max_body_mib as usize) << 20,
            request_timeout: Duration::from_secs(self.request_timeout.into()),
            max_choices: self.max_choices as usize,
            max_logprobs: self.max_logprobs,
            ..RequestLimits::default()
        }
    }
}
