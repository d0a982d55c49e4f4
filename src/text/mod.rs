//! Between text and token ids: tokenizer, chat templates, incremental detokenizer, stop strings.

pub mod tokenizer;
mod jinja;
pub mod chat_template;
pub mod detokenizer;
pub mod stop;

pub use chat_template::{ChatInput, ChatTemplate};
pub use detokenizer::Detokenizer;
pub use stop::StopStrings;
pub use tokenizer::Tokenizer;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

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
    match serde_json::from_slice(&bytes) {
        Ok(serde_json::Value::Object(map)) => Ok(Some(map)),
        Ok(_) => Err(text_error(&path, "expected a JSON object")),
        Err(e) => Err(text_error(&path, format!("malformed JSON: {e}"))),
    }
}

/// Special tokens by role (`bos_token`, `eos_token`, ...): those of `special_tokens_map.json`, overridden by
/// `tokenizer_config.json`. A token is a string or an object with `content`.
fn special_tokens(dir: &Path) -> Result<std::collections::BTreeMap<String, String>> {
    let mut tokens = std::collections::BTreeMap::new();
    for name in ["special_tokens_map.json", "tokenizer_config.json"] {
        for (role, value) in read_object(dir, name)?.unwrap_or_default() {
            if !role.ends_with("_token") {
                continue;
            }
            if let Some(content) = value.as_str().or_else(|| value.get("content")?.as_str()) {
                tokens.insert(role, content.to_string());
            }
        }
    }
    Ok(tokens)
}
