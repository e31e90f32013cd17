//! Images and sound on real llama.cpp: random models with random projectors, so what is told apart are log-probabilities.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

#[path = "media/audio.rs"]
mod audio;
#[path = "media/audio_api.rs"]
mod audio_api;
#[path = "media/images.rs"]
mod images;
#[path = "media/images_api.rs"]
mod images_api;
#[path = "support/engine.rs"]
mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use altiplano_agent::engine::{
    Engine, EngineStats, GenerateEvent, GenerateRequest, Generation, MediaPrompt, Medium, SamplingParams, Token, Usage,
};
use altiplano_agent::runner::protocol::RunnerConfig;
use altiplano_crds::model_deployment::{ContextSizing, ContextSpec};
use altiplano_test_models::{Architecture, Projector, ProjectorKind, Spec};
use support::until;

/// How far log-probabilities of the same may be apart.
const NEAR: f32 = 0.05;

fn context(parallel: i32) -> ContextSpec {
    ContextSpec { min_tokens: Some(2048), max_tokens: Some(2048), parallel, ..ContextSpec::default() }
}

/// A model with a projector; `change` may make the projector a slow one.
fn start(
    folder: &Path,
    (kind, architecture): (ProjectorKind, Architecture),
    context: ContextSpec,
    change: impl FnOnce(&mut Projector),
) -> Engine {
    let (model_path, path) = (folder.join("model.gguf"), folder.join("mmproj.gguf"));
    let spec = Spec { architecture, ..Spec::default() };
    spec.write(&model_path).unwrap();
    let mut projector = Projector::of(kind, &spec);
    change(&mut projector);
    projector.write(&path).unwrap();
    let config = RunnerConfig { model_path, projector: Some(path), context, threads: 2, ..RunnerConfig::default() };
    Engine::start(&config, &|_| {}).unwrap()
}

/// A prompt of pieces of text with an image or a sound after each but the last.
fn prompt(engine: &Engine, texts: &[&str], media: &[Medium]) -> GenerateRequest {
    let text = texts.join(engine.media_marker().unwrap());
    let MediaPrompt { tokens, media } = engine.read(&text, true, media).unwrap();
    GenerateRequest {
        prompt: tokens,
        media,
        max_tokens: Some(1),
        logprobs: Some(20),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        ..GenerateRequest::default()
    }
}

type Top = BTreeMap<Token, f32>;

async fn read(mut generation: Generation) -> (Top, Usage) {
    let mut first = None;
    loop {
        match support::next(&mut generation).await {
            Some(GenerateEvent::Token { logprob: Some(logprob), .. }) => {
                first.get_or_insert(logprob.top.iter().map(|top| (top.token, top.logprob)).collect());
            }
            Some(GenerateEvent::Token { .. } | GenerateEvent::Progress(_)) => {}
            Some(GenerateEvent::Done { usage, .. }) => return (first.unwrap_or_default(), usage),
            other => panic!("{other:?}"),
        }
    }
}

async fn ask(engine: &Engine, request: &GenerateRequest) -> (Top, Usage) {
    read(engine.submit(request.clone()).unwrap()).await
}

/// What each request finds alone, with nothing to reuse, and what all find at once, generating `tokens` each.
async fn alone_and_together(
    engine: &Engine,
    requests: &[GenerateRequest],
    tokens: u32,
) -> (Vec<Top>, Vec<(Top, Usage)>) {
    let mut alone = Vec::new();
    for request in requests {
        alone.push(ask(engine, &GenerateRequest { cache_prompt: false, ..request.clone() }).await.0);
    }
    let streams: Vec<_> = requests
        .iter()
        .map(|request| engine.submit(GenerateRequest { max_tokens: Some(tokens), ..request.clone() }).unwrap())
        .collect();
    (alone, futures::future::join_all(streams.into_iter().map(read)).await)
}

/// So many requests at once about three images or sounds, each of `tokens` tokens, find what each finds alone.
async fn in_company(engine: &Engine, media: &[Medium], count: usize, tokens: u32, what: &str) {
    let requests: Vec<_> = (0..count)
        .map(|number| {
            let end = format!("Question {}?", number % 5);
            prompt(engine, &[LONG, &end], &media[number % 3..=number % 3])
        })
        .collect();
    let (alone, found) = alone_and_together(engine, &requests, tokens).await;
    for (number, ((found, usage), alone)) in found.iter().zip(&alone).enumerate() {
        assert!(distance(alone, found) < NEAR, "{what} {number}: {alone:?} {found:?} {usage:?}");
    }
    assert!(engine.stats().cached_prompt_tokens > 500, "{:?}", engine.stats());
}

/// The greatest difference among the most probable tokens; one that the other does not have counts as its least.
fn distance(left: &Top, right: &Top) -> f32 {
    distance_down_to(5.0, left, right)
}

/// The same among all that are known, for what must differ: some models are nearly sure of one token.
fn distance_of_all(left: &Top, right: &Top) -> f32 {
    distance_down_to(100.0, left, right)
}

fn distance_down_to(depth: f32, left: &Top, right: &Top) -> f32 {
    let highest = left.values().copied().fold(f32::MIN, f32::max);
    let least = right.values().copied().fold(0.0, f32::min);
    let best = left.iter().filter(|(_, logprob)| **logprob > highest - depth);
    let differences = best.map(|(token, logprob)| (right.get(token).unwrap_or(&least) - logprob).abs());
    differences.fold(0.0, f32::max)
}

/// How long a request with a slow picture or sound takes alone.
async fn alone(engine: &Engine, request: &GenerateRequest) -> Duration {
    let began = Instant::now();
    ask(engine, request).await;
    let alone = began.elapsed();
    assert!(alone > Duration::from_millis(50), "not slow enough to see anything: {alone:?}");
    alone
}

/// Who gives up while a picture or sound is computed, which takes `alone` in all, does not hold the next one up, and what
/// nobody wants is not computed to its end. With another medium each time, and again where a busy machine came too late to
/// see it. `computed` are those that were computed to their end.
async fn is_given_up(
    engine: &Engine,
    request: impl Fn(u8) -> GenerateRequest,
    alone: Duration,
    computed: impl Fn(&EngineStats) -> u64,
) {
    let mut seen = Vec::new();
    for round in 0..10 {
        let before = computed(&engine.stats());
        let given_up = engine.submit(request(round)).unwrap();
        let is_read = |stats: &EngineStats| stats.running == 1 && stats.step_age > Duration::ZERO;
        until(engine, "the prompt is being read", |stats| is_read(stats) || computed(stats) > before).await;
        tokio::time::sleep(alone / 10).await;
        drop(given_up);
        let began = Instant::now();
        let stats = until(engine, "it has left", |stats| stats.running == 0).await;
        let (took, computed) = (began.elapsed(), computed(&stats) - before);
        if took < alone / 2 && computed == 0 {
            // It is computed for who comes after.
            assert!(!ask(engine, &request(round)).await.0.is_empty());
            return;
        }
        seen.push((took, computed));
    }
    panic!("{alone:?} alone; given up, each time it took, and so many were computed to their end: {seen:?}");
}

const LONG: &str = "Once upon a time there was a llama who lived on a high plain and looked at pictures all day. ";
