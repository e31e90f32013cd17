//! Ollama's API, the part that asks a model: `POST /api/chat` and `/api/generate`. What is about the node
//! (`/api/tags`, `/api/ps`, `/api/show`, …) the agent's listeners answer.
//!
//! | field | |
//! |---|---|
//! | `messages` | as with OpenAI; also `thinking`, `tool_calls` with arguments as an object, `tool_name`, `images` |
//! | `prompt`, `system` | of `/api/generate`: one turn, through the model's template; as it is for a model without one |
//! | `raw` | the prompt as it is |
//! | `suffix` | fills the gap between `prompt` and `suffix`; 400 for a model that was not trained for it |
//! | `images` | in base64; a file of sound (WAV, MP3, FLAC) among them is one, as with Ollama. 400 with the reason for a model that cannot read it |
//! | `format` | `"json"` or a JSON schema |
//! | `think` | `true` or `false`, or `"low"`, `"medium"`, `"high"` |
//! | `tools`, `logprobs`, `top_logprobs` | as with OpenAI |
//! | `stream` | `true` when absent: lines of JSON |
//! | `keep_alive` | read by the agent: seconds or a duration; 0 unloads the model, what is negative keeps it |
//! | `options` | see [`options`]; `num_ctx` is the context to aim for, never a reload and never a limit |
//! | `truncate` | of a prompt that is too long: `true` is `altiplano.overflow: DropOldest`, `false` is `Reject`; absent: as the ModelDeployment says |
//! | `shift` | ignored: an answer that reaches the context's end is over |
//! | `template`, `context` | 400: templates come with the model or its ModelDeployment, conversations with `/api/chat` |
//!
//! No prompt and no message loads the model and says `done_reason: "load"`. Times are nanoseconds; `load_duration` is how
//! long the agent held the request until a worker was there, and counted in `total_duration`. `prompt_eval_count` counts
//! cached tokens too.

mod answer;
pub(super) mod embed;
mod options;
mod request;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use self::answer::{Kind, Ollama};
use self::request::Wanted;
use super::chat::{self, ChatRequest};
use super::dialect::{ChoiceJob, Job};
use super::error::ApiError;
use super::fields::Fields;
use super::intake::{Intake, Visit};
use super::native::infill::Gap;
use super::native::tokens::text_tokens;
use super::output::PlainText;
use super::overflow::fit_prompts;
use super::params::Params;
use super::run;
use super::state::ApiState;
use crate::engine::Token;

/// `/api/chat`.
pub(super) async fn chat(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit, mut fields } = intake;
    let model = model_name(&state, &fields);
    match request::chat(&mut fields)? {
        None => Ok(loaded(&model, Kind::Chat)),
        Some(fields) => converse(&state, visit, model, Kind::Chat, fields).await,
    }
}

/// `/api/generate`.
pub(super) async fn generate(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit, mut fields } = intake;
    let model = model_name(&state, &fields);
    let has_template = state.engine().model().chat_template.is_some();
    match request::generate(&mut fields, has_template)? {
        Wanted::Nothing => Ok(loaded(&model, Kind::Generate)),
        Wanted::Chat(fields) => converse(&state, visit, model, Kind::Generate, fields).await,
        Wanted::Text { prompt, fields } => {
            complete(&state, visit, model, fields, true, move |state| text_tokens(state, &prompt, true, true)).await
        }
        Wanted::Gap { prefix, suffix, fields } => {
            let gap = Gap { prefix, suffix, ..Gap::default() };
            complete(&state, visit, model, fields, false, move |state| gap.tokens(state, "suffix")).await
        }
    }
}

/// The name by which the client knows the model.
fn model_name(state: &ApiState, fields: &Fields) -> String {
    fields.get("model").and_then(|model| model.as_str()).unwrap_or_else(|| state.served_name()).to_owned()
}

/// Nothing was asked: who reads this knows that the model is loaded.
fn loaded(model: &str, kind: Kind) -> Response {
    let mut answer = answer::head(model);
    answer.insert("done".to_owned(), true.into());
    answer.insert("done_reason".to_owned(), "load".into());
    match kind {
        Kind::Chat => answer.insert("message".to_owned(), json!({"role": "assistant", "content": ""})),
        Kind::Generate => answer.insert("response".to_owned(), "".into()),
    };
    Json(answer).into_response()
}

async fn converse(
    state: &ApiState,
    visit: Visit,
    model: String,
    kind: Kind,
    fields: Fields,
) -> Result<Response, ApiError> {
    let request = ChatRequest::read(fields, state.defaults())?;
    let dialect = Ollama::new(kind, model, &visit);
    chat::converse(state, visit, request, Box::new(dialect)).await
}

async fn complete(
    state: &ApiState,
    visit: Visit,
    model: String,
    fields: Fields,
    may_cut: bool,
    prompt: impl FnOnce(&ApiState) -> Result<Vec<Token>, ApiError> + Send + 'static,
) -> Result<Response, ApiError> {
    let params = Params::read(&fields, state.defaults())?;
    let logprobs = request::logprobs(&fields)?;
    let prepare = move |state: &ApiState| {
        let prompts = vec![prompt(state)?];
        let fitted = if may_cut { fit_prompts(state, &params, prompts)? } else { (prompts, None) };
        Ok((fitted, params))
    };
    let ((prompts, truncation), params) = state.prepare(prepare).await?;
    let dialect = Ollama::new(Kind::Generate, model, &visit);
    let requests = params.requests(logprobs, prompts, &visit);
    let choices = requests.into_iter().map(|request| ChoiceJob { request, parser: Box::new(PlainText) }).collect();
    let stream = params.stream;
    run::answer(state, visit, Job { dialect: Box::new(dialect), choices, per_prompt: 1, stream, truncation }).await
}
