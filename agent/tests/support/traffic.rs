//! More models than fit, and clients that ask anyone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use altiplano_test_models::toy;

use super::{Agent, Model, PATIENCE, chat, question, workers};

/// Numbers that look random; the same in every run.
fn random(state: &AtomicU64) -> usize {
    let next = state.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    let mixed = (next ^ (next >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    usize::try_from((mixed ^ (mixed >> 27)) >> 33).unwrap_or(0)
}

/// Twelve models with `more` in their specs, by an agent with room for four, and six clients that ask anyone: nobody fails,
/// everybody is served. `ALTIPLANO_SOAK_SECONDS` in place of `seconds`.
pub async fn traffic(more: &str, options: &[&str], env: &[(&str, &str)], seconds: u64) {
    let soak = std::env::var("ALTIPLANO_SOAK_SECONDS").ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(seconds);
    let names: Vec<String> = (0..12).map(|number| format!("m{number}")).collect();
    let path = toy::path();
    let models: Vec<Model<'_>> = names.iter().map(|name| (name.as_str(), path.as_path(), more)).collect();
    let agent = Arc::new(Agent::start(&[], &["serve"], &models, options, env).await);

    let (seed, until) = (Arc::new(AtomicU64::new(42)), Instant::now() + Duration::from_secs(soak));
    let clients = (0..6).map(|number| {
        let (agent, seed, names) = (Arc::clone(&agent), Arc::clone(&seed), names.clone());
        tokio::spawn(async move {
            let mut served = vec![0_u32; names.len()];
            let (mut honest, mut longest) = (0, Duration::ZERO);
            let (question, expected) = question();
            // Two each until they have been served, so that all twelve are, then anyone.
            let (mut first, deadline) = (vec![2 * number, 2 * number + 1], until + PATIENCE);
            loop {
                let now = Instant::now();
                let model = match first.last() {
                    Some(model) if now < deadline => *model,
                    _ if now < until => random(&seed) % names.len(),
                    _ => break,
                };
                let asked = Instant::now();
                let body = chat(&names[model], &question);
                let url = format!("{}/v1/chat/completions", agent.base());
                // Who waits for room is told so before its patience ends.
                let response = agent.client.post(url).json(&body).timeout(2 * PATIENCE).send().await;
                let response = response.unwrap_or_else(|error| panic!("{error:?}; {}", agent.story()));
                let (status, retry) = (response.status().as_u16(), response.headers().contains_key("retry-after"));
                let answer = response.text().await.expect("a body");
                match status {
                    200 => {
                        let answer: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
                        assert_eq!(answer["choices"][0]["message"]["content"], expected);
                        served[model] += 1;
                        first.retain(|other| *other != model);
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
    agent.until("no more workers than fit", || async { workers(agent.pid()).len() <= 4 }).await;
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
