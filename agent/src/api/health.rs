//! `GET /health` and `GET /metrics`.

use axum::Json;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};
use serde::Deserialize;

use super::error::ApiError;
use super::{ApiState, PROCESS_START};

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

/// `?llama_server=1`
#[derive(Deserialize)]
pub(super) struct MetricsQuery {
    #[serde(default)]
    llama_server: u8,
}

/// With `llama_server=1` its names too, which have no labels: for a model's own port.
pub(super) async fn metrics(
    State(state): State<ApiState>,
    Query(query): Query<MetricsQuery>,
) -> Result<Response, ApiError> {
    let now = state.engine().stats();
    let text = state.metrics().render(&now);
    let mut text = text.map_err(|error| ApiError::internal(error.to_string()))?;
    if query.llama_server != 0 {
        text.push_str(&state.metrics().render_as_llama_server(&now));
    }
    let started = (PROCESS_START, state.metrics().started().to_string());
    Ok(([started], [(header::CONTENT_TYPE, crate::metrics::TEXT_FORMAT)], text).into_response())
}
