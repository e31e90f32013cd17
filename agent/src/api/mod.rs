//! The OpenAI-compatible API of one model, over the engine in this process. The worker serves it on its Unix socket;
//! the agent's listeners pass requests on to it.
//!
//! | path | |
//! |---|---|
//! | `POST /v1/chat/completions` | the model's own Jinja template; streaming or not |
//! | `POST /v1/completions` | a string, strings, or tokens; streaming or not |
//! | `GET /v1/models`, `/v1/models/{id}` | this model |
//! | `GET /health` | 200 while the engine makes steps |
//! | `GET /metrics` | this worker's metrics |
//!
//! What the API takes and what it refuses is said where it is read: [`params`] for both APIs, `messages`, `chat` and
//! [`completions`] for their own. Bodies are JSON of at most 8 MiB. Every answer carries `x-request-id`. Errors have
//! OpenAI's form; one that happens after a stream began is an `error` event.

mod body;
mod chat;
pub mod completions;
mod error;
mod fields;
mod messages;
pub mod params;
mod request_id;
mod run;
mod sse;
mod template;
mod wire;

use std::sync::Arc;
use std::time::{Duration, Instant};

use altiplano_crds::model_deployment::{SamplingSpec, TrafficSpec};
use axum::extract::{Path, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::engine::{Engine, GenerateRequest, SamplingParams};
use crate::metrics::WorkerMetrics;
use crate::runner::protocol::RunnerConfig;

pub use body::DEFAULT_BODY_LIMIT;
pub use error::ApiError;
pub use messages::MAX_MESSAGES;
pub use template::{ChatTemplate, TemplateError};

pub(crate) use body::{check_content_length, check_content_type, collect, malformed};
pub(crate) use error::clip;
pub(crate) use request_id::{REQUEST_ID, request_id};
pub(crate) use run::unix_seconds;
pub(crate) use sse::{PING, error as error_event, error_json as error_event_json, is_stream, response as event_stream};

/// Milliseconds that the request may still wait for a slot, from the agent that held it before. Internal: the agent
/// drops what a client sends under this name.
pub(crate) const QUEUE_BUDGET: http::HeaderName = http::HeaderName::from_static("x-altiplano-queue-budget-ms");

/// Limits that do not come from the ModelDeployment.
#[derive(Clone, Debug)]
pub struct ApiOptions {
    /// Bytes of a body.
    pub body_limit: usize,
    /// Time for a client to send its body.
    pub body_timeout: Duration,
    /// Time between two signs of life on a stream.
    pub ping_interval: Duration,
    /// A step of the engine that takes longer makes `/health` fail.
    pub stuck_after: Duration,
}

impl Default for ApiOptions {
    fn default() -> Self {
        Self {
            body_limit: DEFAULT_BODY_LIMIT,
            body_timeout: Duration::from_secs(30),
            ping_interval: Duration::from_secs(10),
            stuck_after: Duration::from_mins(2),
        }
    }
}

/// A state that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ApiStateError {
    /// A sampling parameter of the deployment is no number in its range.
    #[error("spec.engine.sampling.{field} is '{value}', which is no number in its range")]
    InvalidSampling {
        /// Field of the spec.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// The metrics could not be made.
    #[error("cannot make the metrics")]
    Metrics(#[from] prometheus::Error),
}

/// What the handlers share; clones are cheap.
#[derive(Clone)]
pub struct ApiState(Arc<Inner>);

struct Inner {
    engine: Engine,
    served_name: String,
    names: [String; 2],
    created: u64,
    defaults: SamplingParams,
    template: Option<Result<ChatTemplate, TemplateError>>,
    metrics: Arc<WorkerMetrics>,
    options: ApiOptions,
    queue_timeout: Duration,
    request_timeout: Duration,
    max_queued: u32,
    /// Requests that are read, wait or run: a bound on the memory of their bodies.
    admission: Arc<Semaphore>,
    /// Threads that render and tokenise at the same time.
    preparing: Semaphore,
}

impl ApiState {
    /// The API of the model that `engine` holds.
    pub fn new(engine: Engine, config: &RunnerConfig, options: ApiOptions) -> Result<Self, ApiStateError> {
        let TrafficSpec { max_queued, queue_timeout_seconds, request_timeout_seconds, rate_limits: _ } =
            &config.traffic;
        let seconds = |number: i32| Duration::from_secs(u64::try_from(number).unwrap_or(0).max(1));
        let max_queued = u32::try_from(*max_queued).unwrap_or(0);
        let parallel = engine.report().parallel.max(1);
        let facts = engine.model();
        let compile = |source: &String| ChatTemplate::compile(source, &facts.bos_text, &facts.eos_text);
        let template = facts.chat_template.as_ref().map(compile);
        if let Some(Err(error)) = &template {
            tracing::warn!(%error, "chat completions will be refused");
        }
        // Some more than run and wait: who comes to a full queue reads "queue full", not a connection that hangs.
        let in_flight = max_queued.saturating_add(parallel).saturating_add(8) as usize;
        Ok(Self(Arc::new(Inner {
            template,
            engine,
            served_name: config.served_name.clone(),
            names: [config.name.clone(), format!("{}/{}", config.namespace, config.name)],
            created: run::unix_seconds(),
            defaults: sampling_defaults(config.engine.sampling.as_ref())?,
            metrics: Arc::new(WorkerMetrics::new(&config.namespace, &config.name)?),
            options,
            queue_timeout: seconds(*queue_timeout_seconds),
            request_timeout: seconds(*request_timeout_seconds),
            max_queued,
            admission: Arc::new(Semaphore::new(in_flight.min(Semaphore::MAX_PERMITS))),
            preparing: Semaphore::new(std::thread::available_parallelism().map_or(2, usize::from)),
        })))
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.0.engine
    }

    pub(crate) fn served_name(&self) -> &str {
        &self.0.served_name
    }

    pub(crate) fn metrics(&self) -> &Arc<WorkerMetrics> {
        &self.0.metrics
    }

    pub(crate) fn request_timeout(&self) -> Duration {
        self.0.request_timeout
    }

    pub(crate) fn ping_interval(&self) -> Duration {
        self.0.options.ping_interval
    }

    /// Seconds after which a slot may be free: what a request takes here on average.
    pub(crate) fn retry_after(&self) -> u32 {
        let seconds = self.0.metrics.mean_request_seconds().unwrap_or(1.0).ceil().clamp(1.0, 60.0);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 60")]
        let seconds = seconds as u32;
        seconds
    }

    pub(crate) fn template(&self) -> Result<&ChatTemplate, ApiError> {
        match &self.0.template {
            Some(Ok(template)) => Ok(template),
            Some(Err(error)) => Err(ApiError::invalid("messages", error.to_string())),
            None => Err(ApiError::invalid(
                "messages",
                "this model has no chat template: use /v1/completions, or set spec.model.chatTemplate",
            )),
        }
    }

    fn check_model(&self, fields: &Map<String, Value>) -> Result<(), ApiError> {
        match fields.get("model") {
            None | Some(Value::Null) => Ok(()),
            Some(Value::String(model)) if *model == self.0.served_name || self.0.names.contains(model) => Ok(()),
            Some(Value::String(model)) => Err(ApiError::model_not_found(model)),
            Some(other) => Err(fields::wrong_type("model", "a string", other)),
        }
    }

    fn admit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        Arc::clone(&self.0.admission)
            .try_acquire_owned()
            .map_err(|_| ApiError::queue_full(self.0.max_queued, self.retry_after()))
    }

    /// Runs what takes long (rendering, tokenising) on a thread that may block, as many at once as there are CPUs.
    async fn prepare<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let state = self.clone();
        let turn = self.0.preparing.acquire().await.map_err(|error| ApiError::internal(error.to_string()))?;
        let done = tokio::task::spawn_blocking(move || work(&state)).await;
        drop(turn);
        done.map_err(|error| ApiError::internal(error.to_string()))?
    }
}

/// The deployment's `sampling` over llama.cpp's defaults.
fn sampling_defaults(spec: Option<&SamplingSpec>) -> Result<SamplingParams, ApiStateError> {
    let mut sampling = SamplingParams::default();
    let Some(SamplingSpec { temperature, top_p, min_p, top_k, repeat_penalty }) = spec else { return Ok(sampling) };
    let number = |field, value: &Option<String>, default: f32, most: f32| match value {
        None => Ok(default),
        Some(text) => match text.parse::<f32>() {
            Ok(number) if (0.0..=most).contains(&number) => Ok(number),
            _ => Err(ApiStateError::InvalidSampling { field, value: clip(text).into_owned() }),
        },
    };
    sampling.temperature = number("temperature", temperature, sampling.temperature, 100.0)?;
    sampling.top_p = number("topP", top_p, sampling.top_p, 1.0)?;
    sampling.min_p = number("minP", min_p, sampling.min_p, 1.0)?;
    sampling.repeat_penalty = number("repeatPenalty", repeat_penalty, sampling.repeat_penalty, 100.0)?;
    if let Some(top_k) = top_k {
        sampling.top_k = u32::try_from(*top_k)
            .map_err(|_| ApiStateError::InvalidSampling { field: "topK", value: top_k.to_string() })?;
    }
    Ok(sampling)
}

/// The API as a router.
pub fn router(state: ApiState) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(text_completions))
        .route("/v1/models", get(list_models))
        .route("/v1/models/{*id}", get(one_model))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
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
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = next.run(request).await;
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    state.metrics().http_answered(response.status());
    response
}

async fn unknown_path(request: Request) -> ApiError {
    ApiError::unknown_path(request.method(), request.uri().path())
}

async fn wrong_method(request: Request) -> ApiError {
    ApiError::wrong_method(request.method(), request.uri().path())
}

/// Reads the body as an object that asks for this model.
async fn read_object(state: &ApiState, headers: &HeaderMap, request: Request) -> Result<Map<String, Value>, ApiError> {
    let ApiOptions { body_limit, body_timeout, .. } = state.0.options;
    check_content_type(headers)?;
    check_content_length(headers, body_limit)?;
    let bytes = collect(request.into_body(), body_limit, body_timeout, |_| Ok(())).await?;
    let fields = body::parse_object(&bytes)?;
    state.check_model(&fields)?;
    Ok(fields)
}

/// When a request that came now leaves the queue.
fn queue_deadline(state: &ApiState, headers: &HeaderMap, arrived: Instant) -> Instant {
    let left = headers.get(QUEUE_BUDGET).and_then(|value| value.to_str().ok()?.parse().ok());
    arrived + left.map_or(state.0.queue_timeout, |left| Duration::from_millis(left).min(state.0.queue_timeout))
}

async fn chat_completions(
    State(state): State<ApiState>,
    Extension(RequestId(request_id)): Extension<RequestId>,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let admission = state.admit()?;
    let fields = read_object(&state, &headers, request).await?;
    let chat = chat::ChatRequest::read(fields::Fields(fields), &state.0.defaults)?;
    let (chat, prompt) = state
        .prepare(move |state| {
            let prompt = chat.prompt(state)?;
            Ok((chat, prompt))
        })
        .await?;
    let deadline = queue_deadline(&state, &headers, arrived);
    let requests = requests(&chat.params, chat.logprobs, vec![prompt], &request_id, deadline);
    let job = run::Job {
        shape: wire::Shape::Chat,
        per_prompt: requests.len(),
        requests,
        echoes: Vec::new(),
        stream: chat.params.stream,
        include_usage: chat.params.include_usage,
        request_id,
        arrived,
        admission,
    };
    run::answer(&state, job).await
}

async fn text_completions(
    State(state): State<ApiState>,
    Extension(RequestId(request_id)): Extension<RequestId>,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let admission = state.admit()?;
    let fields = read_object(&state, &headers, request).await?;
    let completions::CompletionRequest { params, prompts, logprobs, echo } =
        completions::CompletionRequest::read(fields::Fields(fields), &state.0.defaults)?;
    let resolve = move |state: &ApiState| prompts.into_iter().map(|prompt| prompt.resolve(state, echo)).collect();
    let resolved: Vec<_> = state.prepare(resolve).await?;
    let (prompts, texts): (Vec<_>, Vec<String>) = resolved.into_iter().unzip();
    let per_prompt = params.n as usize;
    let job = run::Job {
        shape: wire::Shape::Text,
        per_prompt,
        requests: requests(&params, logprobs, prompts, &request_id, queue_deadline(&state, &headers, arrived)),
        echoes: texts.iter().flat_map(|text| std::iter::repeat_n(text.clone(), per_prompt)).collect(),
        stream: params.stream,
        include_usage: params.include_usage,
        request_id,
        arrived,
        admission,
    };
    run::answer(&state, job).await
}

/// `n` generations for each prompt. With a seed, each choice has its own, so that they differ and can be repeated.
fn requests(
    params: &params::Params,
    logprobs: Option<u32>,
    prompts: Vec<Vec<crate::engine::Token>>,
    request_id: &str,
    deadline: Instant,
) -> Vec<GenerateRequest> {
    let params::Params { max_tokens, sampling, stop, ignore_eos, n, stream: _, include_usage: _ } = params;
    let mut requests = Vec::with_capacity(prompts.len() * *n as usize);
    for prompt in prompts {
        for choice in 0..*n {
            let seed = sampling.seed.map(|seed| seed.wrapping_add(choice).min(u32::MAX - 1));
            requests.push(GenerateRequest {
                id: request_id.to_owned(),
                prompt: prompt.clone(),
                max_tokens: *max_tokens,
                sampling: SamplingParams { seed, ..sampling.clone() },
                stop: stop.clone(),
                ignore_eos: *ignore_eos,
                logprobs,
                deadline: Some(deadline),
            });
        }
    }
    requests
}

#[derive(Serialize)]
struct ModelBody {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// `namespace/name` of the ModelDeployment.
    root: String,
    /// vLLM's name for the tokens that one request may use.
    max_model_len: u32,
    meta: MetaBody,
}

/// llama-server's names.
#[derive(Serialize)]
struct MetaBody {
    architecture: String,
    n_vocab: u32,
    n_ctx: u32,
    n_ctx_train: u32,
    n_params: u64,
    size: u64,
}

fn model_body(state: &ApiState) -> ModelBody {
    let facts = state.engine().model();
    let report = state.engine().report();
    ModelBody {
        id: state.served_name().to_owned(),
        object: "model",
        created: state.0.created,
        owned_by: "altiplano",
        root: state.0.names[1].clone(),
        max_model_len: report.max_tokens,
        meta: MetaBody {
            architecture: facts.architecture.clone(),
            n_vocab: facts.n_vocab,
            n_ctx: report.context_tokens,
            n_ctx_train: facts.trained_context,
            n_params: facts.parameter_count,
            size: facts.size_bytes,
        },
    }
}

async fn list_models(State(state): State<ApiState>) -> Response {
    Json(serde_json::json!({"object": "list", "data": [model_body(&state)]})).into_response()
}

async fn one_model(State(state): State<ApiState>, Path(id): Path<String>) -> Result<Response, ApiError> {
    if id == state.0.served_name || state.0.names.contains(&id) {
        return Ok(Json(model_body(&state)).into_response());
    }
    Err(ApiError::model_not_found(&id))
}

async fn health(State(state): State<ApiState>) -> Response {
    let now = state.engine().stats();
    let stuck = now.step_age > state.0.options.stuck_after;
    let (status, word) = if stuck { (StatusCode::SERVICE_UNAVAILABLE, "stuck") } else { (StatusCode::OK, "ok") };
    let body = serde_json::json!({"status": word, "running": now.running, "waiting": now.waiting});
    (status, Json(body)).into_response()
}

async fn metrics(State(state): State<ApiState>) -> Result<Response, ApiError> {
    let text = state.metrics().render(&state.engine().stats());
    let text = text.map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, crate::metrics::TEXT_FORMAT)], text).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deployments_sampling_goes_over_llama_cpps() {
        let spec = SamplingSpec { temperature: Some("0".into()), top_k: Some(7), ..SamplingSpec::default() };
        let sampling = sampling_defaults(Some(&spec)).unwrap();
        assert_eq!(sampling, SamplingParams { temperature: 0.0, top_k: 7, ..SamplingParams::default() });
        for (field, spec) in [
            ("temperature", SamplingSpec { temperature: Some("hot".into()), ..SamplingSpec::default() }),
            ("topP", SamplingSpec { top_p: Some("1.5".into()), ..SamplingSpec::default() }),
            ("topK", SamplingSpec { top_k: Some(-1), ..SamplingSpec::default() }),
        ] {
            let message = sampling_defaults(Some(&spec)).unwrap_err().to_string();
            assert!(message.starts_with(&format!("spec.engine.sampling.{field} is ")), "{message}");
        }
    }
}
