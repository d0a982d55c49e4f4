//! What a model thinks before it answers, between two tags.

use std::fmt;
use std::str::FromStr;

use super::Parts;
use super::markers::Markers;
use crate::error::{Error, Result};

/// Blanks before the first tag that are held back.
const MAX_SPACE: usize = 256;

/// How a model marks its reasoning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReasoningFormat {
    /// `<think>...</think>`: Qwen3, DeepSeek-R1, GLM-4.5 and most others.
    Think,
    /// `[THINK]...[/THINK]`: Magistral.
    Mistral,
}

impl ReasoningFormat {
    /// The names that [`FromStr`] takes, as vLLM's `--reasoning-parser` has them.
    pub const NAMES: [&'static str; 4] = ["deepseek_r1", "qwen3", "glm45", "mistral"];

    fn tags(self) -> (&'static str, &'static str) {
        match self {
            ReasoningFormat::Think => ("<think>", "</think>"),
            ReasoningFormat::Mistral => ("[THINK]", "[/THINK]"),
        }
    }

    /// The strings that the parser looks for; some are special tokens, which a detokenizer must keep.
    pub fn markers(self) -> [&'static str; 2] {
        let (open, close) = self.tags();
        [open, close]
    }

    /// Whether the text that a model writes after this prompt begins inside its reasoning, since the template opened it.
    pub fn starts_in_reasoning(self, prompt: &str) -> bool {
        prompt.trim_end().ends_with(self.tags().0)
    }

    /// The format that a chat template knows, or else one whose tags are tokens of the vocabulary.
    pub fn detect(template: &str, has_token: impl Fn(&str) -> bool) -> Option<ReasoningFormat> {
        let formats = [ReasoningFormat::Mistral, ReasoningFormat::Think];
        let named = formats.into_iter().find(|format| format.markers().iter().any(|tag| template.contains(tag)));
        named.or_else(|| formats.into_iter().find(|format| format.markers().iter().all(|tag| has_token(tag))))
    }
}

impl fmt::Display for ReasoningFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ReasoningFormat::Think => "deepseek_r1",
            ReasoningFormat::Mistral => "mistral",
        })
    }
}

impl FromStr for ReasoningFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<ReasoningFormat> {
        match name {
            "deepseek_r1" | "qwen3" | "glm45" => Ok(ReasoningFormat::Think),
            "mistral" => Ok(ReasoningFormat::Mistral),
            _ => Err(Error::input(
                "--reasoning-parser",
                format!("`{name}` is not known: expected one of {}", ReasoningFormat::NAMES.join(", ")),
            )),
        }
    }
}

/// Parts reasoning from content. A model thinks first: a tag that opens reasoning is one only where nothing but blanks is before it.
#[derive(Debug)]
pub(super) struct Reasoning {
    format: ReasoningFormat,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// Blanks, and what may be the opening tag.
    Start { held: String },
    /// After the opening tag, before its end.
    Inside { close: Markers, is_first: bool },
    /// After it, or there is none. Line ends that come first after a tag are its own.
    Content { is_first: bool },
}

impl Reasoning {
    pub(super) fn new(format: ReasoningFormat, is_inside: bool) -> Reasoning {
        let place = if is_inside { Place::inside(format) } else { Place::Start { held: String::new() } };
        Reasoning { format, place }
    }

    /// Takes a character; what is content is added to `content`.
    pub(super) fn push(&mut self, c: char, out: &mut Parts, content: &mut String) {
        match &mut self.place {
            Place::Start { held } => {
                held.push(c);
                let (tag, open) = (held.trim_start(), self.format.tags().0);
                if tag == open {
                    self.place = Place::inside(self.format);
                } else if !open.starts_with(tag) || held.len() > MAX_SPACE {
                    content.push_str(held);
                    self.place = Place::Content { is_first: false };
                }
            }
            Place::Inside { is_first, .. } if *is_first && c == '\n' => {}
            Place::Inside { close, is_first } => {
                *is_first = false;
                let mut text = String::new();
                let found = close.push(c, &mut text);
                out.reasoning(&text);
                if found.is_some() {
                    self.place = Place::Content { is_first: true };
                }
            }
            Place::Content { is_first: true } if c == '\n' => {}
            Place::Content { is_first } => {
                *is_first = false;
                content.push(c);
            }
        }
    }

    /// The text's end.
    pub(super) fn finish(&mut self, out: &mut Parts, content: &mut String) {
        match &mut self.place {
            Place::Start { held } => content.push_str(&std::mem::take(held)),
            Place::Inside { close, .. } => out.reasoning(&close.take_held()),
            Place::Content { .. } => {}
        }
    }
}

impl Place {
    fn inside(format: ReasoningFormat) -> Place {
        Place::Inside { close: Markers::new([format.tags().1]), is_first: true }
    }
}
