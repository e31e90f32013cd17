//! The same question has the same answer, however it is computed: alone or beside others, read at once or in chunks,
//! with a beginning that was there already, in one pool of cells or in split streams.
//!
//! Floating point sums differ with the batch, so there are three levels: bit-equal where the schedule is equal,
//! log-probabilities within a bound elsewhere (teacher-forced, so that nothing drifts apart), and equal texts on the
//! trained toy model, whose margins are far above the bound. Never equal texts on random weights.

#![expect(clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use altiplano_agent::engine::{
    Engine, GenerateEvent, GenerateRequest, Generation, SamplingParams, Token, TokenLogprob, Usage,
};
use altiplano_agent::runner::protocol::RunnerConfig;
use altiplano_crds::model_deployment::{ContextSizing, ContextSpec, EngineSpec};
use altiplano_test_models::{Architecture, Spec, toy};
use futures::StreamExt;
use tempfile::TempDir;

/// How far llama-server's own log-probabilities of the ten most probable tokens lie apart when it computes the same
/// prompts in other company, and twice that for ours. Measured by `cargo xtask bench logits`, which prints it for other
/// models too.
const BOUND: f64 = 2.0 * LLAMA_SERVER_AGAINST_ITSELF;
/// See [`BOUND`]: random weights in F16, read in steps of 64, llama.cpp 0.5.0-dev on AVX2. (In `Q8_0` it is 0.24, as
/// activations are quantised too.)
const LLAMA_SERVER_AGAINST_ITSELF: f64 = 0.0227;

/// Tokens before each cut of the text: around the borders of chunks and micro-batches.
const CUTS: [usize; 10] = [2, 31, 64, 65, 127, 129, 200, 256, 300, 383];

/// Tokens that are compared at each cut.
const TOP: usize = 10;

fn config(model_path: &Path, context: ContextSpec, engine: EngineSpec) -> RunnerConfig {
    RunnerConfig { model_path: model_path.to_path_buf(), context, engine, threads: 2, ..RunnerConfig::default() }
}

fn dynamic() -> ContextSpec {
    ContextSpec { min_tokens: Some(2048), max_tokens: Some(2048), parallel: 4, ..ContextSpec::default() }
}

fn start(model: &Path) -> Engine {
    start_with(model, dynamic(), EngineSpec::default())
}

fn start_with(model: &Path, context: ContextSpec, engine: EngineSpec) -> Engine {
    Engine::start(&config(model, context, engine), &|_| {}).expect("the engine starts")
}

fn random_model() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    Spec::compared().write(&path).expect("a model file");
    (folder, path)
}

/// Tokens that spell text.
fn text(seed: u64, length: usize) -> Vec<Token> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Token::try_from(state >> 40).unwrap_or_default()
    };
    (0..length).map(|_| 256 + next() % 3500).collect()
}

/// The text's beginning for a cut; its first token is another for each cut, so that none is a beginning of another.
fn prompt(text: &[Token], cut: usize) -> Vec<Token> {
    let first = 300 + Token::try_from(cut).expect("a small number");
    std::iter::once(first).chain(text[1..cut].iter().copied()).collect()
}

fn request(prompt: &[Token], max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        id: "test".to_owned(),
        prompt: prompt.to_vec(),
        max_tokens: Some(max_tokens),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        ignore_eos: true,
        logprobs: Some(20),
        ..GenerateRequest::default()
    }
}

struct Answer {
    text: String,
    tokens: Vec<Token>,
    logprobs: Vec<TokenLogprob>,
    usage: Usage,
}

async fn read(mut generation: Generation) -> Answer {
    let (mut text, mut tokens, mut logprobs) = (String::new(), Vec::new(), Vec::new());
    loop {
        let next = tokio::time::timeout(std::time::Duration::from_mins(1), generation.next());
        match next.await.expect("an event within a minute") {
            Some(GenerateEvent::Token { text: piece, token, logprob }) => {
                text.push_str(&piece);
                tokens.push(token);
                logprobs.extend(logprob);
            }
            Some(GenerateEvent::Progress(_)) => {}
            Some(GenerateEvent::Done { usage, .. }) => return Answer { text, tokens, logprobs, usage },
            Some(GenerateEvent::Failed(error)) => panic!("{error} after {text:?}"),
            None => panic!("a stream without an end, after {text:?}"),
        }
    }
}

async fn ask(engine: &Engine, request: GenerateRequest) -> Answer {
    read(engine.submit(request).expect("the request is taken")).await
}

/// The best next tokens and their log-probabilities, the best first.
type Best = Vec<(Token, f32)>;

fn best(answer: &Answer) -> Best {
    let top = &answer.logprobs.first().expect("log-probabilities").top;
    top.iter().map(|one| (one.token, one.logprob)).collect()
}

async fn next_token(engine: &Engine, prompt: &[Token]) -> Best {
    best(&ask(engine, request(prompt, 1)).await)
}

/// Each cut alone, nothing reused.
async fn alone(engine: &Engine, text: &[Token]) -> Vec<Best> {
    let mut all = Vec::new();
    for cut in CUTS {
        let answer = ask(engine, request(&prompt(text, cut), 1)).await;
        assert_eq!(answer.usage.cached_tokens, 0, "cut {cut}");
        all.push(best(&answer));
    }
    all
}

/// The tables agree within the bound, and where the reference's margin is clear the same token wins.
fn agree(what: &str, reference: &[Best], other: &[Best]) {
    let mut most: f64 = 0.0;
    for ((cut, one), two) in CUTS.iter().zip(reference).zip(other) {
        let known: BTreeMap<Token, f32> = two.iter().copied().collect();
        for (token, logprob) in &one[..TOP] {
            let found = known.get(token).unwrap_or_else(|| panic!("{what}, cut {cut}: {token} is not in {two:?}"));
            most = most.max(f64::from((found - logprob).abs()));
        }
        let margin = f64::from(one[0].1 - one[1].1);
        assert!(margin <= BOUND || one[0].0 == two[0].0, "{what}, cut {cut}: {one:?} became {two:?}");
    }
    println!("{what}: most apart {most:.6}");
    assert!(
        most <= BOUND,
        "{what}: log-probabilities lie {most} apart, llama-server's own {LLAMA_SERVER_AGAINST_ITSELF}"
    );
}

#[tokio::test]
async fn an_equal_schedule_gives_equal_bits() {
    let (_folder, model) = random_model();
    let text = text(1, 400);
    let (first, second) = (start(&model), start(&model));
    assert_eq!(alone(&first, &text).await, alone(&second, &text).await);
    // A whole answer, token by token.
    let question = request(&prompt(&text, 200), 40);
    let (one, two) = (ask(&first, question.clone()).await, ask(&second, question).await);
    assert_eq!((one.text, one.logprobs), (two.text, two.logprobs));
}

#[tokio::test]
async fn company_chunks_layout_and_reuse_stay_within_llama_servers_own_bound() {
    let (_folder, model) = random_model();
    stays_within_the_bound(&model).await;
}

/// Of every other layer a state that every token changes instead of keys and values.
#[tokio::test]
async fn a_hybrid_stays_within_the_same_bound() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("hybrid.gguf");
    Spec { architecture: Architecture::Qwen35, ..Spec::compared() }.write(&path).expect("a model file");
    stays_within_the_bound(&path).await;
}

async fn stays_within_the_bound(model: &Path) {
    let text = text(2, 400);
    let engine = start(model);
    let reference = alone(&engine, &text).await;

    // Beside three others that generate and are read at the same time.
    let engine = start(model);
    let mut together = Vec::new();
    for cuts in CUTS.chunks(2) {
        let others: Vec<_> = (0..2)
            .map(|n| engine.submit(request(&self::text(90 + n, 150), 60)).expect("the request is taken"))
            .collect();
        let asked = cuts.iter().map(|cut| engine.submit(request(&prompt(&text, *cut), 1)).expect("taken"));
        let answers = futures::future::join_all(asked.map(read)).await;
        together.extend(answers.iter().map(best));
        futures::future::join_all(others.into_iter().map(read)).await;
    }
    agree("beside others", &reference, &together);

    // A beginning that was read for somebody else.
    let engine = start(model);
    let mut reused = Vec::new();
    for cut in CUTS {
        let prompt = prompt(&text, cut);
        ask(&engine, request(&[&prompt[..cut / 2], &[7]].concat(), 3)).await;
        let answer = ask(&engine, request(&prompt, 1)).await;
        // A few tokens are not worth sharing.
        assert!(cut < 200 || answer.usage.cached_tokens as usize >= cut / 2 - 1, "cut {cut}: {:?}", answer.usage);
        reused.push(best(&answer));
    }
    agree("reused beginnings", &reference, &reused);

    for tokens in [32, 96] {
        let chunks = EngineSpec { batch_tokens: Some(tokens), micro_batch_tokens: Some(32), ..EngineSpec::default() };
        let engine = start_with(model, dynamic(), chunks);
        agree(&format!("chunks of {tokens}"), &reference, &alone(&engine, &text).await);
    }
    let fixed = ContextSpec { sizing: ContextSizing::Fixed, ..dynamic() };
    agree("fixed", &reference, &alone(&start_with(model, fixed, EngineSpec::default()), &text).await);
}

/// A model with one rotation for short contexts and another for long ones: a stream that outgrows the short one is read
/// again in the middle, and says what it would say in a context that was large from the start.
#[tokio::test]
async fn another_rotation_is_read_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    Spec { long_rope: Some(1024), layers: 4, ..Spec::compared() }.write(&path).expect("a model file");
    let sized = |min_tokens| ContextSpec {
        min_tokens: Some(min_tokens),
        max_tokens: Some(1200),
        parallel: 1,
        ..ContextSpec::default()
    };
    let (small, large) =
        (start_with(&path, sized(1024), EngineSpec::default()), start_with(&path, sized(1200), EngineSpec::default()));
    assert_eq!((small.report().context_tokens, large.report().context_tokens), (1024, 1280));
    let asked = GenerateRequest { aim_tokens: Some(0), max_tokens: None, ..request(&text(5, 700), 1) };
    let answer = ask(&small, asked).await;
    let stats = small.stats();
    assert!(stats.resizes == 1 && stats.cells_total > 1024 && stats.failed == 0, "{stats:?}");
    // It had to, or could not go on; so the tokens before were said with the other rotation.
    let crossed = 1024 - 700;
    assert_eq!(stats.growths_anticipated, 0, "nobody is read again for room that may never be needed");

    let all: Vec<Token> = [text(5, 700), answer.tokens.clone()].concat();
    let mut apart_before: f64 = 0.0;
    let mut others = Vec::new();
    let mut ours = Vec::new();
    for at in [0, 60, 300, crossed + 2, crossed + 30, crossed + 90, 449] {
        let fresh = next_token(&large, &all[..700 + at]).await;
        let said: Best = answer.logprobs[at].top.iter().map(|one| (one.token, one.logprob)).collect();
        if at < crossed {
            let known: BTreeMap<Token, f32> = fresh.iter().copied().collect();
            let apart = said[..3].iter().map(|(token, logprob)| match known.get(token) {
                Some(found) => f64::from((found - logprob).abs()),
                None => f64::INFINITY,
            });
            apart_before = apart.fold(apart_before, f64::max);
        } else {
            ours.push(said);
            others.push(fresh);
        }
    }
    assert!(apart_before > 2.0 * BOUND, "the rotations say the same: {apart_before}");
    agree("another rotation", &ours, &others);
}

/// What one client says reaches nobody else, neither what is kept of it nor what runs beside it.
#[tokio::test]
async fn a_strangers_secret_changes_nothing() {
    let (_folder, model) = random_model();
    let asked = prompt(&text(3, 400), 200);
    let mut kept = Vec::new();
    let mut beside = Vec::new();
    for secret in [text(11, 150), text(12, 150)] {
        // The same schedule, so the same bits.
        let engine = start(&model);
        ask(&engine, request(&secret, 20)).await;
        kept.push(ask(&engine, request(&asked, 12)).await.logprobs);

        // The step in which the second begins is not always the same one, so there is a bound.
        let engine = start(&model);
        let stranger = engine.submit(request(&secret, 200)).expect("taken");
        beside.push(next_token(&engine, &asked).await);
        drop(stranger);
    }
    assert_eq!(kept[0], kept[1]);
    let apart = beside[0][..TOP].iter().map(|(token, logprob)| {
        let found = beside[1].iter().find(|(other, _)| other == token);
        found.map_or(f64::INFINITY, |(_, other)| f64::from((other - logprob).abs()))
    });
    let most = apart.fold(0.0, f64::max);
    assert!(most <= BOUND, "a stranger's secret moved log-probabilities by {most}");
}

/// On the trained model texts are equal, because its margins are far above what company can move.
#[tokio::test]
async fn the_toy_models_margins_are_clear() {
    let engine = start(&toy::path());
    let questions: Vec<_> = toy::questions().into_iter().filter(|question| question.messages.len() == 1).collect();
    let chat = |question: &str| format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n");
    let asked: Vec<GenerateRequest> = questions
        .iter()
        .take(16)
        .map(|question| {
            let prompt = engine.tokenize(&chat(&question.messages[0].content), true, true).expect("tokens");
            GenerateRequest { ignore_eos: false, max_tokens: None, ..request(&prompt, 1) }
        })
        .collect();
    let mut narrowest = f32::INFINITY;
    for (question, asked) in questions.iter().zip(&asked) {
        let answer = ask(&engine, asked.clone()).await;
        assert_eq!(answer.text, question.answer);
        for token in &answer.logprobs {
            narrowest = narrowest.min(token.top[0].logprob - token.top[1].logprob);
        }
    }
    println!("narrowest margin {narrowest}");
    assert!(f64::from(narrowest) > 2.0 * BOUND, "a margin of {narrowest} is too narrow for equal texts");
    let together = asked.iter().map(|asked| engine.submit(asked.clone()).expect("taken"));
    let together = futures::future::join_all(together.map(read)).await;
    for (question, answer) in questions.iter().zip(together) {
        assert_eq!(answer.text, question.answer);
    }
}
