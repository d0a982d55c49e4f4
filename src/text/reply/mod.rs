//! A model's reply, taken apart as it is generated: reasoning, content, tool calls.
//!
//! ```
//! use lowbit::text::{ReasoningFormat, ReplyParser, ReplyPart, ToolFormat};
//!
//! let mut parser = ReplyParser::new(Some(ReasoningFormat::Think), Some(ToolFormat::Hermes), false);
//! let mut parts = parser.push("<think>Two.</think><tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1");
//! parts.extend(parser.push("}}</tool_call>"));
//! parts.extend(parser.finish());
//! assert_eq!(parts[0], ReplyPart::Reasoning("Two.".to_string()));
//! assert_eq!(parts[1], ReplyPart::ToolCall { index: 0, id: None, name: "add".to_string() });
//! assert_eq!(parts[2], ReplyPart::ToolArguments { index: 0, delta: "{\"a\": 1".to_string() });
//! assert_eq!(parts[3], ReplyPart::ToolArguments { index: 0, delta: "}".to_string() });
//! ```

mod call_object;
mod format;
mod grammar;
mod hermes;
mod json;
mod llama3_json;
mod markers;
mod mistral;
mod parameters;
mod reasoning;
mod tagged;

pub use format::ToolFormat;
pub use reasoning::ReasoningFormat;

use std::fmt::Debug;

use reasoning::Reasoning;
use serde_json::Value;

/// Bytes that are held back at most until it is decided what they are.
const MAX_HELD: usize = 64 << 10;

/// A piece of a reply. Pieces of one kind that follow one another are to be joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplyPart {
    /// What the model thinks before it answers, without the tags around it.
    Reasoning(String),
    /// The answer.
    Content(String),
    /// A tool call begins.
    ToolCall {
        /// Calls of the reply before it.
        index: usize,
        /// The call's id, where the format has one and it came before the arguments.
        id: Option<String>,
        /// The function's name, whole.
        name: String,
    },
    /// More of the arguments of the call that began last: all of them together are a JSON object, unless the text ended or
    /// went wrong before its end.
    ToolArguments {
        /// The call's index.
        index: usize,
        /// JSON text.
        delta: String,
    },
}

/// Takes a reply apart as its text comes.
///
/// What all parts say together does not depend on how the text is cut. Held back is only what may be the start of a
/// marker, and of a call what comes before its name is known and its arguments begin: 64 KiB at most. Text that looks like a call and
/// is none is content. A call that goes wrong after it was told of keeps the arguments told so far, not closed, and the rest is content.
#[derive(Debug)]
pub struct ReplyParser {
    reasoning: Option<Reasoning>,
    format: Option<ToolFormat>,
    calls: Option<Box<dyn CallReader>>,
    told: usize,
}

/// Reads the calls of one format out of a reply's content, a character at a time.
trait CallReader: Debug + Send {
    /// Takes a character.
    fn push(&mut self, c: char, out: &mut Parts);
    /// The text's end.
    fn finish(&mut self, out: &mut Parts);
}

impl ReplyParser {
    /// For one reply. Without a format its markers are content as all else is. `starts_in_reasoning`: the prompt opened the
    /// reasoning ([`ReasoningFormat::starts_in_reasoning`]).
    pub fn new(
        reasoning: Option<ReasoningFormat>,
        tools: Option<ToolFormat>,
        starts_in_reasoning: bool,
    ) -> ReplyParser {
        let reasoning = reasoning.map(|format| Reasoning::new(format, starts_in_reasoning));
        ReplyParser { reasoning, format: tools, calls: tools.map(|format| format.reader(&[])), told: 0 }
    }

    /// Lets the parser know the tools, in the shape of OpenAI's `tools`: by their schemas the formats without JSON
    /// (`glm45`, `qwen3_coder`) tell strings from other values. To be called before the first text.
    pub fn with_tools(mut self, tools: &[Value]) -> ReplyParser {
        self.calls = self.format.map(|format| format.reader(tools));
        self
    }

    /// Takes text and returns what is now certain.
    pub fn push(&mut self, text: &str) -> Vec<ReplyPart> {
        let mut out = Parts::new(self.told);
        match &mut self.reasoning {
            Some(reasoning) => {
                let mut content = String::new();
                text.chars().for_each(|c| reasoning.push(c, &mut out, &mut content));
                self.content(&content, &mut out);
            }
            None => self.content(text, &mut out),
        }
        self.told = out.told;
        out.parts
    }

    /// The text's end: what was still held back.
    pub fn finish(&mut self) -> Vec<ReplyPart> {
        let mut out = Parts::new(self.told);
        let mut content = String::new();
        if let Some(reasoning) = &mut self.reasoning {
            reasoning.finish(&mut out, &mut content);
        }
        self.content(&content, &mut out);
        if let Some(calls) = &mut self.calls {
            calls.finish(&mut out);
        }
        self.told = out.told;
        out.parts
    }

    /// Calls told of so far.
    pub fn calls(&self) -> usize {
        self.told
    }

    fn content(&mut self, text: &str, out: &mut Parts) {
        match &mut self.calls {
            Some(calls) => text.chars().for_each(|c| calls.push(c, out)),
            None => out.content(text),
        }
    }
}

/// The parts that one piece of text makes, neighbours of a kind joined.
#[derive(Debug)]
struct Parts {
    parts: Vec<ReplyPart>,
    told: usize,
}

impl Parts {
    fn new(told: usize) -> Parts {
        Parts { parts: Vec::new(), told }
    }

    fn reasoning(&mut self, text: &str) {
        match self.parts.last_mut() {
            Some(ReplyPart::Reasoning(last)) => last.push_str(text),
            _ if text.is_empty() => {}
            _ => self.parts.push(ReplyPart::Reasoning(text.to_string())),
        }
    }

    fn content(&mut self, text: &str) {
        match self.parts.last_mut() {
            Some(ReplyPart::Content(last)) => last.push_str(text),
            _ if text.is_empty() => {}
            _ => self.parts.push(ReplyPart::Content(text.to_string())),
        }
    }

    /// Begins a call.
    fn call(&mut self, id: Option<String>, name: &str) {
        self.parts.push(ReplyPart::ToolCall { index: self.told, id, name: name.to_string() });
        self.told += 1;
    }

    /// Arguments of the call begun last.
    fn arguments(&mut self, json: &str) {
        match self.parts.last_mut() {
            Some(ReplyPart::ToolArguments { delta, .. }) => delta.push_str(json),
            _ if json.is_empty() => {}
            _ => self
                .parts
                .push(ReplyPart::ToolArguments { index: self.told.saturating_sub(1), delta: json.to_string() }),
        }
    }
}

/// Whether a function's name may hold this character.
fn is_name(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | ':' | '/')
}
