//! The whole engine where a test has to reach inside: limits lowered behind its back, pauses shortened.

mod embedder;
mod growth;
mod hybrid;
mod media;
mod memory;
mod mtp;

use std::path::PathBuf;
use std::time::Duration;

use altiplano_crds::model_deployment::{ContextSpec, EngineSpec, FlashAttention};
use altiplano_test_models::toy;
use futures::StreamExt;

use super::*;

/// Set in the environment: tests that pass on any device use a GPU.
const GPU: &str = "ALTIPLANO_TEST_GPU";

/// The device that the tests of this process use besides the CPU.
fn gpu() -> Option<String> {
    std::env::var_os(GPU)?;
    let report = probe().expect("a device list");
    let gpu = report.devices.iter().find(|device| device.kind != "CPU");
    let gpu = gpu.unwrap_or_else(|| panic!("install mesa-vulkan-drivers: llama.cpp sees {report:?}"));
    Some(gpu.id.clone())
}

/// A configuration for a model on the CPU, or on the GPU where that is wanted.
pub(super) fn config(model_path: PathBuf) -> RunnerConfig {
    let Some(gpu) = gpu() else { return RunnerConfig { model_path, threads: 2, ..RunnerConfig::default() } };
    // Small batches and no flash attention need few shaders, and compiling those is what takes a software driver's time.
    let engine = EngineSpec {
        batch_tokens: Some(8),
        micro_batch_tokens: Some(8),
        flash_attention: FlashAttention::Off,
        ..EngineSpec::default()
    };
    RunnerConfig { model_path, threads: 2, devices: vec![gpu], engine, ..RunnerConfig::default() }
}

async fn read(mut generation: Generation) -> (String, Result<u32, EngineError>) {
    let mut text = String::new();
    loop {
        // A GPU's driver compiles its shaders first.
        let event = tokio::time::timeout(Duration::from_mins(3), generation.next()).await;
        match event.expect("an event in time").expect("an end") {
            GenerateEvent::Token { text: piece, .. } => text.push_str(&piece),
            GenerateEvent::Progress(_) => {}
            GenerateEvent::Done { usage, .. } => return (text, Ok(usage.completion_tokens)),
            GenerateEvent::Failed(error) => return (text, Err(error)),
        }
    }
}

/// Memory for less than all can use: the youngest gives way, is read again when there is room, and nobody's text
/// suffers. `max_tokens` is a promise that alone can hold, so the cap is lowered behind its back, as a growth that
/// is refused does.
#[tokio::test]
async fn who_finds_no_more_cells_waits_and_goes_on() {
    let context = ContextSpec { min_tokens: Some(256), max_tokens: Some(1024), parallel: 3, ..ContextSpec::default() };
    let config = RunnerConfig { context, ..config(toy::path()) };
    let (model, gpu) = load::open(&config, &|_| {}).expect("the toy model loads");
    let mut loaded = load::load(&config, model, gpu).expect("the context is made");
    loaded.plan.limits.cap = 768;
    let engine = Engine::launch(loaded, 8, None).expect("the engine starts");
    let chat = |question: &str| format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n");
    let request = |question| GenerateRequest {
        prompt: engine.tokenize(&chat(question), true, true).expect("tokens"),
        max_tokens: Some(700),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        ..GenerateRequest::default()
    };
    let ask = |question| read(engine.submit(request(question)).expect("the request is taken"));
    let alone = ask(toy::LONG_QUESTION).await;
    let singing = ask(toy::ENDLESS_QUESTION).await;
    assert_eq!(singing.1, Ok(700));
    assert_eq!(alone.1.clone().map(|tokens| tokens > 250), Ok(true), "{alone:?}");

    // Each fits alone, but some 700 and 350 cells do not fit into 768. The first one gets ahead by the 80 tokens
    // that are read and the 64 that its reader's channel holds, then it is parked.
    let before = engine.stats().generated_tokens;
    let mut first = engine.submit(request(toy::ENDLESS_QUESTION)).expect("the request is taken");
    let mut sung = String::new();
    for _ in 0..80 {
        match first.next().await {
            Some(GenerateEvent::Token { text, .. }) => sung.push_str(&text),
            other => panic!("{other:?} after {sung:?}"),
        }
    }
    let patience = Instant::now() + Duration::from_mins(1);
    while engine.stats().generated_tokens < before + 144 {
        assert!(Instant::now() < patience, "{:?}", engine.stats());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let ((rest, end), second) = futures::join!(read(first), ask(toy::LONG_QUESTION));
    assert_eq!(((sung + &rest, end), second), (singing, alone));
    let stats = engine.stats();
    assert!(stats.preempted > 0 && stats.cells_total <= 768 && stats.failed == 0, "{stats:?}");
    engine.shutdown(Instant::now());
}

/// Four streams that all outgrow a full device all come to their end: the youngest give way, and come back from
/// host memory.
#[tokio::test]
async fn streams_that_outgrow_the_device_all_end() {
    let context = ContextSpec { min_tokens: Some(256), max_tokens: Some(1024), parallel: 4, ..ContextSpec::default() };
    // With a draft model they guess besides.
    for (host_cache, draft_path) in [(1 << 30, None), (0, None), (1 << 30, Some(toy::path())), (0, Some(toy::path()))] {
        let guesses = draft_path.is_some();
        let config = RunnerConfig { context: context.clone(), draft_path, ..config(toy::path()) };
        let (model, gpu) = load::open(&config, &|_| {}).expect("the toy model loads");
        let mut loaded = load::load(&config, model, gpu).expect("the context is made");
        loaded.plan.limits.cap = 768;
        loaded.plan.host_cache = host_cache;
        let engine = Engine::launch(loaded, 8, None).expect("the engine starts");
        let chat = |question: &str| format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n");
        let ask = |salt: &str| {
            let request = GenerateRequest {
                prompt: engine.tokenize(&chat(toy::ENDLESS_QUESTION), true, true).expect("tokens"),
                // No two fit, unless one has nearly ended when the other begins.
                max_tokens: Some(640),
                sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
                cache: CacheKey { salt: salt.to_owned(), ..CacheKey::default() },
                ..GenerateRequest::default()
            };
            read(engine.submit(request).expect("the request is taken"))
        };
        let alone = ask("").await;
        assert_eq!(alone.1, Ok(640));
        for answer in futures::future::join_all(["a", "b", "c", "d"].map(ask)).await {
            assert_eq!(answer, alone);
        }
        let stats = engine.stats();
        assert!(stats.preempted > 0 && stats.cells_total <= 768 && stats.failed == 0, "{stats:?}");
        assert!(guesses || stats.drafted_tokens == 0, "{stats:?}");
        // Guesses pause where a busy machine makes them dear; each request begins anew.
        let patience = Instant::now() + Duration::from_mins(1);
        while guesses && engine.stats().accepted_tokens == 0 {
            assert_eq!(ask("again").await, alone);
            assert!(Instant::now() < patience, "no guess was right: {:?}", engine.stats());
        }
        engine.shutdown(Instant::now());
    }
}

/// A ledger that grants so many bytes in all.
struct Ledger {
    free: std::sync::atomic::AtomicU64,
    asked: std::sync::atomic::AtomicU64,
}

impl Grants for Ledger {
    fn ask(&self, more: &[crate::runner::protocol::MemoryUse]) -> Result<(), crate::runner::grants::Refusal> {
        use std::sync::atomic::Ordering::Relaxed;
        self.asked.fetch_add(1, Relaxed);
        let bytes: u64 = more.iter().map(crate::runner::protocol::MemoryUse::total).sum();
        let free = self.free.load(Relaxed);
        if bytes == 0 || bytes > free {
            return Err(crate::runner::grants::Refusal::passing(format!("{bytes} are not there, but {free}")));
        }
        Ok(())
    }

    fn give_back(&self) {}
}

/// The ledger decides over each growth: while it refuses, requests that need more wait for each other and
/// nothing is lost; when it grants, the context grows.
#[tokio::test]
async fn the_ledger_is_asked_before_the_context_grows() {
    use std::sync::atomic::AtomicU64;
    use std::sync::atomic::Ordering::Relaxed;
    let context = ContextSpec { min_tokens: Some(512), max_tokens: Some(512), parallel: 4, ..ContextSpec::default() };
    let config = RunnerConfig { context, ..config(toy::path()) };
    let (model, gpu) = load::open(&config, &|_| {}).expect("the toy model loads");
    let loaded = load::load(&config, model, gpu).expect("the context is made");
    let ledger = Arc::new(Ledger { free: AtomicU64::new(0), asked: AtomicU64::new(0) });
    let engine = Engine::launch(loaded, 8, Some(Arc::clone(&ledger) as Arc<dyn Grants>)).expect("the engine starts");
    let ask = |salt: &str| {
        let chat = format!("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", toy::ENDLESS_QUESTION);
        let request = GenerateRequest {
            prompt: engine.tokenize(&chat, true, true).expect("tokens"),
            max_tokens: Some(300),
            sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            cache: CacheKey { salt: salt.to_owned(), ..CacheKey::default() },
            ..GenerateRequest::default()
        };
        read(engine.submit(request).expect("the request is taken"))
    };
    let alone = ask("").await;
    assert_eq!((alone.1.clone(), ledger.asked.load(Relaxed)), (Ok(300), 0), "one has room, so nobody is asked");
    for answer in futures::future::join_all(["a", "b", "c", "d"].map(ask)).await {
        assert_eq!(answer, alone);
    }
    let stats = engine.stats();
    assert!(ledger.asked.load(Relaxed) > 0, "{stats:?}");
    assert_eq!((stats.cells_total, stats.resizes, stats.failed), (512, 0, 0));

    // What was refused is asked for again after five seconds.
    ledger.free.store(u64::MAX, Relaxed);
    tokio::time::sleep(Duration::from_secs(5)).await;
    for answer in futures::future::join_all(["e", "f", "g", "h"].map(ask)).await {
        assert_eq!(answer, alone);
    }
    let stats = engine.stats();
    assert!(stats.cells_total > 512 && stats.resizes > 0 && stats.failed == 0, "{stats:?}");
    engine.shutdown(Instant::now());
}

/// What a burst made large goes back when nobody has needed it for a while, and at once when it is asked for.
#[tokio::test]
async fn a_context_shrinks_when_it_is_of_no_use() {
    let context = ContextSpec { min_tokens: Some(256), max_tokens: Some(2048), parallel: 2, ..ContextSpec::default() };
    let config = RunnerConfig { context, ..config(toy::path()) };
    let (model, gpu) = load::open(&config, &|_| {}).expect("the toy model loads");
    let mut loaded = load::load(&config, model, gpu).expect("the context is made");
    loaded.plan.shrink_after = Duration::from_millis(300);
    let engine = Engine::launch(loaded, 8, None).expect("the engine starts");
    let request = |length: usize| GenerateRequest {
        prompt: vec![300; length],
        max_tokens: Some(20),
        ignore_eos: true,
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        ..GenerateRequest::default()
    };
    let ask = |length| read(engine.submit(request(length)).expect("the request is taken"));
    let mut report = engine.watch();
    let first = ask(700).await;
    assert_eq!(engine.report().context_tokens, 2048, "need(700, 20)");
    engine.shrink(0);
    let size = |wanted: u32| move |report: &RunnerReport| report.context_tokens == wanted;
    let soon = Duration::from_mins(2);
    tokio::time::timeout(soon, report.wait_for(size(256))).await.expect("at once").expect("the engine runs");
    assert_eq!(engine.stats().cells_used, 0, "the prefix is in host memory");
    assert_eq!(ask(700).await, first);
    assert_eq!(engine.stats().cached_prompt_tokens, 699, "and comes back from there");
    // A wished-for change waits for five seconds after the last one.
    tokio::time::timeout(soon, report.wait_for(size(256))).await.expect("in a while").expect("the engine runs");
    let stats = engine.stats();
    assert_eq!((stats.resizes, stats.shrinks), (2, 2), "{stats:?}");
    assert!(stats.resize_time > Duration::ZERO, "{stats:?}");
    engine.shutdown(Instant::now());
}

/// An idle engine computes a token now and then, which changes nothing that is kept or said.
#[tokio::test]
async fn an_idle_engine_is_probed() {
    let config = config(toy::path());
    let (model, gpu) = load::open(&config, &|_| {}).expect("the toy model loads");
    let mut loaded = load::load(&config, model, gpu).expect("the context is made");
    assert_eq!(loaded.plan.probe_after, None, "not on a CPU");
    loaded.plan.probe_after = Some(Duration::from_millis(30));
    let engine = Engine::launch(loaded, 8, None).expect("the engine starts");
    let request = || GenerateRequest {
        prompt: vec![300; 100],
        max_tokens: Some(20),
        ignore_eos: true,
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        ..GenerateRequest::default()
    };
    let ask = || read(engine.submit(request()).expect("the request is taken"));
    let first = ask().await;
    let (kept, probes) = (engine.stats().cells_used, engine.stats().probes);
    assert!(kept >= 100, "the prefix is kept: {kept}");
    let patience = Instant::now() + Duration::from_mins(1);
    while engine.stats().probes < probes + 3 {
        assert!(Instant::now() < patience, "{:?}", engine.stats());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(ask().await, first);
    let stats = engine.stats();
    assert!(stats.cached_prompt_tokens > 0 && stats.failed == 0 && stats.resizes == 0, "{stats:?}");
    engine.shutdown(Instant::now());
}

/// An embedder gives back what a long text took; in the crate's own tests after a second instead of a minute.
#[tokio::test]
async fn an_embedder_shrinks_when_nothing_long_comes() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("embedder.gguf");
    altiplano_test_models::Spec::embedder().write(&path).expect("a model");
    let engine = Engine::start(&config(path), &|_| {}).expect("the engine starts");
    let embed = async |length: usize| {
        let texts = vec![vec![300; length]];
        let request = EmbedRequest { id: String::new(), task: EmbedTask::Embedding, texts, deadline: None };
        engine.embed(request).expect("the request is taken").await.expect("a vector").vectors
    };
    let before = embed(9).await;
    let first = engine.report().context_tokens;
    embed(2000).await;
    assert!(engine.stats().resizes == 1 && first < 2000, "it has grown: {:?}", engine.stats());
    let patience = Instant::now() + Duration::from_mins(1);
    while engine.report().context_tokens > first {
        assert!(Instant::now() < patience, "{:?}", engine.stats());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!((engine.stats().resizes, engine.stats().shrinks), (1, 1));
    assert_eq!(embed(9).await, before, "equal calls are equal to the bit");
    embed(2000).await;
    assert_eq!(engine.stats().resizes, 2, "it grows again");
    engine.shutdown(Instant::now());
}
