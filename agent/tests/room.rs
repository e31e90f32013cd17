//! More models than fit, with real workers: who is unloaded for whom, who waits, and that everybody is served.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use altiplano_agent::runner::protocol::{MemoryUse, RunnerConfig};
use altiplano_agent::runner::spawn::Runner;
use altiplano_test_models::toy;
use support::{Agent, Model, PATIENCE, chat, question, workers};

/// Bytes that the toy model takes on the CPU, by the dry run.
async fn need() -> u64 {
    let config = RunnerConfig { model_path: toy::path(), threads: 1, ..RunnerConfig::default() };
    let runner = Runner::of(env!("CARGO_BIN_EXE_altiplano-agent").into());
    let estimate = runner.estimate(&config, PATIENCE).await.expect("an estimate");
    estimate.memory.iter().map(MemoryUse::total).sum()
}

/// Numbers that look random; the same in every run.
fn random(state: &AtomicU64) -> usize {
    let next = state.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    let mixed = (next ^ (next >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    usize::try_from((mixed ^ (mixed >> 27)) >> 33).unwrap_or(0)
}

/// Twelve models where four fit, and six clients that ask anyone: nobody fails, everybody is served. Longer with
/// `ALTIPLANO_SOAK_SECONDS`.
#[tokio::test(flavor = "multi_thread")]
async fn twelve_models_share_room_for_four() {
    let soak = std::env::var("ALTIPLANO_SOAK_SECONDS").ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(20);
    let names: Vec<String> = (0..12).map(|number| format!("m{number}")).collect();
    let path = toy::path();
    let more = ", unload: {minResidentSeconds: 1}, engine: {gpu: Never}, traffic: {queueTimeoutSeconds: 120}";
    let models: Vec<Model<'_>> = names.iter().map(|name| (name.as_str(), path.as_path(), more)).collect();
    let limit = (need().await * 9 / 2).to_string();
    let agent = Arc::new(Agent::start(&[], &["serve"], &models, &["--memory-limit-bytes", &limit], &[]).await);
    agent.until("it is ready", || async { agent.get("/readyz").await.is_some() }).await;

    let (seed, until) = (Arc::new(AtomicU64::new(42)), Instant::now() + Duration::from_secs(soak));
    let clients = (0..6).map(|number| {
        let (agent, seed, names) = (Arc::clone(&agent), Arc::clone(&seed), names.clone());
        tokio::spawn(async move {
            let mut served = vec![0_u32; names.len()];
            let (mut honest, mut longest) = (0, Duration::ZERO);
            let (question, expected) = question();
            // Two each, so that all twelve are asked for, then anyone.
            let mut first = [2 * number, 2 * number + 1].into_iter();
            loop {
                let model = match first.next() {
                    Some(model) => model,
                    None if Instant::now() < until => random(&seed) % names.len(),
                    None => break,
                };
                let asked = Instant::now();
                let response = agent.post(&chat(&names[model], &question)).await.expect("an answer");
                let (status, retry) = (response.status().as_u16(), response.headers().contains_key("retry-after"));
                let answer = response.text().await.expect("a body");
                match status {
                    200 => {
                        let answer: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
                        assert_eq!(answer["choices"][0]["message"]["content"], expected);
                        served[model] += 1;
                    }
                    503 if retry => honest += 1,
                    _ => panic!("{status}: {answer}; {}", agent.story()),
                }
                longest = longest.max(asked.elapsed());
            }
            (served, honest, longest)
        })
    });
    let mut served = vec![0; names.len()];
    let (mut honest, mut longest) = (0, Duration::ZERO);
    for client in futures::future::join_all(clients).await {
        let (its, refused, wait) = client.expect("a client that saw nothing wrong");
        served.iter_mut().zip(its).for_each(|(sum, one)| *sum += one);
        honest += refused;
        longest = longest.max(wait);
    }
    let held = workers(agent.pid()).len();
    assert!(held <= 4, "{held} workers where four fit");
    let mut evictions = 0.0;
    for name in &names {
        evictions += agent.metric("altiplano_model_evictions_total", &format!("\"{name}\"")).await;
    }
    println!("served {served:?}, {honest} honest refusals, {evictions} evictions, longest wait {longest:?}");
    assert!(served.iter().all(|count| *count > 0), "not everybody was served: {served:?}; {}", agent.story());
    assert!(evictions > 0.0);
    for wrong in ["was killed by", "worker ended\" uid", "out of memory", "InsufficientMemory: the"] {
        assert!(!agent.log().contains(wrong), "{wrong}: {}", agent.story());
    }
}

/// Requests that come together load a model once, and a client that leaves takes nothing from the others.
#[tokio::test(flavor = "multi_thread")]
async fn loads_coalesce_and_outlive_who_asked_first() {
    let path = toy::path();
    let models = [("toy", path.as_path(), ", unload: {policy: AfterRequest, graceSeconds: 1}")];
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
    let agent = Agent::start(&[], &["serve"], &models, &["--memory-limit-bytes", &limit], &[]).await;
    let begun = Instant::now();
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
