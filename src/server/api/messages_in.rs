//! A conversation as OpenAI's API has it, made into what chat templates take.

use serde_json::{Map, Value};

use crate::server::app::clipped;
use crate::server::error::ApiError;

/// Roles of messages that templates know.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];
/// Most messages of one conversation.
const MAX_MESSAGES: usize = 10_000;

/// Checks messages, joins the text parts of each to one text, and parses the arguments of tool calls, which templates write themselves.
///
/// # Errors
/// 400 naming the place, as `messages[2].content[0]`.
pub(super) fn normalize(messages: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "expected at least one message"));
    }
    if messages.len() > MAX_MESSAGES {
        let reason = format!("expected at most {MAX_MESSAGES} messages, got {}", messages.len());
        return Err(ApiError::invalid("messages", reason));
    }
    messages.into_iter().enumerate().map(|(index, message)| one(&format!("messages[{index}]"), message)).collect()
}

fn one(at: &str, message: Value) -> Result<Value, ApiError> {
    let Value::Object(mut message) = message else { return Err(ApiError::invalid(at, "expected an object")) };
    let role = match message.get("role") {
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role.clone(),
        Some(role) => {
            let reason = format!("expected one of {}, got {}", ROLES.join(", "), clipped(&role.to_string(), 80));
            return Err(ApiError::invalid(format!("{at}.role"), reason));
        }
        None => return Err(ApiError::invalid(format!("{at}.role"), "is required")),
    };
    // What reasoning models call the system's message; templates know the older name.
    if role == "developer" {
        message.insert("role".into(), "system".into());
    }
    let content = message.remove("content").unwrap_or(Value::Null);
    let has_calls = message.get("tool_calls").is_some_and(|calls| !calls.is_null());
    let content = match text_of(&format!("{at}.content"), content)? {
        Some(text) => Value::String(text),
        None if role == "assistant" || has_calls => Value::String(String::new()),
        None => return Err(ApiError::invalid(format!("{at}.content"), "is required")),
    };
    message.insert("content".into(), content);
    match message.get_mut("tool_calls") {
        Some(Value::Array(calls)) => {
            for (index, call) in calls.iter_mut().enumerate() {
                parse_arguments(&format!("{at}.tool_calls[{index}]"), call)?;
            }
        }
        Some(Value::Null) => {
            message.remove("tool_calls");
        }
        Some(_) => return Err(ApiError::invalid(format!("{at}.tool_calls"), "expected a list")),
        None => {}
    }
    Ok(Value::Object(message))
}

/// The text of a message's content: a text, or a list of parts that are text, one a line.
fn text_of(at: &str, content: Value) -> Result<Option<String>, ApiError> {
    match content {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text)),
        Value::Array(parts) => {
            let texts = parts.into_iter().enumerate().map(|(index, part)| part_text(&format!("{at}[{index}]"), part));
            Ok(Some(texts.collect::<Result<Vec<_>, _>>()?.join("\n")))
        }
        _ => Err(ApiError::invalid(at, "expected a text or a list of parts")),
    }
}

fn part_text(at: &str, part: Value) -> Result<String, ApiError> {
    let mut part = match part {
        Value::String(text) => return Ok(text),
        Value::Object(part) => part,
        _ => return Err(ApiError::invalid(at, "expected an object with `type` and `text`")),
    };
    let kind = part.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    let key = if kind == "refusal" { "refusal" } else { "text" };
    match (kind.as_str(), part.remove(key)) {
        ("text" | "input_text" | "output_text" | "refusal", Some(Value::String(text))) => Ok(text),
        ("text" | "input_text" | "output_text" | "refusal", _) => {
            Err(ApiError::invalid(format!("{at}.{key}"), "expected a text"))
        }
        _ => {
            let reason = format!("`{}` is not supported: this model reads text only", clipped(&kind, 80));
            Err(ApiError::invalid(format!("{at}.type"), reason))
        }
    }
}

/// Arguments come as a text that holds JSON.
fn parse_arguments(at: &str, call: &mut Value) -> Result<(), ApiError> {
    let function = call.get_mut("function").and_then(Value::as_object_mut);
    let Some(function) = function else {
        return Err(ApiError::invalid(format!("{at}.function"), "expected an object"));
    };
    if !function.get("name").is_some_and(Value::is_string) {
        return Err(ApiError::invalid(format!("{at}.function.name"), "expected a text"));
    }
    match function.get_mut("arguments") {
        Some(arguments @ Value::String(_)) => {
            let text = arguments.as_str().unwrap_or_default().trim();
            let parsed: Value = match text {
                "" => Value::Object(Map::new()),
                text => serde_json::from_str(text)
                    .map_err(|e| ApiError::invalid(format!("{at}.function.arguments"), format!("is not JSON: {e}")))?,
            };
            *arguments = parsed;
        }
        Some(Value::Object(_)) => {}
        Some(_) => {
            return Err(ApiError::invalid(format!("{at}.function.arguments"), "expected a text that holds JSON"));
        }
        None => {
            function.insert("arguments".into(), Value::Object(Map::new()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn normalized(messages: Value) -> Result<Vec<Value>, Option<String>> {
        normalize(messages.as_array().unwrap().clone()).map_err(|error| error.param)
    }

    #[test]
    fn parts_become_one_text_and_arguments_json() {
        let got = normalized(json!([
            { "role": "developer", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] },
            { "role": "assistant", "content": null,
              "tool_calls": [{ "id": "1", "type": "function", "function": { "name": "f", "arguments": "{\"x\": 1}" } }] },
            { "role": "tool", "tool_call_id": "1", "content": "2" },
        ]));
        let expected = json!([
            { "role": "system", "content": "a\nb" },
            { "role": "assistant", "content": "",
              "tool_calls": [{ "id": "1", "type": "function", "function": { "name": "f", "arguments": { "x": 1 } } }] },
            { "role": "tool", "tool_call_id": "1", "content": "2" },
        ]);
        assert_eq!(got, Ok(expected.as_array().unwrap().clone()));
    }

    #[test]
    fn errors_name_the_place() {
        let param = |messages: Value| normalized(messages).expect_err("is wrong").unwrap_or_default();
        assert_eq!(param(json!([])), "messages");
        assert_eq!(param(json!([1])), "messages[0]");
        assert_eq!(param(json!([{ "content": "x" }])), "messages[0].role");
        assert_eq!(param(json!([{ "role": "king", "content": "x" }])), "messages[0].role");
        assert_eq!(param(json!([{ "role": "user" }])), "messages[0].content");
        let image =
            json!([{ "role": "user", "content": [{ "type": "image_url", "image_url": { "url": "http://x" } }] }]);
        assert_eq!(param(image), "messages[0].content[0].type");
        let call = json!([{ "role": "assistant", "tool_calls": [{ "function": { "name": "f", "arguments": "{" } }] }]);
        assert_eq!(param(call), "messages[0].tool_calls[0].function.arguments");
    }
}
