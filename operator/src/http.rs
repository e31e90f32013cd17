//! /livez, /readyz and /metrics.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::clock::Clock;
use crate::fleet::observe::Mirrors;
use crate::metrics::Metrics;

/// What the answers are made of.
#[derive(Clone)]
pub struct HttpState {
    /// Ready when all of them have been listed.
    pub mirrors: Arc<Mirrors>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// The clock.
    pub clock: Clock,
}

/// The routes.
pub fn router(state: HttpState) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(state)
}

/// Ready after the first list of every watch, leading or not: a standby is of use.
async fn ready(State(state): State<HttpState>) -> Response {
    let missing = state.mirrors.missing();
    if missing.is_empty() {
        return "ok\n".into_response();
    }
    let text = format!("not listed yet: {}\n", missing.join(", "));
    (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
}

async fn metrics(State(state): State<HttpState>) -> Response {
    let now = state.clock.mono();
    for (kind, last) in state.mirrors.last_events() {
        state.metrics.watch_age(kind, last.map_or(now, |last| now.saturating_sub(last)).as_secs_f64());
    }
    match state.metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}
