//! The APIs of one model, over the engine in this process. The worker serves them on its Unix socket; the agent's
//! listeners pass requests on to it.
//!
//! | path | | where |
//! |---|---|---|
//! | `POST /v1/chat/completions` | the model's own Jinja template; streaming or not | [`chat`] |
//! | `POST /v1/chat/completions/input_tokens`, `/v1/responses/input_tokens` | tokens of such a request | [`chat`], [`responses`] |
//! | `POST /v1/completions` | a string, strings, or tokens; streaming or not | [`completions`] |
//! | `POST /v1/embeddings`, `/v1/rerank` and their other names | for models whose file names a pooling | [`embed`] |
//! | `POST /v1/responses` | OpenAI's Responses, without state; streaming or not | [`responses`] |
//! | `POST /v1/messages` | Anthropic's Messages; streaming or not | [`anthropic`] |
//! | `POST /v1/messages/count_tokens` | tokens of such a request | [`anthropic`] |
//! | `GET /v1/models`, `/v1/models/{id}` | this model | [`models`] |
//! | `POST /completion`, `/infill`, `/tokenize`, `/detokenize`, `/apply-template`, `GET /props`, `/slots` | llama-server's own | [`native`] |
//! | `POST /api/chat`, `/api/generate`, `/api/embed`, `/api/embeddings` | Ollama's | [`ollama`] |
//! | `GET /health` | 200 while the engine makes steps | [`health`] |
//! | `GET /metrics` | this worker's metrics | [`health`] |
//!
//! A request's way: [`intake`] lets it in and reads it, its API checks what it asks for (`params` are what all of them
//! share) and makes a job of it, [`run`] drives the generations, an [`output`] parser finds reasoning and tool calls in
//! their text, and the API's [`dialect`] says it. [`form`] has what the APIs do differently beside that: errors,
//! framing, signs of life.
//!
//! Paths that llama-server has without `/v1` too are the same here: `/chat/completions`, `/responses` and their
//! `/input_tokens`. Its `/completions` is its own `/completion`.
//! What becomes of a prompt that is too long stands in [`overflow`].
//!
//! What the API takes and what it refuses is said where it is read: [`params`], `messages`, [`chat`], [`completions`],
//! [`responses`], [`anthropic`]. Bodies are JSON of at most 32 MiB. Every answer carries `x-request-id`.

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
mod live;
mod media;
mod models;
mod native;
mod ollama;
mod openai;
mod output;
mod overflow;
pub mod params;
mod request_id;
mod responses;
mod run;
mod sampling;
mod state;
mod wire;

use std::collections::HashSet;
use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::{MethodRouter, get, post};
use http::Method;

pub use body::DEFAULT_BODY_LIMIT;
pub use error::ApiError;
pub use media::{MAX_ALL_PIXELS, MAX_CHANNELS, MAX_MEDIA, MAX_PIXELS, MAX_RATIO, MAX_SECONDS};
pub use state::{ApiOptions, ApiState, ApiStateError};

pub(crate) use body::{check_content_length, check_content_type, collect, malformed};
pub(crate) use error::clip;
pub(crate) use form::{Form, is_stream};
pub(crate) use overflow::word as overflow_word;
pub(crate) use request_id::{REQUEST_ID, request_id};

/// Ollama's tag for the version of a model that there is.
pub(crate) const LATEST: &str = ":latest";

/// Milliseconds that the request may still wait for a slot, from the agent that held it before. Internal: the agent
/// drops what a client sends under this name.
pub(crate) const QUEUE_BUDGET: http::HeaderName = http::HeaderName::from_static("x-altiplano-queue-budget-ms");

/// Milliseconds for which the agent has held the request until a worker was there. Internal, as the one above.
pub(crate) const HELD: http::HeaderName = http::HeaderName::from_static("x-altiplano-held-ms");

/// Seconds since 1970 when the counters of `/metrics` began, as llama-server says it.
pub(crate) const PROCESS_START: http::HeaderName = http::HeaderName::from_static("process-start-time-unix");

/// The document of the whole HTTP API, agent and worker.
pub const OPENAPI: &str = include_str!("../../openapi.json");

/// Method and path of everything that a worker answers.
#[must_use]
pub fn paths() -> Vec<(Method, &'static str)> {
    routes().into_iter().map(|(method, path, _)| (method, path)).collect()
}

/// Every path of a worker: method, path, handler. The agent's listeners pass on what stands here with POST.
fn routes() -> Vec<(Method, &'static str, MethodRouter<ApiState>)> {
    let asks = |path, handler| (Method::POST, path, handler);
    let looks = |path, handler| (Method::GET, path, handler);
    let mut routes = vec![
        asks("/v1/chat/completions", post(chat::chat_completions)),
        asks("/chat/completions", post(chat::chat_completions)),
        asks("/v1/chat/completions/input_tokens", post(chat::input_tokens)),
        asks("/chat/completions/input_tokens", post(chat::input_tokens)),
        asks("/v1/completions", post(completions::text_completions)),
        asks("/v1/responses", post(responses::responses)),
        asks("/responses", post(responses::responses)),
        asks("/v1/responses/input_tokens", post(responses::input_tokens)),
        asks("/responses/input_tokens", post(responses::input_tokens)),
        asks("/v1/messages", post(anthropic::messages)),
        asks("/v1/messages/count_tokens", post(anthropic::count_tokens)),
        asks("/completion", post(native::completion::completion)),
        asks("/completions", post(native::completion::completion)),
        asks("/infill", post(native::infill::infill)),
        asks("/tokenize", post(native::tokens::tokenize)),
        asks("/detokenize", post(native::tokens::detokenize)),
        asks("/apply-template", post(native::tokens::apply_template)),
        asks("/api/chat", post(ollama::chat)),
        asks("/api/generate", post(ollama::generate)),
        asks("/api/embed", post(ollama::embed::embed)),
        asks("/api/embeddings", post(ollama::embed::embeddings)),
        looks("/props", get(native::props::props)),
        looks("/slots", get(native::props::slots)),
        looks("/v1/models", get(models::list)),
        looks("/models", get(models::list)),
        looks("/v1/models/{*id}", get(models::one)),
        looks("/health", get(health::health)),
        looks("/v1/health", get(health::health)),
        looks("/metrics", get(health::metrics)),
    ];
    routes.extend(embed::routes().map(|(path, handler)| asks(path, handler)));
    routes
}

/// Whether a request to `path` is for a worker, which it wakes.
pub(crate) fn asks_worker(path: &str) -> bool {
    static PATHS: LazyLock<HashSet<&'static str>> = LazyLock::new(|| {
        let asks = routes().into_iter().filter(|(method, ..)| *method == Method::POST);
        asks.map(|(_, path, _)| path).collect()
    });
    PATHS.contains(path)
}

/// The API as a router.
pub fn router(state: ApiState) -> Router {
    routes()
        .into_iter()
        .fold(Router::new(), |router, (_, path, handler)| router.route(path, handler))
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
