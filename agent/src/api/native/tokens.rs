//! `POST /tokenize`, `/detokenize` and `/apply-template`.

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};

use crate::api::chat::ChatRequest;
use crate::api::error::ApiError;
use crate::api::fields::{Fields, wrong_type};
use crate::api::intake::Intake;
use crate::api::media;
use crate::api::state::ApiState;
use crate::engine::Token;

/// A token with its text, or its bytes where they are no text by themselves.
#[derive(Serialize)]
struct Piece {
    id: Token,
    piece: PieceText,
}

#[derive(Serialize)]
#[serde(untagged)]
enum PieceText {
    Text(String),
    Bytes(Vec<u8>),
}

/// `/tokenize`: `add_special` is false and `parse_special` true unless the client says otherwise, as with llama-server.
pub(in crate::api) async fn tokenize(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit: _visit, mut fields } = intake;
    let content = match fields.take("content") {
        // As with llama-server: nothing in, nothing out.
        None => String::new(),
        Some(Value::String(content)) => content,
        Some(other) => return Err(wrong_type("content", "a string", &other)),
    };
    let add_special = fields.boolean("add_special")?.unwrap_or(false);
    let parse_special = fields.boolean("parse_special")?.unwrap_or(true);
    let with_pieces = fields.boolean("with_pieces")?.unwrap_or(false);
    let tokens = state.prepare(move |state| text_tokens(state, &content, add_special, parse_special)).await?;
    if !with_pieces {
        return Ok(Json(json!({"tokens": tokens})).into_response());
    }
    let piece = |id: Token| {
        let bytes = state.engine().piece(id).unwrap_or_default();
        let piece = String::from_utf8(bytes).map_or_else(|bad| PieceText::Bytes(bad.into_bytes()), PieceText::Text);
        Piece { id, piece }
    };
    Ok(Json(json!({"tokens": tokens.into_iter().map(piece).collect::<Vec<_>>()})).into_response())
}

/// `/detokenize`: control tokens as they are written, as llama-server does; what is no UTF-8 becomes U+FFFD.
pub(in crate::api) async fn detokenize(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit: _visit, fields } = intake;
    let tokens = read_tokens(&fields, "tokens")?;
    let mut bytes = Vec::new();
    for token in tokens {
        bytes.extend(state.engine().piece(token).ok_or_else(|| stranger(&state, "tokens", token))?);
    }
    Ok(Json(json!({"content": String::from_utf8_lossy(&bytes)})).into_response())
}

/// `/apply-template`: takes what `/v1/chat/completions` takes. Images and sounds are `<__media__>`, as with llama-server.
pub(in crate::api) async fn apply_template(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit: _visit, fields } = intake;
    let request = ChatRequest::read(fields, state.defaults())?;
    let prompt = state.prepare(move |state| request.text(state)).await?;
    Ok(Json(json!({"prompt": media::shown(&prompt)})).into_response())
}

/// Text to tokens.
pub(in crate::api) fn text_tokens(
    state: &ApiState,
    text: &str,
    add_special: bool,
    parse_special: bool,
) -> Result<Vec<Token>, ApiError> {
    let tokens = state.engine().tokenize(text, add_special, parse_special);
    tokens.map_err(|error| ApiError::internal(error.to_string()))
}

/// An array of token ids.
fn read_tokens(fields: &Fields, name: &'static str) -> Result<Vec<Token>, ApiError> {
    const EXPECTED: &str = "an array of token ids";
    match fields.get(name) {
        None => Ok(Vec::new()),
        Some(Value::Array(items)) => items
            .iter()
            .map(|item| token(item).ok_or_else(|| wrong_type(&format!("{name}[…]"), "a token id", item)))
            .collect(),
        Some(other) => Err(wrong_type(name, EXPECTED, other)),
    }
}

/// A token id, if it is one by its form.
pub(in crate::api) fn token(item: &Value) -> Option<Token> {
    item.as_i64().and_then(|token| Token::try_from(token).ok())
}

/// 400 for a token that the vocabulary does not have.
pub(super) fn stranger(state: &ApiState, param: &str, token: Token) -> ApiError {
    let n_vocab = state.engine().model().n_vocab;
    ApiError::invalid(param, format!("'{param}' has token {token}, which is not in the vocabulary of {n_vocab}"))
}
