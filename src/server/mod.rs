//! `lowbit serve`: an OpenAI-compatible server over the engine. The only asynchronous code of the crate.
//!
//! A request passes [`api`] (fields to an engine request, on a thread for tokenization), [`worker`] (the engine's own thread) and
//! [`generation`] (events to text), and is written by the API that it came through.

mod access_log;
mod api;
mod app;
mod batch;
mod error;
mod generation;
mod guard;
mod listen;
mod metrics;
mod page;
mod worker;

pub use access_log::AccessLogFormat;
pub use app::{RequestLimits, ServedModel};
pub use batch::{BatchSummary, run_batch};
pub use guard::ApiKeys;
pub use listen::{Bind, ConnectionLimits, Tls};

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::layers::KvCache;

use access_log::AccessLog;
use app::App;
use error::ApiError;
use guard::Guard;
use listen::Listener;
use metrics::Metrics;
use worker::Health;

/// Threads that tokenize, render templates and wait for grammars at most: some seconds where a grammar is hostile.
const PREPARING_THREADS: usize = 256;

/// How a server works.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Where it listens; at least one.
    pub bind: Vec<Bind>,
    /// Certificate for TCP sockets.
    pub tls: Option<Tls>,
    /// Keys of clients; without any all may ask.
    pub keys: ApiKeys,
    /// Host names that requests may use; none allows all.
    pub allowed_hosts: Vec<String>,
    /// Origins of web pages that may ask; `*` for any.
    pub allowed_origins: Vec<String>,
    /// Limits of requests.
    pub requests: RequestLimits,
    /// Limits of connections.
    pub connections: ConnectionLimits,
    /// Sequences that may wait beside those that run.
    pub max_queued: usize,
    /// How long requests may go on after a signal to end.
    pub shutdown_timeout: Duration,
    /// Lines about requests.
    pub access_log: AccessLogFormat,
    /// Tell metrics under vLLM's names too.
    pub vllm_metrics: bool,
    /// Serve the web page.
    pub web: bool,
}

/// What a server serves.
#[derive(Debug)]
pub struct Service {
    /// The engine, its model loaded and warm.
    pub engine: Engine,
    /// How clients see it.
    pub model: ServedModel,
    /// Whether prompts that start alike share keys and values, for the metrics.
    pub prefix_caching: bool,
}

/// What handlers share from the first connection on; the model comes later.
struct Server {
    app: OnceLock<Arc<App>>,
    guard: Guard,
    access_log: AccessLog,
    is_draining: AtomicBool,
    fault: OnceLock<String>,
}

impl Server {
    /// A server that serves nothing yet.
    fn new(options: &ServerOptions) -> Server {
        Server {
            app: OnceLock::new(),
            guard: Guard {
                keys: options.keys.clone(),
                hosts: options.allowed_hosts.iter().map(|host| host.to_ascii_lowercase()).collect(),
                origins: options.allowed_origins.clone(),
            },
            access_log: AccessLog::new(options.access_log),
            is_draining: AtomicBool::new(false),
            fault: OnceLock::new(),
        }
    }

    /// Takes requests for a model from now on.
    fn serve_model(&self, app: Arc<App>) -> Result<()> {
        self.app.set(app).map_err(|_| Error::Engine { reason: "the model was loaded twice: this is a bug".into() })
    }

    /// The model.
    ///
    /// # Errors
    /// 503 until it is loaded.
    fn app(&self) -> Result<Arc<App>, ApiError> {
        self.app
            .get()
            .cloned()
            .ok_or_else(|| ApiError::unavailable("the model is being loaded; /ready tells when it is"))
    }

    /// Fails while it takes no requests.
    ///
    /// # Errors
    /// 503.
    fn check_open(&self) -> Result<(), ApiError> {
        if let Some(reason) = self.fault() {
            return Err(ApiError::unavailable(reason).with_code("broken"));
        }
        let draining = ApiError::unavailable("the server is about to end and takes no more requests");
        match self.is_draining.load(Ordering::Relaxed) {
            true => Err(draining.with_code("draining")),
            false => Ok(()),
        }
    }

    /// Why it is broken for good.
    fn fault(&self) -> Option<&str> {
        self.fault.get().map(String::as_str)
    }
}

/// Serves until a signal ends it. Listens at once, so that probes are answered while `load` makes the model on a thread of its own;
/// `listening` is told the addresses.
///
/// # Errors
/// Those of `load`; `Input` for an address that cannot be bound; `Engine` when the device has failed.
pub fn run(
    options: ServerOptions,
    load: impl FnOnce() -> Result<Service> + Send + 'static,
    listening: impl FnOnce(&[String]),
) -> Result<()> {
    let runtime = runtime()?;
    let result = runtime.block_on(serve(options, load, listening));
    // A thread that still loads or tokenizes is not waited for.
    runtime.shutdown_background();
    result
}

fn runtime() -> Result<Runtime> {
    let built = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8)))
        .max_blocking_threads(PREPARING_THREADS)
        .thread_name("server")
        .enable_all()
        .build();
    built.map_err(Error::io("server threads"))
}

async fn serve(
    options: ServerOptions,
    load: impl FnOnce() -> Result<Service> + Send + 'static,
    listening: impl FnOnce(&[String]),
) -> Result<()> {
    let tls = options.tls.as_ref().map(Tls::acceptor).transpose()?;
    let mut listeners = Vec::new();
    for bind in &options.bind {
        listeners.push(Listener::bind(bind).await?);
    }
    let addresses: Vec<String> = listeners.iter().map(|listener| listener.address(tls.is_some())).collect();
    let server = Arc::new(Server::new(&options));
    let (closing, is_closing) = watch::channel(false);
    let mut connections = JoinSet::new();
    for listener in listeners {
        let tls = tls.clone().filter(|_| matches!(listener, Listener::Tcp(_)));
        let router = api::router(Arc::clone(&server), options.web);
        connections.spawn(listen::serve(listener, router, tls, options.connections, is_closing.clone()));
    }
    let mut signals = Signals::new()?;
    listening(&addresses);

    let outcome = until_end(&server, &options, load, &mut signals).await;
    if let Err(error) = &outcome {
        let _ = server.fault.set(error.to_string());
    }
    // What is written already shall reach its clients.
    closing.send_replace(true);
    let flushed = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(FLUSH, flushed).await;
    outcome
}

/// Loads the model and serves it until the engine or a signal ends that.
async fn until_end(
    server: &Server,
    options: &ServerOptions,
    load: impl FnOnce() -> Result<Service> + Send + 'static,
    signals: &mut Signals,
) -> Result<()> {
    let (loaded, loading) = oneshot::channel();
    let thread = std::thread::Builder::new().name("load".into()).spawn(move || {
        let _ = loaded.send(load());
    });
    thread.map_err(Error::io("loading thread"))?;
    let service = tokio::select! {
        service = loading => service.map_err(|_| Error::Engine { reason: "loading the model panicked: this is a bug".into() })??,
        () = signals.wait() => return Ok(()),
    };
    let (app, thread) = start(service, options)?;
    server.serve_model(Arc::clone(&app))?;
    let outcome = tokio::select! {
        ended = ended(app.engine.health()) => ended,
        () = signals.wait() => {
            server.is_draining.store(true, Ordering::Relaxed);
            app.engine.drain();
            tracing::info!("draining: requests have {:?} to end", options.shutdown_timeout);
            tokio::select! {
                ended = ended(app.engine.health()) => ended,
                () = tokio::time::sleep(options.shutdown_timeout) => {
                    tracing::warn!("requests were cut off after {:?}", options.shutdown_timeout);
                    Ok(())
                }
                () = signals.wait() => Ok(()),
            }
        }
    };
    app.engine.stop();
    // The device must not be used while the process ends.
    let joined = tokio::task::spawn_blocking(move || thread.join());
    if tokio::time::timeout(STOP, joined).await.is_err() {
        tracing::warn!("the engine did not stop within {STOP:?}");
    }
    outcome
}

/// How long a step and what follows it may take at the end.
const STOP: Duration = Duration::from_secs(10);

/// How long responses that are complete have to reach their clients at the end.
const FLUSH: Duration = Duration::from_secs(2);

/// Waits until the engine works no more.
async fn ended(mut health: watch::Receiver<Health>) -> Result<()> {
    match health.wait_for(|health| *health != Health::Working).await.map(|health| health.clone()) {
        Ok(Health::Broken(reason)) => Err(Error::Engine { reason }),
        Err(_) => Err(Error::Engine { reason: "its thread ended".into() }),
        Ok(_) => Ok(()),
    }
}

/// Starts the engine's thread. Whoever ends the process stops it and waits for it first.
fn start(service: Service, options: &ServerOptions) -> Result<(Arc<App>, JoinHandle<()>)> {
    let Service { engine, mut model, prefix_caching } = service;
    let (config, limits) = (engine.runner().config().clone(), *engine.runner().limits());
    let cache = (KvCache::BLOCK_SIZE, engine.runner().cache().num_blocks, prefix_caching);
    if model.names.is_empty() {
        model.names.push("model".into());
    }
    let metrics = Arc::new(Metrics::new(&model.names[0], cache, options.vllm_metrics));
    let (engine, thread) = worker::start(engine, limits.max_seqs + options.max_queued)?;
    let app = App {
        tokenizer: Arc::clone(&model.tokenizer),
        model,
        engine: Arc::new(engine),
        metrics,
        limits: options.requests.clone(),
        max_model_len: limits.max_model_len,
        hidden_size: config.hidden_size,
        vocab_size: config.vocab_size,
        created: app::unix_time(),
    };
    Ok((Arc::new(app), thread))
}

/// Ctrl-C, and what service managers send.
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> Result<Signals> {
        Ok(Signals {
            interrupt: signal(SignalKind::interrupt()).map_err(Error::io("SIGINT"))?,
            terminate: signal(SignalKind::terminate()).map_err(Error::io("SIGTERM"))?,
        })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
