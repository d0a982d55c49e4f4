//! `POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's Messages API, text and tools.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::server::app::App;
use crate::server::error::ApiError;

use super::conversation::{Conversation, Prepared, TemplateFields};
use super::fields::{refuse_unknown, take, take_named};
use super::messages_in_anthropic::conversation;
use super::messages_response::MessageWriter;
use super::respond::{collect, stream};
use super::sampling::SamplingFields;
use super::tools::ToolFields;

/// Fields of both routes.
#[derive(Debug, Deserialize)]
struct PromptFields {
    messages: Vec<Value>,
    #[serde(default)]
    model: Option<String>,
    #[serde(default)]
    system: Option<Value>,
    #[serde(default)]
    tools: Option<Vec<Value>>,
    #[serde(default)]
    tool_choice: Option<Map<String, Value>>,
    #[serde(default)]
    thinking: Option<Map<String, Value>>,
}

#[derive(Debug, Deserialize)]
struct Fields {
    max_tokens: usize,
    #[serde(default)]
    stop_sequences: Option<Vec<String>>,
    #[serde(default)]
    stream: bool,
}

/// The sampling fields that Anthropic's API has.
const SAMPLING: [&str; 3] = ["temperature", "top_p", "top_k"];

impl PromptFields {
    fn tools(&self) -> Result<ToolFields, ApiError> {
        let mut fields = Map::new();
        if let Some(tools) = &self.tools {
            let tools = tools.iter().enumerate().map(|(index, tool)| openai_tool(&format!("tools[{index}]"), tool));
            fields.insert("tools".into(), tools.collect::<Result<Value, ApiError>>()?);
        }
        if let Some(choice) = &self.tool_choice {
            let kind = choice.get("type").and_then(Value::as_str);
            let choice_json = match kind {
                Some("auto") => json!("auto"),
                Some("any") => json!("required"),
                Some("none") => json!("none"),
                Some("tool") => json!({ "type": "function", "function": { "name": choice.get("name") } }),
                _ => return Err(ApiError::invalid("tool_choice.type", "expected auto, any, tool or none")),
            };
            fields.insert("tool_choice".into(), choice_json);
            if choice.get("disable_parallel_tool_use").and_then(Value::as_bool) == Some(true) {
                fields.insert("parallel_tool_calls".into(), json!(false));
            }
        }
        take(&mut fields)
    }

    /// Templates that know of thinking are told whether to.
    fn template(&self) -> Result<TemplateFields, ApiError> {
        let mut fields = Map::new();
        if let Some(thinking) = &self.thinking {
            let enabled = match thinking.get("type").and_then(Value::as_str) {
                Some("enabled" | "adaptive") => true,
                Some("disabled") => false,
                _ => return Err(ApiError::invalid("thinking.type", "expected enabled, adaptive or disabled")),
            };
            fields.insert("chat_template_kwargs".into(), json!({ "enable_thinking": enabled }));
        }
        take(&mut fields)
    }
}

/// A tool of Anthropic's shape in OpenAI's.
fn openai_tool(at: &str, tool: &Value) -> Result<Value, ApiError> {
    if tool.get("type").and_then(Value::as_str).is_some_and(|kind| kind != "custom") {
        return Err(ApiError::invalid(format!("{at}.type"), "tools that run on the server are not supported"));
    }
    let parameters = tool.get("input_schema");
    let parameters = parameters.ok_or_else(|| ApiError::invalid(format!("{at}.input_schema"), "is required"))?;
    let mut function = json!({ "name": tool.get("name"), "parameters": parameters });
    if let Some(description) = tool.get("description") {
        function["description"] = description.clone();
    }
    Ok(json!({ "type": "function", "function": function }))
}

/// Answers a request that came at `arrived`.
///
/// # Errors
/// What is wrong with it, or that there is no place.
pub(in crate::server) async fn messages(
    app: Arc<App>,
    arrived: Instant,
    body: Map<String, Value>,
) -> Result<Response, ApiError> {
    let (prepared, is_stream) = app.prepare(move |app| prepare(app, body)).await?;
    let Prepared { request, text, reply } = prepared;
    let prompt_tokens = request.prompt_ids.len();
    let generation = app.generate(arrived, request, &text).await?;
    let writer = MessageWriter::new(app.name(), reply, prompt_tokens);
    if is_stream {
        return Ok(stream(vec![generation], writer));
    }
    let outcomes = collect(vec![generation], 1).await?;
    Ok(Json(writer.whole(outcomes)).into_response())
}

fn prepare(app: &App, mut body: Map<String, Value>) -> Result<(Prepared, bool), ApiError> {
    let prompt: PromptFields = take(&mut body)?;
    let fields: Fields = take(&mut body)?;
    let mut sampling = take_named(&mut body, &SAMPLING);
    if let Some(stop) = &fields.stop_sequences {
        sampling.insert("stop".into(), json!(stop));
    }
    refuse_unknown(&body)?;
    app.check_model(prompt.model.as_deref())?;
    let conversation = Conversation {
        tools: prompt.tools()?.resolve()?,
        template: prompt.template()?,
        messages: conversation(prompt.system, prompt.messages)?,
        sampling: take::<SamplingFields>(&mut sampling)?,
        constraint: None,
        max_tokens: Some(fields.max_tokens),
        logprobs: None,
        truncate_prompt_tokens: None,
    };
    Ok((conversation.prepare(app)?, fields.stream))
}

/// Tokens of the prompt that a request makes.
///
/// # Errors
/// What is wrong with it.
pub(in crate::server) fn count_tokens(app: &App, mut body: Map<String, Value>) -> Result<Value, ApiError> {
    let prompt: PromptFields = take(&mut body)?;
    refuse_unknown(&body)?;
    app.check_model(prompt.model.as_deref())?;
    let (tools, template) = (prompt.tools()?.resolve()?, prompt.template()?);
    let rendered = template.render(app, conversation(prompt.system, prompt.messages)?, &tools.tools)?;
    Ok(json!({ "input_tokens": rendered.ids.len() }))
}
