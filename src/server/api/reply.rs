//! A model's reply in parts: reasoning, content and tool calls, whole or as it comes.

use serde_json::{Value, json};

use crate::server::app::unique_id;
use crate::text::{ReasoningFormat, ReplyParser, ReplyPart, ToolFormat};

/// How replies of a request are taken apart.
#[derive(Debug, Clone, Default)]
pub(super) struct ReplyOptions {
    pub(super) reasoning: Option<ReasoningFormat>,
    /// The prompt opened the reasoning.
    pub(super) starts_in_reasoning: bool,
    /// The format of calls with the tools that may be called; none where no call is looked for.
    pub(super) tools: Option<(ToolFormat, Vec<Value>)>,
}

impl ReplyOptions {
    /// A parser of one choice.
    pub(super) fn parser(&self) -> ReplyParser {
        let format = self.tools.as_ref().map(|(format, _)| *format);
        let parser = ReplyParser::new(self.reasoning, format, self.starts_in_reasoning);
        match &self.tools {
            Some((_, tools)) => parser.with_tools(tools),
            None => parser,
        }
    }

    /// Special tokens that the parser must see.
    pub(super) fn markers(&self) -> Vec<&'static str> {
        let of_tools = self.tools.iter().flat_map(|(format, _)| format.markers().iter().copied());
        self.reasoning.iter().flat_map(|format| format.markers()).chain(of_tools).collect()
    }

    /// Takes a whole reply apart.
    pub(super) fn whole(&self, text: &str) -> Reply {
        let mut parser = self.parser();
        let mut reply = Reply::default();
        for part in parts_of(&mut parser, text, true) {
            match part {
                ReplyPart::Reasoning(text) => reply.reasoning.push_str(&text),
                ReplyPart::Content(text) => reply.content.push_str(&text),
                ReplyPart::ToolCall { id, name, .. } => reply.calls.push(Call::new(id, name)),
                ReplyPart::ToolArguments { index, delta } => {
                    if let Some(call) = reply.calls.get_mut(index) {
                        call.arguments.push_str(&delta);
                    }
                }
            }
        }
        reply
    }
}

/// What a piece of text adds to a reply; with the last one comes what was held back.
pub(super) fn parts_of(parser: &mut ReplyParser, text: &str, is_last: bool) -> Vec<ReplyPart> {
    let mut parts = parser.push(text);
    if is_last {
        parts.extend(parser.finish());
    }
    parts
}

/// A tool call.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Call {
    pub(super) id: String,
    pub(super) name: String,
    /// JSON.
    pub(super) arguments: String,
}

impl Call {
    /// A call that begins, under an id of its own where the model gave none.
    pub(super) fn new(id: Option<String>, name: String) -> Call {
        Call { id: id.unwrap_or_else(|| unique_id("call_")), name, arguments: String::new() }
    }

    /// In OpenAI's shape.
    pub(super) fn json(&self) -> Value {
        json!({ "id": self.id, "type": "function", "function": { "name": self.name, "arguments": self.arguments } })
    }
}

/// A whole reply.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Reply {
    pub(super) reasoning: String,
    pub(super) content: String,
    pub(super) calls: Vec<Call>,
}
