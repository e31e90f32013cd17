//! The whole way of a request on real llama.cpp: a client, the agent's listeners, the worker's API on a Unix socket, the
//! engine with the toy model, whose greedy answers are known.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use altiplano_agent::api::{ApiOptions, ApiState, router};
use altiplano_agent::engine::{Engine, EngineStats};
use altiplano_agent::front::{Front, FrontConfig, FrontLimits, PublishedModel, Route};
use altiplano_agent::metrics::AgentMetrics;
use altiplano_agent::runner::protocol::RunnerConfig;
use altiplano_crds::model_deployment::{ContextSpec, EngineSpec, RopeScaling, RopeSpec, SamplingSpec};
use altiplano_test_models::toy;
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::net::UnixListener;

/// Longest wait for anything; what is usual here is a hundredth of it.
const PATIENCE: Duration = Duration::from_mins(1);

const QUESTION: &str = "What can you do?";
const ANSWER: &str =
    "I can answer a few questions about llamas, the altiplano, Kubernetes and GPUs, add small numbers and count.";

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} did not happen within {PATIENCE:?}"))
}

struct Node {
    engine: Engine,
    front: Front,
    client: reqwest::Client,
    /// Of the model's own port.
    url: String,
    _folder: tempfile::TempDir,
}

impl Node {
    async fn start() -> Self {
        Self::start_with(|_| ()).await
    }

    async fn start_with(change: impl FnOnce(&mut RunnerConfig)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let sampling = SamplingSpec { temperature: Some("0".into()), ..SamplingSpec::default() };
        let mut config = RunnerConfig {
            uid: "uid".into(),
            namespace: "ml".into(),
            name: "toy".into(),
            served_name: "toy-chat".into(),
            model_path: toy::path(),
            socket: folder.path().join("toy.sock"),
            context: ContextSpec {
                min_tokens: Some(1024),
                max_tokens: Some(1024),
                parallel: 4,
                ..ContextSpec::default()
            },
            engine: EngineSpec { sampling: Some(sampling), ..EngineSpec::default() },
            threads: 2,
            ..RunnerConfig::default()
        };
        change(&mut config);
        let engine = {
            let config = config.clone();
            tokio::task::spawn_blocking(move || Engine::start(&config, &|_| {}).unwrap()).await.unwrap()
        };
        let options = ApiOptions { ping_interval: Duration::from_millis(500), ..ApiOptions::default() };
        let state = ApiState::new(engine.clone(), &config, options).unwrap();
        let listener = UnixListener::bind(&config.socket).unwrap();
        tokio::spawn(async move { axum::serve(listener, router(state)).await.unwrap() });

        let loopback = Ipv4Addr::LOCALHOST.into();
        let front = Front::bind(FrontConfig {
            listen: SocketAddr::new(loopback, 0),
            model_ip: loopback,
            model_ports: None,
            token: None,
            metrics: Arc::new(AgentMetrics::new("test").unwrap()),
            limits: FrontLimits::default(),
        })
        .await
        .unwrap();
        let published = PublishedModel {
            uid: config.uid.clone(),
            namespace: config.namespace.clone(),
            name: config.name.clone(),
            served_name: config.served_name.clone(),
            adapters: config.adapters.iter().map(|adapter| adapter.name.clone()).collect(),
            traffic: config.traffic.clone(),
        };
        let port = front.publish(published).await.unwrap();
        front.route("uid", Route::Ready { socket: PathBuf::clone(&config.socket) });
        // reqwest asks for a provider even where no TLS is spoken; one that is there already is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().timeout(PATIENCE).no_proxy().build().unwrap();
        Self { engine, front, client, url: format!("http://127.0.0.1:{port}"), _folder: folder }
    }

    async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        self.client.post(format!("{}{path}", self.url)).json(body).send().await.unwrap()
    }

    async fn json(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body).await;
        let status = response.status();
        let answer: Value = response.json().await.unwrap();
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// The data of all events of a stream that ends with `[DONE]`.
    async fn events(&self, path: &str, body: &Value) -> Vec<Value> {
        let response = self.post(path, body).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        assert_eq!(response.headers()["cache-control"], "no-cache, no-transform");
        let text = response.text().await.unwrap();
        let mut data: Vec<&str> = text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{text}");
        data.iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    async fn until(&self, what: &str, mut is_so: impl FnMut(&EngineStats) -> bool) -> EngineStats {
        let started = Instant::now();
        loop {
            let stats = self.engine.stats();
            if is_so(&stats) {
                return stats;
            }
            assert!(started.elapsed() < PATIENCE, "{what}: {stats:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn chat(question: &str) -> Value {
    json!({"model": "toy-chat", "messages": [{"role": "user", "content": question}]})
}

fn with(mut body: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("not an object: {more}") };
    body.as_object_mut().unwrap().extend(more);
    body
}

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_is_answered_with_usage_and_timings() {
    let node = Node::start().await;
    let answer = node.json(CHAT, &chat(QUESTION)).await;
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "toy-chat");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": ANSWER}));
    assert_eq!((&choice["finish_reason"], &choice["index"]), (&json!("stop"), &json!(0)));
    let (usage, timings) = (&answer["usage"], &answer["timings"]);
    let prompt = usage["prompt_tokens"].as_u64().unwrap();
    let completion = usage["completion_tokens"].as_u64().unwrap();
    assert!(prompt > 5 && completion > 5, "{usage}");
    assert_eq!(usage["total_tokens"], prompt + completion);
    assert_eq!(timings["predicted_n"], completion);
    assert_eq!(timings["prompt_n"].as_u64().unwrap() + timings["cache_n"].as_u64().unwrap(), prompt);
    for rate in ["prompt_per_second", "predicted_per_second", "prompt_ms", "predicted_ms", "time_to_first_token_ms"] {
        assert!(timings[rate].as_f64().unwrap() > 0.0, "{rate}: {timings}");
    }
    // Parts of text, and the deployment's own name.
    let parts =
        json!({"model": "ml/toy", "messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]});
    assert_eq!(node.json(CHAT, &parts).await["choices"][0]["message"]["content"], ANSWER);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_chat_says_the_same_token_by_token() {
    let node = Node::start().await;
    let whole = node.json(CHAT, &chat(QUESTION)).await;
    let streamed = with(chat(QUESTION), json!({"stream": true, "stream_options": {"include_usage": true}}));
    let chunks = node.events(CHAT, &streamed).await;
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": null}));
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, ANSWER);
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    for count in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(last["usage"][count], whole["usage"][count], "{count}");
    }
    assert!(last["timings"]["predicted_per_second"].as_f64().unwrap() > 0.0);
    let finish = &chunks[chunks.len() - 2];
    assert_eq!(finish["choices"][0]["finish_reason"], "stop");
    assert_eq!(finish["choices"][0]["delta"], json!({}));
    for chunk in &chunks[..chunks.len() - 1] {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["id"], chunks[0]["id"]);
        assert_eq!(chunk.get("usage"), Some(&Value::Null), "null until the last, as OpenAI's");
    }
    let plain = node.events(CHAT, &with(chat(QUESTION), json!({"stream": true}))).await;
    assert!(plain.iter().all(|chunk| chunk.get("usage").is_none()));
    assert!(plain.last().unwrap()["timings"]["predicted_n"].is_u64(), "without usage the last chunk has the timings");
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_take_text_and_tokens() {
    let node = Node::start().await;
    let prompt = "<|im_start|>user\nSay hello in Spanish.<|im_end|>\n<|im_start|>assistant\n";
    let expected = "Hello in Spanish is hola.";
    let tokens = node.engine.tokenize(prompt, true, true).unwrap();
    let ask = |prompt: Value| json!({"prompt": prompt, "max_tokens": 64});
    for body in [ask(json!(prompt)), ask(json!(tokens))] {
        let answer = node.json(TEXT, &body).await;
        assert_eq!(answer["object"], "text_completion");
        assert_eq!(answer["choices"][0]["text"], expected);
        assert_eq!(answer["usage"]["prompt_tokens"], tokens.len());
    }
    let several = node.json(TEXT, &with(ask(json!([prompt, prompt])), json!({"n": 2, "echo": true}))).await;
    let choices = several["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], index);
        assert_eq!(choice["text"], format!("{prompt}{expected}"));
    }
    assert_eq!(several["usage"]["prompt_tokens"], 2 * tokens.len(), "a prompt counts once for all its choices");
    let short = node.json(TEXT, &json!({"prompt": prompt, "ignore_eos": true})).await;
    assert_eq!(short["usage"]["completion_tokens"], 16, "OpenAI's default");
    assert_eq!(short["choices"][0]["finish_reason"], "length");
    let streamed = node.events(TEXT, &with(ask(json!(prompt)), json!({"stream": true}))).await;
    let text: String = streamed.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, expected);
}

const MESSAGES: &str = "/v1/messages";
const RESPONSES: &str = "/v1/responses";

/// The named events of a stream, each of which has its name as its type.
async fn named_events(node: &Node, path: &str, body: &Value) -> Vec<Value> {
    let response = node.post(path, body).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    assert_eq!(response.headers()["x-accel-buffering"], "no");
    let text = response.text().await.unwrap();
    let one = |event: &str| {
        let (name, data) = event.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["type"], name);
        data
    };
    text.trim_end().split("\n\n").filter(|event| !event.starts_with(':')).map(one).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_are_answered_in_anthropics_form() {
    let node = Node::start().await;
    let body = json!({"model": "toy-chat", "max_tokens": 100, "messages": [{"role": "user", "content": QUESTION}]});
    let answer = node.json(MESSAGES, &body).await;
    assert_eq!(
        (&answer["type"], &answer["role"], &answer["model"]),
        (&json!("message"), &json!("assistant"), &json!("toy-chat"))
    );
    assert_eq!(answer["content"], json!([{"type": "text", "text": ANSWER}]));
    assert_eq!((&answer["stop_reason"], &answer["stop_sequence"]), (&json!("end_turn"), &Value::Null));
    let prompt = answer["usage"]["input_tokens"].as_u64().unwrap()
        + answer["usage"]["cache_read_input_tokens"].as_u64().unwrap();
    let counted = node.json("/v1/messages/count_tokens", &with(body.clone(), json!({"max_tokens": null}))).await;
    assert_eq!(counted, json!({"input_tokens": prompt}));

    let events = named_events(&node, MESSAGES, &with(body.clone(), json!({"stream": true}))).await;
    assert_eq!(events[0]["message"]["usage"]["input_tokens"], prompt);
    assert_eq!(events[1]["content_block"], json!({"type": "text", "text": ""}));
    let text: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(text, ANSWER);
    let end: Vec<_> = events[events.len() - 3..].iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(end, ["content_block_stop", "message_delta", "message_stop"]);
    assert_eq!(events[events.len() - 2]["usage"]["output_tokens"], answer["usage"]["output_tokens"]);

    let cut = node.json(MESSAGES, &with(body.clone(), json!({"max_tokens": 2}))).await;
    assert_eq!((&cut["stop_reason"], &cut["usage"]["output_tokens"]), (&json!("max_tokens"), &json!(2)));
    for (more, status, kind) in [
        (json!({"model": "claude"}), 404, "not_found_error"),
        (json!({"max_tokens": null}), 400, "invalid_request_error"),
        (json!({"messages": "hi"}), 400, "invalid_request_error"),
    ] {
        let response = node.post(MESSAGES, &with(body.clone(), more)).await;
        assert_eq!(response.status(), status);
        let id = response.headers()["request-id"].to_str().unwrap().to_owned();
        assert_eq!(response.headers()["x-request-id"], id);
        let error: Value = response.json().await.unwrap();
        assert_eq!(
            (&error["type"], &error["error"]["type"], &error["request_id"]),
            (&json!("error"), &json!(kind), &json!(id))
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_are_answered_without_state() {
    let node = Node::start().await;
    let body = json!({"model": "toy-chat", "input": QUESTION, "store": true});
    let answer = node.json(RESPONSES, &body).await;
    assert_eq!(
        (&answer["object"], &answer["status"], &answer["store"]),
        (&json!("response"), &json!("completed"), &json!(false))
    );
    assert_eq!(
        answer["output"][0]["content"],
        json!([{"type": "output_text", "text": ANSWER, "annotations": [], "logprobs": []}])
    );
    let usage = &answer["usage"];
    assert_eq!(
        usage["total_tokens"].as_u64().unwrap(),
        usage["input_tokens"].as_u64().unwrap() + usage["output_tokens"].as_u64().unwrap()
    );

    let items =
        json!({"input": [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}], "stream": true});
    let events = named_events(&node, RESPONSES, &with(body.clone(), items)).await;
    let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    let text: String = deltas.filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(text, ANSWER);
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    let last = &events[events.len() - 1];
    assert_eq!(
        (&last["type"], &last["response"]["output"][0]["content"]),
        (&json!("response.completed"), &answer["output"][0]["content"])
    );

    let cut = node.json(RESPONSES, &with(body.clone(), json!({"max_output_tokens": 2}))).await;
    assert_eq!(
        (&cut["status"], &cut["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    let probable = with(
        body.clone(),
        json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 2}),
    );
    let probable = node.json(RESPONSES, &probable).await;
    let tokens = probable["output"][0]["content"][0]["logprobs"].as_array().unwrap();
    assert_eq!((tokens.len(), tokens[0]["top_logprobs"].as_array().unwrap().len()), (2, 2));
    let refused = node.post(RESPONSES, &with(body, json!({"previous_response_id": "resp_1"}))).await;
    assert_eq!(refused.status(), 400);
    let error: Value = refused.json().await.unwrap();
    assert_eq!(
        (&error["error"]["param"], &error["error"]["code"]),
        (&json!("previous_response_id"), &json!("unsupported_parameter"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_fails_ends_in_its_apis_own_words() {
    let node = Node::start_with(|config| {
        config.traffic.request_timeout_seconds = 1;
        config.context.max_tokens = Some(8192);
        config.context.rope = Some(RopeSpec { scaling: RopeScaling::Yarn, factor: 2, original_tokens: None });
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
async fn parameters_reach_the_engine() {
    let node = Node::start().await;
    let ask = async |more: Value| node.json(CHAT, &with(chat(QUESTION), more)).await;
    let content = |answer: &Value| answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();

    let cut = ask(json!({"max_completion_tokens": 3})).await;
    assert_eq!(cut["usage"]["completion_tokens"], 3);
    assert_eq!(cut["choices"][0]["finish_reason"], "length");

    let stopped = ask(json!({"stop": ["never", " the altiplano"]})).await;
    assert_eq!(content(&stopped), "I can answer a few questions about llamas,");
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");

    let logprobs = ask(json!({"logprobs": true, "top_logprobs": 2, "max_tokens": 4})).await;
    let tokens = logprobs["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len(), 4);
    let text: String = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!(text, content(&logprobs));
    for token in tokens {
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 2);
        assert_eq!(token["top_logprobs"][0]["logprob"], token["logprob"], "greedy takes the best");
    }

    let first = node.engine.tokenize("I", false, false).unwrap()[0];
    let banned = ask(json!({"logit_bias": {first.to_string(): -100}})).await;
    assert!(!content(&banned).starts_with('I'), "{}", content(&banned));

    let several = ask(json!({"n": 3, "temperature": 1.5, "seed": 7, "max_tokens": 24})).await;
    let again = ask(json!({"n": 3, "temperature": 1.5, "seed": 7, "max_tokens": 24})).await;
    let texts = |answer: &Value| {
        let choices = answer["choices"].as_array().unwrap();
        choices.iter().map(|choice| choice["message"]["content"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(texts(&several).len(), 3);
    assert_eq!(texts(&again).len(), 3);
    assert_eq!(several["usage"]["prompt_tokens"], cut["usage"]["prompt_tokens"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_ends_its_generation() {
    let node = Node::start().await;
    let forever = with(chat("Sing forever."), json!({"max_tokens": 900, "ignore_eos": true}));
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
    let activity = node.front.activity("uid").unwrap();
    assert_eq!((activity.running, activity.waiting), (0, 0));
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
        config.context.parallel = 1;
        config.traffic.max_queued = 1;
        config.traffic.queue_timeout_seconds = 1;
    })
    .await;
    let forever = with(chat("Sing forever."), json!({"max_tokens": 900, "ignore_eos": true, "stream": true}));
    let mut running = node.post(CHAT, &forever).await.bytes_stream();
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
    assert!(started.elapsed() >= Duration::from_millis(900), "{:?}", started.elapsed());
    assert_eq!(waited.status(), 503);
    assert!(waited.headers().contains_key("retry-after"));
    let waited: Value = waited.json().await.unwrap();
    assert_eq!(waited["error"]["code"], "queue_timeout");
    reader.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_takes_too_long_is_ended() {
    let node = Node::start_with(|config| {
        config.traffic.request_timeout_seconds = 1;
        config.context.max_tokens = Some(4096);
    })
    .await;
    // More tokens than any machine makes in a second.
    let forever = with(chat("Sing forever."), json!({"ignore_eos": true, "n": 8}));
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

#[tokio::test(flavor = "multi_thread")]
async fn a_template_of_the_deployment_replaces_the_files() {
    let refuses = "{{ bos_token }}\n{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}\
                   {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\n<|im_start|>assistant\n";
    let node = Node::start_with(|config| config.chat_template = Some(refuses.to_owned())).await;
    let body = json!({"messages": [{"role": "system", "content": "x"}]});
    let response = node.post(CHAT, &body).await;
    assert_eq!(response.status(), 400);
    let error: Value = response.json().await.unwrap();
    assert_eq!(error["error"]["message"], "the chat template refuses these messages: user first (line 2)");

    let broken = Node::start_with(|config| config.chat_template = Some("one\n{% for %}".to_owned())).await;
    let response = broken.post(CHAT, &chat(QUESTION)).await;
    assert_eq!(response.status(), 400);
    let error: Value = response.json().await.unwrap();
    assert!(error["error"]["message"].as_str().unwrap().contains("(line 2)"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_tell_what_happened() {
    let node = Node::start().await;
    let answer = node.json(CHAT, &chat(QUESTION)).await;
    let _again = node.json(CHAT, &chat(QUESTION)).await;
    node.post(CHAT, &with(chat(QUESTION), json!({"temperature": 9}))).await;
    let url = format!("http://{}/metrics", node.front.address());
    let text = node.client.get(url).send().await.unwrap().text().await.unwrap();
    let value = |series: &str| {
        let line =
            text.lines().find(|line| line.starts_with(series)).unwrap_or_else(|| panic!("no {series} in:\n{text}"));
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    let labels = r#"{model_name="toy",namespace="ml"}"#;
    let tokens = answer["usage"]["completion_tokens"].as_f64().unwrap();
    assert!((value(&format!("altiplano_generation_tokens_total{labels}")) - 2.0 * tokens).abs() < 0.5);
    for (series, expected) in [
        (format!("altiplano_time_to_first_token_seconds_count{labels}"), 2.0),
        (format!("altiplano_e2e_request_latency_seconds_count{labels}"), 2.0),
        (r#"altiplano_request_success_total{finished_reason="stop",model_name="toy",namespace="ml"}"#.to_owned(), 2.0),
        (r#"altiplano_http_errors_total{code="4xx",model_name="toy",namespace="ml"}"#.to_owned(), 1.0),
        (r#"altiplano_agent_http_requests_total{code="2xx",model_name="toy",namespace="ml"}"#.to_owned(), 2.0),
        (format!("altiplano_num_requests_running{labels}"), 0.0),
    ] {
        assert!((value(&series) - expected).abs() < 0.1, "{series}: {}", value(&series));
    }
    assert!(value(&format!("altiplano_kv_cache_usage_perc{labels}")) <= 1.0);
    assert!(value(&format!("altiplano_prompt_tokens_total{labels}")) > 10.0);
    for line in text.lines().filter(|line| line.starts_with("# TYPE")) {
        assert_eq!(text.matches(&format!("{line}\n")).count(), 1, "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_names_its_model_and_its_health() {
    let node = Node::start().await;
    let models: Value = node.client.get(format!("{}/v1/models", node.url)).send().await.unwrap().json().await.unwrap();
    assert_eq!(models["data"][0]["id"], "toy-chat");
    assert_eq!(node.client.get(format!("{}/health", node.url)).send().await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_has_the_form_that_was_asked_for() {
    let node = Node::start().await;
    let schema = json!({
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["name", "legs"],
        "additionalProperties": false,
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "animal", "strict": true, "schema": schema}});
    let body = with(chat(QUESTION), json!({"response_format": format, "max_tokens": 200}));
    let is_animal = |text: &str| {
        let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
        assert!(
            value["name"].is_string() && value["legs"].is_u64() && value.as_object().unwrap().len() == 2,
            "{value}"
        );
    };
    let several = with(body.clone(), json!({"n": 3, "temperature": 1.5, "seed": 1}));
    let answer = node.json(CHAT, &several).await;
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 3);
    for choice in choices {
        assert_eq!(choice["finish_reason"], "stop", "{choice}");
        is_animal(choice["message"]["content"].as_str().unwrap());
    }
    let events = node.events(CHAT, &with(body, json!({"stream": true}))).await;
    let text: String = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    is_animal(&text);

    let plain = |more: Value| with(json!({"prompt": "The answer is", "max_tokens": 40, "temperature": 1.0}), more);
    let said = async |more: Value| node.json(TEXT, &plain(more)).await["choices"][0].clone();
    let grammar = said(json!({"grammar": "root ::= \"yes\" | \"no\""})).await;
    assert!(
        ["yes", "no"].contains(&grammar["text"].as_str().unwrap()) && grammar["finish_reason"] == "stop",
        "{grammar}"
    );
    let date = said(json!({"json_schema": {"type": "string", "format": "date"}})).await;
    assert_eq!(date["text"].as_str().map(str::len), Some(12), "{date}");
    let any = said(json!({"response_format": {"type": "json_object"}})).await;
    assert!(any["text"].as_str().unwrap().starts_with('{'), "{any}");
    let never = said(json!({"logit_bias": [[" plain", false]], "temperature": 0, "n_probs": 2})).await;
    assert!(!never["text"].as_str().unwrap().contains(" plain") && never["logprobs"].is_object(), "{never}");
}

#[path = "api/borders.rs"]
mod borders;
#[path = "api/native.rs"]
mod native;
#[path = "api/ollama.rs"]
mod ollama;
#[path = "api/openapi.rs"]
mod openapi;
#[path = "api/overflow.rs"]
mod overflow;
