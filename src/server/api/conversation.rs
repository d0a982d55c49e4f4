//! From a conversation, whichever API it came through, to a request of the engine.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::engine::Request;
use crate::server::app::App;
use crate::server::error::ApiError;
use crate::server::generation::TextOptions;
use crate::text::{ChatInput, Constraint};

use super::messages_in::normalize;
use super::reply::ReplyOptions;
use super::sampling::SamplingFields;
use super::structured::Asked;
use super::tools::{Choice, ToolUse};

/// What a chat template is given beside the messages.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct TemplateFields {
    add_generation_prompt: Option<bool>,
    continue_final_message: bool,
    add_special_tokens: bool,
    documents: Option<Vec<Value>>,
    chat_template_kwargs: Option<Map<String, Value>>,
    pub(super) reasoning_effort: Option<String>,
}

/// A prompt that a chat template wrote.
pub(super) struct Rendered {
    pub(super) ids: Vec<u32>,
    text: String,
    continuing: bool,
}

impl TemplateFields {
    /// Renders a conversation and tokenizes it.
    ///
    /// # Errors
    /// 400 for messages that the template or the model does not take.
    pub(super) fn render(self, app: &App, messages: Vec<Value>, tools: &[Value]) -> Result<Rendered, ApiError> {
        let Some(template) = &app.model.template else {
            return Err(ApiError::invalid(
                "messages",
                "the model has no chat template; use /v1/completions with the text that it is to continue",
            ));
        };
        let continuing = self.continue_final_message;
        let add_generation_prompt = self.add_generation_prompt.unwrap_or(!continuing);
        if continuing && add_generation_prompt {
            return Err(ApiError::invalid("continue_final_message", "cannot be true where add_generation_prompt is"));
        }
        let mut extra = self.chat_template_kwargs.unwrap_or_default();
        if let Some(effort) = self.reasoning_effort {
            extra.entry("reasoning_effort").or_insert(effort.into());
        }
        let input = ChatInput {
            messages: normalize(messages)?,
            tools: (!tools.is_empty()).then(|| tools.to_vec()),
            documents: self.documents,
            add_generation_prompt,
            continue_final_message: continuing,
            extra,
            ..ChatInput::default()
        };
        let text = template.render(&input)?;
        Ok(Rendered { ids: app.encode("messages", &text, self.add_special_tokens)?, text, continuing })
    }
}

/// A conversation, and what is to follow it.
pub(super) struct Conversation {
    pub(super) messages: Vec<Value>,
    pub(super) tools: ToolUse,
    pub(super) template: TemplateFields,
    pub(super) sampling: SamplingFields,
    pub(super) constraint: Option<Asked>,
    pub(super) max_tokens: Option<usize>,
    /// Alternatives to each token that are told.
    pub(super) logprobs: Option<usize>,
    pub(super) truncate_prompt_tokens: Option<i64>,
}

/// A request that is ready for the engine, and how its replies are read.
pub(super) struct Prepared {
    pub(super) request: Request,
    pub(super) text: TextOptions,
    pub(super) reply: ReplyOptions,
}

impl Conversation {
    /// Resolves it against the model. Takes time: for a thread on which nobody waits.
    ///
    /// # Errors
    /// 400 naming the field that is wrong.
    pub(super) fn prepare(self, app: &App) -> Result<Prepared, ApiError> {
        let n = self.sampling.n.unwrap_or(1);
        app.check_choices(1, n)?;
        app.check_logprobs("top_logprobs", self.logprobs)?;
        app.check_logprobs("prompt_logprobs", self.sampling.prompt_logprobs)?;
        let (mut params, mut text) = self.sampling.resolve(&app.model.sampling, &app.model.stop, &app.tokenizer)?;
        params.logprobs = self.logprobs;
        let told: &[Value] = if self.tools.choice == Choice::None { &[] } else { &self.tools.tools };
        let rendered = self.template.render(app, self.messages, told)?;
        if self.tools.choice == Choice::Auto && app.model.tool_format.is_none() {
            let reason =
                "the model's format of calls is not known, so that none would be found; --tool-call-parser names it";
            return Err(ApiError::invalid("tools", reason));
        }
        let constraint = match (self.tools.choice, self.constraint) {
            (Choice::Required, Some((_, field))) => {
                return Err(ApiError::invalid(field, "cannot be given where tool_choice demands a call"));
            }
            (Choice::Required, None) => Some(call_grammar(app, &self.tools)?),
            (_, constraint) => constraint,
        };
        let reply = ReplyOptions {
            // What is held to a grammar is the answer from its first character on.
            reasoning: app.model.reasoning_format.filter(|_| constraint.is_none()),
            starts_in_reasoning: app
                .model
                .reasoning_format
                .is_some_and(|format| format.starts_in_reasoning(&rendered.text)),
            tools: app
                .model
                .tool_format
                .filter(|_| self.tools.choice != Choice::None)
                .map(|f| (f, self.tools.callable)),
        };
        // A grammar sees the blank that the first token of a text may begin with.
        text.continuing = rendered.continuing || constraint.is_some();
        text.keep = reply.markers();
        let ids = app.truncated(rendered.ids, self.truncate_prompt_tokens)?;
        let max_tokens = app.room(ids.len(), self.max_tokens, usize::MAX)?;
        let request = Request {
            n,
            priority: self.sampling.priority,
            cache_salt: self.sampling.cache_salt.unwrap_or_default(),
            prompt_logprobs: self.sampling.prompt_logprobs,
            constraint: app.compile(constraint)?,
            ..Request::new(ids, params, max_tokens)
        };
        Ok(Prepared { request, text, reply })
    }
}

/// A grammar of calls in the model's own format.
fn call_grammar(app: &App, tools: &ToolUse) -> Result<Asked, ApiError> {
    let Some(format) = app.model.tool_format else {
        let reason = "cannot demand a call: the model's format of calls is not known; --tool-call-parser names it";
        return Err(ApiError::invalid("tool_choice", reason));
    };
    let special = |marker: &str| app.tokenizer.token_to_id(marker).filter(|&id| app.tokenizer.is_special(id));
    let grammar = format.call_grammar(&tools.callable, tools.parallel, special)?;
    Ok((Constraint::Lark(grammar), "tools".into()))
}
