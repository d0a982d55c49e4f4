//! What the replies say of the server, by the definitions of vLLM's benchmark: time to first token (TTFT), time per output token
//! (TPOT: from the first to the last, over one less than their number), inter-token latency (ITL, of all streams together), end-to-end
//! latency (E2EL), goodput.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::client::Reply;

/// What is measured of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Metric {
    Ttft,
    Tpot,
    Itl,
    E2el,
}

impl Metric {
    pub(super) const ALL: [Metric; 4] = [Metric::Ttft, Metric::Tpot, Metric::Itl, Metric::E2el];

    /// The name in flags and results.
    pub(super) fn name(self) -> &'static str {
        match self {
            Metric::Ttft => "ttft",
            Metric::Tpot => "tpot",
            Metric::Itl => "itl",
            Metric::E2el => "e2el",
        }
    }
}

impl FromStr for Metric {
    type Err = String;

    fn from_str(name: &str) -> Result<Metric, String> {
        let found = Metric::ALL.into_iter().find(|metric| metric.name() == name);
        found.ok_or_else(|| format!("`{name}`: expected ttft, tpot, itl or e2el"))
    }
}

/// What a request must keep to be counted in the goodput: `ttft:200`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Objective {
    pub(super) metric: Metric,
    pub(super) milliseconds: f64,
}

impl FromStr for Objective {
    type Err = String;

    fn from_str(text: &str) -> Result<Objective, String> {
        let expected = || format!("`{text}`: expected ttft:MS, tpot:MS or e2el:MS");
        let (metric, milliseconds) = text.split_once(':').ok_or_else(expected)?;
        let metric: Metric = metric.parse().map_err(|_| expected())?;
        let milliseconds: f64 = milliseconds.parse().map_err(|_| expected())?;
        if metric == Metric::Itl || milliseconds.is_nan() || milliseconds < 0.0 {
            return Err(expected());
        }
        Ok(Objective { metric, milliseconds })
    }
}

impl fmt::Display for Objective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.metric.name(), self.milliseconds)
    }
}

/// A run's results.
#[derive(Debug)]
pub(super) struct Metrics {
    pub(super) completed: usize,
    pub(super) failed: usize,
    pub(super) duration: f64,
    pub(super) input_tokens: usize,
    pub(super) output_tokens: usize,
    /// Requests a second that kept all objectives; `None` without any.
    pub(super) goodput: Option<f64>,
    /// Most tokens of a whole second from the first request on.
    pub(super) peak_output_throughput: f64,
    /// Most requests that ran at once.
    pub(super) peak_concurrency: usize,
    /// Some replies did not come with the server's count of tokens.
    pub(super) lacks_usage: bool,
    /// Why requests failed, with how many, the most frequent first.
    pub(super) errors: Vec<(String, usize)>,
    /// Of each metric in the order of [`Metric::ALL`] all values in seconds, sorted.
    values: [Vec<f64>; 4],
}

impl Metrics {
    pub(super) fn of(replies: &[Reply], duration: Duration, objectives: &[Objective]) -> Metrics {
        let good: Vec<&Reply> = replies.iter().filter(|reply| reply.error.is_none()).collect();
        let duration = duration.as_secs_f64();
        let values = Metric::ALL.map(|metric| {
            let mut values: Vec<f64> = match metric {
                Metric::Ttft => good.iter().map(|reply| reply.ttft).collect(),
                Metric::Tpot => good.iter().filter_map(|reply| tpot(reply)).collect(),
                Metric::Itl => good.iter().flat_map(|reply| reply.itl.iter().copied()).collect(),
                Metric::E2el => good.iter().map(|reply| reply.latency).collect(),
            };
            values.sort_unstable_by(f64::total_cmp);
            values
        });
        let keeps = |reply: &&&Reply| objectives.iter().all(|objective| is_kept(objective, reply));
        let kept = good.iter().filter(keeps).count() as f64 / duration;
        let mut errors: Vec<(String, usize)> = Vec::new();
        for error in replies.iter().filter_map(|reply| reply.error.as_ref()) {
            match errors.iter_mut().find(|(known, _)| known == error) {
                Some((_, count)) => *count += 1,
                None => errors.push((error.clone(), 1)),
            }
        }
        errors.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        Metrics {
            completed: good.len(),
            failed: replies.len() - good.len(),
            duration,
            input_tokens: good.iter().map(|reply| reply.input_tokens).sum(),
            output_tokens: good.iter().map(|reply| reply.output_tokens).sum(),
            goodput: (!objectives.is_empty()).then_some(kept),
            peak_output_throughput: tokens_by_second(replies).into_iter().max().unwrap_or(0) as f64,
            peak_concurrency: peak_concurrency(&good),
            lacks_usage: good.iter().any(|reply| !reply.has_usage),
            errors,
            values,
        }
    }

    /// All values of a metric in seconds, sorted.
    pub(super) fn values(&self, metric: Metric) -> &[f64] {
        &self.values[metric as usize]
    }
}

/// Seconds per token behind the first.
fn tpot(reply: &Reply) -> Option<f64> {
    (reply.output_tokens > 1).then(|| (reply.latency - reply.ttft) / (reply.output_tokens - 1) as f64)
}

fn is_kept(objective: &Objective, reply: &Reply) -> bool {
    let seconds = match objective.metric {
        Metric::Ttft => reply.ttft,
        // An answer of one token waits for none.
        Metric::Tpot => tpot(reply).unwrap_or(0.0),
        Metric::Itl => return true,
        Metric::E2el => reply.latency,
    };
    seconds * 1e3 <= objective.milliseconds
}

/// Tokens that arrived in each second from the first request on, of requests that were answered.
pub(super) fn tokens_by_second(replies: &[Reply]) -> Vec<usize> {
    let good = || replies.iter().filter(|reply| reply.error.is_none());
    let Some(first) = good().map(|reply| reply.start).min() else { return Vec::new() };
    let mut seconds = Vec::new();
    for reply in good() {
        let mut at = (reply.start - first).as_secs_f64() + reply.ttft;
        for gap in [0.0].iter().chain(&reply.itl) {
            at += gap;
            let second = at as usize;
            if seconds.len() <= second {
                seconds.resize(second + 1, 0);
            }
            seconds[second] += 1;
        }
    }
    seconds
}

/// Most requests that were under way at once; one that ends makes room for one that starts at that moment.
fn peak_concurrency(replies: &[&Reply]) -> usize {
    let mut changes: Vec<(std::time::Instant, i64)> = replies
        .iter()
        .flat_map(|reply| [(reply.start, 1), (reply.start + Duration::from_secs_f64(reply.latency), -1)])
        .collect();
    changes.sort_unstable();
    let (mut now, mut peak) = (0i64, 0);
    for (_, change) in changes {
        now += change;
        peak = peak.max(now);
    }
    peak as usize
}

/// Mean; 0 of nothing.
pub(super) fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

/// Standard deviation of the values themselves, not of a population behind them; 0 of nothing.
pub(super) fn deviation(values: &[f64]) -> f64 {
    let middle = mean(values);
    let squares: Vec<f64> = values.iter().map(|x| (x - middle).powi(2)).collect();
    mean(&squares).sqrt()
}

/// The percentile of sorted values, between two by their distance (numpy's `linear`); 0 of nothing.
pub(super) fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let at = percent / 100.0 * sorted.len().saturating_sub(1) as f64;
    let (low, part) = (at.floor() as usize, at.fract());
    match (sorted.get(low), sorted.get(low + 1)) {
        (Some(a), Some(b)) => a + (b - a) * part,
        (Some(a), None) => *a,
        _ => 0.0,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Instant;

    use super::*;

    /// A reply that was sent `at` seconds after `start`.
    pub(in super::super) fn reply(start: Instant, at: f64, ttft: f64, itl: &[f64], tokens: usize) -> Reply {
        Reply {
            start: start + Duration::from_secs_f64(at),
            ttft,
            itl: itl.to_vec(),
            latency: ttft + itl.iter().sum::<f64>(),
            input_tokens: 10,
            output_tokens: tokens,
            has_usage: true,
            error: None,
        }
    }

    fn failed(start: Instant, error: &str) -> Reply {
        Reply { error: Some(error.to_string()), ..reply(start, 0.0, 9.0, &[9.0], 9) }
    }

    /// numpy 2.1: `np.percentile([1, 2, 4, 8, 16], [0, 50, 90, 99, 100])`, `np.std`; `np.percentile([3, 7], 25)`.
    #[test]
    fn percentiles_are_numpys() {
        let values = [1.0, 2.0, 4.0, 8.0, 16.0];
        let got = [0.0, 50.0, 90.0, 99.0, 100.0].map(|p| percentile(&values, p));
        for (got, expected) in got.into_iter().zip([1.0, 4.0, 12.8, 15.68, 16.0]) {
            assert!((got - expected).abs() < 1e-12, "{got} {expected}");
        }
        assert_eq!(percentile(&[3.0, 7.0], 25.0), 4.0);
        assert_eq!(percentile(&[5.0], 99.0), 5.0);
        assert_eq!((percentile(&[], 50.0), mean(&[]), deviation(&[])), (0.0, 0.0, 0.0));
        assert!((deviation(&values) - 5.455_272_678_794_342).abs() < 1e-12);
        assert_eq!(mean(&values), 6.2);
    }

    #[test]
    fn the_definitions() {
        let start = Instant::now();
        let replies = [
            reply(start, 0.0, 0.5, &[0.25, 0.25], 3),
            // Two tokens in one event: the tokens count, not the events.
            reply(start, 0.5, 0.25, &[0.5], 5),
            reply(start, 1.5, 0.125, &[], 1),
            failed(start, "HTTP 500"),
            failed(start, "timed out"),
            failed(start, "HTTP 500"),
        ];
        let objectives = ["ttft:250".parse().expect("valid"), "tpot:200".parse().expect("valid")];
        let metrics = Metrics::of(&replies, Duration::from_secs(2), &objectives);
        assert_eq!((metrics.completed, metrics.failed), (3, 3));
        assert_eq!((metrics.input_tokens, metrics.output_tokens), (30, 9));
        assert_eq!(metrics.values(Metric::Ttft), [0.125, 0.25, 0.5]);
        assert_eq!(metrics.values(Metric::Tpot), [0.125, 0.25], "0.5 over 4 and 0.5 over 2; one token has none");
        assert_eq!(metrics.values(Metric::Itl), [0.25, 0.25, 0.5]);
        assert_eq!(metrics.values(Metric::E2el), [0.125, 0.75, 1.0]);
        assert_eq!(metrics.goodput, Some(1.0), "the second and the third in two seconds");
        assert_eq!(metrics.errors, [("HTTP 500".to_string(), 2), ("timed out".to_string(), 1)]);
        // Tokens at 0.5, 0.75, 1.0; 0.75, 1.25; 1.625.
        assert_eq!(tokens_by_second(&replies), [3, 3]);
        assert_eq!((metrics.peak_output_throughput, metrics.peak_concurrency), (3.0, 2));
        assert_eq!(Metrics::of(&replies, Duration::from_secs(2), &[]).goodput, None);
    }

    #[test]
    fn nothing_is_no_panic() {
        let start = Instant::now();
        let metrics = Metrics::of(&[failed(start, "no")], Duration::from_secs(1), &[]);
        assert_eq!((metrics.completed, metrics.failed, metrics.peak_concurrency), (0, 1, 0));
        assert!(Metric::ALL.iter().all(|&metric| metrics.values(metric).is_empty()));
    }

    #[test]
    fn objectives_are_read() {
        let objective: Objective = "e2el:1500.5".parse().expect("valid");
        assert_eq!(objective, Objective { metric: Metric::E2el, milliseconds: 1500.5 });
        assert_eq!(objective.to_string(), "e2el:1500.5");
        for wrong in ["ttft", "itl:5", "ttft:", "ttft:x", "ttft:-1", "ttft:nan", "latency:5"] {
            assert!(wrong.parse::<Objective>().is_err_and(|e| e.contains("expected ttft:MS")), "{wrong}");
        }
    }
}
