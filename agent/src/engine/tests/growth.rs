//! Another size of the context under running streams: on the CPU, and all of it again on a GPU.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use altiplano_test_models::Spec;

use super::*;
use crate::runner::grants::Refusal;
use crate::runner::protocol::MemoryUse;

/// Longest wait for anything; a software driver compiles its shaders.
const PATIENCE: Duration = Duration::from_mins(3);

/// Tests of this crate that pass on any device.
const ON_ANY_DEVICE: [&str; 6] = [
    "engine::tests::growth::growth_changes_no_bit",
    "engine::step::resize::tests::streams_do_not_notice_another_size",
    "engine::step::resize::tests::failure_loses_nothing",
    "engine::tests::growth::what_cannot_be_made_beside_is_made_instead",
    "engine::tests::growth::a_prefix_survives_another_size",
    "engine::tests::memory::what_another_size_takes_is_known_before",
];

/// The same tests in a process that sees a GPU: Mesa's software driver, which llama.cpp passes over otherwise.
#[test]
fn a_gpu_does_all_of_it_too() {
    if super::gpu().is_some() {
        return;
    }
    let output = std::process::Command::new(std::env::current_exe().expect("this program"))
        .args(ON_ANY_DEVICE)
        .args(["--exact", "--test-threads=1"])
        .env("GGML_VK_VISIBLE_DEVICES", "0")
        .env(super::GPU, "1")
        .output()
        .expect("this program starts");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    println!("{said}");
    let passed = format!("{} passed; 0 failed", ON_ANY_DEVICE.len());
    assert!(output.status.success() && said.contains(&passed), "not all of them passed on a GPU:\n{said}");
}

/// Small enough for a software driver.
fn generated() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    Spec::default().write(&path).expect("a model file");
    (folder, path)
}

fn dynamic(min: i32, max: i32, parallel: i32) -> ContextSpec {
    ContextSpec { min_tokens: Some(min), max_tokens: Some(max), parallel, ..ContextSpec::default() }
}

fn loaded(config: &RunnerConfig) -> Loaded {
    let (model, gpu) = load::open(config, &|_| {}).expect("the model loads");
    assert_eq!(gpu, super::gpu().is_some());
    load::load(config, model, gpu).expect("the context is made")
}

fn start(model: &std::path::Path, context: ContextSpec) -> Engine {
    let config = RunnerConfig { context, ..config(model.to_owned()) };
    let engine = Engine::launch(loaded(&config), 8, None).expect("the engine starts");
    let on_gpu = engine.report().memory.iter().any(|device| device.device != "CPU" && device.context_bytes > 0);
    assert_eq!(on_gpu, super::gpu().is_some(), "{:?}", engine.report());
    engine
}

/// Aims for no more than it has to.
fn modest(prompt: Vec<Token>) -> GenerateRequest {
    GenerateRequest {
        prompt,
        aim_tokens: Some(0),
        ignore_eos: true,
        logprobs: Some(1),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        ..GenerateRequest::default()
    }
}

/// What comes, to the bit, and how many tokens of the prompt were there already.
async fn bits(generation: Generation) -> (Vec<(Token, u32)>, u32) {
    bits_until(generation, |_| false).await
}

/// The same until it is enough; the reader goes then.
async fn bits_until(mut generation: Generation, is_enough: impl Fn(usize) -> bool) -> (Vec<(Token, u32)>, u32) {
    let mut said = Vec::new();
    loop {
        if is_enough(said.len()) {
            return (said, 0);
        }
        let event = tokio::time::timeout(PATIENCE, generation.next()).await;
        match event.expect("an event in time").expect("an end") {
            GenerateEvent::Token { token, logprob: Some(logprob), .. } => said.push((token, logprob.logprob.to_bits())),
            GenerateEvent::Token { .. } | GenerateEvent::Progress(_) => {}
            GenerateEvent::Done { usage, .. } => return (said, usage.cached_tokens),
            GenerateEvent::Failed(error) => panic!("{error} after {} tokens", said.len()),
        }
    }
}

/// What the toy model answers without end.
fn song(engine: &Engine, salt: &str) -> GenerateRequest {
    let chat = format!("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", toy::ENDLESS_QUESTION);
    GenerateRequest {
        prompt: engine.tokenize(&chat, true, true).expect("tokens"),
        max_tokens: Some(380),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        cache: CacheKey { salt: salt.to_owned(), ..CacheKey::default() },
        ..GenerateRequest::default()
    }
}

async fn until(engine: &Engine, what: &str, is_so: impl Fn(&EngineStats) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so(&engine.stats()) {
        assert!(Instant::now() < deadline, "waited for {what}: {:?}", engine.stats());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A stream whose context grows twice in the middle of it says, to the bit, what it says in one that was large from the
/// start. With flash attention: without it Vulkan takes another kernel where a cache is read to its last cell, in a context
/// that never grew as well.
#[tokio::test]
async fn growth_changes_no_bit() {
    let (_folder, model) = generated();
    let engine = EngineSpec { flash_attention: FlashAttention::On, ..config(model.clone()).engine };
    let start = |context| {
        let config = RunnerConfig { context, engine: engine.clone(), ..config(model.clone()) };
        Engine::launch(loaded(&config), 8, None).expect("the engine starts")
    };
    let asked = || modest((0..250).map(|number| 300 + number % 200).collect());
    let large = start(dynamic(1024, 1024, 1));
    let (expected, _) = bits(large.submit(asked()).expect("taken")).await;
    assert_eq!((expected.len(), large.stats().resizes), (774, 0));
    large.shutdown(Instant::now());

    // A larger one is made when the next 256 cells are not there: after a few tokens, and 256 later.
    let small = start(dynamic(512, 1024, 1));
    let (said, _) = bits(small.submit(asked()).expect("taken")).await;
    assert_eq!((small.stats().resizes, small.stats().cells_total), (2, 1024), "{:?}", small.stats());
    let parted = said.iter().zip(&expected).position(|(one, other)| one != other);
    assert!(said == expected, "another bit at token {parted:?}");
    small.shutdown(Instant::now());
}

/// Who asks for memory waits for the answer until the streams have gone on.
#[derive(Default)]
struct Slow {
    engine: OnceLock<Engine>,
    went_on: AtomicU64,
}

impl Grants for Slow {
    fn ask(&self, _: &[MemoryUse]) -> Result<(), Refusal> {
        let engine = self.engine.get().expect("the engine has started");
        let generated = || engine.stats().generated_tokens;
        // A thread that begins late, on a busy machine, finds a stream that waits for it.
        let (before, deadline) = (generated(), Instant::now() + Duration::from_secs(5));
        while generated() < before + 10 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.went_on.fetch_add(u64::from(generated() >= before + 10), Relaxed);
        Ok(())
    }

    fn give_back(&self) {}
}

/// A larger context is made beside the running one while there is room still, and the stream goes on meanwhile, even while
/// the ledger thinks.
#[tokio::test]
async fn a_growth_is_ready_before_it_is_needed() {
    let (_folder, model) = generated();
    let config = RunnerConfig { context: dynamic(512, 1024, 1), ..config(model) };
    let slow = Arc::new(Slow::default());
    let engine = Engine::launch(loaded(&config), 8, Some(Arc::clone(&slow) as Arc<dyn Grants>)).expect("it starts");
    slow.engine.set(engine.clone()).unwrap_or_else(|_| panic!("set once"));
    let twice = |_| engine.stats().resizes == 2;
    bits_until(engine.submit(modest(vec![60; 250])).expect("taken"), twice).await;
    let stats = engine.stats();
    assert!(stats.resizes == 2 && stats.growths_anticipated >= 1, "{stats:?}");
    assert!(slow.went_on.load(Relaxed) >= 1, "ten tokens came while a question was open");
    until(&engine, "quiet", |stats| stats.running == 0).await;

    // A larger wish than need is no reason to wait either.
    engine.shrink(0);
    until(&engine, "512 cells", |stats| stats.cells_total == 512).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let wish = GenerateRequest { aim_tokens: Some(1024), max_tokens: Some(200), ..modest(vec![70; 100]) };
    let (said, _) = bits(engine.submit(wish).expect("taken")).await;
    let stats = engine.stats();
    assert_eq!((said.len(), stats.resizes), (200, 3), "{stats:?}");
    engine.shutdown(Instant::now());
}

/// A context that was granted and cannot be made beside the running one is made in its place as soon as somebody cannot go
/// on without; nobody notices.
#[tokio::test]
async fn what_cannot_be_made_beside_is_made_instead() {
    let (_folder, model) = generated();
    let large = start(&model, dynamic(768, 768, 1));
    let (expected, _) = bits(large.submit(modest(vec![60; 450])).expect("taken")).await;
    large.shutdown(Instant::now());

    let config = RunnerConfig { context: dynamic(512, 768, 1), ..config(model) };
    let mut loaded = loaded(&config);
    loaded.plan.spoils_next = true;
    let engine = Engine::launch(loaded, 8, None).expect("the engine starts");
    let (said, _) = bits(engine.submit(modest(vec![60; 450])).expect("taken")).await;
    let stats = engine.stats();
    assert!(said == expected);
    assert_eq!((stats.resizes, stats.growths_anticipated, stats.failed, stats.preempted), (1, 0, 0, 0), "{stats:?}");
    engine.shutdown(Instant::now());
}

/// Grants so many growths.
#[derive(Default)]
struct Full {
    left: AtomicU64,
    /// Others hold what is missing.
    passing: AtomicBool,
}

impl Grants for Full {
    fn ask(&self, _: &[MemoryUse]) -> Result<(), Refusal> {
        if self.left.try_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() {
            return Ok(());
        }
        Err(Refusal { reason: "others hold it".to_owned(), passing: self.passing.load(Relaxed) })
    }

    fn give_back(&self) {}
}

/// The only stream there is outgrows what it has while others hold the memory: it gives back what it has, waits, and goes
/// on where it was. Where nobody holds what is missing it fails at once.
#[tokio::test]
async fn who_waits_for_memory_loses_nothing() {
    let config = RunnerConfig { context: dynamic(256, 700, 2), ..config(toy::path()) };
    let full = Arc::new(Full::default());
    let engine = Engine::launch(loaded(&config), 8, Some(Arc::clone(&full) as Arc<dyn Grants>)).expect("it starts");
    // Aims for no more than it has, and sings to the end of the context.
    let sing = |salt: &str| {
        let request = GenerateRequest { aim_tokens: Some(0), max_tokens: None, ..song(&engine, salt) };
        read(engine.submit(request).expect("the request is taken"))
    };
    let small = async || {
        until(&engine, "quiet", |stats| stats.running == 0).await;
        engine.shrink(0);
        until(&engine, "256 cells", |stats| stats.cells_total == 256).await;
    };
    full.left.store(100, Relaxed);
    let alone = sing("a").await;
    assert!(alone.1.clone().is_ok_and(|tokens| tokens > 600), "{alone:?}");
    small().await;

    // It gets 512 cells and no more.
    full.left.store(1, Relaxed);
    full.passing.store(true, Relaxed);
    let waiting = async {
        until(&engine, "somebody waits", |stats| stats.context_waits > 0).await;
        until(&engine, "and holds no memory", |stats| stats.cells_total == 256).await;
        let stats = engine.stats();
        assert!(stats.growths_refused > 0 && stats.preempted == 1 && stats.generated_tokens > 900, "{stats:?}");
        full.left.store(100, Relaxed);
    };
    let (answer, ()) = futures::join!(sing("b"), waiting);
    assert_eq!((answer, engine.stats().failed), (alone, 0));
    small().await;

    full.left.store(1, Relaxed);
    full.passing.store(false, Relaxed);
    let (_, end) = sing("c").await;
    assert!(matches!(&end, Err(EngineError::ContextFull(_))), "{end:?}");
    engine.shutdown(Instant::now());
}

/// What was read before the context grew is not read again, and nor is it after it shrank.
#[tokio::test]
async fn a_prefix_survives_another_size() {
    let (_folder, model) = generated();
    let prompt: Vec<Token> = (0..200).map(|number| 300 + number).collect();
    let next = |more: &[Token]| GenerateRequest { max_tokens: Some(8), ..modest([prompt.as_slice(), more].concat()) };
    let large = start(&model, dynamic(1024, 1024, 2));
    let expected = [
        bits(large.submit(next(&[])).expect("taken")).await,
        bits(large.submit(next(&[7, 8, 9])).expect("taken")).await,
    ];
    large.shutdown(Instant::now());
    let small = start(&model, dynamic(512, 1024, 2));
    assert_eq!(bits(small.submit(next(&[])).expect("taken")).await, expected[0]);
    let wish = GenerateRequest { aim_tokens: Some(900), max_tokens: Some(300), ..modest(vec![60; 300]) };
    bits(small.submit(wish).expect("taken")).await;
    assert!(small.stats().resizes == 1 && small.stats().cells_total >= 1024, "{:?}", small.stats());
    let again = bits(small.submit(next(&[7, 8, 9])).expect("taken")).await;
    assert_eq!(again.1, 200, "cached");
    assert!(again == expected[1]);
    small.shrink(0);
    until(&small, "512 cells", |stats| stats.cells_total == 512).await;
    let again = bits(small.submit(next(&[7, 8, 9, 10])).expect("taken")).await;
    assert_eq!(again.1, 203, "cached");
    small.shutdown(Instant::now());
}

/// Four streams that all outgrow a full device all come to their end: the youngest give way, and come back from
/// host memory or are read again.
#[tokio::test]
async fn streams_that_outgrow_the_device_all_end() {
    let context = dynamic(256, 768, 4);
    let host_caches: &[u64] = if super::gpu().is_some() { &[1 << 30] } else { &[1 << 30, 0] };
    for &host_cache in host_caches {
        let config = RunnerConfig { context: context.clone(), ..config(toy::path()) };
        let mut loaded = loaded(&config);
        loaded.plan.limits.cap = 768;
        loaded.plan.host_cache = host_cache;
        let engine = Engine::launch(loaded, 8, None).expect("the engine starts");
        // No two fit, unless one has nearly ended when the other begins.
        let long = |salt| GenerateRequest { max_tokens: Some(640), ..song(&engine, salt) };
        let sing = |salt| read(engine.submit(long(salt)).expect("the request is taken"));
        let alone = sing("").await;
        assert_eq!(alone.1, Ok(640));
        for answer in futures::future::join_all(["a", "b", "c", "d"].map(sing)).await {
            assert_eq!(answer, alone);
        }
        let stats = engine.stats();
        assert!(stats.preempted > 0 && stats.cells_total <= 768 && stats.failed == 0, "{stats:?}");
        engine.shutdown(Instant::now());
    }
}
