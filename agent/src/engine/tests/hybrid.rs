//! Models of which some layers keep a state that every token changes, and others keys and values of every token: whatever
//! happens to a sequence, what it says is what the model says to its tokens, read in one piece.

use std::path::Path;

use altiplano_test_models::{Architecture, Spec};

use super::*;
use crate::engine::request::{Token, Usage};

/// Log-probabilities of one and the same place may lie so far apart, where a text was read in other pieces and in other
/// company: three times what was measured.
const BOUND: f32 = 0.03;

/// Large enough that rounding shows.
pub(super) fn spec() -> Spec {
    Spec { architecture: Architecture::Qwen35, layers: 4, embd: 128, heads: 4, kv_heads: 2, ..Spec::default() }
}

fn hybrid(folder: &Path) -> PathBuf {
    let path = folder.join("hybrid.gguf");
    spec().write(&path).expect("the model is written");
    path
}

pub(super) fn context(min_tokens: i32, max_tokens: i32, parallel: i32) -> ContextSpec {
    ContextSpec { min_tokens: Some(min_tokens), max_tokens: Some(max_tokens), parallel, ..ContextSpec::default() }
}

fn start(model: &Path, context: ContextSpec) -> Engine {
    Engine::start(&RunnerConfig { context, ..config(model.to_path_buf()) }, &|_| {}).expect("the engine starts")
}

/// Tokens of printable text, different for each seed.
pub(super) fn tokens(length: usize, seed: u32) -> Vec<Token> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        40 + i32::try_from((state >> 16) % 60).expect("below 60")
    };
    (0..length).map(|_| next()).collect()
}

pub(super) fn request(prompt: &[Token], count: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: prompt.to_vec(),
        max_tokens: Some(count),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        ignore_eos: true,
        logprobs: Some(5),
        ..GenerateRequest::default()
    }
}

/// Each token with the most probable ones at its place.
pub(super) type Said = Vec<(Token, Vec<(Token, f32)>)>;

pub(super) async fn hear(mut generation: Generation) -> (Said, Usage) {
    let mut said = Said::new();
    loop {
        let event = tokio::time::timeout(Duration::from_mins(1), generation.next()).await;
        match event.expect("an event within a minute").expect("an end") {
            GenerateEvent::Token { token, logprob: Some(logprob), .. } => {
                said.push((token, logprob.top.iter().map(|top| (top.token, top.logprob)).collect()));
            }
            GenerateEvent::Token { .. } | GenerateEvent::Progress(_) => {}
            GenerateEvent::Done { usage, .. } => return (said, usage),
            GenerateEvent::Failed(error) => panic!("{error} after {} tokens", said.len()),
        }
    }
}

pub(super) async fn ask(engine: &Engine, request: GenerateRequest) -> (Said, Usage) {
    hear(engine.submit(request).expect("the request is taken")).await
}

pub(super) fn text(prompt: &[Token], said: &Said) -> Vec<Token> {
    prompt.iter().copied().chain(said.iter().map(|(token, _)| *token)).collect()
}

/// What was said after a prompt is what the model says there when it reads all before in one piece, alone.
pub(super) async fn is_the_models_own(judge: &Engine, what: &str, prompt: &[Token], said: &Said) {
    let whole = text(prompt, said);
    let mut most = 0.0_f32;
    for place in (0..said.len()).step_by(said.len().div_ceil(7)) {
        let read = GenerateRequest { cache_prompt: false, ..request(&whole[..prompt.len() + place], 1) };
        let (judged, usage) = ask(judge, read).await;
        assert_eq!(usage.cached_tokens, 0);
        for (token, logprob) in &said[place].1 {
            let found = judged[0].1.iter().find(|(other, _)| other == token);
            // The last of the five may have changed places with the sixth.
            let apart = found.map_or(0.0, |(_, other)| (other - logprob).abs());
            most = most.max(apart);
        }
        let found = said[place].1.iter().filter(|(token, _)| judged[0].1.iter().any(|(other, _)| other == token));
        assert!(found.count() >= 3, "{what}, place {place}: {:?} {:?}", said[place], judged[0]);
    }
    println!("{what}: most apart {most}");
    assert!(most <= BOUND, "{what}: {most} apart");
}

#[tokio::test]
async fn prefixes_copies_and_company_change_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = hybrid(folder.path());
    let judge = start(&model, context(2048, 2048, 1));
    let engine = start(&model, context(2048, 2048, 4));
    assert!(engine.model().copied && engine.report().notes.iter().any(|note| note.contains("cannot be cut")));
    // A border of a message within it, as one finds it that differs behind it.
    let prompt = tokens(400, 1);
    let (first, usage) = ask(&engine, GenerateRequest { borders: vec![150, 300], ..request(&prompt, 60) }).await;
    assert_eq!(usage.cached_tokens, 0);
    is_the_models_own(&judge, "alone", &prompt, &first).await;
    // Were a single token missing in the middle of it, it would show.
    let (less, _) = ask(&judge, request(&[&prompt[..199], &prompt[200..]].concat(), 1)).await;
    let apart = less[0].1.iter().filter_map(|(token, logprob)| {
        let found = first[0].1.iter().find(|(other, _)| other == token);
        found.map(|(_, other)| (other - logprob).abs())
    });
    let apart = apart.fold(0.0_f32, f32::max);
    println!("one token less: {apart} apart");
    assert!(apart > 2.0 * BOUND || less[0].1[0].0 != first[0].1[0].0, "{less:?} {first:?}");
    let cases = [
        ("again", prompt.clone(), 399),
        ("parted at a message", [&prompt[..300], &tokens(80, 2)].concat(), 300),
        ("parted within a message", [&prompt[..299], &tokens(80, 3)].concat(), 150),
        ("went on", [text(&prompt, &first), tokens(20, 4)].concat(), 459),
    ];
    for (what, prompt, cached) in cases {
        let (said, usage) = ask(&engine, request(&prompt, 40)).await;
        // The last token of an answer is not read any more.
        assert_eq!(usage.cached_tokens, cached, "{what}");
        is_the_models_own(&judge, what, &prompt, &said).await;
    }
    // Beside each other, some with an equal beginning, read at the same time.
    let prompts: Vec<_> = (10..14).map(|seed| [&prompt[..200], &tokens(100, seed)].concat()).collect();
    let asked: Vec<_> = prompts
        .iter()
        .map(|prompt| GenerateRequest { cache: salt("together"), ..request(prompt, 80) })
        .map(|request| engine.submit(request).expect("the request is taken"))
        .collect();
    for (prompt, (said, _)) in prompts.iter().zip(futures::future::join_all(asked.into_iter().map(hear)).await) {
        is_the_models_own(&judge, "together", prompt, &said).await;
    }
    // In mid-answer and in the middle of a prompt others go.
    for length in [30, 1500] {
        let stays = engine.submit(request(&prompts[0], 100)).expect("the request is taken");
        let mut goes = engine.submit(request(&tokens(length, 20), 400)).expect("the request is taken");
        if length < 100 {
            for _ in 0..20 {
                goes.next().await.expect("a token");
            }
        }
        drop(goes);
        let (said, _) = hear(stays).await;
        is_the_models_own(&judge, "left alone", &prompts[0], &said).await;
    }
    let patience = Instant::now() + Duration::from_mins(1);
    while engine.stats().running > 0 {
        assert!(Instant::now() < patience, "{:?}", engine.stats());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let (said, _) = ask(&engine, request(&tokens(90, 30), 40)).await;
    is_the_models_own(&judge, "after those that went", &tokens(90, 30), &said).await;
    assert_eq!(engine.stats().failed, 0);
    judge.shutdown(Instant::now());
    engine.shutdown(Instant::now());
}

pub(super) fn salt(salt: &str) -> CacheKey {
    CacheKey { salt: salt.to_owned(), ..CacheKey::default() }
}

/// The context grows under two streams and shrinks again.
#[tokio::test]
async fn growth_changes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = hybrid(folder.path());
    let judge = start(&model, context(2048, 2048, 1));
    let engine = start(&model, context(256, 1024, 2));
    let prompts = [tokens(80, 1), tokens(120, 2)];
    let asked = prompts.each_ref().map(|prompt| hear(engine.submit(request(prompt, 300)).expect("it is taken")));
    for (prompt, (said, _)) in prompts.iter().zip(futures::future::join_all(asked).await) {
        is_the_models_own(&judge, "grown", prompt, &said).await;
    }
    let stats = engine.stats();
    assert!(stats.resizes > 0 && stats.cells_total > 256 && stats.failed == 0, "{stats:?}");
    let mut report = engine.watch();
    engine.shrink(0);
    let shrunk = report.wait_for(|report| report.context_tokens == 256);
    tokio::time::timeout(Duration::from_mins(2), shrunk).await.expect("soon").expect("the engine runs");
    // From host memory, into which it went.
    let (said, usage) = ask(&engine, request(&prompts[1], 40)).await;
    assert_eq!(usage.cached_tokens, 119);
    is_the_models_own(&judge, "shrunk", &prompts[1], &said).await;
    judge.shutdown(Instant::now());
    engine.shutdown(Instant::now());
}

/// Who has to give way comes back with its state, or reads all again where there is no host memory for it.
#[tokio::test]
async fn giving_way_changes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = hybrid(folder.path());
    let judge = start(&model, context(2048, 2048, 1));
    for host_cache in [1 << 30, 0] {
        let config = RunnerConfig { context: context(256, 1024, 4), ..config(model.clone()) };
        let engine = crowded(&config, host_cache);
        all_that_is_said_is_the_models_own(&engine, &judge).await;
        let stats = engine.stats();
        assert!(stats.preempted > 0 && stats.cells_total <= 768 && stats.failed == 0, "{stats:?}");
        engine.shutdown(Instant::now());
    }
    judge.shutdown(Instant::now());
}

/// An engine whose context may not grow to what its sequences want together, with so many bytes of host memory for their
/// states.
pub(super) fn crowded(config: &RunnerConfig, host_cache: u64) -> Engine {
    let (model, gpu) = load::open(config, &|_| {}).expect("the model loads");
    let mut loaded = load::load(config, model, gpu).expect("the context is made");
    loaded.plan.limits.cap = 768;
    loaded.plan.host_cache = host_cache;
    Engine::launch(loaded, 8, None).expect("the engine starts")
}

/// Four at once, who give way to each other, say what the model says.
pub(super) async fn all_that_is_said_is_the_models_own(engine: &Engine, judge: &Engine) {
    let prompts: Vec<_> = (1..5).map(|seed| tokens(60, seed)).collect();
    let asked: Vec<_> =
        prompts.iter().map(|prompt| engine.submit(request(prompt, 400)).expect("the request is taken")).collect();
    for (prompt, (said, _)) in prompts.iter().zip(futures::future::join_all(asked.into_iter().map(hear)).await) {
        assert_eq!(said.len(), 400);
        is_the_models_own(judge, "preempted", prompt, &said).await;
    }
}
