//! Strict JSON: duplicate keys are errors, every field is read by name with its range, and what was read can be
//! compared with what is there.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::error::{Error, Result};

/// Parses a document. The depth limit is serde_json's (128).
pub(super) fn parse(bytes: &[u8]) -> Result<Value, String> {
    if let Some(what) = not_content(&bytes[..bytes.len().min(256)]) {
        return Err(what.to_owned());
    }
    let text = without_bom(std::str::from_utf8(bytes).map_err(|e| format!("not UTF-8: {e}"))?);
    strict(text).map_err(|e| {
        // Python writes `"temperature": NaN`; what stands before the place names the field.
        let line = text.lines().nth(e.line().saturating_sub(1)).unwrap_or("");
        let near: String = line.chars().skip(e.column().saturating_sub(60)).take(80).collect();
        format!("not valid JSON: {e}, near `{}`", near.trim())
    })
}

/// A JSON document whose objects have no duplicate keys, nested 128 levels at most.
///
/// # Errors
/// What is wrong, with line and column.
pub fn strict(text: &str) -> serde_json::Result<Value> {
    serde_json::from_str(text).map(|Strict(value)| value)
}

/// Why `bytes`, the beginning of a file that should hold something else, are not its content; `None` when they may be.
pub fn not_content(bytes: &[u8]) -> Option<&'static str> {
    let bytes = bytes.trim_ascii_start();
    let starts = |with: &[u8]| bytes.get(..with.len()).is_some_and(|start| start.eq_ignore_ascii_case(with));
    if starts(b"version https://git-lfs.github.com/spec/") || starts(b"# xet version") {
        return Some(
            "a pointer that stands for a large file, not its content: run `git lfs pull` in the model's directory, or download the file again",
        );
    }
    (starts(b"<!doctype html") || starts(b"<html"))
        .then_some("a web page, not the file: download it by the hub's own tools, or from the link of the file itself")
}

/// Text without the byte order mark that some editors put first.
pub fn without_bom(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// A [`Value`] whose objects had no duplicate keys (serde_json itself keeps the last one silently).
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        StrictVisitor.deserialize(deserializer).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> DeserializeSeed<'de> for StrictVisitor {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(StrictVisitor)
    }
}

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E: serde::de::Error>(self, v: f64) -> Result<Value, E> {
        Number::from_f64(v).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(StrictVisitor)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            let value = access.next_value_seed(StrictVisitor)?;
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!("duplicate key `{key}`")));
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

/// A JSON object with its place, so that errors name file and field. A field that is `null` counts as absent.
#[derive(Debug, Clone)]
pub(super) struct Object {
    file: PathBuf,
    /// Path of this object in the file, `""` for the root.
    path: String,
    map: Map<String, Value>,
}

impl Object {
    pub(super) fn root(file: PathBuf, value: Value) -> Result<Object> {
        match value {
            Value::Object(map) => Ok(Object { file, path: String::new(), map }),
            other => Err(Error::file(file, format!("expected a JSON object, got {}", kind(&other)))),
        }
    }

    pub(super) fn into_map(self) -> Map<String, Value> {
        self.map
    }

    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// An error about `field` of this object.
    pub(super) fn error(&self, field: &str, reason: impl Into<String>) -> Error {
        Error::config(&self.file, self.field_path(field), reason)
    }

    /// Full path of `field`, for messages.
    pub(super) fn field_path(&self, field: &str) -> String {
        if self.path.is_empty() { field.to_owned() } else { format!("{}.{field}", self.path) }
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    /// The field's value, if it is there and not null.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    /// True when the field is written, even as null.
    pub(super) fn contains(&self, field: &str) -> bool {
        self.map.contains_key(field)
    }

    /// An integer within `range`.
    pub(super) fn integer(&self, field: &str, range: std::ops::RangeInclusive<i64>) -> Result<Option<i64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_i64() {
            Some(v) if range.contains(&v) => Ok(Some(v)),
            _ => {
                let got = if value.is_number() { value.to_string() } else { kind(value).to_owned() };
                let (low, high) = (range.start(), range.end());
                Err(self.error(field, format!("expected an integer from {low} to {high}, got {got}")))
            }
        }
    }

    /// A size, 1 to `max`.
    pub(super) fn size(&self, field: &str, max: usize) -> Result<Option<usize>> {
        Ok(self.integer(field, 1..=max as i64)?.map(|v| v as usize))
    }

    /// [`Object::size`] of a field that must be there.
    pub(super) fn need_size(&self, field: &str, max: usize) -> Result<usize> {
        self.size(field, max)?.ok_or_else(|| self.error(field, format!("missing; expected an integer from 1 to {max}")))
    }

    /// A group size: `Some(None)` for -1, one group; `None` when absent.
    pub(super) fn group_size(&self, field: &str) -> Result<Option<Option<usize>>> {
        const MAX_GROUP_SIZE: i64 = 1 << 20;
        match self.integer(field, -1..=MAX_GROUP_SIZE)? {
            None => Ok(None),
            Some(-1) => Ok(Some(None)),
            Some(0) => Err(self.error(field, "expected a positive number, or -1 for one group; got 0")),
            Some(g) => Ok(Some(Some(g as usize))),
        }
    }

    /// A finite number with `low <= x <= high`.
    pub(super) fn number(&self, field: &str, low: f64, high: f64) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64() {
            Some(v) if v >= low && v <= high => Ok(Some(v)),
            _ => {
                let got = if value.is_number() { value.to_string() } else { kind(value).to_owned() };
                Err(self.error(field, format!("expected a number from {low:e} to {high:e}, got {got}")))
            }
        }
    }

    pub(super) fn bool(&self, field: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| self.error(field, format!("expected true or false, got {}", kind(value))))
    }

    pub(super) fn str(&self, field: &str) -> Result<Option<&str>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.error(field, format!("expected a string, got {}", kind(value))))
    }

    /// A list of strings.
    pub(super) fn strings(&self, field: &str) -> Result<Option<Vec<String>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let list = value.as_array().and_then(|a| a.iter().map(|v| v.as_str().map(str::to_owned)).collect());
        list.map(Some).ok_or_else(|| self.error(field, "expected a list of strings"))
    }

    pub(super) fn object(&self, field: &str) -> Result<Option<Object>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let Value::Object(map) = value else {
            return Err(self.error(field, format!("expected an object, got {}", kind(value))));
        };
        Ok(Some(Object { file: self.file.clone(), path: self.field_path(field), map: map.clone() }))
    }

    /// True when the field is absent, null, false, `{}` or `[]`: says nothing.
    pub(super) fn is_neutral(&self, field: &str) -> bool {
        match self.get(field) {
            None | Some(Value::Bool(false)) => true,
            Some(Value::Object(map)) => map.is_empty(),
            Some(Value::Array(list)) => list.is_empty(),
            Some(_) => false,
        }
    }

    /// An error naming the first field that says something and is in none of the `known` lists.
    pub(super) fn refuse_unknown(&self, known: &[&[&str]]) -> Result<()> {
        match self.keys().find(|key| self.get(key).is_some() && !known.iter().any(|list| list.contains(key))) {
            None => Ok(()),
            Some(key) => Err(self.error(key, "not understood; it may change results, so this model is not loaded")),
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
