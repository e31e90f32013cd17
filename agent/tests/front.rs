//! The agent's listeners in front of a worker's transport: an HTTP server on a Unix socket that does what each test
//! needs a worker to do on the wire. What a worker answers is tested with the engine, in `api.rs`.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::future::Future;
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

const PATIENCE: Duration = Duration::from_secs(20);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} did not happen within {PATIENCE:?}"))
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    within(what, async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

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
        assert!((50_000..=60_000).contains(&budget), "what is left of queueTimeoutSeconds: {budget}");
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

#[tokio::test]
async fn a_request_wakes_an_unloaded_model_once_and_is_held() {
    let mut node = Node::start(|_| ()).await;
    let mut wakes = std::mem::replace(&mut node.wakes, mpsc::channel(1).1);
    let url = node.model("toy", |_| ()).await;
    node.front.route("toy", Route::Unloaded);
    let body = json!({});
    let asks = futures::future::join_all((0..3).map(|_| node.ask(&url, &body)));
    let wake = async {
        assert_eq!(wakes.recv().await.unwrap(), "toy");
        until("three requests wait", || node.activity("toy") == (0, 3)).await;
        node.front.route("toy", Route::Loading);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(wakes.try_recv().is_err(), "one wake for all");
        node.worker("toy", chat(|_| "{\"ok\": true}".into_response()))
    };
    let (responses, _worker) = within("three answers", futures::future::join(asks, wake)).await;
    for response in responses {
        assert_eq!(response.status(), 200);
        assert_eq!(response.text().await.unwrap(), "{\"ok\": true}");
    }
    until("no request is left", || node.activity("toy") == (0, 0)).await;
}

#[tokio::test]
async fn the_queue_is_bounded_in_number_and_time() {
    let node = Node::start(|_| ()).await;
    let url = node
        .model("toy", |traffic| {
            traffic.max_queued = 2;
            traffic.queue_timeout_seconds = 1;
        })
        .await;
    node.front.route("toy", Route::Unloaded);
    let started = Instant::now();
    let (body, stream) = (json!({}), json!({"stream": true}));
    let waiting = futures::future::join(node.ask(&url, &body), node.ask(&url, &stream));
    let third = async {
        until("two requests wait", || node.activity("toy") == (0, 2)).await;
        node.ask(&url, &body).await
    };
    let ((first, second), third) = within("three answers", futures::future::join(waiting, third)).await;
    assert!(started.elapsed() >= Duration::from_secs(1));
    assert!(third.headers().contains_key("retry-after"));
    error(third, 429, "queue_full").await;
    for response in [first, second] {
        assert!(response.headers().contains_key("retry-after"));
        error(response, 503, "queue_timeout").await;
    }
}

#[tokio::test]
async fn a_held_stream_pings_and_then_streams() {
    let node = Node::start(|config| config.limits.ping_interval = Duration::from_millis(30)).await;
    let url = node.model("toy", |_| ()).await;
    let response = node.ask(&url, &json!({"stream": true})).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    assert_eq!(response.headers()["x-accel-buffering"], "no");
    let mut pieces = response.bytes_stream();
    assert_eq!(within("a ping", pieces.next()).await.unwrap().unwrap(), ": ping\n\n");
    let _worker = node.worker(
        "toy",
        chat(|_| events(futures::stream::iter([Ok(Bytes::from("data: 1\n\n")), Ok(Bytes::from("data: [DONE]\n\n"))]))),
    );
    let rest: Vec<Bytes> = within("the stream", pieces.map(Result::unwrap).collect()).await;
    let text = String::from_utf8(rest.concat()).unwrap().replace(": ping\n\n", "");
    assert_eq!(text, "data: 1\n\ndata: [DONE]\n\n");
}

#[tokio::test]
async fn an_error_after_a_ping_is_an_error_event() {
    let node = Node::start(|config| config.limits.ping_interval = Duration::from_millis(30)).await;
    let url = node.model("toy", |_| ()).await;
    let ask = async || node.ask(&url, &json!({"stream": true})).await;
    let first = ask().await;
    let refuses = r#"{"error":{"message":"too long","type":"invalid_request_error","param":null,"code":"context_length_exceeded"}}"#;
    let _worker = node.worker("toy", chat(move |_| (http::StatusCode::BAD_REQUEST, refuses).into_response()));
    let text = within("the error", first.text()).await.unwrap().replace(": ping\n\n", "");
    assert_eq!(text, format!("event: error\ndata: {refuses}\n\n"));

    node.front.route("toy", Route::Loading);
    let second = ask().await;
    node.front.route("toy", Route::Unavailable { reason: "InsufficientMemory".into(), message: "needs 9 GiB".into() });
    let text = within("the error", second.text()).await.unwrap();
    assert!(text.contains("event: error\ndata: {") && text.contains("InsufficientMemory: needs 9 GiB"), "{text}");
}

/// Each path's errors and signs of life are its API's own, also where no worker has been asked yet.
#[tokio::test]
async fn every_api_is_held_and_refused_in_its_own_words() {
    let node = Node::start(|config| config.limits.ping_interval = Duration::from_millis(30)).await;
    node.front.set_ready(Ok(()));
    let url = node.model("toy", |_| ()).await;
    let ask =
        async |path: &str, body: Value| node.client.post(format!("{url}{path}")).json(&body).send().await.unwrap();
    let unknown = ask("/v1/messages", json!({"model": "claude"})).await;
    assert_eq!(unknown.status(), 404);
    assert_eq!(unknown.headers()["request-id"], unknown.headers()["x-request-id"]);
    let unknown: Value = unknown.json().await.unwrap();
    assert_eq!((&unknown["type"], &unknown["error"]["type"]), (&json!("error"), &json!("not_found_error")));
    for (path, ping, refusal) in [
        ("/v1/messages", "event: ping\ndata: {\"type\": \"ping\"}\n\n", "\"type\":\"overloaded_error\""),
        ("/v1/responses", ": ping\n\n", "\"code\":\"model_unavailable\""),
    ] {
        node.front.route("toy", Route::Loading);
        let held = ask(path, json!({"stream": true})).await;
        assert_eq!(
            (held.status().as_u16(), &held.headers()["content-type"]),
            (200, &"text/event-stream".parse().unwrap())
        );
        let mut pieces = held.bytes_stream();
        assert_eq!(within("a ping", pieces.next()).await.unwrap().unwrap(), ping);
        node.front
            .route("toy", Route::Unavailable { reason: "InsufficientMemory".into(), message: "needs 9 GiB".into() });
        let rest: Vec<Bytes> = within("the end", pieces.map(Result::unwrap).collect()).await;
        let text = String::from_utf8(rest.concat()).unwrap().replace(ping, "");
        assert!(text.starts_with("event: error\ndata: {") && text.contains(r#""type":"error""#), "{path}: {text}");
        assert!(text.contains(refusal) && text.contains("needs 9 GiB"), "{path}: {text}");
    }
}

#[tokio::test]
async fn tokens_are_passed_on_as_they_come() {
    let node = Node::start(|_| ()).await;
    let url = node.model("toy", |_| ()).await;
    let (sender, receiver) = mpsc::channel::<Result<Bytes, std::io::Error>>(1);
    let receiver = Arc::new(std::sync::Mutex::new(Some(receiver)));
    let worker =
        chat(move |_| events(tokio_stream::wrappers::ReceiverStream::new(receiver.lock().unwrap().take().unwrap())));
    let _worker = node.worker("toy", worker);
    let mut pieces = node.ask(&url, &json!({"stream": true})).await.bytes_stream();
    for turn in 0..20 {
        let event = format!("data: {turn}\n\n");
        sender.send(Ok(event.clone().into())).await.unwrap();
        assert_eq!(within("the token", pieces.next()).await.unwrap().unwrap(), event);
        assert_eq!(node.activity("toy"), (1, 0));
    }
    drop(sender);
    assert!(within("the end", pieces.next()).await.is_none());
    until("the request has ended", || node.activity("toy") == (0, 0)).await;
}

/// Says when it is dropped.
struct Dropped(mpsc::Sender<()>);

impl Drop for Dropped {
    fn drop(&mut self) {
        let _ = self.0.try_send(());
    }
}

#[tokio::test]
async fn a_client_that_goes_away_is_noticed_by_the_worker() {
    let node = Node::start(|_| ()).await;
    let url = node.model("toy", |_| ()).await;
    let (sender, mut dropped) = mpsc::channel(8);
    let (arrived_sender, mut arrived) = mpsc::channel(8);
    let answer = move |request: Request| {
        let guard = Dropped(sender.clone());
        let arrived = arrived_sender.clone();
        async move {
            let body = axum::body::to_bytes(request.into_body(), 1000).await.unwrap();
            let _ = arrived.try_send(());
            if body.starts_with(b"{\"stream\":true") {
                let first = futures::stream::iter([Ok(Bytes::from("data: 1\n\n"))]);
                return events(first.chain(futures::stream::pending()).inspect(move |_| {
                    let _held = &guard;
                }));
            }
            futures::future::pending::<()>().await;
            drop(guard);
            "".into_response()
        }
    };
    let _worker = node.worker("toy", Router::new().route("/v1/chat/completions", post(answer)));
    for stream in [true, false] {
        let body = json!({"stream": stream});
        let ask = node.ask(&url, &body);
        if stream {
            let mut pieces = ask.await.bytes_stream();
            within("the first event", pieces.next()).await.unwrap().unwrap();
            arrived.recv().await.unwrap();
        } else {
            tokio::select! {
                _ = ask => panic!("an answer to a request that is never answered"),
                seen = within("the request's arrival", arrived.recv()) => seen.unwrap(),
            }
        }
        within("the worker notices", dropped.recv()).await.unwrap();
        until("the request has ended", || node.activity("toy") == (0, 0)).await;
    }
}

#[tokio::test]
async fn a_worker_that_dies_in_mid_stream_ends_it_with_an_error_event() {
    let node = Node::start(|_| ()).await;
    let url = node.model("toy", |_| ()).await;
    let half = || {
        let pieces = [Ok(Bytes::from("data: 1\n\n")), Ok(Bytes::from("data: {\"half"))];
        events(futures::stream::iter(pieces).chain(futures::stream::pending()))
    };
    let mut worker = node.worker("toy", chat(move |_| half()));
    let mut pieces = node.ask(&url, &json!({"stream": true})).await.bytes_stream();
    assert_eq!(within("the first event", pieces.next()).await.unwrap().unwrap(), "data: 1\n\n");
    worker.kill();
    let rest: Vec<Bytes> = within("the end", pieces.map(Result::unwrap).collect()).await;
    let text = String::from_utf8(rest.concat()).unwrap();
    assert!(text.starts_with("event: error\ndata: {\"error\":{"), "no half event before the error: {text}");
    assert!(text.contains("\"code\":\"worker_exited\"") && text.ends_with("}\n\n"), "{text}");
}

#[tokio::test]
async fn a_request_that_no_byte_answered_is_sent_again_once() {
    let node = Node::start(|_| ()).await;
    let url = node.model("toy", |_| ()).await;
    let asked = Arc::new(AtomicU32::new(0));
    let silent = |asked: Arc<AtomicU32>| {
        let answer = move |request: Request| {
            let asked = asked.clone();
            async move {
                axum::body::to_bytes(request.into_body(), 1000).await.unwrap();
                asked.fetch_add(1, Ordering::SeqCst);
                futures::future::pending::<Response>().await
            }
        };
        Router::new().route("/v1/chat/completions", post(answer))
    };
    let body = json!({"n": 1});
    for is_answered in [true, false] {
        asked.store(0, Ordering::SeqCst);
        let mut first = node.worker("toy", silent(asked.clone()));
        let ask = node.ask(&url, &body);
        let restart = async {
            until("the first worker has the request", || asked.load(Ordering::SeqCst) == 1).await;
            first.kill();
            until("the request waits", || node.activity("toy") == (0, 1)).await;
            node.front.route("toy", Route::Loading);
            if is_answered {
                return node.worker("toy", chat(|_| "again".into_response()));
            }
            let mut second = node.worker("toy", silent(asked.clone()));
            until("the second worker has the request", || asked.load(Ordering::SeqCst) == 2).await;
            second.kill();
            second
        };
        let (response, _second) = within("the answer", futures::future::join(ask, restart)).await;
        if is_answered {
            assert_eq!(response.text().await.unwrap(), "again");
        } else {
            node.front.route("toy", Route::Loading);
            error(response, 502, "worker_exited").await;
        }
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

#[tokio::test]
async fn ports_are_stable_and_withdrawing_waits_for_requests() {
    let node = Node::start(|_| ()).await;
    let url = node.model("toy", |_| ()).await;
    assert_eq!(node.model("toy", |traffic| traffic.max_queued = 1).await, url, "idempotent");
    let (sender, receiver) = mpsc::channel::<Result<Bytes, std::io::Error>>(1);
    let receiver = Arc::new(std::sync::Mutex::new(Some(receiver)));
    let _worker = node.worker(
        "toy",
        chat(move |_| events(tokio_stream::wrappers::ReceiverStream::new(receiver.lock().unwrap().take().unwrap()))),
    );
    sender.send(Ok("data: 1\n\n".into())).await.unwrap();
    let mut pieces = node.ask(&url, &json!({"stream": true})).await.bytes_stream();
    within("the first event", pieces.next()).await.unwrap().unwrap();

    let withdraw = node.front.withdraw("toy", PATIENCE);
    let end = async {
        until("new requests are sent away", || node.activity("toy") == (1, 0)).await;
        error(node.ask(&url, &json!({})).await, 503, "model_draining").await;
        sender.send(Ok("data: [DONE]\n\n".into())).await.unwrap();
        drop(sender);
        let rest: Vec<Bytes> = within("the rest", pieces.map(Result::unwrap).collect()).await;
        assert_eq!(rest.concat(), b"data: [DONE]\n\n");
    };
    within("the withdrawal", futures::future::join(withdraw, end)).await;
    assert!(node.front.activity("toy").is_none());
    within("the port is closed", async {
        while node.client.get(format!("{url}/health")).send().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(node.model("toy", |_| ()).await, url, "a model that comes back gets its port back");
}

#[tokio::test]
async fn the_shared_port_lists_answers_probes_and_asks_for_its_token() {
    let node = Node::start(|config| config.token = Some("s3cret".into())).await;
    node.model("toy", |_| ()).await;
    node.model("other", |_| ()).await;
    node.front.route("other", Route::Unloaded);
    let get = |path: &str, token: Option<&str>| {
        let request = node.client.get(node.shared(path));
        match token {
            Some(token) => request.bearer_auth(token).send(),
            None => request.send(),
        }
    };
    for wrong in [None, Some("wrong"), Some("")] {
        let response = get("/v1/models", wrong).await.unwrap();
        assert_eq!(response.headers()["www-authenticate"], "Bearer");
        error(response, 401, "invalid_api_key").await;
    }
    let with_key = node.client.get(node.shared("/v1/models")).header("x-api-key", "s3cret");
    assert_eq!(with_key.send().await.unwrap().status(), 200, "where Anthropic's clients put it");
    let models: Value = get("/v1/models", Some("s3cret")).await.unwrap().json().await.unwrap();
    let listed: Vec<_> = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| (&model["id"], &model["root"], &model["state"]))
        .collect();
    assert_eq!(
        format!("{listed:?}"),
        r#"[(String("other-served"), String("ml/other"), String("Unloaded")), (String("toy-served"), String("ml/toy"), String("Loading"))]"#
    );
    let one: Value = get("/v1/models/ml/toy", Some("s3cret")).await.unwrap().json().await.unwrap();
    assert_eq!(one["id"], "toy-served");
    // Not yet "does not exist": it may come.
    let not_yet = get("/v1/models/nope", Some("s3cret")).await.unwrap();
    assert_eq!(not_yet.headers()["retry-after"], "1");
    error(not_yet, 503, "not_ready").await;

    assert_eq!(get("/healthz", None).await.unwrap().status(), 200);
    let unready = get("/readyz", None).await.unwrap();
    assert_eq!(unready.status(), 503);
    assert_eq!(unready.text().await.unwrap(), "the agent is starting\n");
    node.front.set_ready(Ok(()));
    assert_eq!(get("/readyz", None).await.unwrap().status(), 200);
    error(get("/v1/models/nope", Some("s3cret")).await.unwrap(), 404, "model_not_found").await;
}

#[tokio::test]
async fn metrics_of_agent_and_workers_are_one_exposition() {
    let node = Node::start(|config| config.limits.scrape_timeout = Duration::from_millis(300)).await;
    let family = |name: &str| {
        format!(
            "# HELP altiplano_x_total Xs.\n# TYPE altiplano_x_total counter\naltiplano_x_total{{model_name=\"{name}\"}} 1\n"
        )
    };
    let mut workers = Vec::new();
    for name in ["a", "b"] {
        node.model(name, |_| ()).await;
        let text = family(name);
        workers.push(node.worker(name, Router::new().route("/metrics", get(move || async move { text }))));
    }
    node.model("hangs", |_| ()).await;
    let hangs = || async { futures::future::pending::<()>().await };
    workers.push(node.worker("hangs", Router::new().route("/metrics", get(hangs))));
    let started = Instant::now();
    let response = node.client.get(node.shared("/metrics")).send().await.unwrap();
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/plain"));
    let text = response.text().await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(5), "one worker that hangs does not hold up the others");
    let xs = "# HELP altiplano_x_total Xs.\n# TYPE altiplano_x_total counter\naltiplano_x_total{model_name=\"a\"} 1\naltiplano_x_total{model_name=\"b\"} 1\n";
    assert!(text.contains(xs), "{text}");
    assert!(text.contains("altiplano_worker_scrape_failures_total 1\n"), "{text}");
    for line in text.lines().filter(|line| line.starts_with("# TYPE")) {
        assert_eq!(text.matches(&format!("{line}\n")).count(), 1, "{line}");
    }
}

#[tokio::test]
async fn a_full_listener_still_answers_probes() {
    let node = Node::start(|config| config.limits.connections = 2).await;
    let open = || tokio::net::TcpStream::connect(node.front.address());
    let held = [open().await.unwrap(), open().await.unwrap()];
    let refused = within("an answer", async {
        loop {
            let response = node.client.get(node.shared("/v1/models")).send().await.unwrap();
            if response.status() != 200 {
                return response;
            }
            // The two are connected, but perhaps not accepted yet; the kept connection must not be taken again.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(refused.headers()["connection"], "close");
    error(refused, 503, "too_many_connections").await;
    assert_eq!(node.client.get(node.shared("/healthz")).send().await.unwrap().status(), 200);
    drop(held);
    within("the others are gone", async {
        while node.client.get(node.shared("/v1/models")).send().await.unwrap().status() != 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn shutting_down_lets_requests_end_and_then_ends_them() {
    for ends_by_itself in [true, false] {
        let node = Node::start(|_| ()).await;
        let url = node.model("toy", |_| ()).await;
        let (sender, receiver) = mpsc::channel::<Result<Bytes, std::io::Error>>(1);
        let receiver = Arc::new(std::sync::Mutex::new(Some(receiver)));
        let _worker = node.worker(
            "toy",
            chat(move |_| {
                events(tokio_stream::wrappers::ReceiverStream::new(receiver.lock().unwrap().take().unwrap()))
            }),
        );
        sender.send(Ok("data: 1\n\n".into())).await.unwrap();
        let mut pieces = node.ask(&url, &json!({"stream": true})).await.bytes_stream();
        within("the first event", pieces.next()).await.unwrap().unwrap();
        let grace = if ends_by_itself { PATIENCE } else { Duration::from_millis(50) };
        let shutdown = node.front.shutdown(grace);
        let client = async {
            if ends_by_itself {
                sender.send(Ok("data: [DONE]\n\n".into())).await.unwrap();
                drop(sender);
                assert_eq!(within("the end", pieces.next()).await.unwrap().unwrap(), "data: [DONE]\n\n");
                assert!(within("the end", pieces.next()).await.is_none());
            } else {
                assert!(within("the end", pieces.next()).await.unwrap().is_err(), "cut off");
            }
        };
        within("the shutdown", futures::future::join(shutdown, client)).await;
        assert!(node.client.get(node.shared("/healthz")).send().await.is_err(), "closed");
    }
}
