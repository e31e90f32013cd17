//! The part of Ollama's API that is about the node and not about one answer: which models are there, which are loaded,
//! what they are. Asking does not wake a model. What would change the models is refused: `ModelDeployment`s do that.
//!
//! | path | |
//! |---|---|
//! | `GET /api/version` | the version of Ollama whose API this follows |
//! | `GET /api/tags` | the models that this door leads to, loaded or not |
//! | `GET /api/ps` | those that are loaded, with memory and the time of their unload |
//! | `POST /api/show` | a model's file; template and capabilities too while it is loaded |
//! | `POST /api/pull`, `push`, `create`, `copy`, `blobs/…`, `DELETE /api/delete` | 403 with the `kubectl` command that does it |
//! | `POST /api/generate`, `/api/chat` without a prompt and with `keep_alive: 0` | unload the model, as `ollama stop` does |
//!
//! Names are given with Ollama's `:latest` and taken with or without it. A digest is the file's SHA-256 where it is
//! known, else one of the model's name: Ollama's clients cut it, and cannot do without.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::{Method, Request};
use hyper::body::Incoming;
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::card::ModelCard;
use super::handlers::{Door, id_of, meant, models, not_allowed};
use super::keep_alive::KeepAlive;
use super::scrape;
use super::shared::Shared;
use super::table::{Model, Route};
use crate::api::{ApiError, LATEST, check_content_length, collect, malformed};

/// Clients ask for the version to know what they may send; this is the version whose API is followed.
const VERSION: &str = "0.12.6";

/// Bytes of a body that names a model.
const BODY_LIMIT: usize = 1 << 20;

/// What "for ever" is as a time.
const FOREVER: SignedDuration = SignedDuration::from_hours(100 * 365 * 24);

/// Whether answers on this path are streamed unless the client says otherwise.
pub(super) fn streams(path: &str) -> bool {
    matches!(path, "/api/chat" | "/api/generate")
}

/// Answers what a worker does not.
pub(super) async fn answer(shared: &Shared, door: &Door, request: Request<Incoming>) -> Result<Response, ApiError> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let allow = match path.as_str() {
        "/api/version" | "/api/tags" | "/api/ps" => "GET, HEAD",
        "/api/delete" => "DELETE",
        "/api/show" | "/api/pull" | "/api/push" | "/api/create" | "/api/copy" => "POST",
        path if path.starts_with("/api/blobs/") => "POST, HEAD",
        _ => return Err(ApiError::unknown_path(&method, &path)),
    };
    if !allow.split(", ").any(|allowed| allowed == method.as_str()) {
        return Ok(not_allowed(&method, &path, allow));
    }
    match path.as_str() {
        "/api/version" => Ok(Json(json!({"version": VERSION})).into_response()),
        "/api/tags" => {
            let all = models(shared, door);
            let all: Vec<Value> = all.iter().map(|model| tag(shared, model)).collect();
            Ok(Json(json!({"models": all})).into_response())
        }
        "/api/ps" => {
            let is_loaded = |model: &&Arc<Model>| matches!(model.route(), Route::Ready { .. });
            let all = models(shared, door);
            let (now, moment) = (Timestamp::now(), Instant::now());
            let loaded = all.iter().filter(is_loaded).map(|model| process(shared, model, now, moment));
            Ok(Json(json!({"models": loaded.collect::<Vec<_>>()})).into_response())
        }
        "/api/show" => {
            let asked = named(shared, request).await?;
            let model = meant(shared, door, asked.as_deref())?;
            Ok(Json(show(shared, &model).await).into_response())
        }
        path if method == Method::HEAD && path.starts_with("/api/blobs/") => Err(ApiError::unknown_path(&method, path)),
        path => Err(refused(path)),
    }
}

/// Who wants the models changed is told how.
fn refused(path: &str) -> ApiError {
    let how = match path {
        "/api/delete" => "kubectl delete modeldeployment NAME",
        "/api/push" => "there is nothing to push; see kubectl get modeldeployment",
        _ => "kubectl apply -f a ModelDeployment (see kubectl explain modeldeployment.spec.model)",
    };
    ApiError::not_done_here(format!("models are not changed through this API but as ModelDeployments: {how}"))
}

/// The body's `model`, or `name`, its former name.
async fn named(shared: &Shared, request: Request<Incoming>) -> Result<Option<String>, ApiError> {
    #[derive(Deserialize)]
    struct Named {
        model: Option<String>,
        name: Option<String>,
    }
    check_content_length(request.headers(), BODY_LIMIT)?;
    let body = collect(Body::new(request.into_body()), BODY_LIMIT, shared.limits.body_timeout, |_| Ok(())).await?;
    let Named { model, name } = serde_json::from_slice(&body).map_err(|error| malformed(&error))?;
    Ok(model.or(name).filter(|name| !name.is_empty()))
}

/// A request to unload and for nothing else: `keep_alive` is 0, and there is nothing to answer. It is not sent to a
/// worker, which it would wake. `None` for any other request.
pub(super) fn unload(
    model: &Model,
    path: &str,
    asked: Option<&str>,
    body: &[u8],
) -> Option<Result<Response, ApiError>> {
    #[derive(Deserialize)]
    struct Nothing {
        #[serde(default)]
        prompt: Option<String>,
        #[serde(default)]
        suffix: Option<String>,
        #[serde(default)]
        messages: Option<Vec<IgnoredAny>>,
        #[serde(default)]
        images: Option<Vec<IgnoredAny>>,
    }
    // What cannot be read is for the worker to refuse.
    let Nothing { prompt, suffix, messages, images } = serde_json::from_slice(body).ok()?;
    let is_empty = prompt.is_none_or(|text| text.is_empty())
        && suffix.is_none_or(|text| text.is_empty())
        && messages.is_none_or(|all| all.is_empty())
        && images.is_none_or(|all| all.is_empty());
    if !streams(path) || !is_empty {
        return None;
    }
    let published = model.published();
    if model.card().is_pinned {
        let name = &published.name;
        let message =
            format!("the model is pinned: kubectl patch modeldeployment {name} with another unload.policy than Never");
        return Some(Err(ApiError::not_done_here(message)));
    }
    // One that is not loaded has nothing to unload, and its next worker is not to be told.
    if matches!(model.route(), Route::Ready { .. } | Route::Loading) {
        model.keep(Some(KeepAlive::For(Duration::ZERO)));
    }
    let mut answer = json!({
        "model": asked.unwrap_or(&published.served_name),
        "created_at": Timestamp::now().to_string(),
        "done": true,
        "done_reason": "unload",
    });
    match path {
        "/api/chat" => answer["message"] = json!({"role": "assistant", "content": ""}),
        _ => answer["response"] = "".into(),
    }
    Some(Ok(Json(answer).into_response()))
}

/// A model as `/api/tags` has it, and the beginning of what `/api/ps` says.
fn tag(shared: &Shared, model: &Arc<Model>) -> Value {
    let card = model.card();
    let id = id_of(shared, model);
    let name = if id.contains(':') { id } else { format!("{id}{LATEST}") };
    json!({
        "name": name,
        "model": name,
        "modified_at": since(shared).to_string(),
        "size": card.file.as_ref().map_or(0, |file| file.size_bytes),
        "digest": digest(model, &card),
        "details": details(&card),
    })
}

fn process(shared: &Shared, model: &Arc<Model>, now: Timestamp, moment: Instant) -> Value {
    let (card, activity) = (model.card(), model.activity());
    let limit = match (card.is_pinned, activity.keep_alive) {
        (true, _) | (false, Some(KeepAlive::Forever)) => None,
        (false, Some(KeepAlive::For(time))) => Some(time),
        (false, None) => card.idle_limit,
    };
    // Counted from the last use; without one, or while one goes on, from now.
    let busy = activity.running + activity.waiting > 0;
    let idle = activity.last_request.filter(|_| !busy).map_or(Duration::ZERO, |last| moment.duration_since(last));
    let left = limit
        .map_or(FOREVER, |limit| SignedDuration::try_from(limit.saturating_sub(idle)).unwrap_or(FOREVER).min(FOREVER));
    let expires = now.checked_add(left).unwrap_or(Timestamp::MAX);
    let mut process = tag(shared, model);
    if let Some(fields) = process.as_object_mut() {
        fields.remove("modified_at");
        fields.insert("size".to_owned(), card.memory_bytes.into());
        fields.insert("size_vram".to_owned(), card.device_bytes.into());
        fields.insert("context_length".to_owned(), card.max_tokens.into());
        fields.insert("expires_at".to_owned(), expires.to_string().into());
    }
    process
}

async fn show(shared: &Shared, model: &Arc<Model>) -> Value {
    let (card, published) = (model.card(), model.published());
    let told = model.told().borrow().clone();
    let props = scrape::get(shared, told, "/props").await;
    let props: Value = props.and_then(|props| serde_json::from_slice(&props).ok()).unwrap_or_default();
    let mut info = Map::new();
    if let Some(file) = &card.file {
        let header = &file.header;
        let architecture = &header.architecture;
        info.insert("general.architecture".to_owned(), architecture.as_str().into());
        info.insert("general.parameter_count".to_owned(), header.parameter_count.into());
        if let Some(name) = &header.name {
            info.insert("general.name".to_owned(), name.as_str().into());
        }
        if let Some(tokens) = header.trained_context_tokens {
            info.insert(format!("{architecture}.context_length"), tokens.into());
        }
        if let Some(blocks) = header.block_count {
            info.insert(format!("{architecture}.block_count"), blocks.into());
        }
        if let Some(width) = props.get("n_embd") {
            info.insert(format!("{architecture}.embedding_length"), width.clone());
        }
    }
    let capabilities = props.get("capabilities").cloned().unwrap_or_else(|| json!(["completion"]));
    json!({
        "modelfile": format!("# Described by a ModelDeployment: kubectl -n {} get modeldeployment {} -o yaml\n",
            published.namespace, published.name),
        "parameters": "",
        "template": props.get("chat_template").and_then(Value::as_str).unwrap_or_default(),
        "details": details(&card),
        "model_info": info,
        "capabilities": capabilities,
        "modified_at": since(shared).to_string(),
    })
}

fn details(card: &ModelCard) -> Value {
    let header = card.file.as_ref().map(|file| &file.header);
    let family = header.map_or("", |header| header.architecture.as_str());
    json!({
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family],
        "parameter_size": header.map(|header| size_word(header.parameter_count)).unwrap_or_default(),
        "quantization_level": header.map_or("", |header| header.quantization.as_str()),
    })
}

fn digest(model: &Model, card: &ModelCard) -> String {
    let of_the_file = card.file.as_ref().and_then(|file| file.sha256.clone());
    of_the_file.unwrap_or_else(|| {
        Sha256::digest(model.published().full_name()).iter().fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    })
}

/// When the agent started: models have been here at least since then, as far as it knows.
fn since(shared: &Shared) -> Timestamp {
    Timestamp::from_second(i64::try_from(shared.started).unwrap_or(0)).unwrap_or_default()
}

/// A count as Ollama writes it: "7.6B", "494.0M".
fn size_word(count: u64) -> String {
    let (unit, word): (u64, _) = match count {
        1_000_000_000.. => (1_000_000_000, "B"),
        1_000_000.. => (1_000_000, "M"),
        1000.. => (1000, "K"),
        _ => return count.to_string(),
    };
    // Tenths, rounded.
    let tenths = (u128::from(count) * 10 + u128::from(unit / 2)) / u128::from(unit);
    format!("{}.{}{word}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_in_short() {
        for (count, expected) in
            [(7, "7"), (1500, "1.5K"), (494_032_768, "494.0M"), (7_615_616_512, "7.6B"), (70_553_706_496, "70.6B")]
        {
            assert_eq!(size_word(count), expected);
        }
    }

    #[test]
    fn a_refusal_says_how() {
        for path in ["/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/api/blobs/sha256:0"] {
            let error = refused(path);
            assert_eq!(error.status, 403);
            assert!(error.message.contains("kubectl"), "{path}: {}", error.message);
        }
    }
}
