//! Between text and token ids: tokenizer, chat templates, incremental detokenizer, stop strings, grammars; and from a
//! reply's text to its reasoning, content and tool calls.

pub mod tokenizer;
mod jinja;
mod jinja_filters;
mod jinja_source;
mod jinja_strings;
mod jinja_values;
pub mod chat_template;
pub mod detokenizer;
pub mod grammar;
mod panics;
mod reply;
pub mod stop;
mod tokenizer_config;

pub use chat_template::{ChatInput, ChatTemplate};
pub use detokenizer::Detokenizer;
pub use grammar::{Constraint, GrammarCompiler};
pub use reply::{ReasoningFormat, ReplyParser, ReplyPart, ToolFormat};
pub use stop::StopStrings;
pub use tokenizer::Tokenizer;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::checkpoint::{not_content, without_bom};
use crate::error::{Error, Result};

fn text_error(file: &Path, reason: impl std::fmt::Display) -> Error {
    Error::Text { what: file.display().to_string(), reason: reason.to_string() }
}

/// The bytes of `dir/name`, at most `limit` of them, with the file's path; `None` when there is no such file.
fn read_bounded(dir: &Path, name: &str, limit: u64) -> Result<Option<(PathBuf, Vec<u8>)>> {
    let path = dir.join(name);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(&path)(e)),
    };
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(Error::io(&path))?;
    if bytes.len() as u64 > limit {
        return Err(text_error(&path, format!("is larger than {} MiB, the most that is read of it", limit >> 20)));
    }
    Ok(Some((path, bytes)))
}

/// `dir/name` as a JSON object; `None` when there is no such file.
fn read_object(dir: &Path, name: &str) -> Result<Option<serde_json::Map<String, serde_json::Value>>> {
    // The largest configurations hold a few MiB of added tokens.
    let Some((path, bytes)) = read_bounded(dir, name, 16 << 20)? else { return Ok(None) };
    match serde_json::from_str(utf8(&path, &bytes)?) {
        Ok(serde_json::Value::Object(map)) => Ok(Some(map)),
        Ok(_) => Err(text_error(&path, "expected a JSON object")),
        Err(e) => Err(text_error(&path, format!("malformed JSON: {e}"))),
    }
}

/// The text of a file, without the byte order mark that some editors put first.
fn utf8<'a>(path: &Path, bytes: &'a [u8]) -> Result<&'a str> {
    if let Some(what) = not_content(&bytes[..bytes.len().min(256)]) {
        return Err(text_error(path, what));
    }
    let text = std::str::from_utf8(bytes).map_err(|e| text_error(path, format!("not UTF-8: {e}")))?;
    Ok(without_bom(text))
}
