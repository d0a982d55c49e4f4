//! `POST /v1/chat/completions`: the request, and how it becomes one of the engine's.

use std::sync::Arc;
use std::time::Instant;

use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::server::app::App;
use crate::server::error::ApiError;

use super::chat_response::{ChatWriter, Shape};
use super::conversation::{Conversation, Prepared, TemplateFields};
use super::fields::{refuse_unknown, take};
use super::respond::{collect, stream};
use super::sampling::SamplingFields;
use super::stream_options::StreamOptions;
use super::structured::StructuredFields;
use super::tools::ToolFields;

#[derive(Debug, Deserialize)]
struct Fields {
    messages: Vec<Value>,
    #[serde(default)]
    model: Option<String>,
    #[serde(default)]
    max_tokens: Option<usize>,
    #[serde(default)]
    max_completion_tokens: Option<usize>,
    #[serde(default)]
    logprobs: bool,
    #[serde(default)]
    top_logprobs: Option<usize>,
    #[serde(default)]
    stream: bool,
    #[serde(default)]
    stream_options: Option<StreamOptions>,
    #[serde(default)]
    return_tokens_as_token_ids: bool,
    #[serde(default)]
    modalities: Option<Vec<String>>,
    #[serde(default)]
    truncate_prompt_tokens: Option<i64>,
    #[serde(default)]
    include_reasoning: Option<bool>,
}

struct Asked {
    prepared: Prepared,
    shape: Shape,
    is_stream: bool,
    options: StreamOptions,
}

/// Answers a request that came at `arrived`.
///
/// # Errors
/// What is wrong with it, or that there is no place.
pub(in crate::server) async fn chat(
    app: Arc<App>,
    arrived: Instant,
    body: Map<String, Value>,
) -> Result<Response, ApiError> {
    let Asked { prepared, shape, is_stream, options } = app.prepare(move |app| prepare(app, body)).await?;
    let n = prepared.request.n;
    let generation = app.generate(arrived, prepared.request, &prepared.text).await?;
    let writer = ChatWriter::new(Arc::clone(&app), shape, prepared.reply, options);
    if is_stream {
        return Ok(stream(vec![generation], writer));
    }
    let outcomes = collect(vec![generation], n).await?;
    Ok(axum::Json(writer.whole(outcomes)).into_response())
}

fn prepare(app: &App, mut body: Map<String, Value>) -> Result<Asked, ApiError> {
    let fields: Fields = take(&mut body)?;
    let template: TemplateFields = take(&mut body)?;
    let sampling: SamplingFields = take(&mut body)?;
    let tools: ToolFields = take(&mut body)?;
    let structured: StructuredFields = take(&mut body)?;
    refuse_unknown(&body)?;
    app.check_model(fields.model.as_deref())?;
    if fields.modalities.is_some_and(|kinds| kinds.iter().any(|kind| kind != "text")) {
        return Err(ApiError::invalid("modalities", "only `text` is supported"));
    }
    if fields.top_logprobs.is_some_and(|n| n > 0) && !fields.logprobs {
        return Err(ApiError::invalid("top_logprobs", "needs `logprobs` to be true"));
    }
    if fields.stream && sampling.prompt_logprobs.is_some() {
        return Err(ApiError::invalid("prompt_logprobs", "is not supported with `stream`"));
    }
    let options = StreamOptions::of(fields.stream, fields.stream_options)?;
    let shape = Shape {
        n: sampling.n.unwrap_or(1),
        logprobs: fields.logprobs,
        prompt_logprobs: sampling.prompt_logprobs.is_some(),
        as_ids: fields.return_tokens_as_token_ids,
        reasoning: fields.include_reasoning.unwrap_or(true),
    };
    let conversation = Conversation {
        messages: fields.messages,
        tools: tools.resolve()?,
        template,
        sampling,
        constraint: structured.constraint()?,
        max_tokens: fields.max_completion_tokens.or(fields.max_tokens),
        logprobs: fields.logprobs.then(|| fields.top_logprobs.unwrap_or(0)),
        truncate_prompt_tokens: fields.truncate_prompt_tokens,
    };
    Ok(Asked { prepared: conversation.prepare(app)?, shape, is_stream: fields.stream, options })
}
