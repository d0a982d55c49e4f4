//! The Jinja dialect of chat templates: what transformers adds to Jinja, and Python's ways where minijinja differs.

use std::fmt::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::value::{Kwargs, Object, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};

use super::jinja_values::{python_float, python_str};
use super::{jinja_filters, jinja_strings};

/// Instructions one rendering may execute: seconds at most, and thousands of times what templates in use need.
const FUEL: u64 = 20_000_000;
/// Bytes that one rendering may write, `set` blocks and macros included.
pub(super) const MAX_OUTPUT_BYTES: usize = 64 << 20;

/// A message of `raise_exception`: the template refuses the conversation.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// An environment that renders as `transformers.apply_chat_template` does, within limits.
pub(super) fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_fuel(Some(FUEL));
    env.set_formatter(format);
    env.set_unknown_method_callback(jinja_strings::method);
    jinja_filters::add_to(&mut env);
    env.add_filter("tojson", tojson);
    env.add_filter("string", |value: &Value| python_str(value));
    env.add_test("iterable", |value: &Value| value.as_str().is_some() || value.try_iter().is_ok());
    env.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
    });
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    env
}

/// Bytes written so far by one rendering.
#[derive(Debug, Default)]
struct Written(AtomicUsize);

impl Object for Written {}

/// Writes an expression's value as Python would, counting bytes wherever they go.
fn format(out: &mut Output, state: &State, value: &Value) -> Result<(), Error> {
    let owned;
    let text = match value.as_str() {
        Some(text) => text,
        None => {
            owned = python_str(value);
            &owned
        }
    };
    let written = state.get_or_set_temp_object("written", Written::default);
    if written.0.fetch_add(text.len(), Ordering::Relaxed) + text.len() > MAX_OUTPUT_BYTES {
        let reason = format!("writes more than {} MiB", MAX_OUTPUT_BYTES >> 20);
        return Err(Error::new(ErrorKind::InvalidOperation, reason));
    }
    out.write_str(text).map_err(Error::from)
}

/// transformers' `tojson`: Python's `json.dumps`, nothing escaped for HTML.
fn tojson(value: &Value, args: Rest<Value>) -> Result<Value, Error> {
    let (positional, kwargs): (&[Value], Kwargs) = minijinja::value::from_args(&args)?;
    let argument = |at: usize, name: &str| -> Result<Option<Value>, Error> {
        let value = match positional.get(at) {
            Some(value) => Some(value.clone()),
            None => kwargs.get(name)?,
        };
        Ok(value.filter(|v| !v.is_none() && !v.is_undefined()))
    };
    let ensure_ascii = argument(0, "ensure_ascii")?.is_some_and(|v| v.is_true());
    let indent = match argument(1, "indent")? {
        Some(v) if v.as_str().is_some() => Some(python_str(&v)),
        Some(v) => Some(" ".repeat(usize::try_from(v)?.min(64))),
        None => None,
    };
    let default = [if indent.is_some() { "," } else { ", " }, ": "].map(String::from);
    let separators = match argument(2, "separators")? {
        Some(v) => [v.get_item_by_index(0)?, v.get_item_by_index(1)?].map(|v| python_str(&v)),
        None => default,
    };
    let sort_keys = argument(3, "sort_keys")?.is_some_and(|v| v.is_true());
    kwargs.assert_all_used()?;
    let mut json = Json { out: String::new(), ensure_ascii, indent, separators, sort_keys };
    json.write(value, 0)?;
    Ok(Value::from(json.out))
}

/// A writer of JSON in the manner of Python's `json.dumps`.
struct Json {
    out: String,
    ensure_ascii: bool,
    indent: Option<String>,
    /// Between items, and between a key and its value.
    separators: [String; 2],
    sort_keys: bool,
}

impl Json {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let refused = |reason: String| Err(Error::new(ErrorKind::InvalidOperation, reason));
        if depth > 128 || self.out.len() > MAX_OUTPUT_BYTES {
            return refused("tojson: the value is nested too deeply or too large".to_string());
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.out.push_str(&value.to_string()),
            ValueKind::Number => match f64::try_from(value.clone())? {
                x if x.is_nan() => self.out.push_str("NaN"),
                x if x.is_infinite() => self.out.push_str(if x > 0.0 { "Infinity" } else { "-Infinity" }),
                x => self.out.push_str(&python_float(x)),
            },
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.out.push('{');
                for (i, key) in keys.iter().enumerate() {
                    self.separate(i, depth + 1);
                    match key.kind() {
                        ValueKind::None => self.out.push_str("\"null\""),
                        ValueKind::Bool => self.out.push_str(if key.is_true() { "\"true\"" } else { "\"false\"" }),
                        _ => self.string(&python_str(key)),
                    }
                    self.out.push_str(&self.separators[1]);
                    self.write(&value.get_item(key)?, depth + 1)?;
                }
                self.close('}', keys.is_empty(), depth);
            }
            ValueKind::Seq | ValueKind::Iterable => {
                self.out.push('[');
                let mut empty = true;
                for (i, item) in value.try_iter()?.enumerate() {
                    empty = false;
                    self.separate(i, depth + 1);
                    self.write(&item, depth + 1)?;
                }
                self.close(']', empty, depth);
            }
            kind => return refused(format!("tojson: a value of kind {kind} has no JSON form")),
        }
        Ok(())
    }

    fn separate(&mut self, i: usize, depth: usize) {
        if i > 0 {
            self.out.push_str(&self.separators[0]);
        }
        self.new_line(depth);
    }

    fn close(&mut self, bracket: char, empty: bool, depth: usize) {
        if !empty {
            self.new_line(depth);
        }
        self.out.push(bracket);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a string cannot fail.
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// `strftime` of a moment in UTC, given in seconds since 1970. Unknown directives stay as they are.
pub(super) fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
    let days = seconds / 86_400;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    // 400 years are 146,097 days; what is left takes at most 400 steps.
    let (mut year, mut day) = (1970 + days / 146_097 * 400, days % 146_097);
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let year_day = day + 1;
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    let (month_name, day_name) = (MONTHS[month], DAYS[((days + 3) % 7) as usize]);
    let (month, day, hour12) = (month + 1, day + 1, (hour + 11) % 12 + 1);

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next();
        let (unpadded, directive) = if directive == Some('-') { (true, chars.next()) } else { (false, directive) };
        let number = |n: u64, width: usize| if unpadded { n.to_string() } else { format!("{n:0width$}") };
        out.push_str(&match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month as u64, 2),
            Some('d') => number(day, 2),
            Some('e') => format!("{day:2}"),
            Some('j') => number(year_day, 3),
            Some('H') => number(hour, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('f') => "000000".to_string(),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_string(),
            Some('B') => month_name.to_string(),
            Some('b' | 'h') => month_name[..3].to_string(),
            Some('A') => day_name.to_string(),
            Some('a') => day_name[..3].to_string(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('R') => format!("{hour:02}:{minute:02}"),
            Some('D' | 'x') => format!("{month:02}/{day:02}/{:02}", year % 100),
            Some('X') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('c') => {
                format!("{} {} {day:2} {hour:02}:{minute:02}:{second:02} {year}", &day_name[..3], &month_name[..3])
            }
            Some('Z') => "UTC".to_string(),
            Some('z') => "+0000".to_string(),
            Some('%') => "%".to_string(),
            Some(other) => format!("%{other}"),
            None => "%".to_string(),
        });
    }
    out
}
