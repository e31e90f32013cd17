//! A worker's answer on its way to the client.

use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use http_body_util::BodyExt;
use hyper::body::Incoming;

use super::suspects::Suspect;
use super::table::InFlight;
use crate::api::{ApiError, Form};

/// Bytes of an unfinished event that are held back at most.
const MOST_HELD: usize = 1 << 20;

/// Passes frames on as they come, whole ones only: when the worker dies in the middle of one, the client gets an error
/// that it can read. `silence`: a worker that says nothing for so long, not even a ping, is taken for dead.
pub(super) fn frames(
    body: Incoming,
    in_flight: InFlight,
    form: Form,
    silence: Duration,
    suspect: Suspect,
) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> {
    let after = suspect.clone();
    let pieces = body
        .into_data_stream()
        .inspect(move |piece| {
            if piece.is_err() {
                suspect.worker_ended();
            }
        })
        // Nobody asks for more after an error.
        .chain(futures::stream::poll_fn(move |_| {
            after.answered();
            Poll::Ready(None)
        }));
    whole_frames(pieces, form, silence).map(move |frame| {
        // Counts as running until the stream is dropped.
        let _held = &in_flight;
        Ok(frame)
    })
}

fn whole_frames<E>(
    pieces: impl Stream<Item = Result<Bytes, E>> + Unpin,
    form: Form,
    silence: Duration,
) -> impl Stream<Item = Bytes> {
    let end = form.frame_end();
    // Frames that were passed on, which is where Responses' events are.
    let state = Some((pieces, BytesMut::new(), 0));
    futures::stream::unfold(state, move |state| async move {
        let (mut pieces, mut held, passed) = state?;
        loop {
            match tokio::time::timeout(silence, pieces.next()).await {
                Ok(Some(Ok(piece))) => {
                    // White space alone is a sign of life.
                    let is_whole = piece.ends_with(end) || piece.iter().all(u8::is_ascii_whitespace);
                    if held.is_empty() && is_whole {
                        let passed = passed + events(&piece);
                        return Some((piece, Some((pieces, held, passed))));
                    }
                    held.extend_from_slice(&piece);
                    let whole = if held.len() > MOST_HELD { held.len() } else { whole_length(&held, end) };
                    if whole > 0 {
                        let frames = held.split_to(whole).freeze();
                        let passed = passed + events(&frames);
                        return Some((frames, Some((pieces, held, passed))));
                    }
                }
                // The worker ended its answer.
                Ok(None) if held.is_empty() => return None,
                Ok(None) => return Some((held.freeze(), None)),
                Ok(Some(Err(_))) | Err(_) => {
                    return Some((form.error_frame(&ApiError::worker_exited(), passed), None));
                }
            }
        }
    })
}

/// Events with a name among whole frames, which is what Responses numbers.
fn events(frames: &[u8]) -> u64 {
    const NAME: &[u8] = b"event: ";
    let named = frames.windows(NAME.len()).enumerate();
    // A name stands at the beginning of a line; JSON has no line breaks.
    named.filter(|(at, window)| *window == NAME && (*at == 0 || frames[at - 1] == b'\n')).count() as u64
}

/// Bytes up to the end of the last whole frame.
fn whole_length(bytes: &[u8], end: &[u8]) -> usize {
    bytes.windows(end.len()).rposition(|window| window == end).map_or(0, |at| at + end.len())
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

    async fn relayed(form: Form, pieces: &[Result<&'static str, ()>]) -> Vec<String> {
        let pieces: Vec<_> = pieces.iter().map(|piece| piece.map(Bytes::from)).collect();
        let frames = whole_frames(futures::stream::iter(pieces), form, Duration::from_secs(5));
        frames.map(|frame| String::from_utf8(frame.to_vec()).unwrap()).collect().await
    }

    #[tokio::test]
    async fn frames_pass_unchanged_and_whole() {
        let events = async |pieces| relayed(Form::OpenAi, pieces).await;
        assert_eq!(events(&[Ok("data: 1\n\n"), Ok(": ping\n\n")]).await, ["data: 1\n\n", ": ping\n\n"]);
        assert_eq!(events(&[Ok("data: 1\n"), Ok("\ndata: 2"), Ok("\n\n")]).await, ["data: 1\n\n", "data: 2\n\n"]);
        assert_eq!(events(&[Ok("data: 1\n\ndata: [DO"), Ok("NE]")]).await, ["data: 1\n\n", "data: [DONE]"]);
        let lines = relayed(Form::Ollama, &[Ok("{\"a\": 1}\n{\"b\""), Ok(": 2}\n")]).await;
        assert_eq!(lines, ["{\"a\": 1}\n", "{\"b\": 2}\n"]);
        assert_eq!(
            relayed(Form::Ollama, &[Ok(" "), Ok("{}\n")]).await,
            [" ", "{}\n"],
            "a sign of life is not held back"
        );
    }

    #[tokio::test]
    async fn a_worker_that_dies_ends_the_stream_with_an_error_in_the_apis_form() {
        let dies = [Ok("data: 1\n\n"), Ok("data: {\"ha"), Err(())];
        for (form, begin, has) in [
            (Form::OpenAi, "event: error\ndata: {\"error\"", "\"code\":\"worker_exited\""),
            (Form::Anthropic, "event: error\ndata: {", "\"type\":\"api_error\""),
        ] {
            let got = relayed(form, &dies).await;
            assert_eq!((got[0].as_str(), got.len()), ("data: 1\n\n", 2));
            assert!(got[1].starts_with(begin) && got[1].contains(has) && got[1].ends_with("\n\n"), "{}", got[1]);
        }
        let typed = [Ok("event: a\ndata: \"event: x\"\n\nevent: b\ndata: 1\n\n: ping\n\n"), Err(())];
        let got = relayed(Form::Responses, &typed).await;
        assert!(got[1].contains("\"sequence_number\":2") && got[1].contains("\"type\":\"error\""), "{}", got[1]);
        let lines = relayed(Form::Ollama, &[Ok("{}\n"), Ok("{\"ha"), Err(())]).await;
        assert!(lines[1].starts_with("{\"error\":\"") && lines[1].ends_with("}\n"), "{}", lines[1]);
    }

    #[tokio::test]
    async fn a_worker_that_is_silent_is_taken_for_dead() {
        let pieces = futures::stream::pending::<Result<Bytes, ()>>();
        let got: Vec<_> = whole_frames(pieces, Form::OpenAi, Duration::from_millis(20)).collect().await;
        assert_eq!(got.len(), 1);
        assert!(got[0].starts_with(b"event: error"));
    }
}
