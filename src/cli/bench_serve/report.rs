//! A run's results as people read them, and as JSON under the keys of `vllm bench serve`.

use std::time::Instant;

use serde_json::{Map, Value, json};

use super::super::output;
use super::client::Reply;
use super::drive::Run;
use super::metrics::{Metric, Metrics, Objective, deviation, mean, percentile};

/// What a run was asked to do.
#[derive(Debug)]
pub(super) struct Conditions {
    /// `2026-11-22T01:20:33Z`.
    pub(super) date: String,
    pub(super) backend: &'static str,
    pub(super) label: Option<String>,
    pub(super) url: String,
    pub(super) model: String,
    pub(super) num_prompts: usize,
    /// Requests a second.
    pub(super) request_rate: f64,
    pub(super) burstiness: f64,
    pub(super) max_concurrency: Option<usize>,
    pub(super) objectives: Vec<Objective>,
    /// Metrics to show, and which percentiles of them.
    pub(super) metrics: Vec<Metric>,
    pub(super) percentiles: Vec<f64>,
}

/// Results and what they are of.
#[derive(Debug)]
pub(super) struct Report<'a> {
    pub(super) conditions: &'a Conditions,
    pub(super) run: &'a Run,
    pub(super) metrics: &'a Metrics,
}

impl Report<'_> {
    /// Part of the machine's processors that this process kept busy.
    fn cpu_share(&self) -> Option<f64> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        Some(self.run.cpu_seconds? / self.metrics.duration / processors)
    }

    fn per_second(&self, count: usize) -> f64 {
        count as f64 / self.metrics.duration
    }

    /// One object; with `is_detailed` also every request.
    pub(super) fn json(&self, is_detailed: bool) -> Value {
        let (conditions, metrics) = (self.conditions, self.metrics);
        let rate = if conditions.request_rate.is_finite() { json!(conditions.request_rate) } else { json!("inf") };
        let burstiness = if conditions.burstiness.is_finite() { json!(conditions.burstiness) } else { json!("inf") };
        let date: String = conditions.date.chars().filter(char::is_ascii_digit).collect();
        let errors: Map<String, Value> = metrics.errors.iter().map(|(error, n)| (error.clone(), json!(n))).collect();
        let mut all = json!({
            "date": format!("{}-{}", &date[..date.len().min(8)], &date[date.len().min(8)..]),
            "endpoint_type": conditions.backend,
            "backend": conditions.backend,
            "label": conditions.label,
            "url": conditions.url,
            "model_id": conditions.model,
            "tokenizer_id": Value::Null,
            "num_prompts": conditions.num_prompts,
            "request_rate": rate,
            "burstiness": burstiness,
            "max_concurrency": conditions.max_concurrency,
            "duration": metrics.duration,
            "completed": metrics.completed,
            "failed": metrics.failed,
            "total_input_tokens": metrics.input_tokens,
            "total_output_tokens": metrics.output_tokens,
            "request_throughput": self.per_second(metrics.completed),
            "request_goodput": metrics.goodput,
            "output_throughput": self.per_second(metrics.output_tokens),
            "total_token_throughput": self.per_second(metrics.input_tokens + metrics.output_tokens),
            "max_output_tokens_per_s": metrics.peak_output_throughput,
            "max_concurrent_requests": metrics.peak_concurrency,
            "error_counts": errors,
            "tokens_counted_by_server": !metrics.lacks_usage,
            "client_cpu_share": self.cpu_share(),
        });
        for &metric in &conditions.metrics {
            let (name, values) = (metric.name(), milliseconds(metrics.values(metric)));
            all[format!("mean_{name}_ms")] = json!(mean(&values));
            all[format!("median_{name}_ms")] = json!(percentile(&values, 50.0));
            all[format!("std_{name}_ms")] = json!(deviation(&values));
            for &percent in &conditions.percentiles {
                all[format!("p{percent}_{name}_ms")] = json!(percentile(&values, percent));
            }
        }
        if is_detailed {
            self.add_details(&mut all);
        }
        all
    }

    fn add_details(&self, all: &mut Value) {
        let replies = &self.run.replies;
        let first = replies.iter().map(|reply| reply.start).min().unwrap_or_else(Instant::now);
        let of = |get: &dyn Fn(&Reply) -> Value| Value::Array(replies.iter().map(get).collect());
        let is_good = |reply: &Reply| reply.error.is_none();
        all["input_lens"] = of(&|reply| json!(reply.input_tokens));
        all["output_lens"] = of(&|reply| json!(if is_good(reply) { reply.output_tokens } else { 0 }));
        all["start_times"] = of(&|reply| json!((reply.start - first).as_secs_f64()));
        all["ttfts"] = of(&|reply| json!(reply.ttft));
        all["itls"] = of(&|reply| json!(reply.itl));
        all["errors"] = of(&|reply| json!(reply.error.as_deref().unwrap_or_default()));
    }

    /// The results as text.
    pub(super) fn text(&self) -> String {
        let (conditions, metrics) = (self.conditions, self.metrics);
        let mut lines = vec![
            ("Server", conditions.url.clone()),
            ("Model", conditions.model.clone()),
            ("Successful requests", metrics.completed.to_string()),
            ("Failed requests", metrics.failed.to_string()),
        ];
        if let Some(most) = conditions.max_concurrency {
            lines.push(("Maximum request concurrency", most.to_string()));
        }
        if conditions.request_rate.is_finite() {
            lines.push(("Request rate configured (req/s)", format!("{:.2}", conditions.request_rate)));
        }
        lines.extend([
            ("Benchmark duration (s)", format!("{:.2}", metrics.duration)),
            ("Total input tokens", metrics.input_tokens.to_string()),
            ("Total generated tokens", metrics.output_tokens.to_string()),
            ("Request throughput (req/s)", format!("{:.2}", self.per_second(metrics.completed))),
        ]);
        if let Some(goodput) = metrics.goodput {
            let objectives: Vec<String> = conditions.objectives.iter().map(Objective::to_string).collect();
            lines.push(("Request goodput (req/s)", format!("{goodput:.2} ({})", objectives.join(", "))));
        }
        let tokens = metrics.input_tokens + metrics.output_tokens;
        lines.extend([
            ("Output token throughput (tok/s)", format!("{:.2}", self.per_second(metrics.output_tokens))),
            ("Peak output token throughput (tok/s)", format!("{:.0}", metrics.peak_output_throughput)),
            ("Peak concurrent requests", metrics.peak_concurrency.to_string()),
            ("Total token throughput (tok/s)", format!("{:.2}", self.per_second(tokens))),
        ]);
        if let Some(share) = self.cpu_share() {
            let words = if share > 0.5 { ": the client may have been the limit" } else { "" };
            lines.push(("Client CPU share of this machine", format!("{:.0} %{words}", share * 100.0)));
        }
        let lines: Vec<String> =
            lines.iter().map(|(name, value)| format!("{:<40} {value}\n", format!("{name}:"))).collect();
        let mut text = lines.concat() + "\n" + &self.latencies();
        for (error, count) in metrics.errors.iter().take(10) {
            text.push_str(&format!("\n{count} failed: {error}"));
        }
        if metrics.lacks_usage {
            text.push_str("\nThe server did not say how many tokens it wrote: events of the streams were counted.");
        }
        text.trim_end().to_string() + "\n"
    }

    fn latencies(&self) -> String {
        let percentiles: Vec<String> =
            self.conditions.percentiles.iter().map(|percent| format!("p{percent}")).collect();
        let mut header = vec!["ms", "mean", "std", "median"];
        header.extend(percentiles.iter().map(String::as_str));
        let row = |metric: &Metric| {
            let values = milliseconds(self.metrics.values(*metric));
            let middle = [mean(&values), deviation(&values), percentile(&values, 50.0)];
            let rest = self.conditions.percentiles.iter().map(|&percent| percentile(&values, percent));
            let numbers = middle.into_iter().chain(rest).map(|x| format!("{x:.2}"));
            std::iter::once(metric.name().to_uppercase()).chain(numbers).collect::<Vec<String>>()
        };
        let rows: Vec<Vec<String>> = self.conditions.metrics.iter().map(row).collect();
        output::table(&header, &rows, &header[1..])
    }
}

fn milliseconds(seconds: &[f64]) -> Vec<f64> {
    seconds.iter().map(|x| x * 1e3).collect()
}
