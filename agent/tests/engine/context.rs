//! A context that grows and shrinks, and models whose state is of another kind.

use super::*;

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
    // Nobody waited for this one.
    until(&engine, "the context has grown", |stats| stats.resizes == 1).await;
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
