//! The formats of tool calls, by vLLM's names.

use std::fmt;
use std::str::FromStr;

use serde_json::Value;

use super::tagged::{GLM45, QWEN3_CODER, Tagged};
use super::{CallReader, hermes, llama3_json, mistral};
use crate::error::{Error, Result};

/// How a model writes its tool calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`: Hermes, Qwen2.5, Qwen3.
    Hermes,
    /// `{"name": "f", "parameters": {...}}`, bare or after `<|python_tag|>`, further ones after a `;`: Llama 3.1 and later.
    Llama3Json,
    /// `[TOOL_CALLS] [{"name": "f", "arguments": {...}}]`, or `[TOOL_CALLS]f[ARGS]{...}`.
    Mistral,
    /// `<tool_call>f` with `<arg_key>` and `<arg_value>`: GLM-4.5 and later.
    Glm45,
    /// `<tool_call><function=f><parameter=k>v</parameter></function></tool_call>`: Qwen3-Coder.
    Qwen3Coder,
}

impl ToolFormat {
    /// All formats.
    pub const ALL: [ToolFormat; 5] =
        [ToolFormat::Hermes, ToolFormat::Llama3Json, ToolFormat::Mistral, ToolFormat::Glm45, ToolFormat::Qwen3Coder];

    /// The strings that the parser looks for; some are special tokens, which a detokenizer must keep
    /// ([`Tokenizer::detokenizer_keeping`](crate::text::Tokenizer::detokenizer_keeping)).
    pub fn markers(self) -> &'static [&'static str] {
        match self {
            ToolFormat::Hermes | ToolFormat::Qwen3Coder => &[hermes::OPEN, hermes::CLOSE],
            ToolFormat::Llama3Json => &[llama3_json::PYTHON_TAG],
            ToolFormat::Mistral => &[mistral::CALLS, mistral::CALL_ID, mistral::ARGS],
            ToolFormat::Glm45 => {
                &[hermes::OPEN, hermes::CLOSE, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
            }
        }
    }

    /// The format that a chat template has its model write, or, where a template takes tools and shows no format, the one whose
    /// marker is a token of the vocabulary. `None` for a template that takes no tools.
    pub fn detect(template: &str, has_token: impl Fn(&str) -> bool) -> Option<ToolFormat> {
        if !template.contains("tool") {
            return None;
        }
        let has = |text: &str| template.contains(text);
        // GLM's and Qwen3-Coder's calls stand in the same outer tags as Hermes'.
        if has("<arg_key>") {
            return Some(ToolFormat::Glm45);
        }
        if has("<function=") && has("<parameter=") {
            return Some(ToolFormat::Qwen3Coder);
        }
        if has(mistral::CALLS) {
            return Some(ToolFormat::Mistral);
        }
        if has(hermes::OPEN) {
            return Some(ToolFormat::Hermes);
        }
        if has(llama3_json::PYTHON_TAG) || (has("\"parameters\"") && has("<|start_header_id|>")) {
            return Some(ToolFormat::Llama3Json);
        }
        let by_token = [
            (mistral::CALLS, ToolFormat::Mistral),
            (hermes::OPEN, ToolFormat::Hermes),
            (llama3_json::PYTHON_TAG, ToolFormat::Llama3Json),
        ];
        by_token.into_iter().find(|(marker, _)| has_token(marker)).map(|(_, format)| format)
    }

    pub(super) fn reader(self, tools: &[Value]) -> Box<dyn CallReader> {
        match self {
            ToolFormat::Hermes => Box::new(hermes::Hermes::new()),
            ToolFormat::Llama3Json => Box::new(llama3_json::Llama3Json::new()),
            ToolFormat::Mistral => Box::new(mistral::Mistral::new()),
            ToolFormat::Glm45 => Box::new(Tagged::new(&GLM45, tools)),
            ToolFormat::Qwen3Coder => Box::new(Tagged::new(&QWEN3_CODER, tools)),
        }
    }
}

impl fmt::Display for ToolFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ToolFormat::Hermes => "hermes",
            ToolFormat::Llama3Json => "llama3_json",
            ToolFormat::Mistral => "mistral",
            ToolFormat::Glm45 => "glm45",
            ToolFormat::Qwen3Coder => "qwen3_coder",
        })
    }
}

impl FromStr for ToolFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<ToolFormat> {
        // vLLM has the same format of Llama 4 under a name of its own, and GLM's later ones.
        let known = match name {
            "llama4_json" => "llama3_json",
            "glm47" => "glm45",
            known => known,
        };
        ToolFormat::ALL.into_iter().find(|format| format.to_string() == known).ok_or_else(|| {
            let names: Vec<String> = ToolFormat::ALL.iter().map(ToString::to_string).collect();
            Error::input("--tool-call-parser", format!("`{name}` is not known: expected one of {}", names.join(", ")))
        })
    }
}
