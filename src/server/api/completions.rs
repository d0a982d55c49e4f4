//! `POST /v1/completions`: texts or token ids continued.

use std::sync::Arc;
use std::time::Instant;

use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::engine::Request;
use crate::server::app::{App, unique_id, unix_time};
use crate::server::error::ApiError;
use crate::server::generation::{Piece, Step, TextOptions, Usage};

use super::fields::{refuse_unknown, take};
use super::logprobs::{CompletionLogprobs, Naming};
use super::respond::{Chunk, Outcome, Render, collect, stream, usage_json};
use super::sampling::SamplingFields;
use super::stream_options::StreamOptions;
use super::structured::StructuredFields;

/// Tokens to generate where nobody says, as OpenAI has it.
const DEFAULT_MAX_TOKENS: usize = 16;

/// A text, or the ids of one.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

/// One prompt or several. A list of numbers is one.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "expected a text, a list of texts, a list of token ids, or a list of such lists")]
pub(super) enum Prompts {
    One(Prompt),
    Many(Vec<Prompt>),
}

impl Prompts {
    /// All of them.
    pub(super) fn into_vec(self) -> Vec<Prompt> {
        match self {
            Prompts::One(one) => vec![one],
            Prompts::Many(many) => many,
        }
    }
}

#[derive(Debug, Deserialize)]
struct Fields {
    prompt: Prompts,
    #[serde(default)]
    model: Option<String>,
    #[serde(default)]
    max_tokens: Option<usize>,
    #[serde(default)]
    logprobs: Option<usize>,
    #[serde(default)]
    echo: bool,
    #[serde(default)]
    suffix: Option<String>,
    #[serde(default)]
    add_special_tokens: Option<bool>,
    #[serde(default)]
    truncate_prompt_tokens: Option<i64>,
    #[serde(default)]
    return_tokens_as_token_ids: bool,
    #[serde(default)]
    stream: bool,
    #[serde(default)]
    stream_options: Option<StreamOptions>,
}

/// A request, resolved against the model.
struct Prepared {
    prompts: Vec<Vec<u32>>,
    requests: Vec<Request>,
    text: TextOptions,
    shape: Shape,
    is_stream: bool,
    options: StreamOptions,
}

/// What a response is to hold.
#[derive(Clone)]
struct Shape {
    n: usize,
    echo: bool,
    logprobs: bool,
    prompt_logprobs: bool,
    as_ids: bool,
}

/// Answers a request that came at `arrived`.
///
/// # Errors
/// What is wrong with it, or that there is no place.
pub(in crate::server) async fn completions(
    app: Arc<App>,
    arrived: Instant,
    body: Map<String, Value>,
) -> Result<Response, ApiError> {
    let prepared = app.prepare(move |app| prepare(app, body)).await?;
    let mut generations = Vec::new();
    for request in prepared.requests {
        generations.push(app.generate(arrived, request, &prepared.text).await?);
    }
    let writer = Writer {
        app: Arc::clone(&app),
        id: unique_id("cmpl-"),
        created: unix_time(),
        logprobs: prepared
            .prompts
            .iter()
            .flat_map(|_| 0..prepared.shape.n)
            .map(|_| CompletionLogprobs::default())
            .collect(),
        prompts: prepared.prompts,
        shape: prepared.shape,
        options: prepared.options,
        usages: Vec::new(),
    };
    if prepared.is_stream {
        return Ok(stream(generations, writer));
    }
    let outcomes = collect(generations, writer.shape.n).await?;
    Ok(axum::Json(writer.whole(outcomes)).into_response())
}

fn prepare(app: &App, mut body: Map<String, Value>) -> Result<Prepared, ApiError> {
    let fields: Fields = take(&mut body)?;
    let sampling: SamplingFields = take(&mut body)?;
    let structured: StructuredFields = take(&mut body)?;
    refuse_unknown(&body)?;
    app.check_model(fields.model.as_deref())?;
    if fields.suffix.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::invalid("suffix", "is not supported"));
    }
    let options = StreamOptions::of(fields.stream, fields.stream_options)?;
    let prompts = fields.prompt.into_vec();
    let n = sampling.n.unwrap_or(1);
    app.check_choices(prompts.len(), n)?;
    let (mut params, mut text) = sampling.resolve(&app.model.sampling, &app.model.stop, &app.tokenizer)?;
    text.continuing = true;
    app.check_logprobs("logprobs", fields.logprobs)?;
    app.check_logprobs("prompt_logprobs", sampling.prompt_logprobs)?;
    params.logprobs = fields.logprobs;
    let of_prompt = match fields.echo {
        true => sampling.prompt_logprobs.max(fields.logprobs),
        false => sampling.prompt_logprobs,
    };
    if fields.stream && sampling.prompt_logprobs.is_some() {
        return Err(ApiError::invalid("prompt_logprobs", "is not supported with `stream`"));
    }
    let constraint = app.compile(structured.constraint()?)?;
    let mut requests = Vec::new();
    let mut all = Vec::new();
    for prompt in prompts {
        let ids = match prompt {
            Prompt::Ids(ids) => ids,
            Prompt::Text(text) => app.encode("prompt", &text, fields.add_special_tokens.unwrap_or(true))?,
        };
        let ids = app.truncated(ids, fields.truncate_prompt_tokens)?;
        let max_tokens = match fields.max_tokens {
            Some(0) if fields.echo => app.check_prompt("prompt", ids.len()).map(|()| 0)?,
            asked => app.room(ids.len(), asked, DEFAULT_MAX_TOKENS)?,
        };
        all.push(ids.clone());
        requests.push(Request {
            n,
            priority: sampling.priority,
            cache_salt: sampling.cache_salt.clone().unwrap_or_default(),
            // An echo alone computes the prompt too.
            prompt_logprobs: of_prompt.or((max_tokens == 0).then_some(0)),
            constraint: constraint.clone(),
            ..Request::new(ids, params.clone(), max_tokens)
        });
    }
    let shape = Shape {
        n,
        echo: fields.echo,
        logprobs: fields.logprobs.is_some(),
        prompt_logprobs: sampling.prompt_logprobs.is_some(),
        as_ids: fields.return_tokens_as_token_ids,
    };
    Ok(Prepared { prompts: all, requests, text, shape, is_stream: fields.stream, options })
}

struct Writer {
    app: Arc<App>,
    id: String,
    created: u64,
    prompts: Vec<Vec<u32>>,
    /// Of each choice.
    logprobs: Vec<CompletionLogprobs>,
    shape: Shape,
    options: StreamOptions,
    usages: Vec<Usage>,
}

impl Writer {
    fn object(&self, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.app.name(),
            "choices": choices,
        })
    }

    fn prompt_text(&self, index: usize) -> String {
        self.app.tokenizer.decode(&self.prompts[index], false)
    }

    /// Log-probabilities of a prompt that is echoed, before those of what follows it.
    fn echo_logprobs(&mut self, prompt: usize, choice: usize, told: Option<&crate::engine::PromptOutput>) {
        let naming = Naming { tokenizer: &self.app.tokenizer, as_ids: self.shape.as_ids };
        let logprobs = &mut self.logprobs[prompt * self.shape.n + choice];
        let known = told.map_or(&[][..], |output| &output.logprobs);
        for (position, &id) in self.prompts[prompt].iter().enumerate() {
            logprobs.push(&naming, id, position.checked_sub(1).and_then(|before| known.get(before)));
        }
    }

    fn whole(mut self, outcomes: Vec<Outcome>) -> Value {
        let n = self.shape.n;
        let mut choices = Vec::new();
        let usages: Vec<Usage> = outcomes.iter().map(|outcome| outcome.usage).collect();
        for (prompt, outcome) in outcomes.into_iter().enumerate() {
            for (index, choice) in outcome.choices.into_iter().enumerate() {
                let at = prompt * n + index;
                let mut text = choice.text;
                if self.shape.echo {
                    text.insert_str(0, &self.prompt_text(prompt));
                }
                let mut logprobs = Value::Null;
                if self.shape.logprobs {
                    if self.shape.echo {
                        self.echo_logprobs(prompt, index, outcome.prompt.as_ref());
                    }
                    let naming = Naming { tokenizer: &self.app.tokenizer, as_ids: self.shape.as_ids };
                    choice.tokens.iter().for_each(|token| self.logprobs[at].push(&naming, token.id, Some(token)));
                    logprobs = self.logprobs[at].take();
                }
                let finish = choice.finish;
                let mut object = json!({
                    "index": at,
                    "text": text,
                    "logprobs": logprobs,
                    "finish_reason": finish.as_ref().map(|finish| finish.reason),
                    "stop_reason": finish.map_or(Value::Null, |finish| finish.stop_reason),
                });
                if self.shape.prompt_logprobs {
                    let naming = Naming { tokenizer: &self.app.tokenizer, as_ids: self.shape.as_ids };
                    let told = outcome.prompt.as_ref().map_or(&[][..], |output| &output.logprobs);
                    object["prompt_logprobs"] = naming.prompt(told);
                }
                choices.push(object);
            }
        }
        let mut object = self.object(choices.into());
        object["usage"] = usage_json(usages);
        object
    }
}

impl Render for Writer {
    fn start(&mut self) -> Vec<Chunk> {
        Vec::new()
    }

    fn step(&mut self, prompt: usize, step: Step) -> Vec<Chunk> {
        let n = self.shape.n;
        match step {
            Step::Prompt(output) if self.shape.echo => {
                let text = self.prompt_text(prompt);
                (0..n)
                    .map(|choice| {
                        let at = prompt * n + choice;
                        let mut logprobs = Value::Null;
                        if self.shape.logprobs {
                            self.echo_logprobs(prompt, choice, Some(&output));
                            logprobs = self.logprobs[at].take();
                        }
                        let piece = json!([{
                            "index": at, "text": text, "logprobs": logprobs, "finish_reason": null, "stop_reason": null,
                        }]);
                        self.object(piece).into()
                    })
                    .collect()
            }
            Step::Prompt(_) => Vec::new(),
            Step::Piece(Piece { choice, text, token, finish }) => {
                let at = prompt * n + choice;
                if text.is_empty() && finish.is_none() && !self.shape.logprobs {
                    return Vec::new();
                }
                let mut logprobs = Value::Null;
                if let Some(token) = token.filter(|_| self.shape.logprobs) {
                    let naming = Naming { tokenizer: &self.app.tokenizer, as_ids: self.shape.as_ids };
                    self.logprobs[at].push(&naming, token.id, Some(&token));
                    logprobs = self.logprobs[at].take();
                }
                let piece = json!([{
                    "index": at,
                    "text": text,
                    "logprobs": logprobs,
                    "finish_reason": finish.as_ref().map(|finish| finish.reason),
                    "stop_reason": finish.map_or(Value::Null, |finish| finish.stop_reason),
                }]);
                vec![self.object(piece).into()]
            }
            Step::End(usage) => {
                self.usages.push(usage);
                Vec::new()
            }
        }
    }

    fn end(&mut self) -> Vec<Chunk> {
        if !self.options.include_usage {
            return Vec::new();
        }
        let mut object = self.object(json!([]));
        object["usage"] = usage_json(std::mem::take(&mut self.usages));
        vec![object.into()]
    }
}
