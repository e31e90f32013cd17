//! Requests that wait until a worker is there.

use super::*;

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
        until("three requests wait", || node.activity("toy"), |seen| *seen == (0, 3)).await;
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
    until("no request is left", || node.activity("toy"), |seen| *seen == (0, 0)).await;
}

#[tokio::test]
async fn the_queue_is_bounded_in_number_and_time() {
    // Nobody sees a sign of life before the end of the wait, however late that is noticed.
    let node = Node::start(|config| config.limits.ping_interval = PATIENCE).await;
    let full = node.model("toy", |traffic| traffic.max_queued = 2).await;
    let short = node.model("short", |traffic| traffic.queue_timeout_seconds = 1).await;
    node.front.route("toy", Route::Unloaded);
    node.front.route("short", Route::Unloaded);
    let (body, stream) = (json!({}), json!({"stream": true}));
    let waiting = futures::future::join(node.ask(&full, &body), node.ask(&full, &stream));
    let third = async {
        until("two requests wait", || node.activity("toy"), |seen| *seen == (0, 2)).await;
        let third = node.ask(&full, &body).await;
        node.front.route("toy", Route::Draining);
        third
    };
    let ((first, second), third) = within("three answers", futures::future::join(waiting, third)).await;
    assert!(third.headers().contains_key("retry-after"));
    error(third, 429, "queue_full").await;
    for response in [first, second] {
        error(response, 503, "model_draining").await;
    }

    let started = Instant::now();
    let waiting = futures::future::join(node.ask(&short, &body), node.ask(&short, &stream));
    let (first, second) = within("two answers", waiting).await;
    assert!(started.elapsed() >= Duration::from_secs(1));
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
