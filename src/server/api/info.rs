//! What the server says of itself: probes, version, models, metrics.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::server::Server;
use crate::server::app::App;
use crate::server::error::ApiError;

/// `GET /health`: 503 only when it is broken for good.
pub(super) async fn health(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    match server.fault() {
        None => Ok(Json(json!({ "status": "ok" }))),
        Some(reason) => Err(ApiError::unavailable(reason)),
    }
}

/// `GET /ready`: 503 until the model is warm, while the server drains, and when it is broken.
pub(super) async fn ready(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    server.app()?;
    server.check_open()?;
    Ok(Json(json!({ "status": "ready" })))
}

/// `GET /version`.
pub(super) async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

/// `GET /metrics`, in the OpenMetrics text format.
pub(super) async fn metrics(State(server): State<Arc<Server>>) -> Result<Response, ApiError> {
    let app = server.app()?;
    let text = app.metrics.encode(&app.engine.load());
    Ok(([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response())
}

/// `GET /v1/models`.
pub(super) async fn models(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    let app = server.app()?;
    let data: Value = app.model.names.iter().map(|name| card(&app, name)).collect();
    Ok(Json(json!({ "object": "list", "data": data })))
}

/// `GET /v1/models/{model}`; names may hold slashes.
pub(super) async fn model(
    State(server): State<Arc<Server>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(name) = name.map_err(|e| ApiError::invalid("model", e.body_text()))?;
    let app = server.app()?;
    app.check_model(Some(&name))?;
    Ok(Json(card(&app, &name)))
}

fn card(app: &App, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": app.created,
        "owned_by": "lowbit",
        "root": app.name(),
        "parent": null,
        "max_model_len": app.max_model_len,
    })
}
