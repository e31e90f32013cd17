//! `GET /health` and `GET /metrics`.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};

use super::ApiState;
use super::error::ApiError;

pub(super) async fn health(State(state): State<ApiState>) -> Response {
    let now = state.engine().stats();
    if now.step_age > state.options().stuck_after {
        // llama-server's form of an answer that is not "ok".
        let message = "the engine has been in one step for too long";
        let body = serde_json::json!({"error": {"code": 503, "message": message, "type": "unavailable_error"}});
        return (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response();
    }
    Json(serde_json::json!({"status": "ok", "running": now.running, "waiting": now.waiting})).into_response()
}

pub(super) async fn metrics(State(state): State<ApiState>) -> Result<Response, ApiError> {
    let text = state.metrics().render(&state.engine().stats());
    let text = text.map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, crate::metrics::TEXT_FORMAT)], text).into_response())
}
