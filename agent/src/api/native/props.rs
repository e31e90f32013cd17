//! `GET /props` and `GET /slots`.

use axum::Json;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::completion::settings;
use crate::api::error::ApiError;
use crate::api::fields::Fields;
use crate::api::media::MARKER;
use crate::api::params::Params;
use crate::api::state::ApiState;
use crate::api::wire::FINGERPRINT;
use crate::engine::Ability;

/// `/props`: the model, its template and the defaults of `/completion`.
pub(in crate::api) async fn props(State(state): State<ApiState>) -> Result<Response, ApiError> {
    // What a request that says nothing has.
    let params = Params::read(&Fields(Map::new()), state.defaults())?;
    let (facts, report) = (state.engine().model(), state.engine().report());
    Ok(Json(json!({
        "default_generation_settings": {
            "id": 0,
            "n_ctx": report.max_tokens,
            "speculative": facts.speculative,
            "is_processing": state.engine().stats().running > 0,
            "params": settings(&params),
        },
        "total_slots": report.parallel,
        "model_alias": state.served_name(),
        "model_path": state.file_name(),
        "chat_template": facts.chat_template.as_deref().unwrap_or_default(),
        "modalities": {"vision": facts.can(Ability::Vision), "audio": facts.can(Ability::Audio)},
        // What stands for a file of `multimodal_data` in a prompt.
        "media_marker": MARKER,
        "bos_token": facts.bos_text,
        "eos_token": facts.eos_text,
        "build_info": FINGERPRINT.as_str(),
        "is_sleeping": false,
        // Ours: what Ollama's /api/show lists.
        "capabilities": capabilities(&state),
        "n_embd": facts.embedding_width,
    }))
    .into_response())
}

/// What the model can do, in Ollama's words.
fn capabilities(state: &ApiState) -> Vec<&'static str> {
    let facts = state.engine().model();
    let template = facts.chat_template.as_deref().unwrap_or_default();
    let has = |words: &[&str]| words.iter().any(|word| template.contains(word));
    let generates = facts.can(Ability::Completion);
    let more = [
        ("tools", state.templates().is_ok_and(|templates| templates.capabilities().supports_tool_calls)),
        ("thinking", has(&["enable_thinking", "reasoning_content", "<think>"])),
        ("insert", facts.fim.is_some()),
    ];
    let abilities = facts.abilities.iter().map(|ability| ability.word());
    abilities.chain(more.into_iter().filter_map(|(name, can)| (can && generates).then_some(name))).collect()
}

/// `?fail_on_no_slot=1`
#[derive(Deserialize)]
pub(in crate::api) struct SlotsQuery {
    #[serde(default)]
    fail_on_no_slot: u8,
}

/// `/slots`: requests have no slot of their own here, so the first ones stand for those that run.
pub(in crate::api) async fn slots(
    State(state): State<ApiState>,
    Query(query): Query<SlotsQuery>,
) -> Result<Response, ApiError> {
    let (report, running) = (state.engine().report(), state.engine().stats().running);
    let speculative = state.engine().model().speculative;
    if query.fail_on_no_slot != 0 && running >= report.parallel {
        return Err(ApiError::unavailable("no_slot", "no slot available", state.retry_after()));
    }
    let slot = |id: u32| json!({"id": id, "n_ctx": report.max_tokens, "speculative": speculative, "is_processing": id < running});
    Ok(Json((0..report.parallel).map(slot).collect::<Vec<Value>>()).into_response())
}
