//! Calls whose arguments stand between tags, each value as it is: `glm45` and `qwen3_coder`. Of them JSON is made.

use serde_json::Value;

use super::json::push_escaped;
use super::markers::Markers;
use super::parameters::{Kind, Parameters};
use super::{CallReader, MAX_HELD, Parts, is_name};

/// Longest name of a function, and longest key.
const MAX_NAME: usize = 256;

/// Where in a reply; what may stand there beside markers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Content.
    Text,
    /// Behind the tag that opens a call, before its name: blanks.
    Open,
    /// The function's name, with blanks around it.
    Name,
    /// Between arguments: blanks.
    Between,
    Key,
    /// Between key and value: blanks.
    Gap,
    Value,
    /// Behind the arguments, before the tag that closes the call: blanks.
    Close,
}

/// A format: which marker leads from where to where.
#[derive(Debug)]
pub(super) struct Dialect {
    /// From a place, by a marker, to a place.
    pub(super) ways: &'static [(Place, &'static str, Place)],
    /// A line end at a value's start belongs to its tag.
    pub(super) values_on_lines: bool,
}

/// `<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>v</arg_value>\n</tool_call>`: GLM-4.5 and later.
pub(super) const GLM45: Dialect = Dialect {
    ways: &[
        (Place::Text, "<tool_call>", Place::Name),
        (Place::Name, "<arg_key>", Place::Key),
        (Place::Name, "</tool_call>", Place::Text),
        (Place::Key, "</arg_key>", Place::Gap),
        (Place::Gap, "<arg_value>", Place::Value),
        (Place::Value, "</arg_value>", Place::Between),
        (Place::Between, "<arg_key>", Place::Key),
        (Place::Between, "</tool_call>", Place::Text),
    ],
    values_on_lines: false,
};

/// `<tool_call>\n<function=f>\n<parameter=k>\nv\n</parameter>\n</function>\n</tool_call>`: Qwen3-Coder, which at times leaves out
/// the outer tags.
pub(super) const QWEN3_CODER: Dialect = Dialect {
    ways: &[
        (Place::Text, "<tool_call>", Place::Open),
        (Place::Text, "<function=", Place::Name),
        (Place::Open, "<function=", Place::Name),
        (Place::Name, ">", Place::Between),
        (Place::Between, "<parameter=", Place::Key),
        (Place::Between, "</function>", Place::Close),
        (Place::Key, ">", Place::Value),
        (Place::Value, "\n</parameter>", Place::Between),
        (Place::Value, "</parameter>", Place::Between),
        (Place::Close, "<function=", Place::Name),
        (Place::Close, "</tool_call>", Place::Text),
    ],
    values_on_lines: true,
};

/// Reads the calls of a dialect.
#[derive(Debug)]
pub(super) struct Tagged {
    dialect: &'static Dialect,
    parameters: Parameters,
    place: Place,
    markers: Markers,
    /// Text that no part holds yet.
    held: String,
    /// The name, the key or the value that is being read.
    text: String,
    name: String,
    /// Arguments of this call so far.
    arguments: usize,
    kind: Kind,
    /// Of a value: its opening quote is told.
    is_quoted: bool,
    /// Of a value: a line end that comes next is its tag's.
    skips_line: bool,
}

impl Tagged {
    pub(super) fn new(dialect: &'static Dialect, tools: &[Value]) -> Tagged {
        let mut tagged = Tagged {
            dialect,
            parameters: Parameters::of(tools),
            place: Place::Text,
            markers: Markers::new([]),
            held: String::new(),
            text: String::new(),
            name: String::new(),
            arguments: 0,
            kind: Kind::Json,
            is_quoted: false,
            skips_line: false,
        };
        tagged.go(Place::Text);
        tagged
    }

    fn go(&mut self, place: Place) {
        self.place = place;
        self.text.clear();
        self.markers = self.markers_here();
    }

    fn markers_here(&self) -> Markers {
        Markers::new(self.ways().map(|(marker, _)| marker))
    }

    /// Markers that lead on from here, and where to.
    fn ways(&self) -> impl Iterator<Item = (&'static str, Place)> + use<> {
        let place = self.place;
        self.dialect.ways.iter().filter(move |(from, ..)| *from == place).map(|&(_, marker, to)| (marker, to))
    }

    /// Takes a character that is no part of a marker; `false` when no call goes on with it.
    fn take(&mut self, c: char, out: &mut Parts) -> bool {
        match self.place {
            Place::Text => out.content(c.encode_utf8(&mut [0; 4])),
            Place::Value => self.take_value(c, out),
            _ if self.held.len() > MAX_HELD => return false,
            Place::Open | Place::Between | Place::Gap | Place::Close => {
                self.held.push(c);
                return c.is_whitespace();
            }
            Place::Name | Place::Key => {
                let (is_blank, is_key) = (c.is_whitespace(), self.place == Place::Key);
                let has_ended = self.text.ends_with(char::is_whitespace) && !self.text.trim().is_empty();
                self.held.push(c);
                self.text.push(c);
                return self.text.len() <= MAX_NAME && (is_key || is_blank || (is_name(c) && !has_ended));
            }
        }
        true
    }

    fn take_value(&mut self, c: char, out: &mut Parts) {
        if std::mem::take(&mut self.skips_line) && c == '\n' {
            return;
        }
        if self.is_quoted {
            let mut json = String::new();
            push_escaped(c, &mut json);
            return out.arguments(&json);
        }
        self.text.push(c);
        if self.kind == Kind::Text || self.text.len() > MAX_HELD {
            self.is_quoted = true;
            out.arguments(&format!("\"{}", escaped(&self.text)));
            self.text.clear();
        }
    }

    /// Follows a marker; `false` when what it ends is not what it should be.
    fn follow(&mut self, marker: &str, to: Place, out: &mut Parts) -> bool {
        self.held.push_str(marker);
        match self.place {
            Place::Name => {
                self.name = self.text.trim().to_string();
                if self.name.is_empty() {
                    return false;
                }
                self.arguments = 0;
                out.call(None, &self.name);
                out.arguments("{");
            }
            Place::Key => {
                let key = self.text.trim();
                if key.is_empty() {
                    return false;
                }
                let comma = if self.arguments > 0 { ", " } else { "" };
                out.arguments(&format!("{comma}\"{}\": ", escaped(key)));
                self.kind = self.parameters.kind(&self.name, key);
                (self.arguments, self.is_quoted) = (self.arguments + 1, false);
            }
            Place::Value => {
                let value = std::mem::take(&mut self.text);
                out.arguments(&if self.is_quoted { "\"".to_string() } else { as_json(&value, self.kind) });
            }
            _ => {}
        }
        let ends = matches!(self.place, Place::Name | Place::Between) && matches!(to, Place::Text | Place::Close);
        if ends {
            out.arguments("}");
        }
        // What is told is told. What opens a call or an argument may yet be content.
        if !matches!(self.place, Place::Text | Place::Open) {
            self.held.clear();
            self.held.push_str(if to == Place::Key { marker } else { "" });
        }
        self.go(to);
        match to {
            Place::Text => self.markers = self.markers_here().skipping_space(),
            Place::Value => self.skips_line = self.dialect.values_on_lines,
            _ => {}
        }
        true
    }

    /// What was read is content, and so is `next`, unless it begins a call.
    fn content(&mut self, next: &str, out: &mut Parts) {
        out.content(&std::mem::take(&mut self.held));
        self.go(Place::Text);
        next.chars().for_each(|c| self.push(c, out));
    }
}

impl CallReader for Tagged {
    fn push(&mut self, c: char, out: &mut Parts) {
        let mut text = String::new();
        let found = self.markers.push(c, &mut text).and_then(|found| self.ways().nth(found));
        for (at, next) in text.char_indices() {
            let before = self.held.len();
            if !self.take(next, out) {
                self.held.truncate(before);
                let marker = found.map_or("", |(marker, _)| marker);
                let rest = text[at..].to_string() + marker + &self.markers.take_held();
                return self.content(&rest, out);
            }
        }
        if let Some((marker, to)) = found
            && !self.follow(marker, to, out)
        {
            self.content("", out);
        }
    }

    fn finish(&mut self, out: &mut Parts) {
        let rest = self.markers.take_held();
        match self.place {
            Place::Text => out.content(&rest),
            Place::Value => {
                rest.chars().for_each(|c| self.take_value(c, out));
                out.arguments(&std::mem::take(&mut self.text));
            }
            _ => {
                self.held.push_str(&rest);
                if !self.held.trim().is_empty() {
                    out.content(&self.held);
                }
            }
        }
        self.held.clear();
        self.go(Place::Text);
    }
}

fn escaped(text: &str) -> String {
    let mut json = String::new();
    text.chars().for_each(|c| push_escaped(c, &mut json));
    json
}

/// A whole value as JSON: as it is where it is JSON, or one of Python's constants; else as a string.
fn as_json(value: &str, kind: Kind) -> String {
    let literal = value.trim();
    match (kind, literal) {
        (Kind::TextOrNull | Kind::Json, "null" | "None") => "null".to_string(),
        (Kind::Json, "True") => "true".to_string(),
        (Kind::Json, "False") => "false".to_string(),
        (Kind::Json, _) if serde_json::from_str::<serde::de::IgnoredAny>(literal).is_ok() => literal.to_string(),
        _ => format!("\"{}\"", escaped(value)),
    }
}
