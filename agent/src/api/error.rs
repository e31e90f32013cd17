//! Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`.

use std::borrow::Cow;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

use crate::engine::{EngineError, SubmitError};

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status, where it can still be said.
    pub status: StatusCode,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// For people.
    pub message: String,
    /// The parameter at fault.
    pub param: Option<String>,
    /// For programs.
    pub code: Option<Cow<'static, str>>,
    /// Seconds after which to try again.
    pub retry_after: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        let code = code.map(Cow::Borrowed);
        Self { status, kind, message: message.into(), param: None, code, retry_after: None }
    }

    /// 400: the request as a whole is wrong.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message)
    }

    /// 400: `param` has a value that it must not have. The message says which values it may have.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::bad_request(message) }.with_code("invalid_value")
    }

    /// 400: `param` is missing.
    #[must_use]
    pub fn missing(param: &'static str) -> Self {
        Self { param: Some(param.to_owned()), ..Self::bad_request(format!("you must provide '{param}'")) }
            .with_code("missing_required_parameter")
    }

    /// 400: `param` asks for what this model or this version cannot do.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::bad_request(message) }.with_code("unsupported_parameter")
    }

    /// 401: the bearer token is missing or wrong.
    #[must_use]
    pub fn unauthorized() -> Self {
        let message = "a token is needed as 'Authorization: Bearer' or 'x-api-key', and it was missing or wrong";
        Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", Some("invalid_api_key"), message)
    }

    /// 403: this API does not do that here.
    pub fn not_done_here(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "invalid_request_error", Some("not_done_here"), message)
    }

    /// 404: no such model here.
    #[must_use]
    pub fn model_not_found(model: &str) -> Self {
        let message = format!("the model '{}' does not exist", clip(model));
        let error = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("model_not_found"), message);
        Self { param: Some("model".to_owned()), ..error }
    }

    /// 404: no such path.
    #[must_use]
    pub fn unknown_path(method: &http::Method, path: &str) -> Self {
        let message = format!("unknown path: {} {}", clip(method.as_str()), clip(path));
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("unknown_url"), message)
    }

    /// 405: the path takes other methods.
    #[must_use]
    pub fn wrong_method(method: &http::Method, path: &str) -> Self {
        let message = format!("{} is not allowed on {}", clip(method.as_str()), clip(path));
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", Some("method_not_allowed"), message)
    }

    /// 408: the client did not send its body in time.
    #[must_use]
    pub fn slow_body(seconds: u64) -> Self {
        let message = format!("the body did not arrive within {seconds} s");
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", Some("request_timeout"), message)
    }

    /// 413: the body is larger than `limit` bytes.
    #[must_use]
    pub fn too_large(limit: usize) -> Self {
        let message = format!("the body is larger than {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", Some("body_too_large"), message)
    }

    /// 415: the body is not said to be JSON.
    #[must_use]
    pub fn wrong_content_type(got: &str) -> Self {
        let message = format!("the content type must be application/json, not '{}'", clip(got));
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", Some("unsupported_media_type"), message)
    }

    /// 429: the queue is full.
    #[must_use]
    pub fn queue_full(limit: u32, retry_after: u32) -> Self {
        let message = format!("{limit} requests are waiting for this model already");
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("queue_full"), message);
        Self { retry_after: Some(retry_after), ..error }
    }

    /// 503: the request waited too long.
    pub fn queue_timeout(message: impl Into<String>, retry_after: u32) -> Self {
        Self::unavailable("queue_timeout", message, retry_after)
    }

    /// 503 for another reason.
    pub fn unavailable(code: &'static str, message: impl Into<String>, retry_after: u32) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some(code), message);
        Self { retry_after: Some(retry_after), ..error }
    }

    /// 502: the worker ended before it answered.
    #[must_use]
    pub fn worker_exited() -> Self {
        let message = "the worker process of this model ended before the answer was complete";
        Self::new(StatusCode::BAD_GATEWAY, "server_error", Some("worker_exited"), message)
    }

    /// 422: this very request was in two workers when they ended. Not a code that clients try again by themselves.
    #[must_use]
    pub fn ends_workers() -> Self {
        let message = "two worker processes of this model ended while they worked on this request, so it is not tried \
                       again for an hour; the agent's log and the model's status say how they ended";
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "server_error", Some("request_ends_workers"), message)
    }

    /// 504: the request took longer than `traffic.requestTimeoutSeconds`.
    #[must_use]
    pub fn request_timeout(seconds: u64) -> Self {
        let message = format!("the request took longer than {seconds} s in all");
        Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", Some("request_timeout"), message)
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", Some("internal_error"), message)
    }

    /// The engine did not take the request. `retry_after` is for a full queue.
    #[must_use]
    pub fn from_submit(error: &SubmitError, prompt_param: &'static str, retry_after: u32) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::QueueFull { limit } => Self::queue_full(*limit, retry_after),
            SubmitError::ContextLengthExceeded { prompt_tokens, limit } => {
                let message = format!(
                    "this model's maximum context length is {limit} tokens, but the prompt has {prompt_tokens} tokens, \
                     which exceeds the available context size"
                );
                Self { param: Some(prompt_param.to_owned()), ..Self::bad_request(message) }
                    .with_code("context_length_exceeded")
            }
            SubmitError::EmptyPrompt | SubmitError::InvalidToken { .. } => Self::invalid(prompt_param, message),
            SubmitError::InvalidParameter(_) => Self::bad_request(message),
            SubmitError::InvalidGrammar { field, .. } => Self::invalid(*field, message),
            SubmitError::Unsupported(_) => Self::unsupported("model", message),
            SubmitError::ShuttingDown => Self::unavailable("model_unloading", message, 1),
            SubmitError::Internal(_) | SubmitError::EngineFailed => Self::internal(message),
        }
    }

    /// The engine gave the request up. `retry_after` is for a time-out in the queue.
    #[must_use]
    pub fn from_engine(error: &EngineError, retry_after: u32) -> Self {
        let message = error.to_string();
        match error {
            EngineError::QueueTimeout => Self::queue_timeout(message, retry_after),
            EngineError::ShutDown => Self::unavailable("model_unloading", message, 1),
            EngineError::ContextFull(_) => Self::unavailable("context_full", message, retry_after),
            EngineError::GrammarFailed(_) => Self::bad_request(message).with_code_reason(error.reason()),
            other => Self::internal(message).with_code_reason(other.reason()),
        }
    }

    fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(Cow::Borrowed(code)), ..self }
    }

    fn with_code_reason(self, reason: &'static str) -> Self {
        // "DecodeFailed" → "decode_failed"
        let mut code = String::with_capacity(reason.len() + 4);
        for (at, letter) in reason.char_indices() {
            if letter.is_ascii_uppercase() && at > 0 {
                code.push('_');
            }
            code.push(letter.to_ascii_lowercase());
        }
        Self { code: Some(Cow::Owned(code)), ..self }
    }

    /// The JSON body.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Strings and options of strings always serialise.
        serde_json::to_string(&self.envelope()).unwrap_or_default()
    }

    fn envelope(&self) -> Envelope<'_> {
        let Self { status: _, kind, message, param, code, retry_after: _ } = self;
        Envelope { error: Body { message, kind, param: param.as_deref(), code: code.as_deref() } }
    }
}

#[derive(Serialize)]
struct Envelope<'e> {
    error: Body<'e>,
}

#[derive(Serialize)]
struct Body<'e> {
    message: &'e str,
    #[serde(rename = "type")]
    kind: &'e str,
    param: Option<&'e str>,
    code: Option<&'e str>,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.envelope())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // For the one who knows which form the path has.
        response.extensions_mut().insert(self);
        response
    }
}

/// What a client sent, short enough to be said back.
pub(crate) fn clip(text: &str) -> Cow<'_, str> {
    const MOST: usize = 128;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => Cow::Owned(format!("{}…", &text[..end])),
        None => Cow::Borrowed(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_is_openais() {
        let error = ApiError::model_not_found("gpt-5");
        assert_eq!(
            error.to_json(),
            r#"{"error":{"message":"the model 'gpt-5' does not exist","type":"invalid_request_error","param":"model","code":"model_not_found"}}"#
        );
        let response = error.into_response();
        assert_eq!(response.status(), StatusCode::NOT_FOUND);
        assert_eq!(response.headers()["content-type"], "application/json");
    }

    #[test]
    fn what_the_engine_says_becomes_a_status() {
        let cases: [(ApiError, u16, &str, Option<u32>); 8] = [
            (ApiError::from_submit(&SubmitError::QueueFull { limit: 4 }, "prompt", 7), 429, "queue_full", Some(7)),
            (
                ApiError::from_submit(
                    &SubmitError::ContextLengthExceeded { prompt_tokens: 9, limit: 8 },
                    "messages",
                    1,
                ),
                400,
                "context_length_exceeded",
                None,
            ),
            (ApiError::from_submit(&SubmitError::EmptyPrompt, "prompt", 1), 400, "invalid_value", None),
            (ApiError::from_submit(&SubmitError::ShuttingDown, "prompt", 9), 503, "model_unloading", Some(1)),
            (ApiError::from_submit(&SubmitError::EngineFailed, "prompt", 9), 500, "internal_error", None),
            (ApiError::from_engine(&EngineError::QueueTimeout, 3), 503, "queue_timeout", Some(3)),
            (ApiError::from_engine(&EngineError::ShutDown, 3), 503, "model_unloading", Some(1)),
            (ApiError::from_engine(&EngineError::DecodeFailed("x".into()), 3), 500, "decode_failed", None),
        ];
        for (error, status, code, retry_after) in cases {
            assert_eq!(error.status.as_u16(), status, "{error:?}");
            assert_eq!(error.code.as_deref(), Some(code), "{error:?}");
            let response = error.into_response();
            let header = response.headers().get("retry-after").map(|value| value.to_str().unwrap().parse().unwrap());
            assert_eq!(header, retry_after);
        }
    }

    #[test]
    fn what_a_client_sent_is_said_back_in_part() {
        assert_eq!(clip("short"), "short");
        let long = "é".repeat(4000);
        assert_eq!(clip(&long).chars().count(), 129);
    }
}
