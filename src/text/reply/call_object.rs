//! A call that is a JSON object: `{"name": "f", "arguments": {...}}`.

use super::json::{Event, JsonScan, push_verbatim};
use super::{MAX_HELD, Parts};

/// Reads one such object a character at a time. The call is told when its name is known and its arguments begin, and from
/// then on the arguments' text as it comes.
#[derive(Debug)]
pub(super) struct CallObject {
    scan: JsonScan,
    is_strict: bool,
    /// Text that no part holds yet.
    held: String,
    /// The key or the string of the outer object that is being read, with its quotes.
    token: String,
    member: Member,
    name: Option<String>,
    id: Option<String>,
    /// Arguments that came before the name.
    arguments: String,
    progress: Progress,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Member {
    Name,
    Id,
    Arguments,
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Progress {
    /// The call is not told.
    Head,
    /// Its arguments are under way.
    Arguments,
    /// What follows them in the object.
    Rest,
}

/// What a character did.
#[derive(Debug, PartialEq)]
pub(super) enum Read {
    /// The object goes on.
    More,
    /// The object is complete, and the call told.
    Done,
    /// No call goes on with this character, which was not taken. What was not told of is in [`CallObject::take_held`].
    Refused,
}

impl CallObject {
    /// Before an object; `before` is the text that led here, which is content if no call follows.
    pub(super) fn after(before: impl Into<String>) -> CallObject {
        CallObject {
            scan: JsonScan::new(),
            is_strict: false,
            held: before.into(),
            token: String::new(),
            member: Member::Other,
            name: None,
            id: None,
            arguments: String::new(),
            progress: Progress::Head,
        }
    }

    /// An object that no marker announced is a call only if it has arguments, and nothing that calls do not have.
    pub(super) fn strict(mut self) -> CallObject {
        self.is_strict = true;
        self
    }

    /// Takes a character.
    pub(super) fn push(&mut self, c: char, out: &mut Parts) -> Read {
        if self.progress != Progress::Arguments && self.held.len() + self.arguments.len() + c.len_utf8() > MAX_HELD {
            return Read::Refused;
        }
        let in_text = self.scan.in_text();
        let Some(event) = self.scan.push(c) else { return Read::Refused };
        if self.progress == Progress::Arguments {
            let mut text = String::new();
            push_verbatim(c, in_text, &mut text);
            out.arguments(&text);
            if event == Event::End && self.scan.depth() == 1 {
                self.progress = Progress::Rest;
            }
            return Read::More;
        }
        let Some(told) = self.read(c, event, in_text, out) else { return Read::Refused };
        if !told {
            self.held.push(c);
        }
        if self.scan.depth() == 0 && event == Event::End { Read::Done } else { Read::More }
    }

    /// The text that belongs to no part.
    pub(super) fn take_held(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Takes a character outside of arguments that are being told. Whether it told of the call, with this character and all
    /// before it; `None` when this is no call.
    fn read(&mut self, c: char, event: Event, in_text: bool, out: &mut Parts) -> Option<bool> {
        let depth = self.scan.depth();
        let ends_value = event == Event::End && depth == 1;
        // Of the outer object alone: what lies deeper is not ours.
        if depth == 1 && (in_text || self.scan.in_text()) {
            if !in_text {
                self.token.clear();
            }
            self.token.push(c);
        }
        if self.member == Member::Arguments && depth >= 1 && (depth > 1 || ends_value) {
            push_verbatim(c, in_text, &mut self.arguments);
        }
        match event {
            // The object itself: of its values, a container is one deeper.
            Event::Begin if depth == 1 && c == '{' => {}
            Event::Begin if depth == 0 || (depth == 1 && c == '[') => return None,
            Event::Key if depth == 1 => self.member = self.member_named(&self.token)?,
            Event::Begin if depth == 1 || (depth == 2 && matches!(c, '{' | '[')) => match self.member {
                Member::Name if c != '"' => return None,
                Member::Arguments if c != '{' => return None,
                Member::Arguments if self.name.is_some() => return Some(self.tell(Progress::Arguments, out)),
                Member::Id if c != '"' => self.member = Member::Other,
                _ => {}
            },
            Event::End if ends_value => {
                match self.member {
                    Member::Name => self.name = Some(serde_json::from_str(&self.token).ok()?),
                    Member::Id => self.id = Some(serde_json::from_str(&self.token).ok()?),
                    Member::Arguments | Member::Other => {}
                }
                self.member = Member::Other;
                if self.progress == Progress::Head && self.name.is_some() && !self.arguments.is_empty() {
                    return Some(self.tell(Progress::Rest, out));
                }
            }
            Event::End if depth == 0 && self.progress == Progress::Head => {
                if self.is_strict || self.name.is_none() {
                    return None;
                }
                self.arguments.push_str("{}");
                return Some(self.tell(Progress::Rest, out));
            }
            _ => {}
        }
        Some(false)
    }

    /// What a key of the outer object is for; `None` when no call has it, or has it twice.
    fn member_named(&self, key: &str) -> Option<Member> {
        let has_arguments = self.progress != Progress::Head || !self.arguments.is_empty();
        match key {
            "\"name\"" => (self.name.is_none()).then_some(Member::Name),
            "\"id\"" => Some(Member::Id),
            "\"arguments\"" | "\"parameters\"" => (!has_arguments).then_some(Member::Arguments),
            "\"type\"" => Some(Member::Other),
            _ => (!self.is_strict).then_some(Member::Other),
        }
    }

    fn tell(&mut self, progress: Progress, out: &mut Parts) -> bool {
        out.call(self.id.take(), self.name.as_deref().unwrap_or_default());
        out.arguments(&std::mem::take(&mut self.arguments));
        self.held.clear();
        self.progress = progress;
        true
    }
}
