//! `POST /v1/embeddings`, and llama-server's `/embedding`.

use axum::Json;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

use super::{Input, MAX_NUMBERS, UsageBody};
use crate::api::ApiState;
use crate::api::error::ApiError;
use crate::api::fields::Fields;
use crate::api::intake::Intake;
use crate::engine::{EmbedTask, ModelFacts, Token};

/// Whose form the answer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    OpenAi,
    Llama,
}

/// A request, checked.
#[derive(Debug, PartialEq)]
struct EmbeddingsRequest {
    inputs: Vec<Input>,
    param: &'static str,
    base64: bool,
    /// Numbers of each vector to keep.
    kept: Option<usize>,
    normalised: bool,
}

impl EmbeddingsRequest {
    fn read(mut fields: Fields, facts: &ModelFacts, form: Form) -> Result<Self, ApiError> {
        let base64 = match fields.get("encoding_format").map(|value| (value.as_str(), value)) {
            None | Some((Some("float"), _)) => false,
            Some((Some("base64"), _)) if form == Form::OpenAi => true,
            Some((_, value)) => {
                let words = if form == Form::OpenAi { "'float' or 'base64'" } else { "'float'" };
                let message = format!("'encoding_format' must be {words}, not {value}");
                return Err(ApiError::invalid("encoding_format", message));
            }
        };
        let kept = super::shorten(facts, fields.integer("dimensions", i64::MIN..=i64::MAX)?)?;
        let normalised = match fields.integer("embd_normalize", -1..=2)? {
            None | Some(2) => true,
            Some(-1) => false,
            Some(other) => {
                let message = format!("'embd_normalize' must be -1 (as it is) or 2 (length 1), not {other}");
                return Err(ApiError::invalid("embd_normalize", message));
            }
        };
        let (param, input) = match (fields.take("input"), form) {
            (Some(input), _) => ("input", input),
            (None, Form::Llama) => ("content", fields.take("content").ok_or_else(|| ApiError::missing("input"))?),
            (None, Form::OpenAi) => return Err(ApiError::missing("input")),
        };
        let inputs = super::inputs(param, input)?;
        let most = MAX_NUMBERS / kept.unwrap_or(facts.embedding_width as usize).max(1);
        if inputs.len() > most {
            let message = format!("'{param}' must have at most {most} texts for this model, not {}", inputs.len());
            return Err(ApiError::invalid(param, message));
        }
        Ok(Self { inputs, param, base64, kept, normalised })
    }
}

pub(super) async fn answer(intake: Intake, form: Form) -> Result<Response, ApiError> {
    let Intake { state, visit, fields } = intake;
    let EmbeddingsRequest { inputs, param, base64, kept, normalised } =
        EmbeddingsRequest::read(fields, state.engine().model(), form)?;
    let resolve = move |state: &ApiState| inputs.into_iter().map(|input| input.resolve(state)).collect();
    let texts: Vec<Vec<Token>> = state.prepare(resolve).await?;
    let mut embedded = super::embed(&state, &visit, EmbedTask::Embedding, texts, param).await?;
    let vectors = std::mem::take(&mut embedded.vectors);
    let vectors = vectors.into_iter().map(|mut vector| {
        vector.truncate(kept.unwrap_or(usize::MAX));
        if normalised {
            super::normalise(&mut vector);
        }
        vector
    });
    Ok(match form {
        Form::OpenAi => {
            let data = vectors.enumerate().map(|(index, vector)| VectorBody {
                object: "embedding",
                index,
                embedding: if base64 { Numbers::Base64(encoded(&vector)) } else { Numbers::Floats(vector) },
            });
            let usage = UsageBody::of(&embedded);
            Json(ListBody { object: "list", data: data.collect(), model: state.served_name(), usage }).into_response()
        }
        Form::Llama => {
            let one = |(index, vector)| LlamaBody { index, embedding: [vector] };
            Json(vectors.enumerate().map(one).collect::<Vec<_>>()).into_response()
        }
    })
}

/// The numbers as bytes, little endian, in base64.
fn encoded(vector: &[f32]) -> String {
    let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
    STANDARD.encode(bytes)
}

#[derive(Serialize)]
struct ListBody<'a> {
    object: &'static str,
    data: Vec<VectorBody>,
    model: &'a str,
    usage: UsageBody,
}

#[derive(Serialize)]
struct VectorBody {
    object: &'static str,
    index: usize,
    embedding: Numbers,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Numbers {
    Floats(Vec<f32>),
    Base64(String),
}

/// An array in an array: llama-server's form has room for a vector per token.
#[derive(Serialize)]
struct LlamaBody {
    index: usize,
    embedding: [Vec<f32>; 1],
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(body: Value, form: Form) -> Result<EmbeddingsRequest, ApiError> {
        let Value::Object(fields) = body else { panic!("{body} is no object") };
        let facts = ModelFacts { embedding_width: 8192, ..ModelFacts::default() };
        EmbeddingsRequest::read(Fields(fields), &facts, form)
    }

    #[test]
    fn requests_are_read() {
        let plain = EmbeddingsRequest {
            inputs: vec![Input::Text("a".to_owned())],
            param: "input",
            base64: false,
            kept: None,
            normalised: true,
        };
        assert_eq!(read(json!({"input": "a", "user": "me"}), Form::OpenAi).as_ref(), Ok(&plain));
        let base64 = read(json!({"input": "a", "encoding_format": "base64"}), Form::OpenAi);
        assert_eq!(base64, Ok(EmbeddingsRequest { base64: true, ..plain }));
        let raw = read(json!({"content": "a", "embd_normalize": -1}), Form::Llama).unwrap();
        assert_eq!((raw.param, raw.normalised), ("content", false));
        for (body, param) in [
            (json!({}), "input"),
            (json!({"content": "a"}), "input"),
            (json!({"input": "a", "encoding_format": "hex"}), "encoding_format"),
            (json!({"input": "a", "dimensions": "many"}), "dimensions"),
            (json!({"input": "a", "dimensions": 7}), "dimensions"),
            (json!({"input": "a", "embd_normalize": 1}), "embd_normalize"),
            (json!({"input": vec!["a"; 1025]}), "input"),
        ] {
            let error = read(body.clone(), Form::OpenAi).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{body}: {error:?}");
        }
        assert!(read(json!({"input": "a", "encoding_format": "base64"}), Form::Llama).is_err());
    }

    #[test]
    fn base64_is_little_endian() {
        assert_eq!(encoded(&[1.0, -2.0]), "AACAPwAAAMA=");
    }
}
