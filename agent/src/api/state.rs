//! What the handlers share: the engine, the model's names, defaults, limits and metrics.

use std::sync::Arc;
use std::time::Duration;

use altiplano_crds::model_deployment::{OverflowPolicy, SamplingSpec, TrafficSpec};
use serde_json::{Map, Value};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::LATEST;
use super::body::DEFAULT_BODY_LIMIT;
use super::error::ApiError;
use super::fields::{self, Fields};
use super::sampling;
use crate::engine::chat::{ChatError, ChatTemplates};
use crate::engine::{Ability, Engine, SamplingParams};
use crate::metrics::WorkerMetrics;
use crate::runner::protocol::RunnerConfig;

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
    /// A sampling parameter of the deployment is not in its range.
    #[error("spec.engine.sampling: {0}")]
    InvalidSampling(String),
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
    file_name: String,
    created: u64,
    defaults: SamplingParams,
    overflow: OverflowPolicy,
    templates: Option<Result<ChatTemplates, ChatError>>,
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
        let templates = engine.chat_templates();
        if let Some(Err(error)) = &templates {
            tracing::warn!(%error, "chat completions will be refused");
        }
        let defaults = sampling_defaults(config.engine.sampling.as_ref(), &engine.model().sampling)?;
        // Some more than run and wait: who comes to a full queue reads "queue full", not a connection that hangs.
        let in_flight = max_queued.saturating_add(parallel).saturating_add(8) as usize;
        Ok(Self(Arc::new(Inner {
            templates,
            engine,
            served_name: config.served_name.clone(),
            names: [config.name.clone(), format!("{}/{}", config.namespace, config.name)],
            file_name: config.model_path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            created: super::unix_seconds(),
            defaults,
            overflow: config.context.overflow,
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

    /// The deployment's sampling parameters.
    pub(crate) fn defaults(&self) -> &SamplingParams {
        &self.0.defaults
    }

    /// What happens to prompts that are too long, unless the request says so.
    pub(crate) fn overflow(&self) -> OverflowPolicy {
        self.0.overflow
    }

    /// Limits that do not come from the ModelDeployment.
    pub(crate) fn options(&self) -> &ApiOptions {
        &self.0.options
    }

    /// How long a request may wait for a slot.
    pub(crate) fn queue_timeout(&self) -> Duration {
        self.0.queue_timeout
    }

    /// Seconds since 1970 when the API was made.
    pub(crate) fn created(&self) -> u64 {
        self.0.created
    }

    /// `namespace/name` of the ModelDeployment.
    pub(crate) fn full_name(&self) -> &str {
        &self.0.names[1]
    }

    /// Whether a client means this model by `asked`.
    pub(crate) fn answers_to(&self, asked: &str) -> bool {
        let has = |asked: &str| asked == self.0.served_name || self.0.names.iter().any(|name| name == asked);
        has(asked) || asked.strip_suffix(LATEST).is_some_and(has)
    }

    /// Name of the model's file, without its folder.
    pub(crate) fn file_name(&self) -> &str {
        &self.0.file_name
    }

    /// Seconds after which a slot may be free: what a request takes here on average.
    pub(crate) fn retry_after(&self) -> u32 {
        let seconds = self.0.metrics.mean_request_seconds().unwrap_or(1.0).ceil().clamp(1.0, 60.0);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 60")]
        let seconds = seconds as u32;
        seconds
    }

    pub(crate) fn templates(&self) -> Result<&ChatTemplates, ApiError> {
        if !self.0.engine.model().can(Ability::Completion) {
            return Err(ApiError::unsupported(
                "model",
                "this model generates no text: see its capabilities in /v1/models",
            ));
        }
        match &self.0.templates {
            Some(Ok(templates)) => Ok(templates),
            Some(Err(error)) => Err(ApiError::invalid("messages", error.to_string())),
            None => Err(ApiError::invalid(
                "messages",
                "this model has no chat template: use /v1/completions, or set spec.model.chatTemplate",
            )),
        }
    }

    /// The number of the adapter that `asked` names behind a name of this model and a colon.
    pub(crate) fn adapter(&self, asked: &str) -> Option<usize> {
        let (_, adapter) = asked.rsplit_once(':').filter(|(model, _)| self.answers_to(model))?;
        self.engine().model().adapters.iter().position(|name| name == adapter)
    }

    /// Refuses a body that asks for another model; returns the adapter that it asks for.
    pub(crate) fn check_model(&self, fields: &Map<String, Value>) -> Result<Option<usize>, ApiError> {
        match fields.get("model") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(model)) if self.answers_to(model) => Ok(None),
            Some(Value::String(model)) => self.adapter(model).map(Some).ok_or_else(|| ApiError::model_not_found(model)),
            Some(other) => Err(fields::wrong_type("model", "a string", other)),
        }
    }

    /// Lets a request in, or says that too many are in.
    pub(crate) fn admit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        Arc::clone(&self.0.admission)
            .try_acquire_owned()
            .map_err(|_| ApiError::queue_full(self.0.max_queued, self.retry_after()))
    }

    /// Runs what takes long (rendering, tokenising) on a thread that may block, as many at once as there are CPUs.
    pub(crate) async fn prepare<T: Send + 'static>(
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

/// The deployment's `sampling` over the model file's.
fn sampling_defaults(spec: Option<&SamplingSpec>, file: &SamplingParams) -> Result<SamplingParams, ApiStateError> {
    let Some(spec) = spec else { return Ok(file.clone()) };
    // The same words as in a request, but for the case of their letters, and the same ranges.
    let fields = serde_json::to_value(spec).ok().and_then(|spec| spec.as_object().cloned()).unwrap_or_default();
    let words = fields.into_iter().map(|(name, value)| {
        let number = value.as_str().and_then(|text| text.parse::<f64>().ok());
        (snake_case(&name), number.map_or(value, Value::from))
    });
    sampling::read(&Fields(words.collect()), file).map_err(|error| ApiStateError::InvalidSampling(error.message))
}

/// `topK` to `top_k`.
fn snake_case(name: &str) -> String {
    let mut snake = String::with_capacity(name.len() + 4);
    for letter in name.chars() {
        if letter.is_ascii_uppercase() {
            snake.push('_');
        }
        snake.push(letter.to_ascii_lowercase());
    }
    snake
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::engine::{DryParams, Mirostat, SamplerKind, WHOLE_CONTEXT};

    #[test]
    fn the_deployments_sampling_goes_over_the_model_files() {
        let file = SamplingParams { top_p: 0.5, min_p: 0.25, ..SamplingParams::default() };
        assert_eq!(sampling_defaults(None, &file).unwrap(), file);
        let spec: SamplingSpec = serde_json::from_value(json!({
            "temperature": "0", "topK": 7, "topP": "0.75", "dryMultiplier": "0.5", "drySequenceBreakers": ["."],
            "topNSigma": "1.5", "frequencyPenalty": "-1.5", "repeatLastN": -1, "mirostat": 2,
            "samplers": ["top_k", "typ_p", "top_n_sigma", "temperature"],
        }))
        .unwrap();
        let expected = SamplingParams {
            temperature: 0.0,
            top_k: 7,
            top_p: 0.75,
            dry: DryParams { multiplier: 0.5, sequence_breakers: vec![".".to_owned()], ..DryParams::default() },
            top_n_sigma: 1.5,
            frequency_penalty: -1.5,
            repeat_last_n: WHOLE_CONTEXT,
            mirostat: Mirostat::V2,
            samplers: vec![SamplerKind::TopK, SamplerKind::TypicalP, SamplerKind::TopNSigma, SamplerKind::Temperature],
            ..file.clone()
        };
        assert_eq!(sampling_defaults(Some(&spec), &file).unwrap(), expected);
        for (field, spec) in [
            ("'temperature'", SamplingSpec { temperature: Some("hot".into()), ..SamplingSpec::default() }),
            ("'top_p'", SamplingSpec { top_p: Some("1.5".into()), ..SamplingSpec::default() }),
            ("'top_k'", SamplingSpec { top_k: Some(-2), ..SamplingSpec::default() }),
        ] {
            let message = sampling_defaults(Some(&spec), &file).unwrap_err().to_string();
            assert!(message.starts_with(&format!("spec.engine.sampling: {field} must be ")), "{message}");
        }
    }

    /// Each field of the spec is a word that requests know.
    #[test]
    fn no_field_of_the_spec_is_ignored() {
        let decimals = [
            "temperature",
            "dynatempRange",
            "dynatempExponent",
            "topP",
            "minP",
            "typicalP",
            "topNSigma",
            "xtcProbability",
            "xtcThreshold",
            "repeatPenalty",
            "frequencyPenalty",
            "presencePenalty",
            "dryMultiplier",
            "dryBase",
            "mirostatTau",
            "mirostatEta",
            "adaptiveTarget",
            "adaptiveDecay",
        ];
        let counts = ["topK", "minKeep", "repeatLastN", "dryAllowedLength", "dryPenaltyLastN", "mirostat", "seed"];
        let mut all: Map<String, Value> = decimals.iter().map(|name| ((*name).to_owned(), json!("0.375"))).collect();
        all.extend(counts.iter().map(|name| ((*name).to_owned(), json!(1))));
        all.insert("drySequenceBreakers".to_owned(), json!(["x"]));
        all.insert("samplers".to_owned(), json!(["xtc"]));
        for (name, value) in &all {
            let one: SamplingSpec = serde_json::from_value(json!({name: value})).unwrap();
            let file = SamplingParams::default();
            assert_ne!(sampling_defaults(Some(&one), &file).unwrap(), file, "{name}");
        }
        let spec: SamplingSpec = serde_json::from_value(Value::Object(all.clone())).unwrap();
        assert_eq!(serde_json::to_value(&spec).unwrap().as_object().map(Map::len), Some(all.len()));
        // None is missing above.
        let SamplingSpec {
            temperature: _,
            dynatemp_range: _,
            dynatemp_exponent: _,
            top_k: _,
            top_p: _,
            min_p: _,
            typical_p: _,
            top_n_sigma: _,
            xtc_probability: _,
            xtc_threshold: _,
            min_keep: _,
            repeat_last_n: _,
            repeat_penalty: _,
            frequency_penalty: _,
            presence_penalty: _,
            dry_multiplier: _,
            dry_base: _,
            dry_allowed_length: _,
            dry_penalty_last_n: _,
            mirostat: _,
            mirostat_tau: _,
            mirostat_eta: _,
            adaptive_target: _,
            adaptive_decay: _,
            seed: _,
            dry_sequence_breakers: _,
            samplers: _,
        } = spec;
        assert_eq!(all.len(), 27);
    }
}
