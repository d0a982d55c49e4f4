//! From generations to a response: as one JSON object when all have ended, or as server-sent events while they run.

use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt, stream};
use serde_json::{Value, json};

use crate::engine::PromptOutput;
use crate::engine::sampling::Sampled;
use crate::server::error::ApiError;
use crate::server::generation::{Finish, Generation, Piece, Step, Usage};

/// How often a comment is sent while nothing else is, so that proxies keep the connection open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// One server-sent event.
#[derive(Debug, PartialEq)]
pub(super) struct Chunk {
    /// Its name, where the API names events.
    pub(super) event: Option<&'static str>,
    pub(super) data: Value,
}

impl From<Value> for Chunk {
    fn from(data: Value) -> Chunk {
        Chunk { event: None, data }
    }
}

/// How an API writes a stream.
pub(super) trait Render: Send + 'static {
    /// Before anything has happened.
    fn start(&mut self) -> Vec<Chunk>;
    /// What happened to generation number `index`.
    fn step(&mut self, index: usize, step: Step) -> Vec<Chunk>;
    /// After the last.
    fn end(&mut self) -> Vec<Chunk>;
    /// Instead of the rest.
    fn failed(&mut self, error: &ApiError) -> Vec<Chunk> {
        vec![error.body().into()]
    }
    /// Whether the stream ends with `data: [DONE]`.
    const DONE: bool = true;
}

/// All that happens to some generations, with their numbers, as it happens.
fn merged(generations: Vec<Generation>) -> impl Stream<Item = (usize, Result<Step, ApiError>)> + Send {
    let numbered =
        |(index, generation): (usize, Generation)| generation.into_stream().map(move |step| (index, step)).boxed();
    stream::select_all(generations.into_iter().enumerate().map(numbered).collect::<Vec<_>>())
}

/// A response that streams. Where the client goes away it is dropped, and with it the generations.
pub(super) fn stream<R: Render>(generations: Vec<Generation>, mut render: R) -> Response {
    let chunks = async_stream::stream! {
        for chunk in render.start() {
            yield chunk;
        }
        let mut steps = std::pin::pin!(merged(generations));
        while let Some((index, step)) = steps.next().await {
            match step {
                Ok(step) => for chunk in render.step(index, step) {
                    yield chunk;
                },
                Err(error) => {
                    for chunk in render.failed(&error) {
                        yield chunk;
                    }
                    return;
                }
            }
        }
        for chunk in render.end() {
            yield chunk;
        }
    };
    let event = |Chunk { event, data }: Chunk| {
        let sse = Event::default().data(data.to_string());
        Ok::<_, Infallible>(match event {
            Some(name) => sse.event(name),
            None => sse,
        })
    };
    let done = stream::iter(R::DONE.then(|| Ok(Event::default().data("[DONE]"))));
    let mut response =
        Sse::new(chunks.map(event).chain(done)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
    // Proxies that buffer would hold tokens back.
    response.headers_mut().insert("x-accel-buffering", axum::http::HeaderValue::from_static("no"));
    response
}

/// One choice that has ended.
#[derive(Debug, Default)]
pub(super) struct Choice {
    pub(super) text: String,
    pub(super) tokens: Vec<Sampled>,
    pub(super) finish: Option<Finish>,
}

/// A generation that has ended.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) choices: Vec<Choice>,
    pub(super) prompt: Option<PromptOutput>,
    pub(super) usage: Usage,
}

/// Waits for all generations, which have `n` choices each.
///
/// # Errors
/// That of the first that fails; the others are aborted.
pub(super) async fn collect(generations: Vec<Generation>, n: usize) -> Result<Vec<Outcome>, ApiError> {
    let mut outcomes: Vec<Outcome> = Vec::new();
    for _ in &generations {
        outcomes.push(Outcome { choices: (0..n).map(|_| Choice::default()).collect(), ..Outcome::default() });
    }
    let mut steps = std::pin::pin!(merged(generations));
    while let Some((index, step)) = steps.next().await {
        let outcome = &mut outcomes[index];
        match step? {
            Step::Prompt(output) => outcome.prompt = Some(output),
            Step::End(usage) => outcome.usage = usage,
            Step::Piece(Piece { choice, text, token, finish }) => {
                let choice = &mut outcome.choices[choice];
                choice.text.push_str(&text);
                choice.tokens.extend(token);
                choice.finish = finish.or(choice.finish.take());
            }
        }
    }
    Ok(outcomes)
}

/// `usage` of a response, summed over its generations.
pub(super) fn usage_json(usages: impl IntoIterator<Item = Usage>) -> Value {
    let sum = usages.into_iter().fold(Usage::default(), |a, b| Usage {
        prompt: a.prompt + b.prompt,
        cached: a.cached + b.cached,
        completion: a.completion + b.completion,
    });
    json!({
        "prompt_tokens": sum.prompt,
        "completion_tokens": sum.completion,
        "total_tokens": sum.prompt + sum.completion,
        "prompt_tokens_details": { "cached_tokens": sum.cached },
    })
}
