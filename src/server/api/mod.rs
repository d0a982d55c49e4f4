//! The routes.

mod chat;
mod chat_response;
mod completions;
mod conversation;
mod embeddings;
mod fields;
mod info;
mod logprobs;
mod messages;
mod messages_in;
mod messages_in_anthropic;
mod messages_response;
mod reply;
mod respond;
mod responses;
mod responses_writer;
mod sampling;
mod stream_options;
mod structured;
mod tokenize;
mod tools;

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Map, Value};
use tower_http::cors::{AllowOrigin, CorsLayer};

use super::Server;
use super::access_log::Entry;
use super::app::{App, unique_id};
use super::error::ApiError;
use super::metrics::Http;
use super::page;

/// The router of a server, with the web page or without.
pub(super) fn router(server: Arc<Server>, web: bool) -> Router {
    let files = if web { page::routes() } else { Router::new() };
    let routes = files
        .route("/health", get(info::health))
        .route("/ready", get(info::ready))
        .route("/version", get(info::version))
        .route("/metrics", get(info::metrics))
        .route("/v1/models", get(info::models))
        .route("/v1/models/{*model}", get(info::model))
        .route("/v1/chat/completions", post(|State(server), request| json(server, request, chat::chat)))
        .route("/v1/completions", post(|State(server), request| json(server, request, completions::completions)))
        .route("/v1/responses", post(|State(server), request| json(server, request, responses::responses)))
        .route("/v1/messages", post(|State(server), request| json(server, request, messages::messages)))
        .route(
            "/v1/messages/count_tokens",
            post(|State(server), request| computed(server, request, messages::count_tokens)),
        )
        .route("/v1/embeddings", post(|State(server), request| json(server, request, embeddings::embeddings)))
        .route("/tokenize", post(|State(server), request| computed(server, request, tokenize::tokenize)))
        .route("/detokenize", post(|State(server), request| computed(server, request, tokenize::detokenize)))
        .fallback(async || ApiError::not_found("unknown_url", "there is no such route"))
        .method_not_allowed_fallback(async || {
            ApiError::bad_request(axum::http::StatusCode::METHOD_NOT_ALLOWED, "the route does not take that method")
        })
        .layer(from_fn_with_state(Arc::clone(&server), around));
    match &server.guard.origins[..] {
        [] => routes,
        origins => routes.layer(cross_origin(origins)),
    }
    .with_state(server)
}

/// Lets pages of other origins ask.
fn cross_origin(origins: &[String]) -> CorsLayer {
    let allowed = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok())),
    };
    CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(tower_http::cors::Any)
        .expose_headers([HeaderName::from_static("x-request-id"), header::RETRY_AFTER])
}

/// Reads a JSON body and hands it to a handler.
async fn json<F: Future<Output = Result<Response, ApiError>>>(
    server: Arc<Server>,
    request: Request,
    handler: impl FnOnce(Arc<App>, Instant, Map<String, Value>) -> F,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let app = server.app()?;
    server.check_open()?;
    let (parts, body): (_, Body) = request.into_parts();
    let limits = &app.limits;
    let body = fields::read_body(body, limits.max_body_bytes, limits.body_timeout).await?;
    let object = fields::parse_object(&parts.headers, &body)?;
    handler(app, arrived, object).await
}

/// The same for a handler that asks the engine nothing.
async fn computed(
    server: Arc<Server>,
    request: Request,
    handler: fn(&App, Map<String, Value>) -> Result<Value, ApiError>,
) -> Result<Response, ApiError> {
    let compute = async move |app: Arc<App>, _, body| {
        let value = app.prepare(move |app| handler(app, body)).await?;
        Ok(axum::Json(value).into_response())
    };
    json(server, request, compute).await
}

/// What surrounds every route: the guard, the request's id, the count and the log.
async fn around(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let id = request_id(&request).unwrap_or_else(|| unique_id("req-"));
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let authority = request.uri().authority().map(|authority| authority.as_str());
    let is_anthropic = request.uri().path().starts_with("/v1/messages");
    let checked = server.guard.check(request.uri().path(), request.headers(), authority);
    let (key, mut response) = match checked {
        Ok(key) => (key.map(str::to_owned), next.run(request).await),
        Err(error) => (None, error.into_response()),
    };
    if let Some(error) = response.extensions().get::<ApiError>().filter(|_| is_anthropic) {
        response = error.respond(messages_response::error_body(error));
    }
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", id);
    }
    let status = response.status().as_u16();
    let counted = match method {
        Method::GET => "GET",
        Method::POST => "POST",
        _ => "other",
    };
    if let Ok(app) = server.app() {
        app.metrics.http(Http { method: counted, handler: route.clone(), status });
    }
    let key = key.as_deref();
    server.access_log.write(&Entry {
        id: &id,
        method: method.as_str(),
        route: &route,
        status,
        took: start.elapsed(),
        key,
    });
    response
}

/// The client's own id of a request, where it is one that can be written in a log.
fn request_id(request: &Request) -> Option<String> {
    let id = request.headers().get("x-request-id")?.to_str().ok()?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
    (!id.is_empty() && id.len() <= 128 && id.chars().all(is_plain)).then(|| id.to_owned())
}
