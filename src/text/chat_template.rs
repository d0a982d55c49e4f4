//! A conversation to the text that a model was trained on, by the model's own Jinja template.
//!
//! The semantics are those of transformers' `apply_chat_template`. A template comes with a model and is not trusted:
//! its size, its run time (fuel), its recursion and its output are limited. It sees nothing but its inputs.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Environment, Value};
use serde_json::Value as Json;

use super::jinja::{self, Raised};
use super::jinja_source::as_minijinja;
use super::tokenizer_config::TokenizerConfig;
use super::{read_bounded, read_object, text_error, utf8};
use crate::error::{Error, Result};

/// Largest template source; the largest in use are near 30 KiB.
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;
/// Marks the end of the message to be continued; transformers' own word, with a blank that a template may trim.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// Names of the inputs that only the caller sets, not `extra`.
const RESERVED: [&str; 5] = ["messages", "tools", "documents", "add_generation_prompt", "strftime_now"];

/// What a template is applied to.
#[derive(Debug, Clone, Default)]
pub struct ChatInput {
    /// Messages: objects with `role`, `content` and what else the template knows.
    pub messages: Vec<Json>,
    /// Tools as JSON schemas of functions; `None` when the conversation has none.
    pub tools: Option<Vec<Json>>,
    /// Documents for retrieval, objects with `title` and `text`.
    pub documents: Option<Vec<Json>>,
    /// End with the header of an assistant's message.
    pub add_generation_prompt: bool,
    /// End inside the last message, so that the model goes on with it.
    pub continue_final_message: bool,
    /// Further variables of the template (`enable_thinking`).
    pub extra: serde_json::Map<String, Json>,
    /// Seconds since 1970 for `strftime_now`, in UTC; the clock's without.
    pub now: Option<u64>,
}

/// A model's chat template, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    file: String,
    source: String,
    special: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// Reads the template of a model directory: `chat_template.jinja`, else `chat_template.json`, else the field
    /// `chat_template` of `tokenizer_config.json`, which may be a list of named templates: `default` is used, and
    /// `tool_use` when there are tools. `None` when there is no template.
    ///
    /// # Errors
    /// [`Error::Text`] when a file is malformed or the template has a syntax error or is too large.
    pub fn load(dir: &Path) -> Result<Option<ChatTemplate>> {
        let special = TokenizerConfig::read(dir)?.roles;
        if let Some((path, bytes)) = read_bounded(dir, "chat_template.jinja", MAX_TEMPLATE_BYTES)? {
            let source = utf8(&path, &bytes)?.to_string();
            return ChatTemplate::new(&path, vec![("default".to_string(), source)], special).map(Some);
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let path = dir.join(name);
            let sources = match read_object(dir, name)?.and_then(|mut config| config.remove("chat_template")) {
                None | Some(Json::Null) => continue,
                Some(Json::String(source)) => vec![("default".to_string(), source)],
                Some(Json::Array(list)) => list.into_iter().map(named).collect::<Option<_>>().ok_or_else(|| {
                    text_error(&path, "`chat_template`: expected a list of objects with `name` and `template`")
                })?,
                Some(_) => return Err(text_error(&path, "`chat_template`: expected a string or a list")),
            };
            return ChatTemplate::new(&path, sources, special).map(Some);
        }
        Ok(None)
    }

    /// Compiles one template given as text, with the special tokens it may use by role (`bos_token`).
    ///
    /// # Errors
    /// [`Error::Text`] as for [`ChatTemplate::load`].
    pub fn from_source(source: &str, special: BTreeMap<String, String>) -> Result<ChatTemplate> {
        ChatTemplate::new(Path::new("chat template"), vec![("default".to_string(), source.to_string())], special)
    }

    fn new(file: &Path, sources: Vec<(String, String)>, special: BTreeMap<String, String>) -> Result<ChatTemplate> {
        let mut env = jinja::environment();
        let mut all = String::new();
        for (name, source) in sources {
            if source.len() as u64 > MAX_TEMPLATE_BYTES {
                return Err(text_error(file, format!("chat template `{name}` is larger than 1 MiB")));
            }
            // As Jinja's lexer has it, whatever the editor wrote.
            let source = source.replace("\r\n", "\n").replace('\r', "\n");
            all.push_str(&source);
            env.add_template_owned(name.clone(), as_minijinja(&source))
                .map_err(|e| text_error(file, format!("chat template `{name}`: {e}")))?;
        }
        if env.get_template("default").is_err() && env.get_template("tool_use").is_err() {
            return Err(text_error(file, "has named chat templates, but none named `default` or `tool_use`"));
        }
        Ok(ChatTemplate { env, file: file.display().to_string(), source: all, special })
    }

    /// The template's source; of several, all of them one after the other.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation. The text holds its special tokens: encode it without adding any.
    ///
    /// # Errors
    /// [`Error::Input`] when the template refuses the conversation (`raise_exception`) or the final message cannot
    /// be continued; [`Error::Text`] when the template fails or exceeds a limit.
    pub fn render(&self, input: &ChatInput) -> Result<String> {
        let mut messages = input.messages.clone();
        if let Some(i) = messages.iter().position(|m| !m.is_object()) {
            return Err(Error::input(format!("messages[{i}]"), "expected an object"));
        }
        let mut continued = None;
        if input.continue_final_message {
            let content = messages.last_mut().and_then(|m| m.get_mut("content")).and_then(final_text);
            let content = content.ok_or_else(|| {
                Error::input("continue_final_message", "the last message has no text content to continue")
            })?;
            continued = Some(content.trim().to_string());
            content.push_str(CONTINUE_TAG);
        }
        messages.iter_mut().for_each(alias_reasoning);
        let now = input.now.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()));
        let mut variables: BTreeMap<&str, Value> = BTreeMap::new();
        variables.extend(self.special.iter().map(|(role, token)| (role.as_str(), Value::from(token))));
        for (name, value) in &input.extra {
            if RESERVED.contains(&name.as_str()) || self.special.contains_key(name) {
                return Err(Error::input(format!("chat_template_kwargs.{name}"), "is set by the request itself"));
            }
            variables.insert(name, Value::from_serialize(value));
        }
        variables.insert("messages", Value::from_serialize(&messages));
        variables.insert("tools", Value::from_serialize(&input.tools));
        variables.insert("documents", Value::from_serialize(&input.documents));
        variables.insert("add_generation_prompt", Value::from(input.add_generation_prompt));
        variables.insert("strftime_now", Value::from_function(move |f: String| jinja::strftime(&f, now)));

        let name =
            if input.tools.is_some() && self.env.get_template("tool_use").is_ok() { "tool_use" } else { "default" };
        let template = self.env.get_template(name).map_err(|e| self.failed(&e))?;
        let mut out = Bounded(Vec::new());
        template.render_captured_to(variables, &mut out).map_err(|e| self.failed(&e))?;
        let text =
            String::from_utf8(out.0).map_err(|e| Error::Text { what: self.file.clone(), reason: e.to_string() })?;
        match continued {
            Some(content) => cut_at_tag(text, &content),
            None => Ok(text),
        }
    }

    fn failed(&self, error: &minijinja::Error) -> Error {
        let mut source = std::error::Error::source(error);
        while let Some(e) = source {
            if let Some(Raised(message)) = e.downcast_ref() {
                return Error::input("messages", format!("the chat template refuses them: {message}"));
            }
            source = e.source();
        }
        Error::Text { what: self.file.clone(), reason: format!("chat template: {error}") }
    }
}

fn named(entry: Json) -> Option<(String, String)> {
    Some((entry.get("name")?.as_str()?.to_string(), entry.get("template")?.as_str()?.to_string()))
}

/// Gives a message's reasoning, whichever of its three usual names it came under, the names that templates read.
fn alias_reasoning(message: &mut Json) {
    let Some(message) = message.as_object_mut() else { return };
    let named = ["reasoning_content", "thinking", "reasoning"]
        .into_iter()
        .find_map(|name| message.get(name).filter(|r| !r.is_null()));
    if let Some(reasoning) = named.cloned() {
        message.entry("thinking").or_insert_with(|| reasoning.clone());
        message.insert("reasoning_content".to_string(), reasoning);
    }
}

/// The text of a message's content, or of its last block that is text.
fn final_text(content: &mut Json) -> Option<&mut String> {
    match content {
        Json::String(text) => Some(text),
        Json::Array(blocks) => blocks.iter_mut().rev().find_map(|block| match block.get_mut("text")? {
            Json::String(text) => Some(text),
            _ => None,
        }),
        _ => None,
    }
}

/// Ends a rendered conversation where the message to be continued ends.
fn cut_at_tag(mut text: String, content: &str) -> Result<String> {
    let at = text.rfind(CONTINUE_TAG.trim_end()).filter(|_| text.contains(content));
    let Some(at) = at else {
        return Err(Error::input("continue_final_message", "the chat template leaves out part of the last message"));
    };
    let exact = text[at..].starts_with(CONTINUE_TAG);
    text.truncate(at);
    if !exact {
        // The template trims messages, so blanks at the end of this one would not be there either.
        text.truncate(text.trim_end().len());
    }
    Ok(text)
}

/// A buffer that refuses to grow beyond the limit.
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > jinja::MAX_OUTPUT_BYTES {
            return Err(std::io::Error::other(format!("writes more than {} MiB", jinja::MAX_OUTPUT_BYTES >> 20)));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
