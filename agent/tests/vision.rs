//! Images on real llama.cpp: random models with random projectors, so what is told apart are log-probabilities.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

#[path = "vision/api.rs"]
mod api;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use altiplano_agent::engine::{
    Ability, Engine, EngineStats, GenerateEvent, GenerateRequest, Generation, MediaPrompt, Picture, SamplingParams,
    SubmitError, Token, Usage,
};
use altiplano_agent::runner::protocol::RunnerConfig;
use altiplano_crds::model_deployment::{ContextSizing, ContextSpec};
use altiplano_test_models::{Architecture, Projector, ProjectorKind, Spec};
use futures::StreamExt;

const PATIENCE: Duration = Duration::from_mins(2);

/// How far log-probabilities of the same may be apart.
const NEAR: f32 = 0.05;

/// How far those after different images are apart at least.
const FAR: f32 = 0.3;

const KINDS: [(ProjectorKind, Architecture); 4] = [
    (ProjectorKind::Mlp, Architecture::Llama),
    (ProjectorKind::Gemma3, Architecture::Llama),
    (ProjectorKind::Gemma3, Architecture::Gemma3),
    (ProjectorKind::Qwen2vl, Architecture::Qwen2vl),
];

fn context(parallel: i32) -> ContextSpec {
    ContextSpec { min_tokens: Some(2048), max_tokens: Some(2048), parallel, ..ContextSpec::default() }
}

/// A model that reads images; `change` may make the projector a slow one.
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

/// A projector that takes a while: some seconds on a slow CPU.
fn slow(projector: &mut Projector) {
    *projector = Projector { image_size: 448, embd: 256, heads: 4, ff: 1024, layers: 8, ..projector.clone() };
}

fn picture(seed: u8, width: u32, height: u32) -> Arc<Picture> {
    let pixel = |place: u32| u8::try_from((place * (u32::from(seed) + 3) / 7) % 256).unwrap();
    let pixels = (0..width * height * 3).map(pixel).collect();
    Arc::new(Picture::new(width, height, pixels, [seed; 32]).unwrap())
}

/// A prompt of pieces of text with an image after each but the last.
fn prompt(engine: &Engine, texts: &[&str], images: &[Arc<Picture>]) -> GenerateRequest {
    let text = texts.join(engine.image_marker().unwrap());
    let MediaPrompt { tokens, media } = engine.read(&text, true, images).unwrap();
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
        match tokio::time::timeout(PATIENCE, generation.next()).await.unwrap() {
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

async fn until(engine: &Engine, what: &str, is_so: impl Fn(&EngineStats) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so(&engine.stats()) {
        assert!(Instant::now() < deadline, "waited for: {what}; {:?}", engine.stats());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

const LONG: &str = "Once upon a time there was a llama who lived on a high plain and looked at pictures all day. ";

/// The same image says the same, another one something else; what was read before is not read again, and the answer is
/// as if it were.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_told_from_another_and_read_once() {
    for kind in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let engine = start(folder.path(), kind, context(4), |_| {});
        assert!(engine.model().can(Ability::Vision) && !engine.model().can(Ability::Audio));
        let (one, other) = (picture(1, 64, 64), picture(2, 64, 64));
        let fresh = |image: &Arc<Picture>, end: &str| GenerateRequest {
            cache_prompt: false,
            ..prompt(&engine, &[LONG, end], std::slice::from_ref(image))
        };
        let (first, usage) = ask(&engine, &fresh(&one, "What is it?")).await;
        let (again, _) = ask(&engine, &fresh(&one, "What is it?")).await;
        let (another, _) = ask(&engine, &fresh(&other, "What is it?")).await;
        assert!(distance(&first, &again) < NEAR, "{kind:?}: {first:?} {again:?}");
        assert!(distance_of_all(&first, &another) > FAR, "{kind:?}: {first:?} {another:?}");
        assert_eq!(engine.stats().pictures, 2, "{kind:?}: computed once each");
        let text = engine.tokenize(LONG, true, true).unwrap().len();
        assert!(usage.prompt_tokens as usize > text + 16, "{kind:?}: an image counts: {usage:?}");

        // A second question about the image goes on behind it; one about another image goes on before it.
        let expected = ask(&engine, &fresh(&one, "And who made it?")).await;
        let found = ask(&engine, &GenerateRequest { cache_prompt: true, ..fresh(&one, "And who made it?") }).await;
        assert!(distance(&expected.0, &found.0) < NEAR, "{kind:?}: {expected:?} {found:?}");
        let cached = found.1.cached_tokens as usize;
        assert!(cached > text + 15, "{kind:?}: the image was there: {found:?}");
        assert_eq!(expected.1.prompt_tokens, found.1.prompt_tokens);
        let third = picture(3, 64, 64);
        let expected = ask(&engine, &fresh(&third, "And who made it?")).await;
        let found = ask(&engine, &GenerateRequest { cache_prompt: true, ..fresh(&third, "And who made it?") }).await;
        assert!(distance(&expected.0, &found.0) < NEAR, "{kind:?}: {expected:?} {found:?}");

        // Two images, and an image at the end of the prompt.
        for texts in [[LONG, " or ", "?"], [LONG, " or ", ""]] {
            let both = prompt(&engine, &texts, &[Arc::clone(&one), Arc::clone(&other)]);
            let swapped = prompt(&engine, &texts, &[Arc::clone(&other), Arc::clone(&one)]);
            let expected = ask(&engine, &GenerateRequest { cache_prompt: false, ..both.clone() }).await;
            for _ in 0..2 {
                let found = ask(&engine, &both).await;
                assert!(distance(&expected.0, &found.0) < NEAR, "{kind:?}: {expected:?} {found:?}");
            }
            let swapped = ask(&engine, &swapped).await.0;
            assert!(distance_of_all(&expected.0, &swapped) > 2.0 * NEAR, "{kind:?}: {expected:?} {swapped:?}");
        }
        engine.shutdown(Instant::now());
    }
}

/// Many at once, with equal and different images, say what each says alone; in a split cache too.
#[tokio::test(flavor = "multi_thread")]
async fn images_in_company() {
    let fixed = ContextSpec { sizing: ContextSizing::Fixed, max_tokens: Some(1024), ..context(4) };
    for (kind, context) in KINDS.into_iter().flat_map(|kind| [(kind, context(4)), (kind, fixed.clone())]) {
        let folder = tempfile::tempdir().unwrap();
        let engine = start(folder.path(), kind, context, |_| {});
        let images: Vec<_> = (0..3).map(|seed| picture(seed, 64, 48)).collect();
        let requests: Vec<_> = (0..12_usize)
            .map(|number| {
                let end = format!("Question {}?", number % 5);
                prompt(&engine, &[LONG, &end], &images[number % 3..=number % 3])
            })
            .collect();
        let (alone, found) = alone_and_together(&engine, &requests, 20).await;
        for (number, ((found, usage), alone)) in found.iter().zip(&alone).enumerate() {
            assert!(distance(alone, found) < NEAR, "{kind:?} {number}: {alone:?} {found:?} {usage:?}");
        }
        assert!(engine.stats().cached_prompt_tokens > 500, "{:?}", engine.stats());
        engine.shutdown(Instant::now());
    }
}

/// Streams go on while an image is computed, and who gives up does not hold the next one up.
#[tokio::test(flavor = "multi_thread")]
async fn streams_go_on_beside_an_image() {
    let folder = tempfile::tempdir().unwrap();
    let engine = start(folder.path(), (ProjectorKind::Gemma3, Architecture::Llama), context(4), slow);
    let large = prompt(&engine, &[LONG, "What is it?"], &[picture(1, 448, 448)]);
    let began = Instant::now();
    ask(&engine, &large).await;
    let alone = began.elapsed();
    assert!(alone > Duration::from_millis(200), "not slow enough to see anything: {alone:?}");

    let endless = GenerateRequest {
        prompt: engine.tokenize("Tell me a story", true, true).unwrap(),
        max_tokens: Some(1900),
        ignore_eos: true,
        ..GenerateRequest::default()
    };
    let mut stream = engine.submit(endless.clone()).unwrap();
    let other = prompt(&engine, &[LONG, "What is it?"], &[picture(2, 448, 448)]);
    let asked = tokio::spawn(read(engine.submit(other).unwrap()));
    let (mut longest, mut last, mut tokens) = (Duration::ZERO, Instant::now(), 0);
    while !asked.is_finished() {
        match tokio::time::timeout(PATIENCE, stream.next()).await.unwrap() {
            Some(GenerateEvent::Token { .. }) => {}
            Some(GenerateEvent::Done { .. }) => {
                stream = engine.submit(endless.clone()).unwrap();
            }
            other => panic!("{other:?}"),
        }
        longest = longest.max(last.elapsed());
        last = Instant::now();
        tokens += 1;
    }
    eprintln!("alone {alone:?}; beside it {tokens} tokens, {longest:?} apart at most");
    assert!(tokens >= 5 && longest < alone / 2, "alone {alone:?}; {tokens} tokens, {longest:?} apart at most");
    drop(stream);

    // Cancelled while it is computed.
    let pictures = engine.stats().pictures;
    let third = prompt(&engine, &[LONG, "What is it?"], &[picture(3, 448, 448)]);
    let given_up = engine.submit(third.clone()).unwrap();
    until(&engine, "the prompt is being read", |stats| stats.running == 1 && stats.step_age > Duration::ZERO).await;
    tokio::time::sleep(Duration::from_millis(60)).await;
    drop(given_up);
    let began = Instant::now();
    until(&engine, "it has left", |stats| stats.running == 0).await;
    assert!(began.elapsed() < alone / 2, "{:?} of {alone:?}", began.elapsed());
    assert_eq!(engine.stats().pictures, pictures, "what nobody wants is not computed to its end");
    let (top, _) = ask(&engine, &third).await;
    assert!(!top.is_empty());

    // It ends in time with an image half done.
    let fourth = engine.submit(prompt(&engine, &[LONG, "What is it?"], &[picture(4, 448, 448)])).unwrap();
    tokio::time::sleep(Duration::from_millis(60)).await;
    let began = Instant::now();
    let ending = engine.clone();
    tokio::task::spawn_blocking(move || ending.shutdown(Instant::now())).await.unwrap();
    assert!(began.elapsed() < alone / 2, "{:?} of {alone:?}", began.elapsed());
    drop(fourth);
}

/// One that gives its cells away in the middle of a prompt with images comes back for them.
#[tokio::test(flavor = "multi_thread")]
async fn room_for_images_is_made_and_found() {
    for kind in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let context =
            ContextSpec { min_tokens: Some(256), max_tokens: Some(512), parallel: 4, ..ContextSpec::default() };
        let engine = start(folder.path(), kind, context, |_| {});
        let images: Vec<_> = (0..4).map(|seed| picture(seed, 64, 64)).collect();
        let requests: Vec<_> = images
            .iter()
            .map(|image| prompt(&engine, &[LONG, "Why?"], std::slice::from_ref(image)))
            .map(|request| GenerateRequest { ignore_eos: true, ..request })
            .collect();
        let (alone, found) = alone_and_together(&engine, &requests, 250).await;
        for ((found, usage), alone) in found.iter().zip(&alone) {
            assert_eq!(usage.completion_tokens, 250);
            assert!(distance(alone, found) < NEAR, "{kind:?}: {alone:?} {found:?}");
        }
        assert!(engine.stats().resizes > 0, "{:?}", engine.stats());
        engine.shutdown(Instant::now());
    }
}

/// Of any shape that the API lets through, for every kind of projector.
#[tokio::test(flavor = "multi_thread")]
async fn images_of_any_shape() {
    for kind in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let engine = start(folder.path(), kind, context(2), |_| {});
        let shapes = [(1, 1), (1, 200), (200, 1), (3000, 15), (17, 31), (500, 300), (64, 64)];
        for ((width, height), seed) in shapes.into_iter().zip(0..) {
            let request = prompt(&engine, &["See ", "?"], &[picture(seed, width, height)]);
            let request = GenerateRequest { max_tokens: Some(1), ..request };
            let (top, usage) = ask(&engine, &request).await;
            assert!(!top.is_empty() && usage.prompt_tokens as usize == request.prompt.len(), "{kind:?}: {usage:?}");
        }
        engine.shutdown(Instant::now());
    }
}

/// What stands for images cannot be made up, and a model that reads text only says so.
#[tokio::test]
async fn what_is_no_image_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let engine = start(folder.path(), KINDS[0], context(1), |_| {});
    let good = prompt(&engine, &["See ", "?"], &[picture(1, 64, 64)]);
    let marker = engine.image_marker().unwrap();
    assert!(engine.read(marker, true, &[]).is_err());
    assert!(engine.read("no place", true, &[picture(1, 64, 64)]).is_err());
    let text_only = GenerateRequest { media: altiplano_agent::engine::Media::default(), ..good.clone() };
    assert!(matches!(engine.submit(text_only), Err(SubmitError::InvalidToken { .. })));
    let mut moved = good.clone();
    moved.prompt.insert(0, 5);
    assert!(matches!(engine.submit(moved), Err(SubmitError::InvalidParameter(_))));
    let mut cut = good;
    cut.prompt.truncate(20);
    assert!(matches!(engine.submit(cut), Err(SubmitError::InvalidParameter(_))));
    assert!(Picture::new(2, 2, vec![0; 11], [0; 32]).is_none() && Picture::new(0, 2, vec![], [0; 32]).is_none());

    let model_path = folder.path().join("model.gguf");
    let config = RunnerConfig { model_path, threads: 2, ..RunnerConfig::default() };
    let blind = Engine::start(&config, &|_| {}).unwrap();
    assert!(!blind.model().can(Ability::Vision) && blind.image_marker().is_none());
    assert!(blind.read("See?", true, &[]).is_err());
}
