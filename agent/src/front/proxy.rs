//! One request on its way to a worker: wait for it, send, relay; again once if the worker ended before it answered.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, BodyDataStream};
use axum::response::Response;
use bytes::Bytes;
use futures::{FutureExt, Stream, StreamExt};
use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use hyper::body::Incoming;
use tokio::sync::watch;

use super::buffer::Buffered;
use super::relay;
use super::shared::Shared;
use super::suspects::Suspect;
use super::table::{InFlight, Route, Told};
use crate::api::{ApiError, Form, HELD, QUEUE_BUDGET, REQUEST_ID, is_stream};

/// How much later than the worker the agent gives a request up: the worker's own answer is the better one.
const REQUEST_GRACE: Duration = Duration::from_secs(5);

/// How long the owner of the front may take to say what became of a worker that ended.
const NEWS_OF_WORKER: Duration = Duration::from_secs(10);

/// Answers up to this size are read whole before the client sees a byte, so that a worker's death can still be a 502.
const WHOLE_ANSWER: u64 = 4 << 20;

/// A request as it goes to a worker.
pub(super) struct Ask {
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    /// Keeps the body's bytes counted.
    pub(super) buffered: Buffered,
    /// How the client wants to be spoken to.
    pub(super) form: Form,
    /// Whether it reads frames.
    pub(super) stream: bool,
    pub(super) request_id: String,
    pub(super) arrived: Instant,
}

/// Answers `ask`. A client that reads frames gets a ping after each interval in which nothing else came.
pub(super) async fn answer(shared: Arc<Shared>, in_flight: InFlight, ask: Ask) -> Result<Response, ApiError> {
    let Ask { form, stream, .. } = ask;
    let ping = shared.limits.ping_interval;
    let mut forwarding = forward(shared, in_flight, ask).boxed();
    if !stream {
        return forwarding.await;
    }
    match tokio::time::timeout(ping, &mut forwarding).await {
        Ok(answer) => answer,
        Err(_) => Ok(form.stream(Body::from_stream(deferred(forwarding, form, ping)))),
    }
}

async fn forward(shared: Arc<Shared>, mut in_flight: InFlight, ask: Ask) -> Result<Response, ApiError> {
    let model = Arc::clone(in_flight.model());
    let published = model.published();
    let queue_deadline = ask.arrived + published.queue_timeout();
    let deadline = ask.arrived + published.request_timeout() + REQUEST_GRACE;
    let mut route = model.told();
    let suspect = Suspect::new(&shared.suspects, &published.uid, &ask.path, &ask.body);
    let mut tries = 0;
    loop {
        if suspect.is_refused() {
            return Err(ApiError::ends_workers());
        }
        let (turn, socket) = ready(&shared, &in_flight, &mut route, queue_deadline).await?;
        in_flight.run();
        tries += 1;
        let mut headers = ask.headers.clone();
        let left = queue_deadline.saturating_duration_since(Instant::now()).as_millis();
        headers.insert(QUEUE_BUDGET, HeaderValue::from(u64::try_from(left).unwrap_or(u64::MAX)));
        headers.insert(HELD, HeaderValue::from(u64::try_from(ask.arrived.elapsed().as_millis()).unwrap_or(u64::MAX)));
        let sent = shared.upstream.send(&socket, turn, ask.method.clone(), &ask.path, headers, ask.body.clone());
        match tokio::time::timeout_at(deadline.into(), sent).await {
            Err(_) => return Err(ApiError::request_timeout(published.request_timeout().as_secs())),
            Ok(Ok(response)) => {
                let Ask { buffered, body, form, .. } = ask;
                drop((buffered, body));
                return relayed(response, in_flight, form, shared.limits.worker_silence, suspect).await;
            }
            Ok(Err(error)) => {
                if !error.is_before_request() {
                    suspect.worker_ended();
                }
                tracing::warn!(
                    request_id = %ask.request_id,
                    model = %published.full_name(),
                    error = &error as &(dyn std::error::Error + 'static),
                    tries,
                    "the worker did not answer"
                );
            }
        }
        // Not a byte was answered, so sending it again is safe; a request that ends two workers is not sent to a third.
        if tries > 1 {
            return Err(ApiError::worker_exited());
        }
        in_flight.wait();
        let patience = queue_deadline.min(Instant::now() + NEWS_OF_WORKER);
        match tokio::time::timeout_at(patience.into(), route.changed()).await {
            Ok(Ok(())) => shared.metrics.retried(&published.namespace, &published.name),
            _ => return Err(ApiError::worker_exited()),
        }
    }
}

/// Waits until a worker is ready.
async fn ready(
    shared: &Shared,
    in_flight: &InFlight,
    route: &mut watch::Receiver<Told>,
    deadline: Instant,
) -> Result<(u64, std::path::PathBuf), ApiError> {
    /// A wake that found its channel full is tried again after this.
    const TICK: Duration = Duration::from_secs(1);
    let model = in_flight.model();
    let mut admitted = false;
    loop {
        let Told { turn, route: now } = route.borrow_and_update().clone();
        match now {
            Route::Ready { socket } => return Ok((turn, socket)),
            Route::Unloaded => shared.wake(model),
            Route::Loading => {}
            Route::Draining => {
                return Err(ApiError::unavailable("model_draining", "the model is leaving this node", 1));
            }
            Route::Unavailable { reason, message } => {
                let message = format!("the model cannot be served now: {reason}: {message}");
                return Err(ApiError::unavailable("model_unavailable", message, model.retry_after()));
            }
        }
        let published = model.published();
        // After the wake: who is refused here finds the model loaded when it comes again, also where none may wait.
        if !std::mem::replace(&mut admitted, true) && model.activity().waiting > published.max_queued() {
            return Err(ApiError::queue_full(published.max_queued(), model.retry_after()));
        }
        let tick = deadline.min(Instant::now() + TICK);
        match tokio::time::timeout_at(tick.into(), route.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(ApiError::unavailable("model_draining", "the model left this node", 1)),
            Err(_) if Instant::now() < deadline => {}
            Err(_) => {
                let seconds = published.queue_timeout().as_secs();
                let message = format!("the model was not loaded within {seconds} s");
                return Err(ApiError::queue_timeout(message, model.retry_after()));
            }
        }
    }
}

async fn relayed(
    response: http::Response<Incoming>,
    in_flight: InFlight,
    form: Form,
    silence: Duration,
    suspect: Suspect,
) -> Result<Response, ApiError> {
    let (mut parts, body) = response.into_parts();
    strip_hop_by_hop(&mut parts.headers);
    if is_stream(&parts.headers) {
        let frames = relay::frames(body, in_flight, form, silence, suspect);
        return Ok(Response::from_parts(parts, Body::from_stream(frames)));
    }
    let length = parts.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length <= WHOLE_ANSWER) {
        let limit = usize::try_from(WHOLE_ANSWER).unwrap_or(usize::MAX);
        let Some(bytes) = relay::whole(body, limit).await else {
            suspect.worker_ended();
            return Err(ApiError::worker_exited());
        };
        suspect.answered();
        return Ok(Response::from_parts(parts, Body::from(bytes)));
    }
    Ok(Response::from_parts(parts, Body::from_stream(relay::pieces(body, in_flight))))
}

type Forwarding = Pin<Box<dyn Future<Output = Result<Response, ApiError>> + Send>>;

enum Deferred {
    Ping(Forwarding),
    Waiting(Forwarding),
    Relaying(BodyDataStream),
    Ended,
}

/// An answer that is not there yet, as frames: pings, then the worker's frames, or one of an error.
fn deferred(
    forwarding: Forwarding,
    form: Form,
    ping: Duration,
) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> {
    futures::stream::unfold(Deferred::Ping(forwarding), move |mut state| async move {
        loop {
            let (frame, next) = match state {
                Deferred::Ping(forwarding) => (Some(form.ping()), Deferred::Waiting(forwarding)),
                Deferred::Waiting(mut forwarding) => match tokio::time::timeout(ping, &mut forwarding).await {
                    Err(_) => (None, Deferred::Ping(forwarding)),
                    Ok(Err(error)) => (Some(form.error_frame(&error, 0)), Deferred::Ended),
                    Ok(Ok(response)) if is_stream(response.headers()) => {
                        (None, Deferred::Relaying(response.into_body().into_data_stream()))
                    }
                    Ok(Ok(response)) => {
                        let body = axum::body::to_bytes(response.into_body(), 64 << 10).await.unwrap_or_default();
                        let frame = form.error_body_frame(&body);
                        let frame = frame.unwrap_or_else(|| form.error_frame(&ApiError::worker_exited(), 0));
                        (Some(frame), Deferred::Ended)
                    }
                },
                Deferred::Relaying(mut body) => match body.next().await? {
                    Ok(frame) => (Some(frame), Deferred::Relaying(body)),
                    Err(_) => (Some(form.error_frame(&ApiError::worker_exited(), 0)), Deferred::Ended),
                },
                Deferred::Ended => return None,
            };
            match frame {
                Some(frame) => return Some((Ok(frame), next)),
                None => state = next,
            }
        }
    })
}

/// Where Anthropic's clients put their token.
pub(super) const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Headers that are for one connection only (RFC 9110, 7.6.1), the ones that `connection` names included.
const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in HOP_BY_HOP.iter().chain(&named) {
        headers.remove(name);
    }
}

/// The headers that go to the worker: not those of this hop, nor a secret that was meant for the agent.
pub(super) fn outgoing(headers: &HeaderMap, request_id: &str) -> HeaderMap {
    let mut headers = headers.clone();
    strip_hop_by_hop(&mut headers);
    // The body goes on whole: its length is set anew, and there is nothing to expect.
    let secrets = [header::AUTHORIZATION, API_KEY];
    for name in [header::HOST, header::CONTENT_LENGTH, header::EXPECT, QUEUE_BUDGET, HELD].into_iter().chain(secrets) {
        headers.remove(name);
    }
    if let Ok(value) = HeaderValue::from_str(request_id) {
        headers.insert(REQUEST_ID, value);
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_one_hop_stay_behind() {
        let given = [
            ("host", "example.com"),
            ("connection", "keep-alive, X-Private"),
            ("keep-alive", "timeout=5"),
            ("x-private", "1"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("authorization", "Bearer secret"),
            ("x-api-key", "secret"),
            ("x-altiplano-queue-budget-ms", "999999"),
            ("x-altiplano-held-ms", "999999"),
            ("content-type", "application/json"),
            ("x-request-id", "theirs"),
            ("user-agent", "curl"),
        ];
        let given = HeaderMap::from_iter(
            given.map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))),
        );
        let out = outgoing(&given, "ours");
        let mut names: Vec<_> = out.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["content-type", "user-agent", "x-request-id"]);
        assert_eq!(out["x-request-id"], "ours");
    }
}
