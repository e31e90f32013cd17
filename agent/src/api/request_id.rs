//! `x-request-id`: the client's, or one of ours.

use http::{HeaderMap, HeaderName};

/// The header.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Characters of a client's own id that are taken over; a longer one is replaced.
const MOST: usize = 128;

/// The client's id if it is fit for logs and headers, else a new one.
pub(crate) fn request_id(headers: &HeaderMap) -> String {
    let fit = |text: &&str| !text.is_empty() && text.len() <= MOST && text.bytes().all(|byte| byte.is_ascii_graphic());
    match headers.get(REQUEST_ID).and_then(|value| value.to_str().ok()).filter(fit) {
        Some(id) => id.to_owned(),
        None => format!("req-{}", uuid::Uuid::new_v4().simple()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clients_id_is_kept_when_it_is_fit() {
        let with = |id: &str| request_id(&HeaderMap::from_iter([(REQUEST_ID, id.parse().unwrap())]));
        assert_eq!(with("abc-123"), "abc-123");
        for unfit in ["", "two words", &"x".repeat(129)] {
            assert!(with(unfit).starts_with("req-"), "{unfit}");
        }
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }
}
