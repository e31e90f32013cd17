//! The whole way of a request on real llama.cpp: a client, the agent's listeners, the worker's API on a Unix socket, the
//! engine with the toy model, whose greedy answers are known.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

#[path = "support/wait.rs"]
mod wait;

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

use wait::{PATIENCE, within};

const QUESTION: &str = "What can you do?";
const ANSWER: &str =
    "I can answer a few questions about llamas, the altiplano, Kubernetes and GPUs, add small numbers and count.";

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

    async fn until(&self, what: &str, is_so: impl Fn(&EngineStats) -> bool) -> EngineStats {
        wait::until(what, || self.engine.stats(), is_so).await
    }
}

fn chat(question: &str) -> Value {
    json!({"model": "toy-chat", "messages": [{"role": "user", "content": question}]})
}

/// Room for answers that no machine ends while a test does something else.
fn long(config: &mut RunnerConfig) {
    config.context.max_tokens = Some(8192);
    config.context.rope = Some(RopeSpec { scaling: RopeScaling::Yarn, factor: 2, original_tokens: None });
}

/// An answer of such a length.
fn forever() -> Value {
    with(chat("Sing forever."), json!({"max_tokens": 8000, "ignore_eos": true}))
}

fn with(mut body: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("not an object: {more}") };
    body.as_object_mut().unwrap().extend(more);
    body
}

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
    let value = |text: &str, series: &str| -> Option<f64> {
        text.lines().find(|line| line.starts_with(series))?.rsplit(' ').next()?.parse().ok()
    };
    let labels = r#"{model_name="toy",namespace="ml"}"#;
    let tokens = answer["usage"]["completion_tokens"].as_f64().unwrap();
    let expected = [
        (format!("altiplano_generation_tokens_total{labels}"), 2.0 * tokens),
        (format!("altiplano_time_to_first_token_seconds_count{labels}"), 2.0),
        (format!("altiplano_e2e_request_latency_seconds_count{labels}"), 2.0),
        (r#"altiplano_request_success_total{finished_reason="stop",model_name="toy",namespace="ml"}"#.to_owned(), 2.0),
        (r#"altiplano_http_errors_total{code="4xx",model_name="toy",namespace="ml"}"#.to_owned(), 1.0),
        (r#"altiplano_agent_http_requests_total{code="2xx",model_name="toy",namespace="ml"}"#.to_owned(), 2.0),
        (format!("altiplano_num_requests_running{labels}"), 0.0),
    ];
    // A request is counted when all of its answer has gone, which its reader may know first.
    let deadline = Instant::now() + PATIENCE;
    let text = loop {
        let text = node.client.get(&url).send().await.unwrap().text().await.unwrap();
        let is_so = |(series, expected): &&(String, f64)| {
            value(&text, series).is_some_and(|value| (value - expected).abs() < 0.1)
        };
        let wrong: Vec<_> = expected.iter().filter(|series| !is_so(series)).collect();
        if wrong.is_empty() {
            break text;
        }
        assert!(Instant::now() < deadline, "expected {wrong:?} in:\n{text}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert!(value(&text, &format!("altiplano_kv_cache_usage_perc{labels}")) <= Some(1.0));
    assert!(value(&text, &format!("altiplano_prompt_tokens_total{labels}")) > Some(10.0));
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

#[path = "api/borders.rs"]
mod borders;
#[path = "api/dialects.rs"]
mod dialects;
#[path = "api/limits.rs"]
mod limits;
#[path = "api/native.rs"]
mod native;
#[path = "api/ollama.rs"]
mod ollama;
#[path = "api/openapi.rs"]
mod openapi;
#[path = "api/overflow.rs"]
mod overflow;
