//! How `/v1/messages` answers, whole and as a stream of named events.

use serde_json::{Value, json};

use crate::server::app::unique_id;
use crate::server::error::ApiError;
use crate::server::generation::{Finish, Piece, Step, Usage};
use crate::text::{ReplyParser, ReplyPart};

use super::reply::{Call, Reply, ReplyOptions, parts_of};
use super::respond::{Chunk, Outcome, Render};

/// The kind of a content block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Thinking,
    Text,
    ToolUse,
}

/// Writes one message.
pub(super) struct MessageWriter {
    id: String,
    model: String,
    reply: ReplyOptions,
    parser: ReplyParser,
    usage: Usage,
    /// The block that is open, and how many there were.
    open: Option<Block>,
    blocks: usize,
    finish: Option<Finish>,
}

impl MessageWriter {
    /// For a response to a prompt of `prompt_tokens`.
    pub(super) fn new(model: &str, reply: ReplyOptions, prompt_tokens: usize) -> MessageWriter {
        MessageWriter {
            id: unique_id("msg_"),
            model: model.to_owned(),
            parser: reply.parser(),
            reply,
            usage: Usage { prompt: prompt_tokens, ..Usage::default() },
            open: None,
            blocks: 0,
            finish: None,
        }
    }

    fn message(&self, content: Value) -> Value {
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": null,
            "stop_sequence": null,
            "usage": usage_json(self.usage),
        })
    }

    /// The whole message.
    pub(super) fn whole(mut self, outcomes: Vec<Outcome>) -> Value {
        let mut outcome = outcomes.into_iter().next().unwrap_or_default();
        self.usage = outcome.usage;
        let choice = outcome.choices.drain(..).next().unwrap_or_default();
        let Reply { reasoning, content, calls } = self.reply.whole(&choice.text);
        let mut blocks = Vec::new();
        if !reasoning.is_empty() {
            blocks.push(json!({ "type": "thinking", "thinking": reasoning, "signature": "" }));
        }
        if !content.is_empty() || calls.is_empty() {
            blocks.push(json!({ "type": "text", "text": content }));
        }
        blocks.extend(calls.iter().map(|call| {
            // Cut off in the middle of a call it is no JSON, and told as what there is.
            let input =
                serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({ "partial_json": call.arguments }));
            json!({ "type": "tool_use", "id": call.id, "name": call.name, "input": input })
        }));
        let mut message = self.message(blocks.into());
        (message["stop_reason"], message["stop_sequence"]) = stop(choice.finish.as_ref(), !calls.is_empty());
        message
    }

    fn close(&mut self, out: &mut Vec<Chunk>) {
        if self.open.take().is_some() {
            out.push(event("content_block_stop", json!({ "index": self.blocks })));
            self.blocks += 1;
        }
    }

    fn open(&mut self, block: Block, start: Value, out: &mut Vec<Chunk>) {
        self.close(out);
        self.open = Some(block);
        out.push(event("content_block_start", json!({ "index": self.blocks, "content_block": start })));
    }

    fn delta(&self, delta: Value, out: &mut Vec<Chunk>) {
        out.push(event("content_block_delta", json!({ "index": self.blocks, "delta": delta })));
    }

    fn parts(&mut self, parts: Vec<ReplyPart>, out: &mut Vec<Chunk>) {
        for part in parts {
            match part {
                ReplyPart::Reasoning(text) => {
                    if self.open != Some(Block::Thinking) {
                        self.open(Block::Thinking, json!({ "type": "thinking", "thinking": "", "signature": "" }), out);
                    }
                    self.delta(json!({ "type": "thinking_delta", "thinking": text }), out);
                }
                ReplyPart::Content(text) => {
                    if self.open != Some(Block::Text) {
                        self.open(Block::Text, json!({ "type": "text", "text": "" }), out);
                    }
                    self.delta(json!({ "type": "text_delta", "text": text }), out);
                }
                ReplyPart::ToolCall { id, name, .. } => {
                    let Call { id, name, .. } = Call::new(id, name);
                    self.open(Block::ToolUse, json!({ "type": "tool_use", "id": id, "name": name, "input": {} }), out);
                }
                ReplyPart::ToolArguments { delta, .. } => {
                    self.delta(json!({ "type": "input_json_delta", "partial_json": delta }), out);
                }
            }
        }
    }
}

/// An event whose data says its name too.
fn event(name: &'static str, mut data: Value) -> Chunk {
    data["type"] = name.into();
    Chunk { event: Some(name), data }
}

/// Tokens of the prompt that were cached are told apart from those that were not.
fn usage_json(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt - usage.cached.min(usage.prompt),
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion,
    })
}

/// `stop_reason` and `stop_sequence`.
fn stop(finish: Option<&Finish>, has_calls: bool) -> (Value, Value) {
    match finish {
        Some(Finish { reason: "length", .. }) => (json!("max_tokens"), Value::Null),
        Some(Finish { stop_reason, .. }) if stop_reason.is_string() => (json!("stop_sequence"), stop_reason.clone()),
        Some(_) if has_calls => (json!("tool_use"), Value::Null),
        Some(_) => (json!("end_turn"), Value::Null),
        None => (Value::Null, Value::Null),
    }
}

/// Anthropic's error object of an error.
pub(in crate::server) fn error_body(error: &ApiError) -> Value {
    let kind = match error.status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        400..500 => "invalid_request_error",
        _ => "api_error",
    };
    json!({ "type": "error", "error": { "type": kind, "message": error.message } })
}

impl Render for MessageWriter {
    const DONE: bool = false;

    fn start(&mut self) -> Vec<Chunk> {
        vec![event("message_start", json!({ "message": self.message(json!([])) }))]
    }

    fn step(&mut self, _: usize, step: Step) -> Vec<Chunk> {
        let mut out = Vec::new();
        match step {
            Step::Prompt(_) => {}
            Step::Piece(Piece { text, finish, .. }) => {
                let parts = parts_of(&mut self.parser, &text, finish.is_some());
                self.finish = finish.or(self.finish.take());
                self.parts(parts, &mut out);
            }
            Step::End(usage) => self.usage = usage,
        }
        out
    }

    fn end(&mut self) -> Vec<Chunk> {
        let mut out = Vec::new();
        if self.blocks == 0 && self.open.is_none() {
            self.open(Block::Text, json!({ "type": "text", "text": "" }), &mut out);
        }
        self.close(&mut out);
        let (stop_reason, stop_sequence) = stop(self.finish.as_ref(), self.parser.calls() > 0);
        out.push(event(
            "message_delta",
            json!({
                "delta": { "stop_reason": stop_reason, "stop_sequence": stop_sequence },
                "usage": usage_json(self.usage),
            }),
        ));
        out.push(event("message_stop", json!({})));
        out
    }

    fn failed(&mut self, error: &ApiError) -> Vec<Chunk> {
        vec![Chunk { event: Some("error"), data: error_body(error) }]
    }
}
