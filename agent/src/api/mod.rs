//! The APIs of one model, over the engine in this process. The worker serves them on its Unix socket; the agent's
//! listeners pass requests on to it.
//!
//! | path | | where |
//! |---|---|---|
//! | `POST /v1/chat/completions` | the model's own Jinja template; streaming or not | [`chat`] |
//! | `POST /v1/completions` | a string, strings, or tokens; streaming or not | [`completions`] |
//! | `POST /v1/embeddings`, `/v1/rerank` and their other names | for models whose file names a pooling | [`embed`] |
//! | `POST /v1/responses` | OpenAI's Responses, without state; streaming or not | [`responses`] |
//! | `POST /v1/messages` | Anthropic's Messages; streaming or not | [`anthropic`] |
//! | `POST /v1/messages/count_tokens` | tokens of such a request | [`anthropic`] |
//! | `GET /v1/models`, `/v1/models/{id}` | this model | [`models`] |
//! | `GET /health` | 200 while the engine makes steps | [`health`] |
//! | `GET /metrics` | this worker's metrics | [`health`] |
//!
//! A request's way: [`intake`] lets it in and reads it, its API checks what it asks for (`params` are what all of them
//! share) and makes a job of it, [`run`] drives the generations, an [`output`] parser finds reasoning and tool calls in
//! their text, and the API's [`dialect`] says it. [`form`] has what the APIs do differently beside that: errors,
//! framing, signs of life.
//!
//! What the API takes and what it refuses is said where it is read: [`params`], `messages`, [`chat`], [`completions`],
//! [`responses`], [`anthropic`]. Bodies are JSON of at most 8 MiB. Every answer carries `x-request-id`.

mod anthropic;
mod body;
pub mod chat;
pub mod completions;
mod dialect;
pub mod embed;
mod error;
mod fields;
mod form;
mod frames;
mod health;
mod intake;
mod models;
mod openai;
mod output;
pub mod params;
mod request_id;
mod responses;
mod run;
mod sampling;
mod state;
mod wire;

use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::{get, post};

pub use body::DEFAULT_BODY_LIMIT;
pub use error::ApiError;
pub use state::{ApiOptions, ApiState, ApiStateError};

pub(crate) use body::{check_content_length, check_content_type, collect, malformed};
pub(crate) use embed::PATHS as EMBEDDING_PATHS;
pub(crate) use error::clip;
pub(crate) use form::{Form, is_stream};
pub(crate) use request_id::{REQUEST_ID, request_id};

/// Milliseconds that the request may still wait for a slot, from the agent that held it before. Internal: the agent
/// drops what a client sends under this name.
pub(crate) const QUEUE_BUDGET: http::HeaderName = http::HeaderName::from_static("x-altiplano-queue-budget-ms");

/// The API as a router.
pub fn router(state: ApiState) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/completions", post(completions::text_completions))
        .merge(embed::routes())
        .route("/v1/responses", post(responses::responses))
        .route("/v1/messages", post(anthropic::messages))
        .route("/v1/messages/count_tokens", post(anthropic::count_tokens))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/health", get(health::health))
        .route("/metrics", get(health::metrics))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(axum::middleware::from_fn_with_state(state.clone(), around))
        .with_state(state)
}

/// The request's identity, for handlers and logs.
#[derive(Clone)]
struct RequestId(String);

async fn around(State(state): State<ApiState>, mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let form = Form::of(request.uri().path());
    request.extensions_mut().insert(RequestId(id.clone()));
    let response = form.finish(next.run(request).await, &id);
    state.metrics().http_answered(response.status());
    response
}

async fn unknown_path(request: Request) -> ApiError {
    ApiError::unknown_path(request.method(), request.uri().path())
}

async fn wrong_method(request: Request) -> ApiError {
    ApiError::wrong_method(request.method(), request.uri().path())
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
