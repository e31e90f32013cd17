//! `POST /api/embed` and `/api/embeddings`, its older form.
//!
//! Vectors of `/api/embed` have length 1, those of `/api/embeddings` are as the model makes them, as with Ollama. A text
//! that is longer than the model takes is cut only where `truncate: true` asks for it, else 400: Ollama's default is to
//! cut in silence.

use std::time::Duration;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::model_name;
use crate::api::embed::{self, Input};
use crate::api::error::ApiError;
use crate::api::fields::wrong_type;
use crate::api::intake::{Intake, Visit};
use crate::api::state::ApiState;
use crate::engine::{EmbedTask, Embedded, Token};

/// The handler of `/api/embed`.
pub(in crate::api) async fn embed(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit, mut fields } = intake;
    let model = model_name(&state, &fields);
    let dimensions = fields.integer("dimensions", i64::MIN..=i64::MAX)?;
    let kept = embed::shorten(state.engine().model(), dimensions)?;
    let truncate = fields.boolean("truncate")?.unwrap_or(false);
    let inputs = match fields.take("input") {
        // Loads the model, and no more.
        None => Vec::new(),
        Some(Value::Array(items)) if items.is_empty() => Vec::new(),
        Some(input) => embed::inputs("input", input)?,
    };
    let (vectors, prompt_tokens) = vectors(&state, &visit, inputs, truncate, "input").await?;
    let shortened = vectors.into_iter().map(|mut vector| {
        vector.truncate(kept.unwrap_or(usize::MAX));
        embed::normalise(&mut vector);
        vector
    });
    let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    Ok(Json(json!({
        "model": model,
        "embeddings": shortened.collect::<Vec<_>>(),
        "total_duration": nanoseconds(visit.held + visit.arrived.elapsed()),
        "load_duration": nanoseconds(visit.held),
        "prompt_eval_count": prompt_tokens,
    }))
    .into_response())
}

/// The handler of `/api/embeddings`.
pub(in crate::api) async fn embeddings(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit, mut fields } = intake;
    let inputs = match fields.take("prompt") {
        None => Vec::new(),
        Some(Value::String(text)) if text.is_empty() => Vec::new(),
        Some(Value::String(text)) => vec![Input::Text(text)],
        Some(other) => return Err(wrong_type("prompt", "a string", &other)),
    };
    let (vectors, _) = vectors(&state, &visit, inputs, false, "prompt").await?;
    Ok(Json(json!({"embedding": vectors.into_iter().next().unwrap_or_default()})).into_response())
}

/// The vectors as the model makes them, and the tokens that were read.
async fn vectors(
    state: &ApiState,
    visit: &Visit,
    inputs: Vec<Input>,
    truncate: bool,
    param: &'static str,
) -> Result<(Vec<Vec<f32>>, u32), ApiError> {
    if inputs.is_empty() {
        return Ok((Vec::new(), 0));
    }
    let facts = state.engine().model();
    let most = embed::MAX_NUMBERS / (facts.embedding_width as usize).max(1);
    if inputs.len() > most {
        let message = format!("'{param}' must have at most {most} texts for this model, not {}", inputs.len());
        return Err(ApiError::invalid(param, message));
    }
    let limit = if truncate { facts.max_tokens as usize } else { usize::MAX };
    let resolve = move |state: &ApiState| {
        let one = |input: Input| {
            input.resolve(state).map(|mut tokens| {
                tokens.truncate(limit);
                tokens
            })
        };
        inputs.into_iter().map(one).collect()
    };
    let texts: Vec<Vec<Token>> = state.prepare(resolve).await?;
    let Embedded { vectors, prompt_tokens, .. } =
        embed::embed(state, visit, EmbedTask::Embedding, texts, param).await?;
    Ok((vectors, prompt_tokens))
}
