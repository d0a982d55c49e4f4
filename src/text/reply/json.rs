//! JSON that comes a character at a time: where strings and values begin and end, and where it stops being JSON.

/// Containers within each other; as `serde_json` has it.
const MAX_DEPTH: usize = 128;

/// Follows one JSON value (RFC 8259), but for control characters in strings, which models write and
/// [`push_verbatim`] mends.
#[derive(Debug)]
pub(super) struct JsonScan {
    state: State,
    /// Of each open container, whether it is an object.
    open: Vec<bool>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    /// A value, or the end of the array that was just opened.
    Value {
        or_end: bool,
    },
    /// A key, or the end of the object that was just opened.
    Key {
        or_end: bool,
    },
    Colon,
    /// A comma or the container's end.
    Next,
    Text {
        key: bool,
    },
    Escape {
        key: bool,
    },
    Hex {
        key: bool,
        left: u8,
    },
    /// What is left of `true`, `false`, `null`.
    Word(&'static str),
    Number(Number),
    End,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Number {
    Sign,
    Zero,
    Digits,
    Point,
    Fraction,
    E,
    ESign,
    Exponent,
}

/// What a character did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Event {
    /// Nothing of note.
    Inside,
    /// Ended the key of a member.
    Key,
    /// Began a value.
    Begin,
    /// Ended a string, an object or an array that is a value.
    End,
}

impl JsonScan {
    /// Before a value, which blanks may precede.
    pub(super) fn new() -> JsonScan {
        JsonScan { state: State::Value { or_end: false }, open: Vec::new() }
    }

    /// Containers that are open.
    pub(super) fn depth(&self) -> usize {
        self.open.len()
    }

    /// Whether the next character is part of a string.
    pub(super) fn in_text(&self) -> bool {
        matches!(self.state, State::Text { .. } | State::Escape { .. } | State::Hex { .. })
    }

    /// Takes a character; `None` when there is no JSON that goes on with it, and the scan is then over.
    pub(super) fn push(&mut self, c: char) -> Option<Event> {
        if let State::Number(number) = self.state {
            match number.then(c) {
                Some(next) => {
                    self.state = State::Number(next);
                    return Some(Event::Inside);
                }
                None if number.is_whole() => self.state = self.after_value(),
                None => return None,
            }
        }
        match self.state {
            State::Text { key } => match c {
                '"' if key => self.go(State::Colon, Event::Key),
                '"' => self.go(self.after_value(), Event::End),
                '\\' => self.go(State::Escape { key }, Event::Inside),
                _ => Some(Event::Inside),
            },
            State::Escape { key } => match c {
                'u' => self.go(State::Hex { key, left: 4 }, Event::Inside),
                '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' => self.go(State::Text { key }, Event::Inside),
                _ => None,
            },
            State::Hex { key, left } if c.is_ascii_hexdigit() => {
                let next = if left == 1 { State::Text { key } } else { State::Hex { key, left: left - 1 } };
                self.go(next, Event::Inside)
            }
            State::Hex { .. } => None,
            State::Word(rest) => match rest.strip_prefix(c)? {
                "" => self.go(self.after_value(), Event::Inside),
                rest => self.go(State::Word(rest), Event::Inside),
            },
            _ if matches!(c, ' ' | '\t' | '\n' | '\r') => Some(Event::Inside),
            State::Value { or_end: true } if c == ']' => self.close(),
            State::Value { .. } => self.begin(c),
            State::Key { or_end: true } if c == '}' => self.close(),
            State::Key { .. } if c == '"' => self.go(State::Text { key: true }, Event::Inside),
            State::Colon if c == ':' => self.go(State::Value { or_end: false }, Event::Inside),
            State::Next => match (c, self.open.last()?) {
                (',', true) => self.go(State::Key { or_end: false }, Event::Inside),
                (',', false) => self.go(State::Value { or_end: false }, Event::Inside),
                ('}', true) | (']', false) => self.close(),
                _ => None,
            },
            _ => None,
        }
    }

    fn begin(&mut self, c: char) -> Option<Event> {
        let state = match c {
            '{' | '[' => {
                if self.open.len() == MAX_DEPTH {
                    return None;
                }
                self.open.push(c == '{');
                if c == '{' { State::Key { or_end: true } } else { State::Value { or_end: true } }
            }
            '"' => State::Text { key: false },
            't' => State::Word("rue"),
            'f' => State::Word("alse"),
            'n' => State::Word("ull"),
            '-' => State::Number(Number::Sign),
            '0' => State::Number(Number::Zero),
            '1'..='9' => State::Number(Number::Digits),
            _ => return None,
        };
        self.go(state, Event::Begin)
    }

    fn close(&mut self) -> Option<Event> {
        self.open.pop();
        self.go(self.after_value(), Event::End)
    }

    fn after_value(&self) -> State {
        if self.open.is_empty() { State::End } else { State::Next }
    }

    fn go(&mut self, state: State, event: Event) -> Option<Event> {
        self.state = state;
        Some(event)
    }
}

impl Number {
    fn then(self, c: char) -> Option<Number> {
        use Number::*;
        Some(match (self, c) {
            (Sign, '0') => Zero,
            (Sign, '1'..='9') | (Digits, '0'..='9') => Digits,
            (Zero | Digits, '.') => Point,
            (Point | Fraction, '0'..='9') => Fraction,
            (Zero | Digits | Fraction, 'e' | 'E') => E,
            (E, '+' | '-') => ESign,
            (E | ESign | Exponent, '0'..='9') => Exponent,
            _ => return None,
        })
    }

    fn is_whole(self) -> bool {
        matches!(self, Number::Zero | Number::Digits | Number::Fraction | Number::Exponent)
    }
}

/// Adds a character of JSON as it is; one that may not stand in a string (`in_text`) as its escape.
pub(super) fn push_verbatim(c: char, in_text: bool, json: &mut String) {
    if in_text && c < ' ' { push_escaped(c, json) } else { json.push(c) }
}

/// Adds a character of text as a JSON string holds it.
pub(super) fn push_escaped(c: char, json: &mut String) {
    match c {
        '"' => json.push_str("\\\""),
        '\\' => json.push_str("\\\\"),
        '\n' => json.push_str("\\n"),
        '\r' => json.push_str("\\r"),
        '\t' => json.push_str("\\t"),
        c if c < ' ' => json.push_str(&format!("\\u{:04x}", u32::from(c))),
        c => json.push(c),
    }
}
