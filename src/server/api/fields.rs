//! From the bytes of a body to the fields of a request: strict, with the field named in every error, none dropped silently.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::checkpoint::strict_json;
use crate::server::error::ApiError;

/// Fields of OpenAI's and vLLM's APIs that do not change what is generated here: accounts, storage, billing, other tokenizers.
const WITHOUT_EFFECT: &[&str] = &[
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "request_id",
    "safety_identifier",
    "service_tier",
    "spaces_between_special_tokens",
    "store",
    "user",
];

/// Reads a whole body of at most `limit` bytes within `timeout`.
///
/// # Errors
/// 413, 408, or 400 where the client's own connection failed.
pub(in crate::server) async fn read_body(body: Body, limit: usize, timeout: Duration) -> Result<Vec<u8>, ApiError> {
    let collected = tokio::time::timeout(timeout, Limited::new(body, limit).collect()).await;
    let late =
        |_| ApiError::timeout(StatusCode::REQUEST_TIMEOUT, format!("the body did not arrive within {timeout:?}"));
    match collected.map_err(late)? {
        Ok(body) => Ok(body.to_bytes().to_vec()),
        Err(error) if error.is::<LengthLimitError>() => {
            let message = format!("the body is larger than the {limit} bytes that this server takes");
            Err(ApiError::bad_request(StatusCode::PAYLOAD_TOO_LARGE, message))
        }
        Err(error) => Err(ApiError::bad_request(StatusCode::BAD_REQUEST, format!("the body cannot be read: {error}"))),
    }
}

/// Parses a body as one JSON object.
///
/// # Errors
/// 415 for another content type, 400 for malformed JSON.
pub(in crate::server) fn parse_object(headers: &HeaderMap, body: &[u8]) -> Result<Map<String, Value>, ApiError> {
    let kind = headers.get(header::CONTENT_TYPE).map(|kind| kind.to_str().unwrap_or_default().to_ascii_lowercase());
    if kind.as_ref().is_some_and(|kind| !kind.contains("json")) {
        let message = "expected a body of content-type application/json";
        return Err(ApiError::bad_request(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    let malformed =
        |reason: String| ApiError::bad_request(StatusCode::BAD_REQUEST, format!("malformed JSON: {reason}"));
    let text = std::str::from_utf8(body).map_err(|e| malformed(format!("not UTF-8: {e}")))?;
    match strict_json(text).map_err(|e| malformed(e.to_string()))? {
        Value::Object(object) => Ok(object),
        _ => Err(malformed("expected an object".into())),
    }
}

/// The fields that `T` has, taken out of an object; `null` is the same as nothing.
///
/// # Errors
/// 400 naming the field that is missing or of the wrong type.
pub(in crate::server) fn take<T: DeserializeOwned>(object: &mut Map<String, Value>) -> Result<T, ApiError> {
    let mut own = Map::new();
    for &name in serde_aux::serde_introspection::serde_introspect::<T>() {
        if let Some(value) = object.remove(name).filter(|value| !value.is_null()) {
            own.insert(name.to_owned(), value);
        }
    }
    serde_path_to_error::deserialize(Value::Object(own)).map_err(|error| {
        let (path, reason) = (error.path().to_string(), error.into_inner().to_string());
        // serde names a missing field in its message alone.
        let missing =
            reason.strip_prefix("missing field `").and_then(|rest| rest.split_once('`')).map(|(name, _)| name);
        match (missing, path.as_str()) {
            (Some(name), ".") => ApiError::invalid(name, "is required"),
            (Some(name), path) => ApiError::invalid(format!("{path}.{name}"), "is required"),
            (None, path) => ApiError::invalid(path, reason),
        }
    })
}

/// The fields of these names, taken out of an object.
pub(in crate::server) fn take_named(object: &mut Map<String, Value>, names: &[&str]) -> Map<String, Value> {
    names.iter().filter_map(|&name| object.remove(name).map(|value| (name.to_owned(), value))).collect()
}

/// Fails for fields that are left: nobody would obey them.
///
/// # Errors
/// 400 naming the first.
pub(in crate::server) fn refuse_unknown(object: &Map<String, Value>) -> Result<(), ApiError> {
    match object.iter().find(|(name, value)| !value.is_null() && !WITHOUT_EFFECT.contains(&name.as_str())) {
        Some((name, _)) => {
            Err(ApiError::invalid(name, "is not a field that this server knows").with_code("unknown_parameter"))
        }
        None => Ok(()),
    }
}

/// A field of what should be an object, taken out of it; null where it is none or has no such field.
pub(in crate::server) fn take_field(value: &mut Value, name: &str) -> Value {
    value.as_object_mut().and_then(|object| object.remove(name)).unwrap_or_default()
}

/// One thing or several.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub(in crate::server) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// All of them.
    pub(in crate::server) fn into_vec(self) -> Vec<T> {
        match self {
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(many) => many,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[derive(Debug, PartialEq, Deserialize)]
    struct Fields {
        model: String,
        #[serde(default)]
        stop: Option<OneOrMany<String>>,
        #[serde(default)]
        n: Option<u32>,
    }

    fn of(value: Value) -> Result<Fields, ApiError> {
        let mut object = value.as_object().unwrap().clone();
        let fields = take(&mut object)?;
        refuse_unknown(&object)?;
        Ok(fields)
    }

    #[test]
    fn errors_name_the_field() {
        let param = |value: Value| of(value).expect_err("is wrong").param;
        assert_eq!(param(json!({ "n": 1 })).as_deref(), Some("model"));
        assert_eq!(param(json!({ "model": null })).as_deref(), Some("model"));
        assert_eq!(param(json!({ "model": "m", "n": -1 })).as_deref(), Some("n"));
        assert_eq!(param(json!({ "model": "m", "max_token": 1 })).as_deref(), Some("max_token"));
        let fields = of(json!({ "model": "m", "n": null, "user": "u", "nonsense": null, "stop": ["a"] }));
        assert_eq!(fields, Ok(Fields { model: "m".into(), stop: Some(OneOrMany::Many(vec!["a".into()])), n: None }));
    }

    #[test]
    fn malformed_bodies_are_refused() {
        let status = |kind: &'static str, body: &[u8]| {
            let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, kind.parse().unwrap())]);
            parse_object(&headers, body).map_err(|error| error.status.as_u16())
        };
        assert_eq!(status("application/json; charset=utf-8", b"{}"), Ok(Map::new()));
        assert_eq!(status("text/plain", b"{}"), Err(415));
        let deep = "[".repeat(100_000);
        for body in [&b"[]"[..], b"", b"{\"a\":NaN}", b"{\"a\":1,\"a\":2}", b"{\"a\":\"\xff\"}", deep.as_bytes()] {
            assert_eq!(
                status("application/json", body),
                Err(400),
                "{}",
                String::from_utf8_lossy(&body[..body.len().min(20)])
            );
        }
    }
}
