//! `POST /v1/embeddings`: the last hidden state of each text, pooled and of length one.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::engine::sampling::SamplingParams;
use crate::engine::{Pooling, Request};
use crate::server::app::{App, unique_id, unix_time};
use crate::server::error::ApiError;
use crate::server::generation::TextOptions;

use super::completions::{Prompt, Prompts};
use super::fields::{refuse_unknown, take};
use super::respond::collect;

#[derive(Debug, Deserialize)]
struct Fields {
    input: Prompts,
    #[serde(default)]
    model: Option<String>,
    #[serde(default)]
    encoding_format: Encoding,
    #[serde(default)]
    dimensions: Option<usize>,
    #[serde(default)]
    pooling: Pool,
    #[serde(default)]
    truncate_prompt_tokens: Option<i64>,
    #[serde(default)]
    add_special_tokens: Option<bool>,
    #[serde(default)]
    priority: i32,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    #[default]
    Float,
    Base64,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Pool {
    #[default]
    Last,
    Mean,
}

/// Answers a request that came at `arrived`.
///
/// # Errors
/// What is wrong with it, or that there is no place.
pub(in crate::server) async fn embeddings(
    app: Arc<App>,
    arrived: Instant,
    body: Map<String, Value>,
) -> Result<Response, ApiError> {
    let (requests, encoding) = app.prepare(move |app| prepare(app, body)).await?;
    let text = TextOptions {
        stop: Vec::new(),
        include_stop_str_in_output: false,
        skip_special_tokens: true,
        keep: Vec::new(),
        continuing: false,
    };
    let mut generations = Vec::new();
    for request in requests {
        generations.push(app.generate(arrived, request, &text).await?);
    }
    let outcomes = collect(generations, 1).await?;
    let tokens: usize = outcomes.iter().map(|outcome| outcome.usage.prompt).sum();
    let entry = |(index, state): (usize, Vec<f32>)| {
        let embedding = encoded(normalized(state), encoding);
        json!({ "object": "embedding", "index": index, "embedding": embedding })
    };
    let states =
        outcomes.into_iter().map(|outcome| outcome.prompt.map(|prompt| prompt.hidden_state).unwrap_or_default());
    Ok(Json(json!({
        "id": unique_id("embd-"),
        "object": "list",
        "created": unix_time(),
        "model": app.name(),
        "data": states.enumerate().map(entry).collect::<Value>(),
        "usage": { "prompt_tokens": tokens, "total_tokens": tokens },
    }))
    .into_response())
}

fn prepare(app: &App, mut body: Map<String, Value>) -> Result<(Vec<Request>, Encoding), ApiError> {
    let fields: Fields = take(&mut body)?;
    refuse_unknown(&body)?;
    app.check_model(fields.model.as_deref())?;
    if fields.dimensions.is_some_and(|n| n != app.hidden_size) {
        return Err(ApiError::invalid("dimensions", format!("the model's embeddings have {}", app.hidden_size)));
    }
    let inputs = fields.input.into_vec();
    app.check_choices(inputs.len(), 1)?;
    let pooling = match fields.pooling {
        Pool::Last => Pooling::Last,
        Pool::Mean => Pooling::Mean,
    };
    let request = |input: Prompt| {
        let ids = match input {
            Prompt::Ids(ids) => ids,
            Prompt::Text(text) => app.encode("input", &text, fields.add_special_tokens.unwrap_or(true))?,
        };
        let ids = app.truncated(ids, fields.truncate_prompt_tokens)?;
        app.check_prompt("input", ids.len())?;
        let request = Request::new(ids, SamplingParams::greedy(), 0);
        Ok(Request { hidden_state: Some(pooling), priority: fields.priority, ..request })
    };
    let requests: Result<Vec<Request>, ApiError> = inputs.into_iter().map(request).collect();
    Ok((requests?, fields.encoding_format))
}

/// Of length one, as OpenAI's are; a vector of zeros stays.
fn normalized(mut state: Vec<f32>) -> Vec<f32> {
    let length = state.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        state.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
    state
}

/// A list of numbers, or base64 of them as little-endian f32.
fn encoded(state: Vec<f32>, encoding: Encoding) -> Value {
    match encoding {
        Encoding::Float => json!(state),
        Encoding::Base64 => STANDARD.encode(state.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()).into(),
    }
}
