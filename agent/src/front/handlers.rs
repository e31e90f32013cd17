//! What the agent's listeners answer: a model's own port, and the port that all models share.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, header};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::buffer::Buffered;
use super::proxy::{self, Ask};
use super::scrape;
use super::shared::Shared;
use super::table::{self, InFlight, Lookup, Model, Route};
use crate::api::{
    ApiError, EMBEDDING_PATHS, Form, check_content_length, check_content_type, clip, collect, is_stream, malformed,
    request_id,
};

/// Which listener a request came in by.
#[derive(Clone)]
pub(super) enum Door {
    /// The port of all models.
    Shared,
    /// The port of this model.
    Model(Arc<Model>),
}

/// A request's connection.
pub(super) struct Visit {
    pub(super) door: Door,
    /// Whether the listener holds more connections than it should.
    pub(super) is_overflow: bool,
    /// Ends the connection at once.
    pub(super) abort: CancellationToken,
}

/// Paths that ask a worker, all by POST.
const GENERATION: [&str; 5] =
    ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"];

/// Answers a request, whatever it is.
pub(super) async fn handle(shared: Arc<Shared>, visit: Visit, request: Request<Incoming>) -> Response {
    let id = request_id(request.headers());
    let form = Form::of(request.uri().path());
    let mut counted = None;
    let response = match route(&shared, &visit, request, &id, &mut counted).await {
        Ok(response) => response,
        Err(error) => {
            tracing::debug!(request_id = %id, status = error.status.as_u16(), error = %error.message, "refused");
            error.into_response()
        }
    };
    let mut response = form.finish(response, &id);
    let published = counted.map(|model| model.published());
    let (namespace, name) = published.as_ref().map_or(("", ""), |model| (&model.namespace, &model.name));
    shared.metrics.answered(namespace, name, response.status());
    if visit.is_overflow {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

async fn route(
    shared: &Arc<Shared>,
    visit: &Visit,
    request: Request<Incoming>,
    id: &str,
    counted: &mut Option<Arc<Model>>,
) -> Result<Response, ApiError> {
    if let Some(answer) = probes(shared, &visit.door, &request).await {
        return Ok(answer);
    }
    if visit.is_overflow {
        return Err(ApiError::unavailable("too_many_connections", "clients hold too many connections", 1));
    }
    if matches!(visit.door, Door::Shared) && !shared.lets_in(token(request.headers())) {
        return Err(ApiError::unauthorized());
    }
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    if GENERATION.contains(&path.as_str()) || EMBEDDING_PATHS.contains(&path.as_str()) {
        if method != Method::POST {
            return Ok(not_allowed(&method, &path, "POST"));
        }
        return generate(shared, visit, request, id, counted).await;
    }
    let is_models = path == "/v1/models" || path.starts_with("/v1/models/");
    let is_health = path == "/health" && matches!(visit.door, Door::Model(_));
    if !(is_models || is_health) {
        return Err(ApiError::unknown_path(&method, &path));
    }
    if method != Method::GET && method != Method::HEAD {
        return Ok(not_allowed(&method, &path, "GET, HEAD"));
    }
    match (&visit.door, path.strip_prefix("/v1/models/")) {
        (Door::Model(model), None) if !is_models => Ok(model_health(model)),
        (door, None) => Ok(Json(json!({"object": "list", "data": list(shared, door)})).into_response()),
        (Door::Model(model), Some(asked)) if table::is_for(&model.published(), Some(asked)) => {
            Ok(Json(describe(shared, model)).into_response())
        }
        (Door::Model(_), Some(asked)) => Err(ApiError::model_not_found(asked)),
        (Door::Shared, Some(asked)) => Ok(Json(describe(shared, &resolve(shared, asked)?)).into_response()),
    }
}

/// The token that a client shows: `Authorization: Bearer`, or `x-api-key` as Anthropic's clients do.
fn token(headers: &HeaderMap) -> Option<&str> {
    let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let bearer = text(&header::AUTHORIZATION)
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    bearer.map(|(_, token)| token.trim()).or_else(|| text(&proxy::API_KEY))
}

/// What probes and Prometheus ask for, without a token.
async fn probes(shared: &Arc<Shared>, door: &Door, request: &Request<Incoming>) -> Option<Response> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return None;
    }
    match (request.uri().path(), door) {
        ("/healthz", _) => Some("ok\n".into_response()),
        ("/readyz", Door::Shared) => Some(match &*shared.readiness.borrow() {
            Ok(()) => "ok\n".into_response(),
            Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
        }),
        ("/metrics", Door::Shared) => Some(
            ([(header::CONTENT_TYPE, crate::metrics::TEXT_FORMAT)], scrape::exposition(shared).await).into_response(),
        ),
        _ => None,
    }
}

fn not_allowed(method: &Method, path: &str, allow: &'static str) -> Response {
    let mut response = ApiError::wrong_method(method, path).into_response();
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allow));
    response
}

/// The fields that matter for the way to a worker; the worker reads the rest.
#[derive(Deserialize)]
struct Envelope {
    #[serde(default)]
    model: Option<Value>,
    #[serde(default)]
    stream: Option<Value>,
}

async fn generate(
    shared: &Arc<Shared>,
    visit: &Visit,
    request: Request<Incoming>,
    id: &str,
    counted: &mut Option<Arc<Model>>,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let limits = &shared.limits;
    check_content_type(request.headers())?;
    check_content_length(request.headers(), limits.body_limit)?;
    let (parts, body) = request.into_parts();
    let mut buffered = Buffered::new(&shared.budget, &shared.metrics);
    let grow = |bytes| buffered.grow(bytes);
    let body = collect(Body::new(body), limits.body_limit, limits.body_timeout, grow).await?;
    let Envelope { model, stream } = serde_json::from_slice(&body).map_err(|error| malformed(&error))?;
    let asked = match model {
        None => None,
        Some(Value::String(model)) => Some(model),
        Some(_) => return Err(ApiError::invalid("model", "'model' must be a string")),
    };
    let model = match (&visit.door, asked.as_deref()) {
        (Door::Model(model), asked) if table::is_for(&model.published(), asked) => Arc::clone(model),
        (Door::Model(_), asked) => return Err(ApiError::model_not_found(asked.unwrap_or_default())),
        (Door::Shared, Some(asked)) => resolve(shared, asked)?,
        (Door::Shared, None) => return Err(ApiError::missing("model")),
    };
    *counted = Some(Arc::clone(&model));
    let deadline = arrived + model.published().request_timeout() + limits.worker_silence;
    let ask = Ask {
        method: parts.method,
        path: parts.uri.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string),
        headers: proxy::outgoing(&parts.headers, id),
        body,
        buffered,
        form: Form::of(parts.uri.path()),
        stream: stream == Some(Value::Bool(true)),
        request_id: id.to_owned(),
        arrived,
    };
    let (in_flight, _) = InFlight::begin(model);
    let response = proxy::answer(Arc::clone(shared), in_flight, ask).await?;
    Ok(if is_stream(response.headers()) { guard_stall(response, deadline, visit.abort.clone()) } else { response })
}

/// Ends the connection of a client that stopped reading its stream: nobody polls such a stream, so no time-out inside
/// it would ever come to pass.
fn guard_stall(response: Response, deadline: Instant, abort: CancellationToken) -> Response {
    struct Timer(tokio::task::JoinHandle<()>);
    impl Drop for Timer {
        fn drop(&mut self) {
            self.0.abort();
        }
    }
    let timer = Timer(tokio::spawn(async move {
        tokio::time::sleep_until(deadline.into()).await;
        abort.cancel();
    }));
    response.map(|body| {
        Body::from_stream(body.into_data_stream().map(move |piece| {
            let _until_the_end = &timer;
            piece
        }))
    })
}

fn resolve(shared: &Shared, asked: &str) -> Result<Arc<Model>, ApiError> {
    shared.read(|table| table.resolve(asked)).map_err(|lookup| match lookup {
        Lookup::NotFound => ApiError::model_not_found(asked),
        Lookup::Ambiguous(names) => {
            let some: Vec<_> = names.iter().take(5).map(String::as_str).collect();
            let message = format!("several models are called '{}': ask for one of {}", clip(asked), some.join(", "));
            ApiError::invalid("model", message)
        }
    })
}

fn list(shared: &Shared, door: &Door) -> Vec<Value> {
    match door {
        Door::Model(model) => vec![describe(shared, model)],
        Door::Shared => shared.read(super::table::Table::sorted).iter().map(|model| describe(shared, model)).collect(),
    }
}

/// A model as `/v1/models` lists it. Its id leads to it on the shared port: the served name where only it has it.
fn describe(shared: &Shared, model: &Arc<Model>) -> Value {
    let published = model.published();
    let resolved = shared.read(|table| table.resolve(&published.served_name));
    let is_unique = resolved.is_ok_and(|found| Arc::ptr_eq(&found, model));
    let id = if is_unique { published.served_name.clone() } else { published.full_name() };
    json!({
        "id": id,
        "object": "model",
        "created": shared.started,
        "owned_by": "altiplano",
        "root": published.full_name(),
        "state": state_word(&model.route()),
    })
}

fn state_word(route: &Route) -> &'static str {
    match route {
        Route::Ready { .. } => "Ready",
        Route::Unloaded => "Unloaded",
        Route::Loading => "Loading",
        Route::Draining => "Draining",
        Route::Unavailable { .. } => "Unavailable",
    }
}

/// 200 when a request would be accepted: also while the model is unloaded, which a request ends.
fn model_health(model: &Model) -> Response {
    let route = model.route();
    let status = match &route {
        Route::Ready { .. } | Route::Unloaded => StatusCode::OK,
        Route::Loading | Route::Draining | Route::Unavailable { .. } => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, Json(json!({"status": state_word(&route)}))).into_response()
}
