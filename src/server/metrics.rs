//! What is counted, and how it is written for Prometheus. Names and buckets are vLLM's, under a prefix of our own and on request under
//! vLLM's too, so that dashboards and routers made for it read ours.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

use crate::engine::Load;

/// Upper bounds in seconds: of the time to the first token, between tokens, and of whole requests or their phases.
const FIRST_TOKEN: [f64; 18] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0];
const BETWEEN_TOKENS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
const REQUEST: [f64; 18] =
    [0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 600.0];
/// Upper bounds of counts of tokens.
const TOKENS: [f64; 15] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0, 50_000.0];

/// Labels of requests that ended well.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Finished {
    model_name: String,
    finished_reason: &'static str,
}

/// Labels of an HTTP request: the route's pattern, never the path as it was sent.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Http {
    /// `GET`, `POST`, or `other`: clients may send any.
    pub(super) method: &'static str,
    /// `/v1/models`.
    pub(super) handler: String,
    /// 200.
    pub(super) status: u16,
}

/// Size of the KV cache, told once.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CacheConfig {
    block_size: u64,
    num_gpu_blocks: u64,
    enable_prefix_caching: String,
}

type Value = Gauge<f64, AtomicU64>;

/// All that is counted.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    model_name: String,
    running: Value,
    waiting: Value,
    kv_cache_usage: Value,
    queries: Counter,
    hits: Counter,
    preemptions: Counter,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    success: Family<Finished, Counter>,
    first_token: Histogram,
    between_tokens: Histogram,
    per_output_token: Histogram,
    e2e: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    prompt_len: Histogram,
    generation_len: Histogram,
    http: Family<Http, Counter>,
}

/// How one request went, for the histograms.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timing {
    /// From its arrival until it was first scheduled.
    pub(super) queue: Duration,
    /// From then until its first token.
    pub(super) prefill: Duration,
    /// From the first token to the last.
    pub(super) decode: Duration,
    /// From its arrival to its end.
    pub(super) e2e: Duration,
}

impl Metrics {
    /// Nothing counted. `with_vllm` tells everything under vLLM's names too.
    pub(super) fn new(model_name: &str, cache: (usize, usize, bool), with_vllm: bool) -> Metrics {
        let histogram = |bounds: &[f64]| Histogram::new(bounds.iter().copied());
        let mut metrics = Metrics {
            registry: Registry::default(),
            model_name: model_name.to_owned(),
            running: Value::default(),
            waiting: Value::default(),
            kv_cache_usage: Value::default(),
            queries: Counter::default(),
            hits: Counter::default(),
            preemptions: Counter::default(),
            prompt_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            success: Family::default(),
            first_token: histogram(&FIRST_TOKEN),
            between_tokens: histogram(&BETWEEN_TOKENS),
            per_output_token: histogram(&BETWEEN_TOKENS),
            e2e: histogram(&REQUEST),
            queue: histogram(&REQUEST),
            prefill: histogram(&REQUEST),
            decode: histogram(&REQUEST),
            prompt_len: histogram(&TOKENS),
            generation_len: histogram(&TOKENS),
            http: Family::default(),
        };
        for prefix in ["lowbit", "vllm"].into_iter().take(1 + usize::from(with_vllm)) {
            metrics.register(prefix, cache);
        }
        let http = metrics.http.clone();
        metrics.registry.register("http_requests", "HTTP requests by route and status", http);
        metrics
    }

    fn register(&mut self, prefix: &str, (block_size, num_blocks, is_caching): (usize, usize, bool)) {
        let model = [("model_name".into(), self.model_name.clone().into())];
        let of_model = self.registry.sub_registry_with_labels(model.into_iter());
        add(of_model, prefix, "num_requests_running", "Sequences that are being computed", &self.running);
        add(of_model, prefix, "num_requests_waiting", "Sequences that wait to be computed", &self.waiting);
        add(
            of_model,
            prefix,
            "kv_cache_usage_perc",
            "Part of the KV cache that sequences use, 0 to 1",
            &self.kv_cache_usage,
        );
        add(of_model, prefix, "prefix_cache_queries", "Prompt tokens looked up in the prefix cache", &self.queries);
        add(of_model, prefix, "prefix_cache_hits", "Prompt tokens found in the prefix cache", &self.hits);
        add(of_model, prefix, "num_preemptions", "Times that a sequence gave its KV blocks up", &self.preemptions);
        add(of_model, prefix, "prompt_tokens", "Tokens of prompts", &self.prompt_tokens);
        add(of_model, prefix, "generation_tokens", "Tokens generated", &self.generation_tokens);
        add(of_model, prefix, "time_to_first_token_seconds", "From arrival to the first token", &self.first_token);
        add(of_model, prefix, "inter_token_latency_seconds", "From a token to the next", &self.between_tokens);
        add(
            of_model,
            prefix,
            "request_time_per_output_token_seconds",
            "A request's mean time between tokens",
            &self.per_output_token,
        );
        add(of_model, prefix, "e2e_request_latency_seconds", "From arrival to the last token", &self.e2e);
        add(of_model, prefix, "request_queue_time_seconds", "From arrival until scheduled", &self.queue);
        add(of_model, prefix, "request_prefill_time_seconds", "From scheduled to the first token", &self.prefill);
        add(of_model, prefix, "request_decode_time_seconds", "From the first token to the last", &self.decode);
        add(of_model, prefix, "request_prompt_tokens", "Tokens of a prompt", &self.prompt_len);
        add(of_model, prefix, "request_generation_tokens", "Tokens that a request generated", &self.generation_len);
        self.registry.register(
            format!("{prefix}:request_success"),
            "Choices that ended, by reason",
            self.success.clone(),
        );
        let info = Family::<CacheConfig, Value>::default();
        info.get_or_create(&CacheConfig {
            block_size: block_size as u64,
            num_gpu_blocks: num_blocks as u64,
            enable_prefix_caching: if is_caching { "True" } else { "False" }.into(),
        })
        .set(1.0);
        self.registry.register(format!("{prefix}:cache_config_info"), "Size of the KV cache", info);
    }

    /// The text that Prometheus reads; gauges are those of `load`.
    pub(super) fn encode(&self, load: &Load) -> String {
        self.running.set(load.running as f64);
        self.waiting.set(load.waiting as f64);
        self.kv_cache_usage.set(load.used_blocks as f64 / load.total_blocks.max(1) as f64);
        let raise = |counter: &Counter, to: u64| counter.inner().store(to, Ordering::Relaxed);
        raise(&self.queries, load.prefix_cache_queries);
        raise(&self.hits, load.prefix_cache_hits);
        raise(&self.preemptions, load.preemptions);
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }

    /// A prompt was computed.
    pub(super) fn prompt(&self, tokens: usize) {
        self.prompt_tokens.inc_by(tokens as u64);
        self.prompt_len.observe(tokens as f64);
    }

    /// The first token of a request came, `after` its arrival.
    pub(super) fn first_token(&self, after: Duration) {
        self.generation_tokens.inc();
        self.first_token.observe(after.as_secs_f64());
    }

    /// Another token of a sequence came, `after` the one before it.
    pub(super) fn next_token(&self, after: Duration) {
        self.generation_tokens.inc();
        self.between_tokens.observe(after.as_secs_f64());
    }

    /// A choice ended.
    pub(super) fn finished(&self, reason: &'static str, tokens: usize) {
        let labels = Finished { model_name: self.model_name.clone(), finished_reason: reason };
        self.success.get_or_create(&labels).inc();
        self.generation_len.observe(tokens as f64);
    }

    /// A request ended, whose longest choice has `tokens`.
    pub(super) fn request(&self, timing: &Timing, tokens: usize) {
        self.queue.observe(timing.queue.as_secs_f64());
        self.prefill.observe(timing.prefill.as_secs_f64());
        self.decode.observe(timing.decode.as_secs_f64());
        self.e2e.observe(timing.e2e.as_secs_f64());
        if tokens > 1 {
            self.per_output_token.observe(timing.decode.as_secs_f64() / (tokens - 1) as f64);
        }
    }

    /// An HTTP request was answered.
    pub(super) fn http(&self, labels: Http) {
        self.http.get_or_create(&labels).inc();
    }
}

fn add<M: Metric + Clone>(registry: &mut Registry, prefix: &str, name: &str, help: &str, metric: &M) {
    registry.register(format!("{prefix}:{name}"), help, metric.clone());
}

/// Metrics that many threads write to.
pub(super) type Shared = Arc<Metrics>;
