//! A model's own head guesses (MTP): whatever happens to a sequence, what it says is the model's own.

use std::path::Path;

use altiplano_crds::model_deployment::{EngineSpec, SpeculativeSpec, SpeculativeType};
use altiplano_test_models::{Architecture, MtpHead, Spec};

use super::super::ffi::{Batch, Context};
use super::hybrid::{
    all_that_is_said_is_the_models_own, ask, context, crowded, hear, is_the_models_own, request, salt, spec, text,
    tokens,
};
use super::*;
use crate::runner::protocol::MemoryUse;

fn model(folder: &Path, head: Option<MtpHead>) -> PathBuf {
    let path = folder.join("model.gguf");
    Spec { mtp: head, ..spec() }.write(&path).expect("the model is written");
    path
}

fn guessing(model: &Path, context: ContextSpec) -> RunnerConfig {
    let speculative = SpeculativeSpec {
        kind: SpeculativeType::Mtp,
        max_tokens: None,
        min_tokens: None,
        min_probability: None,
        match_tokens: None,
    };
    let engine = EngineSpec { speculative: Some(speculative), ..EngineSpec::default() };
    RunnerConfig { context, engine, ..config(model.to_path_buf()) }
}

fn start(config: &RunnerConfig) -> Engine {
    Engine::start(config, &|_| {}).expect("the engine starts")
}

fn judge(model: &Path) -> Engine {
    start(&RunnerConfig { context: context(2048, 2048, 1), ..config(model.to_path_buf()) })
}

#[tokio::test]
async fn a_head_guesses_and_the_model_has_the_say() {
    for head in [MtpHead::Good, MtpHead::Random] {
        let folder = tempfile::tempdir().expect("a folder");
        let path = model(folder.path(), Some(head));
        let judge = judge(&path);
        let engine = start(&guessing(&path, context(256, 1024, 4)));
        let said_by = |what: &str| format!("{head:?}, {what}");
        let prompt = tokens(120, 1);
        let (first, usage) = ask(&engine, request(&prompt, 150)).await;
        assert_eq!((first.len(), usage.cached_tokens), (150, 0));
        is_the_models_own(&judge, &said_by("alone"), &prompt, &first).await;
        let stats = engine.stats();
        assert!(stats.drafted_tokens > 0 && stats.accepted_tokens <= stats.drafted_tokens, "{stats:?}");
        // A beginning that was there: its hidden states are not.
        let longer = [text(&prompt, &first), tokens(40, 2)].concat();
        let (said, usage) = ask(&engine, request(&longer, 80)).await;
        assert!(usage.cached_tokens >= 269, "{usage:?}");
        is_the_models_own(&judge, &said_by("went on"), &longer, &said).await;
        let (said, usage) = ask(&engine, request(&prompt, 80)).await;
        assert_eq!(usage.cached_tokens, 119);
        is_the_models_own(&judge, &said_by("again"), &prompt, &said).await;
        // Beside each other, while the context grows and one goes away.
        let prompts: Vec<_> = (10..13).map(|seed| [&prompt[..100], &tokens(60, seed)].concat()).collect();
        let asked: Vec<_> = prompts
            .iter()
            .map(|prompt| GenerateRequest { cache: salt("together"), ..request(prompt, 300) })
            .map(|request| engine.submit(request).expect("the request is taken"))
            .collect();
        let mut goes = engine.submit(request(&tokens(30, 20), 400)).expect("the request is taken");
        for _ in 0..20 {
            goes.next().await.expect("a token");
        }
        drop(goes);
        for (prompt, (said, _)) in prompts.iter().zip(futures::future::join_all(asked.into_iter().map(hear)).await) {
            assert_eq!(said.len(), 300);
            is_the_models_own(&judge, &said_by("together"), prompt, &said).await;
        }
        let stats = engine.stats();
        assert!(stats.resizes > 0 && stats.failed == 0, "{stats:?}");
        println!("{head:?}: {} of {} guesses were right", stats.accepted_tokens, stats.drafted_tokens);
        let most_are_right = stats.accepted_tokens * 10 > stats.drafted_tokens * 7;
        assert_eq!(most_are_right, head == MtpHead::Good, "{stats:?}");
        judge.shutdown(Instant::now());
        engine.shutdown(Instant::now());
    }
}

#[tokio::test]
async fn who_gives_way_guesses_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = model(folder.path(), Some(MtpHead::Good));
    let judge = judge(&path);
    for host_cache in [1 << 30, 0] {
        let config = guessing(&path, context(256, 1024, 4));
        let engine = crowded(&config, host_cache);
        // Guesses pause where a busy machine makes them dear, and each request begins anew.
        let deadline = Instant::now() + Duration::from_mins(1);
        loop {
            all_that_is_said_is_the_models_own(&engine, &judge).await;
            let stats = engine.stats();
            assert!(stats.preempted > 0 && stats.failed == 0, "{stats:?}");
            if stats.accepted_tokens > 0 {
                break;
            }
            assert!(Instant::now() < deadline, "no guess was right: {stats:?}");
        }
        engine.shutdown(Instant::now());
    }
    judge.shutdown(Instant::now());
}

/// The head's context is counted where the model's is, and the copies of the state that guesses need.
#[tokio::test]
async fn the_estimate_counts_the_head() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = model(folder.path(), Some(MtpHead::Random));
    let with = guessing(&path, context(1024, 1024, 2));
    let without = RunnerConfig { engine: EngineSpec::default(), ..with.clone() };
    let estimate = |config: &RunnerConfig| load::estimate(config).expect("an estimate").memory;
    let (alone, both) = (estimate(&without), estimate(&with));
    let engine = start(&with);
    // What the process itself takes is this test's, with other engines in it, and a dry run maps nothing.
    let of_llama_cpp = |memory: &[MemoryUse]| -> Vec<MemoryUse> {
        memory.iter().map(|part| MemoryUse { other_bytes: 0, mapped_bytes: 0, ..part.clone() }).collect()
    };
    assert_eq!(of_llama_cpp(&engine.report().memory), of_llama_cpp(&both));
    engine.shutdown(Instant::now());
    // One layer's keys and values in F16 for each cell, and three more states of two layers for each of four sequences.
    let spec = spec();
    let cells = 1024 * u64::from(spec.embd / spec.heads * spec.kv_heads) * 2 * 2;
    let (embd, head) = (u64::from(spec.embd), u64::from(spec.embd / spec.heads));
    let state = (head * embd + 3 * (embd + 2 * head * u64::from(spec.kv_heads))) * 4;
    assert_eq!(both[0].context_bytes - alone[0].context_bytes, cells + 3 * 2 * 4 * state);
    assert!(both[0].weights_bytes > alone[0].weights_bytes, "its head's weights");
    assert!(both[0].weights_bytes < alone[0].weights_bytes * 2, "which are not the model's");
}

#[tokio::test]
async fn who_has_no_head_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let plain = model(folder.path(), None);
    let other = folder.path().join("other.gguf");
    Spec { architecture: Architecture::Mamba, ..Spec::default() }.write(&other).expect("the model is written");
    for path in [plain, other] {
        let config = guessing(&path, context(256, 256, 1));
        for error in [load::estimate(&config).unwrap_err(), Engine::start(&config, &|_| {}).unwrap_err()] {
            assert!(error.to_string().contains("type MTP: the model's file has no layers for it"), "{error}");
        }
    }
}

/// llama.cpp refuses a part of such files, naming what is missing, loads others, and aborts when it computes their head.
#[tokio::test]
async fn a_head_that_is_named_and_not_there_is_refused_by_its_tensors_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let missing = Some(MtpHead::Missing);
    let hybrid = Spec { mtp: missing, ..spec() };
    let glm = Spec { architecture: Architecture::Glm4moe, mtp: missing, ..Spec::default() };
    for (spec, tensor) in [(hybrid, "blk.4.attn_norm.weight"), (glm.clone(), "blk.2.nextn.eh_proj.weight")] {
        let path = folder.path().join("lacks.gguf");
        spec.write(&path).expect("the model is written");
        let config = guessing(&path, context(256, 256, 1));
        for error in [load::estimate(&config).unwrap_err(), Engine::start(&config, &|_| {}).unwrap_err()] {
            assert!(error.to_string().contains(tensor), "{tensor}: {error}");
        }
    }
    // Who does not ask for the head needs none.
    let path = folder.path().join("plain.gguf");
    glm.write(&path).expect("the model is written");
    let engine = judge(&path);
    assert_eq!(ask(&engine, request(&tokens(20, 1), 5)).await.0.len(), 5);
    engine.shutdown(Instant::now());
}

/// Each token's hidden state stands in its own row, whoever else is in the batch and in however many parts it is computed.
#[test]
fn hidden_states_stand_in_their_rows() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = guessing(&model(folder.path(), Some(MtpHead::Random)), context(256, 256, 3));
    let (model, gpu) = load::open(&config, &|_| {}).expect("the model loads");
    let load::Loaded { mut context, .. } = load::load(&config, model, gpu).expect("the context is made");
    let texts = [(0, tokens(5, 7)), (1, tokens(1, 8)), (2, tokens(40, 9))];
    let states = |context: &mut Context, texts: &[(i32, Vec<i32>)]| -> Vec<Vec<f32>> {
        context.clear();
        let mut batch = Batch::new(64);
        for (id, text) in texts {
            for (position, &token) in (0..).zip(text) {
                batch.add(token, position, *id, false);
            }
        }
        context.decode(&mut batch).expect("computed");
        (0..).map_while(|row| context.hidden(row).map(<[f32]>::to_vec)).collect()
    };
    let together = states(&mut context, &texts);
    let alone: Vec<_> = texts.iter().flat_map(|text| states(&mut context, std::slice::from_ref(text))).collect();
    assert_eq!((together.len(), alone.len()), (46, 46));
    let apart = |one: &[f32], two: &[f32]| one.iter().zip(two).map(|(one, two)| (one - two).abs()).fold(0.0, f32::max);
    for (row, (one, two)) in together.iter().zip(&alone).enumerate() {
        assert!(apart(one, two) < 0.05, "row {row}: {}", apart(one, two));
    }
    assert!(apart(&together[0], &together[1]) > 0.5, "states of different tokens differ");
}
