//! Embeddings and reranking on real llama.cpp, from the HTTP API down: a BERT, a causal embedder and a reranker of random
//! weights, for which it can be said what must be equal, and what near.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

#[path = "support/engine.rs"]
mod support;

use std::sync::Arc;

use altiplano_agent::api::{ApiOptions, ApiState, router};
use altiplano_agent::engine::{Ability, EmbedRequest, EmbedTask, Engine, SubmitError, Token};
use altiplano_agent::runner::protocol::{MemoryUse, RunnerConfig};
use altiplano_crds::model_deployment::ContextSizing;
use altiplano_test_models::{Pooling, Spec, toy};
use base64::Engine as _;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use support::{PATIENCE, until};

fn config(model_path: std::path::PathBuf) -> RunnerConfig {
    let (namespace, name) = ("ml".to_owned(), "embedder".to_owned());
    RunnerConfig { namespace, served_name: name.clone(), name, model_path, threads: 2, ..RunnerConfig::default() }
}

struct Worker {
    engine: Engine,
    router: axum::Router,
    _folder: Arc<tempfile::TempDir>,
}

impl Worker {
    fn start(spec: &Spec) -> Self {
        Self::start_with(spec, |_| ())
    }

    fn start_with(spec: &Spec, change: impl FnOnce(&mut RunnerConfig)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        spec.write(&path).unwrap();
        let mut config = config(path);
        change(&mut config);
        Self::of(&config, folder)
    }

    fn of(config: &RunnerConfig, folder: tempfile::TempDir) -> Self {
        let engine = Engine::start(config, &|_| {}).unwrap();
        let state = ApiState::new(engine.clone(), config, ApiOptions::default()).unwrap();
        Self { engine, router: router(state), _folder: Arc::new(folder) }
    }

    async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        let request = Request::post(path).body(axum::body::Body::from(body.to_string())).unwrap();
        let answer = tokio::time::timeout(PATIENCE, self.router.clone().oneshot(request)).await.unwrap().unwrap();
        let status = answer.status();
        let bytes = answer.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&bytes).unwrap())
    }

    async fn get(&self, path: &str) -> String {
        let request = Request::get(path).body(axum::body::Body::empty()).unwrap();
        let answer = self.router.clone().oneshot(request).await.unwrap();
        assert_eq!(answer.status(), 200);
        String::from_utf8(answer.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
    }

    async fn embeddings(&self, body: Value) -> Value {
        let (status, answer) = self.post("/v1/embeddings", &body).await;
        assert_eq!(status, 200, "{answer}");
        answer
    }

    async fn vectors(&self, texts: &[String]) -> Vec<Vec<f32>> {
        floats(&self.embeddings(json!({"input": texts})).await)
    }

    async fn refused(&self, path: &str, body: Value) -> (u16, String, Value) {
        let (status, answer) = self.post(path, &body).await;
        let message = answer["error"]["message"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned();
        (status.as_u16(), message, answer["error"]["param"].clone())
    }
}

fn numbers(value: &Value) -> Vec<f32> {
    #[expect(clippy::cast_possible_truncation, reason = "written as f32")]
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
}

fn floats(answer: &Value) -> Vec<Vec<f32>> {
    answer["data"].as_array().unwrap().iter().map(|entry| numbers(&entry["embedding"])).collect()
}

fn far(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).map(|(left, right)| (left - right).abs()).fold(0.0, f32::max)
}

fn length(vector: &[f32]) -> f32 {
    vector.iter().map(|number| number * number).sum::<f32>().sqrt()
}

/// Texts of so many words each, no two alike.
fn texts(count: usize, words: impl Fn(usize) -> usize) -> Vec<String> {
    const SYLLABLES: [&str; 8] = ["na", "ro", "ti", "lu", "se", "mo", "da", "pe"];
    let word = |seed: usize| (0..3).map(|place| SYLLABLES[(seed >> (3 * place)) % 8]).collect::<String>();
    let text = |index: usize| {
        let words = (0..words(index)).map(|place| word(index * 131 + place * 7 + 1));
        words.collect::<Vec<_>>().join(" ")
    };
    (0..count).map(text).collect()
}

/// How far scores of the same text in other company may be apart; those of other texts are hundreds of times as far.
const SCORE: f64 = 5e-3;

/// Least number of times that what must differ differs more than what must be near.
const MARGIN: f32 = 20.0;

/// The same text has the same vector, alone or in company; vectors have length one and tell texts apart.
#[tokio::test(flavor = "multi_thread")]
async fn a_text_has_one_vector_whoever_is_beside_it() {
    let cls = Spec { pooling: Some(Pooling::Cls), ..Spec::embedder() };
    let mean = Spec { pooling: Some(Pooling::Mean), ..Spec::causal_embedder() };
    for spec in [Spec::embedder(), cls, Spec::causal_embedder(), mean] {
        let worker = Worker::start(&spec);
        let texts = texts(40, |index| 3 + index * 5 % 60);
        let together = worker.vectors(&texts).await;
        let calls = worker.engine.stats().steps;
        assert!(calls > 1 && calls < 20, "40 texts share calls: {calls}");
        let mut apart = f32::MAX;
        let mut near = 0.0_f32;
        for (index, text) in texts.iter().enumerate() {
            let alone = worker.vectors(std::slice::from_ref(text)).await.remove(0);
            let again = worker.vectors(std::slice::from_ref(text)).await.remove(0);
            assert_eq!(alone, again, "the same call gives the same numbers");
            assert!((length(&alone) - 1.0).abs() < 1e-5, "{}", length(&alone));
            near = near.max(far(&alone, &together[index]));
            for other in &together[index + 1..] {
                apart = apart.min(far(&alone, other));
            }
        }
        assert!(near < 1e-3 && apart > near * MARGIN, "{:?}: {near} near, {apart} apart", spec.name);
        assert_eq!(together[0].len(), 64);
        worker.engine.shutdown(std::time::Instant::now());
    }
}

/// A text longer than any call before gets a larger context; what came before is what it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_text_grows_the_micro_batch() {
    for spec in [Spec::embedder(), Spec::causal_embedder()] {
        let worker = Worker::start(&spec);
        let fixed = Worker::start_with(&spec, |config| config.context.sizing = ContextSizing::Fixed);
        assert_eq!((worker.engine.report().context_tokens, fixed.engine.report().context_tokens), (512, 2048));
        let short = texts(2, |_| 9);
        let long: Vec<Token> = (0..2000).map(|index| 200 + index * 7 % 300).collect();
        let before = worker.vectors(&short).await;
        let ask = json!({"input": [long]});
        let grown = worker.embeddings(ask.clone()).await;
        assert_eq!(grown["usage"], json!({"prompt_tokens": 2000, "total_tokens": 2000}));
        let report = worker.engine.report();
        assert_eq!((report.context_tokens, worker.engine.stats().resizes), (2048, 1));
        let expected = fixed.embeddings(ask).await;
        assert!(far(&floats(&grown)[0], &floats(&expected)[0]) < 1e-3, "{}", spec.name);
        assert!(far(&before[0], &worker.vectors(&short).await[0]) < 1e-3);
        assert_eq!(fixed.engine.stats().resizes, 0);
        let (status, message, param) = worker.refused("/v1/embeddings", json!({"input": [vec![300; 2049]]})).await;
        assert_eq!((status, param), (400, json!("input")));
        assert!(message.contains("2048 tokens") && message.contains("2049 tokens"), "{message}");
    }
}

/// Sizes that are no multiple of the texts in a call, as the spec gives them and as a text makes them.
#[tokio::test(flavor = "multi_thread")]
async fn sizes_may_be_odd() {
    let mean = Spec { pooling: Some(Pooling::Mean), ..Spec::causal_embedder() };
    for spec in [Spec::embedder(), Spec::causal_embedder(), mean] {
        let worker = Worker::start_with(&spec, |config| {
            config.context.max_tokens = Some(389);
            (config.engine.batch_tokens, config.engine.micro_batch_tokens) = (Some(300), Some(300));
        });
        let usual = Worker::start(&spec);
        for words in [5, 60] {
            let texts = texts(70, |index| if index == 3 { words } else { 2 });
            for (left, right) in worker.vectors(&texts).await.iter().zip(usual.vectors(&texts).await) {
                assert!(far(left, &right) < 0.002, "{words} words");
            }
        }
        // Longer than a call was made for, and of an odd length again.
        let long: Vec<Token> = (0..389).map(|index| 200 + index * 7 % 300).collect();
        let (left, right) =
            (worker.embeddings(json!({"input": [long]})).await, usual.embeddings(json!({"input": [long]})).await);
        assert!(far(&floats(&left)[0], &floats(&right)[0]) < 0.002);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_is_openais() {
    let worker = Worker::start(&Spec::embedder());
    let answer = worker.embeddings(json!({"model": "embedder", "input": ["naro tilu", "semo"]})).await;
    assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!("embedder")));
    assert_eq!((&answer["data"][1]["object"], &answer["data"][1]["index"]), (&json!("embedding"), &json!(1)));
    let tokens = |text: &str| worker.engine.tokenize(text, true, true).unwrap();
    let used = tokens("naro tilu").len() + tokens("semo").len();
    assert_eq!(answer["usage"], json!({"prompt_tokens": used, "total_tokens": used}));

    // Text or its tokens, float or base64: the same numbers.
    let by_tokens = worker.embeddings(json!({"input": [tokens("naro tilu"), tokens("semo")]})).await;
    assert_eq!(floats(&by_tokens), floats(&answer));
    let one = worker.embeddings(json!({"input": tokens("semo")})).await;
    assert!(far(&floats(&one)[0], &floats(&answer)[1]) < 1e-3);
    let encoded = worker.embeddings(json!({"input": ["naro tilu", "semo"], "encoding_format": "base64"})).await;
    let decode = |entry: &Value| {
        let bytes = base64::engine::general_purpose::STANDARD.decode(entry["embedding"].as_str().unwrap()).unwrap();
        bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect::<Vec<_>>()
    };
    assert_eq!(encoded["data"].as_array().unwrap().iter().map(decode).collect::<Vec<_>>(), floats(&answer));

    // llama-server's own form, and vectors as they are.
    let (status, llama) = worker.post("/embedding", &json!({"content": "semo"})).await;
    assert_eq!(status, 200, "{llama}");
    assert!(far(&numbers(&llama[0]["embedding"][0]), &floats(&answer)[1]) < 1e-3);
    let (_, raw) = worker.post("/embeddings", &json!({"input": "semo", "embd_normalize": -1})).await;
    let mut raw = numbers(&raw[0]["embedding"][0]);
    assert!((length(&raw) - 1.0).abs() > 0.01, "{}", length(&raw));
    altiplano_agent::api::embed::normalise(&mut raw);
    assert!(far(&raw, &floats(&answer)[1]) < 1e-3);

    let models: Value = serde_json::from_str(&worker.get("/v1/models").await).unwrap();
    assert_eq!(models["data"][0]["capabilities"], json!(["embedding"]));
    assert_eq!(models["data"][0]["meta"]["n_embd"], 64);
    let cases = [
        ("/v1/embeddings", json!({}), "input"),
        ("/v1/embeddings", json!({"input": [[]]}), "input"),
        ("/v1/embeddings", json!({"input": [[512]]}), "input"),
        ("/v1/embeddings", json!({"input": "a", "dimensions": 32}), "dimensions"),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "Hello"}]}), "model"),
        ("/v1/completions", json!({"prompt": "Hello"}), "model"),
        ("/v1/rerank", json!({"query": "q", "documents": ["a"]}), "model"),
    ];
    for (path, body, param) in cases {
        let (status, message, found) = worker.refused(path, body.clone()).await;
        assert_eq!((status, found), (400, json!(param)), "{path} {body}: {message}");
    }
    let metrics = worker.get("/metrics").await;
    let has = |line: &str| assert!(metrics.lines().any(|found| found == line), "{line} in\n{metrics}");
    let labels = r#"model_name="embedder",namespace="ml""#;
    has(&format!("altiplano_embedded_texts_total{{{labels}}} 9"));
    has(&format!(r#"altiplano_request_success_total{{finished_reason="stop",{labels}}} 6"#));
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_are_ranked() {
    let worker = Worker::start(&Spec::reranker());
    let documents = texts(12, |index| 4 + index);
    let ask = json!({"model": "embedder", "query": "naro tilu", "documents": documents});
    let (status, answer) = worker.post("/v1/rerank", &ask).await;
    assert_eq!(status, 200, "{answer}");
    let results = answer["results"].as_array().unwrap();
    let scores: Vec<f64> = results.iter().map(|result| result["relevance_score"].as_f64().unwrap()).collect();
    assert!(scores.is_sorted_by(|left, right| left >= right) && scores[0] > scores[11] + 0.01, "{scores:?}");
    let mut order: Vec<usize> =
        results.iter().map(|result| usize::try_from(result["index"].as_u64().unwrap()).unwrap()).collect();
    let best = order[0];
    order.sort_unstable();
    assert_eq!(order, (0..12).collect::<Vec<_>>());
    assert!(answer["usage"]["prompt_tokens"].as_u64().unwrap() > 12 * 8, "{answer}");

    // A query and a document as BERT has them.
    let prompt = worker.engine.rerank_prompt("naro", "tilu").unwrap();
    assert_eq!((prompt[0], prompt.iter().filter(|&&token| token == 3).count(), prompt.last()), (2, 2, Some(&3)));

    // The other names and forms say the same.
    for path in ["/rerank", "/v1/reranking", "/reranking"] {
        let more = json!({"query": "naro tilu", "documents": documents, "top_n": 2, "return_documents": true});
        let (_, two) = worker.post(path, &more).await;
        assert_eq!(two["results"].as_array().unwrap().len(), 2, "{two}");
        assert_eq!(two["results"][0]["document"]["text"], documents[best].as_str());
        assert!((two["results"][0]["relevance_score"].as_f64().unwrap() - scores[0]).abs() < SCORE);
    }
    let tei = json!({"query": "naro tilu", "texts": documents, "return_text": true});
    let (_, tei) = worker.post("/rerank", &tei).await;
    assert_eq!((&tei[0]["index"], &tei[0]["text"]), (&json!(best), &json!(documents[best])));

    let one = json!({"query": "naro tilu", "documents": [documents[best]]});
    let (_, alone) = worker.post("/v1/rerank", &one).await;
    assert!((alone["results"][0]["relevance_score"].as_f64().unwrap() - scores[0]).abs() < SCORE, "{alone} {scores:?}");
    let (status, message, _) = worker.refused("/v1/embeddings", json!({"input": "a"})).await;
    assert!(status == 400 && message.contains("scores documents"), "{status} {message}");
}

/// A model that generates says why it does neither.
#[tokio::test(flavor = "multi_thread")]
async fn a_chat_model_embeds_nothing() {
    let worker = Worker::of(&config(toy::path()), tempfile::tempdir().unwrap());
    assert!(worker.engine.model().can(Ability::Completion) && !worker.engine.model().can(Ability::Embedding));
    for (path, body) in
        [("/v1/embeddings", json!({"input": "a"})), ("/v1/rerank", json!({"query": "q", "documents": ["a"]}))]
    {
        let (status, message, param) = worker.refused(path, body).await;
        assert_eq!((status, param), (400, json!("model")));
        assert!(message.starts_with("this model generates text: its file names no pooling"), "{message}");
    }
}

/// Requests share calls, none waits for all of another, and one that is given up leaves.
#[tokio::test(flavor = "multi_thread")]
async fn requests_take_turns() {
    let worker = Worker::start_with(&Spec::embedder(), |config| {
        config.context.parallel = 2;
        config.traffic.max_queued = 1;
        config.threads = 1;
    });
    let engine = &worker.engine;
    let request = |count: usize| EmbedRequest {
        texts: texts(count, |_| 120).iter().map(|text| engine.tokenize(text, true, true).unwrap()).collect(),
        ..EmbedRequest::default()
    };
    // As many as a request may have: more than one thread embeds before the test goes on.
    let (large, one) = (request(2000), request(1));
    let mut many = Box::pin(engine.embed(large.clone()).unwrap());
    let few = tokio::time::timeout(PATIENCE, engine.embed(one.clone()).unwrap()).await.unwrap().unwrap();
    assert_eq!(few.vectors.len(), 1);
    assert!(futures::poll!(&mut many).is_pending(), "the first one has not ended");
    let first = engine.embed(large.clone()).unwrap();
    let second = engine.embed(large).unwrap();
    assert_eq!(engine.embed(one).unwrap_err(), SubmitError::QueueFull { limit: 1 });
    drop((many, first, second));
    let stats = until(engine, "all have left", |stats| (stats.running, stats.waiting) == (0, 0)).await;
    assert!(stats.cancelled >= 1 && stats.finished_stop == 1, "{stats:?}");
    assert!(stats.embedded_texts < 2000, "{stats:?}");
    for (bad, expected) in [
        (EmbedRequest::default(), SubmitError::EmptyPrompt),
        (EmbedRequest { texts: vec![vec![-1]], ..request(0) }, SubmitError::InvalidToken { token: -1, n_vocab: 512 }),
    ] {
        assert_eq!(engine.embed(bad).unwrap_err(), expected);
    }
    let score = EmbedRequest { task: EmbedTask::Score, ..request(1) };
    assert!(matches!(engine.embed(score).unwrap_err(), SubmitError::Unsupported(_)));
    engine.shutdown(std::time::Instant::now());
    assert_eq!(engine.ended().await, Ok(()));
}

/// The dry run says what the load takes.
#[test]
fn the_estimate_is_near() {
    for spec in [Spec::embedder(), Spec::causal_embedder()] {
        let spec = Spec { embd: 256, ff: 768, heads: 8, layers: 4, ..spec };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        spec.write(&path).unwrap();
        let config = config(path);
        let estimate = altiplano_agent::engine::estimate(&config).unwrap();
        let engine = Engine::start(&config, &|_| {}).unwrap();
        let report = engine.report();
        assert_eq!((estimate.context_tokens, estimate.max_tokens), (report.context_tokens, report.max_tokens));
        // What the process itself takes is this test's, with other engines in it.
        let bytes = |part: &MemoryUse| part.total() - part.other_bytes;
        let (predicted, measured) = (bytes(&estimate.memory[0]), bytes(&report.memory[0]));
        assert!(predicted.abs_diff(measured) * 20 <= measured, "{:?} {:?}", estimate.memory, report.memory);
    }
}
