//! More models than fit, with real workers: who is unloaded for whom, who waits, and that everybody is served.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use altiplano_agent::runner::protocol::{MemoryUse, RunnerConfig};
use altiplano_agent::runner::spawn::Runner;
use altiplano_test_models::{Spec, toy};
use rustix::process::Signal;
use serde_json::json;
use support::{Agent, PATIENCE, chat, is_alive, kill, question, traffic, workers};

/// Bytes that the toy model takes on the CPU, by the dry run.
async fn need() -> u64 {
    let config = RunnerConfig { model_path: toy::path(), threads: 1, ..RunnerConfig::default() };
    let runner = Runner::of(env!("CARGO_BIN_EXE_altiplano-agent").into());
    let estimate = runner.estimate(&config, PATIENCE).await.expect("an estimate");
    estimate.memory.iter().map(MemoryUse::total).sum()
}

/// Twelve models where four fit, and six clients that ask anyone: nobody fails, everybody is served. Longer with
/// `ALTIPLANO_SOAK_SECONDS`.
#[tokio::test(flavor = "multi_thread")]
async fn twelve_models_share_room_for_four() {
    let more = ", unload: {minResidentSeconds: 1}, engine: {gpu: Never}, traffic: {queueTimeoutSeconds: 120}";
    let limit = (need().await * 9 / 2).to_string();
    traffic(more, &["--memory-limit-bytes", &limit], &[], 20).await;
}

/// Requests that come together load a model once, and a client that leaves takes nothing from the others.
#[tokio::test(flavor = "multi_thread")]
async fn loads_coalesce_and_outlive_who_asked_first() {
    let path = toy::path();
    // Longer than any of those requests may come late.
    let models = [("toy", path.as_path(), ", unload: {policy: AfterRequest, graceSeconds: 10}")];
    let agent = Arc::new(Agent::start(&[], &["serve"], &models, &[], &[]).await);
    agent.says("default/toy: Unloaded").await;
    agent.until("its worker is gone", || async { workers(agent.pid()).is_empty() }).await;
    let loads = || agent.log().matches("loading the model").count();
    let before = loads();
    let asks: Vec<_> = (0..8)
        .map(|_| {
            let agent = Arc::clone(&agent);
            tokio::spawn(async move { agent.check("toy").await })
        })
        .collect();
    let first = {
        let agent = Arc::clone(&agent);
        tokio::spawn(async move { agent.post(&chat("toy", &question().0)).await })
    };
    agent.until("the load has begun", || async { loads() > before }).await;
    first.abort();
    for ask in asks {
        ask.await.expect("an answer");
    }
    assert_eq!(loads(), before + 1, "{}", agent.story());
}

/// Two models that exclude each other: the second waits for no less than the first one's minimum residency, both are
/// served in turn, and a model that nobody may unload is said to be why.
#[tokio::test(flavor = "multi_thread")]
async fn who_excludes_each_other_takes_turns() {
    let path = toy::path();
    let more = ", unload: {minResidentSeconds: 2}, engine: {gpu: Never}";
    let models = [("a", path.as_path(), more), ("b", path.as_path(), more)];
    let limit = (need().await * 3 / 2).to_string();
    // One may be there as soon as the agent is ready.
    let begun = Instant::now();
    let agent = Agent::start(&[], &["serve"], &models, &["--memory-limit-bytes", &limit], &[]).await;
    for round in 1..=4 {
        agent.check(if round % 2 == 1 { "a" } else { "b" }).await;
    }
    let took = begun.elapsed();
    println!("four turns in {took:?}");
    assert!(took >= Duration::from_secs(6), "each had its two seconds: {took:?}; {}", agent.story());
    let evictions = agent.metric("altiplano_model_evictions_total", "\"a\"").await;
    assert!((1.0..=3.0).contains(&evictions), "{evictions}");
    drop(agent);

    let pinned = ", unload: {policy: Never}, engine: {gpu: Never}";
    let models = [("a", path.as_path(), pinned), ("b", path.as_path(), more)];
    let agent = Agent::start(&[], &["serve"], &models, &["--memory-limit-bytes", &limit], &[]).await;
    agent.says("default/a: Ready").await;
    let (status, answer) = agent.ask("b", &question().0).await;
    let message = answer["error"]["message"].as_str().unwrap_or_default();
    assert_eq!(status, 503, "{answer}");
    for words in ["InsufficientMemory", "needs ", " free", "held by default/a", "(pinned)"] {
        assert!(message.contains(words), "no {words:?} in {message}");
    }
}

/// A context that a request made larger shrinks when another model needs the room and nobody uses it: its worker stays, and
/// nobody is unloaded.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_context_shrinks_before_anybody_is_unloaded() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("model.gguf");
    // 4 KiB a token.
    let spec = Spec { layers: 2, embd: 512, heads: 8, kv_heads: 8, ff: 64, context: 8192, ..Spec::default() };
    spec.write(&file).expect("a model file");
    let more = |sizing: &str| {
        format!(
            ", unload: {{minResidentSeconds: 0}}, engine: {{gpu: Never, threads: 1}}, context: {{{sizing}, parallel: 1}}"
        )
    };
    let (first, second) = (more("minTokens: 1024"), more("sizing: Fixed, maxTokens: 8192"));
    let models = [("first", file.as_path(), first.as_str()), ("second", file.as_path(), second.as_str())];
    let predicted = {
        let agent = Agent::start(&[], &["serve"], &models, &[], &[]).await;
        agent.ready("first", 1).await;
        agent.ready("second", 1).await;
        agent.metric("altiplano_device_memory_reserved_bytes", "\"CPU\"").await
    };
    // The first has room for 6,144 tokens where the second is not there.
    let limit = format!("{:.0}", predicted + f64::from(12 << 20));
    let asleep =
        second.replace("minResidentSeconds: 0", "policy: AfterRequest, graceSeconds: 0, minResidentSeconds: 0");
    let models = [("first", file.as_path(), first.as_str()), ("second", file.as_path(), asleep.as_str())];
    let agent = Agent::start(&[], &["serve"], &models, &["--memory-limit-bytes", &limit], &[]).await;
    agent.ready("first", 1).await;
    agent.says("default/second: Unloaded").await;
    agent.until("the second is unloaded", || async { workers(agent.pid()).len() == 1 }).await;
    let [worker] = workers(agent.pid())[..] else { panic!("one worker: {}", agent.story()) };
    let tokens = async || agent.metric("altiplano_context_tokens{", "\"first\"").await;
    let before = tokens().await;
    let prompt: Vec<u32> = (0..3000).map(|number| 260 + number % 240).collect();
    let large = json!({"model": "first", "prompt": prompt, "max_tokens": 1});
    let url = format!("{}/v1/completions", agent.base());
    let answer = agent.client.post(url).json(&large).timeout(PATIENCE).send().await.expect("an answer");
    assert_eq!(answer.status().as_u16(), 200, "{}", agent.story());
    assert!(tokens().await > 3000.0, "it has grown: {}", agent.story());

    let mut body = chat("second", "Hello");
    body["max_tokens"] = json!(1);
    let answer = agent.post(&body).await.expect("an answer");
    assert_eq!(answer.status().as_u16(), 200, "{}", agent.story());
    assert!((tokens().await - before).abs() < 1.0, "{} tokens, {before} at first; {}", tokens().await, agent.story());
    assert!(workers(agent.pid()).contains(&worker), "the first one's worker has stayed: {}", agent.story());
    let evictions = agent.metric("altiplano_model_evictions_total", "\"first\"").await;
    assert!(evictions < 1.0, "{evictions}; {}", agent.story());
    assert!(agent.log().contains("asking for what the context has grown by"), "{}", agent.story());
}

/// Requests for a loaded model never wait behind loads: while as many models load as may they would not be answered at all if
/// they waited, because those loads stand still until they have been.
#[tokio::test(flavor = "multi_thread")]
async fn requests_for_a_loaded_model_do_not_wait_behind_loads() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("slow.gguf");
    // 128 MiB of context are filled with zeros when it is loaded.
    let spec = Spec { layers: 2, embd: 512, heads: 8, kv_heads: 8, ff: 64, context: 32_768, ..Spec::default() };
    spec.write(&file).expect("a model file");
    let slow = ", unload: {policy: AfterRequest, graceSeconds: 0}, engine: {gpu: Never, threads: 1}, \
                context: {sizing: Fixed, maxTokens: 32768, parallel: 1}";
    // As many as load at the same time.
    let names = ["one", "two", "three", "four"];
    let path = toy::path();
    let stays = ", unload: {policy: Never}, engine: {gpu: Never}";
    let mut models = vec![("toy", path.as_path(), stays)];
    models.extend(names.map(|name| (name, file.as_path(), slow)));
    let agent = Arc::new(Agent::start(&[], &["serve"], &models, &[], &[]).await);
    agent.ready("toy", 1).await;
    for name in names {
        agent.says(&format!("default/{name}: Unloaded")).await;
    }
    agent.until("one worker is left", || async { workers(agent.pid()).len() == 1 }).await;
    let [loaded] = workers(agent.pid())[..] else { panic!("one worker: {}", agent.story()) };
    let times = async || {
        let mut times = Vec::new();
        for _ in 0..20 {
            let begun = Instant::now();
            agent.check("toy").await;
            times.push(begun.elapsed());
        }
        times.sort();
        times
    };
    times().await;
    let before = times().await;

    let ask = |name: &'static str| {
        let agent = Arc::clone(&agent);
        let mut body = chat(name, "Hello");
        body["max_tokens"] = json!(1);
        tokio::spawn(async move { agent.post(&body).await.expect("an answer").status().as_u16() })
    };
    let mut asks = names.map(ask);
    let mut stopped = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while stopped.len() < names.len() {
        assert!(Instant::now() < deadline, "{stopped:?} load; {}", agent.story());
        // One that was faster than this test is asked for again.
        for (name, asked) in names.into_iter().zip(&mut asks) {
            if asked.is_finished() {
                let answered = std::mem::replace(asked, ask(name));
                assert_eq!(answered.await.expect("an answer"), 200, "{}", agent.story());
            }
        }
        stopped.retain(|worker| is_alive(*worker));
        for worker in workers(agent.pid()) {
            if worker != loaded && !stopped.contains(&worker) {
                kill(worker, Signal::STOP);
                stopped.push(worker);
            }
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // Any answer at all shows it; how fast they come is for `bench node`.
    let during = times().await;
    println!("median {:?}, while others load {:?}; slowest {:?}, {:?}", before[10], during[10], before[19], during[19]);
    assert!(asks.iter().all(|ask| !ask.is_finished()), "they still load");
    for worker in stopped {
        kill(worker, Signal::CONT);
    }
    for ask in asks {
        assert_eq!(ask.await.expect("an answer"), 200, "{}", agent.story());
    }
}

/// A request that comes just when its model is unloaded for being idle is held and answered, never failed.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_meets_the_unload_is_answered() {
    let path = toy::path();
    let more = ", unload: {policy: AfterRequest, graceSeconds: 0}, engine: {gpu: Never}";
    let agent = Agent::start(&[], &["serve"], &[("toy", path.as_path(), more)], &[], &[]).await;
    agent.says("default/toy: Unloaded").await;
    let unloads = || agent.log().matches("unloading the model").count();
    let before = unloads();
    // From the answer's end to the worker's end: the later the request, the further the unload has come. On a slow machine
    // it takes longer.
    let (mut requests, deadline) = (0_u64, Instant::now() + PATIENCE);
    while requests < 60 || unloads() < before + 20 {
        assert!(Instant::now() < deadline, "{} unloads in {requests} requests; {}", unloads() - before, agent.story());
        agent.check("toy").await;
        tokio::time::sleep(Duration::from_micros(500 * (requests % 60) * (1 + requests / 60))).await;
        requests += 1;
    }
    println!("{} unloads in {requests} requests", unloads() - before);
    assert!(!agent.said().contains("Failed"), "{}", agent.story());
}
