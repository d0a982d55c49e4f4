//! `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`: Hermes, Qwen2.5, Qwen3.

use super::call_object::{CallObject, Read};
use super::markers::Markers;
use super::{CallReader, Parts};

pub(super) const OPEN: &str = "<tool_call>";
pub(super) const CLOSE: &str = "</tool_call>";

/// Where in a reply.
#[derive(Debug)]
pub(super) enum Hermes {
    /// Between calls.
    Text(Markers),
    Object(CallObject),
    /// Behind an object: blanks, what may be the closing tag; or another object, which some models write in the same tags.
    Behind(String),
}

impl Hermes {
    pub(super) fn new() -> Hermes {
        Hermes::Text(Markers::new([OPEN]))
    }

    /// What was read is content, and `c` the next character of it.
    fn content(&mut self, text: &str, c: char, out: &mut Parts) {
        out.content(text);
        *self = Hermes::new();
        self.push(c, out);
    }
}

impl CallReader for Hermes {
    fn push(&mut self, c: char, out: &mut Parts) {
        match self {
            Hermes::Text(markers) => {
                let mut text = String::new();
                let found = markers.push(c, &mut text);
                out.content(&text);
                if found.is_some() {
                    *self = Hermes::Object(CallObject::after(OPEN));
                }
            }
            Hermes::Object(object) => match object.push(c, out) {
                Read::More => {}
                Read::Done => *self = Hermes::Behind(String::new()),
                Read::Refused => {
                    let text = object.take_held();
                    self.content(&text, c, out);
                }
            },
            Hermes::Behind(held) => {
                let tag = held.trim_start().len();
                if tag == 0 && c == '{' {
                    let mut next = CallObject::after(std::mem::take(held));
                    next.push(c, out);
                    *self = Hermes::Object(next);
                } else if CLOSE[tag..].starts_with(c) {
                    held.push(c);
                    if tag + 1 == CLOSE.len() {
                        *self = Hermes::Text(Markers::new([OPEN]).skipping_space());
                    }
                } else if tag == 0 && c.is_whitespace() && held.len() < super::MAX_HELD {
                    held.push(c);
                } else {
                    let text = std::mem::take(held);
                    self.content(&text, c, out);
                }
            }
        }
    }

    fn finish(&mut self, out: &mut Parts) {
        match self {
            Hermes::Text(markers) => out.content(&markers.take_held()),
            Hermes::Object(object) => out.content(&object.take_held()),
            Hermes::Behind(held) => out.content(held.trim_start()),
        }
        *self = Hermes::new();
    }
}
