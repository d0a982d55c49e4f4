//! The web page: files that are embedded in the binary, and nothing from elsewhere.

use std::sync::Arc;

use axum::Router;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::Server;

/// Path, content type and content of each file.
const FILES: [(&str, &str, &str); 14] = [
    ("/", "text/html; charset=utf-8", include_str!("page/index.html")),
    ("/page.css", "text/css; charset=utf-8", include_str!("page/page.css")),
    ("/favicon.svg", "image/svg+xml", include_str!("page/favicon.svg")),
    ("/page.js", JAVASCRIPT, include_str!("page/page.js")),
    ("/api.js", JAVASCRIPT, include_str!("page/api.js")),
    ("/answer.js", JAVASCRIPT, include_str!("page/answer.js")),
    ("/chat.js", JAVASCRIPT, include_str!("page/chat.js")),
    ("/message.js", JAVASCRIPT, include_str!("page/message.js")),
    ("/markdown.js", JAVASCRIPT, include_str!("page/markdown.js")),
    ("/tokens.js", JAVASCRIPT, include_str!("page/tokens.js")),
    ("/settings.js", JAVASCRIPT, include_str!("page/settings.js")),
    ("/metrics.js", JAVASCRIPT, include_str!("page/metrics.js")),
    ("/load.js", JAVASCRIPT, include_str!("page/load.js")),
    ("/dom.js", JAVASCRIPT, include_str!("page/dom.js")),
];
const JAVASCRIPT: &str = "text/javascript; charset=utf-8";

/// Nothing is loaded from elsewhere, nothing inline is run, and no other page may frame this one.
const POLICY: &str = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";

/// Whether a path is one of the page's files, which hold nothing that a key would guard.
pub(super) fn is_file(path: &str) -> bool {
    FILES.iter().any(|(known, ..)| *known == path)
}

/// Routes of the page.
pub(super) fn routes() -> Router<Arc<Server>> {
    FILES
        .iter()
        .fold(Router::new(), |router, &(path, kind, text)| router.route(path, get(async move || file(kind, text))))
}

fn file(kind: &'static str, text: &'static str) -> Response {
    let headers: HeaderMap = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // A newer binary has newer files.
        (header::CACHE_CONTROL, "no-cache"),
    ]
    .map(|(name, value): (HeaderName, &'static str)| (name, HeaderValue::from_static(value)))
    .into_iter()
    .collect();
    (headers, text).into_response()
}
