//! A model's reply taken apart: examples after each format's public description, and the same however the text is cut.

mod calls;
mod forced_calls;
mod formats;
mod reasoning;

use lowbit::text::{ReasoningFormat, ReplyParser, ReplyPart, ToolFormat};
use serde_json::{Value, json};

/// What a reply says: reasoning, content, and of each call its id, name and arguments.
#[derive(Debug, Default, PartialEq)]
struct Reply {
    reasoning: String,
    content: String,
    calls: Vec<(Option<String>, String, String)>,
}

impl Reply {
    fn add(&mut self, parts: Vec<ReplyPart>) {
        for part in parts {
            match part {
                ReplyPart::Reasoning(text) => self.reasoning += &text,
                ReplyPart::Content(text) => self.content += &text,
                ReplyPart::ToolCall { index, id, name } => {
                    assert_eq!(index, self.calls.len(), "calls are counted");
                    self.calls.push((id, name, String::new()));
                }
                ReplyPart::ToolArguments { index, delta } => {
                    assert_eq!(index + 1, self.calls.len(), "arguments are those of the last call");
                    assert!(!delta.is_empty());
                    self.calls[index].2 += &delta;
                }
            }
        }
    }
}

fn parser(reasoning: Option<ReasoningFormat>, tools: Option<ToolFormat>, inside: bool) -> ReplyParser {
    ReplyParser::new(reasoning, tools, inside).with_tools(&tools_of_the_tests())
}

/// The parts of a text in these pieces.
fn read_pieces<'a>(mut parser: ReplyParser, pieces: impl IntoIterator<Item = &'a str>) -> Reply {
    let mut reply = Reply::default();
    pieces.into_iter().for_each(|piece| reply.add(parser.push(piece)));
    reply.add(parser.finish());
    assert_eq!(parser.calls(), reply.calls.len());
    reply
}

/// The reply of a text: whole, character by character, and cut in two at every character. All are the same.
fn read(make: impl Fn() -> ReplyParser, text: &str) -> Reply {
    let whole = read_pieces(make(), [text]);
    let characters: Vec<&str> = text.split_inclusive(|_| true).collect();
    assert_eq!(read_pieces(make(), characters), whole, "character by character: {text}");
    for (at, _) in text.char_indices() {
        assert_eq!(read_pieces(make(), [&text[..at], &text[at..]]), whole, "cut at {at}: {text}");
    }
    whole
}

fn calls(format: ToolFormat, text: &str) -> Reply {
    read(|| parser(None, Some(format), false), text)
}

/// Content, and name and arguments of each call.
fn said(content: &str, calls: &[(&str, &str)]) -> Reply {
    let calls = calls.iter().map(|(name, arguments)| (None, name.to_string(), arguments.to_string())).collect();
    Reply { content: content.to_string(), calls, ..Reply::default() }
}

fn tools_of_the_tests() -> Vec<Value> {
    vec![
        json!({"type": "function", "function": {"name": "get_weather", "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"enum": ["celsius", "fahrenheit"]},
                "note": {"type": ["string", "null"]},
                "where": {"$ref": "#/$defs/place"},
            },
            "required": ["city"],
            "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
        }}}),
        json!({"type": "function", "function": {"name": "now"}}),
    ]
}
