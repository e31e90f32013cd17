//! LoRA adapters on real llama.cpp: random ones for the toy model, whose own answers are known.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use altiplano_agent::api::{ApiOptions, ApiState, router};
use altiplano_agent::engine::{
    Engine, EngineError, GenerateEvent, GenerateRequest, Generation, SamplingParams, SubmitError, Token, Usage,
};
use altiplano_agent::runner::protocol::{AdapterFile, RunnerConfig};
use altiplano_crds::model_deployment::{ContextSizing, ContextSpec};
use altiplano_test_models::{Architecture, Lora, Spec, toy};
use futures::StreamExt;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

const PATIENCE: Duration = Duration::from_mins(1);

/// How far log-probabilities of the same may be apart.
const NEAR: f32 = 0.1;

/// How far those with an adapter and without one are apart at least.
const FAR: f32 = 0.5;

/// Adapters of the toy model: two that change it, and one of no strength.
fn adapters(folder: &Path) -> Vec<AdapterFile> {
    let write = |name: &str, seed, scale_percent| {
        let path = folder.join(format!("{name}.gguf"));
        Lora { strength: 3.0, seed, ..Lora::of_toy() }.write(&path).unwrap();
        AdapterFile { name: name.to_owned(), path, scale_percent }
    };
    vec![write("odd", 1, 100), write("other", 2, 100), write("off", 3, 0)]
}

fn config(folder: &Path, context: ContextSpec) -> RunnerConfig {
    RunnerConfig {
        namespace: "ml".to_owned(),
        name: "toy".to_owned(),
        served_name: "toy-chat".to_owned(),
        model_path: toy::path(),
        adapters: adapters(folder),
        context,
        threads: 2,
        ..RunnerConfig::default()
    }
}

fn start(config: &RunnerConfig) -> Engine {
    Engine::start(config, &|_| {}).unwrap()
}

fn chat(question: &str) -> String {
    format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
}

fn request(engine: &Engine, prompt: &str, adapter: Option<usize>) -> GenerateRequest {
    GenerateRequest {
        prompt: engine.tokenize(prompt, true, true).unwrap(),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        adapter,
        ..GenerateRequest::default()
    }
}

/// Text, log-probabilities of the first token, usage.
type Answer = (String, BTreeMap<Token, f32>, Usage);

async fn read(mut generation: Generation) -> Answer {
    let (mut text, mut first) = (String::new(), None);
    loop {
        match tokio::time::timeout(PATIENCE, generation.next()).await.unwrap() {
            Some(GenerateEvent::Token { text: piece, logprob, .. }) => {
                text.push_str(&piece);
                if let Some(logprob) = logprob {
                    first.get_or_insert(logprob.top.iter().map(|top| (top.token, top.logprob)).collect());
                }
            }
            Some(GenerateEvent::Done { usage, .. }) => return (text, first.unwrap_or_default(), usage),
            other => panic!("{other:?} after {text:?}"),
        }
    }
}

async fn first(engine: &Engine, prompt: &str, adapter: Option<usize>) -> BTreeMap<Token, f32> {
    let request = GenerateRequest { max_tokens: Some(1), logprobs: Some(20), ..request(engine, prompt, adapter) };
    read(engine.submit(request).unwrap()).await.1
}

/// The greatest difference; one that the other does not have among its best counts as far.
fn distance(left: &BTreeMap<Token, f32>, right: &BTreeMap<Token, f32>) -> f32 {
    let best = left.iter().filter(|(_, logprob)| **logprob > -4.0);
    let differences = best.map(|(token, logprob)| right.get(token).map_or(100.0, |other| (other - logprob).abs()));
    differences.fold(0.0, f32::max)
}

fn dynamic(min_tokens: i32, max_tokens: i32, parallel: i32) -> ContextSpec {
    ContextSpec { min_tokens: Some(min_tokens), max_tokens: Some(max_tokens), parallel, ..ContextSpec::default() }
}

/// What one says does not depend on who else is asked, and the model itself is what it was.
#[tokio::test(flavor = "multi_thread")]
async fn each_adapter_speaks_for_itself() {
    let folder = tempfile::tempdir().unwrap();
    let engine = start(&config(folder.path(), dynamic(2048, 2048, 4)));
    assert_eq!(engine.model().adapters, ["odd", "other", "off"]);
    let prompt = chat("What can you do?");
    let plain = first(&engine, &prompt, None).await;
    let mut alone = Vec::new();
    for adapter in 0..3 {
        alone.push(first(&engine, &prompt, Some(adapter)).await);
    }
    let again = first(&engine, &prompt, None).await;
    assert!(distance(&plain, &again) < NEAR, "{plain:?} {again:?}");
    assert!(distance(&plain, &alone[2]) < NEAR, "of no strength: {:?}", alone[2]);
    assert!(distance(&plain, &alone[0]) > FAR && distance(&plain, &alone[1]) > FAR, "{plain:?} {alone:?}");
    assert!(distance(&alone[0], &alone[1]) > FAR, "{alone:?}");

    // All at once, each prompt several times.
    let questions: Vec<_> =
        toy::questions().into_iter().filter(|question| question.messages.len() == 1).take(6).collect();
    let asked = questions.iter().map(|question| chat(&question.messages[0].content));
    let plain_asked: Vec<_> =
        asked.map(|prompt| read(engine.submit(request(&engine, &prompt, None)).unwrap())).collect();
    let endless = |adapter| {
        let request = request(&engine, &prompt, Some(adapter));
        let request = GenerateRequest { max_tokens: Some(60), ignore_eos: true, logprobs: Some(20), ..request };
        read(engine.submit(request).unwrap())
    };
    let others: Vec<_> = [0, 1, 0, 2, 1].map(|adapter| (adapter, endless(adapter))).into_iter().collect();
    let adapters: Vec<usize> = others.iter().map(|(adapter, _)| *adapter).collect();
    let others = futures::future::join_all(others.into_iter().map(|(_, answer)| answer));
    let (answers, others) = futures::join!(futures::future::join_all(plain_asked), others);
    for (question, (text, _, _)) in questions.iter().zip(&answers) {
        assert_eq!(text, &question.answer);
    }
    for (adapter, (_, logprobs, usage)) in adapters.into_iter().zip(&others) {
        assert!(distance(&alone[adapter], logprobs) < NEAR, "{adapter}: {:?} {logprobs:?}", alone[adapter]);
        assert_eq!(usage.completion_tokens, 60);
    }
    let refused = engine.submit(request(&engine, &prompt, Some(3))).unwrap_err();
    assert_eq!(refused, SubmitError::InvalidParameter("the model has no such adapter"));
    engine.shutdown(Instant::now());
}

/// Each has its turn: a stream that never ends holds up nobody, and is not held up for ever.
#[tokio::test(flavor = "multi_thread")]
async fn turns_are_fair() {
    let folder = tempfile::tempdir().unwrap();
    let engine = start(&config(folder.path(), dynamic(2048, 4096, 4)));
    let endless = |adapter| {
        let request = request(&engine, &chat(toy::ENDLESS_QUESTION), adapter);
        engine.submit(GenerateRequest { ignore_eos: true, max_tokens: Some(3000), ..request }).unwrap()
    };
    let mut streams = [endless(None), endless(Some(0)), endless(Some(1))];
    let mut counts = [0_u32; 3];
    let deadline = Instant::now() + PATIENCE;
    while counts.iter().any(|count| *count < 200) {
        assert!(Instant::now() < deadline, "{counts:?}");
        for (stream, count) in streams.iter_mut().zip(&mut counts) {
            // None ends before all have come so far.
            while let Ok(Some(event)) = tokio::time::timeout(Duration::from_millis(1), stream.next()).await {
                assert!(matches!(event, GenerateEvent::Token { .. }), "{event:?}");
                *count += 1;
            }
        }
    }
    drop(streams);
    engine.shutdown(Instant::now());
}

/// A context that is made anew keeps nothing of the former one's adapter, and gets it again.
#[tokio::test(flavor = "multi_thread")]
async fn growth_keeps_the_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let past: Vec<_> = toy::questions()
        .iter()
        .filter(|question| question.messages.len() == 1)
        .take(14)
        .map(|question| format!("{}{}<|im_end|>\n", chat(&question.messages[0].content), question.answer))
        .collect();
    let prompt = format!("{}{}", past.concat(), chat("What can you do?"));
    let fixed = ContextSpec { sizing: ContextSizing::Fixed, ..dynamic(256, 4096, 1) };
    let engine = start(&config(folder.path(), fixed));
    let (plain, expected) = (first(&engine, &prompt, None).await, first(&engine, &prompt, Some(1)).await);
    assert!(distance(&plain, &expected) > FAR, "{plain:?} {expected:?}");
    engine.shutdown(Instant::now());
    let engine = start(&config(folder.path(), dynamic(256, 4096, 2)));
    assert_eq!(engine.report().context_tokens, 256);
    let found = first(&engine, &prompt, Some(1)).await;
    assert!(engine.stats().resizes >= 1);
    assert!(distance(&expected, &found) < NEAR, "{expected:?} {found:?}");
    engine.shutdown(Instant::now());
}

#[test]
fn what_cannot_be_loaded_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wrong.gguf");
    let with = |lora: &Lora| {
        lora.write(&path).unwrap();
        let adapters = vec![AdapterFile { name: "wrong".to_owned(), path: path.clone(), scale_percent: 100 }];
        RunnerConfig { adapters, ..config(folder.path(), ContextSpec::default()) }
    };
    let fail = |config: &RunnerConfig| Engine::start(config, &|_| {}).unwrap_err();
    for (lora, words) in [
        (Lora::of(&Spec { architecture: Architecture::Qwen2, ..Spec::default() }), "arch mismatch"),
        (Lora::of(&Spec { embd: 128, ..Spec::default() }), "incorrect shape"),
        (Lora { layers: 5, ..Lora::of_toy() }, "does not exist in base model"),
    ] {
        let error = fail(&with(&lora));
        assert!(matches!(&error, EngineError::LoadFailed { message, .. } if message.contains(words)), "{error:?}");
    }
    let model = folder.path().join("embedder.gguf");
    Spec::embedder().write(&model).unwrap();
    let embedder = RunnerConfig { model_path: model, ..with(&Lora::of_toy()) };
    assert!(matches!(fail(&embedder), EngineError::UnsupportedModel(_)));

    // What can be loaded is counted, in the dry run too.
    let plain = RunnerConfig { adapters: Vec::new(), ..config(folder.path(), ContextSpec::default()) };
    let with = config(folder.path(), ContextSpec::default());
    let bytes: u64 = with.adapters.iter().map(|adapter| std::fs::metadata(&adapter.path).unwrap().len()).sum();
    let weights = |config: &RunnerConfig| altiplano_agent::engine::estimate(config).unwrap().memory[0].weights_bytes;
    assert_eq!(weights(&with), weights(&plain) + bytes);
    let engine = start(&with);
    assert_eq!(engine.report().memory[0].weights_bytes, weights(&with));
    engine.shutdown(Instant::now());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_names_its_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), dynamic(1024, 1024, 4));
    let engine = start(&config);
    let router = router(ApiState::new(engine.clone(), &config, ApiOptions::default()).unwrap());
    let send = async |request: http::request::Builder, body: String| -> (StatusCode, Value) {
        let answer = router.clone().oneshot(request.body(axum::body::Body::from(body)).unwrap()).await.unwrap();
        let status = answer.status();
        (status, serde_json::from_slice(&answer.into_body().collect().await.unwrap().to_bytes()).unwrap())
    };
    let ask = async |model: &str| {
        let messages = json!([{"role": "user", "content": "What can you do?"}]);
        let body = json!({
            "model": model, "messages": messages, "temperature": 0, "max_tokens": 1, "logprobs": true, "top_logprobs": 5,
        });
        send(Request::post("/v1/chat/completions"), body.to_string()).await
    };
    let best = |(status, answer): (StatusCode, Value)| {
        assert_eq!(status, 200, "{answer}");
        answer["choices"][0]["logprobs"]["content"][0]["logprob"].as_f64().unwrap()
    };
    let plain = best(ask("toy-chat").await);
    assert!((best(ask("toy-chat:off").await) - plain).abs() < 0.02);
    let odd = best(ask("toy-chat:odd").await);
    assert!((odd - plain).abs() > 0.02, "{odd} {plain}");
    assert!((best(ask("ml/toy:odd").await) - odd).abs() < 0.02);
    for missing in ["toy-chat:", "toy-chat:nope", "other:odd", ":odd"] {
        let (status, answer) = ask(missing).await;
        assert_eq!((status.as_u16(), &answer["error"]["code"]), (404, &json!("model_not_found")), "{missing}");
    }
    let (_, models) = send(Request::get("/v1/models"), String::new()).await;
    let ids: Vec<_> = models["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["toy-chat", "toy-chat:odd", "toy-chat:other", "toy-chat:off"]);
    let (status, one) = send(Request::get("/v1/models/toy-chat:odd"), String::new()).await;
    assert_eq!((status.as_u16(), &one["parent"]), (200, &json!("toy-chat")));
    engine.shutdown(Instant::now());
}
