//! Connections to workers: HTTP over Unix sockets, kept alive between requests.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::UnixStream;

/// Connections that stay open per worker while nobody uses them.
const IDLE_CONNECTIONS: usize = 32;

/// How long they do.
const IDLE_TIMEOUT: Duration = Duration::from_mins(1);

/// A client for all workers of the node; clones share its connections.
#[derive(Clone)]
pub(super) struct Upstream(Client<Connector, Full<Bytes>>);

impl Upstream {
    pub(super) fn new() -> Self {
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(IDLE_CONNECTIONS)
            .set_host(false)
            .build(Connector);
        Self(client)
    }

    /// Sends a request to the worker on `socket`, over a connection made for the same `turn`; the answer's head is back when this returns. Dropping the future or
    /// the answer's body closes the connection, by which the worker knows that nobody waits any more.
    pub(super) async fn send(
        &self,
        socket: &Path,
        turn: u64,
        method: Method,
        path: &str,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = address(socket, turn, path).ok_or(UpstreamError::Address)?;
        *request.headers_mut() = headers;
        request.headers_mut().insert(http::header::HOST, http::HeaderValue::from_static("worker"));
        self.0.request(request).await.map_err(UpstreamError::Request)
    }
}

/// A worker that did not answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpstreamError {
    /// The socket's path or the request's does not fit into an address.
    #[error("the worker has no usable address")]
    Address,
    /// It cannot be reached, or went away before it answered.
    #[error("the worker did not answer")]
    Request(#[source] Error),
}

impl UpstreamError {
    /// Whether the worker cannot have seen the request.
    pub(super) fn is_before_request(&self) -> bool {
        match self {
            Self::Address => true,
            Self::Request(error) => error.is_connect(),
        }
    }
}

/// The pool tells workers apart by host, so the socket's path is the host, in hexadecimal, and the turn after it.
fn address(socket: &Path, turn: u64, path: &str) -> Option<Uri> {
    use std::fmt::Write as _;
    use std::os::unix::ffi::OsStrExt as _;
    let mut host = String::new();
    for byte in socket.as_os_str().as_bytes() {
        write!(host, "{byte:02x}").ok()?;
    }
    write!(host, ".{turn}").ok()?;
    Uri::builder().scheme("http").authority(host).path_and_query(path).build().ok()
}

fn socket_of(uri: &Uri) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStringExt as _;
    let host = uri.host()?.split('.').next()?.as_bytes();
    let digit = |letter: u8| char::from(letter).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let byte = |pair: &[u8]| match pair {
        [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    };
    let bytes: Option<Vec<u8>> = host.chunks(2).map(byte).collect();
    Some(std::ffi::OsString::from_vec(bytes?).into())
}

#[derive(Clone)]
struct Connector;

impl tower::Service<Uri> for Connector {
    type Response = TokioIo<UnixStream>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = std::io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(async move {
            let socket = socket_of(&uri).ok_or_else(|| std::io::Error::other("not an address of a worker"))?;
            Ok(TokioIo::new(UnixStream::connect(socket).await?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sockets_path_survives_as_an_address() {
        for socket in ["/run/altiplano/ab-12.sock", "/tmp/with space/Ünï/%2f@:x.sock"] {
            let uri = address(Path::new(socket), 7, "/v1/models?x=1").unwrap();
            assert_eq!(socket_of(&uri).unwrap(), Path::new(socket));
            assert_eq!(uri.path_and_query().unwrap(), "/v1/models?x=1");
        }
    }
}
