//! What requests share and what they never do: prefixes read once, states in host memory, and nothing of a secret.

#![expect(clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

#[path = "support/engine.rs"]
mod support;

use std::path::{Path, PathBuf};

use altiplano_agent::engine::{
    CacheKey, Engine, EngineStats, GenerateEvent, GenerateRequest, Generation, SamplingParams, Token, Usage,
};
use altiplano_agent::runner::protocol::RunnerConfig;
use altiplano_crds::model_deployment::{ContextSizing, ContextSpec, EngineSpec};
use altiplano_test_models::{Architecture, Spec, toy};
use futures::future::join_all;
use tempfile::TempDir;

use support::{config, dynamic, stop, until};

fn start(model_path: PathBuf, context: ContextSpec) -> Engine {
    Engine::start(&config(model_path, context), &|_| {}).expect("the engine starts")
}

fn fixed(max_tokens: i32, parallel: i32) -> ContextSpec {
    ContextSpec { sizing: ContextSizing::Fixed, ..dynamic(256, max_tokens, parallel) }
}

fn generated(architecture: Architecture) -> (TempDir, PathBuf) {
    support::generated(&Spec { architecture, layers: 6, sliding_window: 64, context: 4096, ..Spec::default() })
}

/// A greedy request for `count` tokens with all their log-probabilities.
fn request(prompt: &[Token], count: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: prompt.to_vec(),
        max_tokens: Some(count),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        ignore_eos: true,
        logprobs: Some(5),
        ..GenerateRequest::default()
    }
}

fn salted(request: GenerateRequest, salt: &str) -> GenerateRequest {
    GenerateRequest { cache: CacheKey { salt: salt.to_owned(), ..CacheKey::default() }, ..request }
}

/// Tokens of printable text, different for each seed.
fn tokens(length: usize, seed: u32) -> Vec<Token> {
    let mut state = seed.wrapping_mul(0x9e37_79b9);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        40 + i32::try_from((state >> 16) % 60).expect("below 60")
    };
    (0..length).map(|_| next()).collect()
}

/// What was said: each token with its log-probability and those of the alternatives, to the bit.
type Said = Vec<(Token, u32, Vec<(Token, u32)>)>;

async fn next(generation: &mut Generation) -> GenerateEvent {
    support::next(generation).await.expect("an end before the stream's")
}

async fn read(mut generation: Generation) -> (Said, Usage) {
    let mut said = Said::new();
    loop {
        match next(&mut generation).await {
            GenerateEvent::Token { token, logprob: Some(logprob), .. } => {
                let top = logprob.top.iter().map(|top| (top.token, top.logprob.to_bits())).collect();
                said.push((token, logprob.logprob.to_bits(), top));
            }
            GenerateEvent::Token { .. } | GenerateEvent::Progress(_) => {}
            GenerateEvent::Done { usage, .. } => return (said, usage),
            GenerateEvent::Failed(error) => panic!("{error} after {} tokens", said.len()),
        }
    }
}

async fn ask(engine: &Engine, request: GenerateRequest) -> (Said, Usage) {
    read(engine.submit(request).expect("the request is taken")).await
}

fn said_tokens(said: &Said) -> Vec<Token> {
    said.iter().map(|(token, ..)| *token).collect()
}

/// That two have said the same, as far as arithmetic in another order allows: where they part, both tokens were about
/// as probable.
fn assert_alike(left: &Said, right: &Said, what: &str) {
    let logprob = |bits: &u32| f32::from_bits(*bits);
    for (at, (left, right)) in left.iter().zip(right).enumerate() {
        if left.0 != right.0 {
            let margin = logprob(&right.2[0].1) - logprob(&right.2[1].1);
            assert!(margin < 0.2, "{what}, token {at}: {left:?} {right:?}");
            return;
        }
        assert!((logprob(&left.1) - logprob(&right.1)).abs() < 0.1, "{what}, token {at}: {left:?} {right:?}");
    }
}

fn computed(stats: &EngineStats) -> u64 {
    stats.prompt_tokens - stats.cached_prompt_tokens
}

/// Questions after the same long conversation, in the toy model's words.
fn conversation(engine: &Engine, count: usize) -> (usize, Vec<Vec<Token>>) {
    let chat = |question: &str| format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n");
    let questions: Vec<_> = toy::questions().into_iter().filter(|question| question.messages.len() == 1).collect();
    let turn =
        |question: &toy::Question| format!("{}{}<|im_end|>\n", chat(&question.messages[0].content), question.answer);
    let past = questions[..20].iter().map(turn).collect::<Vec<_>>().concat();
    let tokenize = |text: &str| engine.tokenize(text, true, true).expect("tokens");
    let prompts = questions[..count].iter().map(|question| chat(&question.messages[0].content));
    (tokenize(&past).len(), prompts.map(|question| tokenize(&format!("{past}{question}"))).collect())
}

/// Eight prompts with the same long beginning arrive in the same instant: it is read once.
#[tokio::test]
async fn equal_prompts_that_arrive_together_are_read_once() {
    for context in [dynamic(4096, 4096, 8), fixed(2048, 8)] {
        let engine = start(toy::path(), context.clone());
        let (shared, prompts) = conversation(&engine, 8);
        assert!(shared > 400 && prompts.len() == 8, "{shared}");
        let mut alone = Vec::new();
        for prompt in &prompts {
            alone.push(ask(&engine, GenerateRequest { cache_prompt: false, ..request(prompt, 24) }).await.0);
        }
        let own: usize = prompts.iter().map(|prompt| prompt.len() - shared).sum();
        let most = shared + own + 8 * 16;
        let mut followed = Vec::new();
        // Those that come when the first one is past the shared part have nobody to follow, which is tried again.
        for round in 0..10 {
            let before = engine.stats();
            // A salt of its own, so that nothing is there yet.
            let salt = format!("together {round}");
            let all: Vec<_> = prompts
                .iter()
                .map(|prompt| engine.submit(salted(request(prompt, 24), &salt)).expect("the request is taken"))
                .collect();
            let answers = join_all(all.into_iter().map(read)).await;
            let after = engine.stats();
            assert!(computed(&after) - computed(&before) <= most as u64, "{context:?} {shared} {own} {after:?}");
            for ((said, _), alone) in answers.iter().zip(&alone) {
                assert_alike(said, alone, &format!("{context:?}"));
            }
            followed.push(after.followed - before.followed);
            if followed[round] >= 5 {
                break;
            }
        }
        assert!(followed.last() >= Some(&5), "{context:?}: {followed:?} of 8 have followed, {:?}", engine.stats());
        stop(&engine);
    }
}

/// Who reads the shared part goes away: another reads on, from where it was.
#[tokio::test]
async fn a_cancelled_leader_leaves_its_cells() {
    let (_folder, path) = generated(Architecture::Llama);
    let engine = start(path, dynamic(4096, 4096, 4));
    let shared = tokens(3000, 1);
    let prompt = |seed| [shared.as_slice(), &tokens(20, seed)].concat();
    for round in 0..6u32 {
        let request = |seed| salted(request(&prompt(seed), 4), &round.to_string());
        let before = engine.stats();
        let leader = engine.submit(request(2)).expect("the request is taken");
        let followers: Vec<_> =
            (3..6).map(|seed| engine.submit(request(seed)).expect("the request is taken")).collect();
        // Each time at another place of its prompt.
        let place = before.steps + u64::from(round);
        until(&engine, "steps", |stats| stats.steps >= place).await;
        drop(leader);
        let mut read_anew = 0;
        for (said, usage) in join_all(followers.into_iter().map(read)).await {
            assert_eq!((said.len(), usage.prompt_tokens), (4, 3020));
            read_anew += usage.prompt_tokens - usage.cached_tokens;
        }
        // One of them reads what the leader has left.
        assert!(read_anew <= 3020 + 2 * 36, "{round} {read_anew}");
        until(&engine, "all have gone", |stats| stats.running == 0).await;
    }
    stop(&engine);
}

#[tokio::test]
async fn salts_keep_prompts_apart() {
    let (_folder, path) = generated(Architecture::Llama);
    let engine = start(path, dynamic(2048, 2048, 2));
    let prompt = tokens(300, 1);
    let (first, usage) = ask(&engine, salted(request(&prompt, 8), "a")).await;
    assert_eq!(usage.cached_tokens, 0);
    let cases = [("b", true, 0), ("", true, 0), ("a", false, 0), ("a", true, 299), ("b", true, 299)];
    for (salt, cache_prompt, cached) in cases {
        let request = GenerateRequest { cache_prompt, ..salted(request(&prompt, 8), salt) };
        let (said, usage) = ask(&engine, request).await;
        assert_eq!(usage.cached_tokens, cached, "{salt:?} {cache_prompt}");
        assert_alike(&said, &first, salt);
    }
    stop(&engine);
}

/// What a client gets after another one's secret and beside a second one.
async fn beside_a_secret(path: &Path, context: &ContextSpec, secret: u32) -> [(Said, Usage); 2] {
    // Larger pieces of a prompt would be chosen by the clock, and sums would be rounded in another order.
    let pieces = EngineSpec { batch_tokens: Some(64), micro_batch_tokens: Some(64), ..EngineSpec::default() };
    // And growth is by the clock, so nobody aims for more than there is.
    let request = |prompt: Vec<Token>, count| GenerateRequest { aim_tokens: Some(512), ..request(&prompt, count) };
    let config = RunnerConfig { engine: pieces, ..config(path.to_path_buf(), context.clone()) };
    let engine = Engine::start(&config, &|_| {}).expect("the engine starts");
    ask(&engine, request(tokens(200, secret), 20)).await;
    let after = ask(&engine, request(tokens(150, 9), 20)).await;
    // Its reader is slow, so that it stands still with 64 tokens said, at the same place each time.
    let before = engine.stats().generated_tokens;
    let parked = engine.submit(request(tokens(180, secret + 2), 300)).expect("the request is taken");
    until(&engine, "parked", |stats| stats.generated_tokens >= before + 64).await;
    let beside = ask(&engine, request(tokens(170, 11), 20)).await;
    assert_eq!(engine.stats().resizes, 0);
    drop(parked);
    stop(&engine);
    [after, beside]
}

/// Whatever a client's secret is, it changes not a bit of what another gets: not after it, and not beside it.
#[tokio::test]
async fn a_secret_changes_nothing_for_others() {
    for architecture in [Architecture::Llama, Architecture::Gemma3, Architecture::Mamba, Architecture::Qwen35] {
        let (_folder, path) = generated(architecture);
        for context in [dynamic(2048, 2048, 2), fixed(1024, 2)] {
            let seen = [beside_a_secret(&path, &context, 5).await, beside_a_secret(&path, &context, 6).await];
            assert!(seen[0] == seen[1], "{architecture:?} {context:?}");
        }
    }
}

/// A prefix that had to leave the cells comes back from host memory, as good as it went.
#[tokio::test]
async fn prefixes_come_back_from_host_memory() {
    let (_folder, path) = generated(Architecture::Llama);
    let engine = start(path, dynamic(4096, 4096, 1));
    let prompt = tokens(400, 1);
    let (first, _) = ask(&engine, request(&prompt, 16)).await;
    for seed in 2..12 {
        let (_, usage) = ask(&engine, request(&tokens(300, seed), 4)).await;
        assert!(usage.cached_tokens < 16, "{seed} {usage:?}");
    }
    let stats = engine.stats();
    assert!(stats.host_cache_states >= 5 && stats.host_cache_bytes > 100_000, "{stats:?}");
    let longer = [prompt.clone(), said_tokens(&first), tokens(40, 3)].concat();
    let (_, usage) = ask(&engine, request(&longer, 4)).await;
    assert!(usage.cached_tokens >= 400, "{usage:?} {:?}", engine.stats());
    let (again, usage) = ask(&engine, request(&prompt, 16)).await;
    assert_eq!(usage.cached_tokens, 399);
    assert_alike(&again, &first, "restored");
    stop(&engine);
}

/// A stream that generates alone gets the first cells for itself: what was kept before it goes to host memory, and comes
/// back from there.
#[tokio::test]
async fn a_lone_streams_cells_lie_together() {
    let (_folder, path) = generated(Architecture::Llama);
    let engine = start(path.clone(), dynamic(4096, 4096, 2));
    let kept = tokens(240, 1);
    // So little beside it that it may stay, were it not in front.
    ask(&engine, request(&kept, 4)).await;
    let lone = request(&tokens(300, 2), 60);
    let before = engine.stats();
    assert_eq!((before.cells_kept, before.host_cache_states), (243, 0), "{before:?}");
    let (said, _) = ask(&engine, lone.clone()).await;
    let after = engine.stats();
    assert_eq!((after.cells_kept, after.host_cache_states), (359, 1), "{after:?}");
    let (again, usage) = ask(&engine, request(&kept, 4)).await;
    assert_eq!((again.len(), usage.cached_tokens), (4, 239), "{:?}", engine.stats());
    stop(&engine);
    let fresh = start(path, dynamic(4096, 4096, 2));
    let (alone, _) = ask(&fresh, lone).await;
    assert_alike(&said, &alone, "beside and alone");
    stop(&fresh);
}

/// Models whose state cannot be cut go on from copies of it.
#[tokio::test]
async fn states_that_cannot_be_cut_are_copied_on_the_way() {
    for architecture in [Architecture::Mamba, Architecture::Gemma3, Architecture::Qwen35] {
        let (_folder, path) = generated(architecture);
        let engine = start(path, dynamic(4096, 4096, 2));
        let prompt = tokens(700, 1);
        let (first, usage) = ask(&engine, request(&prompt, 200)).await;
        assert_eq!(usage.cached_tokens, 0);
        let (again, usage) = ask(&engine, request(&prompt, 200)).await;
        assert_eq!(usage.cached_tokens, 699, "{architecture:?}");
        match architecture {
            Architecture::Mamba => assert!(again == first, "the same state says the same, to the bit"),
            // Cells lie in another order, so that sums are rounded in another order.
            _ => assert_alike(&again, &first, &format!("{architecture:?}")),
        }
        // The next turn goes on where the answer ended.
        let longer = [prompt.clone(), said_tokens(&first), tokens(30, 5)].concat();
        let (_, usage) = ask(&engine, request(&longer, 4)).await;
        assert!(usage.cached_tokens >= 899, "{architecture:?} {usage:?}");
        // Where two have parted, the third finds a copy.
        let parted = |seed| [&prompt[..500], &tokens(100, seed)].concat();
        let mut cached = Vec::new();
        for seed in 20..23 {
            cached.push(ask(&engine, request(&parted(seed), 4)).await.1.cached_tokens);
        }
        assert!(cached[2] >= 500, "{architecture:?} {cached:?}");
        // Of a window the cells at the place may be there still.
        assert!(architecture == Architecture::Gemma3 || cached[0] < 500, "{cached:?}");
        // Two that arrive together read the shared part once: unless the second comes when the first is past it already,
        // which is tried again.
        let mut read_anew = Vec::new();
        for round in 0..5 {
            let before = computed(&engine.stats());
            let together = |seed| salted(request(&parted(seed), 4), &format!("together {round}"));
            let both: Vec<_> =
                (30..32).map(|seed| engine.submit(together(seed)).expect("the request is taken")).collect();
            for (said, _) in join_all(both.into_iter().map(read)).await {
                assert_eq!(said.len(), 4);
            }
            read_anew.push(computed(&engine.stats()) - before);
            if read_anew[round] <= 500 + 2 * 101 {
                break;
            }
        }
        assert!(read_anew.iter().any(|&tokens| tokens <= 500 + 2 * 101), "{architecture:?} {read_anew:?}");
        stop(&engine);
    }
}
