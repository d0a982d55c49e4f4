//! `POST /v1/responses`: OpenAI's Responses API, text and functions. It is stateless: a client sends the whole conversation each time.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::server::app::{App, clipped};
use crate::server::error::ApiError;

use super::conversation::{Conversation, Prepared, TemplateFields};
use super::fields::{refuse_unknown, take, take_field, take_named};
use super::respond::{collect, stream};
use super::responses_writer::{Echo, ResponseWriter};
use super::sampling::SamplingFields;
use super::stream_options::StreamOptions;
use super::structured::StructuredFields;
use super::tools::ToolFields;

#[derive(Debug, Deserialize)]
struct Fields {
    input: Value,
    #[serde(default)]
    model: Option<String>,
    #[serde(default)]
    instructions: Option<String>,
    #[serde(default)]
    max_output_tokens: Option<usize>,
    #[serde(default)]
    stream: bool,
    #[serde(default)]
    tools: Option<Vec<Value>>,
    #[serde(default)]
    tool_choice: Option<Value>,
    #[serde(default)]
    parallel_tool_calls: Option<bool>,
    #[serde(default)]
    text: Option<Map<String, Value>>,
    #[serde(default)]
    reasoning: Option<Map<String, Value>>,
    #[serde(default)]
    top_logprobs: Option<usize>,
    #[serde(default)]
    include: Option<Vec<String>>,
    #[serde(default)]
    truncation: Option<String>,
    #[serde(default)]
    background: bool,
    #[serde(default)]
    previous_response_id: Option<String>,
    #[serde(default)]
    conversation: Option<Value>,
    #[serde(default)]
    prompt: Option<Value>,
    #[serde(default)]
    max_tool_calls: Option<u64>,
    #[serde(default)]
    stream_options: Option<StreamOptions>,
}

/// Answers a request that came at `arrived`.
///
/// # Errors
/// What is wrong with it, or that there is no place.
pub(in crate::server) async fn responses(
    app: Arc<App>,
    arrived: Instant,
    body: Map<String, Value>,
) -> Result<Response, ApiError> {
    let (prepared, echo, is_stream) = app.prepare(move |app| prepare(app, body)).await?;
    let Prepared { request, text, reply } = prepared;
    let generation = app.generate(arrived, request, &text).await?;
    let writer = ResponseWriter::new(Arc::clone(&app), reply, echo);
    if is_stream {
        return Ok(stream(vec![generation], writer));
    }
    let outcomes = collect(vec![generation], 1).await?;
    Ok(Json(writer.whole(outcomes)).into_response())
}

/// What a stateless server cannot do.
fn refuse_state(fields: &Fields) -> Result<(), ApiError> {
    let stateless = "is not supported: this server keeps no responses; send the whole conversation as `input`";
    for (name, is_given) in [
        ("background", fields.background),
        ("previous_response_id", fields.previous_response_id.is_some()),
        ("conversation", fields.conversation.is_some()),
        ("prompt", fields.prompt.is_some()),
    ] {
        if is_given {
            return Err(ApiError::invalid(name, stateless));
        }
    }
    if fields.max_tool_calls.is_some() {
        return Err(ApiError::invalid("max_tool_calls", "is not supported: no tool runs on the server"));
    }
    if fields.truncation.as_deref().is_some_and(|how| how != "disabled") {
        return Err(ApiError::invalid("truncation", "only `disabled` is supported"));
    }
    let known = ["message.output_text.logprobs", "reasoning.encrypted_content"];
    match fields.include.iter().flatten().find(|name| !known.contains(&name.as_str())) {
        Some(name) => Err(ApiError::invalid("include", format!("`{}` is not supported", clipped(name, 80)))),
        None => Ok(()),
    }
}

fn prepare(app: &App, mut body: Map<String, Value>) -> Result<(Prepared, Echo, bool), ApiError> {
    let mut fields: Fields = take(&mut body)?;
    let mut sampling_fields = take_named(&mut body, &["temperature", "top_p"]);
    let sampling: SamplingFields = take(&mut sampling_fields)?;
    refuse_unknown(&body)?;
    app.check_model(fields.model.as_deref())?;
    refuse_state(&fields)?;
    only("text", fields.text.as_ref(), &["format", "verbosity"])?;
    only("reasoning", fields.reasoning.as_ref(), &["effort", "summary", "generate_summary"])?;
    StreamOptions::of(fields.stream, fields.stream_options.take())?;
    let format = match &mut fields.text {
        Some(text) => text.remove("format").filter(|format| !format.is_null()),
        None => None,
    };
    let mut structured = Map::new();
    structured.extend(format.clone().map(|format| ("response_format".to_owned(), format)));
    let structured: StructuredFields = take(&mut structured)?;
    let mut template = Map::new();
    if let Some(effort) =
        fields.reasoning.as_ref().and_then(|reasoning| reasoning.get("effort")).filter(|e| !e.is_null())
    {
        template.insert("reasoning_effort".into(), effort.clone());
    }
    let template: TemplateFields = take(&mut template)?;
    let tools = tools(&fields)?.resolve()?;
    let wants_logprobs = fields.include.iter().flatten().any(|name| name == "message.output_text.logprobs");
    let logprobs = fields.top_logprobs.or(wants_logprobs.then_some(0));
    let echo = Echo {
        instructions: fields.instructions.clone(),
        max_output_tokens: fields.max_output_tokens,
        format: format.unwrap_or_else(|| json!({ "type": "text" })),
        tools: fields.tools.unwrap_or_default(),
        tool_choice: fields.tool_choice.unwrap_or_else(|| json!("auto")),
        parallel_tool_calls: tools.parallel,
        reasoning: fields.reasoning.map_or(json!({ "effort": null, "summary": null }), Value::Object),
        logprobs: logprobs.is_some(),
    };
    let conversation = Conversation {
        messages: messages(fields.instructions, fields.input)?,
        tools,
        template,
        sampling,
        constraint: structured.constraint()?,
        max_tokens: fields.max_output_tokens,
        logprobs,
        truncate_prompt_tokens: None,
    };
    Ok((conversation.prepare(app)?, echo, fields.stream))
}

/// Fails for a field of an object that nobody would obey.
fn only(at: &str, object: Option<&Map<String, Value>>, known: &[&str]) -> Result<(), ApiError> {
    match object.into_iter().flatten().find(|(name, value)| !value.is_null() && !known.contains(&name.as_str())) {
        Some((name, _)) => Err(ApiError::invalid(format!("{at}.{name}"), "is not a field that this server knows")),
        None => Ok(()),
    }
}

/// Tools in the shape of Chat Completions, which has the function one level down.
fn tools(fields: &Fields) -> Result<ToolFields, ApiError> {
    let mut all = Map::new();
    if let Some(tools) = &fields.tools {
        let nested = |tool: &Value| {
            let mut function = tool.clone();
            let kind = function.as_object_mut().and_then(|tool| tool.remove("type"));
            json!({ "type": kind, "function": function })
        };
        all.insert("tools".into(), tools.iter().map(nested).collect());
    }
    if let Some(choice) = &fields.tool_choice {
        all.insert("tool_choice".into(), choice.clone());
    }
    if let Some(parallel) = fields.parallel_tool_calls {
        all.insert("parallel_tool_calls".into(), parallel.into());
    }
    take(&mut all)
}

/// Instructions and input as messages.
fn messages(instructions: Option<String>, input: Value) -> Result<Vec<Value>, ApiError> {
    let mut all: Vec<Value> =
        instructions.into_iter().map(|text| json!({ "role": "system", "content": text })).collect();
    let items = match input {
        Value::String(text) => {
            all.push(json!({ "role": "user", "content": text }));
            return Ok(all);
        }
        Value::Array(items) => items,
        _ => return Err(ApiError::invalid("input", "expected a text or a list of items")),
    };
    let mut reasoning = String::new();
    for (index, mut item) in items.into_iter().enumerate() {
        let at = format!("input[{index}]");
        let kind = item["type"].as_str().unwrap_or("message").to_owned();
        match kind.as_str() {
            "message" => {
                let mut message =
                    json!({ "role": take_field(&mut item, "role"), "content": take_field(&mut item, "content") });
                if message["role"] == "assistant" && !reasoning.is_empty() {
                    message["reasoning_content"] = std::mem::take(&mut reasoning).into();
                }
                all.push(message);
            }
            "function_call" => {
                let function =
                    json!({ "name": take_field(&mut item, "name"), "arguments": take_field(&mut item, "arguments") });
                let call = json!({ "id": take_field(&mut item, "call_id"), "type": "function", "function": function });
                // Calls of one turn are of one message.
                match all.last_mut().filter(|message| message["role"] == "assistant") {
                    Some(message) => match message["tool_calls"].as_array_mut() {
                        Some(calls) => calls.push(call),
                        None => message["tool_calls"] = json!([call]),
                    },
                    None => {
                        let mut message = json!({ "role": "assistant", "content": "", "tool_calls": [call] });
                        if !reasoning.is_empty() {
                            message["reasoning_content"] = std::mem::take(&mut reasoning).into();
                        }
                        all.push(message);
                    }
                }
            }
            "function_call_output" => {
                let output = match take_field(&mut item, "output") {
                    Value::Null => return Err(ApiError::invalid(format!("{at}.output"), "is required")),
                    output => output,
                };
                all.push(
                    json!({ "role": "tool", "tool_call_id": take_field(&mut item, "call_id"), "content": output }),
                );
            }
            "reasoning" => {
                let parts = item["content"].as_array().cloned().unwrap_or_default();
                parts.iter().filter_map(|part| part["text"].as_str()).for_each(|text| reasoning.push_str(text));
            }
            other => {
                let reason = format!("`{}` is not supported", clipped(other, 80));
                return Err(ApiError::invalid(format!("{at}.type"), reason));
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_become_messages() {
        let input = json!([
            { "role": "user", "content": [{ "type": "input_text", "text": "hi" }] },
            { "type": "reasoning", "id": "rs", "summary": [], "content": [{ "type": "reasoning_text", "text": "hm" }] },
            { "type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}" },
            { "type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}" },
            { "type": "function_call_output", "call_id": "c1", "output": "1" },
        ]);
        let call = |id: &str, name: &str| json!({ "id": id, "type": "function", "function": { "name": name, "arguments": "{}" } });
        let expected = json!([
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": [{ "type": "input_text", "text": "hi" }] },
            { "role": "assistant", "content": "", "tool_calls": [call("c1", "f"), call("c2", "g")], "reasoning_content": "hm" },
            { "role": "tool", "tool_call_id": "c1", "content": "1" },
        ]);
        assert_eq!(messages(Some("Be brief.".into()), input).map(Value::from), Ok(expected));
        let bad = messages(None, json!([{ "type": "item_reference", "id": "x" }])).unwrap_err();
        assert_eq!(bad.param.as_deref(), Some("input[0].type"));
    }
}
