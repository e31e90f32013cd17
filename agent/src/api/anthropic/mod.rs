//! Anthropic's Messages: `POST /v1/messages` and `/v1/messages/count_tokens`.
//!
//! | field | |
//! |---|---|
//! | `messages`, `system` | text, images (`base64`, `url`), text documents, `tool_use`, `tool_result`, `thinking`; the last message may be the assistant's: the answer goes on from it |
//! | `max_tokens` | must be there; not for `count_tokens` |
//! | `stop_sequences`, `temperature`, `top_p`, `top_k`, `stream` | as OpenAI's dialect takes them |
//! | `tools`, `tool_choice` | tools with an `input_schema`; those that run at Anthropic are refused |
//! | `thinking` | `enabled` (with `budget_tokens`), `adaptive`, `disabled`; off when it is not said |
//! | `output_config` | `format`: `json_schema`; `effort`, as chat completions' `reasoning_effort` |
//! | `metadata`, `service_tier`, `cache_control` | ignored: prefixes are always cached |
//! | `mcp_servers`, `container` | refused |
//!
//! What OpenAI's dialect takes beyond that (`min_p`, `seed`, `chat_template_kwargs`, …) is taken here too. `x-api-key`,
//! `anthropic-version` and `anthropic-beta` are not looked at by the worker. `input_tokens` are those that were computed,
//! `cache_read_input_tokens` those that were not; both are known at the end only, so `message_start` has their sum.

mod answer;
mod request;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::chat::{self, ChatRequest};
use super::error::ApiError;
use super::intake::Intake;

/// The handler.
pub(super) async fn messages(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit, fields } = intake;
    let request = ChatRequest::read(request::translate(fields, false)?, state.defaults())?;
    let dialect = answer::Messages::new(&state, request.params.stop.clone());
    chat::converse(&state, visit, request, Box::new(dialect)).await
}

/// Tokens that the prompt has, tools and template included.
pub(super) async fn count_tokens(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit: _visit, fields } = intake;
    let request = ChatRequest::read(request::translate(fields, true)?, state.defaults())?;
    Ok(Json(json!({"input_tokens": request.count(&state).await?})).into_response())
}
