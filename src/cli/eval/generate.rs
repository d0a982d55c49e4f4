//! Greedy continuations of the same prompts by two models: how long they stay the same.

use std::path::Path;

use serde_json::{Value, json};

use crate::engine::sampling::SamplingParams;
use crate::engine::{Engine, Event, Request};
use crate::error::{Error, Result};
use crate::models::quantize::spread;
use crate::text::tokenizer::Tokenizer;

use super::super::output;

/// The protocol in words, for the JSON.
const PROTOCOL: &str = "greedy (argmax, lowest id on ties) continuations of the same prompts by both models, up to `max_tokens` tokens or an \
                        end-of-sequence id of the model, which counts; common_prefix: tokens before the first that differs, all of them \
                        where none does; exact_match: fraction of prompts where none does";

/// Prompts taken from a text, and their tokens.
const PROMPTS: usize = 16;
const PROMPT_TOKENS: usize = 64;
/// Pairs shown on a terminal, and letters of their lines.
const SHOWN: usize = 3;
const WIDTH: usize = 96;

/// `PROMPTS` pieces of a text, evenly spaced; fewer where it is short.
pub(super) fn prompts_of_text(ids: &[u32]) -> Vec<Vec<u32>> {
    let len = PROMPT_TOKENS.min(ids.len());
    if len == 0 {
        return Vec::new();
    }
    spread(ids, len, PROMPTS).map(<[u32]>::to_vec).collect()
}

/// Prompts of a file: one a line, blank lines passed over; in a file named `*.jsonl` each line is a JSON string or an object
/// with `prompt`.
pub(super) fn prompts_of_file(path: &Path, tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>> {
    let text = crate::cli::read_text(path)?;
    let is_json = path.extension().is_some_and(|e| e == "jsonl");
    let mut prompts = Vec::new();
    for (line, text) in (1..).zip(text.lines()).filter(|(_, text)| !text.trim().is_empty()) {
        let bad = |reason: String| Error::input(format!("--prompts: {} line {line}", path.display()), reason);
        let prompt = if is_json {
            let value: Value = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
            let prompt = value.as_str().or_else(|| value["prompt"].as_str()).map(str::to_owned);
            prompt.ok_or_else(|| bad("expected a JSON string, or an object with a text `prompt`".into()))?
        } else {
            text.to_owned()
        };
        let ids = tokenizer.encode(&prompt, true)?;
        if ids.is_empty() {
            return Err(bad("has no tokens".into()));
        }
        prompts.push(ids);
    }
    if prompts.is_empty() {
        return Err(Error::input("--prompts", format!("{} has no line with text", path.display())));
    }
    Ok(prompts)
}

/// What a model makes of each prompt: up to `max_tokens` ids. `stop` ends a sequence.
///
/// # Errors
/// `Input` when a prompt does not fit the model's limits; a failure of the device.
pub fn continuations(
    mut engine: Engine,
    prompts: &[Vec<u32>],
    max_tokens: usize,
    stop: &[u32],
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<u32>>> {
    let params = SamplingParams { stop_token_ids: stop.to_vec(), ..SamplingParams::greedy() };
    let mut ids = Vec::new();
    for prompt in prompts {
        ids.push(engine.submit(Request::new(prompt.clone(), params.clone(), max_tokens))?);
    }
    let mut made = vec![Vec::new(); prompts.len()];
    let mut done = 0;
    while !engine.is_idle() {
        for event in engine.step() {
            match event {
                Event::Token { id, token, .. } => {
                    if let Some(place) = ids.iter().position(|&known| known == id) {
                        made[place].push(token.id);
                    }
                }
                Event::Finished { .. } => {
                    done += 1;
                    progress(done);
                }
                Event::Prompt { .. } => {}
                Event::Failed { error, .. } => return Err(error),
            }
        }
    }
    Ok(made)
}

/// Continuations of both models.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    max_tokens: usize,
    pairs: Vec<Pair>,
}

#[derive(Debug, Clone, PartialEq)]
struct Pair {
    prompt: Vec<u32>,
    model: Vec<u32>,
    reference: Vec<u32>,
    /// Tokens before the first that differs.
    common: usize,
}

impl Comparison {
    /// Of lists in the same order.
    pub fn new(
        max_tokens: usize,
        prompts: Vec<Vec<u32>>,
        model: Vec<Vec<u32>>,
        reference: Vec<Vec<u32>>,
    ) -> Comparison {
        let pair = |((prompt, model), reference): ((Vec<u32>, Vec<u32>), Vec<u32>)| {
            let common = model.iter().zip(&reference).take_while(|(a, b)| a == b).count();
            Pair { prompt, model, reference, common }
        };
        Comparison { max_tokens, pairs: prompts.into_iter().zip(model).zip(reference).map(pair).collect() }
    }

    /// Mean of the tokens before the first that differs.
    pub fn mean_common(&self) -> f64 {
        self.pairs.iter().map(|p| p.common as f64).sum::<f64>() / self.pairs.len().max(1) as f64
    }

    /// Median of the same; the mean of the two in the middle of an even number.
    pub fn median_common(&self) -> f64 {
        let mut sorted: Vec<usize> = self.pairs.iter().map(|p| p.common).collect();
        sorted.sort_unstable();
        let n = sorted.len();
        if n == 0 { 0.0 } else { (sorted[(n - 1) / 2] + sorted[n / 2]) as f64 / 2.0 }
    }

    /// Fraction of prompts where both say the same.
    pub fn exact_match(&self) -> f64 {
        let same = self.pairs.iter().filter(|p| p.model == p.reference).count();
        same as f64 / self.pairs.len().max(1) as f64
    }

    pub(super) fn json(&self, tokenizer: &Tokenizer) -> Value {
        let sample = |p: &Pair| {
            json!({
                "prompt": tokenizer.decode(&p.prompt, false),
                "model": tokenizer.decode(&p.model, false),
                "reference": tokenizer.decode(&p.reference, false),
                "common_prefix": p.common,
            })
        };
        json!({
            "protocol": PROTOCOL,
            "prompts": self.pairs.len(),
            "max_tokens": self.max_tokens,
            "common_prefix_mean": self.mean_common(),
            "common_prefix_median": self.median_common(),
            "exact_match": self.exact_match(),
            "samples": self.pairs.iter().map(sample).collect::<Vec<_>>(),
        })
    }

    /// The figures, and some pairs side by side: what both say, then how each goes on.
    pub(super) fn text(&self, tokenizer: &Tokenizer) -> String {
        let mut text = format!(
            "\ngreedy continuations of {} prompts, up to {} tokens: the same for {:.1} tokens (median {:.1}), to the end in {:.1} %\n",
            self.pairs.len(),
            self.max_tokens,
            self.mean_common(),
            self.median_common(),
            100.0 * self.exact_match()
        );
        for pair in self.pairs.iter().filter(|p| p.model != p.reference).take(SHOWN) {
            let both = tokenizer.decode(&pair.model[..pair.common], false);
            let rest = |ids: &[u32]| {
                let all = tokenizer.decode(ids, false);
                let rest = all.strip_prefix(both.as_str()).map(str::to_owned);
                rest.unwrap_or_else(|| tokenizer.decode(&ids[pair.common..], false))
            };
            let lines = [
                ("prompt", tail(&one_line(&tokenizer.decode(&pair.prompt, false)))),
                ("both", tail(&one_line(&both))),
                ("model", head(&one_line(&rest(&pair.model)))),
                ("reference", head(&one_line(&rest(&pair.reference)))),
            ];
            text.push('\n');
            for (name, line) in lines {
                text.push_str(&format!("  {name:<10} {line}\n"));
            }
        }
        text
    }
}

/// Without line breaks, which would break the layout, and other control characters, which could drive the terminal.
fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c == '\n' {
                '⏎'
            } else if c.is_control() {
                ' '
            } else {
                c
            }
        })
        .collect()
}

fn head(text: &str) -> String {
    let mut out: String = text.chars().take(WIDTH).collect();
    if text.chars().count() > WIDTH {
        out.push('…');
    }
    out
}

fn tail(text: &str) -> String {
    let cut = text.chars().count().saturating_sub(WIDTH);
    let rest: String = text.chars().skip(cut).collect();
    if cut > 0 { format!("…{rest}") } else { rest }
}

/// A bar, and what moves it.
pub(super) fn run(
    engine: Engine,
    name: &'static str,
    prompts: &[Vec<u32>],
    max_tokens: usize,
    stop: &[u32],
) -> Result<Vec<Vec<u32>>> {
    let bar = output::progress(name);
    bar.set_length(prompts.len() as u64);
    let made = continuations(engine, prompts, max_tokens, stop, &mut |done| bar.set_position(done as u64));
    bar.finish_and_clear();
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Common prefixes 2, 0 and 3 (an exact match): mean 5/3, median 2.
    #[test]
    fn prefixes() {
        let c = Comparison::new(
            3,
            vec![vec![1]; 3],
            vec![vec![5, 6, 7], vec![1], vec![1, 2, 3]],
            vec![vec![5, 6, 8], vec![2], vec![1, 2, 3]],
        );
        assert_eq!((c.mean_common(), c.median_common(), c.exact_match()), (5.0 / 3.0, 2.0, 1.0 / 3.0));
        let one_longer = Comparison::new(3, vec![vec![1]], vec![vec![5, 6]], vec![vec![5, 6, 7]]);
        assert_eq!((one_longer.median_common(), one_longer.exact_match()), (2.0, 0.0));
        assert_eq!(Comparison::new(3, vec![], vec![], vec![]).median_common(), 0.0);
    }

    #[test]
    fn prompts_are_spread_over_the_text() {
        let ids: Vec<u32> = (0..64 * 40 + 5).collect();
        let prompts = prompts_of_text(&ids);
        assert_eq!((prompts.len(), prompts[0][0], prompts[15].len()), (16, 0, 64));
        assert_eq!(prompts[15][0], 15 * 40 / 16 * 64);
        assert_eq!(prompts_of_text(&ids[..10]), [ids[..10].to_vec()]);
        assert_eq!(prompts_of_text(&[]), Vec::<Vec<u32>>::new());
    }

    #[test]
    fn lines_are_cut() {
        let long = "x".repeat(WIDTH + 1);
        assert!(head(&long).ends_with('…') && tail(&long).starts_with('…') && head("a") == "a" && tail("a") == "a");
        assert_eq!(one_line("a\n\u{1b}[1m"), "a⏎ [1m");
    }
}
