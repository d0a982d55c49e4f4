//! The fields about tools: which there are, and whether one must be called.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::server::app::clipped;
use crate::server::error::ApiError;

/// Most tools of one request.
const MAX_TOOLS: usize = 512;
/// Longest name of a function.
const MAX_NAME: usize = 128;

/// Fields of a request.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct ToolFields {
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
}

/// Whether tools are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Choice {
    /// The model is not told of them.
    None,
    /// The model decides.
    Auto,
    /// One must be.
    Required,
}

/// The tools of a request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ToolUse {
    /// In OpenAI's shape. Of a named choice that function alone may be called, and the model is told of all.
    pub(super) tools: Vec<Value>,
    /// Those that may be called.
    pub(super) callable: Vec<Value>,
    pub(super) choice: Choice,
    pub(super) parallel: bool,
}

impl ToolFields {
    /// The tools that are given, checked.
    ///
    /// # Errors
    /// 400 naming the place.
    pub(super) fn resolve(self) -> Result<ToolUse, ApiError> {
        let tools = self.tools.unwrap_or_default();
        if tools.len() > MAX_TOOLS {
            return Err(ApiError::invalid("tools", format!("expected at most {MAX_TOOLS}, got {}", tools.len())));
        }
        for (index, tool) in tools.iter().enumerate() {
            check(&format!("tools[{index}]"), tool)?;
        }
        let name_of = |tool: &Value| tool["function"]["name"].as_str().map(str::to_owned);
        let mut callable = tools.clone();
        let choice = match self.tool_choice {
            None if tools.is_empty() => Choice::None,
            None => Choice::Auto,
            Some(Value::String(word)) => match word.as_str() {
                "none" => Choice::None,
                "auto" if tools.is_empty() => Choice::None,
                "auto" => Choice::Auto,
                "required" | "any" => Choice::Required,
                _ => {
                    let reason = format!("expected none, auto, required or a function, got `{}`", clipped(&word, 80));
                    return Err(ApiError::invalid("tool_choice", reason));
                }
            },
            Some(Value::Object(named)) => {
                let name = named_function(&named).ok_or_else(|| {
                    ApiError::invalid("tool_choice", "expected {\"type\": \"function\", \"function\": {\"name\": ...}}")
                })?;
                callable.retain(|tool| name_of(tool).as_deref() == Some(name));
                if callable.is_empty() {
                    let reason = format!("`{}` is not among the tools", clipped(name, MAX_NAME));
                    return Err(ApiError::invalid("tool_choice", reason));
                }
                Choice::Required
            }
            Some(_) => return Err(ApiError::invalid("tool_choice", "expected a word or an object")),
        };
        if choice == Choice::Required && tools.is_empty() {
            return Err(ApiError::invalid("tools", "expected at least one, since tool_choice demands a call"));
        }
        Ok(ToolUse { tools, callable, choice, parallel: self.parallel_tool_calls.unwrap_or(true) })
    }
}

/// Chat Completions has the name one level down, the Responses API beside the type.
fn named_function(choice: &Map<String, Value>) -> Option<&str> {
    if choice.get("type").and_then(Value::as_str) != Some("function") {
        return None;
    }
    choice.get("function").map_or(choice.get("name"), |function| function.get("name"))?.as_str()
}

fn check(at: &str, tool: &Value) -> Result<(), ApiError> {
    if tool.get("type").and_then(Value::as_str) != Some("function") {
        return Err(ApiError::invalid(format!("{at}.type"), "only `function` is supported"));
    }
    let Some(function) = tool.get("function").and_then(Value::as_object) else {
        return Err(ApiError::invalid(format!("{at}.function"), "expected an object"));
    };
    let name = function.get("name").and_then(Value::as_str).unwrap_or_default();
    let is_name = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(is_name) {
        let reason = format!("expected 1 to {MAX_NAME} of a-z, A-Z, 0-9, _, - and .");
        return Err(ApiError::invalid(format!("{at}.function.name"), reason));
    }
    match function.get("parameters") {
        None | Some(Value::Null | Value::Object(_)) => Ok(()),
        Some(_) => Err(ApiError::invalid(format!("{at}.function.parameters"), "expected a JSON schema, an object")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn resolved(body: Value) -> Result<ToolUse, Option<String>> {
        let fields: ToolFields = serde_json::from_value(body).unwrap();
        fields.resolve().map_err(|error| error.param)
    }

    fn tool(name: &str) -> Value {
        json!({ "type": "function", "function": { "name": name, "parameters": { "type": "object" } } })
    }

    #[test]
    fn choices() {
        let tools = json!([tool("a"), tool("b")]);
        let choice = |body: Value| resolved(body).map(|used| (used.choice, used.callable.len()));
        assert_eq!(choice(json!({})), Ok((Choice::None, 0)));
        assert_eq!(choice(json!({ "tools": tools })), Ok((Choice::Auto, 2)));
        assert_eq!(choice(json!({ "tools": tools, "tool_choice": "none" })), Ok((Choice::None, 2)));
        assert_eq!(choice(json!({ "tools": tools, "tool_choice": "required" })), Ok((Choice::Required, 2)));
        let named = json!({ "type": "function", "function": { "name": "b" } });
        assert_eq!(choice(json!({ "tools": tools, "tool_choice": named })), Ok((Choice::Required, 1)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, field) in [
            (json!({ "tools": [{ "type": "web_search" }] }), "tools[0].type"),
            (json!({ "tools": [{ "type": "function" }] }), "tools[0].function"),
            (json!({ "tools": [tool("a"), tool("a b")] }), "tools[1].function.name"),
            (
                json!({ "tools": [{ "type": "function", "function": { "name": "a", "parameters": 1 } }] }),
                "tools[0].function.parameters",
            ),
            (json!({ "tool_choice": "required" }), "tools"),
            (json!({ "tools": [tool("a")], "tool_choice": "maybe" }), "tool_choice"),
            (
                json!({ "tools": [tool("a")], "tool_choice": { "type": "function", "function": { "name": "b" } } }),
                "tool_choice",
            ),
        ] {
            assert_eq!(resolved(body.clone()), Err(Some(field.to_owned())), "{body}");
        }
    }
}
