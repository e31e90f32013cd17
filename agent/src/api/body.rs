//! Reading a request's body: bounded in bytes and time, JSON only.

use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http::{HeaderMap, header};
use serde_json::{Map, Value};

use super::error::ApiError;

/// Bytes that a body may have unless the configuration says otherwise.
pub const DEFAULT_BODY_LIMIT: usize = 32 << 20;

/// Refuses a body that is said to be something else than JSON. None said is taken for JSON.
pub(crate) fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let text = value.to_str().unwrap_or_default();
    let essence = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json")) {
        return Ok(());
    }
    Err(ApiError::wrong_content_type(text))
}

/// Refuses a body that says itself that it is too large, before a byte of it is read.
pub(crate) fn check_content_length(headers: &HeaderMap, limit: usize) -> Result<(), ApiError> {
    let said = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    match said {
        Some(length) if length > limit as u64 => Err(ApiError::too_large(limit)),
        _ => Ok(()),
    }
}

/// Reads the body; `grow` is asked before each piece is kept.
pub(crate) async fn collect(
    body: Body,
    limit: usize,
    timeout: Duration,
    mut grow: impl FnMut(usize) -> Result<(), ApiError>,
) -> Result<Bytes, ApiError> {
    let read = async {
        let mut pieces = body.into_data_stream();
        let mut whole = BytesMut::new();
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|error| ApiError::bad_request(format!("the body could not be read: {error}")))?;
            if whole.len() + piece.len() > limit {
                return Err(ApiError::too_large(limit));
            }
            grow(piece.len())?;
            whole.extend_from_slice(&piece);
        }
        Ok(whole.freeze())
    };
    match tokio::time::timeout(timeout, read).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::slow_body(timeout.as_secs())),
    }
}

/// The JSON object in `bytes`.
pub(crate) fn parse_object(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err(ApiError::bad_request("the body must be a JSON object")),
        Err(error) => Err(malformed(&error)),
    }
}

/// 400 with the place of the error.
pub(crate) fn malformed(error: &serde_json::Error) -> ApiError {
    ApiError::bad_request(format!("the body is not valid JSON: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: http::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, value.parse().unwrap())])
    }

    #[test]
    fn content_types() {
        for good in ["application/json", "application/json; charset=utf-8", "Application/JSON", "application/x+json"] {
            check_content_type(&headers(header::CONTENT_TYPE, good)).unwrap();
        }
        check_content_type(&HeaderMap::new()).unwrap();
        for bad in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""] {
            let error = check_content_type(&headers(header::CONTENT_TYPE, bad)).unwrap_err();
            assert_eq!(error.status, 415, "{bad}");
        }
    }

    #[tokio::test]
    async fn bodies_are_bounded_in_bytes_and_time() {
        let second = Duration::from_secs(1);
        let read = |body: Body| collect(body, 10, second, |_| Ok(()));
        assert_eq!(read(Body::from("0123456789")).await.unwrap(), "0123456789");
        assert_eq!(read(Body::from("0123456789+")).await.unwrap_err().status, 413);
        assert_eq!(check_content_length(&headers(header::CONTENT_LENGTH, "11"), 10).unwrap_err().status, 413);
        check_content_length(&headers(header::CONTENT_LENGTH, "10"), 10).unwrap();

        let never = Body::from_stream(futures::stream::pending::<Result<Bytes, std::io::Error>>());
        let error = collect(never, 10, Duration::from_millis(20), |_| Ok(())).await.unwrap_err();
        assert_eq!(error.status, 408);
        let refused = collect(Body::from("x"), 10, second, |_| Err(ApiError::internal("full"))).await.unwrap_err();
        assert_eq!(refused.message, "full");
    }

    #[test]
    fn malformed_json_names_the_place() {
        let error = parse_object(b"{\"model\": \"x\",\n \"n\": }").unwrap_err();
        assert_eq!(error.status, 400);
        assert!(error.message.contains("line 2 column"), "{}", error.message);
        for bad in ["", "[]", "\"x\"", "{} {}", "\u{0}", &"[".repeat(100_000)] {
            assert_eq!(parse_object(bad.as_bytes()).unwrap_err().status, 400, "{bad:.20}");
        }
        assert_eq!(parse_object(b"{\"a\": \"\xff\"}").unwrap_err().status, 400);
    }
}
