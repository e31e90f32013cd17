//! Ports: who has one, what the shared one says, how they end.

use super::*;

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
        until("new requests are sent away", || node.activity("toy"), |seen| *seen == (1, 0)).await;
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
    let node = Node::start(|config| config.limits.scrape_timeout = Duration::from_secs(3)).await;
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
    // One worker that hangs does not hold up the others.
    let response = within("the metrics", node.client.get(node.shared("/metrics")).send()).await.unwrap();
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/plain"));
    let text = response.text().await.unwrap();
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
