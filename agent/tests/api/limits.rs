//! What is refused, what ends a request before its answer is whole, and who is told.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_fails_ends_in_its_apis_own_words() {
    let node = Node::start_with(|config| {
        long(config);
        // Longer than until the first sign of life.
        config.traffic.request_timeout_seconds = 3;
    })
    .await;
    let forever = json!({"stream": true, "ignore_eos": true});
    let text = async |path: &str, body: Value| {
        let response = node.post(path, &with(body, forever.clone())).await;
        assert_eq!(response.status(), 200);
        response.text().await.unwrap()
    };
    let (a, b) = futures::future::join(
        text(MESSAGES, json!({"max_tokens": 8000, "messages": [{"role": "user", "content": "Sing."}]})),
        text(RESPONSES, json!({"input": "Sing."})),
    )
    .await;
    let end = |text: &str| text.trim_end().rsplit("\n\n").next().unwrap().to_owned();
    let said = end(&a);
    assert!(said.starts_with("event: error\n") && said.contains(r#""type":"timeout_error""#), "{said}");
    assert!(!a.contains("message_stop"));
    let said = end(&b);
    assert!(said.starts_with("event: response.failed\n") && said.contains(r#""status":"failed""#), "{said}");
    assert!(b.contains("event: error\n") && b.contains(r#""code":"request_timeout""#), "{b}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_ends_its_generation() {
    let node = Node::start_with(long).await;
    let forever = forever();
    let streamed = with(forever.clone(), json!({"stream": true}));
    let mut pieces = node.post(CHAT, &streamed).await.bytes_stream();
    for _ in 0..3 {
        within("an event", pieces.next()).await.unwrap().unwrap();
    }
    drop(pieces);
    node.until("the stream's generation is cancelled", |stats| stats.cancelled == 1 && stats.running == 0).await;

    tokio::select! {
        answer = node.post(CHAT, &forever) => panic!("answered before it was given up: {:?}", answer.status()),
        _ = node.until("the generation runs", |stats| stats.running == 1) => {}
    }
    let stats = node.until("the second one too", |stats| stats.cancelled == 2 && stats.running == 0).await;
    assert_eq!((stats.finished_stop, stats.finished_length, stats.failed), (0, 0, 0));
    let activity = || node.front.activity("uid").map(|activity| (activity.running, activity.waiting));
    wait::until("the front has let them go", activity, |activity| *activity == Some((0, 0))).await;
    assert_eq!(node.json(CHAT, &chat(QUESTION)).await["choices"][0]["message"]["content"], ANSWER, "others go on");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_said_in_openais_form() {
    let node = Node::start().await;
    let long = "llama ".repeat(3000);
    let cases = [
        (CHAT, with(chat(QUESTION), json!({"model": "gpt-4"})), 404, "model_not_found", "model"),
        (CHAT, json!({"model": "toy"}), 400, "missing_required_parameter", "messages"),
        (CHAT, with(chat(QUESTION), json!({"temperature": 9})), 400, "invalid_value", "temperature"),
        (
            CHAT,
            with(chat(QUESTION), json!({"tools": [{"type": "function", "function": {"name": "f"}}]})),
            400,
            "unsupported_parameter",
            "tools",
        ),
        (
            CHAT,
            with(chat(QUESTION), json!({"response_format": {"type": "json_schema", "schema": {"type": "frob"}}})),
            400,
            "invalid_value",
            "response_format",
        ),
        (TEXT, json!({"prompt": "a", "grammar": "root = 1"}), 400, "invalid_value", "grammar"),
        (TEXT, json!({"prompt": "a", "samplers": ["luck"]}), 400, "invalid_value", "samplers"),
        (CHAT, chat(&long), 400, "context_length_exceeded", "messages"),
        (TEXT, json!({"prompt": long}), 400, "context_length_exceeded", "prompt"),
        (TEXT, json!({"prompt": [1, 999_999]}), 400, "invalid_value", "prompt"),
        (TEXT, json!({"prompt": [-1]}), 400, "invalid_value", "prompt"),
        (TEXT, json!({}), 400, "missing_required_parameter", "prompt"),
    ];
    for (path, body, status, code, param) in cases {
        for stream in [false, true] {
            let response = node.post(path, &with(body.clone(), json!({"stream": stream}))).await;
            assert_eq!(response.status(), status, "{code}");
            assert!(response.headers().contains_key("x-request-id"));
            let answer: Value = response.json().await.unwrap();
            assert_eq!(
                (answer["error"]["code"].as_str(), answer["error"]["param"].as_str()),
                (Some(code), Some(param))
            );
            assert_eq!(answer["error"]["type"], "invalid_request_error");
        }
    }
    let error: Value = node.post(CHAT, &chat(&long)).await.json().await.unwrap();
    assert!(error["error"]["message"].as_str().unwrap().contains("1024 tokens"), "{error}");
    assert_eq!(node.engine.stats().prompt_tokens, 0, "none of these reached a slot");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_and_a_long_wait_are_said_at_once_and_in_time() {
    let node = Node::start_with(|config| {
        long(config);
        config.context.parallel = 1;
        config.traffic.max_queued = 1;
        config.traffic.queue_timeout_seconds = 4;
    })
    .await;
    let mut running = node.post(CHAT, &with(forever(), json!({"stream": true}))).await.bytes_stream();
    within("the first event", running.next()).await.unwrap().unwrap();
    // Keeps reading: a sequence whose client does not read is parked.
    let reader = tokio::spawn(async move { while running.next().await.is_some() {} });
    let started = Instant::now();
    let quick = with(chat(QUESTION), json!({"max_tokens": 1}));
    let waits = node.post(CHAT, &quick);
    let refused = async {
        node.until("one waits", |stats| stats.waiting == 1).await;
        node.post(CHAT, &quick).await
    };
    let (waited, refused) = within("both answers", futures::future::join(waits, refused)).await;
    assert_eq!(refused.status(), 429);
    assert!(refused.headers()["retry-after"].to_str().unwrap().parse::<u32>().unwrap() >= 1);
    let refused: Value = refused.json().await.unwrap();
    assert_eq!(refused["error"]["code"], "queue_full");
    assert!(started.elapsed() >= Duration::from_millis(3900), "{:?}", started.elapsed());
    assert_eq!(waited.status(), 503);
    assert!(waited.headers().contains_key("retry-after"));
    let waited: Value = waited.json().await.unwrap();
    assert_eq!(waited["error"]["code"], "queue_timeout");
    reader.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_takes_too_long_is_ended() {
    let node = Node::start_with(|config| {
        long(config);
        config.traffic.request_timeout_seconds = 3;
    })
    .await;
    // More tokens than any machine makes in three seconds.
    let forever = with(forever(), json!({"n": 8}));
    let response = node.post(CHAT, &forever).await;
    assert_eq!(response.status(), 504);
    let error: Value = response.json().await.unwrap();
    assert_eq!(error["error"]["code"], "request_timeout");
    let response = node.post(CHAT, &with(forever, json!({"stream": true}))).await;
    assert_eq!(response.status(), 200);
    let text = response.text().await.unwrap();
    let (_, end) = text.split_once("event: error\ndata: ").unwrap_or_else(|| panic!("no error event: {text}"));
    assert!(end.contains("\"code\":\"request_timeout\"") && !end.contains("[DONE]"), "{end}");
    node.until("nothing runs", |stats| stats.running == 0).await;
}
