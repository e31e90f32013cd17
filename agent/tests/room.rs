//! More models than fit, with real workers: who is unloaded for whom, who waits, and that everybody is served.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use altiplano_agent::runner::protocol::{MemoryUse, RunnerConfig};
use altiplano_agent::runner::spawn::Runner;
use altiplano_test_models::toy;
use support::{Agent, PATIENCE, chat, question, traffic, workers};

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
