//! The context's size as a user sees it, with real workers: sizes that alternate, two models that want the same memory, and
//! what the log says about it.
#![expect(clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use std::path::PathBuf;
use std::time::Instant;

use altiplano_test_models::{Spec, toy};
use serde_json::{Value, json};
use support::{Agent, PATIENCE, workers};
use tempfile::TempDir;

fn written(spec: &Spec) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    spec.write(&path).expect("a model file");
    (folder, path)
}

/// Tokens that spell text; another number, another text from the first token on.
fn tokens(number: usize, length: usize) -> Vec<usize> {
    (0..length).map(|at| 260 + (number * 31 + at * (number % 7 + 1)) % 240).collect()
}

async fn post(agent: &Agent, path: &str, body: &Value) -> Value {
    let asked = agent.client.post(format!("{}{path}", agent.base())).json(body).timeout(PATIENCE).send();
    let response = asked.await.unwrap_or_else(|error| panic!("{error:?}; {}", agent.story()));
    let status = response.status();
    let answer: Value = response.json().await.expect("JSON");
    assert_eq!(status, 200, "{answer}; {}", agent.story());
    answer
}

/// Prompts of 2,000, 8,000 and 4,000 tokens in turn, then clients that ask for contexts of such sizes: one load, and the
/// context grows no more often than there are larger sizes.
#[tokio::test(flavor = "multi_thread")]
async fn sizes_that_alternate_reload_nothing() {
    let tiny = Spec { layers: 1, heads: 1, ff: 64, context: 16_384, ..Spec::default() };
    let (_folder, path) = written(&tiny);
    let models = [("tiny", path.as_path(), ", context: {minTokens: 2048, parallel: 2}, engine: {gpu: Never}")];
    let agent = Agent::start(&[], &["serve"], &models, &[], &[]).await;
    agent.ready("tiny", 1).await;
    let worker = workers(agent.pid());
    let begun = Instant::now();
    for (number, length) in [2000, 8000, 4000].into_iter().cycle().take(200).enumerate() {
        // Now and then another text, of which nothing is there.
        let body = json!({"model": "tiny", "prompt": tokens(number / 30, length), "max_tokens": 2});
        let answer = post(&agent, "/v1/completions", &body).await;
        assert_eq!(answer["usage"]["prompt_tokens"], length, "{answer}");
    }
    let took = begun.elapsed();
    let metric = async |name: &str| agent.metric(&format!("altiplano_{name}{{"), "tiny").await;
    let (grows, shrinks, cells) =
        (metric("context_grows_total").await, metric("context_shrinks_total").await, metric("context_tokens").await);
    println!("200 requests in {took:?}: {grows} growths to {cells} cells, {shrinks} times smaller");
    // From 2,048 for the first one, and for the second.
    assert!((1.0..=2.0).contains(&grows) && cells >= 16_000.0, "{grows} growths to {cells} cells; {}", agent.story());

    for (number, num_ctx) in [2048, 8192, 4096].into_iter().cycle().take(60).enumerate() {
        let options = json!({"num_ctx": num_ctx, "num_predict": 2});
        let prompt = format!("number {number}");
        let body = json!({"model": "tiny", "prompt": prompt, "raw": true, "stream": false, "options": options});
        let answer = post(&agent, "/api/generate", &body).await;
        assert_eq!(answer["eval_count"], 2, "{answer}");
    }
    assert!(metric("context_grows_total").await <= grows && metric("context_shrinks_total").await <= 1.0);
    assert_eq!(agent.log().matches("loading the model").count(), 1, "{}", agent.story());
    assert_eq!(workers(agent.pid()), worker, "the same process");
}

/// Bytes that the ledger has given away when this model alone is Ready.
async fn reserved(path: &std::path::Path, more: &str) -> f64 {
    let agent = Agent::start(&[], &["serve"], &[("one", path, more)], &[], &[]).await;
    agent.ready("one", 1).await;
    let reserved = agent.metric("altiplano_device_memory_reserved_bytes", "CPU").await;
    assert!(reserved > 0.0, "{}", agent.story());
    reserved
}

/// Two models that both outgrow what there is, and room for one of them to grow: both streams come to their end, none waits
/// for the other for ever, and what happened can be read.
#[tokio::test(flavor = "multi_thread")]
async fn two_models_that_want_the_same_memory_both_go_on() {
    let model = Spec { layers: 1, embd: 512, heads: 8, kv_heads: 8, ff: 64, ..Spec::default() };
    let (_folder, path) = written(&model);
    let more = |min: u32| {
        let traffic = "traffic: {queueTimeoutSeconds: 120}";
        format!(
            ", context: {{minTokens: {min}, maxTokens: 1024, parallel: 1}}, engine: {{gpu: Never, threads: 1}}, {traffic}"
        )
    };
    let (small, large) = (reserved(&path, &more(256)).await, reserved(&path, &more(1024)).await);
    // What one grows by, and the buffer that its state moves through: less than half of that.
    let limit = 2.0 * small + 1.75 * (large - small);
    let both = more(256);
    let models = [("a", path.as_path(), both.as_str()), ("b", path.as_path(), both.as_str())];
    let limit = format!("{limit:.0}");
    let agent = Agent::start(&[], &["serve"], &models, &["--memory-limit-bytes", &limit], &[]).await;
    agent.ready("a", 1).await;
    agent.ready("b", 1).await;
    let begun = Instant::now();
    let sing = |name: &'static str, number: usize| {
        let body = json!({"model": name, "prompt": tokens(number, 50), "max_tokens": 950, "temperature": 0});
        let agent = &agent;
        async move { post(agent, "/v1/completions", &body).await }
    };
    // Again where one had ended before the other wanted what it held.
    for number in 1.. {
        for answer in [futures::join!(sing("a", number), sing("b", number))].into_iter().flat_map(|(a, b)| [a, b]) {
            assert_eq!(answer["usage"]["completion_tokens"], 950, "{answer}");
            assert_eq!(answer["choices"][0]["finish_reason"], "length", "{answer}");
        }
        let mut all = Vec::new();
        for name in
            ["context_grows_total", "context_grows_refused_total", "context_waits_total", "context_shrinks_total"]
        {
            let of = async |model| agent.metric(&format!("altiplano_{name}{{"), &format!("\"{model}\"")).await;
            all.push((name, of("a").await, of("b").await));
        }
        println!("both in {:?}: {all:?}", begun.elapsed());
        let (_, grown, other) = all[0];
        assert!(grown >= 1.0 && other >= 1.0, "both have grown: {all:?}");
        let (refused, waited) = (all[1].1 + all[1].2, all[2].1 + all[2].2);
        if refused >= 1.0 && waited >= 1.0 {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "none was refused and waited: {all:?}");
    }
    for wrong in ["was killed by", "worker ended\" uid", "out of memory"] {
        assert!(!agent.log().contains(wrong), "{wrong}: {}", agent.story());
    }
    assert!(agent.said().contains("its context would grow: needs "), "{}", agent.story());
}

/// The value of a field in a line of the log.
fn field<'line>(line: &'line str, name: &str) -> &'line str {
    let start = format!("{name}=");
    let word = line.split([' ', '"']).find_map(|word| word.strip_prefix(&start));
    word.unwrap_or_else(|| panic!("no {name} in {line}"))
}

/// Each request's needed, granted and pool tokens at debug level, and one line for each truncation.
#[tokio::test(flavor = "multi_thread")]
async fn the_log_says_what_was_needed_and_what_was_cut() {
    let path = toy::path();
    let context =
        ", context: {minTokens: 256, maxTokens: 256, parallel: 1, overflow: DropOldest}, engine: {gpu: Never}";
    let models = [("toy", path.as_path(), context)];
    let agent = Agent::start(&[], &["serve"], &models, &[], &[("ALTIPLANO_LOG", "debug")]).await;
    agent.ready("toy", 1).await;
    let turn = |number: usize| {
        let user = json!({"role": "user", "content": format!("What is {number} plus {number}?")});
        [user, json!({"role": "assistant", "content": format!("{number} plus {number} is {}.", 2 * number)})]
    };
    let mut messages: Vec<Value> = (0..20).flat_map(turn).collect();
    messages.push(json!({"role": "user", "content": "Who are you?"}));
    let long = json!({"model": "toy", "messages": messages, "max_tokens": 8});
    let short = json!({"model": "toy", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 8});
    let mut cut = Value::Null;
    for (id, body) in [("the-long-one", &long), ("the-short-one", &short)] {
        let url = format!("{}/v1/chat/completions", agent.base());
        let response = agent.client.post(url).header("x-request-id", id).json(body).send().await.expect("an answer");
        assert_eq!(response.status(), 200);
        let answer: Value = response.json().await.expect("JSON");
        if id == "the-long-one" {
            cut = answer["altiplano"]["truncation"].clone();
        }
    }
    let lines = |words: &str| -> Vec<String> {
        agent.log().lines().filter(|line| line.contains(words)).map(str::to_owned).collect()
    };
    // The worker's log comes over a pipe.
    agent.until("both requests are in the log", || async { lines("request ended").len() >= 2 }).await;
    let truncations = lines("the prompt was truncated");
    assert_eq!(truncations.len(), 1, "{truncations:?}");
    let line = &truncations[0];
    assert_eq!((field(line, "request_id"), field(line, "model")), ("the-long-one", "default/toy"), "{line}");
    for name in ["tokens_before", "limit", "tokens_after", "dropped_messages"] {
        assert_eq!(field(line, name), cut[name].to_string(), "{line}");
    }
    assert_eq!(field(line, "policy"), "DropOldest");

    let contexts = lines("tokens of context");
    for id in ["the-long-one", "the-short-one"] {
        let mine: Vec<_> = contexts.iter().filter(|line| field(line, "request").starts_with(id)).collect();
        assert_eq!(mine.len(), 1, "{contexts:?}");
        for name in ["needed", "granted", "pool"] {
            assert_eq!(field(mine[0], name), "256", "{}", mine[0]);
        }
    }
}
