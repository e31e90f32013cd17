//! The engine on real llama.cpp, on the CPU: a toy model whose greedy answers are known, and generated models.

#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

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

/// The context grows while sequences run, and they say what they say in one that was large from the start.
#[tokio::test]
async fn growth_moves_running_sequences() {
    let fixed = start_toy(ContextSpec { sizing: ContextSizing::Fixed, ..dynamic(256, 1024, 2) });
    assert_eq!(fixed.report().context_tokens, 2048);
    let long = chat(toy::LONG_QUESTION);
    let counting = chat("Count from one to forty.");
    let expected = ask(&fixed, request(&fixed, &long)).await;
    let expected_count = ask(&fixed, request(&fixed, &counting)).await;
    assert_eq!(expected.reason(), FinishReason::Stop);
    assert!(expected.usage().completion_tokens > 250, "{expected:?}");
    assert_eq!(fixed.stats().resizes, 0);
    stop(&fixed);

    let engine = start_toy(dynamic(256, 1024, 2));
    assert_eq!(engine.report().context_tokens, 256);
    let mut changes = engine.watch();
    let both = futures::future::join(ask(&engine, request(&engine, &long)), ask(&engine, request(&engine, &counting)));
    let (answer, count) = both.await;
    assert_eq!(answer.text, expected.text);
    assert_eq!(count.text, expected_count.text);
    let stats = engine.stats();
    assert!(stats.resizes >= 1 && stats.cells_total >= 512, "{stats:?}");
    assert!(changes.has_changed().unwrap());
    let report = changes.borrow_and_update().clone();
    assert_eq!(report.context_tokens, stats.cells_total);
    assert!(report.memory[0].context_bytes > 0);
    stop(&engine);
}

/// A stream whose context grows twice under it says, to the bit, what it says in one that was large from the start.
#[tokio::test]
async fn growth_changes_no_bit() {
    let (_folder, path) = generated(&Spec::default());
    let run = GenerateRequest {
        prompt: vec![60; 100],
        logprobs: Some(1),
        ignore_eos: true,
        sampling: greedy(),
        ..GenerateRequest::default()
    };
    let said = |answer: &Answer| -> Vec<(Token, u32)> {
        answer.tokens.iter().zip(&answer.logprobs).map(|(token, logprob)| (*token, logprob.logprob.to_bits())).collect()
    };
    let large = start(&config(path.clone(), dynamic(1800, 1800, 1)));
    let expected = ask(&large, run.clone()).await;
    assert_eq!((expected.tokens.len(), large.stats().resizes), (1700, 0));
    stop(&large);
    let small = start(&config(path, dynamic(256, 1800, 1)));
    let answer = ask(&small, run).await;
    // To 1024 cells for the request, then to 1536 and to all.
    assert_eq!(small.stats().resizes, 3, "{:?}", small.stats());
    assert!(said(&answer) == said(&expected));
    stop(&small);
}

/// A prompt that does not fit grows the context before it is read; the answer is that of a context made for it.
#[tokio::test]
async fn a_long_prompt_grows_the_context() {
    let turns = questions(14);
    let past: Vec<_> = turns[1..].iter().map(|(question, answer)| format!("{question}{answer}<|im_end|>\n")).collect();
    let prompt = format!("{}{}", past.concat(), turns[0].0);
    let fixed = start_toy(ContextSpec { sizing: ContextSizing::Fixed, ..dynamic(256, 4096, 1) });
    let run = GenerateRequest { max_tokens: Some(32), ..request(&fixed, &prompt) };
    let expected = ask(&fixed, run.clone()).await;
    stop(&fixed);
    let engine = start_toy(dynamic(256, 4096, 2));
    assert_eq!(engine.report().context_tokens, 256);
    let answer = ask(&engine, run).await;
    let prompt_tokens = answer.usage().prompt_tokens;
    assert!(prompt_tokens > 300, "{prompt_tokens}");
    assert!(engine.report().context_tokens >= 2 * prompt_tokens, "{:?}", engine.report());
    assert_eq!(engine.stats().resizes, 1);
    assert_eq!((answer.text, answer.tokens), (expected.text, expected.tokens));
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

    // One runs, one waits, the third is refused; the one that waits leaves at its deadline.
    let endless = request(&engine, &chat(toy::ENDLESS_QUESTION));
    let mut running = engine.submit(endless.clone()).unwrap();
    assert!(matches!(next(&mut running).await, Some(GenerateEvent::Token { .. })));
    let deadline = Some(Instant::now() + Duration::from_millis(20));
    let waiting = engine.submit(GenerateRequest { deadline, ..endless.clone() }).unwrap();
    assert_eq!(engine.submit(endless.clone()).unwrap_err(), SubmitError::QueueFull { limit: 1 });
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

/// Sizes that alternate make the context as large as the largest needs, once; nothing is loaded again.
#[tokio::test]
async fn alternating_sizes_do_not_thrash() {
    let (_folder, path) = generated(&Spec::default());
    let engine = start(&config(path, dynamic(256, 2048, 2)));
    for round in 0..200i32 {
        let length = [100, 900, 300, 500][usize::try_from(round % 4).expect("small")];
        let prompt = (0..length).map(|i| 40 + (i * (round + 3) + round) % 60).collect();
        let run = GenerateRequest { prompt, max_tokens: Some(2), sampling: greedy(), ..GenerateRequest::default() };
        assert_eq!(ask(&engine, run).await.reason(), FinishReason::Length);
    }
    let stats = engine.stats();
    // To 1024 for the first, and to 2048 when five seconds have gone by: 900 tokens want headroom, but fit.
    assert!((1..=2).contains(&stats.resizes), "{stats:?}");
    assert_eq!((stats.shrinks, stats.finished_length), (0, 200), "{stats:?}");
    stop(&engine);
}

/// What was computed before the context grew is found after it.
#[tokio::test]
async fn prefix_reuse_survives_another_size() {
    let (_folder, path) = generated(&Spec::default());
    let engine = start(&config(path, dynamic(256, 2048, 2)));
    let run = |token: Token, length: usize| GenerateRequest {
        prompt: vec![token; length],
        max_tokens: Some(2),
        sampling: greedy(),
        ..GenerateRequest::default()
    };
    ask(&engine, run(50, 120)).await;
    assert_eq!(engine.stats().resizes, 1);
    ask(&engine, run(51, 1100)).await;
    assert_eq!(engine.stats().resizes, 2);
    let usage = ask(&engine, run(50, 120)).await.usage();
    assert_eq!((usage.prompt_tokens, usage.cached_tokens), (120, 119));
    stop(&engine);
}

/// The state of a recurrent model has one size: the context is a policy, and never changes.
#[tokio::test]
async fn a_recurrent_model_has_its_context_from_the_start() {
    let (_folder, path) = generated(&Spec { architecture: Architecture::Mamba, ..Spec::default() });
    let [small, large] = [1024, 8192].map(|max| start(&config(path.clone(), dynamic(256, max, 2))));
    assert_eq!((small.report().context_tokens, large.report().context_tokens), (2048, 16_384));
    let bytes = |engine: &Engine| engine.report().memory[0].context_bytes;
    assert!(bytes(&small) > 0 && bytes(&small) == bytes(&large), "{:?} {:?}", small.report(), large.report());
    let prompt = (0..900).map(|i| 40 + i % 60).collect();
    let run = GenerateRequest { prompt, max_tokens: Some(300), sampling: greedy(), ..GenerateRequest::default() };
    let answer = ask(&small, run).await;
    // The policy is kept all the same.
    assert_eq!((answer.reason(), answer.usage().completion_tokens), (FinishReason::Length, 124));
    assert_eq!(small.stats().resizes, 0);
    stop(&small);
    stop(&large);
}

/// A model with a sliding window: growth moves both of its caches.
#[tokio::test]
async fn a_sliding_window_model_runs_and_grows() {
    let spec =
        Spec { architecture: Architecture::Gemma3, layers: 6, context: 4096, sliding_window: 64, ..Spec::default() };
    let (_folder, path) = generated(&spec);
    let engine = start(&config(path, dynamic(256, 2048, 2)));
    assert!(
        engine.report().notes.iter().any(|note| note.contains("sliding window of 64")),
        "{:?}",
        engine.report().notes
    );
    let run = |token| GenerateRequest {
        prompt: vec![token; 300],
        max_tokens: Some(500),
        sampling: greedy(),
        ..GenerateRequest::default()
    };
    let (left, right) = futures::future::join(ask(&engine, run(40)), ask(&engine, run(41))).await;
    for answer in [&left, &right] {
        assert_eq!((answer.usage().completion_tokens, answer.usage().cached_tokens), (500, 0));
    }
    assert!(engine.stats().cells_total > 1024, "{:?}", engine.stats());
    stop(&engine);
}

/// llama.cpp's dry run says to the byte what a loaded model takes.
#[test]
fn the_estimate_is_what_is_measured() {
    let plain = Spec { vocab: 4096, layers: 4, embd: 128, ..Spec::default() };
    let shapes = [
        ("F16", plain.clone(), dynamic(512, 2048, 4), EngineSpec::default()),
        (
            "Q4_0, fixed, quantised cache",
            Spec { quantization: Quantization::Q4_0, embd: 256, ..plain.clone() },
            ContextSpec {
                sizing: ContextSizing::Fixed,
                key_cache_type: CacheType::Q8_0,
                value_cache_type: CacheType::Q8_0,
                ..dynamic(512, 1024, 3)
            },
            EngineSpec::default(),
        ),
        (
            "no flash attention, small batch",
            plain.clone(),
            dynamic(1024, 2048, 1),
            EngineSpec {
                flash_attention: FlashAttention::Off,
                batch_tokens: Some(128),
                micro_batch_tokens: Some(64),
                ..EngineSpec::default()
            },
        ),
        (
            "sliding window",
            Spec { architecture: Architecture::Gemma3, layers: 6, ..plain },
            dynamic(512, 2048, 4),
            EngineSpec::default(),
        ),
    ];
    for (name, spec, context, engine_spec) in shapes {
        let (_folder, path) = generated(&spec);
        let config = RunnerConfig { engine: engine_spec, ..config(path, context) };
        let estimate = engine::estimate(&config).unwrap_or_else(|error| panic!("{name}: {error}"));
        let engine = start(&config);
        let report = engine.report();
        assert_eq!(estimate.memory, report.memory, "{name}");
        assert_eq!(
            (estimate.context_tokens, estimate.max_tokens, estimate.layers_total, estimate.layers_offloaded),
            (report.context_tokens, report.max_tokens, report.layers_total, report.layers_offloaded),
            "{name}"
        );
        let MemoryUse { weights_bytes, context_bytes, compute_bytes, other_bytes, .. } = estimate.memory[0];
        assert!([weights_bytes, context_bytes, compute_bytes, other_bytes].iter().all(|&bytes| bytes > 0), "{name}");
        stop(&engine);
    }
}

/// A context of fixed size that no machine has memory for is refused with the numbers, before it is made.
#[test]
fn a_fixed_context_that_does_not_fit_is_refused_with_numbers() {
    let spec = Spec {
        layers: 64,
        embd: 256,
        heads: 4,
        kv_heads: 4,
        context: 1 << 24,
        quantization: Quantization::Q4_0,
        ..Spec::default()
    };
    let (_folder, path) = generated(&spec);
    let devices = engine::probe().expect("a device list").devices;
    let machine = devices.iter().find(|device| device.id == "CPU").expect("a CPU").memory_total_bytes;
    // 64 KiB a cell: keys and values of 256 halves in 64 layers.
    let max_tokens = i32::try_from(machine / (64 << 10) / 4 + 256).expect("no machine has that much");
    let context = ContextSpec { sizing: ContextSizing::Fixed, ..dynamic(256, max_tokens, 4) };
    let error = Engine::start(&config(path, context), &|_| {}).expect_err("more than there is");
    assert_eq!(error.reason(), "InsufficientMemory", "{error}");
    let words = format!("{max_tokens} tokens for each of 4 requests need ");
    assert!(error.to_string().contains(&words) && error.to_string().contains(" are free"), "{error}");
}

/// More tokens than a model was trained with need a stretched rotation: without one it is refused with the numbers, by the
/// dry run too, where the operator looks.
#[test]
fn positions_that_nobody_trained_need_a_rope() {
    let (_folder, path) = generated(&Spec::default());
    let beyond = |rope| config(path.clone(), ContextSpec { rope, ..dynamic(256, 4096, 1) });
    for error in [
        Engine::start(&beyond(None), &|_| {}).expect_err("refused"),
        engine::estimate(&beyond(None)).expect_err("refused"),
    ] {
        assert_eq!(error.reason(), "UnsupportedSpec", "{error}");
        let words = ["maxTokens is 4096", "trained with 2048", "context.rope"];
        assert!(words.iter().all(|words| error.to_string().contains(words)), "{error}");
    }
    for (factor, is_enough) in [(2, true), (1, false)] {
        let rope = RopeSpec { scaling: RopeScaling::Yarn, factor, original_tokens: None };
        let engine = start(&beyond(Some(rope)));
        let notes = engine.report().notes;
        assert_eq!((engine.report().max_tokens, notes.is_empty()), (4096, is_enough), "{notes:?}");
        stop(&engine);
    }
}

#[test]
fn bad_files_are_refused_with_llama_cpps_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("bad.gguf");
    let cases = [
        (BadFile::NotGguf, "LoadFailed", "magic"),
        (BadFile::Empty, "LoadFailed", "magic"),
        (BadFile::Truncated, "LoadFailed", "not within the file bounds"),
        (BadFile::TruncatedHeader, "LoadFailed", "failed to"),
        (BadFile::CorruptHeader, "LoadFailed", "failed to"),
        (BadFile::UnknownVersion, "LoadFailed", "version"),
        (BadFile::UnknownArchitecture, "UnknownArchitecture", "guana"),
        (BadFile::MissingTensor, "LoadFailed", "blk.0.ffn_up.weight"),
    ];
    // The one that is missing ends the process; the worker's tests have it.
    assert_eq!(cases.len() + 1, BadFile::ALL.len());
    for (bad, reason, words) in cases {
        bad.write(&Spec::default(), &path).expect("a bad file");
        refused(&path, reason, words, &format!("{bad:?}"));
    }
    refused(&folder.path().join("missing.gguf"), "LoadFailed", "No such file", "missing");
}

fn refused(path: &Path, reason: &str, words: &str, name: &str) {
    let config = config(path.to_owned(), ContextSpec::default());
    let loaded = Engine::start(&config, &|_| {}).map(|_| ());
    let estimated = engine::estimate(&config).map(|_| ());
    for (way, result) in [("start", loaded), ("estimate", estimated)] {
        let error = result.expect_err(name);
        assert_eq!(error.reason(), reason, "{name}, {way}: {error}");
        assert!(error.to_string().contains(words), "{name}, {way}: {error}");
    }
}

#[test]
fn the_cpu_is_a_device() {
    let report = engine::probe().expect("a device list");
    let last = report.devices.last().expect("a device");
    assert_eq!((last.id.as_str(), last.kind.as_str()), ("CPU", "CPU"), "{report:?}");
    assert!(last.memory_total_bytes > 1 << 28 && report.backends.contains(&"CPU".to_owned()), "{report:?}");

    let missing = RunnerConfig { devices: vec!["CUDA7".to_owned()], ..config(toy::path(), ContextSpec::default()) };
    let error = Engine::start(&missing, &|_| {}).expect_err("a device that is not there");
    assert_eq!(error, EngineError::UnknownDevice("CUDA7".to_owned()));
}
