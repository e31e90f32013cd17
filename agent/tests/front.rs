//! The agent's listeners in front of a worker's transport: an HTTP server on a Unix socket that does what each test
//! needs a worker to do on the wire. What a worker answers is tested with the engine, in `api.rs`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "front/held.rs"]
mod held;
#[path = "front/listeners.rs"]
mod listeners;
#[path = "front/streams.rs"]
mod streams;
#[path = "support/wait.rs"]
mod wait;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use altiplano_agent::front::{Activity, Front, FrontConfig, FrontLimits, PublishedModel, Route};
use altiplano_agent::metrics::AgentMetrics;
use altiplano_crds::model_deployment::TrafficSpec;
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::mpsc;

use wait::{PATIENCE, until, within};

/// An HTTP server on a Unix socket, stopped when dropped: like a process that is killed, its connections break.
struct Worker {
    socket: PathBuf,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Worker {
    fn start(socket: &Path, router: Router) -> Self {
        let _ = std::fs::remove_file(socket);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = {
            let _context = runtime.enter();
            UnixListener::bind(socket).unwrap()
        };
        runtime.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { socket: socket.to_owned(), runtime: Some(runtime) }
    }

    fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Node {
    front: Front,
    client: reqwest::Client,
    folder: tempfile::TempDir,
    wakes: mpsc::Receiver<String>,
}

impl Node {
    async fn start(change: impl FnOnce(&mut FrontConfig)) -> Self {
        let loopback = Ipv4Addr::LOCALHOST.into();
        let mut config = FrontConfig {
            listen: SocketAddr::new(loopback, 0),
            model_ip: loopback,
            model_ports: None,
            token: None,
            metrics: Arc::new(AgentMetrics::new("test").unwrap()),
            limits: FrontLimits::default(),
        };
        change(&mut config);
        let front = Front::bind(config).await.unwrap();
        let wakes = front.wakes().unwrap();
        assert!(front.wakes().is_none(), "one owner");
        // reqwest asks for a provider even where no TLS is spoken; one that is there already is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().timeout(PATIENCE).no_proxy().build().unwrap();
        Self { front, client, folder: tempfile::tempdir().unwrap(), wakes }
    }

    /// A model that is published, with the URL of its own port.
    async fn model(&self, name: &str, change: impl FnOnce(&mut TrafficSpec)) -> String {
        let mut traffic = TrafficSpec::default();
        change(&mut traffic);
        let port = self.front.publish(published(name, traffic)).await.unwrap();
        format!("http://127.0.0.1:{port}")
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.sock"))
    }

    fn worker(&self, name: &str, router: Router) -> Worker {
        let worker = Worker::start(&self.socket(name), router);
        self.front.route(name, Route::Ready { socket: worker.socket.clone() });
        worker
    }

    fn shared(&self, path: &str) -> String {
        format!("http://{}{path}", self.front.address())
    }

    async fn ask(&self, url: &str, body: &Value) -> reqwest::Response {
        self.client.post(format!("{url}/v1/chat/completions")).json(body).send().await.unwrap()
    }

    fn activity(&self, name: &str) -> (u32, u32) {
        let Activity { running, waiting, .. } = self.front.activity(name).unwrap();
        (running, waiting)
    }
}

fn published(name: &str, traffic: TrafficSpec) -> PublishedModel {
    let own = str::to_owned;
    PublishedModel {
        uid: own(name),
        namespace: own("ml"),
        name: own(name),
        served_name: format!("{name}-served"),
        adapters: Vec::new(),
        traffic,
    }
}

async fn error(response: reqwest::Response, status: u16, code: &str) -> Value {
    assert_eq!(response.status(), status);
    assert_eq!(response.headers()["content-type"], "application/json");
    assert!(response.headers().contains_key("x-request-id"));
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["error"]["code"], code, "{body}");
    assert!(body["error"]["message"].as_str().is_some_and(|message| !message.is_empty()));
    assert!(body["error"]["type"].is_string());
    body
}

fn events(stream: impl futures::Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static) -> Response {
    ([("content-type", "text/event-stream")], Body::from_stream(stream)).into_response()
}

fn chat(handler: impl Fn(Request) -> Response + Clone + Send + Sync + 'static) -> Router {
    let answer = move |request: Request| {
        let response = handler(request);
        async move { response }
    };
    Router::new().route("/v1/chat/completions", post(answer))
}

#[tokio::test]
async fn bytes_and_headers_pass_unchanged() {
    let node = Node::start(|_| ()).await;
    let url = node.model("toy", |_| ()).await;
    let echo = |request: Request| async move {
        let (parts, body) = request.into_parts();
        let headers: Vec<String> =
            parts.headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        let mut response = Response::new(body);
        response.headers_mut().insert("x-saw", headers.join("; ").parse().unwrap());
        response
    };
    let _worker = node.worker("toy", Router::new().route("/v1/completions", post(echo)));
    let body = "{ \"prompt\" :\t\"Ünï\",\"model\": \"ml/toy\" , \"extra\": 1e3 }";
    for (base, authorization) in [(url.clone(), None), (node.shared(""), Some("Bearer not-for-workers"))] {
        let mut request = node
            .client
            .post(format!("{base}/v1/completions"))
            .header("content-type", "application/json")
            .header("x-request-id", "mine-1")
            .header("connection", "x-private")
            .header("x-private", "1")
            .header("x-altiplano-queue-budget-ms", "1")
            .body(body);
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["x-request-id"], "mine-1");
        let saw = response.headers()["x-saw"].to_str().unwrap().to_owned();
        assert!(saw.contains("x-request-id: mine-1") && saw.contains("content-type: application/json"), "{saw}");
        assert!(!saw.contains("private") && !saw.contains("authorization"), "{saw}");
        let budget = saw.split("budget-ms: ").nth(1).unwrap().split(';').next().unwrap().parse::<u64>().unwrap();
        assert!((20_000..=60_000).contains(&budget), "what is left of queueTimeoutSeconds: {budget}");
        assert_eq!(response.text().await.unwrap(), body);
    }
}

#[tokio::test]
async fn what_is_wrong_is_said_before_a_worker_is_asked() {
    let mut node = Node::start(|config| config.limits.body_limit = 1000).await;
    node.front.set_ready(Ok(()));
    let url = node.model("toy", |_| ()).await;
    let other = node.model("other", |_| ()).await;
    node.front.route("toy", Route::Unloaded);
    let post = |url: &str, content_type: &'static str, body: String| {
        node.client.post(url).header("content-type", content_type).body(body).send()
    };
    let chat = format!("{url}/v1/chat/completions");
    let shared = node.shared("/v1/chat/completions");
    let json = "application/json";
    let cases = [
        (&chat, json, "{\"model\": ".to_owned(), 400, None),
        (&chat, "text/plain", "{}".to_owned(), 415, Some("unsupported_media_type")),
        (&chat, json, format!("{{\"x\": \"{}\"}}", "x".repeat(1000)), 413, Some("body_too_large")),
        (&chat, json, r#"{"model": "gpt-4"}"#.to_owned(), 404, Some("model_not_found")),
        (&chat, json, r#"{"model": 5}"#.to_owned(), 400, Some("invalid_value")),
        (&shared, json, "{}".to_owned(), 400, Some("missing_required_parameter")),
        (&shared, json, r#"{"model": "nope"}"#.to_owned(), 404, Some("model_not_found")),
    ];
    for (url, content_type, body, status, code) in cases {
        let response = post(url, content_type, body.clone()).await.unwrap();
        assert_eq!(response.status(), status, "{body:.60}");
        let body: Value = response.json().await.unwrap();
        assert_eq!(body["error"]["code"].as_str(), code, "{body}");
    }
    // A body without a length is bounded too.
    let chunks = futures::stream::iter((0..20).map(|_| Ok::<_, std::io::Error>(Bytes::from_static(&[b' '; 100]))));
    let endless = node.client.post(&chat).header("content-type", json).body(reqwest::Body::wrap_stream(chunks)).send();
    error(endless.await.unwrap(), 413, "body_too_large").await;

    error(node.client.get(&chat).send().await.unwrap(), 405, "method_not_allowed").await;
    let response = node.client.delete(node.shared("/v1/models")).send().await.unwrap();
    assert_eq!(response.headers()["allow"], "GET, HEAD");
    error(response, 405, "method_not_allowed").await;
    error(node.client.post(format!("{other}/v1/nothing")).send().await.unwrap(), 404, "unknown_url").await;
    assert!(node.wakes.try_recv().is_err(), "none of these wakes a model");
}

/// Says when it is dropped.
struct Dropped(mpsc::Sender<()>);

impl Drop for Dropped {
    fn drop(&mut self) {
        let _ = self.0.try_send(());
    }
}

#[tokio::test]
async fn routes_that_send_away() {
    let node = Node::start(|_| ()).await;
    let url = node.model("toy", |_| ()).await;
    for (route, code, health) in [
        (Route::Draining, "model_draining", 503),
        (Route::Unavailable { reason: "LoadFailed".into(), message: "no such file".into() }, "model_unavailable", 503),
    ] {
        node.front.route("toy", route);
        for body in [json!({}), json!({"stream": true})] {
            let response = node.ask(&url, &body).await;
            assert!(response.headers().contains_key("retry-after"));
            error(response, 503, code).await;
        }
        assert_eq!(node.client.get(format!("{url}/health")).send().await.unwrap().status(), health);
    }
    node.front.route("toy", Route::Unloaded);
    assert_eq!(
        node.client.get(format!("{url}/health")).send().await.unwrap().status(),
        200,
        "a request would be taken"
    );
}
