//! How `/v1/responses` answers, whole and as a stream of numbered events.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::engine::sampling::Sampled;
use crate::server::app::{App, unique_id, unix_time};
use crate::server::error::ApiError;
use crate::server::generation::{Finish, Piece, Step, Usage};
use crate::text::{ReplyParser, ReplyPart};

use super::logprobs::Naming;
use super::reply::{Call, ReplyOptions, parts_of};
use super::respond::{Chunk, Outcome, Render};

/// Fields of the request that the response repeats.
#[derive(Debug)]
pub(super) struct Echo {
    pub(super) instructions: Option<String>,
    pub(super) max_output_tokens: Option<usize>,
    pub(super) format: Value,
    pub(super) tools: Vec<Value>,
    pub(super) tool_choice: Value,
    pub(super) parallel_tool_calls: bool,
    pub(super) reasoning: Value,
    pub(super) logprobs: bool,
}

/// An item of the output.
#[derive(Debug)]
enum Item {
    Reasoning { id: String, text: String },
    Message { id: String, text: String, logprobs: Vec<Value> },
    Call { id: String, call: Call },
}

impl Item {
    fn id(&self) -> &str {
        match self {
            Item::Reasoning { id, .. } | Item::Message { id, .. } | Item::Call { id, .. } => id,
        }
    }

    fn json(&self, status: &str) -> Value {
        match self {
            Item::Reasoning { id, text } => json!({
                "type": "reasoning", "id": id, "summary": [], "status": status,
                "content": [{ "type": "reasoning_text", "text": text }],
            }),
            Item::Message { id, .. } => json!({
                "type": "message", "id": id, "role": "assistant", "status": status, "content": [self.part()],
            }),
            Item::Call { id, call } => json!({
                "type": "function_call", "id": id, "call_id": call.id, "name": call.name, "arguments": call.arguments,
                "status": status,
            }),
        }
    }

    /// The one part of a message's content.
    fn part(&self) -> Value {
        match self {
            Item::Message { text, logprobs, .. } => {
                json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": logprobs })
            }
            _ => Value::Null,
        }
    }
}

/// Writes one response.
pub(super) struct ResponseWriter {
    app: Arc<App>,
    id: String,
    created: u64,
    echo: Echo,
    parser: ReplyParser,
    /// What came so far; the last one is open.
    items: Vec<Item>,
    usage: Usage,
    finish: Option<Finish>,
    /// Log-probabilities of tokens whose text is still held back.
    held_logprobs: Vec<Value>,
    sequence_number: u64,
}

impl ResponseWriter {
    /// For a response with an id of its own.
    pub(super) fn new(app: Arc<App>, reply: ReplyOptions, echo: Echo) -> ResponseWriter {
        ResponseWriter {
            app,
            id: unique_id("resp_"),
            created: unix_time(),
            echo,
            parser: reply.parser(),
            items: Vec::new(),
            usage: Usage::default(),
            finish: None,
            held_logprobs: Vec::new(),
            sequence_number: 0,
        }
    }

    /// The whole response: what the stream's last event holds.
    pub(super) fn whole(mut self, outcomes: Vec<Outcome>) -> Value {
        let outcome = outcomes.into_iter().next().unwrap_or_default();
        let choice = outcome.choices.into_iter().next().unwrap_or_default();
        let mut events = Vec::new();
        if self.echo.logprobs {
            self.hold(&choice.tokens);
        }
        let parts = parts_of(&mut self.parser, &choice.text, true);
        self.parts(parts, &mut events);
        (self.usage, self.finish) = (outcome.usage, choice.finish);
        let status = self.status();
        self.object(status)
    }

    fn hold(&mut self, tokens: &[Sampled]) {
        let naming = Naming { tokenizer: &self.app.tokenizer, as_ids: false };
        if let Value::Array(told) = naming.chat(tokens)["content"].take() {
            self.held_logprobs.extend(told);
        }
    }

    fn status(&self) -> &'static str {
        match &self.finish {
            Some(Finish { reason: "length", .. }) => "incomplete",
            Some(_) => "completed",
            None => "in_progress",
        }
    }

    fn object(&self, status: &str) -> Value {
        let incomplete = (status == "incomplete").then(|| json!({ "reason": "max_output_tokens" }));
        let item_status = if status == "in_progress" { "completed" } else { status };
        let last = self.items.len().saturating_sub(1);
        let item = |(index, item): (usize, &Item)| item.json(if index == last { item_status } else { "completed" });
        let reasoning = |item: &Item| match item {
            // A reply's text is tokenized again: tokens across the border of reasoning and answer are of neither.
            Item::Reasoning { text, .. } => self.app.tokenizer.encode(text, false).map_or(0, |ids| ids.len()),
            _ => 0,
        };
        let Usage { prompt, cached, completion } = self.usage;
        let usage = json!({
            "input_tokens": prompt,
            "input_tokens_details": { "cached_tokens": cached },
            "output_tokens": completion,
            "output_tokens_details": { "reasoning_tokens": self.items.iter().map(reasoning).sum::<usize>() },
            "total_tokens": prompt + completion,
        });
        json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": null,
            "incomplete_details": incomplete,
            "instructions": self.echo.instructions,
            "max_output_tokens": self.echo.max_output_tokens,
            "model": self.app.name(),
            "output": self.items.iter().enumerate().map(item).collect::<Value>(),
            "parallel_tool_calls": self.echo.parallel_tool_calls,
            "previous_response_id": null,
            "reasoning": self.echo.reasoning,
            "store": false,
            "text": { "format": self.echo.format },
            "tool_choice": self.echo.tool_choice,
            "tools": self.echo.tools,
            "truncation": "disabled",
            "metadata": {},
            "usage": if status == "in_progress" { Value::Null } else { usage },
        })
    }

    fn event(&mut self, name: &'static str, mut data: Value, out: &mut Vec<Chunk>) {
        data["type"] = name.into();
        data["sequence_number"] = self.sequence_number.into();
        self.sequence_number += 1;
        out.push(Chunk { event: Some(name), data });
    }

    fn begin(&mut self, item: Item, out: &mut Vec<Chunk>) {
        self.finish_item("completed", out);
        let index = self.items.len();
        let mut added = item.json("in_progress");
        if added["content"].is_array() {
            added["content"] = json!([]);
        }
        let (id, part) = (item.id().to_owned(), item.part());
        self.items.push(item);
        self.event("response.output_item.added", json!({ "output_index": index, "item": added }), out);
        if !part.is_null() {
            let data = json!({ "output_index": index, "item_id": id, "content_index": 0, "part": part });
            self.event("response.content_part.added", data, out);
        }
    }

    /// Ends the item that is open.
    fn finish_item(&mut self, status: &str, out: &mut Vec<Chunk>) {
        let Some(item) = self.items.last() else { return };
        let (index, id, done) = (self.items.len() - 1, item.id().to_owned(), item.json(status));
        let part = item.part();
        let at = |mut data: Value| {
            data["output_index"] = index.into();
            data["item_id"] = id.clone().into();
            data
        };
        match item {
            Item::Reasoning { text, .. } => {
                let data = at(json!({ "content_index": 0, "text": text }));
                self.event("response.reasoning_text.done", data, out);
            }
            Item::Message { text, logprobs, .. } => {
                let data = at(json!({ "content_index": 0, "text": text, "logprobs": logprobs }));
                self.event("response.output_text.done", data, out);
                self.event("response.content_part.done", at(json!({ "content_index": 0, "part": part })), out);
            }
            Item::Call { call, .. } => {
                let data = at(json!({ "name": call.name, "arguments": call.arguments }));
                self.event("response.function_call_arguments.done", data, out);
            }
        }
        self.event("response.output_item.done", json!({ "output_index": index, "item": done }), out);
    }

    fn parts(&mut self, parts: Vec<ReplyPart>, out: &mut Vec<Chunk>) {
        for part in parts {
            match part {
                ReplyPart::Reasoning(delta) => {
                    if !matches!(self.items.last(), Some(Item::Reasoning { .. })) {
                        self.begin(Item::Reasoning { id: unique_id("rs_"), text: String::new() }, out);
                    }
                    self.held_logprobs.clear();
                    if let Some(Item::Reasoning { text, .. }) = self.items.last_mut() {
                        text.push_str(&delta);
                    }
                    self.delta("response.reasoning_text.delta", json!({ "content_index": 0, "delta": delta }), out);
                }
                ReplyPart::Content(delta) => {
                    if !matches!(self.items.last(), Some(Item::Message { .. })) {
                        let item = Item::Message { id: unique_id("msg_"), text: String::new(), logprobs: Vec::new() };
                        self.begin(item, out);
                    }
                    let told = std::mem::take(&mut self.held_logprobs);
                    if let Some(Item::Message { text, logprobs, .. }) = self.items.last_mut() {
                        text.push_str(&delta);
                        logprobs.extend(told.iter().cloned());
                    }
                    let data = json!({ "content_index": 0, "delta": delta, "logprobs": told });
                    self.delta("response.output_text.delta", data, out);
                }
                ReplyPart::ToolCall { id, name, .. } => {
                    self.held_logprobs.clear();
                    self.begin(Item::Call { id: unique_id("fc_"), call: Call::new(id, name) }, out);
                }
                ReplyPart::ToolArguments { delta, .. } => {
                    if let Some(Item::Call { call, .. }) = self.items.last_mut() {
                        call.arguments.push_str(&delta);
                    }
                    self.delta("response.function_call_arguments.delta", json!({ "delta": delta }), out);
                }
            }
        }
    }

    fn delta(&mut self, name: &'static str, mut data: Value, out: &mut Vec<Chunk>) {
        data["output_index"] = self.items.len().saturating_sub(1).into();
        data["item_id"] = self.items.last().map_or("", |item| item.id()).into();
        self.event(name, data, out);
    }
}

impl Render for ResponseWriter {
    const DONE: bool = false;

    fn start(&mut self) -> Vec<Chunk> {
        let mut out = Vec::new();
        let object = self.object("in_progress");
        self.event("response.created", json!({ "response": object }), &mut out);
        self.event("response.in_progress", json!({ "response": object }), &mut out);
        out
    }

    fn step(&mut self, _: usize, step: Step) -> Vec<Chunk> {
        let mut out = Vec::new();
        match step {
            Step::Prompt(_) => {}
            Step::Piece(Piece { text, token, finish, .. }) => {
                if let Some(token) = token.filter(|_| self.echo.logprobs) {
                    self.hold(&[token]);
                }
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
        let status = self.status();
        self.finish_item(status, &mut out);
        let name = if status == "incomplete" { "response.incomplete" } else { "response.completed" };
        let object = self.object(status);
        self.event(name, json!({ "response": object }), &mut out);
        out
    }

    fn failed(&mut self, error: &ApiError) -> Vec<Chunk> {
        let mut out = Vec::new();
        let mut object = self.object("failed");
        object["error"] = json!({ "code": error.code.unwrap_or("server_error"), "message": error.message });
        self.event("response.failed", json!({ "response": object }), &mut out);
        out
    }
}
