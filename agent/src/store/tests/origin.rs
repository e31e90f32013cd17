//! An HTTP server that serves one file, and breaks in the ways servers do.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Response, StatusCode, header};
use bytes::Bytes;
use rustls::pki_types::PrivateKeyDer;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// How one request goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// The connection ends after so many bytes of the body.
    CutAfter(usize),
    /// The body stops after so many bytes and the connection stays.
    StallAfter(usize),
    /// Another status, without the file.
    Status(u16),
    /// A redirect.
    RedirectTo(String),
    /// 206, but for other bytes than asked for.
    WrongRange,
}

/// A request as it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) method: String,
    pub(super) range: Option<String>,
    pub(super) if_range: Option<String>,
}

#[derive(Debug, Default)]
struct Script {
    body: Bytes,
    etag: Option<String>,
    /// One per request to come; after them all goes well.
    faults: VecDeque<Fault>,
    /// Leave the length out.
    is_chunked: bool,
    /// Time between pieces of 16 KiB.
    pace: Duration,
    seen: Vec<Seen>,
    bytes_sent: usize,
}

/// The server; it ends with this value.
pub(super) struct Origin {
    script: Arc<Mutex<Script>>,
    scheme: &'static str,
    pub(super) port: u16,
    task: JoinHandle<()>,
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Origin {
    pub(super) async fn serving(body: Vec<u8>) -> Self {
        Self::start(body, None).await
    }

    /// Over TLS, with a certificate for 127.0.0.1 by an authority of its own, whose PEM comes with it.
    pub(super) async fn serving_tls(body: Vec<u8>) -> (Self, String) {
        let certified = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate");
        let key = PrivateKeyDer::try_from(certified.signing_key.serialize_der()).expect("a key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![certified.cert.der().clone()], key)
            .expect("a server");
        (Self::start(body, Some(TlsAcceptor::from(Arc::new(config)))).await, certified.cert.pem())
    }

    async fn start(body: Vec<u8>, tls: Option<TlsAcceptor>) -> Self {
        let script = Script { body: body.into(), etag: Some("\"one\"".to_owned()), ..Script::default() };
        let script = Arc::new(Mutex::new(script));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let router = Router::new().fallback(answer).with_state(Arc::clone(&script));
        let scheme = if tls.is_some() { "https" } else { "http" };
        let task = tokio::spawn(async move {
            let _ = match tls {
                Some(acceptor) => axum::serve(TlsListener { listener, acceptor }, router).await,
                None => axum::serve(listener, router).await,
            };
        });
        Self { script, scheme, port, task }
    }

    pub(super) fn url(&self) -> String {
        format!("{}://127.0.0.1:{}/models/m.gguf", self.scheme, self.port)
    }

    fn change(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script.lock().expect("lock"));
    }

    pub(super) fn replace(&self, body: Vec<u8>, etag: Option<&str>) {
        self.change(|script| {
            script.body = body.into();
            script.etag = etag.map(str::to_owned);
        });
    }

    pub(super) fn fail(&self, faults: impl IntoIterator<Item = Fault>) {
        self.change(|script| script.faults.extend(faults));
    }

    pub(super) fn leave_length_out(&self) {
        self.change(|script| script.is_chunked = true);
    }

    pub(super) fn pace(&self, pace: Duration) {
        self.change(|script| script.pace = pace);
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.script.lock().expect("lock").seen.clone()
    }

    pub(super) fn gets(&self) -> usize {
        self.seen().iter().filter(|seen| seen.method == "GET").count()
    }

    pub(super) fn bytes_sent(&self) -> usize {
        self.script.lock().expect("lock").bytes_sent
    }
}

struct TlsListener {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl axum::serve::Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            // A client that does not trust the certificate hangs up; the next one is served.
            if let Ok((stream, address)) = self.listener.accept().await
                && let Ok(stream) = self.acceptor.accept(stream).await
            {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

async fn answer(State(state): State<Arc<Mutex<Script>>>, request: Request) -> Response<Body> {
    let text = |name| request.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let (range, if_range) = (text(header::RANGE), text(header::IF_RANGE));
    let (body, etag, fault, is_chunked, pace) = {
        let mut script = state.lock().expect("lock");
        script.seen.push(Seen {
            method: request.method().to_string(),
            range: range.clone(),
            if_range: if_range.clone(),
        });
        let fault = script.faults.pop_front();
        (script.body.clone(), script.etag.clone(), fault, script.is_chunked, script.pace)
    };
    let mut headers = HeaderMap::new();
    if let Some(etag) = &etag {
        headers.insert(header::ETAG, etag.parse().expect("a header"));
    }
    let status = match &fault {
        Some(Fault::Status(status)) => Some(StatusCode::from_u16(*status).expect("a status")),
        Some(Fault::RedirectTo(url)) => {
            headers.insert(header::LOCATION, url.parse().expect("a header"));
            Some(StatusCode::FOUND)
        }
        _ => (etag.is_some() && text(header::IF_NONE_MATCH) == etag).then_some(StatusCode::NOT_MODIFIED),
    };
    if let Some(status) = status {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        return response;
    }
    // As servers do: the range holds only if the file is still the same.
    let mut start = 0;
    let mut status = StatusCode::OK;
    if let Some(asked) = range.as_deref().and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok())
        && (if_range.is_none() || if_range == etag)
    {
        if asked >= body.len() {
            status = StatusCode::RANGE_NOT_SATISFIABLE;
            start = body.len();
        } else {
            let told = if fault == Some(Fault::WrongRange) { asked + 1 } else { asked };
            let value = format!("bytes {told}-{}/{}", body.len() - 1, body.len());
            headers.insert(header::CONTENT_RANGE, value.parse().expect("a header"));
            status = StatusCode::PARTIAL_CONTENT;
            start = asked;
        }
    }
    let body = body.slice(start..);
    if !is_chunked {
        headers.insert(header::CONTENT_LENGTH, body.len().into());
    }
    let pieces = pieces(state, body, fault, pace);
    let mut response = Response::new(Body::from_stream(pieces));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// The body in pieces, until it ends or the fault comes.
fn pieces(
    state: Arc<Mutex<Script>>,
    body: Bytes,
    fault: Option<Fault>,
    pace: Duration,
) -> impl futures::Stream<Item = std::io::Result<Bytes>> {
    futures::stream::unfold(0usize, move |at| {
        let (state, body, fault) = (Arc::clone(&state), body.clone(), fault.clone());
        async move {
            tokio::time::sleep(pace).await;
            let end = match fault {
                Some(Fault::CutAfter(limit) | Fault::StallAfter(limit)) => limit.min(body.len()),
                _ => body.len(),
            };
            if at >= end {
                return match fault {
                    Some(Fault::CutAfter(_)) => {
                        // Let what was sent arrive first.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        Some((Err(std::io::ErrorKind::ConnectionReset.into()), usize::MAX))
                    }
                    Some(Fault::StallAfter(_)) => std::future::pending().await,
                    _ => None,
                };
            }
            let next = (at + (16 << 10)).min(end);
            state.lock().expect("lock").bytes_sent += next - at;
            Some((Ok(body.slice(at..next)), next))
        }
    })
}
