//! Multiple choice: which of several continuations of a context a model finds most likely.
//!
//! Scoring follows EleutherAI's lm-evaluation-harness (`multiple_choice`): the log-likelihood of each choice given the
//! context, plain for `acc`, divided by the choice's length in bytes for `acc_norm`.

use std::path::Path;

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::models::ModelRunner;
use crate::text::tokenizer::Tokenizer;

use super::score::Pass;

/// The protocol in words, for the JSON.
const PROTOCOL: &str = "zero-shot as the file has it, no BOS (an empty context is the BOS, or else the EOS, alone); context and choice are \
                        joined by `delimiter` (one space) and encoded together, spaces at the context's end going to the choice; the \
                        tokens after the first len(encode(context)) are the choice's. acc: most likely choice by the sum of natural \
                        log-probabilities; acc_norm: by that sum over the UTF-8 bytes of the choice without delimiter; the first on ties; \
                        standard errors of the mean, items taken as independent";

/// One question.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Line of the file, from 1.
    line: usize,
    choices: Vec<Choice>,
    answer: usize,
}

/// One possible continuation.
#[derive(Debug, Clone, PartialEq)]
struct Choice {
    /// Context and choice.
    ids: Vec<u32>,
    /// Place of the choice's first token.
    start: usize,
    bytes: usize,
}

/// Reads a JSONL file of questions. Lines without anything but spaces are passed over.
///
/// # Errors
/// [`Error::Io`]; [`Error::Input`] naming file and line for what is not a question, or longer than `positions` tokens.
pub fn read(path: &Path, tokenizer: &Tokenizer, positions: usize) -> Result<Vec<Item>> {
    let text = crate::cli::read_text(path)?;
    let mut items = Vec::new();
    for (line, text) in (1..).zip(text.lines()).filter(|(_, text)| !text.trim().is_empty()) {
        let bad = |reason: String| Error::input(format!("--tasks: {} line {line}", path.display()), reason);
        let question = Question::parse(text).map_err(bad)?;
        let mut choices = Vec::new();
        for choice in &question.choices {
            let (ids, start) = encode(tokenizer, &question.context, &question.delimiter, choice)?;
            if start == 0 || start >= ids.len() {
                return Err(bad(format!("the choice {choice:?} has no tokens of its own after the context")));
            }
            if ids.len() > positions {
                let reason = format!(
                    "context and choice have {} tokens; the model has {positions} positions: shorten the context",
                    ids.len()
                );
                return Err(bad(reason));
            }
            choices.push(Choice { ids, start, bytes: choice.len() });
        }
        items.push(Item { line, choices, answer: question.answer });
    }
    if items.is_empty() {
        return Err(Error::input("--tasks", format!("{} has no line with a question: {EXAMPLE}", path.display())));
    }
    Ok(items)
}

const EXAMPLE: &str =
    r#"expected lines such as {"question": "Two and two?", "choices": ["four", "five"], "answer": 0}"#;

/// A line of the file.
#[derive(Debug, PartialEq)]
struct Question {
    context: String,
    delimiter: String,
    choices: Vec<String>,
    answer: usize,
}

impl Question {
    fn parse(line: &str) -> Result<Question, String> {
        let value: Value = serde_json::from_str(line).map_err(|e| format!("{e}; {EXAMPLE}"))?;
        if !value.is_object() {
            return Err(format!("not a JSON object; {EXAMPLE}"));
        }
        let text = |field: &str| match &value[field] {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text.clone())),
            other => Err(format!("`{field}` is {other}; expected a text")),
        };
        let context = match (text("context")?, text("question")?) {
            (Some(context), None) => context,
            (None, Some(question)) => format!("Question: {question}\nAnswer:"),
            _ => return Err(format!("expected one of `context` and `question`; {EXAMPLE}")),
        };
        let choices: Option<Vec<String>> = value["choices"]
            .as_array()
            .and_then(|all| all.iter().map(|choice| choice.as_str().map(str::to_owned)).collect());
        let Some(choices) = choices.filter(|all| all.len() > 1 && all.iter().all(|choice| !choice.is_empty())) else {
            return Err(format!("`choices` must be two or more texts that are not empty; {EXAMPLE}"));
        };
        let answer = match &value["answer"] {
            Value::Number(n) => n.as_u64().and_then(|n| usize::try_from(n).ok()),
            Value::String(text) => match text.trim().as_bytes() {
                [letter] if letter.is_ascii_alphabetic() => Some(usize::from(letter.to_ascii_uppercase() - b'A')),
                _ => text.trim().parse().ok(),
            },
            _ => None,
        };
        let Some(answer) = answer.filter(|&answer| answer < choices.len()) else {
            let (got, count) = (&value["answer"], choices.len());
            return Err(format!(
                "`answer` is {got}; expected the number of a choice, from 0 to {}, or its letter",
                count - 1
            ));
        };
        let delimiter = text("delimiter")?.unwrap_or_else(|| " ".to_owned());
        Ok(Question { context, delimiter, choices, answer })
    }
}

/// Ids of both together, and where those of the choice begin: at the number of tokens that the context alone has.
fn encode(tokenizer: &Tokenizer, context: &str, delimiter: &str, choice: &str) -> Result<(Vec<u32>, usize)> {
    let whole = tokenizer.encode(&[context, delimiter, choice].concat(), false)?;
    let context = tokenizer.encode(context.trim_end(), false)?;
    if !context.is_empty() {
        return Ok((whole, context.len()));
    }
    let first = tokenizer.bos_id().or(tokenizer.eos_id());
    let first =
        first.ok_or_else(|| Error::input("--tasks", "an empty context, and the tokenizer has no BOS or EOS"))?;
    Ok(([&[first], &whole[..]].concat(), 1))
}

/// Tokens of the longest choice with its context.
pub(super) fn longest(items: &[Item]) -> usize {
    items.iter().flat_map(|item| &item.choices).map(|choice| choice.ids.len()).max().unwrap_or(0)
}

/// Log-likelihoods of the choices of every item. As many choices at a time as the model's limits hold; `progress` gets
/// the choices done and their number.
pub fn loglikelihoods(
    runner: &mut ModelRunner,
    items: &[Item],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Vec<f64>>> {
    let choices: Vec<&Choice> = items.iter().flat_map(|item| &item.choices).collect();
    let mut sums = Vec::with_capacity(choices.len());
    for together in choices.chunks(runner.limits().max_seqs) {
        let mut pass = Pass::default();
        together.iter().for_each(|choice| pass.push(&choice.ids, choice.start));
        let mut logprobs = pass.logprobs(runner)?.into_iter();
        for choice in together {
            sums.push(logprobs.by_ref().take(choice.ids.len() - choice.start).sum());
        }
        progress(sums.len(), choices.len());
    }
    let mut sums = sums.into_iter();
    Ok(items.iter().map(|item| sums.by_ref().take(item.choices.len()).collect()).collect())
}

/// The choices that a model takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Answers {
    loglikelihoods: Vec<Vec<f64>>,
    /// By the sum of log-probabilities.
    chosen: Vec<usize>,
    /// By the sum over the bytes of the choice.
    chosen_norm: Vec<usize>,
}

impl Answers {
    /// Of log-likelihoods for all choices of `items`.
    pub fn new(items: &[Item], loglikelihoods: Vec<Vec<f64>>) -> Answers {
        let chosen = loglikelihoods.iter().map(|sums| best(sums)).collect();
        let per_byte = |(item, sums): (&Item, &Vec<f64>)| {
            let sums: Vec<f64> = sums.iter().zip(&item.choices).map(|(sum, c)| sum / c.bytes as f64).collect();
            best(&sums)
        };
        let chosen_norm = items.iter().zip(&loglikelihoods).map(per_byte).collect();
        Answers { loglikelihoods, chosen, chosen_norm }
    }

    fn json(&self, items: &[Item]) -> Value {
        let (acc, acc_norm) = (Fraction::right(items, &self.chosen), Fraction::right(items, &self.chosen_norm));
        let sample = |(i, item): (usize, &Item)| {
            json!({
                "line": item.line,
                "answer": item.answer,
                "chosen": self.chosen[i],
                "chosen_norm": self.chosen_norm[i],
                "loglikelihoods": self.loglikelihoods[i],
            })
        };
        json!({
            "items": items.len(),
            "acc": acc.mean(),
            "acc_stderr": acc.stderr(),
            "acc_norm": acc_norm.mean(),
            "acc_norm_stderr": acc_norm.stderr(),
            "samples": items.iter().enumerate().map(sample).collect::<Vec<_>>(),
        })
    }

    fn text(&self, items: &[Item]) -> String {
        let words = |chosen: &[usize]| {
            let right = Fraction::right(items, chosen);
            format!("{:.2} % +- {:.2}", 100.0 * right.mean(), 100.0 * right.stderr())
        };
        format!("acc {}, acc_norm {}", words(&self.chosen), words(&self.chosen_norm))
    }
}

/// The JSON of a model's answers, and of a reference's with how often they agree.
pub(super) fn json(items: &[Item], answers: &Answers, reference: Option<&Answers>) -> Value {
    let mut all = answers.json(items);
    all["protocol"] = PROTOCOL.into();
    if let Some(reference) = reference {
        all["reference"] = reference.json(items);
        all["agreement"] = Fraction::equal(&answers.chosen, &reference.chosen).mean().into();
        all["agreement_norm"] = Fraction::equal(&answers.chosen_norm, &reference.chosen_norm).mean().into();
    }
    all
}

/// The same in words.
pub(super) fn text(items: &[Item], answers: &Answers, reference: Option<&Answers>) -> String {
    let mut text = format!("multiple choice, {} items: {}\n", items.len(), answers.text(items));
    if let Some(reference) = reference {
        let agree = |a: &[usize], b: &[usize]| 100.0 * Fraction::equal(a, b).mean();
        text.push_str(&format!(
            "  the reference: {}; same choice {:.2} %, length-normalised {:.2} %\n",
            reference.text(items),
            agree(&answers.chosen, &reference.chosen),
            agree(&answers.chosen_norm, &reference.chosen_norm)
        ));
    }
    text
}

/// The first of the largest.
fn best(scores: &[f64]) -> usize {
    (1..scores.len()).fold(0, |best, i| if scores[i] > scores[best] { i } else { best })
}

/// `hits` of `all`.
#[derive(Debug, Clone, Copy)]
struct Fraction {
    hits: usize,
    all: usize,
}

impl Fraction {
    fn right(items: &[Item], chosen: &[usize]) -> Fraction {
        let hits = items.iter().zip(chosen).filter(|(item, chosen)| item.answer == **chosen).count();
        Fraction { hits, all: items.len() }
    }

    fn equal(a: &[usize], b: &[usize]) -> Fraction {
        Fraction { hits: a.iter().zip(b).filter(|(a, b)| a == b).count(), all: a.len() }
    }

    fn mean(self) -> f64 {
        self.hits as f64 / self.all.max(1) as f64
    }

    /// Sample standard deviation over the square root of the number; 0 for less than two.
    fn stderr(self) -> f64 {
        let p = self.mean();
        if self.all < 2 { 0.0 } else { (p * (1.0 - p) / (self.all - 1) as f64).sqrt() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let answer = |line: &str| Question::parse(line).map(|q| q.answer);
        assert_eq!(answer(r#"{"context": "a", "choices": ["b", "c"], "answer": 1, "id": "more"}"#), Ok(1));
        assert_eq!(answer(r#"{"context": "", "choices": ["b", "c"], "answer": "B"}"#), Ok(1));
        assert_eq!(answer(r#"{"question": "a", "choices": ["b", "c", "d"], "answer": "2"}"#), Ok(2));
        let parsed = Question::parse(r#"{"question": "Who?", "choices": ["I", "you"], "answer": "a"}"#);
        assert_eq!(parsed.map(|q| (q.context, q.delimiter)), Ok(("Question: Who?\nAnswer:".into(), " ".into())));
        for (line, word) in [
            ("{", "EOF"),
            ("[]", "object"),
            (r#"{"choices": ["b", "c"], "answer": 0}"#, "context"),
            (r#"{"context": "a", "question": "a", "choices": ["b", "c"], "answer": 0}"#, "one of"),
            (r#"{"context": 3, "choices": ["b", "c"], "answer": 0}"#, "`context` is 3"),
            (r#"{"context": "a", "choices": ["b"], "answer": 0}"#, "two or more"),
            (r#"{"context": "a", "choices": ["b", ""], "answer": 0}"#, "not empty"),
            (r#"{"context": "a", "choices": ["b", 4], "answer": 0}"#, "texts"),
            (r#"{"context": "a", "choices": ["b", "c"]}"#, "`answer` is null"),
            (r#"{"context": "a", "choices": ["b", "c"], "answer": 2}"#, "0 to 1"),
            (r#"{"context": "a", "choices": ["b", "c"], "answer": -1}"#, "-1"),
            (r#"{"context": "a", "choices": ["b", "c"], "answer": "C"}"#, "\"C\""),
        ] {
            let error = Question::parse(line).expect_err(line);
            assert!(error.contains(word), "{line}: {error}");
        }
    }

    /// Three of four right: p = 0.75, sqrt(0.75 * 0.25 / 3) = 0.25.
    #[test]
    fn standard_error() {
        assert_eq!(Fraction { hits: 3, all: 4 }.stderr(), 0.25);
        assert_eq!((Fraction { hits: 1, all: 1 }.stderr(), Fraction { hits: 0, all: 0 }.mean()), (0.0, 0.0));
        assert_eq!(best(&[-2.0, -1.0, -1.0]), 1);
    }
}
