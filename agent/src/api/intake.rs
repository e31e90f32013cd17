//! How a request comes in: let in, read whole, and meant for this model. Every handler that generates begins with it.

use std::time::{Duration, Instant};

use axum::extract::{FromRequest, Request};
use http::{HeaderMap, HeaderName};
use tokio::sync::OwnedSemaphorePermit;

use super::body::{check_content_length, check_content_type, collect, parse_object};
use super::error::ApiError;
use super::fields::Fields;
use super::{ApiOptions, ApiState, HELD, QUEUE_BUDGET, RequestId};

/// A request that was let in, its body an object that asks for this model.
pub(crate) struct Intake {
    pub(crate) state: ApiState,
    pub(crate) visit: Visit,
    pub(crate) fields: Fields,
}

/// A request as such.
pub(crate) struct Visit {
    /// For logs and headers.
    pub(crate) request_id: String,
    pub(crate) arrived: Instant,
    /// How long the agent held it before, most of it while the model was loaded.
    pub(crate) held: Duration,
    /// When it leaves the queue, should it still be waiting.
    pub(crate) queue_deadline: Instant,
    /// Number of the LoRA adapter that it asks for.
    pub(crate) adapter: Option<usize>,
    /// Held until the answer is complete.
    _admission: OwnedSemaphorePermit,
}

impl FromRequest<ApiState> for Intake {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &ApiState) -> Result<Self, ApiError> {
        let arrived = Instant::now();
        let admission = state.admit()?;
        let ApiOptions { body_limit, body_timeout, .. } = *state.options();
        let (parts, body) = request.into_parts();
        check_content_type(&parts.headers)?;
        check_content_length(&parts.headers, body_limit)?;
        let bytes = collect(body, body_limit, body_timeout, |_| Ok(())).await?;
        let fields = parse_object(&bytes)?;
        let adapter = state.check_model(&fields)?;
        let request_id = parts.extensions.get().map(|RequestId(id)| id.clone()).unwrap_or_default();
        let queue_deadline = arrived + queue_timeout(state, &parts.headers);
        let held = milliseconds(&parts.headers, &HELD).unwrap_or_default();
        let visit = Visit { request_id, arrived, held, queue_deadline, adapter, _admission: admission };
        Ok(Self { state: state.clone(), visit, fields: Fields(fields) })
    }
}

/// The deployment's limit, or what the agent says is left of it.
fn queue_timeout(state: &ApiState, headers: &HeaderMap) -> Duration {
    milliseconds(headers, &QUEUE_BUDGET).map_or(state.queue_timeout(), |left| left.min(state.queue_timeout()))
}

fn milliseconds(headers: &HeaderMap, name: &HeaderName) -> Option<Duration> {
    headers.get(name).and_then(|value| value.to_str().ok()?.parse().ok()).map(Duration::from_millis)
}
