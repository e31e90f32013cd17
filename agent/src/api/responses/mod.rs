//! OpenAI's Responses: `POST /v1/responses`, and `/v1/responses/input_tokens`, which counts. Nothing is kept: every request brings its conversation along.
//!
//! | field | |
//! |---|---|
//! | `input` | a string, or items: messages (text, images, audio), `function_call`, `function_call_output`, `reasoning` |
//! | `instructions` | a system message before it |
//! | `max_output_tokens`, `temperature`, `top_p`, `stream` | as chat completions take them |
//! | `tools`, `tool_choice`, `parallel_tool_calls` | functions; `allowed_tools` too; tools that run at OpenAI are refused |
//! | `text.format` | `text`, `json_object`, `json_schema` |
//! | `reasoning.effort` | as chat completions' `reasoning_effort` |
//! | `include` | `message.output_text.logprobs`, with `top_logprobs` |
//! | `truncation` | `auto`: a conversation that is too long loses its oldest messages (`altiplano.overflow: DropOldest`); `disabled`: it is refused; absent: as the ModelDeployment says |
//! | `store` | ignored: the answer says `false` |
//! | `previous_response_id`, `conversation`, `prompt`, `background` | refused |
//!
//! What chat completions take beyond that (`top_k`, `min_p`, `seed`, `stop`, `chat_template_kwargs`, …) is taken here
//! too: `return_progress` adds `response.in_progress` events with `prompt_progress`, `timings_per_token` adds `timings` to
//! the deltas and the end, as with llama-server. A stream is of typed events with sequence numbers; one that fails ends with `error` and `response.failed`.

mod answer;
mod request;

use axum::response::Response;

use super::chat::{self, ChatRequest};
use super::error::ApiError;
use super::intake::Intake;

/// The handler.
pub(super) async fn responses(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit, fields } = intake;
    let (fields, echo) = request::translate(fields)?;
    let request = ChatRequest::read(fields, state.defaults())?;
    let dialect = answer::Responses::new(&state, echo, &request.params);
    chat::converse(&state, visit, request, Box::new(dialect)).await
}

/// Tokens that such a request's prompt has.
pub(super) async fn input_tokens(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit: _visit, fields } = intake;
    let (fields, _) = request::translate(fields)?;
    let request = ChatRequest::read(fields, state.defaults())?;
    Ok(chat::counted(request.count(&state).await?))
}
