//! `/metrics`: the agent's own families and those of its workers, merged; on a model's own port its worker's alone.

use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use http::{HeaderMap, Method, header};

use super::relay;
use super::shared::Shared;
use super::table::{Model, Route, Told};
use crate::api::PROCESS_START;
use crate::metrics::Exposition;

/// Bytes of one worker's metrics.
const WORKER_LIMIT: usize = 1 << 20;

/// Workers asked at the same time.
const AT_ONCE: usize = 16;

/// The exposition; a worker that does not answer in time is missing from it, and counted.
pub(super) async fn exposition(shared: &Arc<Shared>) -> String {
    let ready = |model: Arc<Model>| {
        let told = model.told().borrow().clone();
        matches!(told.route, Route::Ready { .. }).then_some(told)
    };
    let workers: Vec<Told> = shared.read(|table| table.sorted().into_iter().filter_map(ready).collect());
    let scrapes = futures::stream::iter(workers).map(|told| worker(shared, told)).buffered(AT_ONCE);
    let texts: Vec<Option<String>> = scrapes.collect().await;

    let mut exposition = Exposition::default();
    for text in texts {
        match text.map(|text| exposition.add(&text)) {
            Some(Ok(())) => {}
            Some(Err(error)) => {
                tracing::warn!(%error, "a worker's metrics cannot be merged");
                shared.metrics.worker_scrape_failed();
            }
            None => shared.metrics.worker_scrape_failed(),
        }
    }
    // Last, so that the failures above are in it.
    match shared.metrics.render() {
        Ok(own) => {
            if let Err(error) = exposition.add(&own) {
                tracing::error!(%error, "the agent's metrics cannot be merged");
            }
        }
        Err(error) => tracing::error!(%error, "the agent's metrics cannot be rendered"),
    }
    exposition.render()
}

/// The metrics of one model's worker, under llama-server's names too. Without a worker there are none.
pub(super) async fn of_model(shared: &Shared, model: &Model) -> Response {
    let told = model.told().borrow().clone();
    let kind = [(header::CONTENT_TYPE, crate::metrics::TEXT_FORMAT)];
    match whole(shared, told, "/metrics?llama_server=1").await {
        Some((headers, text)) => {
            let started = headers.get(PROCESS_START).cloned().map(|started| (PROCESS_START, started));
            let mut response = (kind, text).into_response();
            response.headers_mut().extend(started);
            response
        }
        None => (kind, "# the model is not loaded, or its worker did not answer\n").into_response(),
    }
}

async fn worker(shared: &Shared, told: Told) -> Option<String> {
    String::from_utf8(get(shared, told, "/metrics").await?.into()).ok()
}

/// What the worker says on `path`, if it says it in time. Nobody counts this as a use of the model.
pub(super) async fn get(shared: &Shared, told: Told, path: &str) -> Option<bytes::Bytes> {
    whole(shared, told, path).await.map(|(_, body)| body)
}

/// The same with its headers.
async fn whole(shared: &Shared, told: Told, path: &str) -> Option<(HeaderMap, bytes::Bytes)> {
    let Told { turn, route: Route::Ready { socket } } = told else { return None };
    let scrape = async {
        let sent = shared.upstream.send(&socket, turn, Method::GET, path, HeaderMap::new(), bytes::Bytes::new());
        let response = sent.await.ok().filter(|response| response.status().is_success())?;
        let (parts, body) = response.into_parts();
        Some((parts.headers, relay::whole(body, WORKER_LIMIT).await?))
    };
    tokio::time::timeout(shared.limits.scrape_timeout, scrape).await.ok().flatten()
}
