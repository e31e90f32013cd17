//! What a model takes is there before it is Ready, and what it will take more is asked for.

use std::path::Path;
use std::sync::Mutex;

use altiplano_crds::model_deployment::{CacheType, ContextSizing};
use altiplano_test_models::{Architecture, Spec};

use super::*;
use crate::engine::ffi::{Context, ContextParams};
use crate::runner::grants::{Grants, Refusal};
use crate::runner::protocol::MemoryUse;

/// The pool is full when a GPU's warm-up computes, so nothing that comes reads deeper. States that are not cut at any token
/// are left as they are.
#[test]
fn a_warm_up_for_a_gpu_reads_the_whole_pool() {
    let folder = tempfile::tempdir().expect("a folder");
    let plain = folder.path().join("plain.gguf");
    let shape = Spec { embd: 128, heads: 4, kv_heads: 2, context: 4096, ..Spec::default() };
    shape.write(&plain).expect("a model file");
    let context = |sizing, tokens, parallel, cache| ContextSpec {
        sizing,
        min_tokens: Some(tokens),
        max_tokens: Some(tokens),
        parallel,
        key_cache_type: cache,
        value_cache_type: cache,
        ..ContextSpec::default()
    };
    let cases = [
        (context(ContextSizing::Dynamic, 4096, 1, CacheType::F16), 1),
        (context(ContextSizing::Dynamic, 1536, 4, CacheType::Q8_0), 1),
        (context(ContextSizing::Fixed, 768, 3, CacheType::F16), 3),
        // Smaller than a micro-batch.
        (context(ContextSizing::Fixed, 256, 1, CacheType::Q8_0), 1),
    ];
    for (context, lanes) in cases {
        let config = RunnerConfig { context, ..config(plain.clone()) };
        let filled = load::warmed_up(&config, u32::MAX).expect("it computes");
        assert_eq!(filled.len(), lanes, "{filled:?}");
        assert!(filled.iter().all(|&(depth, cells)| depth == cells && cells >= 256), "{filled:?}");
    }
    // Not all of it where the CPU would take long.
    let context_of = context(ContextSizing::Dynamic, 4096, 1, CacheType::F16);
    let config_of = RunnerConfig { context: context_of, ..config(plain) };
    assert_eq!(load::warmed_up(&config_of, 1024).expect("it computes"), [(1024, 4096)]);
    for architecture in [Architecture::Gemma3, Architecture::Mamba, Architecture::Qwen35] {
        let path = folder.path().join(format!("{architecture:?}.gguf"));
        Spec { architecture, layers: 4, ..shape.clone() }.write(&path).expect("a model file");
        let context = context(ContextSizing::Dynamic, 1024, 2, CacheType::F16);
        let filled = load::warmed_up(&RunnerConfig { context, ..config(path) }, u32::MAX).expect("it computes");
        assert_eq!(filled.iter().map(|&(depth, _)| depth).collect::<Vec<_>>(), [0], "{architecture:?}");
    }
}

/// llama.cpp reckons what a context of another size takes, and that is what it then takes; nothing is taken for the answer.
#[test]
fn what_another_size_takes_is_known_before() {
    let folder = tempfile::tempdir().expect("a folder");
    let shape = Spec { embd: 256, heads: 8, kv_heads: 4, layers: 4, context: 65_536, ..Spec::default() };
    let cases = [
        (Architecture::Llama, ContextSizing::Dynamic, FlashAttention::On, CacheType::F16),
        (Architecture::Llama, ContextSizing::Dynamic, FlashAttention::On, CacheType::Q8_0),
        (Architecture::Llama, ContextSizing::Dynamic, FlashAttention::Off, CacheType::F16),
        (Architecture::Llama, ContextSizing::Fixed, FlashAttention::Off, CacheType::F16),
        (Architecture::Gemma3, ContextSizing::Dynamic, FlashAttention::On, CacheType::F16),
        (Architecture::Qwen35, ContextSizing::Dynamic, FlashAttention::Off, CacheType::F16),
        (Architecture::Mamba, ContextSizing::Dynamic, FlashAttention::Off, CacheType::F16),
    ];
    // A software driver compiles shaders for each of them.
    let cases = if gpu().is_some() { &cases[2..3] } else { &cases[..] };
    for &(architecture, sizing, flash_attention, cache) in cases {
        let path = folder.path().join("model.gguf");
        Spec { architecture, ..shape.clone() }.write(&path).expect("a model file");
        let context = ContextSpec {
            sizing,
            min_tokens: Some(512),
            max_tokens: Some(512),
            parallel: 2,
            key_cache_type: cache,
            value_cache_type: cache,
            ..ContextSpec::default()
        };
        let config = config(path);
        let engine = EngineSpec { flash_attention, ..config.engine.clone() };
        let config = RunnerConfig { context, engine, ..config };
        let (model, gpu) = load::open(&config, &|_| {}).expect("the model loads");
        let load::Loaded { model, context, params, .. } = load::load(&config, model, gpu).expect("the context is made");
        let before = context.memory_of_cells();
        for cells in [1024, 16_384] {
            let wanted = ContextParams { cells, ..params.clone() };
            let begun = Instant::now();
            let held = crate::cgroup::held_bytes().expect("a number");
            let reckoned = Context::size(&model, &wanted).expect("an answer");
            let (took, grown) = (begun.elapsed(), crate::cgroup::held_bytes().expect("a number").saturating_sub(held));
            let made = Context::new(&model, &wanted).expect("a context").memory_of_cells();
            println!("{architecture:?} {sizing:?} {flash_attention:?} {cells}: {took:?}, {grown} bytes: {reckoned:?}");
            assert_eq!(reckoned.len(), made.len());
            for (reckoned, made) in reckoned.iter().zip(&made) {
                assert_eq!(reckoned.device, made.device);
                // A driver aligns compute buffers in a way that no dry run knows.
                assert!(reckoned.total().abs_diff(made.total()) <= 4096, "{architecture:?}: {reckoned:?} {made:?}");
            }
        }
        assert_eq!(context.memory_of_cells(), before, "the context that is there knows nothing of it");
    }
}

/// Remembers what was asked for.
#[derive(Default)]
struct Asked(Mutex<Vec<Vec<MemoryUse>>>);

impl Grants for Asked {
    fn ask(&self, more: &[MemoryUse]) -> Result<(), Refusal> {
        self.0.lock().expect("a lock").push(more.to_vec());
        Ok(())
    }

    fn give_back(&self) {}
}

/// What a larger context takes has been asked for, also what llama.cpp's breakdown leaves out: without flash attention the
/// CPU's own copy of what is attended to.
#[tokio::test]
async fn all_that_a_growth_takes_is_asked_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("model.gguf");
    // Of many small heads, so that scores are most of what it computes in.
    let spec = Spec { embd: 128, heads: 16, kv_heads: 16, ..Spec::default() };
    spec.write(&model).expect("a model file");
    for flash_attention in [FlashAttention::On, FlashAttention::Off] {
        let (asked, before, after) = grow(&model, flash_attention).await;
        let host =
            |memory: &[MemoryUse]| memory.iter().find(|device| device.device == "CPU").map_or(0, MemoryUse::total);
        let more = host(&after) - host(&before);
        let question = host(asked.first().expect("a question"));
        println!("{flash_attention:?}: asked for {question}, took {more}");
        // Of each new cell, for each token of a micro-batch, in each head.
        let copy = 1024 * 512 * 16 * 2;
        if flash_attention == FlashAttention::Off {
            assert!(more > copy && question < more + copy, "the copy would not be missed: {question} {more}");
        }
        // Besides it only what the state might have moved through.
        let rest = question.checked_sub(more);
        assert!(rest.is_some_and(|rest| rest < 1 << 20), "{flash_attention:?}: asked for {question}, took {more}");
    }
}

/// A model on the CPU whose context grows from 512 to 1536 cells: what it asked for, and what it took before and after.
async fn grow(model: &Path, flash_attention: FlashAttention) -> (Vec<Vec<MemoryUse>>, Vec<MemoryUse>, Vec<MemoryUse>) {
    let context = ContextSpec { min_tokens: Some(512), max_tokens: Some(1536), ..ContextSpec::default() };
    let engine = EngineSpec { flash_attention, ..EngineSpec::default() };
    let config = RunnerConfig { model_path: model.to_owned(), threads: 2, context, engine, ..RunnerConfig::default() };
    let (model, gpu) = load::open(&config, &|_| {}).expect("the model loads");
    let loaded = load::load(&config, model, gpu).expect("the context is made");
    let asked = Arc::new(Asked::default());
    let engine = Engine::launch(loaded, 8, Some(Arc::clone(&asked) as Arc<dyn Grants>)).expect("the engine starts");
    let before = engine.report().memory.clone();
    let request = GenerateRequest { prompt: vec![300; 1100], max_tokens: Some(1), ..GenerateRequest::default() };
    let (_, end) = read(engine.submit(request).expect("taken")).await;
    end.expect("an answer");
    assert_eq!(engine.stats().cells_total, 1536, "{:?}", engine.stats());
    let after = engine.report().memory.clone();
    engine.shutdown(Instant::now());
    let asked = asked.0.lock().expect("a lock").clone();
    (asked, before, after)
}
