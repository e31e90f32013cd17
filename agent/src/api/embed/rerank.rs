//! `POST /v1/rerank`: which documents answer a query.

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;

use super::UsageBody;
use crate::api::error::ApiError;
use crate::api::fields::{Fields, wrong_type};
use crate::api::intake::Intake;
use crate::engine::{Ability, EmbedTask, MAX_TEXTS, Token};

/// A request, checked.
#[derive(Debug, PartialEq)]
struct RerankRequest {
    query: String,
    documents: Vec<String>,
    param: &'static str,
    top: usize,
    /// The answer repeats the documents.
    with_documents: bool,
}

impl RerankRequest {
    fn read(mut fields: Fields) -> Result<Self, ApiError> {
        let query = match fields.take("query") {
            None => return Err(ApiError::missing("query")),
            Some(Value::String(query)) if query.is_empty() => {
                return Err(ApiError::invalid("query", "'query' must not be empty"));
            }
            Some(Value::String(query)) => query,
            Some(other) => return Err(wrong_type("query", "a string", &other)),
        };
        // TEI says `texts` and `return_text`.
        let (param, returned) = match fields.get("documents") {
            None if fields.get("texts").is_some() => ("texts", "return_text"),
            _ => ("documents", "return_documents"),
        };
        let documents = match fields.take(param) {
            None => return Err(ApiError::missing(param)),
            Some(Value::Array(documents)) => documents,
            Some(other) => return Err(wrong_type(param, "an array", &other)),
        };
        super::count(param, documents.len(), "documents")?;
        let one = |document: Value| match document {
            Value::String(text) => Ok(text),
            Value::Object(mut fields) => match fields.remove("text") {
                Some(Value::String(text)) => Ok(text),
                _ => Err(ApiError::invalid(param, format!("'{param}' has an object without a string 'text'"))),
            },
            other => Err(wrong_type(param, "an array of strings, or of objects with 'text'", &other)),
        };
        let documents: Vec<String> = documents.into_iter().map(one).collect::<Result<_, _>>()?;
        let most = i64::try_from(MAX_TEXTS).unwrap_or(i64::MAX);
        let top = fields.integer("top_n", 1..=most)?.and_then(|top| usize::try_from(top).ok());
        let with_documents = fields.boolean(returned)?.unwrap_or(false);
        Ok(Self { query, top: top.unwrap_or(documents.len()), documents, param, with_documents })
    }
}

pub(super) async fn answer(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit, fields } = intake;
    let asked = RerankRequest::read(fields)?;
    let (param, top, with_documents) = (asked.param, asked.top, asked.with_documents);
    let (documents, texts) = state
        .prepare(move |state| {
            // A model that cannot rank says so below; here it would only cost.
            let RerankRequest { query, documents, .. } = asked;
            let prompt = |document: &String| -> Result<Vec<Token>, ApiError> {
                if !state.engine().model().can(Ability::Rerank) {
                    return Ok(vec![0]);
                }
                let prompt = state.engine().rerank_prompt(&query, document);
                prompt.map_err(|error| ApiError::internal(error.to_string()))
            };
            let texts = documents.iter().map(prompt).collect::<Result<Vec<_>, _>>()?;
            Ok((documents, texts))
        })
        .await?;
    let embedded = super::embed(&state, &visit, EmbedTask::Score, texts, param).await?;
    let scores: Vec<f32> = embedded.vectors.iter().map(|vector| vector.first().copied().unwrap_or(0.0)).collect();
    let best = best(&scores, top);
    let document = |index: usize| documents.get(index).filter(|_| with_documents).map(String::as_str);
    if param == "texts" {
        let one = |&(index, score)| TeiBody { index, score, text: document(index) };
        return Ok(Json(best.iter().map(one).collect::<Vec<_>>()).into_response());
    }
    let one = |&(index, relevance_score)| ResultBody {
        index,
        relevance_score,
        document: document(index).map(|text| DocumentBody { text }),
    };
    let results = best.iter().map(one).collect();
    let usage = UsageBody::of(&embedded);
    Ok(Json(AnswerBody { object: "list", model: state.served_name(), usage, results }).into_response())
}

/// The `top` best, the best first; of equals the first.
fn best(scores: &[f32], top: usize) -> Vec<(usize, f32)> {
    let mut ranked: Vec<(usize, f32)> = scores.iter().copied().enumerate().collect();
    // Stable: equals stay in their order.
    ranked.sort_by(|left, right| right.1.total_cmp(&left.1));
    ranked.truncate(top);
    ranked
}

#[derive(Serialize)]
struct AnswerBody<'a> {
    object: &'static str,
    model: &'a str,
    usage: UsageBody,
    results: Vec<ResultBody<'a>>,
}

#[derive(Serialize)]
struct ResultBody<'a> {
    index: usize,
    relevance_score: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    document: Option<DocumentBody<'a>>,
}

#[derive(Serialize)]
struct DocumentBody<'a> {
    text: &'a str,
}

#[derive(Serialize)]
struct TeiBody<'a> {
    index: usize,
    score: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: Value) -> Result<RerankRequest, ApiError> {
        let Value::Object(fields) = body else { panic!("{body} is no object") };
        RerankRequest::read(Fields(fields))
    }

    #[test]
    fn requests_are_read() {
        let plain = RerankRequest {
            query: "q".to_owned(),
            documents: vec!["a".to_owned(), "b".to_owned()],
            param: "documents",
            top: 2,
            with_documents: false,
        };
        assert_eq!(read(json!({"query": "q", "documents": ["a", {"text": "b", "id": 7}]})), Ok(plain));
        let more = read(json!({"query": "q", "documents": ["a", "b"], "top_n": 1, "return_documents": true})).unwrap();
        assert_eq!((more.top, more.with_documents), (1, true));
        let tei = read(json!({"query": "q", "texts": ["a"], "return_text": true})).unwrap();
        assert_eq!((tei.param, tei.with_documents), ("texts", true));
        for (body, param) in [
            (json!({"documents": ["a"]}), "query"),
            (json!({"query": "", "documents": ["a"]}), "query"),
            (json!({"query": ["q"], "documents": ["a"]}), "query"),
            (json!({"query": "q"}), "documents"),
            (json!({"query": "q", "documents": []}), "documents"),
            (json!({"query": "q", "documents": vec!["a"; 2049]}), "documents"),
            (json!({"query": "q", "documents": [{"title": "a"}]}), "documents"),
            (json!({"query": "q", "documents": "a"}), "documents"),
            (json!({"query": "q", "documents": ["a"], "top_n": 0}), "top_n"),
        ] {
            let error = read(body.clone()).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{body}: {error:?}");
        }
    }

    #[test]
    fn the_best_come_first() {
        assert_eq!(best(&[0.5, -1.0, 2.0, 0.5], 3), [(2, 2.0), (0, 0.5), (3, 0.5)]);
        assert_eq!(best(&[1.0], 9), [(0, 1.0)]);
    }
}
