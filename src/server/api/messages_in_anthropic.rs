//! A conversation as Anthropic's API has it, made into OpenAI's shape.

use serde_json::{Value, json};

use crate::server::app::clipped;
use crate::server::error::ApiError;

use super::fields::take_field;

/// Messages in OpenAI's shape, the system's first.
///
/// # Errors
/// 400 naming the place.
pub(super) fn conversation(system: Option<Value>, messages: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    let mut all = Vec::new();
    if let Some(text) = system_text(system)? {
        all.push(json!({ "role": "system", "content": text }));
    }
    for (index, message) in messages.into_iter().enumerate() {
        one(&format!("messages[{index}]"), message, &mut all)?;
    }
    Ok(all)
}

/// The system's text: a text, or a list of blocks.
///
/// # Errors
/// 400 naming the block.
fn system_text(system: Option<Value>) -> Result<Option<String>, ApiError> {
    system.map(|system| text_of("system", system)).transpose()
}

/// A text, or blocks of text one a line.
fn text_of(at: &str, content: Value) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text),
        Value::Null => Ok(String::new()),
        Value::Array(blocks) => {
            let text = |(index, mut block): (usize, Value)| {
                let at = format!("{at}[{index}]");
                match (take_field(&mut block, "type").as_str(), take_field(&mut block, "text")) {
                    (Some("text"), Value::String(text)) => Ok(text),
                    (Some("text"), _) => Err(ApiError::invalid(format!("{at}.text"), "expected a text")),
                    (kind, _) => Err(unsupported(&at, kind)),
                }
            };
            Ok(blocks.into_iter().enumerate().map(text).collect::<Result<Vec<_>, _>>()?.join("\n"))
        }
        _ => Err(ApiError::invalid(at, "expected a text or a list of blocks")),
    }
}

fn unsupported(at: &str, kind: Option<&str>) -> ApiError {
    let reason = format!("`{}` is not supported here", clipped(kind.unwrap_or_default(), 80));
    ApiError::invalid(format!("{at}.type"), reason)
}

/// A message becomes one, and a message for each tool's result.
fn one(at: &str, message: Value, all: &mut Vec<Value>) -> Result<(), ApiError> {
    let role = message["role"].as_str().map(str::to_owned);
    let role = role.filter(|role| role == "user" || role == "assistant");
    let role = role.ok_or_else(|| ApiError::invalid(format!("{at}.role"), "expected user or assistant"))?;
    let at = format!("{at}.content");
    let blocks = match message.get("content").cloned() {
        Some(Value::String(text)) => vec![json!({ "type": "text", "text": text })],
        Some(Value::Array(blocks)) => blocks,
        _ => return Err(ApiError::invalid(at, "expected a text or a list of blocks")),
    };
    let (mut texts, mut calls, mut reasoning) = (Vec::new(), Vec::new(), Vec::new());
    for (index, mut block) in blocks.into_iter().enumerate() {
        let at = format!("{at}[{index}]");
        let kind = block["type"].as_str().map(str::to_owned);
        match (kind.as_deref(), role.as_str()) {
            (Some("text"), _) => match take_field(&mut block, "text") {
                Value::String(text) => texts.push(text),
                _ => return Err(ApiError::invalid(format!("{at}.text"), "expected a text")),
            },
            (Some("thinking"), "assistant") => match take_field(&mut block, "thinking") {
                Value::String(text) => reasoning.push(text),
                _ => return Err(ApiError::invalid(format!("{at}.thinking"), "expected a text")),
            },
            // Thinking of another server that only it can read.
            (Some("redacted_thinking"), "assistant") => {}
            (Some("tool_use"), "assistant") => {
                let (name, input) = (take_field(&mut block, "name"), take_field(&mut block, "input"));
                if !name.is_string() || !input.is_object() {
                    return Err(ApiError::invalid(at, "expected a `name` and an object `input`"));
                }
                let function = json!({ "name": name, "arguments": input });
                calls.push(json!({ "id": take_field(&mut block, "id"), "type": "function", "function": function }));
            }
            (Some("tool_result"), "user") => {
                let content = text_of(&format!("{at}.content"), take_field(&mut block, "content"))?;
                all.push(json!({ "role": "tool", "tool_call_id": take_field(&mut block, "tool_use_id"), "content": content }));
            }
            (kind, _) => return Err(unsupported(&at, kind)),
        }
    }
    if texts.is_empty() && calls.is_empty() && reasoning.is_empty() {
        return Ok(());
    }
    let mut message = json!({ "role": role, "content": texts.join("\n") });
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    if !reasoning.is_empty() {
        message["reasoning_content"] = reasoning.join("\n").into();
    }
    all.push(message);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_become_messages() {
        let messages = json!([
            { "role": "user", "content": "weather?" },
            { "role": "assistant", "content": [
                { "type": "thinking", "thinking": "hm", "signature": "x" },
                { "type": "text", "text": "Let me see." },
                { "type": "tool_use", "id": "t1", "name": "weather", "input": { "city": "Rome" } },
            ] },
            { "role": "user", "content": [
                { "type": "tool_result", "tool_use_id": "t1", "content": [{ "type": "text", "text": "sunny" }] },
                { "type": "text", "text": "and now?" },
            ] },
        ]);
        let got =
            conversation(Some(json!([{ "type": "text", "text": "Be brief." }])), messages.as_array().unwrap().clone());
        let call = json!({ "id": "t1", "type": "function", "function": { "name": "weather", "arguments": { "city": "Rome" } } });
        let expected = json!([
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": "weather?" },
            { "role": "assistant", "content": "Let me see.", "tool_calls": [call], "reasoning_content": "hm" },
            { "role": "tool", "tool_call_id": "t1", "content": "sunny" },
            { "role": "user", "content": "and now?" },
        ]);
        assert_eq!(Value::from(got.unwrap()), expected);
    }

    #[test]
    fn errors_name_the_place() {
        let param =
            |messages: Value| conversation(None, messages.as_array().unwrap().clone()).unwrap_err().param.unwrap();
        assert_eq!(param(json!([{ "role": "system", "content": "x" }])), "messages[0].role");
        assert_eq!(param(json!([{ "role": "user" }])), "messages[0].content");
        assert_eq!(param(json!([{ "role": "user", "content": [{ "type": "image" }] }])), "messages[0].content[0].type");
        assert_eq!(
            param(json!([{ "role": "user", "content": [{ "type": "tool_use" }] }])),
            "messages[0].content[0].type"
        );
        assert_eq!(
            param(json!([{ "role": "assistant", "content": [{ "type": "tool_use", "name": "f" }] }])),
            "messages[0].content[0]"
        );
    }
}
