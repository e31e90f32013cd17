//! `GET /v1/models` and `/v1/models/{id}`.

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

fn model_body(state: &ApiState) -> ModelBody {
    let facts = state.engine().model();
    let report = state.engine().report();
    ModelBody {
        id: state.served_name().to_owned(),
        object: "model",
        created: state.created(),
        owned_by: "altiplano",
        root: state.full_name().to_owned(),
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
    Json(serde_json::json!({"object": "list", "data": [model_body(&state)]})).into_response()
}

pub(super) async fn one(State(state): State<ApiState>, Path(id): Path<String>) -> Result<Response, ApiError> {
    if state.answers_to(&id) {
        return Ok(Json(model_body(&state)).into_response());
    }
    Err(ApiError::model_not_found(&id))
}
