//! Embeddings and reranking: what a text is near to, not what comes after it.
//!
//! | path | |
//! |---|---|
//! | `POST /v1/embeddings` | OpenAI's: `input` a string, strings, tokens or arrays of tokens; as llama-server also `content`, tokens and strings in one array, objects with `prompt_string`; `encoding_format` float or base64; `dimensions` |
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
use serde_json::{Map, Value};

use super::ApiState;
use super::error::{ApiError, clip};
use super::fields::wrong_type;
use super::intake::{Intake, Visit};
use super::native::tokens::text_tokens;
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
    /// Both, one after the other.
    Mixed(Vec<Input>),
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
            Self::Mixed(parts) => {
                let mut all = Vec::new();
                for (at, part) in parts.into_iter().enumerate() {
                    match part {
                        // Where a text begins the whole, the model's own first token stands before it.
                        Self::Text(text) if at > 0 => all.extend(text_tokens(state, &text, false, true)?),
                        part => all.extend(part.resolve(state)?),
                    }
                }
                Ok(all)
            }
        }
    }
}

/// A string, strings, tokens, or arrays of tokens: OpenAI's `input`. As llama-server also tokens and strings in one array,
/// and objects with a text.
pub(crate) fn inputs(name: &'static str, value: Value) -> Result<Vec<Input>, ApiError> {
    match value {
        Value::Array(items) if items.iter().any(Value::is_number) => Ok(vec![mixed(name, items)?]),
        Value::Array(items) => {
            count(name, items.len(), "texts")?;
            items.into_iter().map(|item| one(name, item)).collect()
        }
        other => Ok(vec![one(name, other)?]),
    }
}

fn one(name: &'static str, value: Value) -> Result<Input, ApiError> {
    const EXPECTED: &str =
        "a string, an array of strings, one or more arrays of token ids, or objects with 'prompt_string' or 'content'";
    match value {
        Value::String(text) => Ok(Input::Text(text)),
        Value::Array(items) => mixed(name, items),
        Value::Object(object) => Ok(Input::Text(text(name, object)?)),
        other => Err(wrong_type(name, EXPECTED, &other)),
    }
}

/// Tokens, and strings among them.
fn mixed(name: &'static str, items: Vec<Value>) -> Result<Input, ApiError> {
    let token = |item: &Value| item.as_i64().and_then(|token| Token::try_from(token).ok());
    let wrong = |item: &Value| {
        ApiError::invalid(name, format!("'{name}' has {} where a token id is expected", clip(&item.to_string())))
    };
    if !items.iter().any(Value::is_string) {
        let tokens = items.iter().map(|item| token(item).ok_or_else(|| wrong(item)));
        return tokens.collect::<Result<_, _>>().map(Input::Tokens);
    }
    let part = |item: Value| match item {
        Value::String(text) => Ok(Input::Text(text)),
        number => token(&number).map(|token| Input::Tokens(vec![token])).ok_or_else(|| wrong(&number)),
    };
    items.into_iter().map(part).collect::<Result<_, _>>().map(Input::Mixed)
}

/// The text of an object: llama-server's `prompt_string`, or `content` as in a chat's message.
fn text(name: &'static str, mut object: Map<String, Value>) -> Result<String, ApiError> {
    if object.get("multimodal_data").is_some_and(|data| data.as_array().is_none_or(|data| !data.is_empty())) {
        let name = format!("{name}.multimodal_data");
        return Err(ApiError::unsupported(
            name.clone(),
            format!("'{name}' is not supported here: only texts are embedded"),
        ));
    }
    let wrong = || {
        let message =
            format!("an object in '{name}' must have 'prompt_string' or 'content', a string or parts of type 'text'");
        ApiError::invalid(name, message)
    };
    match object.remove("prompt_string").or_else(|| object.remove("content")) {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(parts)) => {
            let part = |part: &Value| match (part.get("type"), part.get("text")) {
                (Some(kind), Some(Value::String(text))) if kind == "text" => Ok(text.clone()),
                _ => Err(wrong()),
            };
            parts.iter().map(part).collect()
        }
        _ => Err(wrong()),
    }
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
        let mixed = Input::Mixed(vec![Input::Tokens(vec![1]), text("a"), Input::Tokens(vec![2])]);
        assert_eq!(inputs("input", json!([1, "a", 2])), Ok(vec![mixed.clone()]));
        assert_eq!(inputs("input", json!([[1, "a", 2], "b"])), Ok(vec![mixed, text("b")]));
        let parts = json!({"content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]});
        assert_eq!(inputs("input", parts.clone()), Ok(vec![text("a b")]));
        assert_eq!(inputs("input", json!([parts, {"prompt_string": "c"}])), Ok(vec![text("a b"), text("c")]));
        for object in [
            json!({}),
            json!({"prompt_string": 1}),
            json!({"content": [{"type": "image_url"}]}),
            json!({"prompt_string": "a", "multimodal_data": ["AAAA"]}),
        ] {
            assert_eq!(inputs("input", json!([object])).unwrap_err().status, 400, "{object}");
        }
        for (bad, words) in [
            (json!([]), "'input' must have 1 to 2048 texts, not 0"),
            (json!(vec!["a"; 2049]), "'input' must have 1 to 2048 texts, not 2049"),
            (json!(7), "'input' must be a string, an array of strings"),
            (json!([{}]), "an object in 'input' must have 'prompt_string' or 'content'"),
            (json!([1, {}]), "'input' has {} where a token id is expected"),
            (json!([["a", [2]]]), "'input' has [2] where a token id is expected"),
            (json!([1.5]), "'input' has 1.5 where a token id is expected"),
        ] {
            let error = inputs("input", bad).unwrap_err();
            assert!(error.message.starts_with(words), "{error:?}");
            assert_eq!(error.param.as_deref(), Some("input"));
        }
    }
}
