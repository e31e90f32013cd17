//! Accepting connections: a bounded number of them, with time-outs, and an end.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::handlers::{self, Door, Visit};
use super::shared::Shared;

/// Connections beyond the limit that are told so, and may ask for health and metrics: a probe must not fail because
/// clients hold all connections.
const RESERVE: usize = 64;

/// Bytes of a request's head.
const HEAD_LIMIT: usize = 64 << 10;

/// Accepts until `stop`, then lets connections end, at the latest when `kill` comes.
pub(super) async fn run(
    listener: TcpListener,
    shared: Arc<Shared>,
    door: Door,
    stop: CancellationToken,
    kill: CancellationToken,
) {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, most likely: others have to be closed first.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let before = open.fetch_add(1, Ordering::AcqRel);
        let held = Held { open: Arc::clone(&open), shared: Arc::clone(&shared) };
        shared.metrics.connections().inc();
        if before >= shared.limits.connections + RESERVE {
            drop((stream, held));
            continue;
        }
        let is_overflow = before >= shared.limits.connections;
        let connection = serve(stream, Arc::clone(&shared), door.clone(), is_overflow, stop.clone(), kill.clone());
        shared.tasks.spawn(async move {
            connection.await;
            drop(held);
        });
    }
}

/// Counts a connection until it is dropped.
struct Held {
    open: Arc<AtomicUsize>,
    shared: Arc<Shared>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::AcqRel);
        self.shared.metrics.connections().dec();
    }
}

async fn serve(
    stream: TcpStream,
    shared: Arc<Shared>,
    door: Door,
    is_overflow: bool,
    stop: CancellationToken,
    kill: CancellationToken,
) {
    // Each token is to leave at once. A socket that refuses is closed already.
    let _ = stream.set_nodelay(true);
    let abort = CancellationToken::new();
    let head_timeout = shared.limits.head_timeout;
    let service = {
        let abort = abort.clone();
        service_fn(move |request: hyper::Request<Incoming>| {
            let visit = Visit { door: door.clone(), is_overflow, abort: abort.clone() };
            let shared = Arc::clone(&shared);
            async move { Ok::<_, Infallible>(handlers::handle(shared, visit, request).await) }
        })
    };
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .max_buf_size(HEAD_LIMIT)
        .keep_alive(!is_overflow)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let mut is_stopping = false;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection ended early");
                }
                return;
            }
            () = stop.cancelled(), if !is_stopping => {
                is_stopping = true;
                connection.as_mut().graceful_shutdown();
            }
            () = kill.cancelled() => return,
            () = abort.cancelled() => return,
        }
    }
}
