//! Server-sent events, byte by byte.

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderValue, header};
use serde::Serialize;

use super::error::ApiError;

/// Ends a stream that ended well.
pub(crate) const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

/// A comment, which clients skip, and which keeps proxies from giving up.
pub(crate) const PING: Bytes = Bytes::from_static(b": ping\n\n");

/// One event with `value` as JSON, which has no line break in it.
pub(crate) fn data(value: &impl Serialize) -> Result<Bytes, serde_json::Error> {
    let mut frame = Vec::with_capacity(256);
    frame.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut frame, value)?;
    frame.extend_from_slice(b"\n\n");
    Ok(frame.into())
}

/// An error after the status was sent. The event has a name for those who look at it; OpenAI's clients look for `error`
/// in the data.
pub(crate) fn error(error: &ApiError) -> Bytes {
    error_json(&error.to_json())
}

/// The same, for an error that is JSON in one line already.
pub(crate) fn error_json(json: &str) -> Bytes {
    format!("event: error\ndata: {json}\n\n").into()
}

/// A response with the headers that keep proxies from holding tokens back.
pub(crate) fn response(body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Whether a response is a stream of events.
pub(crate) fn is_stream(headers: &http::HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    kind.starts_with("text/event-stream")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_the_text() {
        assert_eq!(data(&"a\nb\r\n\u{2028}").unwrap(), "data: \"a\\nb\\r\\n\u{2028}\"\n\n");
        let error = error(&ApiError::internal("one\ntwo"));
        let text = std::str::from_utf8(&error).unwrap();
        assert!(
            text.starts_with("event: error\ndata: {\"error\":{\"message\":\"one\\ntwo\"") && text.ends_with("}\n\n")
        );
        assert_eq!(text.matches('\n').count(), 3);
    }
}
