//! Perplexity: the sums over predicted tokens that it comes from.

use std::time::Duration;

use serde_json::{Value, json};

use super::super::output;

/// The protocol in words; part of the JSON, so that figures are never compared across protocols.
pub const PROTOCOL: &str = "whole file encoded once, no BOS, disjoint windows of `context` tokens, the last partial window \
                            dropped, each window predicts its own tokens 2..n, exp of the mean NLL";

/// Sums over the tokens predicted so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Perplexity {
    /// Tokens predicted.
    pub tokens: usize,
    /// Windows done.
    pub windows: usize,
    /// Sum of negative log-likelihoods, natural log.
    pub sum: f64,
    /// Sum of their squares.
    pub sum_of_squares: f64,
    /// Spent in the model: layers, head and statistics of all rows.
    pub time: Duration,
}

impl Perplexity {
    pub(super) fn add(&mut self, nll: f64) {
        self.tokens += 1;
        self.sum += nll;
        self.sum_of_squares += nll * nll;
    }

    /// Mean negative log-likelihood.
    pub fn nll(&self) -> f64 {
        self.sum / self.tokens as f64
    }

    /// `exp` of the mean negative log-likelihood.
    pub fn perplexity(&self) -> f64 {
        self.nll().exp()
    }

    /// Standard error of the mean, tokens taken as independent; 0 for less than two. Times the perplexity it is the
    /// perplexity's, to first order.
    pub fn nll_stderr(&self) -> f64 {
        let n = self.tokens as f64;
        if self.tokens < 2 {
            return 0.0;
        }
        let variance = (self.sum_of_squares - self.sum * self.sum / n) / (n - 1.0);
        (variance.max(0.0) / n).sqrt()
    }

    /// Standard error of the perplexity, to first order.
    pub fn stderr(&self) -> f64 {
        self.perplexity() * self.nll_stderr()
    }

    pub(super) fn json(&self, context: usize) -> Value {
        json!({
            "perplexity": self.perplexity(),
            "perplexity_stderr": self.stderr(),
            "nll": self.nll(),
            "nll_stderr": self.nll_stderr(),
            "tokens": self.tokens,
            "windows": self.windows,
            "context": context,
            "prefill_tokens_per_s": output::rounded(output::per_second(self.windows * context, self.time)),
            "protocol": PROTOCOL,
        })
    }

    pub(super) fn text(&self, context: usize) -> String {
        format!(
            "perplexity {:.4} +- {:.4} over {} tokens in {} windows of {context}\n",
            self.perplexity(),
            self.stderr(),
            self.tokens,
            self.windows
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// NLLs 1, 2, 3: mean 2, variance 1, standard error 1 / sqrt(3).
    #[test]
    fn mean_and_error() {
        let mut score = Perplexity::default();
        assert_eq!(score.nll_stderr(), 0.0);
        [1.0, 2.0, 3.0].into_iter().for_each(|nll| score.add(nll));
        assert_eq!(score.perplexity(), 2.0f64.exp());
        assert!((score.nll_stderr() - 3f64.sqrt().recip()).abs() < 1e-12);
    }
}
