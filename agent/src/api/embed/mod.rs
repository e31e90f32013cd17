//! Embeddings and reranking: what a text is near to, not what comes after it.
//!
//! | path | |
//! |---|---|
//! | `POST /v1/embeddings` | OpenAI's: `input` a string, strings, tokens or arrays of tokens; `encoding_format` float or base64; `dimensions` |
//! | `POST /embedding`, `/embeddings` | llama-server's own form: `input` or `content`, `embd_normalize` -1 or 2; an array of `{index, embedding: [[…]]}` |
//! | `POST /v1/rerank`, `/v1/reranking`, `/rerank`, `/reranking` | Jina's and Cohere's: `query`, `documents`, `top_n`, `return_documents`; with `texts` the form of TEI |
//!
//! A model does one of three things: it generates, it embeds, or it ranks. Asking it for another is 400 with the reason.
//! Vectors have length 1. `dimensions` below the model's width are for models that were trained to be cut (see
//! [`dimensions`]). A request has at most [`MAX_TEXTS`] texts and an answer at most [`MAX_NUMBERS`] numbers; a text that
//! is longer than the model takes is 400, nothing is cut in silence. Scores are the model's own, as llama-server's: the
//! higher the nearer, between 0 and 1 only where the model's head says so.

pub mod dimensions;
mod embeddings;
mod rerank;

use std::sync::Arc;
use std::time::Instant;

use axum::response::Response;
use axum::routing::{MethodRouter, post};
use serde::Serialize;
use serde_json::Value;

use super::ApiState;
use super::error::ApiError;
use super::fields::wrong_type;
use super::intake::{Intake, Visit};
use crate::engine::{EmbedRequest, EmbedTask, Embedded, MAX_TEXTS, Token};
use crate::metrics::{EndReason, RequestMetrics};

pub use dimensions::normalise;
pub(crate) use dimensions::shorten;

/// Numbers of all vectors of an answer.
pub const MAX_NUMBERS: usize = 8 << 20;

/// Paths of embeddings and reranking, all by POST.
const PATHS: [&str; 7] =
    ["/v1/embeddings", "/embeddings", "/embedding", "/v1/rerank", "/v1/reranking", "/rerank", "/reranking"];

/// The routes of this folder, all by POST.
pub(super) fn routes() -> impl Iterator<Item = (&'static str, MethodRouter<ApiState>)> {
    let route = |path: &str| -> MethodRouter<ApiState> {
        match path {
            "/v1/embeddings" => post(embeddings),
            "/embeddings" | "/embedding" => post(llama_embeddings),
            _ => post(rerank::answer),
        }
    };
    PATHS.into_iter().map(move |path| (path, route(path)))
}

async fn embeddings(intake: Intake) -> Result<Response, ApiError> {
    embeddings::answer(intake, embeddings::Form::OpenAi).await
}

async fn llama_embeddings(intake: Intake) -> Result<Response, ApiError> {
    embeddings::answer(intake, embeddings::Form::Llama).await
}

/// Tokens used; nothing is generated.
#[derive(Serialize)]
struct UsageBody {
    prompt_tokens: u32,
    total_tokens: u32,
}

impl UsageBody {
    fn of(embedded: &Embedded) -> Self {
        Self { prompt_tokens: embedded.prompt_tokens, total_tokens: embedded.prompt_tokens }
    }
}

/// A text, or the tokens of one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Input {
    Text(String),
    Tokens(Vec<Token>),
}

impl Input {
    /// Tokens, with the model's own at the beginning and the end of a text.
    pub(crate) fn resolve(self, state: &ApiState) -> Result<Vec<Token>, ApiError> {
        match self {
            Self::Text(text) => {
                let tokens = state.engine().tokenize(&text, true, true);
                tokens.map_err(|error| ApiError::internal(error.to_string()))
            }
            Self::Tokens(tokens) => Ok(tokens),
        }
    }
}

/// A string, strings, tokens, or arrays of tokens: OpenAI's `input`.
pub(crate) fn inputs(name: &'static str, value: Value) -> Result<Vec<Input>, ApiError> {
    const EXPECTED: &str = "a string, an array of strings, or one or more arrays of token ids";
    let items = match value {
        Value::String(text) => return Ok(vec![Input::Text(text)]),
        Value::Array(items) => items,
        other => return Err(wrong_type(name, EXPECTED, &other)),
    };
    let tokens = |items: &[Value]| {
        let one = |item: &Value| {
            let token = item.as_i64().and_then(|token| Token::try_from(token).ok());
            token.ok_or_else(|| ApiError::invalid(name, format!("'{name}' has {item} where a token id is expected")))
        };
        items.iter().map(one).collect::<Result<Vec<_>, _>>()
    };
    let inputs = if items.first().is_some_and(Value::is_number) {
        vec![Input::Tokens(tokens(&items)?)]
    } else {
        count(name, items.len(), "texts")?;
        let one = |item: Value| match item {
            Value::String(text) => Ok(Input::Text(text)),
            Value::Array(items) => Ok(Input::Tokens(tokens(&items)?)),
            other => Err(wrong_type(name, EXPECTED, &other)),
        };
        items.into_iter().map(one).collect::<Result<Vec<_>, _>>()?
    };
    Ok(inputs)
}

/// Refuses none, and more than a request may have.
fn count(name: &'static str, found: usize, what: &str) -> Result<(), ApiError> {
    if (1..=MAX_TEXTS).contains(&found) {
        return Ok(());
    }
    Err(ApiError::invalid(name, format!("'{name}' must have 1 to {MAX_TEXTS} {what}, not {found}")))
}

/// Has the engine do it; ends with the request's time-out. Dropping the future cancels it. `param` is the parameter that
/// the texts came by.
pub(crate) async fn embed(
    state: &ApiState,
    visit: &Visit,
    task: EmbedTask,
    texts: Vec<Vec<Token>>,
    param: &'static str,
) -> Result<Embedded, ApiError> {
    let Visit { request_id, arrived, queue_deadline, .. } = visit;
    let arrived = *arrived;
    let mut metrics = RequestMetrics::new(Arc::clone(state.metrics()), arrived);
    let count = texts.len();
    let request = EmbedRequest { id: request_id.clone(), task, texts, deadline: Some(*queue_deadline) };
    let embedding = state.engine().embed(request).map_err(|error| {
        metrics.end(EndReason::Error);
        ApiError::from_submit(&error, param, state.retry_after())
    })?;
    let until = arrived + state.request_timeout();
    let result = match tokio::time::timeout_at(until.into(), embedding).await {
        Err(_) => Err(ApiError::request_timeout(state.request_timeout().as_secs())),
        Ok(Err(error)) => Err(ApiError::from_engine(&error, state.retry_after())),
        Ok(Ok(embedded)) if embedded.vectors.iter().flatten().any(|number| !number.is_finite()) => {
            Err(ApiError::internal("the model computed something that is no number"))
        }
        Ok(Ok(embedded)) => Ok(embedded),
    };
    let now = Instant::now();
    match &result {
        Ok(Embedded { prompt_tokens, queue, compute, vectors: _ }) => {
            metrics.embedded(now, *prompt_tokens, *queue, *compute);
        }
        Err(_) => metrics.end(EndReason::Error),
    }
    let embedded = result.as_ref().ok();
    tracing::info!(
        %request_id,
        outcome = if embedded.is_some() { "done" } else { "error" },
        texts = count,
        prompt_tokens = embedded.map_or(0, |embedded| embedded.prompt_tokens),
        queue_ms = embedded.map_or(0, |embedded| embedded.queue.as_millis()),
        seconds = now.saturating_duration_since(arrived).as_secs_f64(),
        "request ended"
    );
    result
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn inputs_have_four_forms() {
        let text = |text: &str| Input::Text(text.to_owned());
        assert_eq!(inputs("input", json!("a")), Ok(vec![text("a")]));
        assert_eq!(inputs("input", json!(["a", "b"])), Ok(vec![text("a"), text("b")]));
        assert_eq!(inputs("input", json!([1, 2])), Ok(vec![Input::Tokens(vec![1, 2])]));
        assert_eq!(inputs("input", json!([[1], "b"])), Ok(vec![Input::Tokens(vec![1]), text("b")]));
        for (bad, words) in [
            (json!([]), "'input' must have 1 to 2048 texts, not 0"),
            (json!(vec!["a"; 2049]), "'input' must have 1 to 2048 texts, not 2049"),
            (json!(7), "'input' must be a string, an array of strings"),
            (json!([{}]), "'input' must be a string, an array of strings"),
            (json!([1, "a"]), r#"'input' has "a" where a token id is expected"#),
            (json!([1.5]), "'input' has 1.5 where a token id is expected"),
        ] {
            let error = inputs("input", bad).unwrap_err();
            assert!(error.message.starts_with(words), "{error:?}");
            assert_eq!(error.param.as_deref(), Some("input"));
        }
    }
}
