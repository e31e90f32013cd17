//! The engine on real llama.cpp, on the CPU: a toy model whose greedy answers are known, and generated models.

#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

#[path = "engine/context.rs"]
mod context;
#[path = "engine/loading.rs"]
mod loading;
#[path = "engine/sampling.rs"]
mod sampling;
#[path = "support/engine.rs"]
mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use altiplano_agent::engine::{
    self, Engine, EngineError, FinishReason, GenerateEvent, GenerateRequest, SamplingParams, SubmitError, Token, Usage,
};
use altiplano_agent::runner::protocol::{MemoryUse, RunnerConfig};
use altiplano_crds::model_deployment::{
    CacheType, ContextSizing, ContextSpec, EngineSpec, FlashAttention, RopeScaling, RopeSpec,
};
use altiplano_test_models::{Architecture, BadFile, Quantization, Spec, toy};
use tempfile::TempDir;

use support::*;

fn start(config: &RunnerConfig) -> Engine {
    Engine::start(config, &|_| {}).expect("the engine starts")
}

fn start_toy(context: ContextSpec) -> Engine {
    start(&config(toy::path(), context))
}

#[tokio::test]
async fn the_facts_of_the_model() {
    let percents = std::sync::Mutex::new(Vec::new());
    let engine = Engine::start(&config(toy::path(), ContextSpec::default()), &|percent| {
        percents.lock().unwrap().push(percent);
    })
    .expect("the engine starts");
    let percents = percents.into_inner().unwrap();
    assert!(percents.is_sorted() && percents.first() == Some(&0) && percents.last() == Some(&100), "{percents:?}");

    let facts = engine.model();
    assert_eq!((facts.architecture.as_str(), facts.n_vocab, facts.trained_context), ("llama", 1024, 4096));
    assert_eq!(facts.max_tokens, 4096);
    assert!(facts.chat_template.as_ref().is_some_and(|template| template.contains("im_start")));
    assert!(facts.parameter_count > 1_500_000 && facts.size_bytes > 1_500_000, "{facts:?}");
    assert_eq!(facts.eos_text, "<|im_end|>");
    let text = "Grüße vom Altiplano ☃";
    let tokens = engine.tokenize(text, false, false).expect("tokens");
    assert_eq!(engine.detokenize(&tokens), text);

    let report = engine.report();
    assert_eq!((report.context_tokens, report.parallel, report.layers_offloaded, report.layers_total), (4096, 4, 0, 5));
    assert_eq!(report.memory.len(), 1, "{report:?}");
    assert!(report.memory[0].weights_bytes > 1_500_000 && report.memory[0].context_bytes > 0, "{report:?}");
    stop(&engine);
    assert_eq!(engine.ended().await, Ok(()));
    assert_eq!(engine.submit(request(&engine, "x")).unwrap_err(), SubmitError::EngineFailed);
}

/// Many at once, more than there are slots, say what each says alone.
#[tokio::test]
async fn answers_together_are_the_answers_alone() {
    let engine = start_toy(dynamic(1024, 4096, 4));
    let questions = questions(24);
    assert_eq!(questions.len(), 24);
    let generations: Vec<_> = questions
        .iter()
        .map(|(question, _)| engine.submit(request(&engine, question)).expect("the request is taken"))
        .collect();
    let answers = futures::future::join_all(generations.into_iter().map(read)).await;
    for ((question, expected), answer) in questions.iter().zip(&answers) {
        assert_eq!((answer.text.as_str(), answer.reason()), (expected.as_str(), FinishReason::Stop), "{question}");
        let Usage { prompt_tokens, cached_tokens, completion_tokens } = answer.usage();
        assert!(prompt_tokens > cached_tokens && completion_tokens as usize == answer.tokens.len() + 1, "{answer:?}");
    }
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.finished_stop, stats.failed), (0, 0, 24, 0));
    let generated: u32 = answers.iter().map(|answer| answer.usage().completion_tokens).sum();
    assert_eq!(stats.generated_tokens, u64::from(generated));
    assert!(stats.steps < stats.generated_tokens, "sequences share steps: {stats:?}");
    for (question, expected) in &questions[..4] {
        let answer = ask(&engine, request(&engine, question)).await;
        assert_eq!(&answer.text, expected);
    }
    stop(&engine);
}

#[tokio::test]
async fn a_conversation_is_not_read_twice() {
    let engine = start_toy(dynamic(1024, 4096, 2));
    let [(first, first_answer), (second, second_answer)]: [(String, String); 2] = questions(2).try_into().unwrap();
    let answer = ask(&engine, request(&engine, &first)).await;
    assert_eq!((answer.text.as_str(), answer.usage().cached_tokens), (first_answer.as_str(), 0));
    let read = answer.usage().prompt_tokens + answer.usage().completion_tokens;

    let conversation = format!("{first}{first_answer}<|im_end|>\n{second}");
    let answer = ask(&engine, request(&engine, &conversation)).await;
    assert_eq!(answer.text, second_answer);
    // All but the end-of-turn token, which was sampled and never computed.
    assert!(answer.usage().cached_tokens >= read - 2, "{read} tokens were there: {:?}", answer.usage());

    // The same again: everything but the last token is there, and the answer is the same.
    let again = ask(&engine, request(&engine, &conversation)).await;
    let usage = again.usage();
    assert_eq!((again.text, usage.cached_tokens), (second_answer, usage.prompt_tokens - 1));
    let stats = engine.stats();
    assert!(stats.cells_kept > 0 && stats.cells_kept == stats.cells_used, "{stats:?}");
    stop(&engine);
}

/// Two prompts with the same long beginning share its cells while both run.
#[tokio::test]
async fn running_sequences_share_their_beginning() {
    let engine = start_toy(dynamic(2048, 4096, 2));
    let questions = questions(2);
    let system = format!("<|im_start|>system\n{}<|im_end|>\n", "Be brief. ".repeat(40));
    let mut first = engine.submit(request(&engine, &format!("{system}{}", chat(toy::ENDLESS_QUESTION)))).unwrap();
    assert!(matches!(next(&mut first).await, Some(GenerateEvent::Token { .. })));
    let second = request(&engine, &format!("{system}{}", questions[0].0));
    let usage = ask(&engine, GenerateRequest { max_tokens: Some(4), ..second }).await.usage();
    assert!(usage.cached_tokens > 100 && usage.cached_tokens < usage.prompt_tokens, "{usage:?}");
    let stats = engine.stats();
    assert!(stats.cells_used < 2 * usage.prompt_tokens, "cells are shared: {stats:?}, {usage:?}");
    drop(first);
    stop(&engine);
}

#[tokio::test]
async fn a_cancelled_generation_frees_its_slot_within_a_step() {
    let engine = start_toy(dynamic(1024, 4096, 1));
    for _ in 0..3 {
        let mut endless = engine.submit(request(&engine, &chat(toy::ENDLESS_QUESTION))).unwrap();
        for _ in 0..5 {
            assert!(matches!(next(&mut endless).await, Some(GenerateEvent::Token { .. })));
        }
        assert_eq!(engine.stats().running, 1);
        drop(endless);
        let before = engine.stats();
        until(&engine, "the slot is free", |stats| stats.running == 0).await;
        let after = engine.stats();
        // The step that runs while the reader goes is the last one.
        assert!(after.steps <= before.steps + 1, "{before:?} {after:?}");
    }
    until(&engine, "only kept cells are left", |stats| stats.cells_used == stats.cells_kept).await;
    let (question, expected) = questions(1).remove(0);
    assert_eq!(ask(&engine, request(&engine, &question)).await.text, expected);
    assert_eq!(engine.stats().cancelled, 3);
    stop(&engine);
}

#[tokio::test]
async fn requests_that_cannot_run_are_refused() {
    let mut config = config(toy::path(), dynamic(256, 512, 1));
    config.traffic.max_queued = 1;
    let engine = start(&config);
    let prompt = |tokens: Vec<Token>| GenerateRequest { prompt: tokens, ..GenerateRequest::default() };
    let refused = |request| engine.submit(request).unwrap_err();
    assert_eq!(refused(prompt(vec![])), SubmitError::EmptyPrompt);
    let long = SubmitError::ContextLengthExceeded { prompt_tokens: 512, limit: 512 };
    assert_eq!(refused(prompt(vec![7; 512])), long);
    assert_eq!(refused(prompt(vec![1024])), SubmitError::InvalidToken { token: 1024, n_vocab: 1024 });
    assert_eq!(refused(prompt(vec![-1])), SubmitError::InvalidToken { token: -1, n_vocab: 1024 });
    let sampling = |sampling| GenerateRequest { prompt: vec![1], sampling, ..GenerateRequest::default() };
    for bad in [
        SamplingParams { temperature: f32::NAN, ..greedy() },
        SamplingParams { repeat_penalty: 0.0, ..greedy() },
        SamplingParams { logit_bias: vec![(1, f32::INFINITY)], ..greedy() },
        SamplingParams { logit_bias: vec![(1, 1.0); 2000], ..greedy() },
    ] {
        assert!(matches!(refused(sampling(bad.clone())), SubmitError::InvalidParameter(_)), "{bad:?}");
    }
    let stranger = SamplingParams { logit_bias: vec![(5000, 1.0)], ..greedy() };
    assert_eq!(refused(sampling(stranger)), SubmitError::InvalidToken { token: 5000, n_vocab: 1024 });

    // One runs, one waits, the third is refused; another one that waits leaves at its deadline.
    let endless = request(&engine, &chat(toy::ENDLESS_QUESTION));
    let mut running = engine.submit(endless.clone()).unwrap();
    assert!(matches!(next(&mut running).await, Some(GenerateEvent::Token { .. })));
    let waiting = engine.submit(endless.clone()).unwrap();
    assert_eq!(engine.submit(endless.clone()).unwrap_err(), SubmitError::QueueFull { limit: 1 });
    drop(waiting);
    until(&engine, "nobody waits", |stats| stats.waiting == 0).await;
    let deadline = Some(Instant::now() + Duration::from_millis(20));
    let waiting = engine.submit(GenerateRequest { deadline, ..endless.clone() }).unwrap();
    assert_eq!(read(waiting).await.end.unwrap_err(), EngineError::QueueTimeout);
    assert_eq!(read(running).await.reason(), FinishReason::Length);
    stop(&engine);
}

#[tokio::test]
async fn generations_end_where_they_should() {
    let engine = start_toy(dynamic(256, 512, 2));
    let endless = request(&engine, &chat(toy::ENDLESS_QUESTION));
    let left = 512 - u32::try_from(endless.prompt.len()).unwrap();
    for (max_tokens, expected) in [(Some(0), 0), (Some(1), 1), (Some(7), 7), (None, left), (Some(u32::MAX), left)] {
        let answer = ask(&engine, GenerateRequest { max_tokens, ..endless.clone() }).await;
        let found = (answer.reason(), answer.usage().completion_tokens);
        assert_eq!(found, (FinishReason::Length, expected), "{max_tokens:?}");
    }

    let (question, answer) = questions(1).remove(0);
    assert!(answer.starts_with("Hello! I am the Altiplano toy model."), "{answer}");
    let cases = [
        (vec!["the Altiplano"], "Hello! I am ", Some("the Altiplano")),
        (vec!["never", " toy", "Altiplano toy"], "Hello! I am the ", Some("Altiplano toy")),
        (vec!["H"], "", Some("H")),
        (vec!["Hello! I am a"], answer.as_str(), None),
    ];
    for (stops, expected, which) in cases {
        let stop = stops.iter().map(|&stop| stop.to_owned()).collect();
        let found = ask(&engine, GenerateRequest { stop, ..request(&engine, &question) }).await;
        assert_eq!(
            (found.text.as_str(), found.reason(), found.stop.as_deref()),
            (expected, FinishReason::Stop, which),
            "{stops:?}"
        );
    }

    let on = GenerateRequest { ignore_eos: true, max_tokens: Some(60), ..request(&engine, &question) };
    let found = ask(&engine, on).await;
    assert_eq!((found.reason(), found.usage().completion_tokens), (FinishReason::Length, 60));
    assert!(found.text.starts_with(&answer));
    stop(&engine);
}

#[tokio::test]
async fn log_probabilities_are_the_models_own() {
    let engine = start_toy(dynamic(256, 512, 1));
    let (question, expected) = questions(1).remove(0);
    let answer = ask(&engine, GenerateRequest { logprobs: Some(3), ..request(&engine, &question) }).await;
    assert_eq!(answer.text, expected);
    assert_eq!(answer.logprobs.len(), answer.tokens.len());
    let bytes: Vec<u8> = answer.logprobs.iter().flat_map(|logprob| logprob.bytes.clone()).collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), expected);
    for (token, logprob) in answer.tokens.iter().zip(&answer.logprobs) {
        // Greedy takes the best one, and the toy model is sure of it.
        assert_eq!((logprob.top.len(), logprob.top[0].token), (3, *token), "{logprob:?}");
        assert!((logprob.top[0].logprob - logprob.logprob).abs() < 1e-6, "{logprob:?}");
        assert!(logprob.top.is_sorted_by(|left, right| left.logprob >= right.logprob), "{logprob:?}");
        let sum: f32 = logprob.top.iter().map(|top| top.logprob.exp()).sum();
        assert!(sum <= 1.0001 && logprob.logprob.exp() > 0.5, "{logprob:?}");
    }
    stop(&engine);
}

#[tokio::test]
async fn sampling_follows_its_parameters() {
    let (_folder, path) = generated(&Spec::default());
    let engine = start(&config(path, dynamic(256, 1024, 4)));
    let with = |sampling| GenerateRequest { max_tokens: Some(24), sampling, ..request(&engine, "Once upon a time") };
    let hot =
        |seed| SamplingParams { temperature: 2.0, seed: Some(seed), top_k: 0, top_p: 1.0, min_p: 0.0, ..greedy() };
    let first = ask(&engine, with(hot(1))).await.text;
    assert_eq!(ask(&engine, with(hot(1))).await.text, first, "the same seed says the same");
    assert_ne!(ask(&engine, with(hot(2))).await.text, first, "another seed says something else");
    let one = SamplingParams { top_k: 1, ..hot(3) };
    let best = ask(&engine, with(greedy())).await.tokens;
    assert_eq!(ask(&engine, with(one)).await.tokens, best, "top_k 1 is greedy");
    let forbidden = SamplingParams { logit_bias: vec![(best[0], -1000.0)], ..greedy() };
    assert!(!ask(&engine, with(forbidden)).await.tokens.contains(&best[0]), "a token that was biased away");
    let wanted = SamplingParams { logit_bias: vec![(best[0], 1000.0)], ..greedy() };
    let same = ask(&engine, with(wanted)).await.tokens;
    assert!(same.iter().all(|&token| token == best[0]), "{same:?}");
    let tired = SamplingParams { logit_bias: vec![(best[0], 50.0)], frequency_penalty: 20.0, ..greedy() };
    let varied = ask(&engine, with(tired)).await.tokens;
    assert!(varied[0] == best[0] && varied.iter().any(|&token| token != best[0]), "{varied:?}");
    stop(&engine);
}

/// A reader that does not read holds up nobody else, and goes on where it was.
#[tokio::test]
async fn a_slow_reader_parks_only_its_own_sequence() {
    let engine = start_toy(dynamic(512, 2048, 2));
    let long = request(&engine, &chat(toy::LONG_QUESTION));
    let expected = ask(&engine, long.clone()).await.text;
    let before = engine.stats().generated_tokens;
    let slow = engine.submit(long).unwrap();
    // The channel takes 64 events; then nothing more is generated, though the answer has hundreds of tokens.
    until(&engine, "the channel is full", |stats| stats.generated_tokens >= before + 64).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let parked = engine.stats();
    assert!(parked.running == 1 && parked.generated_tokens < before + 100, "{before} {parked:?}");
    for (question, expected) in questions(4) {
        assert_eq!(ask(&engine, request(&engine, &question)).await.text, expected);
    }
    assert_eq!(engine.stats().running, 1, "the parked one is still there: {parked:?}");
    let answer = read(slow).await;
    assert_eq!((answer.text, answer.end.is_ok()), (expected, true));
    stop(&engine);
}

#[tokio::test]
async fn shutdown_lets_requests_end_until_its_deadline() {
    let engine = start_toy(dynamic(512, 1024, 2));
    let (question, expected) = questions(1).remove(0);
    let running = engine.submit(request(&engine, &question)).unwrap();
    let closing = engine.clone();
    let closed = tokio::task::spawn_blocking(move || closing.shutdown(Instant::now() + PATIENCE));
    assert_eq!(read(running).await.text, expected);
    tokio::time::timeout(PATIENCE, closed).await.expect("the engine ends").unwrap();
    assert_eq!(engine.ended().await, Ok(()));

    let engine = start_toy(dynamic(512, 1024, 2));
    let mut endless = engine.submit(request(&engine, &chat(toy::ENDLESS_QUESTION))).unwrap();
    assert!(matches!(next(&mut endless).await, Some(GenerateEvent::Token { .. })));
    let closing = engine.clone();
    tokio::task::spawn_blocking(move || closing.shutdown(Instant::now())).await.unwrap();
    assert_eq!(read(endless).await.end.unwrap_err(), EngineError::ShutDown);
    assert_eq!(engine.stats().running, 0);
}
