//! A worker's answer on its way to the client.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use http_body_util::BodyExt;
use hyper::body::Incoming;

use super::table::InFlight;
use crate::api::{ApiError, error_event};

/// Bytes of an unfinished event that are held back at most.
const MOST_HELD: usize = 1 << 20;

/// Passes events on as they come, whole ones only: when the worker dies in the middle of one, the client gets an error
/// event that it can read. `silence`: a worker that says nothing for so long, not even a ping, is taken for dead.
pub(super) fn events(
    body: Incoming,
    in_flight: InFlight,
    silence: Duration,
) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> {
    let pieces = body.into_data_stream();
    whole_events(pieces, silence).map(move |event| {
        // Counts as running until the stream is dropped.
        let _held = &in_flight;
        Ok(event)
    })
}

fn whole_events<E>(
    pieces: impl Stream<Item = Result<Bytes, E>> + Unpin,
    silence: Duration,
) -> impl Stream<Item = Bytes> {
    let state = Some((pieces, BytesMut::new()));
    futures::stream::unfold(state, move |state| async move {
        let (mut pieces, mut held) = state?;
        loop {
            match tokio::time::timeout(silence, pieces.next()).await {
                Ok(Some(Ok(piece))) => {
                    if held.is_empty() && piece.ends_with(b"\n\n") {
                        return Some((piece, Some((pieces, held))));
                    }
                    held.extend_from_slice(&piece);
                    let whole = if held.len() > MOST_HELD { held.len() } else { whole_length(&held) };
                    if whole > 0 {
                        return Some((held.split_to(whole).freeze(), Some((pieces, held))));
                    }
                }
                // The worker ended its answer.
                Ok(None) if held.is_empty() => return None,
                Ok(None) => return Some((held.freeze(), None)),
                Ok(Some(Err(_))) | Err(_) => return Some((error_event(&ApiError::worker_exited()), None)),
            }
        }
    })
}

/// Bytes up to the end of the last whole event.
fn whole_length(bytes: &[u8]) -> usize {
    bytes.windows(2).rposition(|pair| pair == b"\n\n").map_or(0, |at| at + 2)
}

/// Passes any other body on as it is.
pub(super) fn pieces(body: Incoming, in_flight: InFlight) -> impl Stream<Item = Result<Bytes, hyper::Error>> {
    body.into_data_stream().map(move |piece| {
        let _held = &in_flight;
        piece
    })
}

/// Reads a short body whole; `None` when the worker goes away before its end.
pub(super) async fn whole(body: Incoming, limit: usize) -> Option<Bytes> {
    let limited = http_body_util::Limited::new(body, limit);
    limited.collect().await.ok().map(http_body_util::Collected::to_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn relayed(pieces: &[Result<&'static str, ()>]) -> Vec<String> {
        let pieces: Vec<_> = pieces.iter().map(|piece| piece.map(Bytes::from)).collect();
        let events = whole_events(futures::stream::iter(pieces), Duration::from_secs(5));
        events.map(|event| String::from_utf8(event.to_vec()).unwrap()).collect().await
    }

    #[tokio::test]
    async fn events_pass_unchanged_and_whole() {
        assert_eq!(relayed(&[Ok("data: 1\n\n"), Ok(": ping\n\n")]).await, ["data: 1\n\n", ": ping\n\n"]);
        assert_eq!(relayed(&[Ok("data: 1\n"), Ok("\ndata: 2"), Ok("\n\n")]).await, ["data: 1\n\n", "data: 2\n\n"]);
        assert_eq!(relayed(&[Ok("data: 1\n\ndata: [DO"), Ok("NE]")]).await, ["data: 1\n\n", "data: [DONE]"]);
    }

    #[tokio::test]
    async fn a_worker_that_dies_ends_the_stream_with_an_error_event() {
        let got = relayed(&[Ok("data: 1\n\n"), Ok("data: {\"ha"), Err(())]).await;
        assert_eq!(got[0], "data: 1\n\n");
        assert!(got[1].starts_with("event: error\ndata: {\"error\""), "{}", got[1]);
        assert!(got[1].contains("\"code\":\"worker_exited\""));
        assert_eq!(got.len(), 2);
    }

    #[tokio::test]
    async fn a_worker_that_is_silent_is_taken_for_dead() {
        let pieces = futures::stream::pending::<Result<Bytes, ()>>();
        let got: Vec<_> = whole_events(pieces, Duration::from_millis(20)).collect().await;
        assert_eq!(got.len(), 1);
        assert!(got[0].starts_with(b"event: error"));
    }
}
