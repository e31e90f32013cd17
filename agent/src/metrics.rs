//! Prometheus metrics of agent and worker.
//!
//! Every name begins with `altiplano_`. Where vLLM has a name for the same thing, ours is that name, with the labels
//! `namespace` and `model_name` (the ModelDeployment's), so that dashboards need one word changed. A worker keeps the
//! metrics of its requests ([`WorkerMetrics`]), the agent keeps those of models and devices ([`AgentMetrics`]), and the
//! agent's `/metrics` is both, merged family by family ([`merge`]). On a model's own port `/metrics` is the worker's, and
//! says the same under llama-server's names too.
//!
//! Labels are bounded: models on this node, states, devices, classes of HTTP codes. Nothing that a client sends becomes
//! a label. Series of a model that left the node are removed ([`AgentMetrics::forget_model`]).

mod agent;
mod llama_server;
mod merge;
mod worker;

pub use agent::{AgentMetrics, ModelState};
pub use merge::{Exposition, MergeError};
pub use worker::{EndReason, RequestMetrics, WorkerMetrics};

/// Content type of the text exposition format.
pub const TEXT_FORMAT: &str = prometheus::TEXT_FORMAT;

/// Seconds to the first token: from a cached prompt on a GPU to a long one behind a cold start.
pub const TIME_TO_FIRST_TOKEN_BUCKETS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0];

/// Seconds between two tokens of one answer.
pub const INTER_TOKEN_BUCKETS: &[f64] =
    &[0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0];

/// Seconds of a whole request, and of its wait in the queue.
pub const REQUEST_SECONDS_BUCKETS: &[f64] =
    &[0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0];

/// Tokens of a request.
pub const TOKEN_BUCKETS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0, 50_000.0,
    100_000.0,
];

/// Seconds to load a model.
pub const LOAD_SECONDS_BUCKETS: &[f64] = &[0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0];

/// The text exposition of what a registry holds.
///
/// # Errors
/// Only when a metric breaks Prometheus' own rules, which a test excludes.
pub(crate) fn render(registry: &prometheus::Registry) -> Result<String, prometheus::Error> {
    prometheus::TextEncoder::new().encode_to_string(&registry.gather())
}

/// "2xx" for 200: bounded, unlike the codes themselves.
#[must_use]
pub fn code_class(status: http::StatusCode) -> &'static str {
    match status.as_u16() {
        100..=199 => "1xx",
        200..=299 => "2xx",
        300..=399 => "3xx",
        400..=499 => "4xx",
        _ => "5xx",
    }
}
