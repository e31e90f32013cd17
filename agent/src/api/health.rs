//! `GET /health` and `GET /metrics`.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};

use super::ApiState;
use super::error::ApiError;

pub(super) async fn health(State(state): State<ApiState>) -> Response {
    let now = state.engine().stats();
    let stuck = now.step_age > state.options().stuck_after;
    let (status, word) = if stuck { (StatusCode::SERVICE_UNAVAILABLE, "stuck") } else { (StatusCode::OK, "ok") };
    let body = serde_json::json!({"status": word, "running": now.running, "waiting": now.waiting});
    (status, Json(body)).into_response()
}

pub(super) async fn metrics(State(state): State<ApiState>) -> Result<Response, ApiError> {
    let text = state.metrics().render(&state.engine().stats());
    let text = text.map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, crate::metrics::TEXT_FORMAT)], text).into_response())
}
