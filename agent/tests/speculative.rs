//! Speculative decoding on real llama.cpp: whoever guesses, however well, the answer is the model's own.

#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

#[path = "support/engine.rs"]
mod support;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use altiplano_agent::engine::{
    self, Engine, FinishReason, GenerateEvent, GenerateRequest, Grammar, SamplingParams, Token,
};
use altiplano_agent::runner::protocol::{MemoryUse, RunnerConfig};
use altiplano_crds::model_deployment::{ContextSizing, ContextSpec, EngineSpec, SpeculativeSpec, SpeculativeType};
use altiplano_test_models::{Architecture, Spec, toy};
use tempfile::TempDir;

use support::*;

/// Who guesses.
#[derive(Clone, Debug)]
struct Guesser {
    name: &'static str,
    spec: Option<SpeculativeSpec>,
    draft: Option<PathBuf>,
    _folder: Option<std::sync::Arc<TempDir>>,
}

fn spec(kind: SpeculativeType, max_tokens: i32) -> SpeculativeSpec {
    let max_tokens = Some(max_tokens);
    SpeculativeSpec { kind, max_tokens, min_tokens: None, min_probability: None, match_tokens: None }
}

fn nobody() -> Guesser {
    Guesser { name: "nobody", spec: None, draft: None, _folder: None }
}

fn past() -> Guesser {
    let spec = SpeculativeSpec { match_tokens: Some(3), ..spec(SpeculativeType::NGram, 16) };
    Guesser { name: "the past", spec: Some(spec), draft: None, _folder: None }
}

/// The toy model itself: right each time.
fn itself() -> Guesser {
    let spec = spec(SpeculativeType::Draft, 5);
    Guesser { name: "itself", spec: Some(spec), draft: Some(toy::path()), _folder: None }
}

/// A model that is often wrong.
fn poor() -> Guesser {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("poor.gguf");
    toy::write_poor(&path).expect("a model file");
    // Not even the spec says more than that there is one.
    Guesser { name: "a poor model", spec: None, draft: Some(path), _folder: Some(std::sync::Arc::new(folder)) }
}

/// The same, asked only for what it is sure of, and heard only when that is something.
fn careful() -> Guesser {
    let wanted = spec(SpeculativeType::Draft, 6);
    let spec = SpeculativeSpec { min_tokens: Some(2), min_probability: Some("0.6".to_owned()), ..wanted };
    Guesser { name: "a careful model", spec: Some(spec), ..poor() }
}

fn all() -> [Guesser; 4] {
    [past(), itself(), poor(), careful()]
}

fn config(model_path: PathBuf, context: ContextSpec, guesser: &Guesser) -> RunnerConfig {
    let engine = EngineSpec { speculative: guesser.spec.clone(), ..EngineSpec::default() };
    RunnerConfig { draft_path: guesser.draft.clone(), engine, ..support::config(model_path, context) }
}

fn start(context: ContextSpec, guesser: &Guesser) -> Engine {
    Engine::start(&config(toy::path(), context, guesser), &|_| {}).expect("the engine starts")
}

/// All of an answer that does not depend on the clock.
fn said(answer: &Answer) -> (&str, &[Token], Option<&str>, FinishReason, u32) {
    (&answer.text, &answer.tokens, answer.stop.as_deref(), answer.reason(), answer.usage().completion_tokens)
}

/// Asks the same until a guess was right, and returns all answers: guesses pause where a busy machine makes them dear, and
/// each request begins anew.
async fn until_right(engine: &Engine, request: GenerateRequest) -> Vec<Answer> {
    let (before, deadline) = (engine.stats(), Instant::now() + PATIENCE);
    let mut answers = Vec::new();
    loop {
        answers.push(ask(engine, request.clone()).await);
        let stats = engine.stats();
        if stats.accepted_tokens > before.accepted_tokens {
            return answers;
        }
        assert!(Instant::now() < deadline, "no guess was right: {stats:?}, before {before:?}");
    }
}

/// Alone and several at once, in one pool and in parts.
#[tokio::test]
async fn greedy_answers_are_the_same_whoever_guesses() {
    let base = start(dynamic(1024, 2048, 1), &nobody());
    let long = ask(&base, request(&base, &chat(toy::LONG_QUESTION))).await;
    let endless =
        |engine: &Engine| GenerateRequest { max_tokens: Some(200), ..request(engine, &chat(toy::ENDLESS_QUESTION)) };
    let expected = ask(&base, endless(&base)).await;
    assert_eq!((base.stats().drafted_tokens, long.timings().drafted), (0, 0));
    stop(&base);
    for guesser in all() {
        for sizing in [ContextSizing::Dynamic, ContextSizing::Fixed] {
            let engine = start(ContextSpec { sizing, ..dynamic(1024, 1024, 4) }, &guesser);
            let name = guesser.name;
            let answers = until_right(&engine, endless(&engine)).await;
            for alone in &answers {
                assert_eq!(said(alone), said(&expected), "{name}");
            }
            let stats = engine.stats();
            assert!(stats.drafted_tokens >= stats.accepted_tokens, "{name}: {stats:?}");
            let sum = |count: fn(&Answer) -> u32| answers.iter().map(|answer| u64::from(count(answer))).sum::<u64>();
            assert_eq!(sum(|answer| answer.timings().drafted), stats.drafted_tokens, "{name}");
            assert_eq!(sum(|answer| answer.timings().accepted), stats.accepted_tokens, "{name}");
            // Each token takes a step, but for those that were guessed right, and the prompt a few; the last token of all may
            // have been guessed.
            let (steps, asked) = (stats.generated_tokens - stats.accepted_tokens, answers.len() as u64);
            assert!((steps - asked..=steps + 3 * asked).contains(&stats.steps), "{name}: steps are saved: {stats:?}");
            assert_eq!(said(&ask(&engine, request(&engine, &chat(toy::LONG_QUESTION))).await), said(&long), "{name}");

            let questions = questions(16);
            let generations: Vec<_> = questions
                .iter()
                .map(|(question, _)| engine.submit(request(&engine, question)).expect("the request is taken"))
                .collect();
            let answers = futures::future::join_all(generations.into_iter().map(read)).await;
            for ((question, expected), answer) in questions.iter().zip(&answers) {
                assert_eq!(&answer.text, expected, "{name}: {question}");
            }
            let stats = engine.stats();
            assert_eq!((stats.failed, stats.cells_used), (0, stats.cells_kept), "{name}: {stats:?}");
            stop(&engine);
        }
    }
}

/// Each place is sampled with the state after those before it.
#[tokio::test]
async fn whatever_shapes_an_answer_shapes_it_the_same() {
    let cases = |engine: &Engine| -> Vec<(&'static str, GenerateRequest)> {
        let song = GenerateRequest { max_tokens: Some(80), ..request(engine, &chat(toy::ENDLESS_QUESTION)) };
        let with = |sampling| GenerateRequest { sampling, ..song.clone() };
        let long = request(engine, &chat(toy::LONG_QUESTION));
        let gbnf = |source: &str| Some(Grammar::Gbnf { source: source.to_owned(), lazy: None, prefix: String::new() });
        vec![
            ("a penalty", with(SamplingParams { repeat_penalty: 1.3, ..greedy() })),
            ("one candidate", with(SamplingParams { top_k: 1, temperature: 1.0, seed: Some(7), ..greedy() })),
            ("a stop text", GenerateRequest { stop: vec!["la la la la la la la ".to_owned()], ..song.clone() }),
            ("a stop text over tokens", GenerateRequest { stop: vec!["la la l".to_owned()], ..song.clone() }),
            (
                "a grammar",
                GenerateRequest { grammar: gbnf("root ::= (\" la\" \" la\" \" lo\"? \".\"?)+"), ..song.clone() },
            ),
            ("a grammar that ends", GenerateRequest { grammar: gbnf("root ::= (\" la\"){24} \"!\""), ..song.clone() }),
            ("a limit", GenerateRequest { max_tokens: Some(29), ..song.clone() }),
            ("every token", GenerateRequest { every_token: true, ..song }),
            ("its own end", long.clone()),
            ("beyond its end", GenerateRequest { ignore_eos: true, max_tokens: Some(500), ..long }),
        ]
    };
    let base = start(dynamic(1024, 1024, 2), &nobody());
    let mut expected = Vec::new();
    for (name, request) in cases(&base) {
        expected.push((name, ask(&base, request).await));
    }
    stop(&base);
    for guesser in all() {
        let engine = start(dynamic(1024, 1024, 2), &guesser);
        for ((name, expected), (_, request)) in expected.iter().zip(cases(&engine)) {
            assert_eq!(said(&ask(&engine, request).await), said(expected), "{}: {name}", guesser.name);
        }
        if engine.stats().accepted_tokens == 0 {
            until_right(&engine, cases(&engine).remove(1).1).await;
        }
        // Nobody knows what they say, but they say all of it.
        let hot = SamplingParams { temperature: 1.5, seed: Some(3), ..SamplingParams::default() };
        let hot =
            GenerateRequest { sampling: hot, ignore_eos: true, max_tokens: Some(100), ..request(&engine, "Llamas") };
        let answer = ask(&engine, hot).await;
        assert_eq!(said(&answer).4, 100, "{}: {answer:?}", guesser.name);
        stop(&engine);
    }
}

#[tokio::test]
async fn log_probabilities_come_with_each_token() {
    let run = |engine: &Engine| GenerateRequest {
        logprobs: Some(2),
        max_tokens: Some(100),
        ..request(engine, &chat(toy::ENDLESS_QUESTION))
    };
    let base = start(dynamic(1024, 1024, 1), &nobody());
    let expected = ask(&base, run(&base)).await;
    stop(&base);
    for guesser in [past(), itself()] {
        let engine = start(dynamic(1024, 1024, 1), &guesser);
        let answer = until_right(&engine, run(&engine)).await.pop().expect("an answer");
        assert_eq!(said(&answer), said(&expected));
        assert!(answer.timings().accepted > 0, "{}", guesser.name);
        for (found, expected) in answer.logprobs.iter().zip(&expected.logprobs) {
            // Other company in the batch moves logits by some hundredths.
            assert!((found.logprob - expected.logprob).abs() < 0.1, "{}: {found:?} {expected:?}", guesser.name);
            assert_eq!(found.top[0].token, expected.top[0].token);
        }
        stop(&engine);
    }
}

#[tokio::test]
async fn a_cancelled_guess_leaves_nothing() {
    for guesser in [past(), itself()] {
        let engine = start(dynamic(1024, 1024, 2), &guesser);
        for taken in [3, 17, 40] {
            let mut endless = engine.submit(request(&engine, &chat(toy::ENDLESS_QUESTION))).expect("it is taken");
            for _ in 0..taken {
                assert!(matches!(next(&mut endless).await, Some(GenerateEvent::Token { .. })));
            }
            drop(endless);
            until(&engine, "the slot is free", |stats| stats.running == 0).await;
        }
        until(&engine, "only kept cells are left", |stats| stats.cells_used == stats.cells_kept).await;
        let (question, expected) = questions(1).remove(0);
        assert_eq!(ask(&engine, request(&engine, &question)).await.text, expected);
        // What was kept goes on rightly.
        let song = GenerateRequest { max_tokens: Some(40), ..request(&engine, &chat(toy::ENDLESS_QUESTION)) };
        let answer = ask(&engine, song).await;
        assert!(answer.text.starts_with(" la la la") || answer.text.contains("la la la la"), "{answer:?}");
        let stats = engine.stats();
        assert_eq!((stats.cancelled, stats.failed), (3, 0), "{stats:?}");
        stop(&engine);
    }
}

/// A slow reader parks its sequence, with no more tokens under way than its channel holds.
#[tokio::test]
async fn a_slow_reader_misses_no_token() {
    for guesser in [past(), itself()] {
        let engine = start(dynamic(1024, 1024, 2), &guesser);
        let song = GenerateRequest { max_tokens: Some(400), ..request(&engine, &chat(toy::ENDLESS_QUESTION)) };
        let expected = ask(&engine, song.clone()).await;
        let before = engine.stats().generated_tokens;
        let slow = engine.submit(song).expect("it is taken");
        until(&engine, "it is parked", |stats| stats.generated_tokens >= before + 64).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(engine.stats().generated_tokens, before + 64, "{}", guesser.name);
        assert_eq!(said(&read(slow).await), said(&expected), "{}", guesser.name);
        stop(&engine);
    }
}

/// The context, and that of the draft model, grow under running streams.
#[tokio::test]
async fn growth_does_not_disturb_guesses() {
    let long = chat(toy::LONG_QUESTION);
    let counting = chat("Count from one to forty.");
    let base = start(dynamic(2048, 1024, 2), &nobody());
    let expected = ask(&base, request(&base, &long)).await;
    let counted = ask(&base, request(&base, &counting)).await;
    stop(&base);
    for guesser in all() {
        let engine = start(dynamic(256, 1024, 2), &guesser);
        let before = engine.report();
        assert_eq!(before.context_tokens, 256);
        let both =
            futures::future::join(ask(&engine, request(&engine, &long)), ask(&engine, request(&engine, &counting)));
        let (answer, count) = both.await;
        assert_eq!(said(&answer), said(&expected), "{}", guesser.name);
        assert_eq!(said(&count), said(&counted), "{}", guesser.name);
        if engine.stats().accepted_tokens == 0 {
            for count in until_right(&engine, request(&engine, &counting)).await {
                assert_eq!(said(&count), said(&counted), "{}", guesser.name);
            }
        }
        let (stats, after) = (engine.stats(), engine.report());
        assert!(stats.resizes >= 1 && stats.cells_total >= 512 && stats.accepted_tokens > 0, "{stats:?}");
        // Both contexts are counted: the toy model's takes 256 bytes a layer and cell, keys and values.
        let contexts = 1 + u64::from(guesser.draft.is_some());
        let bytes = |cells: u32| u64::from(cells) * 4 * 2 * 64 * 2 * contexts;
        assert_eq!(before.memory[0].context_bytes, bytes(256), "{}", guesser.name);
        assert_eq!(after.memory[0].context_bytes, bytes(stats.cells_total), "{}", guesser.name);
        // And they shrink together.
        let mut report = engine.watch();
        engine.shrink(0);
        let shrunk = report.wait_for(|report| report.context_tokens == 256);
        tokio::time::timeout(PATIENCE, shrunk).await.expect("soon").expect("the engine runs");
        assert_eq!(engine.report().memory[0].context_bytes, bytes(256), "{}", guesser.name);
        let again = ask(&engine, request(&engine, &counting)).await;
        assert_eq!(said(&again), said(&counted), "{}", guesser.name);
        stop(&engine);
    }
}

/// A prompt whose beginning is in the cache: the draft model reads what it lacks, and guesses again.
#[tokio::test]
async fn a_conversation_goes_on_with_guesses() {
    for guesser in [past(), itself(), poor()] {
        let engine = start(dynamic(1024, 2048, 2), &guesser);
        let mut conversation = String::new();
        for (question, answer) in questions(6) {
            conversation.push_str(&question);
            let found = ask(&engine, request(&engine, &conversation)).await;
            assert!(!found.text.is_empty() && matches!(found.end, Ok((FinishReason::Stop, ..))), "{found:?}");
            conversation.push_str(&answer);
            conversation.push_str("<|im_end|>\n");
        }
        let stats = engine.stats();
        assert!(stats.cached_prompt_tokens > stats.prompt_tokens / 2, "{stats:?}");
        let song = format!("{conversation}{}{}", chat(toy::ENDLESS_QUESTION), " la".repeat(12));
        let song = GenerateRequest { max_tokens: Some(60), ..request(&engine, &song) };
        let answer = until_right(&engine, song).await.pop().expect("an answer");
        assert!(answer.text.contains("la la la") && answer.timings().accepted > 0, "{}: {answer:?}", guesser.name);
        stop(&engine);
    }
}

/// A sliding window is cut by no more than a step's own tokens; a recurrent state cannot be cut, so nothing is guessed.
#[tokio::test]
async fn what_cannot_be_cut_does_not_guess() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = GenerateRequest {
        prompt: [40, 41, 42, 43].repeat(40),
        ignore_eos: true,
        max_tokens: Some(150),
        sampling: SamplingParams { logit_bias: vec![(40, 100.0)], ..greedy() },
        ..GenerateRequest::default()
    };
    for (architecture, guesses) in [(Architecture::Gemma3, true), (Architecture::Mamba, false)] {
        let path = folder.path().join(format!("{architecture:?}.gguf"));
        let spec = Spec { architecture, layers: 6, sliding_window: 64, endless: true, ..Spec::default() };
        spec.write(&path).expect("a model file");
        let config = config(path, dynamic(1024, 1024, 2), &past());
        let engine = Engine::start(&config, &|_| {}).expect("the engine starts");
        let noted = engine.report().notes.iter().any(|note| note.contains("nothing is guessed"));
        assert_eq!(noted, !guesses, "{:?}", engine.report());
        let answers =
            if guesses { until_right(&engine, run.clone()).await } else { vec![ask(&engine, run.clone()).await] };
        for answer in answers {
            assert_eq!(answer.tokens, [40; 150], "{architecture:?}");
        }
        assert!(guesses || engine.stats().drafted_tokens == 0, "{architecture:?}: {:?}", engine.stats());
        stop(&engine);
    }
}

#[tokio::test]
async fn a_draft_model_that_does_not_fit_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, spec: Spec| {
        let path = folder.path().join(name);
        spec.write(&path).expect("a model file");
        path
    };
    let plain = Spec::default();
    let cases = [
        ("its vocabulary has", write("large.gguf", Spec { vocab: 2048, ..plain.clone() })),
        ("its token", write("other.gguf", Spec { vocab: 1024, ..plain.clone() })),
        (
            "its vocabulary is of kind",
            write("spm.gguf", Spec { tokenizer: altiplano_test_models::Tokenizer::Spm, ..plain.clone() }),
        ),
    ];
    for (words, draft) in cases {
        let guesser = Guesser { draft: Some(draft), ..nobody() };
        let config = config(toy::path(), dynamic(256, 512, 1), &guesser);
        let refused = [engine::estimate(&config).unwrap_err(), Engine::start(&config, &|_| {}).unwrap_err()];
        for error in refused {
            assert_eq!(error.reason(), "DraftUnfit", "{error}");
            assert!(error.to_string().contains(words), "{error}");
        }
    }
    // Of the same vocabulary, but what it has guessed cannot be taken back.
    let target = write("target.gguf", plain.clone());
    let mamba = write("mamba.gguf", Spec { architecture: Architecture::Mamba, ..plain });
    let config = config(target, dynamic(256, 512, 1), &Guesser { draft: Some(mamba), ..nobody() });
    let error = Engine::start(&config, &|_| {}).unwrap_err();
    assert!(error.to_string().contains("its state cannot be cut"), "{error}");
    let missing = Guesser { draft: Some(folder.path().join("missing.gguf")), ..nobody() };
    let error = Engine::start(&self::config(toy::path(), dynamic(256, 512, 1), &missing), &|_| {}).unwrap_err();
    assert!(error.to_string().contains("missing.gguf"), "{error}");
}

/// What the dry run says is what is taken, weights, cache and compute of the draft model among it.
#[tokio::test]
async fn the_estimate_counts_the_draft_model() {
    let total = |memory: &[MemoryUse]| memory.iter().map(MemoryUse::total).sum::<u64>();
    for sizing in [ContextSizing::Dynamic, ContextSizing::Fixed] {
        let context = ContextSpec { sizing, ..dynamic(1024, 1024, 2) };
        let alone = engine::estimate(&config(toy::path(), context.clone(), &nobody())).expect("an estimate");
        let with = config(toy::path(), context, &itself());
        let both = engine::estimate(&with).expect("an estimate");
        let engine = Engine::start(&with, &|_| {}).expect("the engine starts");
        assert_eq!(of_llama_cpp(&both.memory), of_llama_cpp(&engine.report().memory), "{sizing:?}");
        stop(&engine);
        let (alone, both) = (of_llama_cpp(&alone.memory), of_llama_cpp(&both.memory));
        assert_eq!(both[0].weights_bytes, 2 * alone[0].weights_bytes);
        assert_eq!(both[0].context_bytes, 2 * alone[0].context_bytes);
        assert!(total(&both) > 2 * total(&alone) - 100_000, "{alone:?} {both:?}");
    }
}

/// A token drawn at random, in the company of the guess that it is checked against.
struct Drawn {
    guesser: Guesser,
    /// Of six tokens only, each pair of which has come before, so that there is always something to guess from the past.
    of_few: bool,
}

/// The six tokens.
const FEW: std::ops::Range<Token> = 300..306;

impl Drawn {
    fn all() -> [Self; 3] {
        let matching = SpeculativeSpec { match_tokens: Some(2), ..spec(SpeculativeType::NGram, 8) };
        let past = Guesser { spec: Some(matching), ..past() };
        [
            Self { guesser: itself(), of_few: false },
            Self { guesser: poor(), of_few: false },
            Self { guesser: past, of_few: true },
        ]
    }

    fn request(&self, engine: &Engine, seed: u32, count: u32, temperature: f32) -> GenerateRequest {
        let plain = SamplingParams { seed: Some(seed), top_k: 0, top_p: 1.0, min_p: 0.0, ..SamplingParams::default() };
        let request = request(engine, "Llamas");
        let (prompt, sampling) = if self.of_few {
            let pairs = FEW.flat_map(|one| FEW.flat_map(move |two| [one, two]));
            let bias = FEW.map(|token| (token, 100.0)).collect();
            (pairs.collect(), SamplingParams { temperature: 3.0 * temperature, logit_bias: bias, ..plain })
        } else {
            (request.prompt.clone(), SamplingParams { temperature, ..plain })
        };
        // With log-probabilities an event comes for each token, also where its bytes are half a character.
        let logprobs = Some(0);
        GenerateRequest { prompt, sampling, ignore_eos: true, logprobs, max_tokens: Some(count), ..request }
    }

    /// The token at the last of `length` places, for each seed.
    async fn last(&self, engine: &Engine, seeds: std::ops::Range<u32>, length: u32, temperature: f32) -> Vec<Token> {
        let mut tokens = Vec::new();
        for seeds in seeds.collect::<Vec<_>>().chunks(4) {
            let asked = seeds.iter().map(|&seed| ask(engine, self.request(engine, seed, length, temperature)));
            for answer in futures::future::join_all(asked).await {
                assert_eq!(answer.logprobs.len(), length as usize, "{answer:?}");
                // Half a character may come once more at the end.
                tokens.extend(answer.tokens.get(length as usize - 1));
            }
        }
        tokens
    }
}

/// By how much two samples of equal size differ (chi-square), and the bound that equal distributions exceed once in a million
/// times (Wilson and Hilferty's approximation). Rare tokens count as one.
fn chi_square(left: &[Token], right: &[Token]) -> (f64, f64) {
    let count = |sample: &[Token], token| sample.iter().filter(|&&other| other == token).count();
    let mut tokens: Vec<Token> = left.iter().chain(right).copied().collect();
    tokens.sort_unstable();
    tokens.dedup();
    let (mut cells, mut rare) = (Vec::new(), (0, 0));
    for token in tokens {
        let (one, two) = (count(left, token), count(right, token));
        if one + two >= 20 {
            cells.push((one, two));
        } else {
            rare = (rare.0 + one, rare.1 + two);
        }
    }
    if rare.0 + rare.1 >= 20 {
        cells.push(rare);
    }
    let number = |count: usize| f64::from(u32::try_from(count).expect("small"));
    let apart = cells.iter().map(|&(one, two)| (number(one) - number(two)).powi(2) / number(one + two)).sum();
    let freedom = number(cells.len()) - 1.0;
    assert!(freedom >= 4.0, "too few tokens to tell distributions apart: {cells:?}");
    let part = 2.0 / (9.0 * freedom);
    (apart, freedom * (1.0 - part + 4.753 * part.sqrt()).powi(3))
}

/// What is sampled with guesses has the distribution of what is sampled without, at the places where guesses are checked.
#[tokio::test]
async fn guesses_do_not_change_what_is_sampled() {
    const SEEDS: u32 = 800;
    for drawn in Drawn::all() {
        let name = drawn.guesser.name;
        let base = start(dynamic(1024, 1024, 4), &nobody());
        let expected = drawn.last(&base, 0..SEEDS, 4, 1.2).await;
        // What it could tell: the same at another temperature.
        let colder = drawn.last(&base, SEEDS..2 * SEEDS, 4, 0.8).await;
        stop(&base);
        let engine = start(dynamic(1024, 1024, 4), &drawn.guesser);
        let found = drawn.last(&engine, SEEDS..2 * SEEDS, 4, 1.2).await;
        let stats = engine.stats();
        stop(&engine);
        let ((apart, bound), (far, least)) = (chi_square(&expected, &found), chi_square(&expected, &colder));
        println!("{name}: {apart:.1} of {bound:.1}; colder {far:.1} of {least:.1}; {stats:?}");
        assert!(stats.drafted_tokens >= u64::from(SEEDS) && stats.accepted_tokens > 0, "{name}: {stats:?}");
        assert!(apart < bound, "{name}: another distribution: {apart} of {bound}");
        assert!(far > least, "{name}: the test sees nothing: {far} of {least}");
    }
}

/// A place is sampled by the same random number, guessed or not: the same seed says the same, as far as the rounding of
/// sums allows, which another batch changes.
#[tokio::test]
async fn a_seed_says_the_same_with_guesses() {
    const SEEDS: u32 = 60;
    for drawn in Drawn::all() {
        let name = drawn.guesser.name;
        let (base, engine) = (start(dynamic(1024, 1024, 1), &nobody()), start(dynamic(1024, 1024, 1), &drawn.guesser));
        let mut equal = 0;
        for seed in 0..SEEDS {
            let expected = ask(&base, drawn.request(&base, seed, 24, 1.0)).await;
            equal += u32::from(said(&ask(&engine, drawn.request(&engine, seed, 24, 1.0)).await) == said(&expected));
        }
        println!("{name}: {equal} of {SEEDS} texts are equal; {:?}", engine.stats());
        assert!(engine.stats().drafted_tokens >= u64::from(SEEDS), "{name}: {:?}", engine.stats());
        assert!(equal >= SEEDS * 9 / 10, "{name}: {equal} of {SEEDS} texts are equal");
        stop(&base);
        stop(&engine);
    }
}
