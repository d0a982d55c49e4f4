//! `{"name": "f", "parameters": {...}}; {...}`, after `<|python_tag|>` or bare: Llama 3.1 to 3.3, Llama 4.

use super::call_object::{CallObject, Read};
use super::markers::Markers;
use super::{CallReader, MAX_HELD, Parts};

pub(super) const PYTHON_TAG: &str = "<|python_tag|>";

/// Where in a reply.
#[derive(Debug)]
pub(super) enum Llama3Json {
    /// Where an object that no tag announces may be a call: at the start, and behind a call. Blanks, and behind a call a `;`.
    Open {
        held: String,
        is_behind: bool,
    },
    Object(CallObject),
    Text(Markers),
}

impl Llama3Json {
    pub(super) fn new() -> Llama3Json {
        Llama3Json::Open { held: String::new(), is_behind: false }
    }

    /// What was read is content, and `c` the next character of it.
    fn content(&mut self, text: &str, c: char, out: &mut Parts) {
        out.content(text);
        *self = Llama3Json::Text(Markers::new([PYTHON_TAG]));
        self.push(c, out);
    }
}

impl CallReader for Llama3Json {
    fn push(&mut self, c: char, out: &mut Parts) {
        match self {
            Llama3Json::Open { held, .. } if c == '{' => {
                let mut object = CallObject::after(std::mem::take(held)).strict();
                object.push(c, out);
                *self = Llama3Json::Object(object);
            }
            Llama3Json::Open { held, is_behind } => {
                let separates = c == ';' && *is_behind && !held.contains(';');
                if (c.is_whitespace() || separates) && held.len() < MAX_HELD {
                    held.push(c);
                } else {
                    // Blanks behind a call are the format's.
                    let text = if *is_behind { held.trim_start().to_string() } else { std::mem::take(held) };
                    self.content(&text, c, out);
                }
            }
            Llama3Json::Object(object) => match object.push(c, out) {
                Read::More => {}
                Read::Done => *self = Llama3Json::Open { held: String::new(), is_behind: true },
                Read::Refused => {
                    let text = object.take_held();
                    self.content(&text, c, out);
                }
            },
            Llama3Json::Text(markers) => {
                let mut text = String::new();
                let found = markers.push(c, &mut text);
                out.content(&text);
                if found.is_some() {
                    *self = Llama3Json::Object(CallObject::after(PYTHON_TAG).strict());
                }
            }
        }
    }

    fn finish(&mut self, out: &mut Parts) {
        match self {
            Llama3Json::Open { is_behind: true, .. } => {}
            Llama3Json::Open { held, .. } => out.content(held),
            Llama3Json::Object(object) => out.content(&object.take_held()),
            Llama3Json::Text(markers) => out.content(&markers.take_held()),
        }
        *self = Llama3Json::new();
    }
}
