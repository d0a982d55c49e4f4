//! `[TOOL_CALLS] [{"name": "f", "arguments": {...}}]`, and since the tokenizer's version 11 `[TOOL_CALLS]f[ARGS]{...}`, with
//! `[CALL_ID]id` before `[ARGS]` in some, and one marker for each call.

use super::call_object::{CallObject, Read};
use super::json::{Event, JsonScan, push_verbatim};
use super::markers::Markers;
use super::{CallReader, MAX_HELD, Parts, is_name};

pub(super) const CALLS: &str = "[TOOL_CALLS]";
pub(super) const CALL_ID: &str = "[CALL_ID]";
pub(super) const ARGS: &str = "[ARGS]";

/// Longest name and longest id.
const MAX_NAME: usize = 256;

/// Where in a reply.
#[derive(Debug)]
pub(super) enum Mistral {
    Text(Markers),
    /// Behind the marker, before the first character that tells which form this is.
    Start(String),
    Object {
        object: CallObject,
        in_array: bool,
    },
    /// Behind an object of the array.
    Behind(String),
    Name(Head),
    Arguments(JsonScan),
}

/// What is between the marker and the arguments in the newer form.
#[derive(Debug)]
pub(super) struct Head {
    held: String,
    /// Name, and after its marker the id.
    fields: Vec<String>,
    markers: Markers,
    /// `[ARGS]` was seen.
    is_over: bool,
}

impl Mistral {
    pub(super) fn new() -> Mistral {
        Mistral::Text(Markers::new([CALLS]))
    }

    /// What was read is content, and so is `next`, unless it begins a call.
    fn content(&mut self, text: &str, next: &str, out: &mut Parts) {
        out.content(text);
        *self = Mistral::new();
        next.chars().for_each(|c| self.push(c, out));
    }

    fn behind_call() -> Mistral {
        Mistral::Text(Markers::new([CALLS]).skipping_space())
    }
}

impl CallReader for Mistral {
    fn push(&mut self, c: char, out: &mut Parts) {
        match self {
            Mistral::Text(markers) => {
                let mut text = String::new();
                let found = markers.push(c, &mut text);
                out.content(&text);
                if found.is_some() {
                    *self = Mistral::Start(CALLS.to_string());
                }
            }
            Mistral::Start(held) => match c {
                '[' => *self = Mistral::Object { object: CallObject::after(held.clone() + "["), in_array: true },
                '{' => {
                    let mut object = CallObject::after(std::mem::take(held));
                    object.push(c, out);
                    *self = Mistral::Object { object, in_array: false };
                }
                _ if c.is_whitespace() && held.len() < MAX_HELD => held.push(c),
                _ => {
                    *self = Mistral::Name(Head::after(std::mem::take(held)));
                    self.push(c, out);
                }
            },
            Mistral::Object { object, in_array } => match object.push(c, out) {
                Read::More => {}
                Read::Done if *in_array => *self = Mistral::Behind(String::new()),
                Read::Done => *self = Mistral::behind_call(),
                Read::Refused => {
                    let text = object.take_held();
                    self.content(&text, c.encode_utf8(&mut [0; 4]), out);
                }
            },
            Mistral::Behind(held) => match c {
                ']' => *self = Mistral::behind_call(),
                ',' => *self = Mistral::Object { object: CallObject::after(held.clone() + ","), in_array: true },
                _ if c.is_whitespace() && held.len() < MAX_HELD => held.push(c),
                _ => {
                    let text = std::mem::take(held);
                    self.content(&text, c.encode_utf8(&mut [0; 4]), out);
                }
            },
            Mistral::Name(head) => match head.push(c) {
                Ok(false) => {}
                Ok(true) => {
                    let mut fields = std::mem::take(&mut head.fields).into_iter();
                    let name = fields.next().unwrap_or_default();
                    out.call(fields.next().map(|id| id.trim().to_string()), name.trim());
                    *self = Mistral::Arguments(JsonScan::new());
                    self.push(c, out);
                }
                Err(next) => {
                    let text = std::mem::take(&mut head.held);
                    self.content(&text, &next, out);
                }
            },
            Mistral::Arguments(scan) => {
                let in_text = scan.in_text();
                match scan.push(c) {
                    None => self.content("", c.encode_utf8(&mut [0; 4]), out),
                    Some(event) => {
                        let mut text = String::new();
                        push_verbatim(c, in_text, &mut text);
                        out.arguments(&text);
                        if event == Event::End && scan.depth() == 0 {
                            *self = Mistral::behind_call();
                        }
                    }
                }
            }
        }
    }

    fn finish(&mut self, out: &mut Parts) {
        match self {
            Mistral::Text(markers) => out.content(&markers.take_held()),
            Mistral::Start(held) => out.content(held),
            Mistral::Object { object, .. } => out.content(&object.take_held()),
            Mistral::Name(head) => out.content(&(head.held.clone() + &head.markers.take_held())),
            Mistral::Behind(_) | Mistral::Arguments(_) => {}
        }
        *self = Mistral::new();
    }
}

impl Head {
    fn after(held: String) -> Head {
        Head { held, fields: vec![String::new()], markers: Markers::new([ARGS, CALL_ID]), is_over: false }
    }

    /// Takes a character: whether it is the first of the arguments, which is not taken. What does not belong here comes back as an
    /// error.
    fn push(&mut self, c: char) -> Result<bool, String> {
        let mut text = String::new();
        let found = self.markers.push(c, &mut text);
        for (at, next) in text.char_indices() {
            let is_last = found.is_none() && at + next.len_utf8() == text.len();
            if next == '{' && is_last && self.is_named() {
                return Ok(true);
            }
            if !self.fits(next) {
                let marker = found.map_or(String::new(), |marker| [ARGS, CALL_ID][marker].to_string());
                return Err(text[at..].to_string() + &marker + &self.markers.take_held());
            }
            self.held.push(next);
            if !self.is_over
                && let Some(field) = self.fields.last_mut()
            {
                field.push(next);
            }
        }
        match found {
            Some(0) if self.is_named() && !self.is_over => self.is_over = true,
            Some(1) if self.is_named() && self.fields.len() == 1 && !self.is_over => self.fields.push(String::new()),
            Some(marker) => return Err([ARGS, CALL_ID][marker].to_string()),
            None => return Ok(false),
        }
        self.held.push_str([ARGS, CALL_ID][found.unwrap_or_default()]);
        Ok(false)
    }

    fn is_named(&self) -> bool {
        self.fields.iter().all(|field| !field.trim().is_empty())
    }

    /// Whether a character may come next: of a name or an id, or a blank behind it.
    fn fits(&self, c: char) -> bool {
        let field = self.fields.last().map_or("", String::as_str);
        if self.is_over || field.ends_with(char::is_whitespace) {
            return c.is_whitespace() && self.held.len() < 4 * MAX_NAME;
        }
        field.len() < MAX_NAME && (is_name(c) || (c.is_whitespace() && !field.is_empty()))
    }
}
