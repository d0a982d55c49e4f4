//! What a client is told when a request fails: an HTTP status and OpenAI's error object.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::error::Error;

/// A request that was refused, or failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    /// `type` of OpenAI's error object.
    pub(super) kind: &'static str,
    /// The field of the request that is wrong.
    pub(super) param: Option<String>,
    /// A word that programs compare.
    pub(super) code: Option<&'static str>,
    pub(super) message: String,
    /// Seconds after which to try again.
    retry_after: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> ApiError {
        ApiError { status, kind, param: None, code: None, message: message.into(), retry_after: None }
    }

    /// The request is wrong: field `param`, and why.
    pub(super) fn invalid(param: impl Into<String>, reason: impl std::fmt::Display) -> ApiError {
        let param = param.into();
        let message = format!("{param}: {reason}");
        ApiError { param: Some(param), ..ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message) }
    }

    /// The same with a word that programs compare.
    pub(super) fn with_code(self, code: &'static str) -> ApiError {
        ApiError { code: Some(code), ..self }
    }

    /// The request as a whole is wrong.
    pub(super) fn bad_request(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError::new(status, "invalid_request_error", message)
    }

    /// There is nothing of that name.
    pub(super) fn not_found(code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError {
            code: Some(code),
            param: (code == "model_not_found").then(|| "model".to_owned()),
            ..ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
        }
    }

    /// No key, or one that is not known.
    pub(super) fn unauthorized() -> ApiError {
        let message = "Incorrect API key provided, or none: send `Authorization: Bearer KEY`";
        ApiError {
            code: Some("invalid_api_key"),
            ..ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", message)
        }
    }

    /// The request may not come from there.
    pub(super) fn forbidden(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    /// There are too many requests.
    pub(super) fn overloaded(message: impl Into<String>) -> ApiError {
        ApiError {
            code: Some("queue_full"),
            retry_after: Some(1),
            ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
        }
    }

    /// The server does not take requests any more.
    pub(super) fn unavailable(message: impl Into<String>) -> ApiError {
        ApiError {
            retry_after: Some(5),
            ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", message)
        }
    }

    /// The request took too long.
    pub(super) fn timeout(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError { code: Some("timeout"), ..ApiError::new(status, "timeout_error", message) }
    }

    /// It failed here.
    pub(super) fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_server_error", message)
    }

    /// OpenAI's error object, as it stands in a response and in a stream.
    pub(super) fn body(&self) -> Value {
        json!({
            "error": { "message": self.message, "type": self.kind, "param": self.param, "code": self.code },
        })
    }

    /// With the envelope that `body` is.
    pub(super) fn respond(&self, body: Value) -> Response {
        let mut response = (self.status, Json(body)).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.respond(self.body());
        // An API with another envelope rewrites it.
        response.extensions_mut().insert(self);
        response
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> ApiError {
        let message = error.to_string();
        match error {
            Error::Input { what, reason } => ApiError::invalid(what, reason),
            Error::Unsupported { .. } => ApiError::bad_request(StatusCode::BAD_REQUEST, message),
            Error::Engine { .. } => ApiError::unavailable(message),
            Error::NotFinite { .. } => ApiError { code: Some("not_finite"), ..ApiError::internal(message) },
            // A template's or tokenizer's complaint is about what the client sent: the files were checked at start.
            Error::Text { .. } => ApiError::invalid("messages", message),
            _ => ApiError::internal(message),
        }
    }
}
