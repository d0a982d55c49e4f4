//! How `/v1/chat/completions` answers, whole and as a stream.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::server::app::{App, unique_id, unix_time};
use crate::server::generation::{Finish, Piece, Step, Usage};
use crate::text::{ReplyParser, ReplyPart};

use super::logprobs::Naming;
use super::reply::{Call, Reply, ReplyOptions, parts_of};
use super::respond::{Chunk, Outcome, Render, usage_json};
use super::stream_options::StreamOptions;

/// What a response is to hold.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) n: usize,
    pub(super) logprobs: bool,
    pub(super) prompt_logprobs: bool,
    /// Tokens are named by number.
    pub(super) as_ids: bool,
    /// Whether the model's reasoning is told.
    pub(super) reasoning: bool,
}

/// Writes one response.
pub(super) struct ChatWriter {
    app: Arc<App>,
    id: String,
    created: u64,
    shape: Shape,
    reply: ReplyOptions,
    /// Of each choice.
    parsers: Vec<ReplyParser>,
    options: StreamOptions,
    usage: Usage,
}

impl ChatWriter {
    /// For a response with an id of its own.
    pub(super) fn new(app: Arc<App>, shape: Shape, reply: ReplyOptions, options: StreamOptions) -> ChatWriter {
        let parsers = (0..shape.n).map(|_| reply.parser()).collect();
        let (id, created) = (unique_id("chatcmpl-"), unix_time());
        ChatWriter { app, id, created, shape, reply, parsers, options, usage: Usage::default() }
    }

    fn object(&self, kind: &str, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.app.name(),
            "choices": choices,
        })
    }

    fn naming(&self) -> Naming<'_> {
        Naming { tokenizer: &self.app.tokenizer, as_ids: self.shape.as_ids }
    }

    /// The whole response.
    pub(super) fn whole(self, outcomes: Vec<Outcome>) -> Value {
        let usages: Vec<Usage> = outcomes.iter().map(|outcome| outcome.usage).collect();
        let mut choices = Vec::new();
        let mut prompt_logprobs = Value::Null;
        for outcome in outcomes {
            if self.shape.prompt_logprobs {
                prompt_logprobs =
                    self.naming().prompt(outcome.prompt.as_ref().map_or(&[][..], |prompt| &prompt.logprobs));
            }
            for (index, choice) in outcome.choices.into_iter().enumerate() {
                let reply = self.reply.whole(&choice.text);
                let (finish_reason, stop_reason) = finish_json(choice.finish, !reply.calls.is_empty());
                choices.push(json!({
                    "index": index,
                    "message": self.message(reply),
                    "logprobs": if self.shape.logprobs { self.naming().chat(&choice.tokens) } else { Value::Null },
                    "finish_reason": finish_reason,
                    "stop_reason": stop_reason,
                }));
            }
        }
        let mut object = self.object("chat.completion", choices.into());
        object["usage"] = usage_json(usages);
        if self.shape.prompt_logprobs {
            object["prompt_logprobs"] = prompt_logprobs;
        }
        object
    }

    fn message(&self, Reply { reasoning, content, calls }: Reply) -> Value {
        let content = if content.is_empty() && !calls.is_empty() { Value::Null } else { content.into() };
        let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
        if !reasoning.is_empty() && self.shape.reasoning {
            message["reasoning_content"] = reasoning.into();
        }
        if !calls.is_empty() {
            message["tool_calls"] = calls.iter().map(Call::json).collect();
        }
        message
    }

    /// What parts of a reply add to a message, one delta for each.
    fn deltas(&self, parts: Vec<ReplyPart>) -> Vec<Value> {
        let delta = |part| match part {
            ReplyPart::Reasoning(text) => self.shape.reasoning.then(|| json!({ "reasoning_content": text })),
            ReplyPart::Content(text) => Some(json!({ "content": text })),
            ReplyPart::ToolCall { index, id, name } => {
                let mut call = Call::new(id, name).json();
                call["index"] = index.into();
                Some(json!({ "tool_calls": [call] }))
            }
            ReplyPart::ToolArguments { index, delta } => {
                Some(json!({ "tool_calls": [{ "index": index, "function": { "arguments": delta } }] }))
            }
        };
        parts.into_iter().filter_map(delta).collect()
    }

    fn chunk(&self, choice: usize, delta: Value, logprobs: Value, finish: Option<Finish>) -> Chunk {
        let (finish_reason, stop_reason) = finish_json(finish, self.parsers[choice].calls() > 0);
        let choices = json!([{
            "index": choice,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }]);
        self.object("chat.completion.chunk", choices).into()
    }
}

/// `finish_reason` and `stop_reason`.
fn finish_json(finish: Option<Finish>, has_calls: bool) -> (Value, Value) {
    let Some(Finish { reason, stop_reason }) = finish else { return (Value::Null, Value::Null) };
    (if has_calls && reason == "stop" { "tool_calls" } else { reason }.into(), stop_reason)
}

impl Render for ChatWriter {
    fn start(&mut self) -> Vec<Chunk> {
        let first = |choice| self.chunk(choice, json!({ "role": "assistant", "content": "" }), Value::Null, None);
        (0..self.shape.n).map(first).collect()
    }

    fn step(&mut self, _: usize, step: Step) -> Vec<Chunk> {
        match step {
            Step::Prompt(_) => Vec::new(),
            Step::Piece(Piece { choice, text, token, finish }) => {
                let parts = parts_of(&mut self.parsers[choice], &text, finish.is_some());
                let mut deltas = self.deltas(parts);
                let mut logprobs = match token.filter(|_| self.shape.logprobs) {
                    Some(token) => self.naming().chat(&[token]),
                    None => Value::Null,
                };
                if deltas.is_empty() && (finish.is_some() || !logprobs.is_null()) {
                    deltas.push(json!({}));
                }
                let last = deltas.len().saturating_sub(1);
                let mut finish = finish;
                let chunk = |(index, delta)| {
                    let finish = if index == last { finish.take() } else { None };
                    self.chunk(choice, delta, std::mem::take(&mut logprobs), finish)
                };
                deltas.into_iter().enumerate().map(chunk).collect()
            }
            Step::End(usage) => {
                self.usage = usage;
                Vec::new()
            }
        }
    }

    fn end(&mut self) -> Vec<Chunk> {
        if !self.options.include_usage {
            return Vec::new();
        }
        let mut object = self.object("chat.completion.chunk", json!([]));
        object["usage"] = usage_json([self.usage]);
        vec![object.into()]
    }
}
