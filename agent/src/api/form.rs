//! How the APIs differ before and beside what a model says: the form of errors, how a stream is framed, and what keeps
//! it alive. Each path belongs to one form, so that every hop and every middleware speaks as the client expects.
//!
//! | form | paths | an error | in mid-stream | sign of life |
//! |---|---|---|---|---|
//! | OpenAI | all others | `{"error": {"message", "type", "param", "code"}}` | event `error` with the same | a comment |
//! | Responses | `/v1/responses…`, `/responses…` | the same | event `error`: `{"type": "error", "code", "message", "param", "sequence_number"}` | a comment |
//! | Anthropic | `/v1/messages…` | `{"type": "error", "error": {"type", "message"}, "request_id"}` | event `error` with the same | event `ping` |
//! | Ollama | `/api/…` | `{"error": "message"}` | a line with the same | a space before the next line |

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use serde_json::{Value, json};

use super::error::ApiError;
use super::request_id::REQUEST_ID;

/// Ends a stream of OpenAI's that ended well.
pub(crate) const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

/// Form of a family of paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// OpenAI's, and llama-server's own paths.
    OpenAi,
    /// OpenAI's Responses, whose events have types.
    Responses,
    /// Anthropic's Messages.
    Anthropic,
    /// Ollama's, which streams lines of JSON.
    Ollama,
}

impl Form {
    /// The form that answers on `path` have.
    pub(crate) fn of(path: &str) -> Self {
        let below = |root: &str| path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        if below("/v1/messages") {
            Self::Anthropic
        } else if below("/v1/responses") || below("/responses") {
            Self::Responses
        } else if below("/api") {
            Self::Ollama
        } else {
            Self::OpenAi
        }
    }

    /// The body of an error. `request_id`: empty when it is not known.
    pub(crate) fn error_json(self, error: &ApiError, request_id: &str) -> String {
        match self {
            Self::OpenAi | Self::Responses => error.to_json(),
            Self::Anthropic => {
                let mut body = json!({
                    "type": "error",
                    "error": {"type": anthropic_type(error), "message": error.message},
                });
                if let (Some(fields), false) = (body.as_object_mut(), request_id.is_empty()) {
                    fields.insert("request_id".to_owned(), request_id.into());
                }
                body.to_string()
            }
            Self::Ollama => json!({"error": error.message}).to_string(),
        }
    }

    /// The frame of an error that happens after the status was sent. `sequence`: what Responses' events are at.
    pub(crate) fn error_frame(self, error: &ApiError, sequence: u64) -> Bytes {
        match self {
            Self::OpenAi | Self::Anthropic => named("error", &self.error_json(error, "")),
            Self::Responses => {
                let code = error.code.as_deref().unwrap_or(error.kind).into();
                let (message, param) = (error.message.as_str().into(), error.param.as_deref().into());
                named("error", &responses_error(&code, &message, &param, sequence).to_string())
            }
            Self::Ollama => format!("{}\n", self.error_json(error, "")).into(),
        }
    }

    /// The frame of an error whose body, in this form, is `body`.
    pub(crate) fn error_body_frame(self, body: &[u8]) -> Option<Bytes> {
        let body: Value = serde_json::from_slice(body).ok()?;
        Some(match self {
            Self::OpenAi | Self::Anthropic => named("error", &body.to_string()),
            Self::Responses => {
                let error = body.get("error")?;
                let code = error.get("code").filter(|code| !code.is_null()).or_else(|| error.get("type"))?;
                let body = responses_error(code, error.get("message")?, error.get("param")?, 0);
                named("error", &body.to_string())
            }
            Self::Ollama => format!("{body}\n").into(),
        })
    }

    /// What keeps proxies from giving up while nothing comes, and clients skip. For lines
    /// of JSON it is white space: an empty line would be no JSON, and break clients.
    pub(crate) fn ping(self) -> Bytes {
        match self {
            Self::OpenAi | Self::Responses => Bytes::from_static(b": ping\n\n"),
            Self::Anthropic => Bytes::from_static(b"event: ping\ndata: {\"type\": \"ping\"}\n\n"),
            Self::Ollama => Bytes::from_static(b" "),
        }
    }

    /// What ends a frame, and stands nowhere in one.
    pub(crate) fn frame_end(self) -> &'static [u8] {
        match self {
            Self::OpenAi | Self::Responses | Self::Anthropic => b"\n\n",
            Self::Ollama => b"\n",
        }
    }

    /// A stream, with the headers that keep proxies from holding tokens back or changing them.
    pub(crate) fn stream(self, body: Body) -> Response {
        let mut response = Response::new(body);
        let kind = match self {
            Self::OpenAi | Self::Responses | Self::Anthropic => "text/event-stream",
            Self::Ollama => "application/x-ndjson",
        };
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, no-transform"));
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        response
    }

    /// What every answer gets on its way out: its id, and where it is an error of ours, this form.
    pub(crate) fn finish(self, mut response: Response, request_id: &str) -> Response {
        if let Some(error) = response.extensions_mut().remove::<ApiError>() {
            *response.body_mut() = Body::from(self.error_json(&error, request_id));
        }
        if let Ok(value) = HeaderValue::from_str(request_id) {
            let headers = response.headers_mut();
            if self == Self::Anthropic {
                headers.insert("request-id", value.clone());
            }
            headers.insert(REQUEST_ID, value);
        }
        response
    }
}

/// Whether a response is a stream of frames.
pub(crate) fn is_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    kind.starts_with("text/event-stream") || kind.starts_with("application/x-ndjson")
}

fn named(name: &str, json: &str) -> Bytes {
    format!("event: {name}\ndata: {json}\n\n").into()
}

fn responses_error(code: &Value, message: &Value, param: &Value, sequence: u64) -> Value {
    json!({"type": "error", "code": code, "message": message, "param": param, "sequence_number": sequence})
}

/// Anthropic's word for an error, by its status.
fn anthropic_type(error: &ApiError) -> &'static str {
    match error.status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        408 | 504 => "timeout_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        400..=499 => "invalid_request_error",
        _ => "api_error",
    }
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;

    use super::*;

    #[test]
    fn a_path_has_a_form() {
        for (path, form) in [
            ("/v1/chat/completions", Form::OpenAi),
            ("/nothing", Form::OpenAi),
            ("/v1/responses", Form::Responses),
            ("/v1/responses/resp_1", Form::Responses),
            ("/responses", Form::Responses),
            ("/v1/responsesx", Form::OpenAi),
            ("/v1/messages", Form::Anthropic),
            ("/v1/messages/count_tokens", Form::Anthropic),
            ("/api/chat", Form::Ollama),
            ("/apix", Form::OpenAi),
        ] {
            assert_eq!(Form::of(path), form, "{path}");
        }
    }

    #[test]
    fn an_error_in_every_form() {
        let error = ApiError::invalid("n", "one\ntwo");
        let openai =
            r#"{"error":{"message":"one\ntwo","type":"invalid_request_error","param":"n","code":"invalid_value"}}"#;
        let anthropic = r#"{"type":"error","error":{"type":"invalid_request_error","message":"one\ntwo"}}"#;
        let parse = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        for (form, whole, frame) in [
            (Form::OpenAi, openai, openai),
            (
                Form::Responses,
                openai,
                r#"{"type":"error","code":"invalid_value","message":"one\ntwo","param":"n","sequence_number":7}"#,
            ),
            (Form::Anthropic, anthropic, anthropic),
        ] {
            assert_eq!(parse(&form.error_json(&error, "")), parse(whole));
            let sent = form.error_frame(&error, 7);
            let text = std::str::from_utf8(&sent).unwrap();
            let data = text.strip_prefix("event: error\ndata: ").unwrap().strip_suffix("\n\n").unwrap();
            assert_eq!(parse(data), parse(frame));
            assert_eq!(text.matches('\n').count(), 3, "{text}");
            let zero = form.error_body_frame(form.error_json(&error, "").as_bytes()).unwrap();
            let zero = std::str::from_utf8(&zero).unwrap().strip_prefix("event: error\ndata: ").unwrap();
            assert_eq!(parse(zero), parse(&frame.replace('7', "0")));
        }
        assert_eq!(Form::Ollama.error_frame(&error, 7), "{\"error\":\"one\\ntwo\"}\n");
        assert!(Form::Anthropic.error_json(&error, "req-1").contains(r#""request_id":"req-1""#));
    }

    #[test]
    fn an_error_gets_its_paths_form_on_the_way_out() {
        let response = Form::Anthropic.finish(ApiError::queue_full(4, 7).into_response(), "req-1");
        assert_eq!(response.status(), 429);
        let headers = response.headers();
        assert_eq!(
            (&headers["retry-after"], &headers["request-id"]),
            (&"7".parse().unwrap(), &"req-1".parse().unwrap())
        );
        assert_eq!(headers["content-type"], "application/json");
        let body = futures::executor::block_on(axum::body::to_bytes(response.into_body(), 1 << 20)).unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((&body["error"]["type"], &body["request_id"]), (&json!("rate_limit_error"), &json!("req-1")));
    }
}
