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
use super::keep_alive::KeepAlive;
use super::ollama;
use super::proxy::{self, Ask};
use super::scrape;
use super::shared::Shared;
use super::table::{self, InFlight, Lookup, Model, Route};
use crate::api::{
    ApiError, Form, OPENAPI, asks_worker, check_content_length, check_content_type, clip, collect, is_stream,
    malformed, request_id,
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

/// Every path that the listeners answer themselves: method, path, whether a model's own port has it.
pub const PATHS: [(Method, &str, bool); 23] = [
    (Method::GET, "/healthz", true),
    (Method::GET, "/readyz", false),
    (Method::GET, "/metrics", true),
    (Method::GET, "/health", true),
    (Method::GET, "/v1/health", true),
    (Method::GET, "/openapi.json", true),
    (Method::GET, "/v1/models", true),
    (Method::GET, "/models", true),
    (Method::GET, "/v1/models/{id}", true),
    (Method::GET, "/props", true),
    (Method::GET, "/slots", true),
    (Method::GET, "/", true),
    (Method::GET, "/api/version", true),
    (Method::GET, "/api/tags", true),
    (Method::GET, "/api/ps", true),
    (Method::POST, "/api/show", true),
    (Method::POST, "/api/pull", true),
    (Method::POST, "/api/push", true),
    (Method::POST, "/api/create", true),
    (Method::POST, "/api/copy", true),
    (Method::DELETE, "/api/delete", true),
    (Method::POST, "/api/blobs/{digest}", true),
    (Method::HEAD, "/api/blobs/{digest}", true),
];

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
    if asks_worker(&path) {
        if method != Method::POST {
            return Ok(not_allowed(&method, &path, "POST"));
        }
        return generate(shared, visit, request, id, counted).await;
    }
    if path.starts_with("/api/") {
        return ollama::answer(shared, &visit.door, request).await;
    }
    let is_known = matches!(path.as_str(), "/" | "/openapi.json" | "/v1/models" | "/models" | "/props" | "/slots");
    if !(is_known || path.starts_with("/v1/models/")) {
        return Err(ApiError::unknown_path(&method, &path));
    }
    if method != Method::GET && method != Method::HEAD {
        return Ok(not_allowed(&method, &path, "GET, HEAD"));
    }
    match path.as_str() {
        // Ollama's clients look whether somebody is there.
        "/" => Ok("Altiplano is running\n".into_response()),
        "/openapi.json" => Ok(([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()),
        "/props" | "/slots" => {
            let query = request.uri().query().unwrap_or_default();
            let asked = url::form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "model");
            let model = meant(shared, &visit.door, asked.as_ref().map(|(_, model)| model.as_ref()))?;
            look(shared, &model, &path, query).await
        }
        _ => match path.strip_prefix("/v1/models/") {
            None => {
                let data = list(shared, &visit.door).await;
                let models = data.iter().map(in_llama_servers_words).collect::<Vec<_>>();
                Ok(Json(json!({"object": "list", "data": data, "models": models})).into_response())
            }
            Some(asked) => Ok(Json(describe(shared, &meant(shared, &visit.door, Some(asked))?).await).into_response()),
        },
    }
}

/// What llama-server's list has beside OpenAI's of a model: one word for images and sound.
fn in_llama_servers_words(model: &Value) -> Value {
    let able = |word: &str| model["capabilities"].as_array().is_some_and(|all| all.iter().any(|one| one == word));
    let mut capabilities: Vec<&str> =
        ["completion", "embedding", "rerank"].into_iter().filter(|word| able(word)).collect();
    if able("vision") || able("audio") {
        capabilities.push("multimodal");
    }
    json!({"name": model["id"], "model": model["id"], "type": "model", "capabilities": capabilities})
}

/// The model that a request at `door` is about.
pub(super) fn meant(shared: &Shared, door: &Door, asked: Option<&str>) -> Result<Arc<Model>, ApiError> {
    match (door, asked) {
        (Door::Model(model), asked) if table::is_for(&model.published(), asked) => Ok(Arc::clone(model)),
        (Door::Model(_), asked) => Err(ApiError::model_not_found(asked.unwrap_or_default())),
        (Door::Shared, Some(asked)) => resolve(shared, asked),
        (Door::Shared, None) => Err(ApiError::missing("model")),
    }
}

/// What a worker says of itself. Asking does not wake it, nor keep it awake.
async fn look(shared: &Shared, model: &Model, path: &str, query: &str) -> Result<Response, ApiError> {
    let told = model.told().borrow().clone();
    let asked = if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") };
    if let Some(json) = scrape::get(shared, told, &asked).await {
        return Ok(([(header::CONTENT_TYPE, "application/json")], json).into_response());
    }
    let published = model.published();
    match model.route() {
        // As a llama-server that sleeps.
        Route::Unloaded if path == "/props" => {
            Ok(Json(json!({"model_alias": published.served_name, "is_sleeping": true})).into_response())
        }
        Route::Ready { .. } => Err(ApiError::unavailable("no_slot", "the worker did not answer, or has no slot", 1)),
        route => {
            let message = format!("the model is not loaded: {}", state_word(&route));
            Err(ApiError::unavailable("model_not_loaded", message, 5))
        }
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
        ("/health" | "/v1/health", Door::Model(model)) => Some(model_health(&model.route())),
        ("/health" | "/v1/health", Door::Shared) => {
            let readiness = shared.readiness.borrow().clone();
            Some(health(readiness.err().as_deref(), None))
        }
        ("/readyz", Door::Shared) => Some(match &*shared.readiness.borrow() {
            Ok(()) => "ok\n".into_response(),
            Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
        }),
        ("/metrics", Door::Shared) => Some(
            ([(header::CONTENT_TYPE, crate::metrics::TEXT_FORMAT)], scrape::exposition(shared).await).into_response(),
        ),
        ("/metrics", Door::Model(model)) => Some(scrape::of_model(shared, model).await),
        _ => None,
    }
}

pub(super) fn not_allowed(method: &Method, path: &str, allow: &'static str) -> Response {
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
    #[serde(default)]
    keep_alive: Option<Value>,
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
    let Envelope { model, stream, keep_alive } = serde_json::from_slice(&body).map_err(|error| malformed(&error))?;
    let asked = match model {
        None => None,
        Some(Value::String(model)) => Some(model),
        Some(_) => return Err(ApiError::invalid("model", "'model' must be a string")),
    };
    let model = meant(shared, &visit.door, asked.as_deref())?;
    let form = Form::of(parts.uri.path());
    // A field of Ollama's alone.
    let keep_alive = if form == Form::Ollama { KeepAlive::read(keep_alive.as_ref())? } else { None };
    if keep_alive.is_some_and(KeepAlive::is_unload)
        && let Some(answer) = ollama::unload(&model, parts.uri.path(), asked.as_deref(), &body)
    {
        return answer;
    }
    *counted = Some(Arc::clone(&model));
    let deadline = arrived + model.published().request_timeout() + limits.worker_silence;
    let ask = Ask {
        method: parts.method,
        path: parts.uri.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string),
        headers: proxy::outgoing(&parts.headers, id),
        body,
        buffered,
        form,
        stream: if ollama::streams(parts.uri.path()) {
            stream != Some(Value::Bool(false))
        } else {
            stream == Some(Value::Bool(true))
        },
        request_id: id.to_owned(),
        arrived,
    };
    let (mut in_flight, _) = InFlight::begin(model);
    in_flight.keep(keep_alive);
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
        // Before the agent knows its models it cannot say that one does not exist.
        Lookup::NotFound => match &*shared.readiness.borrow() {
            Ok(()) => ApiError::model_not_found(asked),
            Err(why) => ApiError::unavailable("not_ready", why.clone(), 1),
        },
        Lookup::Ambiguous(names) => {
            let some: Vec<_> = names.iter().take(5).map(String::as_str).collect();
            let message = format!("several models are called '{}': ask for one of {}", clip(asked), some.join(", "));
            ApiError::invalid("model", message)
        }
    })
}

/// The models that a door leads to.
pub(super) fn models(shared: &Shared, door: &Door) -> Vec<Arc<Model>> {
    match door {
        Door::Model(model) => vec![Arc::clone(model)],
        Door::Shared => shared.read(super::table::Table::sorted),
    }
}

async fn list(shared: &Shared, door: &Door) -> Vec<Value> {
    /// Workers asked at the same time.
    const AT_ONCE: usize = 16;
    let models = models(shared, door);
    let described = futures::stream::iter(models).map(|model| async move { with_adapters(shared, &model).await });
    described.buffered(AT_ONCE).concat().await
}

/// A model and its adapters as `/v1/models` lists them.
async fn with_adapters(shared: &Shared, model: &Arc<Model>) -> Vec<Value> {
    let whole = describe(shared, model).await;
    let id = whole["id"].as_str().unwrap_or_default().to_owned();
    let adapter = |name: &String| {
        let mut entry = whole.clone();
        entry["id"] = format!("{id}:{name}").into();
        entry["parent"] = id.as_str().into();
        entry
    };
    let adapters: Vec<_> = model.published().adapters.iter().map(adapter).collect();
    std::iter::once(whole).chain(adapters).collect()
}

/// The name that leads to the model on the shared port: its served name where only it has it.
pub(super) fn id_of(shared: &Shared, model: &Arc<Model>) -> String {
    let published = model.published();
    let resolved = shared.read(|table| table.resolve(&published.served_name));
    let is_unique = resolved.is_ok_and(|found| Arc::ptr_eq(&found, model));
    if is_unique { published.served_name.clone() } else { published.full_name() }
}

/// A model as `/v1/models` lists it, with what its worker says, or its file where there is no worker.
async fn describe(shared: &Shared, model: &Arc<Model>) -> Value {
    let published = model.published();
    let told = model.told().borrow().clone();
    let said = scrape::get(shared, told, "/v1/models").await;
    let said: Option<Value> = said.and_then(|said| serde_json::from_slice(&said).ok());
    let worker = said.as_ref().and_then(|said| said.pointer("/data/0"));
    let meta = worker.and_then(|worker| worker.get("meta")).cloned().or_else(|| {
        let card = model.card();
        let file = card.file.as_ref()?;
        Some(json!({
            "architecture": file.header.architecture,
            "n_ctx_train": file.header.trained_context_tokens,
            "n_params": file.header.parameter_count,
            "size": file.size_bytes,
        }))
    });
    let mut described = json!({
        "id": id_of(shared, model),
        "object": "model",
        "created": shared.started,
        "owned_by": "altiplano",
        "root": published.full_name(),
        "state": state_word(&model.route()),
        "meta": meta,
    });
    for name in ["max_model_len", "capabilities"] {
        if let Some(said) = worker.and_then(|worker| worker.get(name)) {
            described[name] = said.clone();
        }
    }
    described
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

/// "ok" when a request would be accepted: also while the model is unloaded, which a request ends.
fn model_health(route: &Route) -> Response {
    let why_not = match route {
        Route::Ready { .. } | Route::Unloaded => None,
        // llama-server's words.
        Route::Loading => Some("Loading model"),
        Route::Draining => Some("the model is leaving this node"),
        Route::Unavailable { message, .. } => Some(message.as_str()),
    };
    health(why_not, Some(state_word(route)))
}

/// llama-server's form, with the state beside it.
fn health(why_not: Option<&str>, state: Option<&str>) -> Response {
    match why_not {
        None => Json(json!({"status": "ok", "state": state})).into_response(),
        Some(message) => {
            let error = json!({"code": 503, "message": message, "type": "unavailable_error"});
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"error": error, "state": state}))).into_response()
        }
    }
}
