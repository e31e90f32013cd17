//! `GET /v1/models` and `/v1/models/{id}`: the model and its LoRA adapters, each asked for as `model:adapter`.

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::ApiState;
use super::error::ApiError;

#[derive(Serialize)]
struct ModelBody {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// `namespace/name` of the ModelDeployment.
    root: String,
    /// Of an adapter: the model that it belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
    /// vLLM's name for the tokens that one request may use.
    max_model_len: u32,
    /// What it can be asked for: completion, embedding, rerank, vision, audio.
    capabilities: Vec<&'static str>,
    meta: MetaBody,
}

/// llama-server's names.
#[derive(Serialize)]
struct MetaBody {
    architecture: String,
    vocab_type: u32,
    n_vocab: u32,
    n_embd: u32,
    n_ctx: u32,
    n_ctx_train: u32,
    n_params: u64,
    size: u64,
}

/// The model, or one of its adapters.
fn model_body(state: &ApiState, adapter: Option<&str>) -> ModelBody {
    let named = |name: &str| adapter.map_or_else(|| name.to_owned(), |adapter| format!("{name}:{adapter}"));
    let facts = state.engine().model();
    let report = state.engine().report();
    ModelBody {
        id: named(state.served_name()),
        object: "model",
        created: state.created(),
        owned_by: "altiplano",
        root: state.full_name().to_owned(),
        parent: adapter.map(|_| state.served_name().to_owned()),
        max_model_len: report.max_tokens,
        capabilities: facts.abilities.iter().map(|ability| ability.word()).collect(),
        meta: MetaBody {
            architecture: facts.architecture.clone(),
            vocab_type: facts.vocab_type,
            n_vocab: facts.n_vocab,
            n_embd: facts.embedding_width,
            n_ctx: report.context_tokens,
            n_ctx_train: facts.trained_context,
            n_params: facts.parameter_count,
            size: facts.size_bytes,
        },
    }
}

pub(super) async fn list(State(state): State<ApiState>) -> Response {
    let adapters = state.engine().model().adapters.iter().map(|adapter| model_body(&state, Some(adapter)));
    let data: Vec<_> = std::iter::once(model_body(&state, None)).chain(adapters).collect();
    Json(serde_json::json!({"object": "list", "data": data})).into_response()
}

pub(super) async fn one(State(state): State<ApiState>, Path(id): Path<String>) -> Result<Response, ApiError> {
    if state.answers_to(&id) {
        return Ok(Json(model_body(&state, None)).into_response());
    }
    if let Some(adapter) = state.adapter(&id).and_then(|number| state.engine().model().adapters.get(number)) {
        return Ok(Json(model_body(&state, Some(adapter))).into_response());
    }
    Err(ApiError::model_not_found(&id))
}
